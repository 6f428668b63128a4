"""What programs read of a run: the last line, the log, the engine's metrics."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli import main
from pipeline.engine import make_runner
from pipeline.job import prepare_job, run_job, scratch_folder
from pipeline.logs import JsonFormatter
from pipeline.metrics import NAMESPACE
from pipeline.report.progress import ProgressReporter
from pipeline.settle import settle
from pipeline.tables.manifest import open_table
from pipeline.tables.storage import make_folder
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.paths import ENCODER
from tests.support.processes import start_cli
from tests.support.runs import make_config

N_TEXTS = 30


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", as_records(some_texts(N_TEXTS)))
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write("{\n")
    return tmp_path


Told = tuple[int, list[str], list[str]]  # exit code, and the lines on stdout and stderr


def flags_of(corpus: Path, *flags: str) -> list[str]:
    own = [f"--input={corpus}/*.jsonl", f"--output={corpus}/table", "--id_field=id", f"--encoder={ENCODER}"]
    return ["embed", *own, *flags]


@pytest.fixture
def run_command(corpus, capsys) -> Callable[..., Told]:
    """Runs the command in this process, with a log of its own."""
    root = logging.getLogger()
    loggers = [root, logging.getLogger("apache_beam"), logging.getLogger("embeam.progress")]

    def run(*flags: str) -> Told:
        capsys.readouterr()
        code, levels = 0, [logger.level for logger in loggers]
        with mock.patch.multiple(root, handlers=[], filters=[]):
            try:
                main(flags_of(corpus, *flags))
            except SystemExit as stop:
                code = stop.code
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err.splitlines()

    return run


def test_the_last_line_says_how_a_run_went(corpus, run_command):
    code, out, _ = run_command("--summary_json")
    summary, manifest = json.loads(out[-1]), open_table(str(corpus / "table"))[0]
    assert code == 0 and len(out) > 5
    assert (summary["status"], summary["table"]) == ("published", f"{corpus}/table")
    assert summary["snapshot"] == manifest.snapshot
    assert (summary["documents"], summary["rows"], summary["encoded_chunks"]) == (N_TEXTS + 1, N_TEXTS, N_TEXTS)
    assert (summary["dead_letters"], summary["dead_letter_reasons"]) == (1, {"malformed_json": 1})
    assert 0 <= summary["padding_share"] < 1 and summary["tokens"] > N_TEXTS
    code, out, _ = run_command("--summary_json")
    again = json.loads(out[-1])
    assert (again["previous"], again["rows"], again["encoded_chunks"]) == (manifest.snapshot, N_TEXTS, 0)
    assert set(again) == set(summary)


def check_failure(told: Told, code: int, reason: str) -> None:
    ended, out, err = told
    assert ended == code
    assert json.loads(out[-1])["status"] == "failed" and json.loads(out[-1])["exit_code"] == code
    entries = [json.loads(line) for line in err]
    assert reason in json.loads(out[-1])["error"]
    (error,) = (entry for entry in entries if entry["severity"] == "ERROR")
    assert reason in error["message"] and error["time"].endswith("+00:00")


def test_a_failed_run_says_why_in_both_forms(run_command):
    told = run_command("--summary_json", "--log_format=json", "--max_dead_fraction=0")
    check_failure(told, 1, "--max_dead_fraction")


def test_wrong_usage_is_said_in_both_forms_by_a_process_of_its_own(corpus):
    with start_cli(*flags_of(corpus, "--summary_json", "--log_format=json", "--max_tokens=1")) as process:
        out, err = process.communicate(timeout=100)
    told = process.returncode, out.splitlines(), err.splitlines()
    check_failure(told, 2, "--max_tokens=1 leaves no room")


def test_progress_is_json_with_its_numbers(monkeypatch, capsys):
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    logging.getLogger("embeam.progress").setLevel(logging.INFO)
    looked = threading.Semaphore(0)

    def look(folder: str) -> dict[str, int]:
        looked.release()
        return {"documents": 7, "bytes": 50, "rows": 5, "dead_letters": 0}

    monkeypatch.setattr("pipeline.report.progress.read_progress", look)
    with ProgressReporter("", 100, line_seconds=0.01):
        for _ in range(2):  # before the second look the first line is told
            assert looked.acquire(timeout=20)
    logging.getLogger("embeam.progress").setLevel(logging.NOTSET)
    entry = json.loads(capsys.readouterr().err.splitlines()[0])
    assert entry["severity"] == "INFO" and entry["counts"]["documents"] == 7 and "50%" in entry["message"]


def test_the_engine_shows_what_the_manifest_counts(corpus):
    config, options = make_config(corpus), PipelineOptions([])
    settled = settle(config)
    make_folder(settled.store.work)
    results = []

    class Watched(type(make_runner(options))):  # type: ignore[misc]
        def run_pipeline(self, *given, **named):
            results.append(super().run_pipeline(*given, **named))
            return results[0]

    runner = make_runner(options)
    runner.__class__ = Watched
    with scratch_folder(settled.store.work, "now") as scratch:
        run_job(prepare_job(settled, "20260101T000000.000000Z-abcdef", 0.0, False, scratch), runner, options)
    found = results[0].metrics().query()
    counters = {m.key.metric.name: m.result for m in found["counters"] if m.key.metric.namespace == NAMESPACE}
    (times,) = (m for m in found["distributions"] if m.key.metric.name == "encode_milliseconds")
    counts = open_table(config.write.output)[0].counts
    assert counters["documents"] == counts["read"]["documents"] == N_TEXTS
    assert counters["read_bytes"] == counts["read"]["bytes"]
    assert counters["tokens"] == counts["preprocess"]["tokens"]
    assert counters["padding_tokens"] == counts["batch"]["padded_tokens"] - counts["batch"]["used_tokens"]
    assert counters["batches"] == counts["batch"]["batches"] == times.result.count
    assert counters["rows"] == counts["encode"]["rows"] and counters["dead_letters"] == 1
