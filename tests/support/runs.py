"""Whole runs of the job in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.config import EmbedConfig
from pipeline.encoders.handler import LoadedEncoder
from pipeline.run.job import build_table
from pipeline.tables.manifest import Manifest
from tests.support.corpora import write_jsonl
from tests.support.paths import ENCODER
from tests.support.tables import Rows, read_rows

THREADS = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def make_config(folder: Path, **settings: Any) -> EmbedConfig:
    """The tiny encoder over the folder's JSON lines; keyword settings are flags."""
    defaults = {"input": str(folder / "*.jsonl"), "output": str(folder / "table"), "encoder": ENCODER}
    return EmbedConfig.from_flat({**defaults, "id_field": "id", "on_empty": "embed", **settings})


def run_pipeline(folder: Path, beam_flags: Sequence[str] = (), **settings: Any) -> Manifest:
    """Runs the whole job over the folder's JSON lines."""
    manifest = build_table(make_config(folder, **settings), PipelineOptions(list(beam_flags)))
    assert manifest is not None
    return manifest


def embed_records(
    folder: Path, records: Iterable[Mapping[str, Any]], beam_flags: Sequence[str] = (), **settings: Any
) -> tuple[Rows, Manifest]:
    """Runs the whole pipeline over some records, from a file to a table, and reads that back."""
    write_jsonl(folder / "corpus.jsonl", records)
    manifest = run_pipeline(folder, beam_flags, **settings)
    return read_rows(settings.get("output", str(folder / "table"))), manifest


def run_embed(source: object, table: object, **settings: Any) -> Manifest:
    """Embeds files as a program would that uses the package; dead letters and deletions stop nothing by default."""
    inputs = [str(path) for path in source] if isinstance(source, (list, tuple)) else [str(source)]
    values = {"input": inputs, "output": str(table), "encoder": ENCODER, "max_dead_fraction": 1.0}
    manifest = build_table(EmbedConfig.from_flat({**values, "max_delete_fraction": 1.0, **settings}))
    assert manifest is not None
    return manifest


class Watched:
    """What one run encoded, as seen at the encoder: the text of every chunk, without those encoded for comparison."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.n_compared = 0
        self.n_batches = 0


@contextlib.contextmanager
def watch_encoder(crash_after: int | None = None, crash: type[Exception] = RuntimeError) -> Iterator[Watched]:
    """Watches the encoder, which fails after so many batches if that is asked for."""
    run, encode = Watched(), LoadedEncoder.encode

    def watched(self: LoadedEncoder, batch: Any) -> Any:
        if run.n_batches == crash_after:
            raise crash
        run.n_batches += 1
        run.texts += [chunk.document.text for chunk in batch if not chunk.document.is_spot_check]
        run.n_compared += sum(chunk.document.is_spot_check for chunk in batch)
        return encode(self, batch)

    with mock.patch.object(LoadedEncoder, "encode", watched):
        yield run
