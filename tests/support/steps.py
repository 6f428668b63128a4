"""Runs without Beam and without an encoder: the steps of either back end one after another, in milliseconds.

What is decided about documents, rows and files is decided by the product's own code. A text's vector is drawn from its
hash, and documents are given instead of read. (A whole run spends nine tenths of its time on Beam's graph, so a cheaper
encoder alone would save nothing.)
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import TaggedOutput
from apache_beam.utils.windowed_value import WindowedValue

from pipeline.config import EmbedConfig, ReindexConfig, VectorConfig, WriteConfig
from pipeline.engines.runner import make_runner
from pipeline.files import make_folder
from pipeline.preprocess.chunking import hash_content
from pipeline.records import BundleCounts, Chunk, DeadLetter, Document, Origin, Row, SkippedFile
from pipeline.reuse import answer_requests, compare_by_id, copy, decide_by_content, decide_by_id, live_table, wire
from pipeline.reuse.journal import journal_folder, list_folder, write_segment
from pipeline.reuse.local import LookUpDocuments
from pipeline.run.resolve import prepare_distributed_reuse, prepare_local_reuse
from pipeline.sinks.layout import TableLayout
from pipeline.sinks.writing import DeadLetterFormat, RowFormat, Shard, ShardWriter
from pipeline.tables.attempts import abandon_attempt, sweep_dead_attempts
from pipeline.tables.bigquery import BigqueryCommit
from pipeline.tables.commit import Commit
from pipeline.tables.folder import FolderStore
from pipeline.tables.manifest import Manifest, attempts_folder, snapshot_folder
from pipeline.tables.publish import Publication, build_manifest, make_live, name_snapshot, place_files
from pipeline.tables.store import CommitPlan, Committer, Results, ReusePlan, Store
from pipeline.tables.stores import open_store
from pipeline.vectors.finishing import VectorRule, finish_chunks
from tests.support.tables import Rows, read_rows

DIMENSION = 8
CHUNK_WORDS = 3
LAYOUT = TableLayout("float32", DIMENSION)
WRITTEN_ROWS = 4  # at a time: small tables too should have several files


def draw_vector(text: str, model: str = "one") -> np.ndarray:
    """The float32 `[DIMENSION]` of a text, another one for every text and model."""
    seed = hashlib.blake2b(f"{model}:{text}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(DIMENSION).astype(np.float32)


def make_document(name: str, text: str, file: str = "a.jsonl", kept: bytes = b"") -> Document:
    return Document(name, text, kept=kept, origin=Origin(file, 0, "byte"))


def make_dead_letter(file: str, name: str | None = None, reason: str = "malformed_json") -> DeadLetter:
    """The dead letter of a record that could not be read; without a name its document is unknown."""
    return DeadLetter("read", reason, "it is broken", Origin(file, 0, "byte"), name)


class Outcome(NamedTuple):
    """What a run has done: the table's rows, its manifest, its encoded texts, and those of spot checks; sorted."""

    rows: Rows
    manifest: Manifest
    encoded: list[str]
    spot_checks: list[str]

    def count(self, *names: str) -> dict[str, int]:
        """Counts of documents and rows by name; what was not counted is 0."""
        counts = self.manifest.counts["merge"] | self.manifest.counts["reuse"]
        return {name: int(counts.get(name, 0)) for name in names}


