"""`embeam plan`: it prints what the following run does, and changes nothing."""

import dataclasses
import json

import pytest

from pipeline.encoders.architecture import text_flops
from pipeline.errors import RunError
from pipeline.records import Document
from pipeline.run.dry_run import ThinnedSample, make_dry_run
from pipeline.run.estimate import measure_texts, scale_up
from pipeline.run.resolve import resolve
from pipeline.tables.lock import TableLock
from pipeline.tables.manifest import open_table
from tests.support.corpora import some_texts, write_jsonl
from tests.support.processes import assert_one_line
from tests.support.runs import embed_records, make_config
from tests.support.tables import hash_folder

REUSED = ("documents", "new", "changed", "updated", "unchanged", "reused", "same_text")
MERGED = ("deleted", "stale", "kept", "lost")


def make_records(n=60, start=0):
    texts = some_texts(n, seed=start + 1, words=(1, 14))
    return [{"id": f"d{start + i}", "text": text, "year": i} for i, text in enumerate(texts)]


def plan(folder, **settings):
    return make_dry_run(make_config(folder, **settings))


def assert_run_matches(dry_run, manifest):
    """Every count of a dry run against those of the run."""
    counts = manifest.counts
    reuse, merge, batch = (counts.get(stage, {}) for stage in ("reuse", "merge", "batch"))
    assert {name: getattr(dry_run, name) for name in REUSED} == {name: reuse.get(name, 0) for name in REUSED}
    assert {name: getattr(dry_run, name) for name in MERGED} == {name: merge.get(name, 0) for name in MERGED}
    assert dry_run.to_encode == reuse.get("encoded", 0)
    assert dry_run.dead_letters == {reason: n for reason, n in manifest.dead_letters.items() if n}
    assert dry_run.skipped_empty == counts["read"]["skipped_empty"]
    assert dry_run.tokens == counts["preprocess"].get("tokens", 0)
    assert dry_run.cut_tokens == counts["preprocess"].get("truncated_tokens", 0)
    assert dry_run.chunks == counts["preprocess"].get("chunks", 0)
    assert dry_run.rows == manifest.rows
    stored = sum(file.n_bytes for file in (*manifest.files, *manifest.index_files))
    assert dry_run.bytes == pytest.approx(stored, rel=0.15, abs=600)
    if dry_run.to_encode > 20:  # a run encodes a few spot checks besides
        assert dry_run.padding == pytest.approx(1 - batch["used_tokens"] / batch["padded_tokens"], abs=0.15)
    assert not dry_run.is_sampled and not dry_run.stops


