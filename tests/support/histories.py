"""Two states of a small corpus with all that may happen between two runs, and the back end of distributed engines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.engines.runner import make_runner
from pipeline.files import make_folder
from pipeline.reuse.live_table import DistributedReuse
from pipeline.run.job import prepare_job, run_job, scratch_folder
from pipeline.run.resolve import resolve
from pipeline.tables.manifest import Manifest, open_table
from pipeline.tables.publish import name_snapshot
from tests.support.corpora import some_texts
from tests.support.runs import make_config

N_TEXTS = 60
SETTINGS = {"keep_fields": "year", "max_dead_fraction": 0.5, "split_bytes": 2000}


def first_records() -> list[dict[str, Any]]:
    texts = some_texts(N_TEXTS, seed=9, words=(1, 30))
    records = [{"id": f"n{i}", "text": text, "year": i} for i, text in enumerate(texts)]
    return [*records, *({"id": f"twin{i}", "text": texts[i], "year": -i} for i in range(5))]


def second_records() -> list[dict[str, Any]]:
    records = [dict(record) for record in first_records()]
    records[10]["text"] = "the text has changed"
    records[11]["year"] = 77
    records[12]["id"] = "renamed"
    records[13]["text"] = "dog " * 600
    del records[20:26]
    return [*records, {"id": "new", "text": "a new one", "year": 1}, {"id": "new twin", "text": "a new one", "year": 2}]


def run_joined(folder: Path, **settings: Any) -> Manifest:
    """Runs a job as it runs on a distributed engine, by the local one."""
    config = make_config(folder, **{**SETTINGS, **settings})
    resolved, options, name = resolve(config), PipelineOptions([]), name_snapshot()
    make_folder(resolved.store.work)
    with scratch_folder(resolved.store.work, name) as scratch:
        job = prepare_job(resolved, name, time.time(), True, scratch)
        assert isinstance(job.commit_plan.reuse.back_end, DistributedReuse)
        run_job(job, make_runner(options), options)
    return open_table(config.write.output)[0]
