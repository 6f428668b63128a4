"""What is read: the files and tables of the input, their formats, and the fields of their records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.errors import ConfigError
from pipeline.settings import CheckedConfig, check_encoding, parse_character, setting

MIB = 1 << 20
FIELD_TYPES = ("string", "int", "float", "bool")


class KeptField(NamedTuple):
    """A field of the input that is copied to the table.

    Attributes:
      name: of the column.
      type: one of `FIELD_TYPES`; empty until it is inferred.
      path: of the field, where its name cannot be the column's: it has dots, as nested fields have.
    """

    name: str
    type: str = ""
    path: str = ""

    @property
    def source(self) -> str:
        """The field's name in the input, or its path."""
        return self.path or self.name

    @classmethod
    def parse(cls, text: str) -> KeptField:
        name, _, kind = text.partition(":")
        if not name or (kind and kind not in FIELD_TYPES):
            raise ConfigError(f"--keep_fields={text} is not name or name:type; the types are {', '.join(FIELD_TYPES)}")
        return cls(name.replace(".", "_"), kind, name if "." in name else "")


@dataclass(frozen=True)
class ReadConfig(CheckedConfig):
    """Input"""

    input: tuple[str, ...] = setting(
        "file, glob, folder or bq://PROJECT.DATASET.TABLE to read, or - for standard input; may be given several times",
        (),
        metavar="GLOB",
    )
    exclude: tuple[str, ...] = setting(
        "files or folders of the input to leave out: a name such as '*.md', or a path; may be given several times",
        (),
        metavar="GLOB",
    )
    on_bad_file: str = setting(
        "what to do with a file that cannot be read to its end: skip keeps the rows that the table has from it",
        "fail",
        ("fail", "skip"),
    )
    query: str = setting("BigQuery query whose rows are the input, instead of --input", "", metavar="SQL")
    query_dataset: str = setting(
        "dataset in which the rows of --query are kept for two days", "", metavar="PROJECT.DATASET"
    )
    row_restriction: str = setting(
        "condition in SQL on the rows of BigQuery tables, such as day = '2026-01-31'", "", metavar="SQL"
    )
    input_format: str = setting(
        "format of every input: text, jsonl, json (one array), csv, tsv, parquet, tfrecord, warc (also WET); auto goes "
        "by the file's extension",
        "auto",
        ("auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "tfrecord", "warc"),
        metavar="FORMAT",
    )
    encoding: str = setting(
        "encoding of text files, a name that Python knows: utf-8, utf-16, latin-1, cp1252; a byte-order mark in a file "
        "goes first, and UTF-16 and UTF-32 are recognised under utf-8",
        "utf-8",
        metavar="NAME",
    )
    delimiter: str = setting(
        "character between the cells of CSV and TSV files, or tab; default: by format", "", metavar="CHARACTER"
    )
    quote: str = setting(
        'character around cells of CSV and TSV files, or none; default: " in CSV, none in TSV', "", metavar="CHARACTER"
    )
    header: str = setting(
        "whether the first row of CSV and TSV files names the columns; none names them 1, 2, 3 and so on; auto: first, "
        "or none with --columns",
        "auto",
        ("auto", "first", "none"),
    )
    columns: tuple[str, ...] = setting(
        "names of the columns of CSV and TSV files without a header row; with --header=first instead of those in it",
        (),
        metavar="NAMES",
    )
    max_quoted_lines: int = setting(
        "lines that a quoted CSV cell may have; a longer one, or one that seems to hold other rows, is taken for a "
        "stray quote; 0 allows anything",
        1000,
    )
    max_window: int = setting(
        "MiB of memory that decoding a zstd or xz file may take, at most 2048, which files made by zstd --long=31 need",
        128,
    )
    text_mode: str = setting("what one document is in a text file", "line", ("line", "paragraph", "file"))
    id_field: str = setting(
        "field with the document's id, meta.id for a nested one; without it ids are FILE@POSITION", "", metavar="NAME"
    )
    text_field: tuple[str, ...] = setting("field with the text; several are joined by a space: title,body", ("text",))
    pair_field: str = setting("field with a second segment (input_type_ids 1)", "", metavar="NAME")
    keep_fields: tuple[str, ...] = setting(
        "fields to copy into the table: name or name:type, comma-separated", (), metavar="FIELDS"
    )
    on_kept_mismatch: str = setting(
        "what to do with a value of --keep_fields that does not fit its column's type: store null, and count it, or "
        "make a dead letter of the document",
        "null",
        ("null", "dead_letter"),
    )
    limit: int = setting("read at most this many documents, for a trial run; 0 reads all of them", 0)
    max_document_bytes: int = setting("maximum size of a record; larger ones become dead letters", 10 * MIB)
    on_empty: str = setting("what to do with blank texts", "reject", ("reject", "skip", "embed"))
    split_bytes: int = setting("size of the pieces into which the input is split", 64 * MIB)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("max_document_bytes", "split_bytes")
        check_encoding(self.encoding)
        if self.max_quoted_lines < 0:
            raise ConfigError(f"--max_quoted_lines={self.max_quoted_lines} is negative; use 0 to allow any number")
        if not 1 <= self.max_window <= 2048:
            raise ConfigError(f"--max_window={self.max_window} is not a number of MiB from 1 to 2048")
        delimiter = parse_character("delimiter", self.delimiter) if self.delimiter else ""
        quote = parse_character("quote", self.quote) if self.quote not in ("", "none") else ""
        if quote and quote == delimiter:
            raise ConfigError(
                f"--quote={self.quote} is also the --delimiter; use --quote=none for files without quotes"
            )
        if repeated := [name for name in self.columns if self.columns.count(name) > 1]:
            raise ConfigError(f"--columns names {repeated[0]!r} twice; give each column a name of its own")
        if self.limit < 0:
            raise ConfigError(f"--limit={self.limit} is negative; leave it out to read everything")
        if self.query and self.input:
            raise ConfigError("--query and --input are both given; a run reads one or the other")
        if self.query and self.query_dataset.count(".") != 1:
            raise ConfigError(
                "--query needs a dataset for its rows; add --query_dataset=PROJECT.DATASET, one that may be written to"
            )
        if not self.text_field:
            raise ConfigError("--text_field is empty; name the field that holds the text")
        kept = self.kept_fields()
        names = [f.name for f in kept]
        reserved = {"id", "chunk", "n_chunks", "embedding", "scale", "n_tokens", "n_truncated", "content_hash", "text"}
        reserved |= {"char_start", "char_end", "n_unknown"}
        for field in kept:
            name = field.name
            if name in reserved:
                fix = "use --keep_text" if name == "text" else "rename it in the input"
                raise ConfigError(
                    f"--keep_fields={field.source} would collide with the table's own field {name!r}; {fix}"
                )
            if names.count(name) > 1:
                dotted = next((f", since the dots of {f.path} become _" for f in kept if f.name == name and f.path), "")
                raise ConfigError(f"--keep_fields names {name!r} twice{dotted}; name it once")

    def kept_fields(self) -> list[KeptField]:
        return [KeptField.parse(text) for text in self.keep_fields]