@dataclass
class SteppedTable:
    """A table, and runs over documents.

    Attributes:
      output: as `--output`.
      joins: by the back end of distributed engines.
      layout: of the rows.
      output_format: of the files.
      compression: of the files.
      shard_bytes: size at which a new file is started.
      work_dir: as `--work_dir`, for a table of BigQuery.
      model: whose vectors are wanted; another name is another fingerprint.
      prefix: put before every text.
      encoder: text and model to float32 `[DIMENSION]`; a ValueError is a dead letter, anything else ends the run.
      encoded: the texts that the last run has encoded, also of one that failed.
    """

    output: str
    joins: bool = False
    layout: TableLayout = LAYOUT
    output_format: str = "tfrecord"
    compression: str = "none"
    shard_bytes: int = 1 << 20
    work_dir: str = ""
    model: str = "one"
    prefix: str = ""
    encoder: Callable[[str, str], np.ndarray] = draw_vector
    encoded: list[str] = field(default_factory=list)

    def run(
        self,
        documents: Iterable[Document],
        dead_letters: Sequence[DeadLetter] = (),
        fails: Collection[str] = (),
        bundles: int = 1,
        dies: bool = False,
        max_dead_fraction: float = 1.0,
        bad_files: Sequence[str] = (),
        **reindex: Any,
    ) -> Outcome:
        """One run from documents to a published table.

        Args:
          documents: those that could be read.
          dead_letters: of those that could not.
          fails: texts on which the encoder fails.
          bundles: in which documents are looked up.
          dies: whether the run leaves everything as it is when it fails, as a process does that is killed.
          max_dead_fraction: as the flag.
          bad_files: names of input files that could not be read to their ends.
          reindex: fields of `ReindexConfig`; deletions stop nothing by default.
        """
        documents = list(documents)
        store, name = open_store(self.output, self.work_dir), name_snapshot()
        config = EmbedConfig(
            reindex=ReindexConfig(**{"max_delete_fraction": 1.0, **reindex}),
            write=WriteConfig(shard_bytes=self.shard_bytes),
        )
        # No fsync: tests throw their files away.
        with tempfile.TemporaryDirectory() as scratch, mock.patch("os.fsync"):
            make_folder(store.work)
            sweep_dead_attempts(store.work)
            live, version = store.read_live()
            bad = [SkippedFile(name, "truncated_file", f"{name} is cut off") for name in bad_files]
            origins = [document.origin for document in documents] + [letter.origin for letter in dead_letters]
            inputs = sorted({origin.path for origin in origins} | set(bad_files))
            plan = self._plan(store, live, version, name, config, scratch, max_dead_fraction, inputs)
            attempt = Attempt(self, plan, fails, bad)
            self.encoded = attempt.encoded
            read = BundleCounts.of("read", {"records": len(documents) + len(dead_letters)})
            try:
                found = (
                    attempt.run_distributed(documents, dead_letters)
                    if self.joins
                    else attempt.run_local(documents, dead_letters, bundles)
                )
                commit(store.committer(plan), found._replace(bundle_counts=[read, *found.bundle_counts]))
            except BaseException:
                if not dies:
                    abandon_attempt(store.work, name, plan.publication.previous)
                raise
        manifest = store.read_live().manifest
        assert manifest is not None and manifest.snapshot == name
        return Outcome(read_rows(self.output), manifest, sorted(attempt.encoded), sorted(attempt.spot_checks))

    def _plan(
        self,
        store: Store,
        live: Manifest | None,
        version: str,
        name: str,
        config: EmbedConfig,
        scratch: str,
        max_dead_fraction: float,
        inputs: Sequence[str],
    ) -> CommitPlan:
        files = SimpleNamespace(output_format=self.output_format, compression=self.compression)
        form = store.choose_form(SimpleNamespace(write=files), self.layout)
        fingerprint = hashlib.sha256(self.model.encode()).hexdigest()
        wanted: Any = SimpleNamespace(fingerprint=fingerprint, split=SimpleNamespace(prefix=self.prefix))
        reuse: ReusePlan
        if self.joins:
            folder = attempts_folder(store.work, name)
            reuse = prepare_distributed_reuse(store, live, wanted, form, folder, inputs, config)
        else:
            reuse = prepare_local_reuse(store, live, wanted, form, scratch, inputs, config)
        facts = {"file_format": form.name, "compression": form.compression, "layout": form.layout}
        facts |= {"embeam": "0", "fingerprint": fingerprint, "identity": {"model": self.model}, "settings": {}}
        previous = live.snapshot if live else ""
        publication = Publication(
            store.work, name, previous, version, time.time(), facts, max_dead_fraction, config.reindex
        )
        return CommitPlan(publication, reuse, form, self.shard_bytes, DeadLetterFormat("full"))


