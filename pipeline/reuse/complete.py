"""Completes a run on the local engine: turns its notes into decisions and requests.

Everything that grows with the corpus is read from files block by block. Memory holds, for each live row, a mark and the
number of its source, and 16 bytes for each text that several documents have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import RunError
from pipeline.records import DeadLetter
from pipeline.reuse.dead_letters import DeadLetterFacts
from pipeline.reuse.decide import ROW_COUNTS, ReusePolicy, RowFacts, decide_rows, stays
from pipeline.reuse.digests import DigestSet, is_in
from pipeline.reuse.index import VectorIndex
from pipeline.reuse.local import MARK, marks_file
from pipeline.reuse.requests import REUSED, WAITING, WANTED, RequestFiles, RequestLines, WantedRows, read_blocks
from pipeline.sinks.index import iterate_records, read_sources
from pipeline.sinks.readers import VectorFile
from pipeline.sinks.writing import Shard, ShardWriter

FRESH = "fresh"  # the kind of this run's own files
_PLACE = np.dtype([("content", "S16"), ("chunk", "<u4"), ("row", "<u8")])
BLOCK = 1 << 15
_WRITTEN_DEAD_LETTERS = 256


@dataclass(frozen=True)
class LiveDecisions:
    """What happens to the live rows.

    Attributes:
      actions: `[n_live]` uint8 of `RowAction`.
      source: `[n_live]` number of the file that each row's document comes from now.
      sources: those files.
      counts: documents by action.
    """

    actions: np.ndarray
    source: np.ndarray
    sources: list[str]
    counts: Counter[str]

    @property
    def kept(self) -> np.ndarray:
        """Which rows `[n_live]` stay in the table."""
        return stays(self.actions)


@dataclass(frozen=True)
class RequestPlan:
    """Where the vectors for a run's requests are.

    Attributes:
      lines: the files of the requests.
      wanted: the rows whose vectors are needed, of the vector index and of this run.
      moved: ascending content hashes of rows of the vector index whose vectors are needed.
      dead_ids: ascending digests of the ids of documents with a dead letter and without a new row.
      dead_shards: files with dead letters of documents with the same text as one that could not be embedded.
      dead_counts: these dead letters by reason.
      n_dead: the number of these documents.
    """

    lines: list[str]
    wanted: WantedRows
    moved: np.ndarray
    dead_ids: np.ndarray
    dead_shards: list[Shard]
    dead_counts: Counter[str]
    n_dead: int


def list_shared(notes: Iterable[str]) -> np.ndarray:
    """Ascending content hashes `[n]` of the texts that documents wait for."""
    shared = DigestSet()
    for note in notes:
        for block in read_blocks(RequestFiles.of(note).waiting, WAITING):
            shared.add(block["content"])
    return shared.sorted()


def plan_requests(
    notes: Sequence[str],
    index: VectorIndex,
    fresh: Sequence[tuple[VectorFile, Shard]],
    shared: np.ndarray,
    dead: DeadLetterFacts,
    dead_writer: ShardWriter,
) -> RequestPlan:
    """Finds the rows for all requests of a run, and writes dead letters for those that get none.

    Args:
      notes: paths of the bundles' notes.
      index: the vector index.
      fresh: this run's files of new rows, numbered after the rows of the vector index.
      shared: from `list_shared`.
      dead: facts from the run's dead letters.
      dead_writer: writes more dead letters.

    Raises:
      RunError: if a text was neither encoded nor rejected.
    """
    places = _find_shared(fresh, shared, dead)
    wanted = WantedRows(index.folder, len(index.entries) + sum(file.rows for file, _ in fresh))
    moved, dead_ids, dead_counts = DigestSet(), [np.empty(0, "S16")], Counter[str]()
    n_dead = 0
    paths = [RequestFiles.of(note).lines for note in notes]
    with RequestLines(paths) as lines:
        for number, note in enumerate(notes):
            files = RequestFiles.of(note)
            for block in read_blocks(files.reused, REUSED):
                wanted.add(_want(block["row"], number, block["offset"]))
                dead.mark_embedded(block["id"])
                moved.add(index.entries["content"][block["row"].astype(np.int64)])
            for block in read_blocks(files.waiting, WAITING):
                low, high = (np.searchsorted(places["content"], block["content"], side) for side in ("left", "right"))
                which = np.repeat(np.arange(len(block)), high - low)
                begins = np.repeat(low - np.concatenate([[0], np.cumsum(high - low)[:-1]]), high - low)
                rows = places["row"][np.arange(len(which)) + begins]
                wanted.add(_want(rows, number, block["offset"][which]))
                dead.mark_embedded(block["id"][high > low])
                is_dead = dead.has(block["content"])
                n_dead += int(is_dead.sum())
                dead_ids.append(block["id"][is_dead & (high == low)])
                for dead_letters in _repeat_dead_letters(number, block["offset"][is_dead], lines, dead):
                    dead_counts.update(dead_letter.reason for dead_letter in dead_letters)
                    dead_writer.write(dead_letters)
    wanted.finish()
    ids = np.unique(np.concatenate([*dead_ids, dead.dead_ids()]))
    return RequestPlan(paths, wanted, moved.sorted(), ids, dead_writer.finish(), dead_counts, n_dead)


def _find_shared(fresh: Sequence[tuple[VectorFile, Shard]], shared: np.ndarray, dead: DeadLetterFacts) -> np.ndarray:
    """The new rows with shared texts: `[n]` of _PLACE, one for each content and chunk, sorted by them."""
    found = [np.empty(0, _PLACE)]
    for file, shard in fresh:
        first = file.first
        for entries in iterate_records(shard.index_path):
            dead.mark_embedded(entries["id"])
            hits = np.flatnonzero(is_in(entries["content"], shared))
            block = np.empty(len(hits), _PLACE)
            block["content"], block["chunk"] = entries["content"][hits], entries["chunk"][hits]
            block["row"] = hits + first
            found.append(block)
            first += len(entries)
    places = np.concatenate(found)
    _, once = np.unique(places[["content", "chunk"]], return_index=True)
    places = places[once]
    lost = shared[~is_in(shared, places["content"])]
    if not dead.has(lost).all():
        raise RunError("a vector was lost between encoding and publishing; run the same command again")
    return places


def _want(rows: np.ndarray, file: int, offsets: np.ndarray) -> np.ndarray:
    wanted = np.empty(len(rows), WANTED)
    wanted["row"], wanted["file"], wanted["offset"] = rows, file, offsets
    return wanted


def _repeat_dead_letters(
    file: int, offsets: np.ndarray, lines: RequestLines, dead: DeadLetterFacts
) -> Iterator[list[DeadLetter]]:
    """Dead letters for the requests at some offsets of a file, some hundred at a time."""
    dead_letters: list[DeadLetter] = []
    for offset in offsets.tolist():
        dead_letters += dead.repeat(*lines.read(file, offset))
        if len(dead_letters) >= _WRITTEN_DEAD_LETTERS:
            yield dead_letters
            dead_letters = []
    if dead_letters:
        yield dead_letters


def decide_live(
    index: VectorIndex,
    notes: Iterable[str],
    dead_ids: np.ndarray,
    incomplete: set[str],
    moved: np.ndarray,
    inputs: Collection[str],
    policy: ReusePolicy,
) -> LiveDecisions:
    """Decides what happens to every live row.

    Args:
      index: the vector index.
      notes: paths of the bundles' notes.
      dead_ids: ascending digests of the ids of documents with a dead letter and without a new row.
      incomplete: input files of which not all records, or not all ids, could be read.
      moved: ascending content hashes of live rows whose vectors are reused for other ids.
      inputs: the input files that there are.
      policy: what may be reused.
    """
    n = index.n_live
    seen, unchanged, actions = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, np.uint8)
    source, sources = index.entries["source"][:n].copy(), list(index.sources)
    for note in notes:
        for marks in iterate_records(marks_file(note), MARK):
            seen[marks["row"]] = True
            unchanged[marks["row"]] = marks["unchanged"]
            source[marks["row"]] = marks["source"] + len(sources)
        sources += read_sources(marks_file(note), MARK)
    is_incomplete = np.array([path in incomplete for path in sources] or [False])
    is_gone = np.array([path not in inputs for path in sources] or [False])
    counts = Counter[str](dict.fromkeys(ROW_COUNTS, 0))
    for rows in index.blocks_by_id(BLOCK):
        ids, content = index.entries["id"][rows], index.entries["content"][rows]
        facts = RowFacts(
            id=ids,
            unchanged=unchanged[rows],
            seen=seen[rows],
            dead=is_in(ids, dead_ids),
            incomplete=is_incomplete[source[rows]],
            moved=is_in(content, moved),
            gone=is_gone[source[rows]],
        )
        decisions = decide_rows(facts, policy)
        actions[rows] = decisions.actions
        counts.update(decisions.counts)
    return LiveDecisions(actions, source, sources, counts)


def number_files(fresh: Sequence[Shard], first: int) -> list[VectorFile]:
    """The files of new rows, numbered after the rows of the vector index."""
    files = []
    for shard in fresh:
        files.append(VectorFile(shard.path, FRESH, first, shard.rows))
        first += shard.rows
    return files
