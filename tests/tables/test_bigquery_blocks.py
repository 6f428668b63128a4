"""The blocks for BigQuery: names; against emulators the table as a source, Beam's sink, and the merge behind it."""

import datetime
import json

import apache_beam as beam
import pytest
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pvalue import AsList

from pipeline.engines.runner import make_runner
from pipeline.errors import ConfigError, InputError
from pipeline.read_config import ReadConfig
from pipeline.sources.bigquery import BigQuerySource, materialize_query, measure_table, require_id_field
from pipeline.sources.bigquery_client import BigQueryName, LoadParameters, client
from pipeline.sources.source import FileRange, InputFile
from pipeline.tables.bigquery_sql import make_merge
from tests.support.bigquery import start_bigquery
from tests.support.emulators import start_gcs

emulator = pytest.mark.emulator
N_DOCUMENTS = 4000
NOON = datetime.datetime(2026, 3, 4, 12, 0, 0, 891234, tzinfo=datetime.UTC)
COLUMNS = {
    "id": "STRING",
    "chunk": "INT64",
    "embedding": "FLOAT64 REPEATED",
    "embedded_at": "TIMESTAMP",
    "year": "INT64",
    "score": "FLOAT64",
    "flag": "BOOL",
}


@pytest.fixture(scope="module")
def dataset():
    """A dataset's name, as `project.dataset`; all of this process goes to the emulators."""
    with start_gcs() as gcs, start_bigquery(gcs) as bigquery, bigquery.used_here():
        client().create_dataset("blocks")
        yield f"{bigquery.project}.blocks", gcs


@pytest.fixture(scope="module")
def documents(dataset):
    """A table of documents that is large enough for several streams."""
    name = name_table(dataset, "documents")
    query(
        f"""CREATE TABLE {name.sql} AS
        SELECT CONCAT('document ', x) AS id, REPEAT(CONCAT('text ', x, ' é '), 40) AS text, x AS number, x / 7 AS ratio,
          MOD(x, 2) = 0 AS even, IF(x = 3, NULL, 'en') AS language, [x, x + 1] AS parts, DATE '2026-01-02' AS day
        FROM UNNEST(GENERATE_ARRAY(0, {N_DOCUMENTS - 1})) AS x"""
    )
    return name


def name_table(dataset, table):
    return BigQueryName(*dataset[0].split("."), table)


def query(sql):
    return [dict(row) for row in client().query(sql).result()]


def split(name, config):
    file = InputFile(0, str(name), name.table, measure_table(name, config), "bigquery")
    return BigQuerySource().split_file(file, config)


def read(ranges, config):
    return [record for file_range in ranges for record in BigQuerySource().read_records(file_range, config)]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("bq://my-project.my_dataset.my-table_1", ("my-project", "my_dataset", "my-table_1")),
        ("bq://example.com:my-project.data.rows", ("example.com:my-project", "data", "rows")),
    ],
)
def test_names_of_tables(text, parts):
    name = BigQueryName.parse(text)
    assert name == parts and str(name) == text
    assert name.sql == f"`{text[5:]}`" and name.resource == "projects/{}/datasets/{}/tables/{}".format(*parts)


def test_beams_name_of_a_table_is_one_that_beam_takes():
    from apache_beam.io.gcp.bigquery_tools import parse_table_reference

    for name in (BigQueryName("my-project", "data", "rows"), BigQueryName("example.com:my-project", "data", "my-rows")):
        found = parse_table_reference(name.beam)
        assert (found.projectId, found.datasetId, found.tableId) == name


@pytest.mark.parametrize(
    "text",
    [
        "my-project.data.rows",
        "bq://data.rows",
        "bq://my-project.data.rows.more",
        "bq://my-project.my-data.rows",
        "bq://my-project.data.rows_*",
        "bq://my-project.data.`rows`",
        "bq://my_project.data.rows",
        "bq://",
    ],
)
def test_what_is_no_name(text):
    with pytest.raises(ConfigError) as error:
        BigQueryName.parse(text, flag="output")
    assert str(error.value).startswith(f"--output={text} is not a table name") and "bq://my-project." in str(
        error.value
    )


