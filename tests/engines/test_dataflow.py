"""The way to Dataflow without a cloud: what is staged and submitted, and that it makes the table it should.

Beam's own client stages the real job in an emulated Cloud Storage and submits it to a small service on this machine.
The staged graph then runs in processes that know nothing else.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from apache_beam.io.filesystems import FileSystems

from pipeline.files import create_file, join
from pipeline.tables.lock import LOCK
from pipeline.tables.manifest import open_table
from tests.support.dataflow import (
    CANCELLED,
    FAILED,
    RUNNING,
    DataflowService,
    Ending,
    Job,
    Refusal,
    run_apart,
    run_staged,
    start_dataflow,
    wait_for_cancel,
    wait_until,
)
from tests.support.emulators import PROJECT, Gcs, start_gcs
from tests.support.histories import N_TEXTS, first_records, second_records
from tests.support.paths import ENCODER, ROOT
from tests.support.processes import Call, assert_one_line, start_cli
from tests.support.runs import run_pipeline
from tests.support.staged_job import StagedJob
from tests.support.tables import assert_same_rows, read_rows

pytestmark = [pytest.mark.dataflow, pytest.mark.timeout(300)]
REGION = "europe-west4"
IMAGE = f"{REGION}-docker.pkg.dev/{PROJECT}/images/embeam:7"
SETTINGS = {"id_field": "id", "keep_fields": "year", "on_long": "reject", "max_dead_fraction": 0.5, "split_bytes": 2000}
GPU = {"accelerator": "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"}
MEMORY = {"min_ram_bytes": str(24 * 10**9)}


def read_sentence(err: str) -> str:
    """The one line on stderr beside those that say where the job and its dead letters can be looked at."""
    places = " runs: https://console", "embeam: the dead letters of the failed run are in gs://"
    return assert_one_line("".join(line for line in err.splitlines(True) if not any(place in line for place in places)))


@pytest.fixture(scope="module")
def gcs() -> Iterator[Gcs]:
    """A Cloud Storage with the encoder and two states of a corpus."""
    with start_gcs() as gcs, gcs.used_here():
        for path in Path(ENCODER).rglob("*"):
            if path.is_file():
                create_file(gcs.path("encoder", str(path.relative_to(ENCODER))), path.read_bytes())
        for name, records in (("first", first_records()), ("second", second_records())):
            write_corpus(gcs.path(name), [*records, {"id": "n3", "text": "this id is taken", "year": 0}])
        yield gcs


@pytest.fixture
def dataflow() -> Iterator[DataflowService]:
    """A service whose jobs are looked at more often than every five seconds."""
    hurried = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 50), time=time.time)
    with start_dataflow() as service, mock.patch("apache_beam.runners.dataflow.dataflow_runner.time", hurried):
        yield service


def write_corpus(folder: str, records: list[dict[str, Any]]) -> None:
    """Two files, one of which has a line that is none."""
    for i in range(2):
        lines = [json.dumps(record) for record in records[i::2]] + ["{"] * i
        create_file(join(folder, f"part-{i}.jsonl"), "\n".join(lines).encode())


def make_flags(gcs: Gcs, table: str, corpus: str = "first", **others: Any) -> list[str]:
    """The command's flags, of which others may replace or, if they are None, leave out."""
    flags = SETTINGS | {
        "runner": "DataflowRunner",
        "project": PROJECT,
        "region": REGION,
        "temp_location": gcs.path("tmp", table, corpus),
        "sdk_container_image": IMAGE,
        "no_auth": "",
        "encoder": gcs.path("encoder"),
        "input": gcs.path(corpus, "*.jsonl"),
        "output": gcs.path(table),
    }
    flags |= others
    return [f"--{name}={value}".removesuffix("=") for name, value in flags.items() if value is not None]


