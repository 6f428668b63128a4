"""The back end of distributed engines: by joins, with the same tables as by the local index.

These runs are whole, through Beam's joins; what either back end decides is tested case by case in `test_reruns.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.encoders.handler import LoadedEncoder
from pipeline.engines.runner import make_runner
from pipeline.errors import ConfigError, EmbeamError, RunError, ValidationError
from pipeline.files import make_folder
from pipeline.run.job import prepare_job, run_job
from pipeline.run.resolve import resolve
from pipeline.tables.manifest import open_table
from pipeline.tables.publish import name_snapshot
from tests.support.corpora import write_jsonl
from tests.support.emulators import PRISM
from tests.support.histories import N_TEXTS, SETTINGS, first_records, run_joined, second_records
from tests.support.paths import ENCODER, ROOT
from tests.support.runs import make_config, run_pipeline
from tests.support.tables import assert_same_rows, read_rows


def write_corpus(folder: Path, records: list[dict[str, Any]]) -> None:
    """Two files, which two workers would read."""
    for i in range(2):
        write_jsonl(folder / f"part-{i}.jsonl", records[i::2])


@pytest.mark.numeric
@pytest.mark.parametrize(
    "settings",
    [
        {"on_long": "reject"},
        *(
            pytest.param(settings, marks=pytest.mark.exhaustive)
            for settings in (
                {"on_long": "chunk", "max_tokens": 16, "chunk_overlap": 2},
                {"on_long": "average", "max_tokens": 16, "output_format": "parquet", "keep_text": True},
                {"dtype": "int8", "compression": "gzip"},
                {"vector": "sequence_output:tokens"},
                {"deletes": "keep", "on_long": "reject"},
            )
        ),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_history_gives_the_table_of_the_local_back_end(tmp_path, settings):
    """All kinds of documents: new, changed, equal, moved, deleted, dead and unreadable documents."""
    local_table = str(tmp_path / "local")
    later = [*second_records(), {"id": "long twin", "text": "dog " * 600, "year": 3}]
    for records in (first_records(), later):
        write_corpus(tmp_path, records)
        if records is later:
            with open(tmp_path / "part-1.jsonl", "a") as file:
                file.write("{\n")  # may be any document of this file
        joined = run_joined(tmp_path, **settings)
        local = run_pipeline(tmp_path, **{**SETTINGS, **settings, "output": local_table})
        assert_same_rows(read_rows(str(tmp_path / "table")), read_rows(local_table), settings.get("dtype", "float32"))
        assert joined.rows == local.rows and joined.dead_letters == local.dead_letters
        for name in ("documents", "encoded", "same_text", "unchanged"):
            assert joined.counts["reuse"].get(name, 0) == local.counts["reuse"].get(name, 0), name
        for name in ("deleted", "stale", "kept", "moved"):
            assert joined.counts["merge"].get(name, 0) == local.counts["merge"].get(name, 0), name
        assert joined.counts["encode"].get("chunks", 0) == local.counts["encode"].get("chunks", 0)
    assert joined.counts["reuse"]["unchanged"] > 50 and joined.counts["reuse"]["same_text"] == 2
    assert joined.counts["merge"]["stale"] >= 3 and joined.counts["merge"]["moved"] == (
        settings.get("deletes") != "keep"
    )
    if settings == {"on_long": "reject"}:
        assert joined.dead_letters == {"too_long": 2, "malformed_json": 1}


def test_a_job_that_is_started_again_finds_what_it_had_made(tmp_path, monkeypatch):
    """As Flink restarts a job: the same graph, built before anything was encoded."""
    write_corpus(tmp_path, first_records())
    config, options = make_config(tmp_path, **SETTINGS), PipelineOptions([])
    resolved = resolve(config)
    make_folder(resolved.store.work)
    job = prepare_job(resolved, name_snapshot(), time.time(), True)

    def stop(*given: Any) -> str:
        raise RunError("the machine is lost")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.tables.folder.FolderCommit.commit", stop)
        with pytest.raises(RunError, match="the machine is lost"):
            run_job(job, make_runner(options), options)
    run_job(job, make_runner(options), options)
    manifest = open_table(config.write.output)[0]
    assert manifest.rows == N_TEXTS + 5
    assert manifest.counts["reuse"]["reused"] == N_TEXTS + 5
    assert manifest.counts["encode"].get("rows", 0) == 0


def test_validation_compares_what_is_reused(tmp_path, monkeypatch):
    write_corpus(tmp_path, first_records())
    run_pipeline(tmp_path, **SETTINGS)
    encode = LoadedEncoder.encode

    def turn(self: Any, batch: Any) -> Any:
        done = encode(self, batch)
        return done._replace(vectors=[-vector for vector in done.vectors])

    monkeypatch.setattr(LoadedEncoder, "encode", turn)
    with pytest.raises(ValidationError, match="encoded again, gives another vector"):
        run_joined(tmp_path)


def test_databases_are_refused_by_name(tmp_path):
    write_corpus(tmp_path, first_records())
    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    with pytest.raises(ConfigError, match="--runner=local"):
        run_joined(tmp_path, output=output)


def embed_on_job_service(engine: list[str], folder: Path, flags: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Runs `embeam embed` through a job service of its own."""
    command = [sys.executable, "-m", "runners.portable", f"--log_dir={folder}/logs", *engine]
    command += [sys.executable, "-m", "pipeline.cli", "embed", *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.engine
@pytest.mark.parametrize("engine", [[], [f"--prism={PRISM}"]], ids=["python", "prism"])
def test_a_job_service_reindexes(engine, tmp_path):
    """The same through a real job service and worker processes of its own."""
    write_corpus(tmp_path, first_records())
    run_pipeline(tmp_path, **SETTINGS, on_long="reject")
    write_corpus(tmp_path, second_records())
    flags = {**SETTINGS, "input": f"{tmp_path}/*.jsonl", "output": f"{tmp_path}/table", "encoder": ENCODER}
    flags |= {"id_field": "id", "on_long": "reject"}
    done = embed_on_job_service(engine, tmp_path, flags)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest, folder = open_table(str(tmp_path / "table"))
    assert manifest.counts["reuse"]["encoded"] == 3 and manifest.counts["merge"]["stale"] == 1
    rows = read_rows(str(tmp_path / "table"))
    dead_letters = [json.loads(line) for path in Path(folder).glob("dead_letters-*") for line in path.open()]
    assert [dead_letter["id"] for dead_letter in dead_letters] == ["n13"]
    for records in (first_records(), second_records()):
        write_corpus(tmp_path, records)
        run_pipeline(tmp_path, **SETTINGS, on_long="reject", output=str(tmp_path / "local"))
    assert_same_rows(rows, read_rows(str(tmp_path / "local")))


@pytest.mark.engine
@pytest.mark.parametrize("engine", [[], [f"--prism={PRISM}"]], ids=["python", "prism"])
def test_an_error_on_an_engine_s_worker_is_told_in_one_line(engine, tmp_path):
    write_corpus(tmp_path, first_records())
    flags = {**SETTINGS, "input": f"{tmp_path}/*.jsonl", "output": f"{tmp_path}/table", "encoder": ENCODER}
    flags |= {"id_field": "id", "on_long": "reject", "max_tokens": 6, "max_dead_fraction": 0.1}
    done = embed_on_job_service(engine, tmp_path, flags)
    told = [line for line in done.stderr.splitlines() if "dead letters of the failed run are in" not in line]
    assert done.returncode == 1 and len(told) == 1, done.stderr[-3000:]
    assert told[0].startswith("embeam: ") and "--max_dead_fraction" in told[0]


def test_an_error_on_a_worker_is_told_in_one_line(tmp_path):
    write_corpus(tmp_path, first_records())
    with pytest.raises(EmbeamError, match="--max_dead_fraction"):
        run_joined(tmp_path, on_long="reject", max_tokens=6, max_dead_fraction=0.1)
