"""Chunks and unknown tokens in whole runs: what rows hold, what is printed, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import pipeline
from pipeline.config import EmbedConfig
from pipeline.embedding_spec import make_embedding_spec
from pipeline.errors import ConfigError
from pipeline.report.summary import describe_unknown, format_summary, format_table, summarize
from pipeline.run.dry_run import make_dry_run
from pipeline.run.verify import verify_table
from pipeline.search.nearest import find_nearest
from tests.support.corpora import write_jsonl
from tests.support.paths import ENCODER
from tests.support.runs import embed_records, make_config

CHUNKS = {"on_long": "chunk", "max_tokens": 16, "keep_text": True, "keep_unknown": True}
RECORDS = [{"id": "a", "text": "A cat sleeps. " * 9 + "☃ ☃"}, {"id": "b", "text": "the dog"}]


@pytest.mark.parametrize("form", ["tfrecord", "parquet", "duckdb"])
def test_rows_have_their_own_text_and_reused_rows_too(tmp_path, form):
    place = {"output": f"duckdb://{tmp_path}/t.duckdb/notes"} if form == "duckdb" else {"output_format": form}
    before, manifest = embed_records(tmp_path, RECORDS, **CHUNKS, **place)
    assert len(before) > 4
    renamed = [{**RECORDS[0], "id": "c"}, RECORDS[1]]
    after, later = embed_records(tmp_path, renamed, **CHUNKS, **place, max_delete_fraction=1.0)
    assert later.counts["encode"].get("chunks", 0) == 0
    for (name, chunk), row in after.items():
        own = row["text"]
        assert own == (RECORDS[1] if name == "b" else RECORDS[0])["text"][row["char_start"] : row["char_end"]]
        was = before["b" if name == "b" else "a", chunk]
        assert [was[column] for column in ("char_start", "char_end", "n_unknown")] == [
            row[column] for column in ("char_start", "char_end", "n_unknown")
        ]
    assert sum(row["n_unknown"] for row in after.values()) == 2 == manifest.counts["preprocess"]["unknown_tokens"]
    output = place.get("output", str(tmp_path / "table"))
    own = after["c", len(after) - 2]["text"]
    (hit,) = find_nearest(output, own, top=1)
    assert hit.text == own and hit.score > 0.9999
    if form != "duckdb":
        assert verify_table(output, [str(tmp_path / "corpus.jsonl")], sample=4) == []
        assert verify_table(output, sample=4) == []


def test_unknown_tokens_are_told_everywhere(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", RECORDS)
    dry_run = make_dry_run(make_config(tmp_path, **CHUNKS))
    _, manifest = embed_records(tmp_path, RECORDS, **CHUNKS)
    table = str(tmp_path / "table")
    n_tokens = int(manifest.counts["preprocess"]["tokens"])
    line = f"unknown      2 of {n_tokens:,} tokens are [UNK]"
    assert dry_run.unknown_tokens == 2 and line in format_summary(manifest, table) and line in format_table(table, 1)
    summary = summarize(manifest, table)
    assert (summary["unknown_tokens"], summary["unknown_share"]) == (2, round(2 / n_tokens, 4))
    json.dumps(summary)


def test_a_warning_names_what_to_do_above_a_tenth():
    assert not describe_unknown(0, 100) and not describe_unknown(None, 100)
    assert len(describe_unknown(10, 100)) == 1
    (_, warning) = describe_unknown(220, 240)
    assert warning.startswith("warning") and "--encoder" in warning


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chunk_by": "sentence"}, "--chunk_by=sentence needs chunks"),
        ({"chunk_by": "page", "on_long": "chunk"}, "--chunk_by=page is not one of"),
        ({"on_long": "chunk", "text_prefix": "query"}, "runs into the first word"),
        (
            {"on_long": "average", "text_prefix": "one two three four: ", "max_tokens": 6},
            "leaves no room for text in 6",
        ),
        ({"on_long": "chunk", "chunk_overlap": 9, "text_prefix": "the the: ", "max_tokens": 14}, "leaves nothing new"),
        ({"keep_fields": "char_start"}, "would collide"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        make_embedding_spec(EmbedConfig.from_flat({"encoder": ENCODER, **settings}))


def test_only_windows_change_the_fingerprint():
    def identity(**settings: object) -> dict[str, object]:
        found: dict[str, object] = make_embedding_spec(
            EmbedConfig.from_flat({"encoder": ENCODER, **settings})
        ).identity["preprocessing"]
        return found

    for on_long in ("truncate", "reject"):
        kinds = {"kind", "vocabulary", "lower_case", "overlap", "max_tokens", "on_long", "prefix"}
        assert set(identity(on_long=on_long)) == kinds  # as ever
    by_tokens, by_sentence = (identity(on_long="chunk", chunk_by=by) for by in ("tokens", "sentence"))
    assert by_tokens["windows"] == by_sentence["windows"] and by_sentence["sentences"] and by_tokens != by_sentence


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> pipeline.Embedder:
    folder = tmp_path_factory.mktemp("small")
    embed_records(folder, RECORDS)
    return pipeline.load_embedder(str(folder / "table"))


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("a bare string", r"texts is 'a bare string' \(str\), not a list of strings"),
        (b"bytes", "texts is b'bytes'"),
        (5, r"texts is 5 \(int\)"),
        (None, "texts is None"),
        ([None], r"texts\[0\] is None"),
        (["good", 5], r"texts\[1\] is 5 \(int\), not a string"),
        (np.array([1.0]), r"texts\[0\] is"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(embedder, texts, said):
    with pytest.raises(ConfigError, match=said):
        embedder.embed(texts)


def test_texts_may_come_in_any_iterable(embedder):
    texts = ["a cat", "the dog"]
    expected = embedder.embed(texts)
    for other in (tuple(texts), np.array(texts), np.array(texts, object), iter(texts)):
        assert np.array_equal(embedder.embed(other), expected)
    assert embedder.embed([]).shape == (0, expected.shape[1])
    with pytest.raises(ConfigError, match="pairs is 'ab'"):
        embedder.embed(texts, "ab")
    with pytest.raises(ConfigError, match=r"pairs\[1\] is 5"):
        embedder.embed(texts, [None, 5])


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_query_is_refused(text):
    with pytest.raises(ConfigError, match="a blank text"):
        find_nearest("no such table", text)
