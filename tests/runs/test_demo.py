"""The demo's corpus and the configuration files that are shipped, as a user runs them."""

import contextlib
import io
import re

import pytest

import pipeline
from pipeline.cli import main as cli
from pipeline.cli.flags import check_beam_flags, engine_flags, read_config_file
from pipeline.config import EmbedConfig
from pipeline.search.nearest import find_nearest
from tests.support.paths import ROOT

CORPUS = ROOT / "examples" / "demo" / "corpus"
CONFIGURATIONS = sorted((ROOT / "runners").glob("*.toml"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The table, and what the command said."""
    table = tmp_path_factory.mktemp("demo") / "demo"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(["embed", f"--input={CORPUS}/*", f"--output={table}", "--keep_text"])
    return table, said.getvalue()


def list_labels(summary):
    """What the lines of a summary are about: they begin with a label, or with a count and a reason."""
    return [re.match(r"(\d* *[a-z_]+)", line.strip())[1] for line in summary.splitlines()[1:]]


def test_the_demo_embeds_its_corpus_and_names_every_hostile_row(demo):
    table, said = demo
    manifest, _ = pipeline.open_table(str(table))
    reasons = {"invalid_utf8": 1, "malformed_json": 1, "missing_field": 1, "wrong_type": 1}
    assert manifest.dead_letters == reasons
    ids, vectors = pipeline.read_table(str(table))
    assert len(ids) == len(vectors) == manifest.rows > 400
    assert f"{manifest.rows:,} rows" in said
    assert all(f"1 {reason}" in said for reason in reasons)
    shown = (ROOT / "README.md").read_text().partition(" is published: ")[2].partition("\n$")[0]
    assert list_labels(shown) == list_labels(said.partition(" is published: ")[2])


def test_a_query_finds_the_very_text_first(demo, capsys):
    table, _ = demo
    row = next(pipeline.iter_table(str(table)))
    cli.main(["query", str(table), row["text"], "--top=2"])
    first = capsys.readouterr().out.splitlines()[1]
    assert first.split()[:2] == ["1.000", row["id"]]


@pytest.mark.parametrize(
    ("query", "about"),
    [
        ("looking at the heavens with an optical instrument", ["telescope"] * 3),
        ("insects visiting blossoms", ["bees", "Ladybird", "weevils"]),
        ("a ruined dessert", ["cheesecake", "sauce", "soufflé"]),
    ],
)
def test_the_demo_finds_what_is_meant_where_no_word_is_shared(demo, query, about):
    assert f'query build/demo "{query}" --top=3' in (ROOT / "Makefile").read_text()
    hits = find_nearest(str(demo[0]), query, top=3)
    for hit, word in zip(hits, about, strict=True):
        assert word in hit.text
        shared = set(re.findall(r"[a-z]+", query)) & set(re.findall(r"[a-z]+", hit.text.lower()))
        assert shared <= {"a", "an", "at", "the", "that", "with"}, hit.text


def test_every_shipped_configuration_is_understood():
    assert CONFIGURATIONS
    for file in CONFIGURATIONS:
        settings, engine = read_config_file(str(file))
        assert settings or engine
        EmbedConfig.from_flat(settings)
        engine.pop("runner", "")
        check_beam_flags(engine_flags(engine), [])


@pytest.mark.engine
def test_every_shipped_configuration_runs(tmp_path):
    for file in CONFIGURATIONS:
        table = tmp_path / file.stem
        cli.main(["embed", f"--config={file}", f"--input={CORPUS}/*", f"--output={table}", "--split_bytes=20000"])
        assert len(pipeline.read_table(str(table))[0]) > 400
