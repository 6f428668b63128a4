"""What programs read of a run: the last line, the log, the engine's metrics."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.engines.runner import make_runner
from pipeline.files import make_folder
from pipeline.metrics import NAMESPACE
from pipeline.report.logs import JsonFormatter
from pipeline.report.progress_bar import ProgressReporter
from pipeline.run.job import prepare_job, run_job, scratch_folder
from pipeline.run.resolve import resolve
from pipeline.tables.manifest import open_table
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.paths import ENCODER
from tests.support.processes import Call
from tests.support.runs import make_config

N_TEXTS = 30


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", as_records(some_texts(N_TEXTS)))
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write("{\n")
    return tmp_path


@pytest.fixture
def run_command(call: Call, corpus: Path) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Embeds the corpus with some more flags: exit code, and the lines on stdout and stderr."""
    own = [f"--input={corpus}/*.jsonl", f"--output={corpus}/table", "--id_field=id", f"--encoder={ENCODER}"]

    def run(*flags: str) -> tuple[int, list[str], list[str]]:
        code, out, err = call("embed", *own, *flags)
        return code, out.splitlines(), err.splitlines()

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


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [(["--max_dead_fraction=0"], 1, "--max_dead_fraction"), (["--max_tokens=1"], 2, "--max_tokens=1 leaves no room")],
)
def test_a_failed_run_says_why_in_both_forms(run_command, flags, code, told):
    ended, out, err = run_command("--summary_json", "--log_format=json", *flags)
    assert ended == code
    assert json.loads(out[-1])["status"] == "failed" and json.loads(out[-1])["exit_code"] == code
    entries = [json.loads(line) for line in err]
    assert told in json.loads(out[-1])["error"]
    (error,) = (entry for entry in entries if entry["severity"] == "ERROR")
    assert told in error["message"] and error["time"].endswith("+00:00")


def test_progress_is_json_with_its_numbers(monkeypatch, capsys):
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    logging.getLogger("embeam.progress").setLevel(logging.INFO)
    looks = threading.Semaphore(0)

    def look(folder: str) -> dict[str, int]:
        looks.release()
        return {"documents": 7, "bytes": 50, "rows": 5, "dead_letters": 0}

    monkeypatch.setattr("pipeline.report.progress_bar.read_progress", look)
    with ProgressReporter("", 100, line_seconds=0.01):
        for _ in range(2):  # what the first look has found is told before the second one
            looks.acquire()
    logging.getLogger("embeam.progress").setLevel(logging.NOTSET)
    entry = json.loads(capsys.readouterr().err.splitlines()[0])
    assert entry["severity"] == "INFO" and entry["counts"]["documents"] == 7 and "50%" in entry["message"]


def test_the_engine_shows_what_the_manifest_counts(corpus):
    config, options = make_config(corpus), PipelineOptions([])
    resolved = resolve(config)
    make_folder(resolved.store.work)
    results = []

    class Watched(type(make_runner(options))):  # type: ignore[misc]
        def run_pipeline(self, *given, **named):
            results.append(super().run_pipeline(*given, **named))
            return results[0]

    runner = make_runner(options)
    runner.__class__ = Watched
    with scratch_folder(resolved.store.work, "now") as scratch:
        run_job(prepare_job(resolved, "20260101T000000.000000Z-abcdef", 0.0, False, scratch), runner, options)
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
