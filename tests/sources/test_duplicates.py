"""Duplicate ids: the lowest place wins, with both back ends, in memory and in worker processes."""

import json
import tracemalloc
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from pipeline import partitions
from pipeline.errors import ConfigError
from pipeline.read_config import ReadConfig
from pipeline.reuse.compare_by_id import CompareById
from pipeline.reuse.decide import ReusePolicy
from pipeline.reuse.live_table import DistributedReuse
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.writing import RowFormat
from pipeline.sources.duplicates import ENTRY, DuplicateCursor, find_duplicates
from pipeline.sources.planning import plan_input
from pipeline.sources.read import ReadDocuments, ReadSplit

# Each file's rows, and whether they are kept. The first row with id "b" is bad and is not considered.
FILES = {
    "a.jsonl": [("a", "first a", True), ("b", 5, None), ("a", "second a", False), ("c", "only c", True)],
    "b.jsonl": [("b", "first good b", True), ("a", "third a", False), ("d", "only d", True)],
    "c.jsonl": [(7, "number", True), ("7", "same as a string", False), ("b", "late b", False)],
}


@pytest.fixture
def corpus(tmp_path):
    for name, rows in FILES.items():
        lines = [json.dumps({"id": key, "text": text}) for key, text, _ in rows]
        (tmp_path / name).write_text("\n".join(lines))
    return tmp_path


def nothing_known(plan):
    """What a distributed run reuses of a table that is not there yet."""
    form = RowFormat("tfrecord", TableLayout("float32", 8))
    return DistributedReuse((), "", None, ReusePolicy(False, False), form, "", 1, plan.sources, "")


def run(corpus, distributed, options=None, **settings):
    config = ReadConfig(input=(str(corpus / "*.jsonl"),), id_field="id", split_bytes=60, **settings)
    plan = plan_input(config)
    assert len(plan.splits) > 3
    work_dir = corpus / "work"
    work_dir.mkdir(exist_ok=True)
    read = ReadDocuments(plan, config, work_dir="" if distributed else str(work_dir), distributed=distributed)

    def get_place(item):  # in here, so that it is pickled by value: workers cannot import this file
        return (item.origin.path.rpartition("/")[2], item.id, item.text)

    rows = [(name, str(key), text, wins) for name, rows in FILES.items() for key, text, wins in rows]
    with beam.Pipeline(runner=FnApiRunner(), options=options) as pipeline:
        documents, dead_letters, bundle_counts, _ = pipeline | read
        if distributed:
            compared = documents | CompareById(nothing_known(plan))
            documents = compared.documents
            dead_letters = (dead_letters, compared.dead_letters) | "Dead" >> beam.Flatten()
            bundle_counts = (bundle_counts, compared.bundle_counts) | "AllCounts" >> beam.Flatten()
        winners = [row[:3] for row in rows if row[3]]
        dropped = [row[:3] for row in rows if row[3] is False]
        assert_that(documents | "Places" >> beam.Map(get_place), equal_to(winners), "Winners")
        duplicates = (
            dead_letters | beam.Filter(lambda dead_letter: dead_letter.reason == "duplicate_id") | beam.Map(get_place)
        )
        assert_that(duplicates, equal_to(dropped), "Duplicates")
        others = dead_letters | beam.Filter(lambda x: x.reason != "duplicate_id") | "R" >> beam.Map(lambda x: x.reason)
        assert_that(others, equal_to(["wrong_type"]), "Others")
        assert_that(
            bundle_counts
            | beam.Filter(lambda counted: counted.stage == "read")
            | "Counts" >> beam.Map(lambda counted: json.loads(counted.counts).get("documents", 0))
            | beam.CombineGlobally(sum),
            equal_to([len(winners)]),
            "BundleCounts",
        )


@pytest.mark.parametrize("distributed", [False, True])
def test_the_lowest_place_wins(corpus, distributed):
    run(corpus, distributed)


@pytest.mark.parametrize("distributed", [False, True])
def test_replayed_bundles_change_nothing(corpus, distributed):
    run(corpus, distributed, PipelineOptions(direct_runner_bundle_repeat=1))


@pytest.mark.engine
def test_worker_processes(corpus):
    run(corpus, False, PipelineOptions(direct_running_mode="multi_processing", direct_num_workers=2))


def test_nothing_shuffles_locally(corpus):
    config = ReadConfig(input=(str(corpus / "*.jsonl"),), id_field="id")
    plan = plan_input(config)
    assert len(plan.splits) == 1  # one element, so that Create does not shuffle either
    pipeline = beam.Pipeline()
    pipeline | ReadDocuments(plan, config, work_dir="x")
    urns = [t.spec.urn for t in pipeline.to_runner_api().components.transforms.values()]
    assert "beam:transform:group_by_key:v1" not in urns


def test_an_id_field_needs_a_work_folder_or_a_shuffle(corpus):
    config = ReadConfig(input=(str(corpus / "*.jsonl"),), id_field="id")
    with pytest.raises(ConfigError, match="--id_field=id needs a work folder"):
        ReadDocuments(plan_input(config), config)


def test_a_limit_looks_no_further(corpus):
    config = ReadConfig(input=(str(corpus / "*.jsonl"),), id_field="id", limit=4)
    (split,) = plan_input(config).splits
    assert [key for _, key, _ in ReadSplit(config).list_ids(split)] == ["a", "a", "c", "b"]


PLACES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 3), st.integers(0, 50)), unique_by=lambda t: t[2:]
)


@pytest.mark.parametrize("part_bytes", [partitions.PART_BYTES, 40])
@given(places=PLACES, cut=st.integers(0, 50))
def test_duplicates_are_all_but_the_lowest(part_bytes, places, cut):
    table = np.array(places, dtype=ENTRY) if places else np.empty(0, ENTRY)
    by_id = {}
    for high, low, file, position in places:
        by_id.setdefault((high, low), []).append((file, position))
    expected = sorted(place for group in by_id.values() for place in sorted(group)[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "PART_BYTES", part_bytes)
        assert find_duplicates([table[:cut], table[cut:]], len(table)).tolist() == expected


def test_memory_does_not_grow_with_the_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "PART_BYTES", 1 << 19)

    def peak(n: int) -> int:
        def read() -> Iterator[np.ndarray]:
            random = np.random.default_rng(1)
            for start in range(0, n, 10_000):
                block = np.zeros(10_000, ENTRY)
                block["high"] = random.integers(0, 1 << 63, len(block), np.uint64)
                block["position"] = np.arange(start, start + len(block))
                yield block

        tracemalloc.start()
        assert not len(find_duplicates(read(), n, str(tmp_path)))
        measured = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return measured

    few, many = peak(200_000), peak(800_000)
    assert many - few < 600_000  # bytes: less than one for each id more


@given(positions=st.sets(st.integers(0, 60)), start=st.integers(0, 60))
def test_a_cursor_finds_the_duplicates(positions, start):
    cursor = DuplicateCursor(np.array(sorted(positions), "<u8"))
    assert [p for p in range(start, 61) if cursor.drops(p)] == sorted(p for p in positions if p >= start)