class Attempt:
    """One run: its documents go through the steps of a back end.

    Attributes:
      encoded: texts that were encoded, of spot checks not.
      spot_checks: those of spot checks.
    """

    def __init__(
        self, table: SteppedTable, plan: CommitPlan, fails: Collection[str], bad_files: Sequence[SkippedFile]
    ) -> None:
        self.encoded: list[str] = []
        self.spot_checks: list[str] = []
        self._table, self._plan, self._fails, self._bad_files = table, plan, fails, bad_files
        publication = plan.publication
        self._folder = attempts_folder(publication.table, publication.name)
        self._journal = journal_folder(publication.table, publication.facts["fingerprint"])
        for folder in (self._folder, self._journal):
            make_folder(folder)

    def run_local(self, documents: list[Document], dead_letters: Sequence[DeadLetter], n_bundles: int) -> Results:
        """The local back end: documents that are not encoded become notes."""
        found = Outputs()
        for numbers in np.array_split(np.arange(len(documents)), n_bundles):
            found.add_bundle(LookUpDocuments(self._plan.reuse.back_end), [documents[i] for i in numbers])
        rows, spot_checks, dead = self._encode(found["main"])
        dead_letters = [*dead_letters, *dead]
        bundle_counts = [*found["bundle_counts"], count_letters(dead_letters)]
        shards, bad_files = self._write(rows, dead_letters), self._bad_files
        return Results(shards, bundle_counts, spot_checks, notes=found["notes"], bad_files=bad_files)

    def run_distributed(self, documents: list[Document], dead_letters: Sequence[DeadLetter]) -> Results:
        """The back end of distributed engines: groups by id and by text, in the order of the graph."""
        reuse = self._plan.reuse.back_end
        numbers = range(len(reuse.files))
        packer = wire.DocumentPacker(reuse.inputs)
        compared = Outputs()
        live = flatten(live_table.list_live(i, reuse) for i in numbers)
        step = compare_by_id.CompareDocuments(reuse.policy, reuse.inputs, reuse.prefix)
        compared.add_bundle(step, group(((compare_by_id.key_by_id(one), packer.pack(one)) for one in documents), live))
        decided = Outputs()
        known = flatten(live_table.list_known(i, reuse) for i in numbers if reuse.policy.same_fingerprint)
        decided.add_bundle(
            decide_by_content.DecideTexts(reuse.inputs, reuse.keep_text),
            group(
                ((decide_by_content.key_by_content(one, reuse.prefix), packer.pack(one)) for one in compared["main"]),
                known,
                flatten(map(live_table.list_segment, list_folder(reuse.journal))),
                (decide_by_content.mark_unseen(*one) for one in compared["unseen"]),
            ),
        )
        encoded, spot_checks, dead = self._encode([*decided["main"], *compared["spot_checks"]])
        answered = Outputs()
        wanted = combine([*compared["wanted"], *decided["wanted"]], copy.CollectRows())
        reused = flatten(live_table.read_wanted(one, reuse) for one in wanted.items())
        answered.add_bundle(
            answer_requests.AnswerRequests(reuse.keep_text),
            group(
                map(answer_requests.key_vector, [*reused, *(row for row in encoded if row.shared)]),
                (answer_requests.key_dead_letter(letter) for letter in dead if letter.shared),
                compared["requests"],
                decided["requests"],
            ),
        )
        rows = [*encoded, *answered["main"]]
        dead_letters = [*dead_letters, *dead, *compared["dead_letters"], *answered["dead_letters"]]
        dropped = Outputs()
        incomplete = list(dict.fromkeys(flatten(map(decide_by_id.find_incomplete, dead_letters))))
        incomplete += [bad.file for bad in self._bad_files]
        marks = (map(decide_by_id.mark_new, rows), flatten(map(decide_by_id.mark_dead, dead_letters)))
        groups = group(compared["open_rows"], decided["moved"], *marks)
        dropped.add_bundle(decide_by_id.DecideRows(reuse.policy, reuse.inputs), groups, incomplete)
        copied = Outputs()
        sides = [
            {i: [values[i]] if i in values else [] for i in numbers}
            for values in (
                combine(dropped["main"], copy.CollectRows()),
                combine(compared["sources"], copy.CollectMoves()),
            )
        ]
        step = copy.CopyRows(reuse)
        if reuse.policy.same_fingerprint:
            copied.add_bundle(step, copy.group_files(reuse.files, reuse.shard_bytes), *sides)
        counts = flatten(outputs["bundle_counts"] for outputs in (compared, decided, dropped, copied))
        return Results(
            [*self._write(rows, dead_letters), *copied["main"]],
            [*counts, count_letters(dead_letters)],
            spot_checks,
            samples=answered["samples"],
            bad_files=self._bad_files,
        )

    def _encode(self, documents: Iterable[Document]) -> tuple[list[Row], list[Row], list[DeadLetter]]:
        """Rows, those of spot checks, and dead letters; every row goes into the journal at once."""
        layout = self._plan.form.layout
        rule = VectorRule(
            VectorConfig(dtype=layout.dtype, dimensions=layout.dimension),
            chunked=layout.chunked,
            tokens=layout.tokens,
            counts_tokens=layout.counts_tokens,
            keep_text=layout.keep_text,
        )
        rows, spot_checks, dead = [], [], []
        for document in documents:
            outputs = list(finish_chunks(list(self._encode_chunks(document)), rule))
            own = [output for output in outputs if isinstance(output, Row)]
            if document.is_spot_check:
                spot_checks += own
                continue
            rows += own
            dead += [output for output in outputs if isinstance(output, DeadLetter)]
            if own:
                write_segment(self._journal, [row._replace(id="", kept=b"", text=None, source="") for row in own])
        return rows, spot_checks, dead

    def _encode_chunks(self, document: Document) -> Iterator[tuple[Chunk, np.ndarray | None, str]]:
        (self.spot_checks if document.is_spot_check else self.encoded).append(document.text)
        layout, text = self._plan.form.layout, self._table.prefix + document.text
        words = text.split()
        step = CHUNK_WORDS if layout.chunked else len(words)
        parts = [words[i : i + step] for i in range(0, len(words), step)]
        content_hash = hash_content(text, document.pair)
        spans = [word.span() for word in re.finditer(r"\S+", text)]
        for i, part in enumerate(parts):
            n = len(part) + 2
            chunk = Chunk(document, content_hash, i, len(parts), bytes(4 * n), n, len(part), 0)
            if layout.has_offsets:
                some = spans[i * step : i * step + len(part)]
                chunk = chunk._replace(char_start=some[0][0], char_end=some[-1][1], n_unknown=i)
            try:
                if document.text in self._fails:
                    raise ValueError("out of luck")
                if layout.tokens:
                    yield chunk, np.stack([self._draw(word) for word in ["[CLS]", *part, "[SEP]"]]), ""
                else:
                    yield chunk, self._draw(" ".join(part) + (f" + {document.pair}" if document.pair else "")), ""
            except ValueError as error:
                yield chunk, None, str(error)

    def _draw(self, text: str) -> np.ndarray:
        return self._table.encoder(text, self._table.model)

    def _write(self, rows: list[Row], dead_letters: Sequence[DeadLetter]) -> list[Shard]:
        shards = []
        for records, form in ((rows, self._plan.form), (dead_letters, self._plan.dead_letter_format)):
            shards += write_shards(records, form, self._folder, self._plan.shard_bytes)
        return shards


