"""One run from start to end: checks first, then the pipeline, then what is left behind."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipeline import __version__
from pipeline.config import EmbedConfig, KeptField
from pipeline.embed import Job, build_pipeline
from pipeline.engine import is_local, make_runner
from pipeline.errors import ConfigError, InputError, TableError
from pipeline.failures import explain_failure, on_stop
from pipeline.plan import EmbedPlan, plan_embedding
from pipeline.progress import Progress
from pipeline.report.progress import ProgressReporter
from pipeline.runtime import load_tensorflow
from pipeline.saved_model import absolute_path
from pipeline.sinks.index import Index, read_index
from pipeline.sinks.writing import DeadLetterFormat, RowFormat
from pipeline.sources.planning import InputPlan, estimate_documents, infer_kept_fields, plan_input
from pipeline.tables.attempts import abandon_attempt, sweep_dead_attempts
from pipeline.tables.carry import FileReader
from pipeline.tables.commit import FolderCommit, Takeover
from pipeline.tables.journal import flush_journals, journal_folder, list_segments
from pipeline.tables.known import build_known
from pipeline.tables.lock import TableLock
from pipeline.tables.manifest import (
    POINTER,
    Manifest,
    attempts_folder,
    open_table,
    read_manifest,
    read_pointer,
    snapshot_folder,
)
from pipeline.tables.pointer import read_versioned
from pipeline.tables.publish import Publication, check_free_space, check_output, name_snapshot
from pipeline.tables.recall import RecallRule
from pipeline.tables.storage import is_local as is_local_path
from pipeline.tables.storage import join, make_folder

_LOGGER = logging.getLogger(__name__)
_STORED_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 0.125}
_OTHER_ROW_BYTES = 260  # id, hash, counts, framing, index


class Settled(NamedTuple):
    """A configuration with everything that can be known without touching the output."""

    config: EmbedConfig
    table: str
    found: InputPlan
    kept: tuple[KeptField, ...]
    plan: EmbedPlan


def build_table(config: EmbedConfig, options: PipelineOptions | None = None, show_progress: bool = False) -> Manifest:
    """Runs the whole job: reads, embeds, writes and publishes a new snapshot of the table.

    Args:
      config: all settings; `read.input` and `write.output` are needed.
      options: Beam's options; by default the local engine.
      show_progress: whether to report to stderr while it runs.

    Returns:
      The new snapshot's manifest.

    Raises:
      EmbeamError: if the configuration cannot work, the output cannot be written, or the run is stopped; the table's
        live snapshot is then what it was before.
    """
    load_tensorflow()
    started = time.time()
    options = options or PipelineOptions([])
    distributed = not is_local(options.view_as(StandardOptions).runner or "")
    runner = make_runner(options)
    settled = settle(config)
    table, name = settled.table, name_snapshot()
    check_output(table)
    make_folder(table)
    with TableLock(table, name) as lock, scratch_folder(table, name) as scratch:
        forget = on_stop(lock.release)
        try:
            job = prepare_job(settled, name, started, distributed, scratch)
            reporter = ProgressReporter(scratch, job.input.total_bytes)
            with reporter if show_progress and not distributed else nullcontext():
                run_job(job, runner, options)
        finally:
            forget()
    return open_table(table)[0]


@contextmanager
def scratch_folder(table: str, name: str) -> Iterator[str]:
    """A local folder for what the run's processes share: on the table's disk if that is local, as it grows with it."""
    sweep_dead_attempts(table, table)
    if is_local_path(table):
        folder = join(attempts_folder(table, name), "scratch")
        os.makedirs(folder)
    else:
        folder = tempfile.mkdtemp(prefix="embeam-")
    forget = on_stop(lambda: shutil.rmtree(folder, ignore_errors=True))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        forget()


def run_job(job: Job, runner: Any, options: PipelineOptions) -> None:
    """Runs a prepared job to its end; one that fails leaves its dead letters and its journal.

    Raises:
      EmbeamError: if it fails.
    """
    publication = job.commit.publication
    names = (publication.table, publication.table, publication.name, publication.previous)

    def stop() -> str:
        flush_journals()
        return abandon_attempt(*names)

    forget = on_stop(stop)
    try:
        pipeline = beam.Pipeline(runner=runner, options=options)
        build_pipeline(pipeline, job)
        pipeline.run().wait_until_finish()
    except Exception as error:
        try:
            if letters := stop():
                _LOGGER.warning("the dead letters of the failed run are in %s until the next run", letters)
        except Exception as problem:
            _LOGGER.warning("what the failed run had written could not be removed: %s", problem)
        raise explain_failure(error) from error
    finally:
        forget()


def settle(config: EmbedConfig) -> Settled:
    """Checks everything that can be known without touching the output.

    Raises:
      EmbeamError: if the run could not succeed.
    """
    if not config.read.input:
        raise ConfigError("--input is missing; name the files to embed: --input='corpus/*.txt'")
    if not config.write.output:
        raise ConfigError("--output is missing; name the folder of the table: --output=table")
    if config.write.output_format == "parquet" and config.write.compression == "gzip":
        raise ConfigError("--compression=gzip: Parquet files are compressed inside; leave it out")
    found = plan_input(config.read)
    if not found.files:
        raise InputError(f"--input={' '.join(config.read.input)} matches only empty files; give files with text")
    for path in found.empty_files:
        _LOGGER.warning("%s is empty and holds no documents", path)
    kept = tuple(infer_kept_fields(found, config.read))
    return Settled(config, absolute_path(config.write.output), found, kept, plan_embedding(config))


def prepare_job(settled: Settled, name: str, started: float, distributed: bool = False, scratch: str = "") -> Job:
    """Looks at the output and at what is known already; the caller holds the table's lock.

    Args:
      settled: from `settle`.
      name: of the new snapshot.
      started: when the run began, in seconds since the epoch.
      distributed: whether the engine may shuffle what grows with the corpus.
      scratch: an empty local folder that all processes of the run see.

    Raises:
      EmbeamError: if the run could not succeed.
    """
    config, table, found, kept, plan = settled
    _, version = read_versioned(join(table, POINTER))
    previous = read_pointer(table)
    if config.read.limit and previous:
        raise ConfigError(
            f"--limit={config.read.limit} is for trials and --output={config.write.output} already holds a table; "
            "give another folder"
        )
    live = read_manifest(table, previous) if previous else None
    check_model(live, plan, config)
    layout = plan.layout(kept)
    row_bytes = _OTHER_ROW_BYTES + int(plan.dimension * _STORED_BYTES[layout.dtype])
    check_free_space(table, estimate_documents(found, config.read), row_bytes)
    form = RowFormat(config.write.output_format, layout, config.write.compression)
    attempts = attempts_folder(table, name)
    make_folder(attempts)
    takeover = prepare_takeover(table, live, plan, form, scratch)
    settings = config.flat() | {
        flag: absolute_path(path)  # a later query may run in another folder
        for flag in ("encoder", "preprocessor")
        if (path := config.flat()[flag])
    }
    settings |= {"encoder_graph": plan.encoder.graph, "precision": plan.encoder.precision}  # as settled
    facts = {
        "embeam": __version__,
        "file_format": config.write.output_format,
        "compression": config.write.compression,
        "layout": layout,
        "fingerprint": plan.fingerprint,
        "identity": plan.identity,
        "settings": settings,
        "parity": plan.encoder.parity._asdict() if plan.encoder.parity else {},
    }
    dead = config.write.max_dead_fraction
    publication = Publication(table, name, previous, version, started, facts, dead, config.reindex)
    letters = DeadLetterFormat(config.write.dead_letter_text)
    commit = FolderCommit(publication, takeover, form, config.write.shard_bytes, letters)
    progress = Progress("" if distributed else scratch, name, dead)
    journal = journal_folder(table, plan.fingerprint)
    return Job(config, found, kept, plan, attempts, journal, commit, distributed, progress)


def check_model(live: Manifest | None, plan: EmbedPlan, config: EmbedConfig) -> None:
    """Says what differs between the live table and the wanted one, if that means to embed everything again.

    Raises:
      TableError: if that is not wanted.
      ConfigError: if rows should be kept that cannot be made again.
    """
    if live is None or live.fingerprint == plan.fingerprint:
        return
    changes = "; ".join(describe_changes(live.identity, plan.identity))
    if config.reindex.on_model_change == "stop":
        raise TableError(
            f"{config.write.output} was made otherwise ({changes}) and --on_model_change=stop; leave that out to embed "
            "everything again, or give another --output"
        )
    if config.reindex.deletes == "keep" or config.reindex.retry_dead_letters:
        flag = "--deletes=keep" if config.reindex.deletes == "keep" else "--retry_dead_letters"
        raise ConfigError(
            f"{flag}: {config.write.output} was made otherwise ({changes}), and its rows cannot be kept beside new "
            "ones; give another --output, or leave the flag out to embed the whole input again"
        )
    _LOGGER.warning("%s was made otherwise (%s): everything is embedded again", config.write.output, changes)


def describe_changes(old: dict[str, Any], new: dict[str, Any], name: str = "") -> Iterator[str]:
    """What differs between two identities, such as `preprocessing.max_tokens 128 -> 256`."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from describe_changes(before, after, f"{name}{key}.")
        elif before != after:
            shown = (str(value) if len(str(value)) <= 40 else f"{str(value)[:12]}..." for value in (before, after))
            yield f"{name}{key} {' -> '.join(shown)}"


