"""Requests meet the vectors that they ask for, on a distributed engine, after everything is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam import coders
from apache_beam.pvalue import TaggedOutput

import pipeline.coders  # noqa: F401  tells Beam how rows and dead letters are encoded
from pipeline.errors import RunError
from pipeline.records import DeadLetter, Document, Row, cut_own_text
from pipeline.reuse.copy import CollectRows
from pipeline.reuse.live_table import KEYED, DistributedReuse, read_wanted
from pipeline.reuse.requests import ReuseRequest
from pipeline.reuse.wire import CHECK, DEAD, REQUEST, VECTOR

_ROWS, _DEAD_LETTERS = coders.registry.get_coder(Row), coders.registry.get_coder(DeadLetter)


class AnswerRequests(beam.DoFn):
    """(content hash, vectors, dead letters and requests) -> rows, and under tags samples and dead letters.

    Args:
      keep_text: rows have their document's text.
    """

    def __init__(self, keep_text: bool) -> None:
        self._keep_text = keep_text

    def process(self, group: tuple[bytes, Iterable[bytes]]) -> Iterator[Any]:
        rows: dict[int, Row] = {}
        dead_letters: dict[tuple[str, str, str], None] = {}
        for value in group[1]:
            if value[:1] == VECTOR:
                row = _ROWS.decode(value[1:])
                rows[row.chunk] = row
            elif value[:1] == DEAD:
                dead_letter = _DEAD_LETTERS.decode(value[1:])
                dead_letters[dead_letter.stage, dead_letter.reason, dead_letter.message] = None
        own = [rows[chunk] for chunk in sorted(rows)]
        for value in group[1]:
            if value[:1] == REQUEST:
                if not own and not dead_letters:
                    raise RunError("a vector was lost between encoding and publishing; run the same command again")
                document, content_hash = ReuseRequest.from_line(value[1:])
                for row in own:
                    yield give_row(row, document, self._keep_text)
                for facts in dead_letters:
                    dead_letter = DeadLetter.of(*facts, document, content_hash)
                    yield TaggedOutput("dead_letters", dead_letter)
            elif value[:1] == CHECK:
                for row in own:
                    yield TaggedOutput("samples", row)


def give_row(row: Row, document: Document, keep_text: bool) -> Row:
    """A document's row from the vector of one with the same text."""
    return row._replace(
        id=document.id,
        kept=document.kept,
        text=cut_own_text(document.text, row.char_start, row.char_end) if keep_text else None,
        source=document.origin.path,
        shared=False,
    )


def key_vector(row: Row) -> tuple[bytes, bytes]:
    """A row whose vector others need, as `AnswerRequests` takes it."""
    return bytes.fromhex(row.content_hash), VECTOR + _ROWS.encode(row)


def key_dead_letter(dead_letter: DeadLetter) -> tuple[bytes, bytes]:
    """A dead letter whose document others have the text of, as `AnswerRequests` takes it."""
    return bytes.fromhex(dead_letter.content_hash or ""), DEAD + _DEAD_LETTERS.encode(
        dead_letter._replace(text=None, pair=None)
    )


class Answered(NamedTuple):
    """What `AnswerByContent` gives."""

    rows: beam.PCollection  # of Row
    samples: beam.PCollection  # of Row, to compare spot checks with
    dead_letters: beam.PCollection  # of DeadLetter


@dataclass
class AnswerByContent(beam.PTransform):
    """PCollection[Row] that were encoded -> Answered.

    Attributes:
      reuse: what may be reused.
      wanted: PCollections of (file or segment, row) whose vectors are wanted.
      requests: PCollections of packed requests.
      dead_letters: of documents that could not be encoded.
    """

    reuse: DistributedReuse
    wanted: Sequence[beam.PCollection]
    requests: Sequence[beam.PCollection]
    dead_letters: beam.PCollection

    def expand(self, rows: beam.PCollection) -> Answered:
        reuse = self.reuse
        reused = (
            tuple(self.wanted)
            | "Wanted" >> beam.Flatten()
            | "CollectWanted" >> beam.CombinePerKey(CollectRows())
            | "SpreadWanted" >> beam.Reshuffle()
            | "ReadWanted" >> beam.FlatMap(read_wanted, reuse)
            | "KeyReused" >> beam.Map(key_vector).with_output_types(KEYED)
        )
        fresh = rows | "Shared" >> beam.Filter(is_shared) | "KeyShared" >> beam.Map(key_vector).with_output_types(KEYED)
        dead_letters = (
            self.dead_letters
            | "SharedDead" >> beam.Filter(is_shared)
            | "KeyDead" >> beam.Map(key_dead_letter).with_output_types(KEYED)
        )
        answer = beam.ParDo(AnswerRequests(reuse.keep_text)).with_output_types(
            Row, samples=Row, dead_letters=DeadLetter
        )
        outputs = (
            (reused, fresh, dead_letters, *self.requests)
            | "VectorsAndRequests" >> beam.Flatten()
            | "GroupByContent" >> beam.GroupByKey()
            | "AnswerRequests" >> answer.with_outputs("samples", "dead_letters", main="rows")
        )
        return Answered(outputs.rows, outputs.samples, outputs.dead_letters)


def is_shared(output: Row | DeadLetter) -> bool:
    """Whether others wait for a row's vector, or share a dead letter."""
    return output.shared
