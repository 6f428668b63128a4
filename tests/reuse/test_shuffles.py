"""What crosses shuffles on a distributed engine: texts once, index entries, and no vector that stays."""

from __future__ import annotations

import pytest

from tests.support.corpora import some_texts, write_jsonl
from tests.support.histories import run_joined
from tests.support.models import save_text_encoder
from tests.support.shuffles import ByteCounter

N = 300
MOST_BYTES = 150  # of a document, besides its text


RECORDS = [{"id": f"doc-{i:012d}", "text": text} for i, text in enumerate(some_texts(N, seed=5, words=(20, 60)))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_text_encoder(tmp_path_factory.mktemp("encoder"), named=False, n_hashes=1023)


def run(folder, encoder, **settings):
    own = {"encoder": encoder, "preprocessor": "", "keep_fields": "", "split_bytes": 10_000}
    return run_joined(folder, **{**own, **settings})


def test_what_stays_crosses_without_its_vectors(tmp_path, encoder, monkeypatch):
    crossed = {}
    for dimensions in (64, 1024):
        folder = tmp_path / str(dimensions)
        folder.mkdir()
        write_jsonl(folder / "corpus.jsonl", RECORDS)
        run(folder, encoder, dimensions=dimensions)
        with monkeypatch.context() as patch:
            counter = ByteCounter(patch)
            manifest = run(folder, encoder, dimensions=dimensions)
        assert manifest.counts["reuse"]["unchanged"] == N and "encoded" not in manifest.counts["reuse"]
        crossed[dimensions] = {name: counter.n_bytes[name] for name, n in counter.elements.items() if n >= N}
    assert crossed[64] == crossed[1024], "no vector crosses"
    assert set(name.split("/")[-1] for name in crossed[64]) == {"GroupById", "GroupByContent"}
    own = sum(crossed[64].values()) - sum(len(record["text"].encode()) for record in RECORDS)
    assert own <= MOST_BYTES * N, own / N
