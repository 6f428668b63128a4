"""Disks that are too small, fill up or may not be written to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import RunError, TableError
from pipeline.tables import pointer, publish
from tests.support.corpora import write_lines
from tests.support.disks import SmallDisk, mount_small_disk
from tests.support.runs import run_embed
from tests.support.tables import assert_unchanged, remember


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three rows, to be copied."""
    folder = tmp_path_factory.mktemp("published")
    write_lines(folder / "a.txt", "a dog", "a cat", "a horse")
    run_embed(folder / "a.txt", folder / "table", keep_text=True)
    return folder / "table"


@pytest.fixture
def table(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "table"))


def pretend_free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=n_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_disk_that_is_too_small_is_refused_before_the_run(tmp_path, table, monkeypatch):
    before = remember(table)
    pretend_free(monkeypatch, 1 << 20)
    monkeypatch.setattr("pipeline.run.job.build_pipeline", lambda *_: pytest.fail("the run had begun"))
    with pytest.raises(RunError, match=r"--output=.* GB free; free some"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table)
    assert_unchanged(table, before)


@pytest.mark.parametrize(
    "at",
    [
        "CURRENT",
        pytest.param("manifest.json", marks=pytest.mark.exhaustive),
        pytest.param("schema.pbtxt", marks=pytest.mark.exhaustive),
    ],
)
def test_a_disk_that_fills_up_while_publishing(tmp_path, table, monkeypatch, at):
    write = publish.write_atomically

    def fail(path: str, text: str) -> None:
        if path.endswith(at):
            raise OSError(28, "No space left on device", path)
        write(path, text)

    before = remember(table)
    module = pointer if at == "CURRENT" else publish
    monkeypatch.setattr(module, "write_atomically", fail)
    with pytest.raises(RunError, match="disk is full"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table)
    assert_unchanged(table, before)
    monkeypatch.setattr(module, "write_atomically", write)
    assert run_embed(tmp_path / "b.txt", table).rows == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    (tmp_path / "disk").mkdir()
    with mount_small_disk(tmp_path / "disk", "2m") as disk:
        yield disk


@pytest.mark.crash
def test_a_disk_that_fills_up_during_the_run(tmp_path, small_disk, published, monkeypatch):
    table = Path(shutil.copytree(published, small_disk.path / "table"))
    before = remember(table)
    pretend_free(monkeypatch, 1 << 40)
    source = write_lines(tmp_path / "b.txt", *(f"dog {i} " + "x" * 500 for i in range(4000)))
    with pytest.raises(RunError, match="disk is full"):
        run_embed(source, table, keep_text=True, shard_bytes=100_000)
    assert_unchanged(table, before)
    assert not list((table / "attempts").iterdir())
    assert run_embed(write_lines(tmp_path / "c.txt", "a dog"), table).rows == 1


@pytest.mark.crash
def test_an_output_that_may_not_be_written(tmp_path, small_disk, published):
    table = Path(shutil.copytree(published, small_disk.path / "table"))
    before = remember(table)
    small_disk.protect()
    with pytest.raises(TableError, match="cannot be written to"):
        run_embed(write_lines(tmp_path / "b.txt", "a dog"), table)
    assert_unchanged(table, before)
