"""Whole runs against the official encoder, called directly with each text alone."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import tensorflow as tf
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that

import pipeline
from pipeline.embed import EmbedDocuments
from pipeline.encoders.parity import LARGEST_DIFFERENCE
from pipeline.engines.runner import make_runner
from pipeline.search.embedder import load_embedder
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.models import save_hashing_preprocessor, save_text_encoder
from tests.support.official import count_tokens, expected_vector, golden_texts, official_tokens, pack_alone, pack_ids
from tests.support.paths import PREPROCESSOR
from tests.support.runs import embed_records, make_config, run_pipeline
from tests.support.stages import as_documents
from tests.support.tables import assert_close, assert_official_segments, read_dead_letters, read_rows

pytestmark = pytest.mark.numeric

# More than one bucket, more than one batch of some, texts of every script, one without tokens and some that are cut.
TEXTS = [*golden_texts(), *some_texts(60)]


@pytest.mark.parametrize("graph", ["fast", "published"])
def test_rows_are_the_official_encoders_whatever_the_order_the_files_the_bundles_and_the_threads(graph, tmp_path):
    records = as_records(TEXTS)
    np.random.default_rng(3).shuffle(records)
    for i, part in enumerate(np.array_split(records, 7)):
        write_jsonl(tmp_path / f"{i}.jsonl", part)
    threads = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]
    manifest = run_pipeline(tmp_path, threads, split_bytes=2000, encoder_graph=graph, preprocessor=PREPROCESSOR)
    assert len(manifest.files) > 1, "the corpus fits into one bundle, which proves nothing"
    assert manifest.counts["batch"]["batches"] > 4
    expected = {str(i): [text] for i, text in enumerate(TEXTS)}
    assert_official_segments(read_rows(str(tmp_path / "table")), expected, "pooled_output")


def test_every_chunk_of_a_long_text_has_a_row(tmp_path):
    texts = ["", *some_texts(25, seed=7)]
    settings = {"on_long": "chunk", "chunk_overlap": 3, "max_tokens": 16, "vector": "sequence_output:mean"}
    rows, _ = embed_records(tmp_path, as_records(texts), **settings)
    windows = {}
    for i, text in enumerate(texts):
        ids = official_tokens(text)
        starts = [0, *range(11, len(ids) - 3, 11)]  # 14 tokens each, 3 of them from the one before
        windows.update({(str(i), j): ids[start : start + 14] for j, start in enumerate(starts)})
    assert set(rows) == set(windows) and len(rows) > 2 * len(texts)
    for key, window in windows.items():
        assert_close(rows[key]["embedding"], expected_vector(pack_ids(window), "sequence_output:mean"), key)


def test_pairs_and_the_prefix_reach_the_encoder(tmp_path):
    texts, seconds = some_texts(30, seed=4), ["", *some_texts(29, seed=5)]
    records = [{"id": str(i), "text": a, "other": b} for i, (a, b) in enumerate(zip(texts, seconds, strict=True))]
    del records[3]["other"]  # a single text
    settings = {"pair_field": "other", "text_prefix": "query: ", "max_tokens": 16}
    rows, manifest = embed_records(tmp_path, records, **settings)
    n_cut = sum(row["n_truncated"] for row in rows.values())
    assert manifest.counts["preprocess"]["truncated_tokens"] == n_cut > 0
    expected = {r["id"]: [f"query: {r['text']}", *([r["other"]] if "other" in r else [])] for r in records}
    assert_official_segments(rows, expected, "pooled_output", 16)


def test_long_texts_that_are_rejected_are_dead_letters_of_the_table(tmp_path):
    texts = some_texts(40, seed=9)
    settings = {"on_long": "reject", "max_tokens": 32, "max_dead_fraction": 1}
    rows, manifest = embed_records(tmp_path, as_records(texts), **settings)
    too_long = {str(i) for i, text in enumerate(texts) if count_tokens([text]) > 32}
    assert 0 < len(too_long) < len(texts)
    dead_letters = read_dead_letters(tmp_path / "table")
    assert {dead_letter["id"] for dead_letter in dead_letters} == too_long
    assert {(dead_letter["stage"], dead_letter["reason"]) for dead_letter in dead_letters} == {
        ("preprocess", "too_long")
    }
    assert manifest.dead_letters == {"too_long": len(too_long)}
    kept = {str(i): [text] for i, text in enumerate(texts) if str(i) not in too_long}
    assert_official_segments(rows, kept, "pooled_output", 32)


def test_a_preprocessor_of_an_unknown_kind_is_called_as_it_is(tmp_path):
    folder = save_hashing_preprocessor(tmp_path / "hashing", 1000, can_pack=False)
    texts = ["", "one", *some_texts(10, seed=10)]
    rows, _ = embed_records(tmp_path, as_records(texts), preprocessor=folder)
    preprocessor = tf.saved_model.load(folder)
    assert len(rows) == len(texts)
    for i, text in enumerate(texts):
        packed = {name: tensor.numpy() for name, tensor in preprocessor(tf.constant([text])).items()}
        assert_close(rows[str(i), 0]["embedding"], expected_vector(packed, "pooled_output"), text)
        assert (rows[str(i), 0]["n_tokens"], rows[str(i), 0]["n_truncated"]) == (packed["input_mask"].sum(), None)


def test_an_encoder_of_strings_gets_the_texts_themselves(tmp_path):
    folder = save_text_encoder(tmp_path / "encoder", named=True)
    texts = golden_texts()[::5]
    settings = {"encoder": folder, "text_prefix": "q: ", "vector": "other", "batch_tokens": 300}
    rows, manifest = embed_records(tmp_path, as_records(texts), **settings)
    expected = tf.saved_model.load(folder)(tf.constant(["q: " + text for text in texts]))["other"].numpy()
    assert len(rows) == len(texts) and manifest.counts["batch"]["batches"] > 1
    for i, text in enumerate(texts):
        assert_close(rows[str(i), 0]["embedding"], expected[i], text)
        assert not {"n_tokens", "n_truncated"} & set(rows[str(i), 0])


def test_the_table_says_which_graph_and_how_near_it_is_and_a_query_runs_the_same(tmp_path):
    texts = ["one", "the two of them", "three " * 30]
    rows, manifest = embed_records(tmp_path, as_records(texts), encoder_graph="auto")
    assert manifest.settings["encoder_graph"] == manifest.identity["graph"] == "fast"
    assert manifest.settings["precision"] == manifest.identity["precision"] == "float32"
    assert 0 < manifest.parity["max_abs"] < LARGEST_DIFFERENCE
    assert 0.999 < manifest.parity["min_cosine"] < 1.0001
    again = load_embedder(str(tmp_path / "table")).embed(texts)
    for i in range(3):
        assert_close(again[i], rows[str(i), 0]["embedding"])


# --- the Python entry points ------------------------------------------------------------------------------------------


def test_the_public_function_can_be_called_again_and_again(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", as_records(["one", "two"]))
    first = pipeline.build_table(make_config(tmp_path))
    second = pipeline.build_table(make_config(tmp_path))
    assert (first.rows, second.rows, second.previous) == (2, 2, first.snapshot)


def test_embed_documents_gives_the_same_rows_inside_any_pipeline(tmp_path):
    texts = some_texts(20, seed=13)
    config = make_config(tmp_path)
    options = PipelineOptions([])

    def check(rows: list[Any]) -> None:
        assert {row.id for row in rows} == set(map(str, range(len(texts))))
        for row in rows:
            expected = expected_vector(pack_alone([texts[int(row.id)]], 512), "pooled_output")
            assert_close(np.frombuffer(row.vector, "<f4"), expected, row.id)

    with beam.Pipeline(runner=make_runner(options), options=options) as p:
        documents = p | beam.Create(as_documents(texts))
        assert_that((documents | EmbedDocuments(config)).rows, check)
