"""`--retry_dead_letters`: the table keeps its settings, whatever flags the command repeats, omits or contradicts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from pipeline.config import EmbedConfig
from pipeline.encoders.handler import LoadedEncoder
from pipeline.errors import ConfigError
from pipeline.run.command import spell_command
from pipeline.run.job import build_table
from pipeline.tables.manifest import Manifest
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.paths import ENCODER, PREPROCESSOR
from tests.support.runs import embed_records, make_config
from tests.support.tables import read_dead_letters, read_rows

RECORDS = [record | {"year": i} for i, record in enumerate(as_records(some_texts(12, words=(1, 9))))]
BAD = RECORDS[5]["text"]
STORED = {"keep_text": True, "keep_fields": "year:int"}  # what else defines the stored rows
PARQUET = {"output_format": "parquet", **STORED}
OTHER = {
    "vector": "sequence_output:mean",
    "max_tokens": 40,
    "on_long": "average",
    "chunk_overlap": 2,
    "text_prefix": "query: ",
    "normalize": True,
    "dimensions": 32,
    "dtype": "int8",
    "encoder_graph": "published",
    "preprocessor": PREPROCESSOR,
    "compression": "gzip",
}


@contextmanager
def failing(*texts: str) -> Iterator[None]:
    """The encoder fails on some texts."""
    encode = LoadedEncoder.encode

    def fail(self: LoadedEncoder, batch: Any) -> Any:
        done = encode(self, batch)
        for i, chunk in enumerate(batch):
            if chunk.document.text in texts:
                done.vectors[i], done.errors[i] = None, "out of luck"
        return done

    with mock.patch.object(LoadedEncoder, "encode", fail):
        yield


def make_table(folder: Path, **settings: Any) -> Manifest:
    with failing(BAD):
        manifest = embed_records(folder, RECORDS, max_dead_fraction=1, **settings)[1]
    assert manifest.dead_letters["encoder_error"] >= 1
    return manifest


def retry(output: object, **settings: Any) -> Manifest:
    values = {"output": str(output), "retry_dead_letters": True, **settings}
    manifest = build_table(EmbedConfig.from_flat(values))
    assert manifest is not None
    return manifest


def assert_completed(folder: Path, before: Manifest, after: Manifest, output: str) -> None:
    """The table is unchanged except for one more document."""
    for name in ("file_format", "compression", "layout", "fingerprint", "identity", "settings"):
        assert getattr(after, name) == getattr(before, name), name
    rows = read_rows(output)
    assert {key for key, _ in rows} == {record["id"] for record in RECORDS} and not after.dead_letters
    assert after.counts["merge"]["kept"] == len(RECORDS) - 1
    if before.layout.keep_text:
        assert {key: row["text"] for (key, _), row in rows.items()} == {one["id"]: one["text"] for one in RECORDS}


SETTINGS = {"parquet": PARQUET, "other vectors": {**OTHER, **STORED}, "chunks": {"on_long": "chunk", "max_tokens": 5}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_retry_needs_no_flag_but_the_output(tmp_path, settings):
    before = make_table(tmp_path, **settings)
    after = retry(tmp_path / "table")
    assert_completed(tmp_path, before, after, str(tmp_path / "table"))


def test_a_retry_of_a_database_needs_no_flag_either(tmp_path):
    output = f"duckdb://{tmp_path}/v.duckdb/notes"
    before = make_table(tmp_path, output=output, normalize=True, **STORED)
    assert_completed(tmp_path, before, retry(output), output)


def test_the_same_command_with_the_flag_retries_too(tmp_path):
    before = make_table(tmp_path, **PARQUET)
    config = make_config(tmp_path, retry_dead_letters=True, **PARQUET)
    after = build_table(config)
    assert after is not None
    assert_completed(tmp_path, before, after, str(tmp_path / "table"))


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"preprocessor"}))  # the fingerprint identifies it
def test_a_flag_that_the_table_contradicts_is_refused(tmp_path, name):
    make_table(tmp_path, max_tokens=50, on_long="chunk", chunk_overlap=1, **STORED)
    given = {name: OTHER[name]}
    if name == "chunk_overlap":
        given["on_long"] = "chunk"
    with pytest.raises(ConfigError, match=f"--{name}=.* contradicts .*, which was made with --{name}="):
        retry(tmp_path / "table", **given)


@pytest.mark.parametrize(
    "given", [{"output_format": "parquet"}, {"keep_fields": "month"}, {"dead_letter_text": "hash"}]
)
def test_a_form_that_the_table_does_not_have_is_refused(tmp_path, given):
    make_table(tmp_path, **STORED)
    (name,) = given
    with pytest.raises(
        ConfigError, match=f"--retry_dead_letters: --{name}=.* contradicts .*; leave it out, or make all"
    ):
        retry(tmp_path / "table", **given)


def test_another_encoder_is_refused_and_the_same_one_elsewhere_is_not(tmp_path, monkeypatch):
    before = make_table(tmp_path)
    with pytest.raises(ConfigError, match="was made with other settings"):
        retry(tmp_path / "table", encoder=str(Path(ENCODER).parent / "bert_v1000"))
    (tmp_path / "moved").symlink_to(ENCODER)
    assert_completed(
        tmp_path, before, retry(tmp_path / "table", encoder=str(tmp_path / "moved")), str(tmp_path / "table")
    )


def test_what_fails_again_keeps_its_text(tmp_path):
    make_table(tmp_path, **PARQUET)
    with failing(BAD):
        after = retry(tmp_path / "table")
    assert after.dead_letters == {"encoder_error": 1}
    assert [dead_letter["text"] for dead_letter in read_dead_letters(tmp_path / "table")] == [BAD]
    assert not retry(tmp_path / "table").dead_letters


def test_a_retry_writes_what_a_whole_run_would(tmp_path):
    make_table(tmp_path, **PARQUET)
    retry(tmp_path / "table")
    rows, expected = read_rows(str(tmp_path / "table")), tmp_path / "expected"
    write_jsonl(expected / "corpus.jsonl", RECORDS)
    fresh, _ = embed_records(expected, RECORDS, **PARQUET)
    assert set(rows) == set(fresh)
    for key, row in rows.items():
        np.testing.assert_allclose(row["embedding"], fresh[key]["embedding"], atol=2e-5)
        assert {name: row[name] for name in ("year", "text")} == {name: fresh[key][name] for name in ("year", "text")}


def test_texts_that_were_too_long_are_embedded_by_the_command_that_the_error_spells(tmp_path):
    write_jsonl(tmp_path / "a corpus.jsonl", RECORDS)
    settings = {"input": str(tmp_path / "a corpus.jsonl"), "on_long": "reject", "max_tokens": 7, **STORED}
    before = build_table(make_config(tmp_path, max_dead_fraction=1.0, **settings))
    assert before is not None and before.dead_letters["too_long"] > 1
    with pytest.raises(ConfigError, match=r"fail again, because .* was made with --on_long=reject") as caught:
        retry(tmp_path / "table", on_long="truncate")
    words = shlex.split(str(caught.value).partition("make all rows of the table again: ")[2])
    assert words[:2] == ["embeam", "embed"]
    after = build_table(EmbedConfig.from_flat(dict(word[2:].split("=", 1) for word in words[2:])))
    assert after is not None and not after.dead_letters and after.rows == len(RECORDS)
    assert after.layout == before.layout


def test_a_spelled_command_repeats_what_may_hold_commas():
    settings = {"input": ["a/*.txt", "{b,c}.txt"], "exclude": ["*.md", "{d,e}"], "keep_fields": ["year", "lang"]}
    words = shlex.split(spell_command(settings, {"output": "my table"}))
    assert words[2:] == [
        *("--input=a/*.txt", "--input={b,c}.txt", "--exclude=*.md", "--exclude={d,e}"),
        *("--keep_fields=year,lang", "--output=my table"),
    ]
