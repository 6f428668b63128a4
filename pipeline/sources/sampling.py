"""Samples the first records of the input before a run: types of its fields, and about how many documents it has."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.errors import ConfigError
from pipeline.read_config import KeptField, ReadConfig
from pipeline.records import Document, SkippedFile
from pipeline.sources import SOURCES
from pipeline.sources.compression import FileError, WrongColumns
from pipeline.sources.field_paths import MISSING, find_nearest, find_value, list_fields, name_fields, suggest_field
from pipeline.sources.fields import build_document
from pipeline.sources.kept import choose_type, find_kind
from pipeline.sources.partition_fields import add_partition, infer_partition, read_partition
from pipeline.sources.planning import InputPlan
from pipeline.sources.read import explain_bad_files
from pipeline.sources.source import FileRange, InputFile, Record, needed_fields
from pipeline.sources.spelling import parse_spelling

_LOGGER = logging.getLogger(__name__)
SAMPLE_FILES = 10  # of each kind
SAMPLE_ROWS = 200  # of each kind, which are kept, and whose fields are listed
KEPT_CHARACTERS = 1 << 20  # of the records that are kept
SAMPLE_RECORDS, SAMPLE_BYTES = 20_000, 4 << 20  # of each kind of file: whichever comes first, after `SAMPLE_ROWS`


@dataclass
class SampledFields:
    """What the sampled records hold, of files that have fields.

    Attributes:
      n_records: how many good ones there are.
      names: paths of their fields, as keys; of the first records only.
      kinds: of the values of each needed field, as in `kept.HOLDS`; of a field that is nowhere there is no entry.
    """

    n_records: int = 0
    names: dict[str, None] = field(default_factory=dict)
    kinds: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add_record(self, record: Record, needed: Sequence[str], from_strings: bool) -> None:
        """Adds a good record of a file."""
        self.n_records += 1
        if self.n_records <= SAMPLE_ROWS:
            self.names.update(dict.fromkeys(list_fields(record.values)))
        for path in needed:
            value = find_value(record.values, path)
            if value is not MISSING:
                self._add_value(path, parse_spelling(value) if from_strings else value)

    def add_folders(self, file: InputFile, needed: Sequence[str]) -> None:
        """Adds the fields of a file's folders, which are known without reading it."""
        folders = infer_partition(file)
        self.names.update(dict.fromkeys(folders))
        for path in needed:
            if path in folders:
                self._add_value(path, folders[path])

    def _add_value(self, path: str, value: Any) -> None:
        kinds = self.kinds[path]  # a null tells that the field is there
        if value is not None:
            kinds.add(find_kind(value))

    def add_schema(self, described: dict[str, str], needed: Sequence[str]) -> None:
        """Adds what a file says of its own fields."""
        self.names.update(dict.fromkeys(described))
        for path in needed:
            if path in described:
                self.kinds[path].update({described[path]} - {""})


class InputSample(NamedTuple):
    """What the first records of an input show.

    Attributes:
      fields: of the records.
      n_documents: about how many documents the input has.
      records: some of the first good records, and the files that they come from.
    """

    fields: SampledFields
    n_documents: int
    records: list[tuple[InputFile, Record]]

    def build_documents(self, config: ReadConfig, kept: Sequence[KeptField]) -> list[Document]:
        """The documents of the records that are kept."""
        documents = []
        for file, record in self.records:
            source = SOURCES[file.format]
            whole = add_partition(record, read_partition(file, kept, source.values_are_strings))
            document = build_document(whole, file, source, config, kept)
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
    kinds, needed = defaultdict(list), needed_fields(config)
    sample = InputSample(SampledFields(), 0, [])
    for file in plan.files:
        kinds[file.format, file.compression].append(file)
        sample.fields.add_folders(file, needed)
    n_documents = 0.0
    for files in kinds.values():
        n_records, n_bytes = _sample_files(files[:SAMPLE_FILES], config, needed, sample)
        n_documents += sum(file.size for file in files) * n_records / n_bytes
    return sample._replace(n_documents=min(config.limit or round(n_documents), round(n_documents)))


