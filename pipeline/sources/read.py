"""Reads a planned input: splits -> documents, dead letters and counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput

from pipeline import metrics
from pipeline.errors import ConfigError, InputError, as_line
from pipeline.read_config import KeptField, ReadConfig
from pipeline.records import KEPT_NULLS, BundleCounts, DeadLetter, Document, SkippedFile
from pipeline.sources import SOURCES
from pipeline.sources.compression import FileError
from pipeline.sources.duplicates import reject_duplicate, scan_through_files, select_duplicates
from pipeline.sources.fields import build_document
from pipeline.sources.partition_fields import add_partition, read_partition
from pipeline.sources.planning import InputPlan
from pipeline.sources.source import FileRange

PROGRESS_EVERY = 256

# Called with the numbers of documents and stored bytes that were read since the last call; picklable.
Progress = Callable[[int, int], None]


class Item(NamedTuple):
    """The result of one record, and how many stored bytes of its range were read with it."""

    outcome: Union[Document, DeadLetter, SkippedFile, None]
    n_read: int


def read_range(
    file_range: FileRange,
    config: ReadConfig,
    kept_fields: Sequence[KeptField],
    kept_nulls: Optional[Counter[str]] = None,
) -> Iterator[Item]:
    """Reads one range.

    A file that ends early or is damaged gives what can be read, and then a `SkippedFile` with `--on_bad_file=skip`.

    Args:
      file_range: what to read.
      config: names of the fields and rules for records.
      kept_fields: the fields to keep, with their types.
      kept_nulls: counts, by kept field, the values that became null because they do not fit.

    Raises:
      InputError: at that place with `--on_bad_file=fail`.
    """
    file = file_range.file
    source = SOURCES[file.format]
    folders = read_partition(file, kept_fields, source.values_are_strings)
    try:
        for record in source.read_records(file_range, config):
            record = add_partition(record, folders)
            n_read = min(record.n_read, file_range.n_bytes)
            restored = None if record.reason else source.restore(record)
            outcome = restored or build_document(record, file, source, config, kept_fields, kept_nulls)
            yield Item(outcome, n_read)
    except FileError as error:
        bad = SkippedFile.of(file.source or file.path, error)
        if config.on_bad_file == "fail":
            raise explain_bad_files([bad]) from error
        yield Item(bad, file_range.n_bytes)


def explain_bad_files(files: Sequence[SkippedFile]) -> InputError:
    """The error of files that cannot be read; it names the first."""
    first, many = files[0], f"{len(files):,} input files cannot be read, the first is " if len(files) > 1 else ""
    return InputError(
        f"{many}{as_line(str(first))}; nothing is published. Repair the file, or go on without it "
        "and keep the rows that the table has from it: --on_bad_file=skip"
    )


class ReadSplit(beam.DoFn):
    """Reads one split; yields documents as they are read, and counts at the end."""

    def __init__(
        self, config: ReadConfig, kept_fields: Sequence[KeptField] = (), progress: Optional[Progress] = None
    ) -> None:
        self._config = config
        self._kept_fields = tuple(kept_fields)
        self._progress = progress

    def process(self, split: tuple[FileRange, ...], duplicates: Any = None) -> Iterator[Any]:
        counts: Counter[str] = Counter(records=0, bytes=0, documents=0, dead_letters=0, skipped_empty=0)
        kept_nulls: Counter[str] = Counter()
        reported: Counter[str] = Counter()
        seconds, since = 0.0, time.perf_counter()
        for outcome in self._read_outcomes(split, duplicates, counts, kept_nulls):
            if isinstance(outcome, SkippedFile):
                yield TaggedOutput("bad_files", outcome)
                continue
            # Also before a dead letter: the share of dead letters is computed from the reported documents.
            if isinstance(outcome, DeadLetter) or counts["documents"] - reported["documents"] >= PROGRESS_EVERY:
                self._report(counts, reported)
            if outcome is not None:
                seconds += time.perf_counter() - since  # the consumer of the document runs until the next line
                yield TaggedOutput("dead_letters", outcome) if isinstance(outcome, DeadLetter) else outcome
                since = time.perf_counter()
        self._report(counts, reported)
        seconds += time.perf_counter() - since
        yield TaggedOutput("bundle_counts", BundleCounts.of("read", {**counts, "read_seconds": seconds}))
        if kept_nulls:
            yield TaggedOutput("bundle_counts", BundleCounts.of(KEPT_NULLS, kept_nulls))

    def list_ids(self, split: tuple[FileRange, ...]) -> Iterator[tuple[FileRange, str, int]]:
        """Yields range, id and position of each document, for the search for duplicates."""
        n_left = self._config.limit or -1
        for file_range in split:
            for item in read_range(file_range, self._config, self._kept_fields):
                if isinstance(item.outcome, Document):
                    yield file_range, item.outcome.id, item.outcome.origin.position
                    n_left -= 1
                    if not n_left:
                        return

    def _read_outcomes(
        self, split: tuple[FileRange, ...], duplicates: Any, counts: Counter[str], kept_nulls: Counter[str]
    ) -> Iterator[Union[Document, DeadLetter, SkippedFile, None]]:
        n_left = self._config.limit or -1
        for file_range in split:
            cursor = select_duplicates(duplicates, file_range)
            bytes_before = counts["bytes"]
            for outcome, n_read in read_range(file_range, self._config, self._kept_fields, kept_nulls):
                counts["bytes"] = bytes_before + n_read
                if isinstance(outcome, SkippedFile):
                    yield outcome
                    continue
                counts["records"] += 1
                if isinstance(outcome, Document):
                    n_left -= 1
                    if cursor and cursor.drops(outcome.origin.position):
                        outcome = reject_duplicate(outcome)
                counts[_count_name(outcome)] += 1
                yield outcome
                if not n_left:
                    return
            counts["bytes"] = bytes_before + file_range.n_bytes

    def _report(self, counts: Counter[str], reported: Counter[str]) -> None:
        more = {name: counts[name] - reported[name] for name in ("documents", "bytes")}
        metrics.DOCUMENTS.inc(more["documents"])
        metrics.READ_BYTES.inc(more["bytes"])
        reported.update(more)
        if self._progress:
            self._progress(more["documents"], more["bytes"])


def _count_name(outcome: Union[Document, DeadLetter, None]) -> str:
    if outcome is None:
        return "skipped_empty"
    return "documents" if isinstance(outcome, Document) else "dead_letters"


class ReadInput(NamedTuple):
    """What `ReadDocuments` gives."""

    documents: beam.PCollection  # of Document
    dead_letters: beam.PCollection  # of DeadLetter
    bundle_counts: beam.PCollection  # of BundleCounts
    bad_files: beam.PCollection  # of SkippedFile; a file of several ranges may occur several times


@dataclass(eq=False)
class ReadDocuments(beam.PTransform):
    """Reads a planned input: pipeline -> ReadInput.

    Args:
      plan: from `plan_input`.
      config: names of the fields and rules for records.
      kept_fields: from `infer_kept_fields`.
      work_dir: existing folder on any file system that all workers see, for scratch files of the search for duplicate
        ids; needed with an id field unless `distributed`. The caller removes it after the run.
      distributed: whether a later step finds duplicate ids by a shuffle.
      progress: called every few hundred documents with how many more documents and stored bytes were read.

    Raises:
      ConfigError: if there is an id field, but neither a work folder nor a distributed engine.
    """

    plan: InputPlan
    config: ReadConfig
    kept_fields: Sequence[KeptField] = ()
    work_dir: str = ""
    distributed: bool = False
    progress: Optional[Progress] = None

    def __post_init__(self) -> None:
        if self.config.id_field and not self.distributed and not self.work_dir:
            raise ConfigError(f"--id_field={self.config.id_field} needs a work folder to look for duplicate ids in")

    def expand(self, begin: beam.pvalue.PBegin) -> ReadInput:
        splits = begin | "Splits" >> beam.Create(self.plan.splits).with_output_types(Any)
        read = ReadSplit(self.config, self.kept_fields, self.progress)
        duplicates = None
        if self.config.id_field and not self.distributed:
            duplicates = scan_through_files(splits, read.list_ids, self.work_dir)
        typed = beam.ParDo(read, duplicates).with_output_types(
            Document, dead_letters=DeadLetter, bundle_counts=BundleCounts, bad_files=SkippedFile
        )
        outputs = splits | "Read" >> typed.with_outputs("dead_letters", "bundle_counts", "bad_files", main="documents")
        planned = begin | "UnreadableFiles" >> beam.Create(self.plan.bad_files, reshuffle=False).with_output_types(
            SkippedFile
        )
        bad_files = (planned, outputs.bad_files) | "BadFiles" >> beam.Flatten()
        return ReadInput(outputs.documents, outputs.dead_letters, outputs.bundle_counts, bad_files)
