"""What stops a run before it begins: `plan` prints the same message as `embed`, and writes nothing."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.errors import ConfigError, EmbeamError, TableError
from pipeline.run.dry_run import make_dry_run
from pipeline.run.job import build_table, prepare_job
from pipeline.run.resolve import estimate_new_rows, resolve
from pipeline.tables import publish
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.runs import embed_records, make_config, watch_encoder
from tests.support.tables import hash_folder

RECORDS = [record | {"year": i, "tag": "x" * i} for i, record in enumerate(as_records(some_texts(60, words=(4, 40))))]


def fail_to_embed(folder: Path, **settings: Any) -> EmbeamError:
    with pytest.raises(EmbeamError) as caught:
        build_table(make_config(folder, **settings))
    return caught.value


def somebody_elses_folder(folder: Path) -> str:
    (folder / "theirs").mkdir()
    (folder / "theirs" / "photo.jpg").touch()
    return str(folder / "theirs")


def somebody_elses_database(folder: Path) -> str:
    import duckdb

    with duckdb.connect(str(folder / "theirs.duckdb")) as connection:
        connection.execute("CREATE TABLE notes (id VARCHAR)")
    return f"duckdb://{folder}/theirs.duckdb/notes"


def name_file(folder: Path) -> str:
    (folder / "file").touch()
    return str(folder / "file")


OUTPUTS = [
    ("--dtype=int8", lambda folder: f"duckdb://{folder}/v.duckdb/notes", {"dtype": "int8"}),
    ("--work_dir=gs://", lambda _: "bq://my-project.data.notes", {}),
    ("no file system for nowhere://", lambda _: "nowhere://bucket/table", {}),
    ("holds 'photo.jpg' and is not a table", somebody_elses_folder, {}),
    ("that embeam did not make", somebody_elses_database, {}),
    ("there is no folder", lambda folder: f"duckdb://{folder}/none/v.duckdb/notes", {}),
    ("is a file; give a folder", name_file, {}),
    ("cannot be written to: .*/file may not be changed", lambda folder: f"{name_file(folder)}/table", {}),
]


@pytest.mark.parametrize(("says", "make_output", "settings"), OUTPUTS, ids=[says for says, _, _ in OUTPUTS])
def test_an_output_that_cannot_work_is_refused_by_both(tmp_path, says, make_output, settings):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS[:3])
    settings = settings | {"output": make_output(tmp_path)}
    before = hash_folder(tmp_path)
    with pytest.raises(EmbeamError, match=says) as caught:
        make_dry_run(make_config(tmp_path, **settings))
    assert hash_folder(tmp_path) == before
    error = fail_to_embed(tmp_path, **settings)
    assert (type(error), str(error)) == (type(caught.value), str(caught.value))
    assert hash_folder(tmp_path) == before


@pytest.mark.parametrize("scheme", ["", "duckdb://"])
def test_a_dry_run_of_a_first_run_leaves_no_trace(tmp_path, scheme):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS[:3])
    output = f"{scheme}{tmp_path}/new" + ("/notes" if scheme else "")
    assert make_dry_run(make_config(tmp_path, output=output)).stops == []
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize(
    "settings",
    [{"limit": 5}, {"max_tokens": 9, "on_model_change": "stop"}, {"max_tokens": 9, "deletes": "keep"}],
    ids=lambda settings: list(settings)[-1],
)
def test_what_would_stop_a_run_is_what_stops_it(tmp_path, settings):
    embed_records(tmp_path, RECORDS)
    dry_run = make_dry_run(make_config(tmp_path, **settings, max_delete_fraction=1))
    assert dry_run.stops == [str(fail_to_embed(tmp_path, **settings, max_delete_fraction=1))]


@pytest.mark.parametrize("output", ["table", "duckdb://v.duckdb/notes"])
def test_a_run_without_any_row_is_stopped(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    settings = {"output": output, "on_empty": "skip", "max_dead_fraction": 1}
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "a", "text": " "}, {"id": "b", "text": ""}])
    assert make_dry_run(make_config(tmp_path, **settings)).stops == [str(fail_to_embed(tmp_path, **settings))]
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "a"}, {"text": "no id"}, {"id": "c", "text": 5}])
    (stop,) = make_dry_run(make_config(tmp_path, **settings)).stops
    assert stop == str(fail_to_embed(tmp_path, **settings)) and re.search(
        r"2 missing_field \(first: .*\), 1 wrong_type \(", stop
    )


@pytest.mark.parametrize("missing", ["duckdb", "vss"])
def test_what_duckdb_needs_is_looked_for_first(tmp_path, monkeypatch, missing):
    def refuse(*_: Any) -> None:
        raise TableError("the vector index needs DuckDB's extension vss")

    write_jsonl(tmp_path / "corpus.jsonl", RECORDS[:3])
    settings = {"output": f"duckdb://{tmp_path}/v.duckdb/notes", "create_vector_index": True}
    assert make_dry_run(make_config(tmp_path, **settings)).stops == []
    if missing == "vss":
        monkeypatch.setattr("pipeline.tables.duckdb.load_vss", refuse)
    else:
        monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(EmbeamError, match="DuckDB") as caught:
        make_dry_run(make_config(tmp_path, **settings))
    assert str(fail_to_embed(tmp_path, **settings)) == str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_database_is_refused_on_a_distributed_engine_before_anything_is_written(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS[:3])
    config = make_config(tmp_path, output=f"duckdb://{tmp_path}/v.duckdb/notes")
    with pytest.raises(ConfigError, match="tables in databases are written by --runner=local only"):
        build_table(config, PipelineOptions(["--runner=PrismRunner"]))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def pretend_free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=n_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(publish, "RESERVE_BYTES", 0)


def test_a_disk_that_is_too_small_stops_both(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    pretend_free(monkeypatch, 1000)
    (stop,) = make_dry_run(make_config(tmp_path)).stops
    assert "for some 60 new rows" in stop and "its disk has 0.0 GB free" in stop
    assert "for some 60 new rows" in str(fail_to_embed(tmp_path))


def test_unchanged_rows_need_no_space(tmp_path, monkeypatch):
    _, manifest = embed_records(tmp_path, RECORDS)
    records = [*RECORDS, {"id": "new", "text": "a new one"}]
    write_jsonl(tmp_path / "corpus.jsonl", records)
    each = sum(file.n_bytes for file in (*manifest.files, *manifest.index_files)) / 60
    pretend_free(monkeypatch, round(5 * each))
    assert make_dry_run(make_config(tmp_path)).stops == []
    assert embed_records(tmp_path, records)[1].rows == 61
    for other in ({"normalize": True}, {"output_format": "parquet"}):  # every row is written again
        assert "for some 61 new rows" in make_dry_run(make_config(tmp_path, **other)).stops[0]
        assert "new rows" in str(fail_to_embed(tmp_path, **other))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vector": "sequence_output:tokens"},
        {"on_long": "chunk", "max_tokens": 8},
        {"keep_text": True, "keep_fields": "year,tag"},
        {"keep_text": True, "keep_fields": "tag", "output_format": "parquet", "dtype": "float16"},
        {"vector": "sequence_output:tokens", "on_long": "chunk", "max_tokens": 16, "dtype": "int8"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_the_space_that_rows_need_is_measured(tmp_path, settings):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    n_rows, row_bytes = estimate_new_rows(resolve(make_config(tmp_path, **settings)))
    _, manifest = embed_records(tmp_path, RECORDS, **settings)
    assert n_rows == manifest.rows
    again = resolve(make_config(tmp_path, **settings))
    assert estimate_new_rows(again).n_rows == 0
    stored = sum(file.n_bytes for file in (*manifest.files, *manifest.index_files))
    assert n_rows * row_bytes == pytest.approx(stored, rel=0.15)


@pytest.mark.parametrize("output_format", ["tfrecord", "parquet"])
def test_rows_are_measured_without_a_sample_too(tmp_path, output_format):
    """As of dead letters that are tried again, and of files that cannot be read."""
    settings = {"keep_text": True, "keep_fields": "year,tag", "on_long": "reject", "max_tokens": 20}
    settings |= {"max_dead_fraction": 1, "output_format": output_format}
    _, manifest = embed_records(tmp_path, RECORDS, **settings)
    n_dead = sum(manifest.dead_letters.values())
    resolved = resolve(make_config(tmp_path, **settings, retry_dead_letters=True))
    assert n_dead and resolved.row_size.row_bytes > 256 and estimate_new_rows(resolved).n_rows == n_dead


def test_what_is_live_is_looked_at_again_under_the_lock(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    (tmp_path / "scratch").mkdir()
    settings = {"id_field": "id", "max_delete_fraction": 1}
    early, trial = (resolve(make_config(tmp_path, **settings, limit=limit)) for limit in (0, 5))
    _, manifest = embed_records(tmp_path, RECORDS, **settings)
    job = prepare_job(early, "now", 0.0, scratch=str(tmp_path / "scratch"))
    assert job.commit_plan.publication.previous == manifest.snapshot
    with pytest.raises(ConfigError, match="--limit=5 is for trials"):
        prepare_job(trial, "now", 0.0, scratch=str(tmp_path / "scratch"))


def test_a_folder_that_turns_out_not_to_be_writable(tmp_path, monkeypatch):
    """Such as on a file system that reports this only on a write."""

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    write_jsonl(tmp_path / "corpus.jsonl", RECORDS[:3])
    monkeypatch.setattr(publish, "make_folder", refuse)
    assert make_dry_run(make_config(tmp_path)).stops == []
    assert isinstance(error := fail_to_embed(tmp_path), TableError) and "cannot be written to" in str(error)


def test_a_run_that_stops_names_the_first_dead_letter_of_each_reason(tmp_path):
    blank = [{"id": f"blank {i}", "text": " "} for i in range(3)]
    wrong = [{"id": "x", "txet": "a"}, {"id": "y", "text": 5}, {"id": "z", "text": 6}]
    write_jsonl(tmp_path / "corpus.jsonl", [*RECORDS[:3], *blank, *wrong])
    lines = (tmp_path / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    first = [sum(map(len, lines[:n])) for n in (3, 6, 7)]
    told = str(fail_to_embed(tmp_path, on_empty="reject"))
    assert make_dry_run(make_config(tmp_path, on_empty="reject")).stops == [told]
    assert f"3 empty_text (first: {tmp_path}/corpus.jsonl byte {first[0]}: " in told and "--on_empty=skip" in told
    assert f"1 missing_field (first: {tmp_path}/corpus.jsonl byte {first[1]}: the text field 'text' is missing" in told
    assert f"2 wrong_type (first: {tmp_path}/corpus.jsonl byte {first[2]}: field 'text' holds a whole number" in told


@pytest.mark.parametrize("scheme", ["s3", "hdfs", "azfs"])
@pytest.mark.parametrize("flag", ["input", "output"])
def test_a_file_system_whose_package_is_missing_is_named(tmp_path, monkeypatch, scheme, flag):
    monkeypatch.setattr("pipeline.files.find_spec", lambda _: None)
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS[:3])
    told = str(fail_to_embed(tmp_path, **{flag: f"{scheme}://bucket/folder/a.jsonl"}))
    extra = {"s3": "embeam[s3]", "hdfs": "apache-beam[hadoop]", "azfs": "apache-beam[azure]"}[scheme]
    assert told == (
        f"{scheme}://bucket/folder/a.jsonl: the package for {scheme}:// is not installed; pip install '{extra}'"
    )


def test_a_column_of_another_type_stops_a_run_before_it_encodes(tmp_path):
    import duckdb

    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    embed_records(tmp_path, RECORDS[:2], output=output)
    with duckdb.connect(str(tmp_path / "v.duckdb")) as connection:
        connection.execute("ALTER TABLE notes ADD COLUMN tag BIGINT")
    settings = {"output": output, "keep_fields": "tag"}
    with watch_encoder() as watched:
        stop = str(fail_to_embed(tmp_path, **settings))
    assert watched.n_batches == 0 and "has a column 'tag' of type BIGINT, but VARCHAR is needed; keep" in stop
    assert make_dry_run(make_config(tmp_path, **settings)).stops == [stop]
    embed_records(tmp_path, RECORDS[:2], output=output, keep_fields="tag:int")