def prepare_takeover(table: str, live: Manifest | None, plan: EmbedPlan, form: RowFormat, scratch: str) -> Takeover:
    """Indexes what is known: the live table and the journal of earlier attempts."""
    folder = os.path.join(scratch, "known")
    os.makedirs(folder)
    reusable = live is not None and live.fingerprint == plan.fingerprint
    build_known(folder, read_live_indexes(table, live), list_segments(table, plan.fingerprint), reusable)
    same = live is not None and (live.file_format, live.compression, live.layout) == (
        form.name,
        form.compression,
        form.layout,
    )
    rule = RecallRule(folder, getattr(plan.split, "prefix", ""), reusable and same, form.layout.keep_text)
    if live is None:
        return Takeover(rule)
    root = snapshot_folder(table, live.snapshot)
    sizes = {join(root, file.name): (file.n_bytes, file.sha256) for file in live.files}
    return Takeover(rule, FileReader(live.file_format, live.layout, live.compression), reusable, sizes)


def read_live_indexes(table: str, live: Manifest | None) -> Iterator[tuple[str, Index]]:
    """Yields path and index of each file of the live snapshot.

    Raises:
      TableError: if an index is damaged.
    """
    if live is None:
        return
    root = snapshot_folder(table, live.snapshot)
    for file, index_file in zip(live.files, live.index_files, strict=True):
        path = join(root, index_file.name)
        try:
            index = read_index(path)
            if len(index.entries) != file.rows:
                raise ValueError(f"it has {len(index.entries)} entries instead of {file.rows}")
        except (OSError, ValueError) as error:
            raise TableError(
                f"{path} is damaged: {error}; embeam rollback returns to an older snapshot, and without the file "
                "CURRENT embeam embed makes the table anew"
            ) from error
        yield join(root, file.name), index
