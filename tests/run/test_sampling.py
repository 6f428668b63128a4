"""What is found out before a run: everything once."""

import pytest

from pipeline.run.job import prepare_job
from pipeline.run.resolve import resolve
from pipeline.sources.jsonl import JsonlSource
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.runs import embed_records, make_config


@pytest.fixture
def ranges_read(monkeypatch):
    """The ranges of JSON lines whose records are asked for."""
    read_records, ranges = JsonlSource.read_records, []

    def read(self, file_range, config):
        ranges.append(file_range)
        return read_records(self, file_range, config)

    monkeypatch.setattr(JsonlSource, "read_records", read)
    return ranges


def prepare(folder, **settings):
    (folder / "scratch").mkdir()
    return prepare_job(resolve(make_config(folder, **settings)), "now", 0.0, scratch=str(folder / "scratch"))


def test_the_input_is_sampled_once_before_a_run(tmp_path, ranges_read):
    write_jsonl(tmp_path / "corpus.jsonl", [record | {"year": 1900} for record in as_records(some_texts(20))])
    assert [field.type for field in prepare(tmp_path, keep_fields="year").kept] == ["int"]
    assert [file_range.file.name for file_range in ranges_read] == ["corpus.jsonl"]


def test_dead_letters_are_not_sampled(tmp_path, ranges_read):
    records = as_records(["a b c", "a b c d e f g h i j k l", "d e f"])
    _, manifest = embed_records(tmp_path, records, on_long="reject", max_tokens=8, max_dead_fraction=1)
    assert manifest.dead_letters == {"too_long": 1}
    ranges_read.clear()
    assert prepare(tmp_path, retry_dead_letters=True, on_long="reject", max_tokens=8).input.files
    assert not ranges_read
