"""Where documents come from: one file per input format; `planning` cuts the input up and `read` reads it."""

from pipeline.sources.bigquery import BigQuerySource
from pipeline.sources.csv import CsvSource
from pipeline.sources.dead_letters import DeadLetterSource
from pipeline.sources.json_array import JsonArraySource
from pipeline.sources.jsonl import JsonlSource
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.source import Source
from pipeline.sources.text import TextSource
from pipeline.sources.tfrecord import TfrecordSource
from pipeline.sources.warc import WarcSource

SOURCES: dict[str, Source] = {
    "text": TextSource(),
    "jsonl": JsonlSource(),
    "json": JsonArraySource(),
    "csv": CsvSource(",", quote='"'),
    "tsv": CsvSource("\t", quote=""),
    "parquet": ParquetSource(),
    "tfrecord": TfrecordSource(),
    "warc": WarcSource(),
    "bigquery": BigQuerySource(),
    "dead_letters": DeadLetterSource(),
}
