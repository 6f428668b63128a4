"""Reads dead letters of an earlier run to retry them: those with their document become documents, others stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Union

from pipeline.read_config import ReadConfig
from pipeline.records import DeadLetter, Document, Origin, pack_kept
from pipeline.sources.jsonl import JsonlSource
from pipeline.sources.source import FileRange, Record

RETRIED_STAGES = ("preprocess", "encode")  # documents that could not be read are retried by reading the input


class DeadLetterSource(JsonlSource):
    """The JSON lines that `DeadLetterWriter` writes."""

    def read_records(self, file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
        seen: set[str] = set()
        for record in super().read_records(file_range, config):
            if is_complete(record.values):
                if record.values["id"] in seen:  # another chunk of the same document
                    continue
                seen.add(record.values["id"])
            yield record

    def restore(self, record: Record) -> Union[Document, DeadLetter]:
        """The document that a dead letter holds, or the dead letter as it was."""
        values = record.values
        origin = read_origin(values)
        if not is_complete(values):
            facts = values["stage"], values["reason"], values["message"]
            return DeadLetter(*facts, origin, values["id"], values.get("text"))
        return Document(values["id"], values["text"], values.get("pair"), pack_kept(values.get("kept", ())), origin)


def read_origin(values: Mapping[str, Any]) -> Origin:
    """Where the document of a stored dead letter came from."""
    unit = "byte" if "byte" in values else "row"
    return Origin(values["file"], values[unit], unit)


def is_complete(values: Any) -> bool:
    """Whether a dead letter holds everything that a retry needs."""
    return values.get("stage") in RETRIED_STAGES and "text" in values and values.get("id") is not None
