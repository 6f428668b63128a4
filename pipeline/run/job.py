"""Runs one job from start to end: checks, the pipeline, and the clean-up."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, StandardOptions

from pipeline import __version__
from pipeline.config import EmbedConfig
from pipeline.embed import Job, build_pipeline
from pipeline.encoders.runtime import load_tensorflow
from pipeline.engines.dataflow import cancel_job, describe_job, explain_job, job_lives, link_job, validate_options
from pipeline.engines.dedicated_workers import OnDedicatedWorkers
from pipeline.engines.presets import resource_hints, share_memory
from pipeline.engines.runner import is_local, make_runner, prepare_options
from pipeline.errors import ConfigError, RunError, first_line
from pipeline.files import absolute_path, join, make_folder
from pipeline.files import is_local as is_local_path
from pipeline.progress import Progress
from pipeline.report.logs import report_news
from pipeline.report.progress_bar import ProgressReporter
from pipeline.reuse.journal import journal_folder
from pipeline.reuse.journal_writer import flush_journals
from pipeline.run.failures import explain_failure, watch_threads
from pipeline.run.resolve import (
    MODEL_PATHS,
    ResolvedRun,
    estimate_new_rows,
    find_changes,
    find_stops,
    prepare_distributed_reuse,
    prepare_local_reuse,
    resolve,
    resolve_again,
)
from pipeline.signals import on_stop
from pipeline.sinks.writing import DeadLetterFormat
from pipeline.sources.names import name_as_text
from pipeline.sources.stdin import STDIN, removing_copy
from pipeline.tables.attempts import abandon_attempt, sweep_dead_attempts
from pipeline.tables.folder import FolderStore
from pipeline.tables.lock import EXPIRY_SECONDS, LEASE_SECONDS, Lease, TableLock
from pipeline.tables.manifest import GoneFiles, Manifest, attempts_folder
from pipeline.tables.pointer import is_gcs
from pipeline.tables.publish import Publication, name_snapshot
from pipeline.tables.store import CommitPlan, Store

_LOGGER = logging.getLogger(__name__)


@removing_copy()
def build_table(
    config: EmbedConfig, options: PipelineOptions | None = None, show_progress: bool = False
) -> Manifest | None:
    """Runs the whole job: reads, embeds, writes and publishes a new snapshot of the table.

    Args:
      config: all settings; `read.input` and `write.output` are needed.
      options: Beam's options; by default the local engine.
      show_progress: whether to report to stderr while it runs.

    Returns:
      The new snapshot's manifest; None if the job was only staged as a template, which publishes it when it runs.

    Raises:
      EmbeamError: if the configuration cannot work, the output cannot be written, or the run is stopped; the table's
        live snapshot is then unchanged.
    """
    load_tensorflow()
    started = time.time()
    options = options or PipelineOptions([])
    distributed = not is_local(options.view_as(StandardOptions).runner or "")
    prepare_options(options, config)
    runner = make_runner(options)
    if distributed:
        validate_options(options, runner)
        if STDIN in config.read.input:
            raise ConfigError(
                "--input=- is read on this machine, which the workers of other engines do not see; use --runner=local, "
                "or write it to a file that they can read"
            )
    resolved = resolve(config)
    store, name = resolved.store, name_snapshot()
    if distributed:
        require_folder(store)
    store.check_writable()
    make_folder(store.work)
    expiry_seconds = LEASE_SECONDS if distributed else EXPIRY_SECONDS
    with (
        TableLock(store.work, name, expiry_seconds=expiry_seconds) as lock,
        scratch_folder(store.work, name) as scratch,
    ):
        forget = on_stop(lock.release)
        try:
            job = prepare_job(resolved, name, started, distributed, scratch)
            reporter = ProgressReporter(scratch, job.input.total_bytes)
            with reporter if show_progress and not distributed else nullcontext():
                run_job(job, runner, options, lock.leave_to_job, show_progress)
            if options.view_as(GoogleCloudOptions).template_location:
                lock.leave_to_job()
                return None
        finally:
            forget()
    manifest = store.read_live().manifest
    if manifest is None or manifest.snapshot != name:
        raise RunError(f"the engine reports success, but {store.shown} was not published; check the engine's log")
    return manifest


@contextmanager
def scratch_folder(work: str, name: str) -> Iterator[str]:
    """A local folder that the run's processes share. It is on the table's disk if that is local."""
    sweep_dead_attempts(work)
    if is_local_path(work):
        folder = join(attempts_folder(work, name), "scratch")
        os.makedirs(folder)
    else:
        folder = tempfile.mkdtemp(prefix="embeam-")
    forget = on_stop(lambda: shutil.rmtree(folder, ignore_errors=True))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        forget()


def run_job(
    job: Job,
    runner: Any,
    options: PipelineOptions,
    leave: Callable[[], object] = lambda: None,
    show_progress: bool = False,
) -> None:
    """Runs a prepared job to its end; a failed one keeps its dead letters and its journal.

    Args:
      job: from `prepare_job`.
      runner: from `make_runner`.
      options: the engine's.
      leave: leaves the table's lock to a job that outlives this process.
      show_progress: whether to print a link to the job on stderr.

    Raises:
      EmbeamError: if it fails.
    """
    publication = job.commit_plan.publication
    names = (publication.table, publication.name, publication.previous)
    running: Any = None
    reasons: list[BaseException] = []
    left = threading.Event()  # a job that may still write keeps its files and its lock

    def stop() -> str:
        if left.is_set():
            return ""
        try:
            flush_journals()
        except Exception as problem:  # a full disk; what was written earlier counts all the same
            _LOGGER.warning("the vectors of the last seconds could not be written to the journal: %s", problem)
        return abandon_attempt(*names)

    def cancel() -> None:
        if running is not None and job.distributed and not cancel_job(running):
            left.set()
            leave()

    forget, forget_job = on_stop(stop), on_stop(cancel, first=True)
    try:
        pipeline = beam.Pipeline(runner=runner, options=options)
        build_pipeline(pipeline, job)
        running = pipeline.run()
        if show_progress and (link := link_job(running, options)):
            report_news(f"the Dataflow job {running.job_id()} runs: {link}")
        with watch_threads() as reasons:
            running.wait_until_finish()
    except Exception as error:
        if running is not None and job_lives(running):
            left.set()
            leave()
            reason = first_line(reasons[-1] if reasons else error)
            raise RunError(f"lost the connection to {describe_job(running, options)} ({reason})") from error
        try:
            if dead_letters := stop():
                _LOGGER.warning("the dead letters of the failed run are in %s until the next run", dead_letters)
        except Exception as problem:
            _LOGGER.warning("files of the failed run could not be removed: %s", problem)
        raise explain_failure(error, explain_job(error, options)) from error
    finally:
        forget_job()
        forget()


def prepare_job(resolved: ResolvedRun, name: str, started: float, distributed: bool = False, scratch: str = "") -> Job:
    """Prepares a job from the output's state and the vectors to reuse; the caller holds the table's lock.

    Args:
      resolved: from `resolve`.
      name: of the new snapshot.
      started: when the run began, in seconds since the epoch.
      distributed: whether the engine may shuffle what grows with the corpus.
      scratch: an empty local folder that all processes of the run see.

    Raises:
      EmbeamError: if the run cannot succeed.
    """
    resolved = resolve_again(resolved)
    for stop in find_stops(resolved, estimate_new_rows(resolved)):
        raise stop
    config, store, spec, form, live = resolved.config, resolved.store, resolved.spec, resolved.form, resolved.live
    if changes := find_changes(live, spec):
        _LOGGER.warning(
            "%s was made with other settings (%s): everything is embedded again", store.shown, "; ".join(changes)
        )
    attempts = attempts_folder(store.work, name)
    make_folder(attempts)
    inputs = resolved.input.sources
    if distributed:
        reuse = prepare_distributed_reuse(require_folder(store), live, spec, form, attempts, inputs, config)
    else:
        reuse = prepare_local_reuse(store, live, spec, form, scratch, inputs, config)
    dead = config.write.max_dead_fraction
    previous = live.snapshot if live else ""
    if reuse.gone.n and not config.reindex.keeps_deleted:
        _LOGGER.warning(
            "rows of %s come from %s; a document of theirs that another file has keeps its vector, all others are "
            "deleted, and --deletes=keep keeps them",
            store.shown,
            reuse.gone,
        )
    gone = GoneFiles() if config.reindex.retry_dead_letters else reuse.gone  # which reads no input
    facts = describe_table(resolved) | {"gone_files": gone}
    publication = Publication(store.work, name, previous, resolved.version, started, facts, dead, config.reindex)
    dead_letters = DeadLetterFormat(config.write.dead_letter_text)
    commit_plan = CommitPlan(publication, reuse, form, config.write.shard_bytes, dead_letters)
    lease = Lease(store.work, name) if distributed and is_gcs(store.work) else None
    return Job(
        config=config,
        input=resolved.input,
        kept=resolved.kept,
        spec=spec,
        attempts=attempts,
        journal=journal_folder(store.work, spec.fingerprint),
        commit_plan=commit_plan,
        committer=store.committer(commit_plan),
        distributed=distributed,
        place_encoder=partial(OnDedicatedWorkers, hints=resource_hints(config.workers)) if distributed else leave_here,
        gpu_memory_mib=share_memory(config.workers),
        lease=lease,
        progress=Progress("" if distributed else scratch, name, dead, lease.renew if lease else None),
    )


def require_folder(store: Store) -> FolderStore:
    """The store, if a distributed engine can write to it.

    Raises:
      ConfigError: if not.
    """
    if not isinstance(store, FolderStore):
        raise ConfigError(f"--output={store.shown}: tables in databases are written by --runner=local only")
    return store


def describe_table(resolved: ResolvedRun) -> dict[str, Any]:
    """The fields of the new snapshot's manifest that are fixed before the run."""
    config, spec, form = resolved.config, resolved.spec, resolved.form
    settings = config.flat() | {
        flag: absolute_path(path)  # a later query may run in another folder
        for flag in MODEL_PATHS
        if (path := config.flat()[flag])
    }
    for flag in ("input", "exclude"):
        settings[flag] = [name_as_text(glob) for glob in settings[flag]]
    if config.reindex.retry_dead_letters and resolved.live:
        settings = dict(resolved.live.settings)  # what the table is made from has not changed
    as_resolved = {"encoder_graph": spec.encoder.graph, "precision": spec.encoder.precision}
    return {
        "embeam": __version__,
        "file_format": form.name,
        "compression": form.compression,
        "layout": form.layout,
        "fingerprint": spec.fingerprint,
        "identity": spec.identity,
        "settings": settings | as_resolved,
        "parity": spec.encoder.parity._asdict() if spec.encoder.parity else {},
    }


def leave_here(encode: beam.PTransform) -> beam.PTransform:
    """Returns the transform unchanged: the local engine encodes in the stage that reads."""
    return encode
