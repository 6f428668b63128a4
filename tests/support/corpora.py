"""Small corpora."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.official import vocabulary


def some_texts(n: int, seed: int = 1, words: tuple[int, int] = (1, 60)) -> list[str]:
    """Texts of whole and unknown words, of many lengths and scripts."""
    rng = np.random.default_rng(seed)
    pieces = [piece for piece in vocabulary() if piece.isalpha()] + [
        "Émile",
        "zyzzyva",
        "東京",
        "it's",
        "3.14",
        "[SEP]",
    ]
    return [" ".join(rng.choice(pieces, rng.integers(*words))) for _ in range(n)]


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def as_records(texts: Iterable[str]) -> list[dict[str, str]]:
    """Texts as records whose ids are their numbers."""
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


def write_lines(path: Path, *lines: bytes | str) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def change(records: Sequence[Mapping[str, Any]], **texts: str) -> list[dict[str, Any]]:
    """Records with other texts, by `n` and id; an id that is not there is added."""
    by_id = {record["id"]: dict(record) for record in records}
    for name, text in texts.items():
        by_id[name[1:]] = {**by_id.get(name[1:], {"id": name[1:]}), "text": text}
    return list(by_id.values())
