"""Random histories of a corpus and its table, against a model of a few lines: the table stays consistent.

Documents come, change, move, double, grow too long and go; files are cut off; the model changes; runs fail and die at
chosen points; old snapshots come back. After every step the table holds what the rules say: with the official encoder's
vectors where the runs are whole, with vectors drawn from texts where only their steps are run. The lane `history` tries
EMBEAM_HISTORIES of them, whole, and ten times as many step by step; `make test` tries a few that are always the same.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import pipeline.run.job
import pipeline.tables.folder
from pipeline.errors import EmbeamError
from pipeline.read_config import KeptField
from pipeline.records import pack_kept
from pipeline.reuse.journal import journal_folder
from pipeline.run.verify import verify_table
from pipeline.tables.manifest import Manifest, open_table
from pipeline.tables.retention import roll_back
from tests.support.histories import run_joined
from tests.support.official import official_tokens, official_vector
from tests.support.runs import run_pipeline, watch_encoder
from tests.support.steps import LAYOUT, SteppedTable, draw_vector, make_document
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


class Input(NamedTuple):
    """What a run finds: documents that can be read, those that cannot, and whether a file is cut off before them."""

    readable: dict[str, Doc]
    unread: set[str]
    is_cut: bool


class Run(NamedTuple):
    """What a run did: the snapshot's name, the texts that were encoded, and how many rows are stale."""

    snapshot: str
    encoded: list[str]
    n_stale: int


def is_too_long(text: str, model: int) -> bool:
    return len(official_tokens(text)) + 2 > MODELS[model]["max_tokens"]


def expect(state: State | None, found: Input, model: int) -> tuple[State, int]:
    """The rules: what the table should be after a run, and how many rows are stale.

    Args:
      state: the table before.
      found: the input.
      model: the number of the model.
    """
    old = state.rows if state and state.model == model else {}
    rows, n_stale = {}, 0
    for name, doc in found.readable.items():
        if not is_too_long(doc.text, model):
            rows[name] = doc
        elif name in old:  # its old vector stays
            rows[name] = old[name]._replace(file=doc.file)
            n_stale += 1
    for name, doc in old.items():
        if name not in found.readable and found.is_cut and doc.file == FILES[2]:  # it may not be gone
            rows[name] = doc
            n_stale += 1
    return State(rows, model), n_stale


class Histories(RuleBasedStateMachine):
    """The rules of a history; a subclass says how the table is made."""

    def embed(self, found: Input) -> Run:
        raise NotImplementedError

    def embed_and_crash(self, found: Input, where: str, n: int, is_hard: bool) -> Run | None:
        """As `embed`, with a failure somewhere: None if it came to that."""
        raise NotImplementedError

    def check_vector(self, vector: np.ndarray, text: str, model: int) -> None:
        raise NotImplementedError

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
    def repair_file(self) -> None:
        self.cut_at = None

    def _look(self) -> Input:
        cut = [name for name, doc in self.corpus.items() if doc.file == FILES[2]]
        unread = set() if self.cut_at is None else set(cut[self.cut_at :])
        return Input({name: doc for name, doc in self.corpus.items() if name not in unread}, unread, bool(unread))

    @rule(model=st.sampled_from(range(len(MODELS))))
    def change_model(self, model: int) -> None:
        self.model = model

    # Runs

    @rule()
    def run(self) -> None:
        found = self._look()
        expected, n_stale = expect(self.state, found, self.model)
        run = self.embed(found)
        is_known = self.state is not None and self.state.model == self.model
        known = {doc.text for doc in self.state.rows.values()} if is_known else set()
        assert len(run.encoded) == len(set(run.encoded)), "equal texts are encoded once"
        assert not set(run.encoded) & known, "what is known is not encoded"
        assert run.n_stale == n_stale
        self._publish(run.snapshot, expected)
        assert not list((self.table / "attempts").iterdir())
        own = journal_folder(str(self.table), open_table(str(self.table))[0].fingerprint)
        assert not Path(own).exists(), "those of other models stay"

    @rule(where=st.sampled_from(CRASHES), n=st.integers(0, 3), is_hard=st.booleans())
    def crash(self, where: str, n: int, is_hard: bool) -> None:
        """A run that fails, or is killed: then nothing is cleaned up and the journal's last rows are lost."""
        found = self._look()
        expected, _ = expect(self.state, found, self.model)
        run = self.embed_and_crash(found, where, n, is_hard)
        if run is not None:
            assert where == "encoder", "the crash should have stopped the run"
            self._publish(run.snapshot, expected)  # there was less to encode
        elif where == "after the pointer":
            self._publish((self.table / "CURRENT").read_text().strip(), expected)
        else:
            self._check()

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
        rows = read_rows(str(self.table))
        assert {name for name, _ in rows} == set(self.state.rows)
        for (name, chunk), row in rows.items():
            doc = self.state.rows[name]
            assert chunk == 0 and row["year"] == doc.year
            self.check_vector(row["embedding"], doc.text, self.state.model)


