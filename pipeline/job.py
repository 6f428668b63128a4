"""One run from start to end: checks first, then the pipeline, then what is left behind."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from contextlib import nullcontext
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipeline import __version__
from pipeline.config import EmbedConfig
from pipeline.embed import Job, build_pipeline
from pipeline.engine import is_local, make_runner
from pipeline.errors import ConfigError, InputError
from pipeline.failures import explain_failure, on_stop
from pipeline.plan import plan_embedding
from pipeline.progress import Progress
from pipeline.report.progress import ProgressReporter
from pipeline.runtime import load_tensorflow
from pipeline.saved_model import absolute_path
from pipeline.sources.planning import estimate_documents, infer_kept_fields, plan_input
from pipeline.tables.attempts import abandon_attempt, claim_attempt, sweep_dead_attempts
from pipeline.tables.manifest import Manifest, open_table
from pipeline.tables.publish import Publication, check_free_space, check_output, name_snapshot

_LOGGER = logging.getLogger(__name__)
_STORED_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 0.125}
_OTHER_ROW_BYTES = 200  # id, hash, counts and framing


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
    options = options or PipelineOptions([])
    distributed = not is_local(options.view_as(StandardOptions).runner or "")
    runner = make_runner(options)
    status_folder = "" if distributed else tempfile.mkdtemp(prefix="embeam-")
    forget_status = on_stop(lambda: shutil.rmtree(status_folder, ignore_errors=True))
    try:
        job = prepare_job(config, distributed, status_folder)
        reporter = ProgressReporter(status_folder, job.input.total_bytes)
        with reporter if show_progress and not distributed else nullcontext():
            run_job(job, runner, options)
    finally:
        shutil.rmtree(status_folder, ignore_errors=True)
        forget_status()
    return open_table(job.publication.table)[0]


def run_job(job: Job, runner: Any, options: PipelineOptions) -> None:
    """Runs a prepared job to its end; one that fails leaves nothing but its dead letters.

    Raises:
      EmbeamError: if it fails.
    """
    publication = job.publication
    names = (publication.table, publication.name)
    lock = claim_attempt(*names)
    forget = on_stop(lambda: abandon_attempt(*names, publication.previous))
    try:
        pipeline = beam.Pipeline(runner=runner, options=options)
        build_pipeline(pipeline, job)
        pipeline.run().wait_until_finish()
    except Exception as error:
        try:
            if letters := abandon_attempt(*names, publication.previous):
                _LOGGER.warning("the dead letters of the failed run are in %s until the next run", letters)
        except Exception as problem:
            _LOGGER.warning("what the failed run had written could not be removed: %s", problem)
        raise explain_failure(error) from error
    finally:
        forget()
        if lock is not None:
            lock.close()


def prepare_job(config: EmbedConfig, distributed: bool = False, status_folder: str = "") -> Job:
    """Settles and checks everything that can be known before the first document is read.

    Raises:
      EmbeamError: if the run could not succeed.
    """
    if not config.read.input:
        raise ConfigError("--input is missing; name the files to embed: --input='corpus/*.txt'")
    if not config.write.output:
        raise ConfigError("--output is missing; name the folder of the table: --output=table")
    if config.write.output_format == "parquet" and config.write.compression == "gzip":
        raise ConfigError("--compression=gzip: Parquet files are compressed inside; leave it out")
    table = absolute_path(config.write.output)
    started = time.time()
    found = plan_input(config.read)
    if not found.files:
        raise InputError(f"--input={' '.join(config.read.input)} matches only empty files; give files with text")
    for path in found.empty_files:
        _LOGGER.warning("%s is empty and holds no documents", path)
    kept = tuple(infer_kept_fields(found, config.read))
    plan = plan_embedding(config)
    previous = check_output(table)
    sweep_dead_attempts(table)
    if config.read.limit and previous:
        raise ConfigError(
            f"--limit={config.read.limit} is for trials and --output={config.write.output} already holds a table; "
            "give another folder"
        )
    layout = plan.layout(kept)
    row_bytes = _OTHER_ROW_BYTES + int(plan.dimension * _STORED_BYTES[layout.dtype])
    n_documents = estimate_documents(found, config.read)
    check_free_space(table, n_documents, row_bytes)
    name = name_snapshot()
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
    publication = Publication(table, name, previous, started, facts, config.write.max_dead_fraction)
    progress = Progress(status_folder, name, config.write.max_dead_fraction)
    return Job(config, found, kept, plan, publication, distributed, progress)
