"""Dead letters as JSON lines."""

from __future__ import annotations

import hashlib
import io
import json

import pytest

from pipeline.records import DeadLetter, Origin
from pipeline.sinks.writing import DeadLetterFormat

DEAD_LETTERS = [
    DeadLetter("read", "wrong_type", "a list", Origin("a.jsonl", 17, "byte"), "a"),
    DeadLetter("read", "malformed_json", "cut", Origin("a.jsonl", 40, "byte"), text='{"my secret'),
    DeadLetter("encode", "not_finite", "NaN", Origin("b.csv", 3), "b", "my secret \udc00", "c0", "my secret", b"[1]"),
]


@pytest.mark.parametrize("text", ["full", "hash", "none"])
def test_dead_letters_hold_as_much_of_a_text_as_is_asked_for(text):
    stream = io.BytesIO()
    writer = DeadLetterFormat(text).open(stream)
    writer.write(DEAD_LETTERS)
    writer.close()
    found = [json.loads(line) for line in stream.getvalue().decode().splitlines()]
    assert [dead_letter["reason"] for dead_letter in found] == [dead_letter.reason for dead_letter in DEAD_LETTERS]
    assert [dead_letter.get("byte", dead_letter.get("row")) for dead_letter in found] == [17, 40, 3]
    assert [dead_letter.get("content_hash") for dead_letter in found] == [None, None, "c0"]
    if text == "full":
        assert [dead_letter.get("text") for dead_letter in found] == [dead_letter.text for dead_letter in DEAD_LETTERS]
        assert (found[2]["pair"], found[2]["kept"]) == ("my secret", [1])
        return
    assert "my secret" not in json.dumps(found)
    assert not any({"text", "pair", "kept"} & set(dead_letter) for dead_letter in found)
    digest = hashlib.sha256(b'{"my secret').hexdigest()
    assert found[1].get("text_sha256") == (digest if text == "hash" else None)
    assert len(found[2].get("text_sha256", "")) == (64 if text == "hash" else 0)
