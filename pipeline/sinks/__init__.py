"""Where rows go: one file per table format, which both writes and reads it."""

from pipeline.sinks import parquet, tfrecord
from pipeline.sinks.table_format import TableFormat

SINKS: dict[str, TableFormat] = {
    "tfrecord": TableFormat(
        tfrecord.SUFFIX,
        tfrecord.TfrecordWriter,
        tfrecord.read_stored,
        tfrecord.select_stored,
        tfrecord.decode_stored,
    ),
    "parquet": TableFormat(
        parquet.SUFFIX,
        parquet.ParquetWriter,
        parquet.read_stored,
        parquet.select_stored,
        parquet.decode_stored,
    ),
}