def stage(gcs: Gcs, table: str, corpus: str = "first", gone: str = "", **flags: Any) -> StagedJob:
    """Stages a job by the command, in a process of its own as a user's would be; it says that this file is gone."""
    command = [sys.executable, "-m", "pipeline.cli", "embed"]
    command += make_flags(gcs, table, corpus, template_location=gcs.path("templates", table), **flags)
    environment = os.environ | gcs.environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"the job is staged and will publish {gcs.path(table)} when it runs")
    said = [line for line in done.stderr.splitlines() if line.startswith(("embeam:", "Traceback"))]
    assert len(said) == bool(gone) and (f"no longer among the input: {gone}" in "".join(said)) == bool(gone), said
    return StagedJob.find(gcs.path("tmp", table, corpus))


def read_dead_letters(table: str) -> list[dict[str, Any]]:
    manifest, folder = open_table(table)
    dead_letters = []
    for file in manifest.dead_letter_files:
        with FileSystems.open(join(folder, file.name), compression_type="uncompressed") as stream:
            dead_letters += [json.loads(line) for line in stream.read().splitlines()]
    return sorted(dead_letters, key=lambda dead_letter: (dead_letter["file"], dead_letter["byte"]))


def assert_same_table(table: str, expected: str) -> None:
    """Rows, dead letters and what was counted of them."""
    assert_same_rows(read_rows(table), read_rows(expected))
    assert read_dead_letters(table) == read_dead_letters(expected)
    manifest, local = open_table(table)[0], open_table(expected)[0]
    assert (manifest.rows, manifest.dead_letters) == (local.rows, local.dead_letters)
    for name in ("documents", "encoded", "same_text", "unchanged"):
        assert manifest.counts["reuse"].get(name, 0) == local.counts["reuse"].get(name, 0), name


def list_left(gcs: Gcs, table: str) -> list[str]:
    """What lies in a table's folder beside its snapshots."""
    return [name for name in gcs.objects() if name.startswith(f"{table}/") and "/snapshots/" not in name]


def list_generations(gcs: Gcs, table: str) -> dict[str, str]:
    """Which version of each file a table's folder has."""
    return {name: found["generation"] for name, found in gcs.objects().items() if name.startswith(f"{table}/")}


@pytest.fixture(scope="module")
def local_tables(gcs: Gcs, tmp_path_factory) -> dict[str, str]:
    """The table of each state of the corpus, the second as a reindex of the first, by the local engine."""
    tables = {}
    for corpus in ("first", "second"):
        tables[corpus] = str(tmp_path_factory.mktemp("local") / "table")
        for state in ("first", "second") if corpus == "second" else ("first",):
            files = gcs.path(state, "*.jsonl")
            manifest = run_pipeline(Path(), **SETTINGS, input=files, encoder=gcs.path("encoder"), output=tables[corpus])
    assert manifest.counts["reuse"]["unchanged"] > 50 and manifest.dead_letters["too_long"] == 1
    assert len(read_dead_letters(tables["first"])) == 2 and open_table(tables["first"])[0].rows == N_TEXTS + 5
    return tables


# --- what is staged --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def staged(gcs: Gcs) -> StagedJob:
    return stage(gcs, "staged", accelerator="nvidia-l4", encoder_memory="24GB")


def test_the_encoder_alone_gets_a_gpu(staged: StagedJob):
    hints = staged.hints()
    own = staged.names("Embed/Workers/")
    assert {name for name, wanted in hints.items() if wanted} == own
    assert all(hints[name] == GPU | MEMORY for name in own)
    names = "\n".join(own)
    for step in ("Unpack", "CollectBatches", "BeamML_RunInference", "FinishVectors", "WriteJournal", "GroupRows"):
        assert step in names


def test_nothing_that_takes_long_can_be_fused_with_the_encoder(staged: StagedJob):
    fused = staged.fused_with(staged.names("Embed/Workers/"))
    for step in ("Read/", "Preprocess/", "LookUp/", "WriteRows/", "Reuse/CopyLiveRows"):
        assert staged.names(step) and not staged.names(step) & fused, step
    assert any("WriteEncodeDeadLetters" in name for name in fused)


def test_the_search_for_what_is_fused_finds_neighbours(staged: StagedJob):
    fused = staged.fused_with(staged.names("Preprocess/"))
    assert any("GroupChunks" in name for name in fused)
    assert not any("RunInference" in name for name in fused)