def _sample_files(
    files: Sequence[InputFile], config: ReadConfig, needed: Sequence[str], sample: InputSample
) -> tuple[int, int]:
    """Adds to the sample; returns how many records were read, and how many stored bytes."""
    n_records = n_bytes = n_kept = n_characters = 0
    for file in files:
        source = SOURCES[file.format]
        try:
            sample.fields.add_schema(source.describe_fields(file, config), needed)
        except FileError:
            continue
        for record in read_readable(FileRange.whole(file), config):
            n_records += 1
            if not record.reason and n_kept < SAMPLE_ROWS and n_characters < KEPT_CHARACTERS:
                sample.records.append((file, record))
                n_kept += 1
                n_characters += sum(len(value) for value in record.values.values() if isinstance(value, (str, bytes)))
            if (source.has_fields or file.partition) and not record.reason:
                sample.fields.add_record(record, needed, source.values_are_strings)
            n_read = n_bytes + record.n_read
            if n_records >= SAMPLE_RECORDS or (n_read >= SAMPLE_BYTES and n_records >= SAMPLE_ROWS):
                return n_records, max(n_read, 1)
        n_bytes += file.size
    return n_records, max(n_bytes, 1)


def read_readable(file_range: FileRange, config: ReadConfig) -> Iterator[Record]:
    """The records of a range up to the first error.

    Raises:
      InputError: if the columns of the file are not those that the settings ask for, and such files are not skipped.
    """
    try:
        yield from SOURCES[file_range.file.format].read_records(file_range, config)
    except FileError as error:
        if isinstance(error, WrongColumns) and config.on_bad_file == "fail":
            raise explain_bad_files([SkippedFile.of(file_range.file.source, error)]) from error


def check_fields(fields: SampledFields, config: ReadConfig) -> None:
    """Checks that the sampled records have the fields that the settings name.

    Some records may lack a field, and one of several text fields may be in later records only, unless it looks like a
    misspelt name.

    Raises:
      ConfigError: if the id field, the pair field, a text field or a kept field without a type is in none of them.
    """
    if not fields.n_records:
        return
    needed = [("id_field", config.id_field), ("pair_field", config.pair_field)]
    needed += [("text_field", name) for name in config.text_field]
    has_text = any(name in fields.kinds for name in config.text_field)
    for flag, name in needed:
        if name and name not in fields.kinds:
            missing = f"--{flag}={name} is in none of the first {fields.n_records} rows; they have {_list(fields)}"
            if flag != "text_field" or not has_text or find_nearest(name, fields.names):
                raise ConfigError(f"{missing}; {suggest_field(flag, name, fields.names)}")
            _LOGGER.warning("%s; texts without the field are made of the others", missing)
    for kept in config.kept_fields():
        if kept.source in fields.kinds:
            continue
        missing = f"={kept.source} is in none of the first {fields.n_records} rows; they have {_list(fields)}"
        if not kept.type:
            close = find_nearest(kept.source, fields.names)
            hint = f"; did you mean --keep_fields={close}?" if close else ""
            raise ConfigError(
                f"--keep_fields{missing}{hint}; if it comes later, give its type: --keep_fields={kept.source}:string"
            )
        _LOGGER.warning("--keep_fields%s; rows without the field hold null", missing)


def infer_kept_fields(fields: SampledFields, config: ReadConfig, live: Sequence[KeptField] = ()) -> list[KeptField]:
    """Fills in the types of the kept fields from the sampled records.

    A field of the live table keeps its column and its type if that holds the sampled values, so that the rows stay.

    Args:
      fields: from `sample_input`.
      config: the kept fields, of which some may have a type.
      live: the kept fields of the live table.

    Raises:
      ConfigError: if a field that a setting names is in none of the records.
    """
    check_fields(fields, config)
    known = {kept.source: kept for kept in live}
    found = []
    for kept in config.kept_fields():
        old = known.get(kept.source, kept)
        kind = kept.type or choose_type(fields.kinds.get(kept.source, set()), old.type)
        found.append(old._replace(type=kind))
    return found


def _list(fields: SampledFields) -> str:
    return name_fields(fields.names)
