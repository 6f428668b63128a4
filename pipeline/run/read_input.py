"""Reads a planned input in this process, and records which documents its dead letters stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from apache_beam.pvalue import TaggedOutput

from pipeline.read_config import KeptField, ReadConfig
from pipeline.records import BundleCounts, DeadLetter, Document, SkippedFile, digest_id
from pipeline.sources.duplicates import ScanToFile, merge_scans
from pipeline.sources.planning import InputPlan
from pipeline.sources.read import ReadSplit


def read_outcomes(
    found: InputPlan, config: ReadConfig, kept: Sequence[KeptField], work: str
) -> Iterator[Document | DeadLetter | SkippedFile | BundleCounts]:
    """Reads a planned input as a run does: documents, dead letters, files that cannot be read, and counts.

    Args:
      found: from `plan_input`.
      config: as for `ReadDocuments`; files that cannot be read are skipped whatever it says.
      kept: the kept fields with their types.
      work: local folder for the search for duplicate ids.
    """
    yield from found.bad_files
    read = ReadSplit(replace(config, on_bad_file="skip"), kept)
    duplicates = None
    if config.id_field:
        scan = ScanToFile(read.list_ids, work)
        duplicates = merge_scans(None, [path for split in found.splits for path in scan.process(split)], work)
    for split in found.splits:
        for output in read.process(split, duplicates):
            yield output.value if isinstance(output, TaggedOutput) else output


class Accounts(NamedTuple):
    """Documents without rows for which a dead letter is the reason: by digest of the id, or by incomplete file.

    A file is incomplete if it could not be read to its end, or has a record whose id could not be read.
    """

    ids: set[bytes]
    incomplete_files: set[str]

    def add(self, document_id: str | None, reason: str, path: str) -> None:
        if document_id is None:
            self.incomplete_files.add(path)
        elif reason != "duplicate_id":  # the earlier document with this id counts
            self.ids.add(digest_id(document_id).rstrip(b"\0"))  # as NumPy gives it
