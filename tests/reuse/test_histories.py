"""Random histories of a corpus and its table, against a model of a few lines: whatever happens, the table is true.

Documents come, change, move, double, grow too long and go; files are cut off; the model changes; runs fail and die at
chosen points; old snapshots come back. After every step the table holds what the rules say, with the official encoder's
vectors. EMBEAM_HISTORIES=200 tries so many histories instead of a few.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import pipeline.job
import pipeline.tables.folder
from pipeline.errors import EmbeamError
from pipeline.tables.retention import roll_back
from tests.support.official import official_tokens, official_vector
from tests.support.runs import run_pipeline, watch_encoder
from tests.support.tables import assert_close, read_rows

FILES = ("a.jsonl", "b.jsonl", "c.jsonl.gz")
TEXTS = (
    *("a dog", "the cat", "A DOG", "water and fire", "two dogs in a house", "the river of stone"),
    " ".join(["dog"] * 20),  # too long for one of the models
    " ".join(["cat"] * 40),  # too long for all of them
)
MODELS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 16},
    {"max_tokens": 32},
    {"max_tokens": 32, "vector": "sequence_output:mean"},
)
CRASHES = ("encoder", "before placing", "after placing", "before the pointer", "after the pointer")


class Crash(Exception):
    pass


class Doc(NamedTuple):
    """A document of the corpus, or a row of the table with the file that its document was last seen in."""

    text: str
    year: int
    file: str


class State(NamedTuple):
    """A table as it should be: rows by id, and the number of the model."""

    rows: dict[str, Doc]
    model: int


def is_too_long(text: str, model: int) -> bool:
    return len(official_tokens(text)) + 2 > MODELS[model]["max_tokens"]


def expect(state: State | None, corpus: dict[str, Doc], unread: set[str], cut: bool, model: int) -> tuple[State, int]:
    """The rules: what the table should be after a run, and how many rows are stale.

    Args:
      state: the table before.
      corpus: all documents.
      unread: those that cannot be read.
      cut: whether the compressed file is cut off.
      model: the number of the model.
    """
    old = state.rows if state and state.model == model else {}
    rows, n_stale = {}, 0
    for name, doc in corpus.items():
        if name in unread:
            continue
        if not is_too_long(doc.text, model):
            rows[name] = doc
        elif name in old:  # an old vector is better than none
            rows[name] = old[name]._replace(file=doc.file)
            n_stale += 1
    for name, doc in old.items():
        if (name not in corpus or name in unread) and cut and doc.file == FILES[2]:  # nobody can say that it is gone
            rows[name] = doc
            n_stale += 1
    return State(rows, model), n_stale


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="embeam-history-"))
        self.table = self.folder / "table"
        self.corpus: dict[str, Doc] = {}
        self.cut_at: int | None = None  # documents of the compressed file that can be read
        self.model = 0
        self.number = 0
        self.state: State | None = None
        self.snapshots: dict[str, State] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # The corpus

    @initialize(texts=st.lists(st.sampled_from(TEXTS[:6]), min_size=6, max_size=10))
    def begin(self, texts: list[str]) -> None:
        self.corpus["anchor"] = Doc("an anchor", 0, FILES[0])
        for i, text in enumerate(texts):
            self.add(text, FILES[i % 3], i)
        self.run()

    def _pick(self, number: int) -> str:
        names = [name for name in self.corpus if name != "anchor"]
        return names[number % len(names)]

    @rule(text=st.sampled_from(TEXTS), file=st.sampled_from(FILES), year=st.integers(0, 3))
    def add(self, text: str, file: str, year: int) -> None:
        self.number += 1
        self.corpus[f"d{self.number}"] = Doc(text, year, file)

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(number=st.integers(0, 99), text=st.sampled_from(TEXTS))
    def edit(self, number: int, text: str) -> None:
        name = self._pick(number)
        self.corpus[name] = self.corpus[name]._replace(text=text)

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(number=st.integers(0, 99), text=st.sampled_from(TEXTS[-2:]))
    def make_too_long(self, number: int, text: str) -> None:
        self.edit(number, text)
        self.edit(number + 1, text)  # two documents with one text that cannot be embedded

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(number=st.integers(0, 99))
    def delete(self, number: int) -> None:
        del self.corpus[self._pick(number)]

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(number=st.integers(0, 99))
    def rename(self, number: int) -> None:
        self.number += 1
        self.corpus[f"d{self.number}"] = self.corpus.pop(self._pick(number))

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(number=st.integers(0, 99), file=st.sampled_from(FILES))
    def move(self, number: int, file: str) -> None:
        name = self._pick(number)
        self.corpus[name] = self.corpus[name]._replace(file=file)

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(number=st.integers(0, 99), year=st.integers(0, 3))
    def change_kept_field(self, number: int, year: int) -> None:
        name = self._pick(number)
        self.corpus[name] = self.corpus[name]._replace(year=year)

    @rule(n=st.integers(0, 2))
    def cut_off_file(self, n: int) -> None:
        self.cut_at = n

    @rule()
    def mend_file(self) -> None:
        self.cut_at = None

    @rule(model=st.sampled_from(range(len(MODELS))))
    def change_model(self, model: int) -> None:
        self.model = model

    # Runs

    def _write(self) -> tuple[set[str], bool]:
        """Writes the corpus; returns the ids that cannot be read, and whether the compressed file is cut off."""
        unread: set[str] = set()
        is_cut = False
        for file in FILES:
            docs = {name: doc for name, doc in self.corpus.items() if doc.file == file}
            lines = [json.dumps({"id": n, "text": d.text, "year": d.year}).encode() + b"\n" for n, d in docs.items()]
            if file.endswith(".gz"):  # a member for each line, so that one can say what is read of a part
                lines = [gzip.compress(line, mtime=0) for line in lines]
                if self.cut_at is not None and self.cut_at < len(lines):
                    is_cut = True
                    unread = set(list(docs)[self.cut_at :])
                    lines = [*lines[: self.cut_at], lines[self.cut_at][:12]]
            (self.folder / file).write_bytes(b"".join(lines))
        return unread, is_cut

    def _embed(self) -> Any:
        return run_pipeline(
            self.folder,
            input=str(self.folder / "*.jsonl*"),
            on_long="reject",
            keep_fields="year:int",
            max_dead_fraction=1.0,
            max_delete_fraction=1.0,
            keep_snapshots=99,
            **MODELS[self.model],
        )

    @rule()
    def run(self) -> None:
        unread, is_cut = self._write()
        expected, n_stale = expect(self.state, self.corpus, unread, is_cut, self.model)
        with watch_encoder() as watched:
            manifest = self._embed()
        texts = watched.texts
        known = (
            {doc.text for doc in self.state.rows.values()} if self.state and self.state.model == self.model else set()
        )
        assert len(texts) == len(set(texts)) and not set(texts) & known, "what is known is not encoded"
        assert manifest.counts["carry"]["stale"] == n_stale
        self._publish(manifest.snapshot, expected)
        assert not list((self.table / "attempts").iterdir()) and not (self.table / "journal").exists()

    @rule(where=st.sampled_from(CRASHES), n_batches=st.integers(0, 3), is_hard=st.booleans())
    def crash(self, where: str, n_batches: int, is_hard: bool) -> None:
        """A run that fails, or one that dies: then nothing is cleaned up and the journal's last rows are lost."""
        unread, is_cut = self._write()
        expected, _ = expect(self.state, self.corpus, unread, is_cut, self.model)
        try:
            with raise_at(where, n_batches), leave_everything() if is_hard else contextlib.nullcontext():
                manifest = self._embed()
        except EmbeamError:
            live = (self.table / "CURRENT").read_text().strip()
            if where == "after the pointer":
                self._publish(live, expected)
            self._check()
        else:
            assert where == "encoder", "the crash should have stopped the run"
            self._publish(manifest.snapshot, expected)  # there were fewer batches

    @precondition(lambda self: len(self.snapshots) > 1)
    @rule(number=st.integers(0, 99))
    def roll_back(self, number: int) -> None:
        live = (self.table / "CURRENT").read_text().strip()
        others = sorted(set(self.snapshots) - {live})
        name = others[number % len(others)]
        roll_back(str(self.table), name)
        self.state = self.snapshots[name]
        self._check()

    def _publish(self, name: str, state: State) -> None:
        self.state = state
        self.snapshots[name] = state
        self._check()

    def _check(self) -> None:
        assert self.state is not None
        vector = MODELS[self.state.model].get("vector", "pooled_output")
        rows = read_rows(str(self.table))
        assert {name for name, _ in rows} == set(self.state.rows)
        for (name, chunk), row in rows.items():
            doc = self.state.rows[name]
            assert chunk == 0 and row["year"] == doc.year
            assert_close(row["embedding"], official_vector(doc.text, vector=vector), (name, doc.text))


