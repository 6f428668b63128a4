"""Work on workers of its own: what crosses to them and back, what they are asked to have, and who gets how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.testing.util import assert_that, equal_to

from pipeline.coders import ElementGroupCoder
from pipeline.config import WorkerConfig
from pipeline.embed import build_pipeline
from pipeline.embedding_spec import GPU_BATCH_TOKENS, make_embedding_spec
from pipeline.encoders.spec import describe_encoder
from pipeline.engines.dedicated_workers import GROUP_BYTES, GROUP_ELEMENTS, GroupElements, ends_document, size_chunk
from pipeline.engines.presets import PRESETS, find_device, resource_hints, share_memory
from pipeline.errors import ConfigError
from pipeline.preprocess.batching import COMPILED_STEPS, bucket_lengths
from pipeline.records import Chunk, Document, ElementGroup
from pipeline.run.job import prepare_job
from pipeline.run.resolve import resolve
from tests.support.corpora import as_records, some_texts, write_jsonl
from tests.support.crossings import find_crossings
from tests.support.histories import run_joined
from tests.support.runs import make_config
from tests.support.shuffles import KeyCounter
from tests.support.staged_job import StagedJob


def make_chunks(document: Document, n: int) -> list[Chunk]:
    return [Chunk(document, "00" * 16, i, n, b"\1\0\0\0" * 4, 4, 2, 0) for i in range(n)]


def group_all(chunks: list[Chunk]) -> list[ElementGroup]:
    grouper = GroupElements(size_chunk, ends_document)
    grouper.start_bundle()
    groups = [group for chunk in chunks for group in grouper.process(chunk)]
    return [*groups, *(windowed.value for windowed in grouper.finish_bundle())]


def test_groups_have_a_few_hundred_chunks_and_lose_nothing():
    chunks = [chunk for i in range(1300) for chunk in make_chunks(Document(f"d{i}", "text"), 1)]
    groups = group_all(chunks)
    assert [len(group) for group in groups] == [GROUP_ELEMENTS, GROUP_ELEMENTS, 1300 - 2 * GROUP_ELEMENTS]
    assert [chunk for group in groups for chunk in group] == chunks


def test_a_group_ends_with_a_document():
    chunks = [chunk for i in range(200) for chunk in make_chunks(Document(f"d{i}", "text"), 7)]
    groups = group_all(chunks)
    assert len(groups) > 2
    assert all(group[0].number == 0 and ends_document(group[-1]) for group in groups)


def test_large_texts_make_small_groups():
    groups = group_all([chunk for i in range(40) for chunk in make_chunks(Document(f"d{i}", "x" * 1_000_000), 2)])
    assert len(groups) > 5
    assert all(sum(len(chunk.document.text) for chunk in group[::2]) <= GROUP_BYTES + 1_000_000 for group in groups)


def test_a_text_crosses_once_however_many_chunks_it_has():
    one, many = (
        ElementGroupCoder().encode(ElementGroup(make_chunks(Document("d", "x" * 100_000), n))) for n in (1, 40)
    )
    assert len(many) < len(one) + 40 * 200
    assert ElementGroupCoder().decode(many) == ElementGroup(make_chunks(Document("d", "x" * 100_000), 40))


def test_groups_cross_a_pipeline():
    group = ElementGroup(make_chunks(Document("d", "text"), 3))
    with beam.Pipeline(runner="FnApiRunner") as p:
        crossed = p | beam.Create([0]) | beam.Map(lambda _: group).with_output_types(ElementGroup) | beam.Reshuffle()
        assert_that(
            crossed | beam.Map(lambda found: (type(found).__name__, len(found))), equal_to([("ElementGroup", 3)])
        )


# --- the graph for distributed engines -------------------------------------------------------------------------------


def build_distributed(folder: Path, **settings: Any) -> StagedJob:
    """The graph of a second run, which has a live table to look at."""
    write_jsonl(folder / "corpus.jsonl", as_records(some_texts(20)))
    resolved = resolve(make_config(folder, split_bytes=500, **settings))
    job = prepare_job(resolved, "now", 0.0, distributed=True)
    p = beam.Pipeline(runner="FnApiRunner")
    build_pipeline(p, job)
    embedded = beam.transforms.environments.EmbeddedPythonEnvironment.default()
    return StagedJob("", p.to_runner_api(default_environment=embedded))


@pytest.mark.parametrize("on_long", ["truncate", "average"])
def test_the_encoder_alone_asks_for_a_gpu(on_long, tmp_path):
    job = build_distributed(tmp_path, accelerator="nvidia-l4", encoder_memory="24GB", on_long=on_long)
    expected = {
        "accelerator": "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver",
        "min_ram_bytes": str(24 * 10**9),
    }
    hints, own = job.hints(), job.names("Embed/Workers/")
    assert all(hints[name] == expected for name in own)
    names = "\n".join(own)
    steps = ["Unpack", "CollectBatches", "BeamML_RunInference", "FinishVectors", "WriteJournal", "GroupRows"]
    assert all(step in names for step in steps), names
    others = job.names() - own
    assert {name.split("/")[0] for name in others} >= {"Read", "Preprocess", "WriteRows"}
    assert all(hints[name] == {} for name in others)


def test_without_an_accelerator_nothing_is_asked_for(tmp_path):
    hints = build_distributed(tmp_path).hints()
    assert hints and all(wanted == {} for wanted in hints.values())


def test_fusion_breaks_on_both_sides_of_the_encoder_and_nowhere_inside(tmp_path):
    shuffles = build_distributed(tmp_path, accelerator="nvidia-l4").shuffles()
    in_embed = {name for name in shuffles if name.startswith("Embed/")}
    assert {name.split("/")[1] for name in in_embed} == {"ToDedicatedWorkers", "FromDedicatedWorkers"}
    for name in in_embed:
        assert any("ElementGroupCoder" in coder for coder in shuffles[name]), name


def test_nothing_comes_together_as_a_whole_but_counts_and_names_of_files(tmp_path):
    """Only the commit takes more: all that the run has made."""
    proto = build_distributed(tmp_path, id_field="id").proto
    whole = {
        "/".join(producer.split("/")[:2]).partition(".")[0]
        for producer, kind in find_crossings(proto)
        if kind == "side input"
    }
    assert whole == {
        "Reuse/DecideById",  # incomplete files
        "Reuse/CopyLiveRows",  # for a file of the live table: which of its rows go, and which have moved
        "Embed/Workers",  # spot checks, log N of N documents
        "Reuse/AnswerByContent",  # as many samples
        "Shards",
        "BundleCounts",
        "Read/BadFiles",  # names of input files that cannot be read
    }


def test_no_shuffle_gathers_its_elements_under_one_key(tmp_path, monkeypatch):
    records = as_records(some_texts(200, seed=3))
    write_jsonl(tmp_path / "corpus.jsonl", records)
    run_joined(tmp_path, split_bytes=500, keep_fields="")
    write_jsonl(
        tmp_path / "corpus.jsonl",
        [*records[15:], *({"id": f"new {i}", "text": text} for i, text in enumerate(some_texts(50, seed=4)))],
    )
    monkeypatch.setattr("pipeline.engines.dedicated_workers.GROUP_ELEMENTS", 2)
    keys = KeyCounter(monkeypatch)
    run_joined(tmp_path, split_bytes=500, keep_fields="")
    shares = keys.shares(least=20)
    names = "\n".join(shares)
    for step in (
        "Read/Splits",
        "GroupByContent",
        "ToDedicatedWorkers",
        "FromDedicatedWorkers",
        "GroupById",
    ):
        assert step in names
    assert max(shares.values()) < 0.3, shares


def test_the_watch_sees_a_funnel(tmp_path, monkeypatch):
    keys = KeyCounter(monkeypatch)
    with beam.Pipeline(runner=fn_runner.FnApiRunner()) as p:
        _ = p | beam.Create(range(100)) | beam.Map(lambda i: ("all", i)) | "Funnel" >> beam.GroupByKey()
    assert keys.shares(least=100)["Funnel"] == 1.0


# --- what workers are asked for and given ----------------------------------------------------------------------------


def test_presets_are_whole():
    for name, preset in PRESETS.items():
        assert WorkerConfig(accelerator=name).accelerator == name
        assert preset.batch_tokens and preset.threads and preset.half_precision in ("bfloat16", "float16")


def test_a_plan_is_made_for_the_workers_and_not_for_this_machine():
    from pipeline.config import EmbedConfig
    from tests.support.paths import ENCODER

    flat = {"encoder": ENCODER, "precision": "auto", "accelerator": "nvidia-tesla-t4"}
    config = EmbedConfig.from_flat(flat)
    plan = make_embedding_spec(config, find_device(config.workers))
    assert plan.buckets.budget == PRESETS["nvidia-tesla-t4"].batch_tokens != GPU_BATCH_TOKENS
    assert plan.buckets.lengths == tuple(bucket_lengths(plan.buckets.lengths[-1], COMPILED_STEPS))
    assert plan.encoder.precision == "float16" and plan.encoder.native
    assert describe_encoder(config.encoder)[0].precision != "float16"


def test_processes_share_a_gpu():
    config = WorkerConfig(accelerator="nvidia-l4", encoder_processes=4)
    assert resource_hints(config)["accelerator"].endswith(";use_nvidia_mps")
    assert 4 * share_memory(config) < 24 * 1024
    assert share_memory(WorkerConfig(accelerator="nvidia-l4")) == 0
    device = find_device(config)
    assert device is not None and device.batch_tokens == PRESETS["nvidia-l4"].batch_tokens // 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator": "l4"}, "--accelerator=l4 is not one of nvidia-l4"),
        ({"encoder_processes": 2}, "name it with --accelerator"),
        ({"encoder_processes": 0}, "--encoder_processes=0 must be at least 1"),
        ({"encoder_threads": -1}, "--encoder_threads=-1 is negative"),
        ({"provisioning": "spot"}, "name one with --accelerator"),
        ({"encoder_memory": "lots"}, "write it as 32GB"),
    ],
)
def test_workers_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        WorkerConfig(**settings)
