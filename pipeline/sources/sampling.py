"""Samples the first records of the input before a run: types of its fields, and about how many documents it has."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.config import KeptField, ReadConfig
from pipeline.errors import ConfigError, InputError
from pipeline.records import Document
from pipeline.sources import SOURCES
from pipeline.sources.compression import FileError, WrongColumns
from pipeline.sources.fields import build_document, infer_type
from pipeline.sources.partition_fields import infer_partition, read_partition
from pipeline.sources.planning import InputPlan
from pipeline.sources.source import FileRange, InputFile, Record
from pipeline.sources.spelling import parse_spelling

_LOGGER = logging.getLogger(__name__)
SAMPLE_FILES = 10  # of each kind
SAMPLE_ROWS = 200  # whose fields are inspected
KEPT_CHARACTERS = 1 << 20  # of the records that are kept
SAMPLE_RECORDS, SAMPLE_BYTES = 20_000, 4 << 20  # of each kind of file: whichever comes first, after `SAMPLE_ROWS`


class InputSample(NamedTuple):
    """What the first records of an input show.

    Attributes:
      rows: the fields of the first good records, of files that have fields.
      n_documents: about how many documents the input has.
      records: some of the first good records, and the files that they come from.
    """

    rows: list[dict[str, Any]]
    n_documents: int
    records: list[tuple[InputFile, Record]]

    def build_documents(self, config: ReadConfig, kept: Sequence[KeptField]) -> list[Document]:
        """The documents of the records that are kept."""
        documents = []
        for file, record in self.records:
            source = SOURCES[file.format]
            values = read_partition(file, kept, source.values_are_strings) | dict(record.values)
            document = build_document(record._replace(values=values), file, source, config, kept)
            documents += [document] if isinstance(document, Document) else []
        return documents


def sample_input(plan: InputPlan, config: ReadConfig) -> InputSample:
    """Reads the first records of the first files of each kind.

    Args:
      plan: the input; files that cannot be read are skipped; `--on_bad_file` decides about them later.
      config: as for reading; a limit caps the number of documents.

    Raises:
      InputError: if a file of a column format lacks the id or a text column, and such files are not skipped.
    """
    kinds = defaultdict(list)
    for file in plan.files:
        kinds[file.format, file.compression].append(file)
    sample = InputSample([], 0, [])
    n_documents = 0.0
    for files in kinds.values():
        n_records, n_bytes = _sample_files(files[:SAMPLE_FILES], config, sample)
        n_documents += sum(file.size for file in files) * n_records / n_bytes
    return sample._replace(n_documents=min(config.limit or round(n_documents), round(n_documents)))


def _sample_files(files: Sequence[InputFile], config: ReadConfig, sample: InputSample) -> tuple[int, int]:
    """Adds to the sample; returns how many records were read, and how many stored bytes."""
    rows = sample.rows
    n_records = n_bytes = n_kept = n_characters = 0
    for file in files:
        source = SOURCES[file.format]
        for record in read_readable(FileRange.whole(file), config):
            n_records += 1
            if not record.reason and n_kept < SAMPLE_ROWS and n_characters < KEPT_CHARACTERS:
                sample.records.append((file, record))
                n_kept += 1
                n_characters += sum(len(value) for value in record.values.values() if isinstance(value, (str, bytes)))
            if (source.has_fields or file.partition) and len(rows) < SAMPLE_ROWS:
                if record.reason == "missing_field" and config.on_bad_file == "fail":
                    raise InputError(f"{file.path}: {record.message}")
                if not record.reason:
                    values = dict(record.values)
                    rows.append(
                        infer_partition(file) | (_parse_strings(values) if source.values_are_strings else values)
                    )
            n_read = n_bytes + record.n_read
            if n_records >= SAMPLE_RECORDS or (n_read >= SAMPLE_BYTES and n_records >= SAMPLE_ROWS):
                return n_records, max(n_read, 1)
        n_bytes += file.size
    return n_records, n_bytes


def read_readable(file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
    """The records of a range up to the first error.

    Raises:
      InputError: if the columns of the file are not those that the settings ask for.
    """
    try:
        yield from SOURCES[file_range.file.format].read_records(file_range, config)
    except WrongColumns as error:
        raise InputError(str(error)) from error
    except FileError:
        return


def infer_kept_fields(rows: Sequence[dict[str, Any]], config: ReadConfig) -> list[KeptField]:
    """Fills in the types of the kept fields from the first rows, and checks that the columns exist.

    A field whose type is given need not be in the first rows: it may come later.

    Args:
      rows: from `sample_input`.
      config: the kept fields, of which some may have a type.

    Raises:
      ConfigError: if the pair field or a kept field without a type is in none of the rows, or holds something that
        cannot be kept.
    """
    kept = config.kept_fields()
    typed = {field.name for field in kept if field.type}
    values = {name: [row[name] for row in rows if name in row] for name in [config.pair_field, *(f.name for f in kept)]}
    for name, found in values.items():
        if not name or not rows or found:
            continue
        there = ", ".join(sorted({str(key) for row in rows for key in row})[:20]) or "none"
        missing = f"={name} is in none of the first {len(rows)} rows; they have {there}"
        if name == config.pair_field:
            raise ConfigError(f"--pair_field{missing}")
        if name not in typed:
            raise ConfigError(f"--keep_fields{missing}; if it comes later, give its type: --keep_fields={name}:string")
        _LOGGER.warning("--keep_fields%s; rows without the field hold null", missing)
    return [field if field.type else KeptField(field.name, _infer_field(field.name, values)) for field in kept]


def _infer_field(name: str, values: dict[str, list[Any]]) -> str:
    kind = infer_type(values.get(name, []))
    if not kind:
        raise ConfigError(f"--keep_fields={name} holds lists, objects or dates; keep string, int, float or bool fields")
    return kind


def _parse_strings(row: dict[str, str]) -> dict[str, Any]:
    """Converts cells of a text format to the values that their spelling suggests."""
    return {name: parse_spelling(value) for name, value in row.items()}