class Outputs:
    """What the bundles of a step give, by tag; the main output is `main`."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[Any]] = {}

    def add_bundle(self, step: Any, elements: Iterable[Any], *sides: Any) -> None:
        step.setup()
        step.start_bundle()
        for element in elements:
            self._take(step.process(element, *sides))
        self._take(step.finish_bundle())

    def __getitem__(self, tag: str) -> list[Any]:
        return self._outputs.get(tag, [])

    def _take(self, outputs: Iterable[Any] | None) -> None:
        for output in outputs or ():
            tag, value = (output.tag, output.value) if isinstance(output, TaggedOutput) else ("main", output)
            self._outputs.setdefault(tag, []).append(value.value if isinstance(value, WindowedValue) else value)


flatten = chain.from_iterable


def commit(committer: Committer, results: Results) -> None:
    """The end of a run; Beam takes part only where a store has more to do than one worker can."""
    if not isinstance(committer, BigqueryCommit):
        committer.commit(results)
        return
    options = PipelineOptions([f"--project={committer.name.project}"])
    with beam.Pipeline(make_runner(options), options=options) as pipeline:
        given = results._asdict().items()
        collections = {name: pipeline | name >> beam.Create(values, reshuffle=False) for name, values in given}
        _ = pipeline | Commit(committer, collections)


def group(*collections: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
    """What Beam's GroupByKey gives for some collections together."""
    groups: dict[Any, list[Any]] = {}
    for key, value in flatten(collections):
        groups.setdefault(key, []).append(value)
    return list(groups.items())