def test_a_first_run_does_what_was_planned(tmp_path):
    records = make_records()
    records += [
        {"id": "equal", "text": records[0]["text"]},
        {"id": "blank", "text": " "},
        records[3],
        {"text": "no id"},
    ]
    settings = {"max_tokens": 12, "on_empty": "skip"}
    write_jsonl(tmp_path / "corpus.jsonl", records)
    dry_run = plan(tmp_path, **settings)
    assert not (tmp_path / "table").exists()
    _, manifest = embed_records(tmp_path, records, **settings)
    assert dry_run.same_text == 1 and dry_run.dead_letters == {"duplicate_id": 1, "missing_field": 1}
    assert dry_run.skipped_empty == 1 and dry_run.cut_tokens and dry_run.speed == "rough" and dry_run.seconds
    assert_run_matches(dry_run, manifest)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"keep_fields": "year:int"}, marks=pytest.mark.exhaustive),
        {"on_long": "chunk", "max_tokens": 8, "keep_text": True, "keep_fields": "year:int"},
        pytest.param(
            {"output_format": "parquet", "on_long": "average", "max_tokens": 8, "keep_fields": "year:int"},
            marks=pytest.mark.exhaustive,
        ),
        {"compression": "gzip", "dtype": "int8", "on_long": "reject", "max_tokens": 14, "keep_fields": "year:int"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_later_run_does_what_was_planned(tmp_path, settings):
    settings = settings | {"max_delete_fraction": 0.5, "max_dead_fraction": 1, "on_empty": "reject"}
    records = make_records()
    records[:6] = [record | {"text": record["text"][:6]} for record in records[:6]]  # short enough for any rule
    embed_records(tmp_path, records, **settings)
    records[0]["text"] = "another text"
    records[1]["text"] = "another text"  # encoded once
    records[2]["year"] = -1  # another kept field
    records[3]["text"] = records[4]["text"]  # a vector that can be reused
    records[5]["text"] = ""  # its row stays as it was
    records = [*records[:-9], *make_records(7, start=100), {"id": "d59", "text": 5}]
    write_jsonl(tmp_path / "corpus.jsonl", records)
    before = hash_folder(tmp_path / "table")
    with TableLock(str(tmp_path / "table"), "another run"):
        locked = hash_folder(tmp_path / "table")
        dry_run = plan(tmp_path, **settings)
        assert hash_folder(tmp_path / "table") == locked
    assert {name: value for name, value in hash_folder(tmp_path / "table").items() if name != "lock"} == {
        name: value for name, value in before.items() if name != "lock"
    }
    assert dry_run.changed >= 3 and dry_run.updated == 1 and dry_run.reused >= 2 and dry_run.same_text >= 1
    assert dry_run.deleted and dry_run.stale
    _, manifest = embed_records(tmp_path, records, **settings)
    assert_run_matches(dry_run, manifest)


def test_another_model_means_everything(tmp_path):
    records = make_records()
    embed_records(tmp_path, records)
    changed = {"max_tokens": 9}
    dry_run = plan(tmp_path, **changed)
    assert dry_run.to_encode == dry_run.remade == 60 and dry_run.unchanged == 0 and not dry_run.stops
    (change,) = dry_run.changes
    assert change.startswith("preprocessing.max_tokens ") and change.endswith(" -> 9")
    stopped = plan(tmp_path, **changed, on_model_change="stop")
    assert "--on_model_change=stop" in stopped.stops[0]
    assert "--deletes=keep" in plan(tmp_path, **changed, deletes="keep").stops[0]
    _, manifest = embed_records(tmp_path, records, **changed)
    assert_run_matches(dry_run, manifest)


def test_what_would_stop_the_run_is_said(tmp_path):
    records = make_records()
    embed_records(tmp_path, records)
    write_jsonl(tmp_path / "corpus.jsonl", records[:30])
    dry_run = plan(tmp_path)
    assert dry_run.deleted == 30
    with pytest.raises(RunError) as error:
        embed_records(tmp_path, records[:30])
    assert dry_run.stops == [str(error.value)] and "--max_delete_fraction" in dry_run.stops[0]
    kept = plan(tmp_path, deletes="keep")
    assert (kept.deleted, kept.kept, kept.stops) == (0, 30, [])
    assert "--limit=5" in plan(tmp_path, limit=5, max_delete_fraction=1).stops[0]
    write_jsonl(tmp_path / "corpus.jsonl", [*records[:30], *({"id": f"x{i}"} for i in range(30))])
    assert any("--max_dead_fraction" in message for message in plan(tmp_path, deletes="keep").stops)


def test_vectors_of_a_run_that_failed_are_counted_as_reused(tmp_path):
    records = make_records()
    embed_records(tmp_path, records)
    replaced = [record | {"id": f"new{i}"} for i, record in enumerate(make_records(60, start=500))]
    with pytest.raises(RunError):
        embed_records(tmp_path, replaced)
    dry_run = plan(tmp_path, max_delete_fraction=1)
    assert dry_run.reused == dry_run.new == 60 and dry_run.to_encode == 0
    _, manifest = embed_records(tmp_path, replaced, max_delete_fraction=1)
    assert_run_matches(dry_run, manifest)


def test_dead_letters_that_are_tried_again(tmp_path):
    records = make_records(20)
    embed_records(tmp_path, records, on_long="reject", max_tokens=7, max_dead_fraction=1)
    settings = {"on_long": "reject", "max_tokens": 7, "retry_dead_letters": True}
    write_jsonl(tmp_path / "corpus.jsonl", records)
    dry_run = plan(tmp_path, **settings)
    assert dry_run.documents and dry_run.kept and dry_run.dead_letters == {"too_long": dry_run.documents}
    _, manifest = embed_records(tmp_path, records, **settings)
    assert_run_matches(dry_run, manifest)


# The parts.


def test_a_sample_keeps_every_kth_document():
    sample = ThinnedSample(most=10)
    for i in range(100):
        sample.add(Document(str(i), "x"))
    assert [document.id for document in sample.documents] == [str(i) for i in range(0, 100, 16)]
    assert sample.n == 100 and not sample.is_whole
    large = ThinnedSample(most_characters=100)
    for i in range(64):
        large.add(Document(str(i), "x" * 30))
    assert 1 <= len(large.documents) <= 3


def test_a_sample_is_scaled_up(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.dry_run.ThinnedSample.__init__.__defaults__", (100, 16_000_000))
    records = make_records(1000)
    write_jsonl(tmp_path / "corpus.jsonl", records)
    dry_run = plan(tmp_path, max_tokens=10)
    assert dry_run.is_sampled and dry_run.to_encode == len({record["text"] for record in records})
    _, manifest = embed_records(tmp_path, records, max_tokens=10)
    counts = manifest.counts
    assert dry_run.tokens == pytest.approx(counts["preprocess"]["tokens"], rel=0.15)
    assert dry_run.cut_tokens == pytest.approx(counts["preprocess"]["truncated_tokens"], rel=0.4)
    assert dry_run.padding == pytest.approx(
        1 - counts["batch"]["used_tokens"] / counts["batch"]["padded_tokens"], abs=0.08
    )
    assert dry_run.rows == manifest.rows == 1000


def test_time_is_measured_or_estimated_or_unknown(tmp_path, monkeypatch):
    records = make_records(30)
    _, manifest = embed_records(tmp_path, records)
    resolved = resolve(make_config(tmp_path))
    form = resolved.form
    documents = [Document(record["id"], record["text"]) for record in records]
    measured = measure_texts(resolved.spec, form, documents)
    assert scale_up(resolved.store, resolved.spec, measured, 30).speed == "rough"
    monkeypatch.setattr("pipeline.run.estimate.LEAST_TOKENS", 100)
    scaled = scale_up(resolved.store, resolved.spec, measured, 30)
    assert (scaled.speed, scaled.source) == ("measured", manifest.snapshot)
    rate = manifest.counts["batch"]["padded_tokens"] / manifest.counts["encode"]["encode_seconds"]
    assert scaled.seconds == pytest.approx(scaled.padded / rate)
    assert scale_up(resolved.store, resolved.spec, measured, 3000).seconds > 50 * scaled.seconds
    assert scale_up(resolved.store, resolved.spec, measured, 0).speed == "idle"
    unknown = dataclasses.replace(resolved.spec, encoder=dataclasses.replace(resolved.spec.encoder, architecture=None))
    unknown = dataclasses.replace(unknown, identity={**unknown.identity, "encoder": "another"})
    scaled = scale_up(resolved.store, unknown, measure_texts(unknown, form, documents), 30)
    assert (scaled.seconds, scaled.speed) == (None, "unknown")


def test_flops_are_those_of_the_layers():
    from pipeline.encoders.architecture import Architecture

    a = Architecture(layers=2, width=6, heads=3, head_size=2, feedforward=10, vocabulary=9, positions=8)
    n, d, f, h = 5, 6, 10, 3
    dense = 4 * 2 * d * d + 3 * 2 * d * f  # query, key, value, output; up, gate, down
    attention = 2 * 2 * n * d + 2 * 2 * h * h * n  # scores, context; two mixes of the heads
    assert text_flops(a, n) == 2 * n * (dense + attention) + 2 * d * d


# The verb.


def test_the_verb_takes_the_flags_of_embed(tmp_path, call):
    records = make_records()
    embed_records(tmp_path, records)
    write_jsonl(tmp_path / "corpus.jsonl", [*records[:30], *make_records(2, start=300)])
    config = make_config(tmp_path)
    flags = [f"--output={config.write.output}", f"--encoder={config.encoder.encoder}", "--id_field=id"]
    (tmp_path / "settings.toml").write_text('on_empty = "embed"\nrunner = "local"\ndirect_num_workers = 2\n')
    flags += [f"--input={config.read.input[0]}", f"--config={tmp_path / 'settings.toml'}"]
    out = call("plan", *flags).out
    assert "32 read: 2 new, 0 changed" in out and "30 deleted" in out and "a run stops" in out
    assert "2 texts" in out and "nothing was encoded or written" in out
    values = json.loads(call("plan", *flags, "--json").out)
    assert values == dataclasses.asdict(plan(tmp_path)) | {"seconds": values["seconds"]}
    assert (values["new"], values["deleted"], values["unchanged"]) == (2, 30, 30)
    other_model = call("plan", *flags, "--normalize").out
    assert "everything is embedded again" in other_model and "30 remade" in other_model
    code, _, err = call("plan", *flags[1:])
    assert code == 2 and "--output is missing" in assert_one_line(err)
    assert open_table(str(tmp_path / "table"))[0].rows == 60