def test_chunk_groups_cross_to_the_encoder_and_back(staged: StagedJob):
    shuffles = staged.shuffles()
    own = {name for name in shuffles if name.startswith("Embed/")}
    assert {name.split("/")[1] for name in own} == {"ToDedicatedWorkers", "FromDedicatedWorkers"}
    assert all(any("ElementGroupCoder" in coder for coder in shuffles[name]) for name in own)
    assert not any("ElementGroupCoder" in coder for name in set(shuffles) - own for coder in shuffles[name])


def test_every_step_runs_in_the_image_that_was_given(staged: StagedJob):
    assert set(staged.images().values()) == {IMAGE}


def test_a_staged_job_keeps_its_table(gcs: Gcs, staged: StagedJob, call: Call):
    assert list_left(gcs, "staged") == [f"staged/{LOCK}"]
    code, _, err = call("embed", *make_flags(gcs, "staged", template_location=gcs.path("templates/other")))
    assert code == 1 and f"--output={gcs.path('staged')} is in use" in read_sentence(err)


def test_workers_of_the_stock_image_get_the_package(gcs: Gcs, tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for package in ("pipeline", "runners"):
        shutil.copytree(ROOT / package, tmp_path / package)
    job = stage(gcs, "packed", sdk_container_image=None, setup_file=str(tmp_path / "setup.py"))
    assert all("/beam_python3" in image for image in job.images().values())
    (archive,) = (path for path in job.artifacts() if path.endswith(".tar.gz"))
    with FileSystems.open(archive, compression_type="uncompressed") as stream:
        data = io.BytesIO(stream.read())
    with tarfile.open(fileobj=data) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py")} <= inside
    assert {"setup.py", "pyproject.toml"} <= inside


# --- what the staged job does ----------------------------------------------------------------------------------------


def test_machines_with_and_without_a_gpu_make_the_local_table_once(gcs: Gcs, staged: StagedJob, local_tables):
    assert run_apart(staged.path, gcs.environment, "--processes") == Ending()
    assert_same_table(gcs.path("staged"), local_tables["first"])
    assert list_left(gcs, "staged") == ["staged/CURRENT"]
    before = list_generations(gcs, "staged")
    run_apart(staged.path, gcs.environment)
    assert list_generations(gcs, "staged") == before


def test_a_reindex_reuses_what_the_local_one_does(gcs: Gcs, local_tables):
    for corpus, gone in (("first", ""), ("second", gcs.path("first", "part-0.jsonl"))):
        job = stage(gcs, "reindexed", corpus, gone)
        assert run_apart(job.path, gcs.environment) == Ending()
        assert_same_table(gcs.path("reindexed"), local_tables[corpus])


def test_a_staged_job_does_not_replace_what_came_after_it(gcs: Gcs, tmp_path):
    job = stage(gcs, "late")
    FileSystems.delete([gcs.path("late", LOCK)])  # as if it had ended
    settings = SETTINGS | {"input": gcs.path("second", "*.jsonl"), "encoder": gcs.path("encoder")}
    run_pipeline(tmp_path, **settings, output=gcs.path("late"))
    ending = run_apart(job.path, gcs.environment)
    assert ending.state == FAILED and "another run has published" in ending.errors[0]
    assert "renamed" in {key[0] for key in read_rows(gcs.path("late"))}


# --- what is submitted -----------------------------------------------------------------------------------------------


@pytest.fixture
def submit(gcs: Gcs, dataflow: DataflowService, call: Call) -> Callable[..., str]:
    """Submits a job that ends badly: table, flags -> the one line that is said of that."""

    def run(table: str, **flags: Any) -> str:
        code, out, err = call("embed", *make_flags(gcs, table, dataflow_endpoint=dataflow.url, **flags))
        assert (code, out) == (1, ""), err
        return read_sentence(err)

    return run


def test_a_job_is_submitted_waited_for_and_told_of(gcs: Gcs, dataflow: DataflowService, local_tables):
    dataflow.run = run_staged(gcs.environment)
    arguments = make_flags(gcs, "submitted", dataflow_endpoint=dataflow.url)
    with start_cli("embed", *arguments, "--summary_json", env=gcs.environment) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["status"] == "published" and summary["rows"] == N_TEXTS + 5
    assert_same_table(gcs.path("submitted"), local_tables["first"])
    assert list_left(gcs, "submitted") == ["submitted/CURRENT"]


def test_flags_arrive(gcs: Gcs, dataflow: DataflowService, submit):
    dataflow.run = lambda job: Ending(FAILED, ("that is enough",))
    flags = {
        "job_name": "nightly-notes",
        "labels": "team=search",
        "machine_type": "n2-standard-4",
        "num_workers": 3,
        "max_num_workers": 20,
        "disk_size_gb": 70,
        "experiments": "some_experiment",
        "dataflow_service_options": "enable_something",
        "service_account_email": "worker@example.com",
        "subnetwork": f"regions/{REGION}/subnetworks/private",
        "accelerator": "nvidia-l4",
    }
    assert "that is enough" in submit("flags", **flags)
    job = dataflow.job
    assert (job.project, job.region, job.description["name"]) == (PROJECT, REGION, "nightly-notes")
    assert job.description["labels"] == {"team": "search"}
    pool, environment = job.pool, job.description["environment"]
    assert pool["machineType"] == "n2-standard-4" and pool["diskSizeGb"] == 70 and pool["numWorkers"] == 3
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 20
    assert pool["subnetwork"] == flags["subnetwork"]
    assert pool["numThreadsPerWorker"] == 2
    assert environment["serviceAccountEmail"] == "worker@example.com"
    assert {"some_experiment", "no_use_multiple_sdk_containers"} <= set(environment["experiments"])
    assert "use_multiple_sdk_containers" not in environment["experiments"]
    assert environment["serviceOptions"] == ["enable_something"]
    containers = {container["environmentId"]: container for container in pool["sdkHarnessContainerImages"]}
    assert {container["containerImage"] for container in containers.values()} == {IMAGE}
    steps = StagedJob.load(job.pipeline_url).steps()
    assert set(containers) == {step.environment_id for step in steps} and len(containers) == 2


def test_a_job_has_a_name_of_its_own_and_processors_by_default(gcs: Gcs, dataflow: DataflowService, submit):
    dataflow.run = lambda job: Ending(FAILED, ("that is enough",))
    assert "that is enough" in submit("notes")
    assert dataflow.job.description["name"].startswith("embeam-notes-20")
    assert "numThreadsPerWorker" not in dataflow.job.pool
    assert "use_multiple_sdk_containers" in dataflow.job.description["environment"]["experiments"]
    assert not any(StagedJob.load(dataflow.job.pipeline_url).hints().values())


# --- jobs that end badly ---------------------------------------------------------------------------------------------


def test_a_job_that_fails_is_told_of_in_one_line(gcs: Gcs, dataflow: DataflowService, submit):
    dataflow.run = run_staged(gcs.environment)
    line = submit("dead", max_dead_fraction=0)
    assert line.startswith(f"embeam: 2 of {N_TEXTS + 7} documents cannot be embedded") and "--max_dead_fraction" in line
    assert not any(name.endswith(("/CURRENT", LOCK)) for name in list_left(gcs, "dead"))


def test_a_job_that_fails_without_a_word(gcs: Gcs, dataflow: DataflowService, submit):
    dataflow.run = lambda job: Ending(FAILED)
    line = submit("wordless")
    assert "FAILED" in line and "None" not in line
    assert f"https://console.cloud.google.com/dataflow/jobs/{REGION}/job-0?project={PROJECT}" in line


def test_a_job_that_somebody_cancels(gcs: Gcs, dataflow: DataflowService, submit):
    dataflow.run = lambda job: Ending(CANCELLED)
    line = submit("cancelled")
    assert "CANCELLED" in line and "job-0" in line and "None" not in line
    assert list_left(gcs, "cancelled") == []


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (Refusal(403, "PERMISSION_DENIED", "Caller is missing dataflow.jobs.create"), "missing dataflow.jobs.create"),
        (Refusal(429, "RESOURCE_EXHAUSTED", "Quota of jobs exceeded"), "Quota of jobs exceeded"),
        (Refusal(400, "INVALID_ARGUMENT", "The zone has no such GPU"), "The zone has no such GPU"),
    ],
)
def test_a_job_that_is_refused(gcs: Gcs, dataflow: DataflowService, submit, refusal, told):
    dataflow.refuse["POST", ""] = refusal
    line = submit("refused")
    assert line.startswith(f"embeam: Dataflow refused the job: {refusal.code} ") and told in line
    assert "--debug" not in line
    assert dataflow.jobs == {} and list_left(gcs, "refused") == []


