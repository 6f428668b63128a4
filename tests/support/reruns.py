"""What a rerun has to do, case by case: for every back end, and for every place of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.records import DeadLetter, Document, pack_kept
from tests.support.steps import draw_vector, make_dead_letter, make_document
from tests.support.tables import Rows, read_dead_letters

A, B = "a.jsonl", "b.jsonl"


def documents(*names: str, file: str = A) -> list[Document]:
    """Documents `a` to `z` with the texts `text a` to `text z`; `a=b` has the text of b."""
    split = [name.partition("=") for name in names]
    return [make_document(name, f"text {text or name}", file) for name, _, text in split]


def texts(dead_letters: str) -> list[str]:
    return [f"text {dead_letter}" for dead_letter in dead_letters]


def dated(year: int, *names: str) -> list[Document]:
    return [one._replace(kept=pack_kept([year])) for one in documents(*names)]


def assert_rows(rows: Rows, expected: Iterable[Document], model: str = "one") -> None:
    """The table has one row for each document, with its text's vector and its own kept field."""
    wanted = {one.id: one for one in expected}
    assert {name for name, _ in rows} == set(wanted) and len(rows) == len(wanted)
    for (name, chunk), row in rows.items():
        one = wanted[name]
        assert chunk == 0 and np.array_equal(row["embedding"], draw_vector(one.text, model)), name
        if one.kept:
            assert pack_kept([row["year"]]) == one.kept, name


class Case(NamedTuple):
    """A rerun.

    Attributes:
      before: documents of the first run.
      after: of the second.
      encoded: texts that the second encodes.
      counts: what it counts.
      stay: rows that the table has besides those of `after`.
      dead_letters: of records that the second run cannot read.
      fails: texts on which its encoder fails.
      settings: of the second run.
    """

    before: list[Document]
    after: list[Document]
    encoded: Sequence[str]
    counts: dict[str, int]
    stay: Sequence[Document] = ()
    dead_letters: Sequence[DeadLetter] = ()
    fails: Sequence[str] = ()
    settings: dict[str, Any] = {}

    @property
    def rows(self) -> list[Document]:
        """Documents as the table should have them after the second run."""
        return [*(one for one in self.after if one.text not in self.fails), *self.stay]

    @property
    def dead(self) -> list[tuple[str, str]]:
        """Ids and texts of the dead letters after the second run, "" where there is none."""
        own = [(one.id, one.text) for one in self.after if one.text in self.fails]
        return sorted([*own, *((dead_letter.id or "", "") for dead_letter in self.dead_letters)])


