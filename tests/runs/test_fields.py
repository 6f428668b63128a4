"""Whole runs over nested and kept fields, and rows that name their files."""

import pytest

import pipeline
from pipeline.report.summary import format_summary, format_table, summarize
from pipeline.run.verify import verify_table
from tests.support.corpora import write_jsonl
from tests.support.runs import run_embed, watch_encoder

SETTINGS = {"id_field": "_id", "text_field": "title,text", "keep_fields": "metadata,metadata.lang,price:int"}
RECORDS = [
    {"_id": "a", "title": "A", "text": "first", "metadata": {"lang": "en", "tags": ["x"]}, "price": 10},
    {"_id": "b", "title": "", "text": "second", "metadata": {"lang": None}, "price": 9.99},
]


def outputs(folder):
    return {
        "tfrecord": (str(folder / "t"), {}),
        "parquet": (str(folder / "p"), {"output_format": "parquet"}),
        "duckdb": (f"duckdb://{folder}/d.duckdb/t", {}),
    }


@pytest.mark.parametrize("kind", ["tfrecord", "parquet", "duckdb"])
def test_nested_fields_on_every_sink(tmp_path, kind):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    output, settings = outputs(tmp_path)[kind]
    manifest = run_embed(tmp_path / "a.jsonl", output, **SETTINGS, **settings)
    rows = {row["id"]: row for row in pipeline.iter_table(output)}
    names = ("metadata", "metadata_lang", "price")
    assert [rows["a"][name] for name in names] == ['{"lang":"en","tags":["x"]}', "en", 10]
    assert [rows["b"][name] for name in names] == ['{"lang":null}', None, None]
    told = "1 value of price does not fit int and is null; --keep_fields=price:float may hold them"
    assert told in format_summary(manifest, output) and told in format_table(output, 0)
    assert summarize(manifest, output)["kept_nulls"] == manifest.counts["kept_nulls"] == {"price": 1}
    again = run_embed(tmp_path / "a.jsonl", output, **SETTINGS, **settings)
    assert again.counts["reuse"] == {"documents": 2, "unchanged": 2}


@pytest.mark.parametrize("kind", ["tfrecord", "parquet", "duckdb"])
def test_a_document_that_moves_gets_its_new_source(tmp_path, kind):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    output, settings = outputs(tmp_path)[kind]
    settings |= SETTINGS | ({"keep_source": True} if kind != "duckdb" else {})
    run_embed(tmp_path / "*.jsonl", output, **settings)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    with watch_encoder() as run:
        manifest = run_embed(tmp_path / "*.jsonl", output, **settings)
    assert run.texts == [] and manifest.counts["reuse"]["updated"] == 2
    assert {row["source"] for row in pipeline.iter_table(output)} == {str(tmp_path / "b.jsonl")}
    assert run_embed(tmp_path / "*.jsonl", output, **settings).counts["reuse"]["unchanged"] == 2
    if kind != "duckdb":
        assert verify_table(output, [str(tmp_path / "*.jsonl")]) == []
