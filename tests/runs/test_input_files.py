"""Which files a run reads, and what it says of those that it cannot read or that are gone: whole runs, their reports,
and what `plan`, `show` and `verify` say of the same.
"""

import gzip
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from pipeline.cli.table_verbs import format_plan
from pipeline.errors import ConfigError, InputError, RunError
from pipeline.report.summary import format_summary, format_table, summarize
from pipeline.reuse.journal import list_segments
from pipeline.run.dry_run import make_dry_run
from pipeline.run.verify import verify_table
from pipeline.tables.manifest import Manifest, open_table
from pipeline.tables.read import iter_table, read_table
from pipeline.tables.stores import open_store
from tests.support.corpora import as_records, some_texts, write_jsonl, write_lines
from tests.support.histories import run_joined
from tests.support.paths import ENCODER
from tests.support.runs import make_config, run_embed, run_pipeline, watch_encoder
from tests.support.tables import assert_same_rows, assert_unchanged, read_rows, remember


def ids_of(table) -> list[str]:
    return sorted(read_table(str(table))[0])


def cut(path: Path, lines: list[str]) -> None:
    """A gzip file whose second half is missing; its first member is whole."""
    first, rest = gzip.compress(f"{lines[0]}\n".encode(), mtime=0), gzip.compress("\n".join(lines[1:]).encode())
    path.write_bytes(first + rest[: len(rest) // 2])


def embed_folder(folder: Path, joins: bool, **settings) -> Manifest:
    """Embeds a folder of JSON lines by either back end."""
    strict = {"keep_fields": "", "on_long": "truncate", "max_dead_fraction": 0.1, "max_delete_fraction": 0.2}
    settings = {**strict, "input": str(folder / "corpus"), **settings}
    return run_joined(folder, **settings) if joins else run_pipeline(folder, **settings)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder with two files of three documents each; the table is not in it."""
    for name in "ab":
        write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", [{"id": f"{name}{i}", "text": f"a {i}"} for i in range(3)])
    return tmp_path / "corpus"


# Files that cannot be read


@pytest.mark.parametrize("joins", [False, True])
def test_a_file_that_is_unreadable_stops_a_run_or_is_skipped_and_its_rows_stay(tmp_path, corpus, joins):
    embed_folder(tmp_path, joins)
    before = remember(tmp_path / "table")
    (corpus / "a.jsonl").rename(tmp_path / "moved")
    (corpus / "a.jsonl").symlink_to("nowhere")
    write_jsonl(corpus / "b.jsonl", [{"id": "b0", "text": "a 0"}, {"id": "b9", "text": "new"}])
    with pytest.raises(InputError, match=r"a\.jsonl: is a link to 'nowhere'.*--on_bad_file=skip") as caught:
        embed_folder(tmp_path, joins)
    assert len(str(caught.value).splitlines()) == 1
    assert_unchanged(tmp_path / "table", before)
    manifest = embed_folder(tmp_path, joins, on_bad_file="skip", max_delete_fraction=0.4, max_dead_fraction=0)
    assert ids_of(tmp_path / "table") == ["a0", "a1", "a2", "b0", "b9"]
    assert [manifest.counts["merge"].get(name, 0) for name in ("stale", "deleted", "gone")] == [3, 2, 0]
    assert [(bad.file, bad.reason) for bad in manifest.bad_files] == [(str(corpus / "a.jsonl"), "unreadable_file")]
    assert manifest.dead_letters == {} and open_table(str(tmp_path / "table"))[0].bad_files == manifest.bad_files


@pytest.mark.parametrize("joins", [False, True])
def test_a_file_that_ends_too_early_stops_a_run_or_is_skipped(tmp_path, corpus, joins):
    records = [json.dumps(record) for record in as_records(some_texts(50))]
    cut(corpus / "c.jsonl.gz", records)
    with pytest.raises((InputError, RunError), match=r"c\.jsonl\.gz is cut off.*; nothing is published\..*skip$"):
        embed_folder(tmp_path, joins)
    assert not (tmp_path / "table" / "CURRENT").exists()
    manifest = embed_folder(tmp_path, joins, on_bad_file="skip", max_dead_fraction=0)
    assert {"0", "a0", "b2"} <= set(ids_of(tmp_path / "table")) and manifest.rows < 56
    assert [(bad.file, bad.reason) for bad in manifest.bad_files] == [(str(corpus / "c.jsonl.gz"), "truncated_file")]


def test_a_run_that_stops_at_a_bad_file_keeps_its_vectors(tmp_path, monkeypatch):
    for stage in ("reuse.local", "preprocess.chunking"):
        monkeypatch.setattr(f"pipeline.{stage}.BUFFERED_DOCUMENTS", 1)
    write_lines(tmp_path / "a.txt", *some_texts(40))
    cut(tmp_path / "b.txt.gz", some_texts(50, seed=2))
    settings = {"batch_tokens": 64}
    with pytest.raises(InputError, match="is cut off"):
        run_embed(tmp_path / "*.txt*", tmp_path / "table", **settings)
    fingerprint = os.listdir(tmp_path / "table" / "journal")[0]
    assert list_segments(str(tmp_path / "table"), fingerprint)
    with watch_encoder() as run:
        run_embed(tmp_path / "*.txt", tmp_path / "table", **settings)
    assert len(run.texts) < 20


def test_skipped_files_are_reported_everywhere_until_they_can_be_read(tmp_path, corpus):
    table = str(tmp_path / "table")
    (corpus / "c.jsonl").symlink_to("nowhere")
    manifest = run_pipeline(tmp_path, input=str(corpus), on_bad_file="skip")
    told = f"{corpus}/c.jsonl: is a link to 'nowhere', which cannot be opened"
    for report in (format_summary(manifest, table), format_table(table, 1)):
        assert "bad files    1 skipped" in report and told in report
    assert [bad["file"] for bad in summarize(manifest, table)["bad_files"]] == [f"{corpus}/c.jsonl"]
    for on_bad_file, n_stops in (("fail", 1), ("skip", 0)):
        dry_run = make_dry_run(make_config(tmp_path, input=str(corpus), on_bad_file=on_bad_file))
        assert [bad["reason"] for bad in dry_run.bad_files] == ["unreadable_file"]
        assert len(dry_run.stops) == n_stops and told in format_plan(dry_run, table)
    assert verify_table(table, [str(corpus)]) == []
    (corpus / "c.jsonl").unlink()
    manifest = run_pipeline(tmp_path, input=str(corpus))
    assert manifest.bad_files == () and "bad files" not in format_summary(manifest, table)


def test_a_dry_run_finds_a_file_that_ends_too_early(tmp_path, corpus):
    cut(corpus / "c.jsonl.gz", [json.dumps(record) for record in as_records(some_texts(50))])
    (stop,) = make_dry_run(make_config(tmp_path, input=str(corpus))).stops
    assert "c.jsonl.gz is cut off" in stop and "--on_bad_file=skip" in stop
    dry_run = make_dry_run(make_config(tmp_path, input=str(corpus), on_bad_file="skip"))
    assert dry_run.stops == [] and [bad["reason"] for bad in dry_run.bad_files] == ["truncated_file"]


def test_verify_finds_an_unreadable_file_that_the_run_had_read(tmp_path, corpus):
    run_pipeline(tmp_path, input=str(corpus))
    (corpus / "a.jsonl").unlink()
    (corpus / "a.jsonl").symlink_to("nowhere")
    (finding,) = verify_table(str(tmp_path / "table"), [str(corpus)])
    assert finding.kind == "unreadable_input" and finding.what == f"{corpus}/a.jsonl"


def test_a_retry_keeps_the_rows_and_the_report_of_a_skipped_file(tmp_path, corpus):
    run_pipeline(tmp_path, input=str(corpus), on_long="reject")
    (corpus / "a.jsonl").unlink()
    (corpus / "a.jsonl").symlink_to("nowhere")
    write_jsonl(corpus / "b.jsonl", [{"id": "b0", "text": "a 0"}, {"id": "b1", "text": "dog " * 600}])
    settings = {"input": str(corpus), "on_long": "reject", "max_dead_fraction": 1, "max_delete_fraction": 1}
    skipped = run_pipeline(tmp_path, **settings, on_bad_file="skip")
    assert skipped.dead_letters == {"too_long": 1}
    retried = run_pipeline(tmp_path, input="", on_long="reject", retry_dead_letters=True)
    assert retried.bad_files == skipped.bad_files and not retried.gone_files.n
    assert ids_of(tmp_path / "table") == ["a0", "a1", "a2", "b0", "b1"]


@pytest.mark.parametrize("on_bad_file", ["fail", "skip"])
def test_input_of_which_nothing_can_be_read(tmp_path, on_bad_file):
    (tmp_path / "a.txt").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"a\.txt: is a link to 'nowhere'"):
        run_embed(tmp_path / "*.txt", tmp_path / "table", on_bad_file=on_bad_file)
    (tmp_path / "b.txt.gz").write_bytes(b"\x1f\x8b no gzip")
    says = "a.txt: is a link" if on_bad_file == "fail" else "no documents that can be read: 2 of its files are skipped"
    with pytest.raises((InputError, RunError), match=says):
        run_embed(tmp_path / "*.txt*", tmp_path / "table", on_bad_file=on_bad_file)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_without_the_text_column_is_a_bad_file(tmp_path, suffix):
    for name, column in (("a", "text"), ("b", "body")):
        values = pa.table({"id": [name], column: [f"the text of {name}"]})
        path = str(tmp_path / f"{name}.{suffix}")
        csv.write_csv(values, path) if suffix == "csv" else pq.write_table(values, path)
    settings = {"input": f"{tmp_path}/*.{suffix}", "id_field": "id"}
    with pytest.raises(InputError, match=rf"b\.{suffix}: column 'text' is missing.*--on_bad_file=skip"):
        run_pipeline(tmp_path, **settings)
    manifest = run_pipeline(tmp_path, **settings, on_bad_file="skip")
    assert [(bad.file, bad.reason) for bad in manifest.bad_files] == [(f"{tmp_path}/b.{suffix}", "missing_field")]
    assert ids_of(tmp_path / "table") == ["a"]


@pytest.mark.parametrize("run", [run_pipeline, run_joined])
def test_kept_values_of_rows_that_stay_are_widened_with_their_column(tmp_path, run):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "text": "one", "price": 10}])
    write_jsonl(tmp_path / "b.jsonl", [{"id": "b", "text": "two", "price": 5}])
    settings = {"input": f"{tmp_path}/*.jsonl", "keep_fields": "price", "output_format": "parquet"}
    run(tmp_path, **settings)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "text": "one", "price": 9.99}])
    run(tmp_path, **settings, on_bad_file="skip")
    assert {row["id"]: row["price"] for row in iter_table(str(tmp_path / "table"))} == {"a": 9.99, "b": 5.0}


# Files that are gone


@pytest.mark.parametrize("joins", [False, True])
def test_files_that_are_gone_are_named_before_their_documents_are_deleted(tmp_path, corpus, joins, caplog):
    embed_folder(tmp_path, joins)
    (corpus / "a.jsonl").unlink()
    write_jsonl(corpus / "b.jsonl", [{"id": "b0", "text": "a 0"}, {"id": "a0", "text": "a 0"}])
    gone = f"an input file that is no longer among the input: {corpus}/a.jsonl"
    caplog.clear()
    with pytest.raises(RunError, match=rf"4 of the table's 6 documents .*\(2 of them come from {gone}\)"):
        embed_folder(tmp_path, joins, max_delete_fraction=0.2)
    assert f"come from {gone}" in caplog.text
    assert len(ids_of(tmp_path / "table")) == 6
    dry_run = make_dry_run(make_config(tmp_path, input=str(corpus)))
    assert (dry_run.deleted, dry_run.gone, dry_run.gone_files) == (4, 2, [f"{corpus}/a.jsonl"])
    assert f"2 of the deleted documents come from {gone}" in format_plan(dry_run, "table")
    manifest = embed_folder(tmp_path, joins, max_delete_fraction=1)
    assert ids_of(tmp_path / "table") == ["a0", "b0"]
    assert f"2 documents deleted, of {gone}" in format_summary(manifest, str(tmp_path / "table"))
    assert summarize(manifest, "table")["gone_files"] == 1


def test_files_that_are_gone_are_named_for_databases_too_and_not_if_rows_are_kept(tmp_path, corpus, caplog):
    pytest.importorskip("duckdb")
    output = f"duckdb://{tmp_path}/table.duckdb/notes"
    run_pipeline(tmp_path, input=str(corpus), output=output)
    (corpus / "a.jsonl").unlink()
    caplog.clear()
    run_pipeline(tmp_path, input=str(corpus), output=output, deletes="keep")
    assert "no longer among the input" not in caplog.text
    manifest = run_pipeline(tmp_path, input=str(corpus), output=output, max_delete_fraction=0.5)
    assert f"no longer among the input: {corpus}/a.jsonl" in caplog.text
    assert (manifest.counts["merge"]["gone"], manifest.gone_files.n) == (3, 1)
    assert open_store(output).read_live().manifest.gone_files == manifest.gone_files


def test_documents_of_a_renamed_file_are_not_gone(tmp_path, corpus):
    run_pipeline(tmp_path, input=str(corpus))
    (corpus / "a.jsonl").rename(corpus / "z.jsonl")
    manifest = run_pipeline(tmp_path, input=str(corpus), max_delete_fraction=0)
    assert manifest.counts["merge"]["gone"] == 0 and manifest.counts["reuse"]["unchanged"] == 6
    assert "no longer" not in format_summary(manifest, "table")
    again = run_pipeline(tmp_path, input=str(corpus), max_delete_fraction=0)
    assert again.gone_files.n == 0


def test_a_corpus_that_moves_as_a_whole_keeps_its_vectors_in_a_database(tmp_path, corpus, caplog):
    output = f"duckdb://{tmp_path}/table.duckdb/notes"
    run_pipeline(tmp_path, input=str(corpus), output=output)
    before = read_rows(output)
    corpus.rename(tmp_path / "moved")
    settings = {"input": str(tmp_path / "moved"), "output": output, "max_delete_fraction": 0}
    dry_run = make_dry_run(make_config(tmp_path, **settings))
    assert (dry_run.to_encode, dry_run.deleted, dry_run.gone, dry_run.stops) == (0, 0, 0, [])
    assert "no longer" not in format_plan(dry_run, output)
    with watch_encoder() as watched:
        manifest = run_pipeline(tmp_path, **settings)
    assert watched.texts == [] and manifest.counts["reuse"] | {"updated": 6, "reused": 6} == manifest.counts["reuse"]
    assert (manifest.counts["merge"].get("deleted", 0), manifest.counts["merge"]["gone"]) == (0, 0)
    assert "a document of theirs that another file has keeps its vector" in caplog.text
    assert "no longer" not in format_summary(manifest, output)
    after = read_rows(output)
    assert {row["source"] for row in after.values()} == {f"{tmp_path}/moved/{name}.jsonl" for name in "ab"}
    assert_same_rows(after, before, ignored=("source",))


# The table among its input


def test_a_table_inside_its_input_is_not_read(tmp_path):
    write_lines(tmp_path / "a.txt", "one", "", "three")
    table = tmp_path / "table"
    (table / "attempts" / "killed").mkdir(parents=True)
    write_lines(table / "attempts" / "killed" / "dead_letters-0.txt", "not a document")
    for _ in range(2):
        manifest = run_embed(tmp_path, table, keep_text=True)
        assert sorted(row["text"] for row in iter_table(str(table))) == ["one", "three"]
        assert manifest.dead_letters == {"empty_text": 1}
    assert verify_table(str(table), [str(tmp_path)]) == []


# Names


@pytest.mark.parametrize("joins", [False, True])
def test_names_that_are_not_utf8_travel_through_a_run(tmp_path, joins):
    (tmp_path / "corpus").mkdir()
    for name in (b"caf\xe9.txt", b"na\xefve.txt"):
        with open(os.fsencode(tmp_path / "corpus") + b"/" + name, "wb") as file:
            file.write(b"one\ntwo\nbad \xff\n")
    write_lines(tmp_path / "corpus" / "b.txt", *some_texts(20))
    settings = {"id_field": "", "split_bytes": 12, "max_dead_fraction": 0.5}
    embed_folder(tmp_path, joins, **settings)
    ids = ids_of(tmp_path / "table")
    assert {r"caf\xe9.txt@0", r"caf\xe9.txt@4", r"na\xefve.txt@0"} <= set(ids)
    with watch_encoder() as run:
        manifest = embed_folder(tmp_path, joins, **settings)
    assert run.texts == [] and manifest.counts["reuse"]["unchanged"] == len(ids)
    os.remove(os.fsencode(tmp_path / "corpus") + b"/caf\xe9.txt")
    manifest = embed_folder(tmp_path, joins, **settings)
    assert manifest.counts["merge"]["deleted"] == manifest.counts["merge"]["gone"] == 2
    assert manifest.gone_files.first == (rf"{tmp_path}/corpus/caf\xe9.txt",)
    assert r"caf\xe9.txt" in format_summary(manifest, "table")


def test_names_that_are_not_utf8_are_stored_in_databases(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"one\n")
    pattern = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9*")
    run_embed(pattern, f"duckdb://{tmp_path}/t.duckdb/notes")
    with duckdb.connect(str(tmp_path / "t.duckdb")) as connection:
        ((name, source),) = connection.execute("SELECT id, source FROM notes").fetchall()
    assert (name, source) == (r"caf\xe9.txt@0", rf"{tmp_path}/caf\xe9.txt")


# Fields of folders


def test_partition_folders_give_fields_to_every_format(tmp_path):
    corpus = tmp_path / "corpus"
    for folder, name, lines in (
        ("year=2024/lang=en", "a.jsonl", ['{"text": "one"}', '{"text": "two", "lang": "own"}']),
        ("year=2025/lang=__HIVE_DEFAULT_PARTITION__", "b.csv", ["text", "three"]),
        ("year=2026/lang=zh%2FTW", "c.txt", ["four"]),
    ):
        (corpus / folder).mkdir(parents=True)
        write_lines(corpus / folder / name, *lines)
    run_embed(corpus, tmp_path / "table", keep_text=True, keep_fields="year,lang")
    rows = {row["text"]: (row["year"], row["lang"]) for row in iter_table(str(tmp_path / "table"))}
    assert rows == {"one": (2024, "en"), "two": (2024, "own"), "three": (2025, None), "four": (2026, "zh/TW")}


@pytest.mark.parametrize(("values", "kept"), [(("007", "8"), ["007", "8"]), (("1", "2.5"), [1.0, 2.5])])
def test_partition_fields_are_typed_by_their_spelling(tmp_path, values, kept):
    for value in values:
        (tmp_path / f"part={value}").mkdir()
        write_lines(tmp_path / f"part={value}" / "a.txt", f"text {value}")
    run_embed(tmp_path / "*/*.txt", tmp_path / "table", keep_fields="part")
    assert sorted(row["part"] for row in iter_table(str(tmp_path / "table"))) == kept


# Standard input


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    """Puts bytes into standard input; its copy must be gone at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    yield lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert not list((tmp_path / "copies").glob("embeam-stdin-*"))


def test_standard_input_is_read_like_a_file(tmp_path, pipe):
    data = b'{"id": "a", "text": "one"}\n{"id": "a", "text": "twice"}\n{"id": "b", "text": ""}\n'
    settings = {"input": "-", "input_format": "jsonl", "id_field": "id", "max_dead_fraction": 1}
    pipe(data)
    dry_run = make_dry_run(make_config(tmp_path, **settings, on_empty="reject"))
    assert (dry_run.documents, dry_run.dead_letters) == (1, {"duplicate_id": 1, "empty_text": 1})
    pipe(data)
    manifest = run_pipeline(tmp_path, **settings, on_empty="reject")
    assert ids_of(tmp_path / "table") == ["a"] and manifest.dead_letters == dry_run.dead_letters
    pipe(data)
    with watch_encoder() as run:
        again = run_pipeline(tmp_path, **settings, on_empty="reject")
    assert run.texts == [] and again.gone_files.n == 0
    pipe(data)
    assert verify_table(str(tmp_path / "table"), ["-"]) == []


def test_ids_of_standard_input_do_not_tell_where_its_copy_is(tmp_path, pipe):
    pipe(b"one\ntwo\n")
    run_embed("-", tmp_path / "table", input_format="text")
    assert ids_of(tmp_path / "table") == ["stdin@0", "stdin@4"]


def test_the_copy_of_standard_input_is_removed_when_a_run_fails(tmp_path, pipe):
    pipe(b"one\n\n")
    with pytest.raises(RunError, match="1 of 2 documents"):
        run_embed("-", tmp_path / "table", input_format="text", max_dead_fraction=0.1)


def test_standard_input_needs_a_format_a_pipe_and_the_local_engine(tmp_path, pipe, monkeypatch, call):
    pipe(b"one\n")
    with pytest.raises(InputError, match=r"--input=- has no name .*--input_format=jsonl"):
        run_embed("-", tmp_path / "table")
    flags = ("--input=-", "--input_format=text", f"--output={tmp_path}/table", f"--encoder={ENCODER}")
    code, _, err = call("embed", *flags, "--runner=PrismRunner")
    assert code and "--input=- is read on this machine" in err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(InputError, match="nothing is piped into it"):
        run_embed("-", tmp_path / "table", input_format="text")


def test_bad_values_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--on_bad_file=ignore is not one of fail, skip"):
        make_config(tmp_path, on_bad_file="ignore")
