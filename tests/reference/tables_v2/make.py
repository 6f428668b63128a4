"""Makes the tables of this folder: `PYTHONPATH=CHECKOUT CHECKOUT/.venv/bin/python make.py`, see README.md.

CHECKOUT is the embeam whose tables are wanted; the commands are its own. An encoder that fails on one text is the only
thing that is not as in any other run: it makes the dead letter that can be tried again.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.cli import main
from pipeline.encoders.handler import LoadedEncoder
from tests.support.bigquery import start_bigquery
from tests.support.emulators import start_gcs
from tests.support.paths import ENCODER

HERE = Path(__file__).resolve().parent
WORK = Path("/tmp/tables_v2")  # indexes and dead letters name the files of the corpus; a run does not compare the names
UNLUCKY = "a text on which the encoder failed"
COMMON = ["--id_field=id", "--keep_fields=year:int,name", "--max_dead_fraction=0.5", "--max_delete_fraction=0.5"]
REJECT = ["--on_long=reject", "--max_tokens=40"]
CHUNK = ["--on_long=chunk", "--max_tokens=12", "--keep_text", "--output_format=parquet"]


@contextlib.contextmanager
def bad_luck() -> Iterator[None]:
    encode = LoadedEncoder.encode

    def fail(self: Any, batch: Any) -> Any:
        done = encode(self, batch)
        for i, chunk in enumerate(batch):
            if chunk.document.text == UNLUCKY:
                done.vectors[i], done.errors[i] = None, "out of luck"
        return done

    with mock.patch.object(LoadedEncoder, "encode", fail):
        yield


def embed(corpus: str, output: str, *flags: str) -> None:
    command = ["embed", f"--input={WORK / corpus / '*.jsonl'}", f"--output={output}", f"--encoder={ENCODER}"]
    with bad_luck():
        main([*command, *COMMON, *flags])


def hide_paths(text: str) -> str:
    return text.replace(ENCODER, "{ENCODER}")


def make_corpora() -> None:
    """The stored corpus, and the state before it, of which one document differs and one is gone."""
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(HERE / "corpus", WORK / "corpus")
    shutil.copytree(HERE / "corpus", WORK / "before")
    lines = (WORK / "before" / "a.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[0]["text"] = "the first version of this text"
    records.append({"id": "gone", "text": "a document of the first snapshot only", "year": 1, "name": "x"})
    (WORK / "before" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_folder(name: str, *flags: str) -> None:
    shutil.rmtree(HERE / name, ignore_errors=True)
    for corpus in ("before", "corpus"):
        embed(corpus, str(WORK / name), *flags)
    shutil.copytree(WORK / name, HERE / name, ignore=shutil.ignore_patterns("lock", "attempts"))
    for manifest in (HERE / name).rglob("manifest.json"):
        manifest.write_text(hide_paths(manifest.read_text()))


def make_duckdb() -> None:
    import duckdb

    for corpus in ("before", "corpus"):
        embed(corpus, f"duckdb://{WORK}/v.duckdb/notes", *REJECT)
    target = HERE / "duckdb"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(WORK / "v.duckdb.embeam", target / "v.duckdb.embeam", ignore=shutil.ignore_patterns("lock"))
    with duckdb.connect(str(WORK / "v.duckdb")) as connection:
        connection.execute("UPDATE notes_runs SET manifest = replace(manifest, ?, '{ENCODER}')", [ENCODER])
    (target / "v.duckdb.gz").write_bytes(gzip.compress((WORK / "v.duckdb").read_bytes(), mtime=0))


def make_bigquery() -> None:
    from google.cloud import bigquery

    target = HERE / "bigquery"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    with start_gcs() as gcs, start_bigquery(gcs) as cloud, cloud.used_here():
        client = bigquery.Client(project=cloud.project)
        client.create_dataset("tables")
        name, work = f"{cloud.project}.tables.notes", gcs.path("work")
        embed("before", f"bq://{name}", f"--work_dir={work}", *REJECT)
        embed("corpus", f"bq://{name}", f"--work_dir={work}", *REJECT)
        for table in ("notes", "notes_runs"):
            fields = [field.to_api_repr() for field in client.get_table(f"{cloud.project}.tables.{table}").schema]
            rows = client.query(f"SELECT * FROM `{cloud.project}.tables.{table}` ORDER BY 1").result()
            lines = [hide_paths(json.dumps(dict(row), default=str)) + "\n" for row in rows]
            (target / f"{table}.schema.json").write_text(json.dumps(fields, indent=1) + "\n")
            (target / f"{table}.jsonl").write_text("".join(lines))
        copy_dead_letters(work, target)


def copy_dead_letters(work: str, target: Path) -> None:
    from apache_beam.io.filesystems import FileSystems

    (found,) = FileSystems.match([f"{work}/embeam-test.tables.notes/dead_letters/*"])
    for file in found.metadata_list:
        with FileSystems.open(file.path) as stream:
            (target / file.path.rpartition("/")[2]).write_bytes(stream.read())


if __name__ == "__main__":
    make_corpora()
    make_folder("tfrecord", *REJECT)
    make_folder("parquet", *CHUNK)
    make_duckdb()
    make_bigquery()