@emulator
def test_a_table_is_read_in_streams(dataset, documents):
    config = ReadConfig(id_field="id", keep_fields=("number", "ratio", "even", "language"), split_bytes=200_000)
    ranges = split(documents, config)
    assert len(ranges) > 2 and [r.start for r in ranges] == list(range(len(ranges)))
    records = read(ranges, config)
    wanted = query(f"SELECT id, text, number, ratio, even, language FROM {documents.sql} ORDER BY number")
    assert sorted((dict(r.values) for r in records), key=lambda row: row["number"]) == wanted
    assert {type(value) for record in records for value in record.values.values()} == {
        str,
        int,
        float,
        bool,
        type(None),
    }
    assert len({record.position for record in records}) == N_DOCUMENTS
    for file_range in ranges:
        first, again = read([file_range], config), read([file_range], config)
        assert first == again
        assert [r.position for r in first] == sorted(r.position for r in first)
        assert [r.n_read for r in first] == sorted(r.n_read for r in first)
        assert first[-1].n_read == file_range.n_bytes


@emulator
def test_a_session_shows_the_table_as_it_was(dataset, documents):
    config = ReadConfig(id_field="id")
    name = documents._replace(table="changing")
    query(f"CREATE TABLE {name.sql} AS SELECT id, text FROM {documents.sql}")
    ranges = split(name, config)
    query(f"DELETE FROM {name.sql} WHERE TRUE")
    assert len(read(ranges, config)) == N_DOCUMENTS
    assert measure_table(name, config) == 0 and split(name, config) == []


@emulator
def test_a_condition_and_a_query(dataset, documents):
    config = ReadConfig(id_field="id")
    object.__setattr__(config, "row_restriction", "number < 5 AND language IS NOT NULL")
    whole = FileRange.whole(InputFile(0, str(documents), "documents", 1, "bigquery"))
    assert [r.values["id"] for r in read([whole], config)] == [f"document {i}" for i in (0, 1, 2, 4)]
    into = documents._replace(table="of_a_query")
    materialize_query(f"WITH d AS (SELECT * FROM {documents.sql}) SELECT id, text FROM d WHERE even -- some\n;", into)
    assert len(read(split(into, ReadConfig(id_field="id")), ReadConfig(id_field="id"))) == N_DOCUMENTS // 2
    with pytest.raises(InputError, match="the query for the input fails"):
        materialize_query("SELECT nothing", into)


@emulator
def test_what_cannot_be_read(dataset, documents):
    with pytest.raises(ConfigError, match=r"no lasting order.*--id_field=id"):
        require_id_field(str(documents), ReadConfig())
    with pytest.raises(InputError, match=r"column 'body' is missing.*--text_field"):
        split(documents, ReadConfig(id_field="id", text_field=("body",)))
    with pytest.raises(InputError, match=r"--input=bq://embeam-test\.blocks\.none cannot be read"):
        split(documents._replace(table="none"), ReadConfig(id_field="id"))
    gone = InputFile(0, str(documents), "projects/p/locations/US/sessions/s/streams/0", 1, "bigquery")
    with pytest.raises(InputError, match="could not be read to its end"):
        read([FileRange(gone, 0, 1, 1)], ReadConfig(id_field="id"))


def make_schema(*more):
    fields = [(name, *kind.split()) for name, kind in COLUMNS.items()]
    return {"fields": [dict(zip(("name", "type", "mode"), field, strict=False)) for field in (*fields, *more)]}


def make_row(number, n_chunks, year):
    """Chunks of one document, as dictionaries."""
    return [
        {
            "id": f"document {number} é",
            "chunk": chunk,
            "embedding": [number + chunk / 8 + j / 64 for j in range(64)],
            "embedded_at": NOON + datetime.timedelta(seconds=number),
            "year": year,
            "score": number / 7,
            "flag": (True, False, None)[number % 3],
        }
        for chunk in range(n_chunks)
    ]


def make_marker(number):
    return {"id": f"document {number} é", "embedding": [], "is_marker": True}


def make_staging(dataset, table):
    """An empty table for rows and markers: Beam makes none where there are no rows."""
    from google.cloud import bigquery

    name = name_table(dataset, table)
    fields = [bigquery.SchemaField.from_api_repr(field) for field in make_schema(("is_marker", "BOOL"))["fields"]]
    client().create_table(bigquery.Table(name.plain, fields))
    return name