def combine(pairs: Iterable[tuple[Any, Any]], combiner: beam.CombineFn) -> dict[Any, Any]:
    """What Beam's CombinePerKey gives, with an accumulator for every two values."""
    combined = {}
    for key, values in group(pairs):
        accumulators = [
            combiner.add_inputs(combiner.create_accumulator(), values[i : i + 2]) for i in range(0, len(values), 2)
        ]
        combined[key] = combiner.extract_output(combiner.merge_accumulators(accumulators))
    return combined


def write_shards(
    records: Sequence[Any], form: RowFormat | DeadLetterFormat, folder: str, shard_bytes: int = 1 << 20
) -> list[Shard]:
    """Rows or dead letters to files, a few at a time."""
    writer = ShardWriter(folder, form, shard_bytes)
    for start in range(0, len(records), WRITTEN_ROWS):
        writer.write(list(records[start : start + WRITTEN_ROWS]))
    return writer.finish()


def count_letters(dead_letters: Sequence[DeadLetter]) -> BundleCounts:
    reasons = [dead_letter.reason for dead_letter in dead_letters]
    return BundleCounts.of("write_dead_letters", {reason: reasons.count(reason) for reason in reasons})


def publish_rows(
    table: str,
    rows: Sequence[Row],
    form: RowFormat,
    dead_letters: Sequence[DeadLetter] = (),
    shard_bytes: int = 1 << 20,
) -> Manifest:
    """Makes some rows the live snapshot of a table in a folder, without a run."""
    store, name = FolderStore(table), name_snapshot()
    live, version = store.read_live()
    folder = attempts_folder(table, name)
    make_folder(folder)
    facts = {"file_format": form.name, "compression": form.compression, "layout": form.layout}
    facts |= {"embeam": "0", "fingerprint": "", "identity": {}, "settings": {}}
    plan = Publication(table, name, live.snapshot if live else "", version, time.time(), facts, 1.0)
    counts = {"write_dead_letters": json.loads(count_letters(dead_letters).counts)}
    with mock.patch("os.fsync"):
        shards = write_shards(rows, form, folder, shard_bytes)
        shards += write_shards(dead_letters, DeadLetterFormat("full"), folder)
        manifest = build_manifest(plan, shards, counts)
        place_files(manifest, shards, snapshot_folder(table, name))
        make_live(plan)
    return manifest