CASES = {
    "nothing": Case(documents(*"abc"), documents(*"abc"), [], {"documents": 3, "unchanged": 3, "deleted": 0}),
    "new, changed and deleted": Case(
        documents(*"abcd"),
        documents("a", "b=x", "d", "e"),
        texts("ex"),
        {"documents": 4, "encoded": 2, "unchanged": 2, "deleted": 1, "stale": 0, "moved": 0},
    ),
    "swapped texts": Case(documents(*"abc"), documents("a=b", "b=a", "c"), [], {"reused": 2, "unchanged": 1}),
    "another id": Case(documents(*"abc"), documents("x=a", "b", "c"), [], {"reused": 1, "deleted": 1, "moved": 1}),
    "all ids are others": Case(
        documents(*"abc"), documents("x=a", "y=b", "z=c"), [], {"reused": 3, "deleted": 3, "moved": 3}
    ),
    "another file": Case(documents(*"abc"), documents(*"abc", file=B), [], {"unchanged": 3, "deleted": 0}),
    "equal texts are encoded once": Case(
        documents(*"ab"), documents("a", "x", "y=x", "z=x"), texts("x"), {"encoded": 1, "same_text": 2, "deleted": 1}
    ),
    "the text of another document": Case(documents(*"ab"), documents("a", "b", "c=a"), [], {"reused": 1}),
    "an equal text that changes in one of two": Case(
        documents("a", "b=a", "c"), documents("a", "b=x", "c"), texts("x"), {"unchanged": 2, "encoded": 1}
    ),
    "a text that fails": Case(
        documents(*"ab"),
        documents("a", "b", "x", "y=x"),
        texts("x"),
        {"unchanged": 2, "same_text": 1, "stale": 0},
        fails=texts("x"),
    ),
    "a changed text that fails keeps its old vector": Case(
        documents(*"abc"),
        documents("a", "b=x", "c=x"),
        texts("x"),
        {"unchanged": 1, "stale": 2, "deleted": 0},
        stay=documents("b", "c"),
        fails=texts("x"),
    ),
    "a record with an id that cannot be read": Case(
        documents(*"abc"),
        documents("a"),
        [],
        {"stale": 1, "deleted": 1},
        stay=documents("b"),
        dead_letters=[make_dead_letter(A, "b", "wrong_type")],
    ),
    "a record without an id may be any of its file": Case(
        [*documents(*"abc"), *documents(*"xyz", file=B)],
        [*documents("a"), *documents("x", file=B)],
        [],
        {"unchanged": 2, "stale": 2, "deleted": 2},
        stay=documents("b", "c"),
        dead_letters=[make_dead_letter(A)],
    ),
    "a file that cannot be read to its end": Case(
        [*documents(*"abc"), *documents(*"xyz", file=B)],
        [*documents("a"), *documents("x", file=B)],
        [],
        {"unchanged": 2, "stale": 2, "deleted": 2, "gone": 0},
        stay=documents("b", "c"),
        settings={"bad_files": (A,)},
    ),
    "a file that is no longer there": Case(
        [*documents(*"abc"), *documents(*"xyz", file=B), *documents("m=q", file=B)],
        [*documents("a", "b", "n=q"), *documents("x", file=A)],
        [],
        {"unchanged": 3, "deleted": 4, "moved": 1, "gone": 2},
    ),
    "a document that left a file before it broke": Case(
        documents(*"abc"),
        [*documents("a"), *documents("b", file=B)],
        [],
        {"unchanged": 2, "stale": 1, "deleted": 0},
        stay=documents("c"),
        dead_letters=[make_dead_letter(A)],
    ),
    "a second document with an id": Case(
        documents(*"abc"),
        documents("a", "b=c", "c"),
        [],
        {"reused": 1, "unchanged": 2, "stale": 0},
        dead_letters=[make_dead_letter(A, "b", "duplicate_id")],
    ),
    "a second document with the id of one that was left out": Case(
        documents(*"abc"),
        documents("a", "c"),
        [],
        {"unchanged": 2, "stale": 0, "deleted": 1},
        dead_letters=[make_dead_letter(A, "b", "duplicate_id")],
    ),
    "a broken second record of an unchanged document": Case(
        documents(*"abc"),
        documents(*"abc"),
        [],
        {"unchanged": 3, "stale": 0},
        dead_letters=[make_dead_letter(A, "b", "wrong_type")],
    ),
    "a broken second record of a document with a new text": Case(
        documents(*"abc"),
        documents("a", "b=x", "c"),
        texts("x"),
        {"unchanged": 2, "stale": 0},
        dead_letters=[make_dead_letter(A, "b", "wrong_type")],
    ),
    "a broken second record of a document with a known text": Case(
        documents(*"abc"),
        documents("a", "b=c", "c"),
        [],
        {"unchanged": 2, "reused": 1, "stale": 0},
        dead_letters=[make_dead_letter(A, "b", "wrong_type")],
    ),
    "a broken second record of a document with an equal text": Case(
        documents(*"abc"),
        documents("a", "b=x", "c=x"),
        texts("x"),
        {"unchanged": 1, "same_text": 1, "stale": 0},
        dead_letters=[make_dead_letter(A, "b", "wrong_type"), make_dead_letter(A, "c", "wrong_type")],
    ),
    "kept deletions": Case(
        documents(*"abc"),
        documents("a", "x"),
        texts("x"),
        {"kept": 2, "deleted": 0, "unchanged": 1},
        stay=documents("b", "c"),
        settings={"deletes": "keep"},
    ),
    "kept deletions and what may be there": Case(
        documents(*"abc"),
        documents("a"),
        [],
        {"kept": 1, "stale": 1, "deleted": 0},
        stay=documents("b", "c"),
        dead_letters=[make_dead_letter(A, "b", "wrong_type")],
        settings={"deletes": "keep"},
    ),
}


def list_dead(table: str, work_dir: str = "") -> list[tuple[str, str]]:
    """Ids and texts of a table's dead letters, sorted, "" where there is none."""
    return sorted(
        (dead_letter["id"] or "", dead_letter.get("text", "")) for dead_letter in read_dead_letters(table, work_dir)
    )


def join_cases() -> Case:
    """All cases at once, but for those with settings of their own: each with ids, texts and files of its own."""
    joined = Case([], [], [], {}, [], [], [])
    for number, case in enumerate(case for case in CASES.values() if not case.settings):
        joined.before.extend(_renumber(case.before, number))
        joined.after.extend(_renumber(case.after, number))
        joined.stay.extend(_renumber(case.stay, number))
        joined.encoded.extend(f"{text} {number}" for text in case.encoded)
        joined.fails.extend(f"{text} {number}" for text in case.fails)
        joined.dead_letters.extend(
            dead_letter._replace(
                id=dead_letter.id and f"{dead_letter.id}{number}",
                origin=dead_letter.origin._replace(path=f"{number}{dead_letter.origin.path}"),
            )
            for dead_letter in case.dead_letters
        )
    return joined


def _renumber(some: Iterable[Document], number: int) -> list[Document]:
    return [
        one._replace(
            id=f"{one.id}{number}",
            text=f"{one.text} {number}",
            origin=one.origin._replace(path=f"{number}{one.origin.path}"),
        )
        for one in some
    ]