def load(name, gcs):
    """Beam's sink, as it has to be set up."""
    return beam.io.WriteToBigQuery(
        name.beam,
        schema=make_schema(("is_marker", "BOOL")),
        method="FILE_LOADS",
        temp_file_format="AVRO",
        custom_gcs_temp_location=gcs.path("staging"),
        create_disposition="CREATE_NEVER",
        write_disposition="WRITE_TRUNCATE",
        additional_bq_parameters=LoadParameters(),
    )


def stage(dataset, table, rows):
    """Loads rows into a new table; returns how many a later step found there, and how many jobs had loaded them."""
    gcs = dataset[1]
    name, told = make_staging(dataset, table), gcs.path(f"told-{table}")
    options = PipelineOptions([f"--project={name.project}"])
    with beam.Pipeline(make_runner(options), options=options) as pipeline:
        loaded = pipeline | "Rows" >> beam.Create(rows, reshuffle=False) | "Load" >> load(name, gcs)
        (
            pipeline
            | "Once" >> beam.Create([name])
            | "Count" >> beam.Map(count_rows, AsList(loaded.destination_load_jobid_pairs))
            | "Tell" >> beam.io.WriteToText(told, shard_name_template="")
        )
    with FileSystems.open(told) as stream:
        return json.loads(stream.read())


def count_rows(name, jobs):
    return json.dumps([query(f"SELECT COUNT(*) AS n FROM {name.sql}")[0]["n"], len(jobs)])


def read_rows(name):
    return query(f"SELECT {', '.join(COLUMNS)} FROM {name.sql} ORDER BY score, chunk")


@emulator
def test_rows_are_loaded_and_merged(dataset):
    target = name_table(dataset, "embeddings")
    columns = ", ".join(f"{name} {'ARRAY<FLOAT64>' if 'REPEATED' in kind else kind}" for name, kind in COLUMNS.items())
    query(f"CREATE TABLE IF NOT EXISTS {target.sql} ({columns}) CLUSTER BY id")
    first = {number: make_row(number, 1 + number % 3, None if number % 2 else 2000 + number) for number in range(500)}
    rows = [row | {"is_marker": False} for chunks in first.values() for row in chunks]
    assert stage(dataset, "first", rows) == [len(rows), 1]
    for _ in range(2):
        query(make_merge(target, name_table(dataset, "first"), COLUMNS))
        assert read_rows(target) == [row for chunks in first.values() for row in chunks]

    # Fewer chunks, more chunks, a new document, two that are gone, of which one is marked twice.
    changed = {0: make_row(0, 4, 1), 2: make_row(2, 1, 2), 700: make_row(700, 2, 3)}
    rows = [row | {"is_marker": False} for chunks in changed.values() for row in chunks]
    markers = [make_marker(number) for number in (0, 7, 8, 8, 900)]
    assert stage(dataset, "second", [*markers, *rows]) == [len(rows) + 5, 1]
    expected = {number: chunks for number, chunks in (first | changed).items() if number not in (7, 8)}
    for _ in range(2):
        query(make_merge(target, name_table(dataset, "second"), COLUMNS))
        assert read_rows(target) == [row for chunks in expected.values() for row in chunks]

    assert stage(dataset, "nothing", []) == [0, 0]
    query(make_merge(target, name_table(dataset, "nothing"), COLUMNS))
    assert len(read_rows(target)) == sum(map(len, expected.values()))


@emulator
def test_worker_processes_load_too(dataset):
    """Nothing in them imports a module of ours but Beam's own step, for its parameters."""
    name = make_staging(dataset, "from_processes")
    rows = [row | {"is_marker": False} for number in range(20) for row in make_row(number, 1, 1)]
    flags = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
    options = PipelineOptions([f"--project={name.project}", *flags])
    with beam.Pipeline(make_runner(options), options=options) as pipeline:
        pipeline | "Rows" >> beam.Create(rows) | "Load" >> load(name, dataset[1])
    assert read_rows(name) == [row for number in range(20) for row in make_row(number, 1, 1)]
