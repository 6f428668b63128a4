"""Crossings between stages: on the local engine nothing that grows with the corpus crosses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import pytest
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner

import pipeline.embed
from pipeline.embed import build_pipeline
from pipeline.preprocess.chunking import Preprocess
from pipeline.report.summary import format_table
from pipeline.run.job import prepare_job
from pipeline.run.resolve import resolve
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.crossings import find_crossings, find_producers
from tests.support.processes import start_python
from tests.support.runs import embed_records, make_config


def build_proto(folder: Path, **settings: Any) -> beam_runner_api_pb2.Pipeline:
    write_jsonl(folder / "corpus.jsonl", as_records(some_texts(20)))
    (folder / "scratch").mkdir()
    resolved = resolve(make_config(folder, split_bytes=500, **settings))
    job = prepare_job(resolved, "now", 0.0, scratch=str(folder / "scratch"))
    assert len(job.input.splits) > 1
    p = beam.Pipeline(runner="FnApiRunner")
    build_pipeline(p, job)
    return p.to_runner_api(default_environment=beam.transforms.environments.EmbeddedPythonEnvironment.default())


def find_documents(proto: beam_runner_api_pb2.Pipeline) -> set[str]:
    """Producers of all that grows with the corpus: what is made of the splits that are read, up to files and counts.

    A writer gives the files that it finished, every stage its `bundle_counts`, what is reused goes into
    two files a bundle, and of N documents about log(N) are spot checks.
    """
    producers = find_producers(proto)
    growing, waiting = set(), [name for name in producers.values() if "ParDo(ReadSplit)" in name]
    while waiting:
        name = waiting.pop()
        if (
            name.endswith((".bundle_counts", ".notes", ".spot_checks", ".bad_files"))
            or "ParDo(WriteRecords)" in name
            or name in growing
        ):
            continue
        growing.add(name)
        (collection,) = (collection for collection, producer in producers.items() if producer == name)
        for transform in proto.components.transforms.values():
            if collection in transform.inputs.values() and not transform.subtransforms:
                waiting += [producers[output] for output in transform.outputs.values()]
    return growing


def find_large_crossings(proto: beam_runner_api_pb2.Pipeline) -> set[tuple[str, str]]:
    growing = find_documents(proto)
    return {(producer, kind) for producer, kind in find_crossings(proto) if producer in growing}


SETTINGS = [
    {},
    {"id_field": ""},
    {"on_long": "average", "max_tokens": 16},
    {"output_format": "parquet", "vector": "sequence_output:tokens"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["ids", "no_ids", "average", "tokens"])
def test_nothing_that_grows_with_the_corpus_crosses_between_stages(settings, tmp_path):
    proto = build_proto(tmp_path, **settings)
    growing = {name.split("(")[-1] for name in find_documents(proto)}
    assert growing == {
        "ReadSplit).None",
        "ReadSplit).dead_letters",
        "LookUpDocuments).None",
        "SplitDocuments).None",
        "SplitDocuments).dead_letters",
        "CollectBatches).None",
        "Embed/Encode/RunInference/BeamML_RunInference.None",
        "FinishVectors).None",
        "FinishVectors).dead_letters",
        "Embed/Journal/WriteJournal.None",
    }
    assert find_large_crossings(proto) == set()


@pytest.mark.parametrize("id_field", ["", "id"])
def test_only_splits_paths_finished_files_and_counts_cross(id_field, tmp_path):
    crossings = find_crossings(build_proto(tmp_path, id_field=id_field))
    assert {kind for _, kind in crossings} == {"Flatten", "side input", "Reshuffle", "GroupByKey"}
    writers = {f"Write{part}" for part in ("Rows", "ReadDeadLetters", "PreprocessDeadLetters", "EncodeDeadLetters")}
    scans = {("side input", "Read/ScanIds"), ("side input", "Read/FindDuplicates")} if id_field else set()
    assert {(kind, "/".join(producer.split("/")[:2]).partition(".")[0]) for producer, kind in crossings} == {
        ("Reshuffle", "Read/Splits"),
        ("GroupByKey", "Read/Splits"),
        *scans,
        *(("Flatten", f"{writer}/WriteRecords") for writer in writers),  # files and counts
        ("Flatten", "Read/Read"),
        ("Flatten", "Read/UnreadableFiles"),
        ("side input", "Read/BadFiles"),
        ("Flatten", "LookUp/LookUpDocuments"),
        ("side input", "LookUp/LookUpDocuments"),  # the notes' paths
        ("side input", "Embed/Finish"),  # the spot checks
        ("Flatten", "Preprocess/SplitDocuments"),
        ("Flatten", "Embed/Batch"),
        ("Flatten", "Embed/Finish"),
        ("Flatten", "Embed/BundleCounts"),
        ("side input", "Shards"),
        ("side input", "BundleCounts"),
    }


def test_everything_from_reading_to_writing_is_one_fused_stage(tmp_path):
    _, stages = fn_runner.FnApiRunner().create_stages(build_proto(tmp_path))
    (reading,) = (stage for stage in stages if any("ParDo(ReadSplit)" in t.unique_name for t in stage.transforms))
    names = "\n".join(transform.unique_name for transform in reading.transforms)
    for step in (
        "LookUpDocuments",
        "WriteJournal",
        "SplitDocuments",
        "CollectBatches",
        "BeamML_RunInference",
        "FinishVectors",
        "WriteRows/WriteRecords",
    ):
        assert step in names
    assert names.count("ParDo(WriteRecords)") == 4


class CrossingPreprocess(Preprocess):
    """A way to read the corpus that would hold it in memory."""

    kind = ""

    def expand(self, documents: beam.PCollection) -> tuple:
        if self.kind == "Reshuffle":
            documents = documents | beam.Reshuffle()
        elif self.kind == "Flatten":
            documents = (documents, documents) | beam.Flatten()
        elif self.kind == "side input":
            beginning = documents.pipeline | beam.Create([None])
            documents = beginning | beam.FlatMap(lambda _, all_documents: all_documents, beam.pvalue.AsIter(documents))
        return super().expand(documents)


@pytest.mark.parametrize("kind", ["Reshuffle", "Flatten", "side input"])
def test_the_search_finds_what_must_not_be(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(CrossingPreprocess, "kind", kind)
    monkeypatch.setattr(pipeline.embed, "Preprocess", CrossingPreprocess)
    found = find_large_crossings(build_proto(tmp_path))
    assert ("LookUp/LookUpDocuments/ParDo(LookUpDocuments).None", kind) in found


# --- what is imported when -------------------------------------------------------------------------------------------


HEAVY = {"tensorflow", "tensorflow_text", "tensorflow_hub", "keras", "apache_beam"}
LIGHT = ["import pipeline", "from pipeline import EmbedConfig"]
LIGHT += [
    f"from pipeline.cli.main import main; main({arguments})"
    for arguments in (["--version"], ["--help"], ["embed", "--help"], ["export-encoder", "--help"], ["plan", "--help"])
]


class After(NamedTuple):
    """What a statement has told, and the modules that are loaded since."""

    told: str
    modules: set[str]


def run_fresh(*statements: str) -> list[After]:
    """Runs statements one after the other in a fresh Python; some of them exit."""
    script = """