def test_a_job_that_is_lost_sight_of_runs_on(gcs: Gcs, dataflow: DataflowService, local_tables, call: Call):
    """Such as by a right that is taken away: what the job has and holds stays its own."""
    run, may_run = run_staged(gcs.environment), threading.Event()

    def run_after_launcher(job: Job) -> Ending:
        dataflow.refuse["GET", ""] = Refusal(403, "PERMISSION_DENIED", "no longer allowed to look")
        assert may_run.wait(240)
        return run(job)

    dataflow.run = run_after_launcher
    arguments = make_flags(gcs, "lost", dataflow_endpoint=dataflow.url)
    with start_cli("embed", *arguments, env=gcs.environment) as process:
        _, err = process.communicate()
    line = read_sentence(err)
    assert process.returncode == 1
    assert "no longer allowed to look" in line and "continues and publishes the table" in line
    assert f"gcloud dataflow jobs cancel job-0 --region={REGION} --project={PROJECT}" in line
    assert list_left(gcs, "lost") == [f"lost/{LOCK}"]
    code, _, err = call("embed", *arguments)
    assert code == 1 and "is in use" in err
    may_run.set()
    wait_until(lambda: dataflow.job.state != RUNNING)
    assert dataflow.job.errors == []
    assert_same_table(gcs.path("lost"), local_tables["first"])
    assert list_left(gcs, "lost") == ["lost/CURRENT"]


