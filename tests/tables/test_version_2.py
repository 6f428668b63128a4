"""Tables of format version 2, the version before: stored ones are read, verified, rerun, retried and rolled back."""

from __future__ import annotations

import glob
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pytest

import pipeline
from pipeline.config import EmbedConfig
from pipeline.errors import ConfigError
from pipeline.files import create_file, join, make_folder
from pipeline.report.summary import format_summary
from pipeline.run.dry_run import make_dry_run
from pipeline.run.verify import verify_table
from pipeline.tables.manifest import FORMAT_VERSION, Manifest
from pipeline.tables.stores import open_store
from tests.support.bigquery import BigQueryEmulator, start_bigquery
from tests.support.corpora import write_jsonl
from tests.support.emulators import start_gcs
from tests.support.official import official_vector
from tests.support.paths import ENCODER, REFERENCE
from tests.support.runs import run_embed, watch_encoder
from tests.support.tables import assert_close, assert_same_rows, list_snapshots, read_dead_letters, read_rows

STORED = REFERENCE / "tables_v2"
UNLUCKY = "a text on which the encoder failed"  # of a4
DEAD = {"a4", "a5", "b1"}  # the encoder failed, blank, too long for `REJECT`
READING = {"id_field": "id", "keep_fields": "year:int,name"}
REJECT = {**READING, "on_long": "reject", "max_tokens": 40}
# The windows of long texts have moved since, so the rows of this one are made again.
CHUNK = {**READING, "on_long": "chunk", "max_tokens": 12, "keep_text": True, "output_format": "parquet"}
FOLDERS = {"tfrecord": REJECT, "parquet": CHUNK}


class OldTable(NamedTuple):
    """A copy of a stored table: its name, the settings that it was made with, and the folder for a corpus."""

    output: str
    settings: dict[str, Any]
    folder: Path

    def run(self, records: list[dict[str, Any]], **settings: Any) -> tuple[Manifest, list[str]]:
        """Runs this embeam over some records: the new manifest, and the texts that were encoded."""
        corpus = self.folder / "corpus.jsonl"
        write_jsonl(corpus, records)
        with watch_encoder() as watched:
            manifest = run_embed(corpus, self.output, **self.settings, **settings)
        return manifest, watched.texts