@contextlib.contextmanager
def raise_at(where: str, n_batches: int) -> Iterator[None]:
    if where == "encoder":
        with watch_encoder(n_batches, Crash):
            yield
        return
    when, _, what = where.partition(" ")
    name = {"placing": "place_files", "the pointer": "make_live"}[what]
    step = getattr(pipeline.tables.folder, name)

    def broken(*arguments: Any) -> None:
        if when == "after":
            step(*arguments)
        raise Crash(where)

    with watch_encoder(), mock.patch.object(pipeline.tables.folder, name, broken):
        yield


@contextlib.contextmanager
def leave_everything() -> Iterator[None]:
    """A dead process removes no file and writes none."""
    keeps = mock.Mock(rmtree=lambda *arguments, **more: None)
    with (
        mock.patch.object(pipeline.job, "abandon_attempt", lambda *arguments: ""),
        mock.patch.object(pipeline.job, "flush_journals", lambda: None),
        mock.patch.object(pipeline.job, "shutil", keeps),
    ):
        yield


N_HISTORIES = int(os.environ.get("EMBEAM_HISTORIES", "5"))


@pytest.mark.timeout(max(120, 40 * N_HISTORIES))
def test_whatever_happens_the_table_is_true():
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=N_HISTORIES,
            stateful_step_count=12 if N_HISTORIES <= 5 else 30,
            deadline=None,
            derandomize=N_HISTORIES <= 5,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],  # a failure is told as it was found: to shrink it takes hours of runs
            report_multiple_bugs=False,
        ),
    )
