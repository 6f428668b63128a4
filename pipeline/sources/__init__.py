"""Where documents come from: one file per input format; `planning` cuts the input up and `read` reads it."""

from pipeline.sources.bigquery import BigQuerySource
from pipeline.sources.csv import CsvSource
from pipeline.sources.dead_letters import DeadLetterSource
from pipeline.sources.jsonl import JsonlSource
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.source import Source
from pipeline.sources.text import TextSource
from pipeline.sources.tfrecord import TfrecordSource

SOURCES: dict[str, Source] = {
    "text": TextSource(),
    "jsonl": JsonlSource(),
    "csv": CsvSource(","),
    "tsv": CsvSource("\t"),
    "parquet": ParquetSource(),
    "tfrecord": TfrecordSource(),
    "bigquery": BigQuerySource(),
    "dead_letters": DeadLetterSource(),
}
