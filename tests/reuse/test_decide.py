"""What happens to documents and live rows: a table of cases, and random facts against a model of a few lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reuse.decide import (
    Change,
    DocumentAction,
    ReusePolicy,
    RowAction,
    RowFacts,
    compare_documents,
    count_actions,
    count_changes,
    decide_documents,
    decide_rows,
)

SAME = ReusePolicy(same_fingerprint=True, same_layout=True)
OTHER_LAYOUT = ReusePolicy(same_fingerprint=True, same_layout=False)
OTHER_MODEL = ReusePolicy(same_fingerprint=False, same_layout=True)
LIVE = np.dtype([("content", "S16"), ("kept", "<u8"), ("n_chunks", "<u4")])


class Live(NamedTuple):
    """A live row of a document: text, kept fields, and chunks of the document when it is whole."""

    content: bytes
    kept: int = 0
    n_chunks: int = 1


def compare(documents: list[tuple[bytes, int, list[Live]]], policy: ReusePolicy) -> list[Change]:
    """Compares documents, each a text, its kept fields and the live rows of its id."""
    owner = np.repeat(np.arange(len(documents)), [len(live) for _, _, live in documents])
    rows = np.array([tuple(row) for _, _, live in documents for row in live], LIVE)
    content = np.array([content for content, _, _ in documents], "S16")
    kept = np.array([kept for _, kept, _ in documents], "<u8")
    return [Change(change) for change in compare_documents(content, kept, owner, rows, policy)]


@pytest.mark.parametrize(
    ("live", "policy", "expected"),
    [
        ([], SAME, Change.NEW),
        ([], OTHER_MODEL, Change.NEW),
        ([Live(b"x")], SAME, Change.UNCHANGED),
        ([Live(b"y")], SAME, Change.CHANGED),
        ([Live(b"y")], OTHER_MODEL, Change.CHANGED),
        ([Live(b"x", kept=1)], SAME, Change.UPDATED),
        ([Live(b"x")], OTHER_LAYOUT, Change.UPDATED),
        ([Live(b"x")], OTHER_MODEL, Change.REMADE),
        ([Live(b"x", n_chunks=2)] * 2, SAME, Change.UNCHANGED),
        ([Live(b"x", n_chunks=2)], SAME, Change.CHANGED),  # a chunk was a dead letter
        ([Live(b"x", n_chunks=2), Live(b"y", n_chunks=2)], SAME, Change.CHANGED),
        ([Live(b"x", n_chunks=2), Live(b"x", 1, 2)], SAME, Change.UPDATED),
    ],
)
def test_a_document_is_compared_with_its_live_rows(live, policy, expected):
    assert compare([(b"x", 0, live)], policy) == [expected]


TEXTS = st.sampled_from([b"x", b"y", b"z\0", b"\0z"])
POLICIES = st.builds(ReusePolicy, st.booleans(), st.booleans(), st.booleans())
DOCUMENTS = st.lists(
    st.tuples(
        TEXTS, st.integers(0, 1), st.lists(st.builds(Live, TEXTS, st.integers(0, 1), st.integers(1, 3)), max_size=3)
    )
)


@given(DOCUMENTS, POLICIES)
def test_many_documents_are_compared_as_one_by_one(documents, policy):
    def change(content: bytes, kept: int, live: list[Live]) -> Change:
        if not live:
            return Change.NEW
        if any(row.content != content.rstrip(b"\0") or row.n_chunks != len(live) for row in stored(live)):
            return Change.CHANGED
        if policy.same_fingerprint and policy.same_layout and all(row.kept == kept for row in live):
            return Change.UNCHANGED
        return Change.UPDATED if policy.same_fingerprint else Change.REMADE

    def stored(live: list[Live]) -> list[Live]:
        return [row._replace(content=row.content.rstrip(b"\0")) for row in live]  # as NumPy keeps strings

    expected = [change(*document) for document in documents]
    assert compare(documents, policy) == expected
    counts = count_changes(np.array(expected, np.uint8))
    assert counts == {"documents": len(expected)} | {c.name.lower(): expected.count(c) for c in Change}


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans())))
def test_a_document_is_encoded_only_if_nothing_else_gives_it_rows(documents):
    def action(unchanged: bool, known: bool, first: bool) -> DocumentAction:
        if unchanged:
            return DocumentAction.KEEP
        if known:
            return DocumentAction.REUSE
        return DocumentAction.ENCODE if first else DocumentAction.SHARE

    expected = [action(*document) for document in documents]
    columns = np.array(documents, bool).reshape(-1, 3).T
    actions = decide_documents(*columns)
    assert actions.tolist() == expected
    A = DocumentAction
    names = {"reused": A.REUSE, "encoded": A.ENCODE, "same_text": A.SHARE}
    assert count_actions(actions) == {name: expected.count(action) for name, action in names.items()}


class Facts(NamedTuple):
    """Facts about the documents of some live rows."""

    n_rows: int
    unchanged: bool = False
    seen: bool = False
    dead: bool = False
    incomplete: bool = False
    moved: bool = False
    gone: bool = False


def decide(documents: list[Facts], policy: ReusePolicy) -> tuple[list[RowAction], Counter[str]]:
    rows = [(bytes([i + 1]), *facts[1:]) for i, facts in enumerate(documents) for _ in range(facts.n_rows)]
    columns = list(zip(*rows, strict=True)) or [()] * 7
    facts = RowFacts(np.array(columns[0], "S16"), *(np.array(column, bool) for column in columns[1:]))
    actions, counts = decide_rows(facts, policy)
    return [RowAction(action) for action in actions], counts


KEEPING = ReusePolicy(True, True, keeps_unseen=True)


@pytest.mark.parametrize(
    ("facts", "policy", "expected", "counted"),
    [
        (Facts(1, unchanged=True, seen=True), SAME, RowAction.KEEP, None),
        (Facts(1, unchanged=True, seen=True, dead=True), SAME, RowAction.KEEP, None),  # of a record with its id
        (Facts(1, seen=True), SAME, RowAction.REPLACE, None),
        (Facts(1, seen=True, incomplete=True), SAME, RowAction.REPLACE, None),
        (Facts(1, seen=True, dead=True), SAME, RowAction.KEEP_STALE, "stale"),
        (Facts(1, dead=True), SAME, RowAction.KEEP_STALE, "stale"),
        (Facts(1, incomplete=True), SAME, RowAction.KEEP_STALE, "stale"),
        (Facts(1), SAME, RowAction.DELETE, "deleted"),
        (Facts(1, seen=True, gone=True), SAME, RowAction.REPLACE, None),
        (Facts(1, unchanged=True, seen=True, gone=True), SAME, RowAction.KEEP, None),
        (Facts(1, gone=True), KEEPING, RowAction.KEEP_UNSEEN, "kept"),
        (Facts(1), KEEPING, RowAction.KEEP_UNSEEN, "kept"),
        (Facts(1, dead=True), KEEPING, RowAction.KEEP_STALE, "stale"),
        (Facts(1, seen=True, dead=True), OTHER_MODEL, RowAction.DELETE, "lost"),
        (Facts(1, incomplete=True), OTHER_MODEL, RowAction.DELETE, "lost"),
        (Facts(1), OTHER_MODEL, RowAction.DELETE, "deleted"),
        (Facts(1, seen=True), OTHER_MODEL, RowAction.REPLACE, None),
    ],
)
def test_what_happens_to_a_live_row(facts, policy, expected, counted):
    actions, counts = decide([facts], policy)
    assert actions == [expected]
    assert +counts == Counter(live=1) + (Counter([counted]) if counted else Counter())


def test_a_deleted_document_has_moved_if_its_vector_goes_on():
    documents = [Facts(2, moved=True), Facts(1), Facts(1, seen=True, moved=True), Facts(1, dead=True, moved=True)]
    _, counts = decide(documents, SAME)
    assert +counts == Counter(live=4, deleted=2, moved=1, stale=1)


def test_documents_that_are_deleted_with_their_file_are_counted_without_those_that_have_moved():
    documents = [Facts(2, gone=True), Facts(1, gone=True, moved=True), Facts(1), Facts(1, seen=True, gone=True)]
    _, counts = decide(documents, SAME)
    assert +counts == Counter(live=4, deleted=3, moved=1, gone=1)


@given(st.lists(st.builds(Facts, st.integers(1, 3), *[st.booleans()] * 6), max_size=20), POLICIES)
def test_live_rows_are_decided_about_as_the_rules_say(documents, policy):
    expected, counts = [], defaultdict(int, live=len(documents))
    for facts in documents:
        stale = facts.dead or (facts.incomplete and not facts.seen)
        kind = "unchanged" if facts.unchanged else "stale" if stale else "replaced" if facts.seen else "unseen"
        kept = kind == "stale" or (kind == "unseen" and policy.keeps_unseen)
        actions = {"unchanged": RowAction.KEEP, "stale": RowAction.KEEP_STALE, "replaced": RowAction.REPLACE}
        action = actions.get(kind, RowAction.KEEP_UNSEEN if policy.keeps_unseen else RowAction.DELETE)
        names = {RowAction.KEEP_STALE: "stale", RowAction.KEEP_UNSEEN: "kept", RowAction.DELETE: "deleted"}
        if action in names:
            counts[names[action] if policy.same_fingerprint or not kept else "lost"] += 1
        counts["moved"] += action == RowAction.DELETE and facts.moved
        counts["gone"] += action == RowAction.DELETE and facts.gone and not facts.moved
        if not policy.same_fingerprint and (kept or kind == "unchanged"):
            action = RowAction.DELETE
        expected += [action] * facts.n_rows
    actions, found = decide(documents, policy)
    assert actions == expected
    assert +found == +Counter(counts)
