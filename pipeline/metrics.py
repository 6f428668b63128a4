"""Beam metrics that an engine shows while a job runs, under fixed names in the namespace `embeam`.

They are for monitoring and alerts. Engines may count a repeated bundle twice in them, but not in the counts from which
the manifest is made.
"""

from __future__ import annotations

from apache_beam.metrics import Metrics

NAMESPACE = "embeam"

DOCUMENTS = Metrics.counter(NAMESPACE, "documents")
READ_BYTES = Metrics.counter(NAMESPACE, "read_bytes")
TOKENS = Metrics.counter(NAMESPACE, "tokens")
PADDING_TOKENS = Metrics.counter(NAMESPACE, "padding_tokens")
BATCHES = Metrics.counter(NAMESPACE, "batches")
ENCODE_MILLISECONDS = Metrics.distribution(NAMESPACE, "encode_milliseconds")  # of a batch
ROWS = Metrics.counter(NAMESPACE, "rows")
DEAD_LETTERS = Metrics.counter(NAMESPACE, "dead_letters")