class WholeRuns(Histories):
    """Files, Beam, the encoder: everything, by the back end of the local engine."""

    run_job = staticmethod(run_pipeline)

    def embed(self, found: Input) -> Run:
        self._write(found)
        with watch_encoder() as watched:
            manifest = self._embed()
        return Run(manifest.snapshot, watched.texts, int(manifest.counts["merge"]["stale"]))

    def embed_and_crash(self, found: Input, where: str, n: int, is_hard: bool) -> Run | None:
        self._write(found)
        encoder = watch_encoder(n, Crash) if where == "encoder" else watch_encoder()
        try:
            with encoder, break_commit(where), leave_everything() if is_hard else contextlib.nullcontext():
                return Run(self._embed().snapshot, [], 0)
        except EmbeamError:
            return None

    def check_vector(self, vector: np.ndarray, text: str, model: int) -> None:
        assert_close(vector, official_vector(text, vector=MODELS[model].get("vector", "pooled_output")), text)

    def _write(self, found: Input) -> None:
        for file in FILES:
            docs = {name: doc for name, doc in self.corpus.items() if doc.file == file}
            lines = [json.dumps({"id": n, "text": d.text, "year": d.year}).encode() + b"\n" for n, d in docs.items()]
            if file.endswith(".gz"):  # a member for each line, so that one can say what is read of a part
                lines = [gzip.compress(line, mtime=0) for line in lines]
                if found.is_cut:
                    n = len(docs) - len(found.unread)
                    lines = [*lines[:n], lines[n][:12]]
            (self.folder / file).write_bytes(b"".join(lines))

    def _embed(self) -> Manifest:
        return self.run_job(
            self.folder,
            input=str(self.folder / "*.jsonl*"),
            on_long="reject",
            keep_fields="year:int",
            on_bad_file="skip",
            max_dead_fraction=1.0,
            max_delete_fraction=1.0,
            keep_snapshots=99,
            **MODELS[self.model],
        )


class WholeJoins(WholeRuns):
    """The same by the back end of distributed engines."""

    run_job = staticmethod(run_joined)


class SteppedRuns(Histories):
    """The steps of one back end, without Beam and without an encoder."""

    joins = False

    def __init__(self) -> None:
        super().__init__()
        layout = replace(LAYOUT, kept=(KeptField("year", "int"),))
        self.steps = SteppedTable(str(self.table), self.joins, layout, shard_bytes=1, encoder=self._encode)
        self.dies = False
        self.left: float = float("inf")  # texts that are encoded before the encoder fails
        self.journal: set[tuple[int, str]] = set()  # models and texts that runs had encoded when they failed

    def embed(self, found: Input) -> Run:
        self.steps.model = str(self.model)
        documents = [
            make_document(name, doc.text, doc.file, pack_kept([doc.year]))
            for file in FILES
            for name, doc in found.readable.items()
            if doc.file == file
        ]
        bad_files = [FILES[2]] if found.is_cut else []
        too_long = {text for text in TEXTS if is_too_long(text, self.model)}
        outcome = self.steps.run(documents, (), too_long, dies=self.dies, bad_files=bad_files, keep_snapshots=99)
        encoded = [text for text in outcome.encoded if text not in too_long]
        assert not {(self.model, text) for text in encoded} & self.journal, "the journal has it"
        self.journal = {(model, text) for model, text in self.journal if model != self.model}
        return Run(outcome.manifest.snapshot, encoded, outcome.count("stale")["stale"])

    def embed_and_crash(self, found: Input, where: str, n: int, is_hard: bool) -> Run | None:
        self.dies, self.left = is_hard, n if where == "encoder" else float("inf")
        try:
            with break_commit(where):
                return self.embed(found)
        except Crash:
            done = self.steps.encoded[:-1] if where == "encoder" else self.steps.encoded
            self.journal |= {(self.model, text) for text in done if not is_too_long(text, self.model)}
            return None
        finally:
            self.dies, self.left = False, float("inf")

    def check_vector(self, vector: np.ndarray, text: str, model: int) -> None:
        assert np.array_equal(vector, draw_vector(text, str(model))), text

    def _encode(self, text: str, model: str) -> np.ndarray:
        if self.left <= 0:
            raise Crash("encoder")
        self.left -= 1
        return draw_vector(text, model)

    def _check(self) -> None:
        super()._check()
        assert verify_table(str(self.table)) == []


class SteppedJoins(SteppedRuns):
    joins = True


@contextlib.contextmanager
def break_commit(where: str) -> Iterator[None]:
    if where == "encoder":
        yield
        return
    when, _, what = where.partition(" ")
    name = {"placing": "place_files", "the pointer": "make_live"}[what]
    step = getattr(pipeline.tables.folder, name)

    def broken(*arguments: Any) -> None:
        if when == "after":
            step(*arguments)
        raise Crash(where)

    with mock.patch.object(pipeline.tables.folder, name, broken):
        yield


@contextlib.contextmanager
def leave_everything() -> Iterator[None]:
    """A dead process removes no file and writes none."""
    keeps = mock.Mock(rmtree=lambda *arguments, **more: None)
    with (
        mock.patch.object(pipeline.run.job, "abandon_attempt", lambda *arguments: ""),
        mock.patch.object(pipeline.run.job, "flush_journals", lambda: None),
        mock.patch.object(pipeline.run.job, "shutil", keeps),
    ):
        yield


def try_histories(machine: type[Histories], n: int, n_steps: int, is_random: bool) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=n,
            stateful_step_count=n_steps,
            deadline=None,
            derandomize=not is_random,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],  # failures are not shrunk, which would take hours of runs
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.parametrize("machine", [SteppedRuns, SteppedJoins])
def test_whatever_happens_the_table_is_right_step_by_step(machine):
    try_histories(machine, 25, 20, is_random=False)


def test_whatever_happens_the_table_is_right():
    try_histories(WholeRuns, 2, 8, is_random=False)


N_HISTORIES = int(os.environ.get("EMBEAM_HISTORIES", "10"))


@pytest.mark.history
@pytest.mark.timeout(max(120, 40 * N_HISTORIES))
@pytest.mark.parametrize("machine", [WholeRuns, WholeJoins, SteppedRuns, SteppedJoins])
def test_whatever_happens_the_table_is_right_in_many_histories(machine):
    try_histories(machine, N_HISTORIES if issubclass(machine, WholeRuns) else 10 * N_HISTORIES, 30, is_random=True)
