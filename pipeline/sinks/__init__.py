"""Where rows go: one file per table format, which both writes and reads it."""

from pipeline.sinks import parquet, tfrecord

# format -> (file suffix, writer of one file, reader of one file)
SINKS = {
    "tfrecord": (tfrecord.SUFFIX, tfrecord.TfrecordWriter, tfrecord.read_rows),
    "parquet": (parquet.SUFFIX, parquet.ParquetWriter, parquet.read_rows),
}