def read_corpus() -> list[dict[str, Any]]:
    paths = sorted((STORED / "corpus").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def lucky_records() -> list[dict[str, Any]]:
    return [record for record in read_corpus() if record["text"] != UNLUCKY]


def show_paths(text: str) -> str:
    return text.replace("{ENCODER}", ENCODER)


def copy_folder(name: str, folder: Path) -> str:
    shutil.copytree(STORED / name, folder / "table")
    for path in (folder / "table").rglob("manifest.json"):
        path.write_text(show_paths(path.read_text()))
    return str(folder / "table")


def copy_duckdb(folder: Path) -> str:
    shutil.copytree(STORED / "duckdb" / "v.duckdb.embeam", folder / "v.duckdb.embeam")
    (folder / "v.duckdb").write_bytes(gzip.decompress((STORED / "duckdb" / "v.duckdb.gz").read_bytes()))
    with closing(duckdb.connect(str(folder / "v.duckdb"))) as connection:
        connection.execute("UPDATE notes_runs SET manifest = replace(manifest, '{ENCODER}', ?)", [ENCODER])
    return f"duckdb://{folder}/v.duckdb/notes"


def copy_bigquery(cloud: BigQueryEmulator, dataset: str) -> tuple[str, dict[str, str]]:
    from google.cloud import bigquery

    stored = STORED / "bigquery"
    client = bigquery.Client(project=cloud.project)
    client.create_dataset(dataset)
    for name in ("notes", "notes_runs"):
        fields = json.loads((stored / f"{name}.schema.json").read_text())
        schema = [bigquery.SchemaField.from_api_repr(field) for field in fields]
        table = client.create_table(bigquery.Table(f"{cloud.project}.{dataset}.{name}", schema))
        rows = [json.loads(show_paths(line)) for line in (stored / f"{name}.jsonl").read_text().splitlines()]
        assert client.insert_rows_json(table, rows) == []
    output, work_dir = f"bq://{cloud.project}.{dataset}.notes", cloud.gcs.path(dataset)
    folder = join(open_store(output, work_dir).work, "dead_letters")
    make_folder(folder)
    for path in stored.glob("dead_letters-*"):
        create_file(join(folder, path.name), path.read_bytes())
    return output, {"work_dir": work_dir}


@pytest.fixture(scope="module")
def cloud() -> Iterator[BigQueryEmulator]:
    with start_gcs() as gcs, start_bigquery(gcs) as bigquery, bigquery.used_here():
        yield bigquery


@pytest.fixture(params=[*FOLDERS, "duckdb", pytest.param("bigquery", marks=pytest.mark.emulator)])
def table(request, tmp_path) -> OldTable:
    if request.param in FOLDERS:
        return OldTable(copy_folder(request.param, tmp_path), FOLDERS[request.param], tmp_path)
    if request.param == "duckdb":
        return OldTable(copy_duckdb(tmp_path), REJECT, tmp_path)
    dataset = f"old_{request.node.originalname[5:]}"
    output, work = copy_bigquery(request.getfixturevalue("cloud"), dataset)
    return OldTable(output, {**REJECT, **work}, tmp_path)


@pytest.fixture(params=FOLDERS)
def folder_table(request, tmp_path) -> OldTable:
    return OldTable(copy_folder(request.param, tmp_path), FOLDERS[request.param], tmp_path)


def read_version(table: OldTable) -> int:
    """The format version as it is stored."""
    manifests = sorted(Path(table.output, "snapshots").glob("*/manifest.json"))
    return int(json.loads(manifests[-1].read_text())["format_version"])


def test_the_rows_are_those_that_this_embeam_makes(table, tmp_path):
    rows, dead = read_rows(table.output), DEAD if table.settings["on_long"] == "reject" else DEAD - {"b1"}
    assert {key for key, _ in rows} == {record["id"] for record in read_corpus()} - dead
    settings = {name: value for name, value in table.settings.items() if name != "work_dir"}
    write_jsonl(tmp_path / "fresh.jsonl", lucky_records())
    run_embed(tmp_path / "fresh.jsonl", tmp_path / "fresh", **settings)
    fresh = read_rows(str(tmp_path / "fresh"))
    if table.settings["on_long"] == "chunk":  # longer ones have other windows
        rows, fresh = ({key: row for key, row in some.items() if row["n_chunks"] == 1} for some in (rows, fresh))
    assert len(rows) > 3
    assert_same_rows(rows, fresh, ignored=("source", "char_start", "char_end"))
    if table.settings["on_long"] == "reject":
        for record in read_corpus():
            if record["id"] not in dead:
                assert_close(rows[record["id"], 0]["embedding"], official_vector(record["text"]), record["id"])


def test_it_is_shown_and_searched(table, call: Callable[..., Any]):
    shown = call("show", table.output)
    assert shown.code == 0 and "64 x float32" in shown.out and "encoder_error" in shown.out
    found = call("query", table.output, "a cat sleeps", "--top=1")
    assert found.code == 0 and "b2" in found.out


def test_a_summary_says_where_the_dead_letters_are(tmp_path):
    """Not only of an old table; but this one needs no BigQuery."""
    output = copy_duckdb(tmp_path)
    manifest = open_store(output).read_live().manifest
    assert manifest is not None
    where = f"{tmp_path}/v.duckdb.embeam/notes/dead_letters/dead_letters-*"
    assert f"dead letters 3, in {where}\n" in format_summary(manifest, output) and len(glob.glob(where)) == 3
    (_, last) = (STORED / "bigquery" / "notes_runs.jsonl").read_text().splitlines()
    manifest = Manifest.from_json(json.loads(last)["manifest"])
    where = f"{manifest.settings['work_dir']}/embeam-test.tables.notes/dead_letters/dead_letters-*"
    assert f"dead letters 3, in {where}\n" in format_summary(manifest, "bq://embeam-test.tables.notes")


def test_its_manifest_has_the_names_of_this_version(tmp_path):
    """Every name of a stored manifest is one that a manifest of this embeam has, after the same two runs."""
    old = pipeline.open_table(copy_folder("tfrecord", tmp_path))[0]
    records = lucky_records()
    fresh = OldTable(str(tmp_path / "fresh"), REJECT, tmp_path)
    fresh.run([*records[1:], {"id": "gone", "text": "a document of the first snapshot only"}])
    new, _ = fresh.run([*records, {"id": "late", "text": "a text that is new"}])
    assert set(old.settings) <= set(new.settings) and set(old.counts) == set(new.counts)
    for stage, counts in old.counts.items():
        assert set(counts) - {"encoder_error", "dead_letters", "changed"} <= set(new.counts[stage]), stage
    assert old.counts["encode"]["spot_checks"] == 3


def test_it_is_verified(folder_table):
    inputs = [str(STORED / "corpus" / "*.jsonl")]
    assert verify_table(folder_table.output, inputs, sample=5) == []


def test_an_unchanged_corpus_encodes_nothing(table):
    before = read_rows(table.output)
    manifest, encoded = table.run(lucky_records())
    assert manifest.format_version == FORMAT_VERSION
    if table.settings["on_long"] == "chunk":
        assert set(encoded) == {record["text"] for record in lucky_records() if record["text"].strip()}
        assert table.run(lucky_records())[1] == []
        return
    assert encoded == []
    if "://" in table.output:  # its rows name the files, which were in another folder
        assert manifest.counts["reuse"]["updated"] == len({key for key, _ in before})
    else:
        assert manifest.counts["reuse"]["unchanged"] == len({key for key, _ in before})
    assert_same_rows(read_rows(table.output), before, ignored=("source",))


def test_one_change_encodes_one_text(table):
    records = lucky_records()
    records[0]["text"] = "the text has changed"
    values = {"input": str(table.folder / "corpus.jsonl"), "output": table.output, "encoder": ENCODER}
    write_jsonl(table.folder / "corpus.jsonl", records)
    if table.settings["on_long"] == "chunk":
        table.run(lucky_records())
        write_jsonl(table.folder / "corpus.jsonl", records)
    dry_run = make_dry_run(EmbedConfig.from_flat({**values, **table.settings}))
    assert (dry_run.changed, dry_run.deleted, dry_run.changes) == (1, 0, [])
    manifest, encoded = table.run(records)
    assert set(encoded) == {"the text has changed"} and manifest.counts["reuse"]["changed"] == 1


def test_its_dead_letters_are_tried_again(table):
    before = read_rows(table.output)
    if table.settings["on_long"] == "chunk":
        with pytest.raises(ConfigError, match=r"preprocessing\.windows None"):
            table.run([], retry_dead_letters=True)
        return
    manifest, encoded = table.run([], retry_dead_letters=True)
    assert set(encoded) == {UNLUCKY} and manifest.format_version == FORMAT_VERSION
    rows = read_rows(table.output)
    assert {key for key, _ in rows} == {key for key, _ in before} | {"a4"}
    assert_same_rows({key: row for key, row in rows.items() if key[0] != "a4"}, before)
    assert {dead_letter["id"] for dead_letter in read_dead_letters(table.output, table.settings.get("work_dir", ""))}


def test_it_can_be_rolled_back(folder_table, call: Callable[..., Any]):
    second = list_snapshots(folder_table.output)[-1]
    before = read_rows(folder_table.output)
    manifest, _ = folder_table.run(lucky_records())
    assert read_version(folder_table) == FORMAT_VERSION and manifest.previous == second
    assert call("rollback", folder_table.output).code == 0
    assert_same_rows(read_rows(folder_table.output), before)
    encoded = folder_table.run(lucky_records())[1]
    assert bool(encoded) == (folder_table.settings["on_long"] == "chunk")


def test_the_snapshot_before_can_be_made_live(folder_table, call: Callable[..., Any]):
    first, _ = list_snapshots(folder_table.output)
    assert call("rollback", folder_table.output).code == 0
    assert pipeline.open_table(folder_table.output)[0].snapshot == first
    ids, _ = pipeline.read_table(folder_table.output)
    assert "gone" in ids and "a7" in ids
    assert verify_table(folder_table.output) == []
