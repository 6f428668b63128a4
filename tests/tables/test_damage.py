"""Damaged tables: every reader and the next run name the file and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import TableError
from pipeline.records import Row
from pipeline.report.summary import format_table
from pipeline.search.nearest import find_nearest
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.readers import ROWS, FileReader, VectorFile
from pipeline.sinks.writing import RowFormat, ShardWriter
from pipeline.tables.manifest import open_table
from pipeline.tables.read import iter_table, open_live, read_table
from tests.support.corpora import write_lines
from tests.support.runs import run_embed


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three rows; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("published")
    write_lines(folder / "a.txt", "a dog", "a cat", "a horse")
    run_embed(folder / "a.txt", folder / "table")
    return folder / "table"


@pytest.fixture
def table(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "table"))


def manifest_of(table: Path) -> Path:
    (path,) = table.glob("snapshots/*/manifest.json")
    return path


def change_manifest(**values: object) -> Callable[[Path], object]:
    return lambda table: manifest_of(table).write_text(json.dumps(json.loads(manifest_of(table).read_text()) | values))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "pointer to nowhere": lambda table: (table / "CURRENT").write_text("20200101T000000Z-000000\n"),
    "empty pointer": lambda table: (table / "CURRENT").write_text(""),
    "bytes in the pointer": lambda table: (table / "CURRENT").write_bytes(b"\xff\xfe\n"),
    "manifest cut off": lambda table: manifest_of(table).write_text(manifest_of(table).read_text()[:200]),
    "manifest that is a list": lambda table: manifest_of(table).write_text("[]"),
    "manifest without a layout": change_manifest(layout="none"),
    "bytes in the manifest": lambda table: manifest_of(table).write_bytes(b"\xff" + manifest_of(table).read_bytes()),
    "manifest of a later release": change_manifest(format_version=99, unheard_of=1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_or_pointer_is_an_error_that_names_the_table_and_the_fix(table, damage):
    DAMAGES[damage](table)
    for read in (open_table, open_live):
        with pytest.raises(TableError) as caught:
            read(str(table))
        said = str(caught.value)
        assert str(table) in said and "\n" not in said
        assert ("newer than this embeam reads" if "later release" in damage else " is damaged") in said
        assert ";" in said, f"no fix is named: {said}"


@pytest.mark.parametrize("damage", ["pointer to nowhere", "manifest cut off"])
def test_every_reader_and_the_next_run_refuse_a_damaged_table(tmp_path, table, damage):
    DAMAGES[damage](table)
    source = write_lines(tmp_path / "b.txt", "a dog")
    attempts = (
        lambda: read_table(str(table)),
        lambda: list(iter_table(str(table))),
        lambda: format_table(str(table), 3),
        lambda: find_nearest(str(table), "a dog"),
        lambda: run_embed(source, table),
    )
    for attempt in attempts:
        with pytest.raises(TableError, match=r"is damaged.*;"):
            attempt()


FILE_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "cut by one": lambda data: data[:-1],
    "flipped": lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 255]) + data[len(data) // 3 + 1 :],
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("form", [("tfrecord", "none"), ("tfrecord", "gzip"), ("parquet", "none")], ids="-".join)
@pytest.mark.parametrize("damage", ["deleted", *FILE_DAMAGES])
def test_a_file_that_is_gone_or_damaged_is_named(tmp_path, form, damage):
    layout = TableLayout("float32", 64)
    vectors = np.random.default_rng(1).normal(size=(300, 64)).astype("<f4")
    rows = [Row(f"n{i}", 0, vector.tobytes(), 0.0, 5, 0, f"{i:064x}", b"", None) for i, vector in enumerate(vectors)]
    writer = ShardWriter(str(tmp_path), RowFormat(form[0], layout, form[1]), 1 << 30)
    writer.write(rows)
    (shard,) = writer.finish()

    def read() -> list[str]:
        reader = FileReader(form[0], layout, form[1])
        stored = reader.read(VectorFile(shard.path, ROWS, 0, 300), np.zeros(0, int))
        return [name for part in stored for name in reader.columns(part, np.arange(len(part.numbers)))["id"]]

    assert read() == [row.id for row in rows]
    path = Path(shard.path)
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(FILE_DAMAGES[damage](path.read_bytes()))
    with pytest.raises(TableError) as caught:
        read()
    assert path.name in str(caught.value) and "run embeam embed again" in str(caught.value)


def test_every_reader_names_a_damaged_file(table):
    (path,) = table.glob("snapshots/*/embeddings-*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    readers = (read_table, lambda t: list(iter_table(t)), lambda t: format_table(t, 9), lambda t: find_nearest(t, "a"))
    for read in readers:
        with pytest.raises(TableError) as caught:
            read(str(table))
        assert path.name in str(caught.value) and "run embeam embed again" in str(caught.value)


@pytest.mark.parametrize("damaged", ["embeddings-*", "index-*"])
def test_a_file_that_is_cut_off_is_made_again_by_the_run_that_its_message_asks_for(tmp_path, table, damaged):
    (path,) = table.glob(f"snapshots/*/{damaged}")
    path.write_bytes(path.read_bytes()[:-1])
    run_embed(write_lines(tmp_path / "a.txt", "a dog", "a cat"), table)
    assert sorted(read_table(str(table))[0]) == ["a.txt@0", "a.txt@6"]


def test_a_flipped_byte_is_found_where_checksums_are_looked_at(tmp_path, table):
    (path,) = table.glob("snapshots/*/embeddings-*")
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 255]) + data[101:])
    source = write_lines(tmp_path / "a.txt", "a dog", "a cat")
    with pytest.raises(TableError, match="run embeam embed again with --verify_live"):
        run_embed(source, table)
    run_embed(source, table, verify_live=True)
    assert sorted(read_table(str(table))[0]) == ["a.txt@0", "a.txt@6"]