@pytest.mark.parametrize("cancel_seconds", [1, 3600], ids=["soon", "late"])
def test_ctrl_c_cancels_the_job(gcs: Gcs, dataflow: DataflowService, cancel_seconds):
    """One that takes long to end may still write, and keeps its table until its lock ends."""
    dataflow.run, dataflow.cancel_seconds = wait_for_cancel, cancel_seconds
    table = f"stopped-{cancel_seconds}"
    with start_cli("embed", *make_flags(gcs, table, dataflow_endpoint=dataflow.url), env=gcs.environment) as process:
        wait_until(lambda: dataflow.jobs and dataflow.job.followed.is_set())
        create_file(gcs.path(table, "attempts", "of-the-job", "x"), b"")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (128 + signal.SIGINT, "")
    assert read_sentence(err).startswith("embeam: stopped")
    assert dataflow.job.cancelled.is_set()
    locks = [name for name in list_left(gcs, table) if name.endswith(LOCK)]
    assert locks == ([] if cancel_seconds == 1 else [f"{table}/{LOCK}"])


# --- flags that Beam refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"project": "p"}, "Invalid Project ID (p)"),
        ({"project": "123456"}, "Invalid Project ID (123456)"),
        ({"job_name": "Nightly Notes"}, "Invalid job_name (Nightly Notes)"),
        ({"num_workers": 5, "max_num_workers": 2}, "num_workers (5) cannot exceed max_num_workers (2)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_beam_refuses_is_refused_at_once(gcs: Gcs, flags, told, call: Call):
    """Beam does not look at a job for a service on this machine, so this one is only staged."""
    before = set(gcs.objects())
    arguments = make_flags(gcs, "wrong", template_location=gcs.path("templates/wrong"), **flags)
    code, out, err = call("embed", *arguments)
    line = read_sentence(err)
    assert (code, out) == (2, "")
    assert line.startswith("embeam: --runner=DataflowRunner: ") and told in line
    assert set(gcs.objects()) == before
