"""What an engine shows of a job while it runs: Beam's metrics, under fixed names in the namespace `embeam`.

They are for watching and alerts. Engines may count a repeated bundle twice; the counts, which the manifest is made
from, they do not.
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