import contextlib, io, json, sys
done = []
for statement in json.loads(sys.argv[1]):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            exec(statement)
        except SystemExit:
            pass
    done.append((told.getvalue(), list(sys.modules)))
print(json.dumps(done))
"""
    process = start_python("-c", script, json.dumps(statements))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return [After(told, set(modules)) for told, modules in json.loads(out.splitlines()[-1])]


def run_commands(*commands: list[str]) -> list[After]:
    """As `run_fresh`, for the command line."""
    return run_fresh(*(f"from pipeline.cli.main import main; main({command})" for command in commands))


def test_help_and_import_load_neither_tensorflow_nor_beam_nor_numpy():
    """NumPy starts threads when it is imported, which would take the signals that a run waits for."""
    for statement, after in zip(LIGHT, run_fresh(*LIGHT), strict=True):
        assert "pipeline" in after.modules and not (HEAVY | {"tfx_bsl", "pyarrow", "numpy"}) & after.modules, statement


def test_importing_the_graph_loads_beam_but_not_tensorflow():
    (after,) = run_fresh("import pipeline.run.job")
    assert "apache_beam" in after.modules
    assert not {"tensorflow", "tensorflow_text", "tfx_bsl"} & after.modules


def test_the_graph_needs_nothing_of_what_is_built_on_it():
    (after,) = run_fresh(
        "import pipeline.embed; print(*(name for name in sys.modules if name.startswith('pipeline.')))"
    )
    above = ("pipeline.run", "pipeline.engines", "pipeline.search", "pipeline.report", "pipeline.cli")
    names = after.told.split()
    assert "pipeline.embed" in names and not [name for name in names if name.startswith(above)]


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_a_local_table_is_shown_and_read_without_tensorflow_and_beam(tmp_path, output_format):
    records = [record | {"year": 1999} for record in as_records(some_texts(5))]
    embed_records(tmp_path, records, output_format=output_format, keep_fields="year", encoder_graph="auto")
    table = str(tmp_path / "table")
    shown, listed = run_commands(["show", table, "--rows=2"], ["rollback", table, "--list"])
    assert shown.told.strip() == format_table(table, 2)
    assert "5 rows  live" in listed.told and not HEAVY & listed.modules
    (read,) = run_fresh(f"import pipeline; print(pipeline.read_table({table!r})[1].shape)")
    assert read.told.strip() == "(5, 64)" and not HEAVY & read.modules


WRONG = [
    (["embed", "--inptu=a.txt"], "unknown flag --inptu; did you mean --input?"),
    (["embed", "a.txt"], "unexpected argument 'a.txt'"),
    (["embed", "--input=a.txt", "--output=t", "--dtype=float3"], "--dtype=float3"),
    (["plan", "--inptu=a.txt"], "unknown flag --inptu; did you mean --input?"),
    (["show", "t", "--rosw=3"], "unknown flag --rosw; did you mean --rows?"),
    (["rollback", "t", "--lsit"], "unknown flag --lsit; did you mean --list?"),
    (["show", "there/is/no/table"], "there/is/no/table is not a table"),
]


def test_a_wrong_flag_is_refused_without_tensorflow_and_beam(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEAM_CACHE_DIR", str(tmp_path / "cache"))
    commands = [command for command, _ in WRONG]
    first = run_commands(*commands)  # which asks Beam for its flags, once on a machine
    for after, again, (command, message) in zip(run_commands(*commands), first, WRONG, strict=True):
        assert message in after.told and after.told == again.told, command
        assert not HEAVY & after.modules, command
