"""What the first records of the input tell: the types of its fields, missing columns, and its size in documents."""

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import ConfigError, InputError
from pipeline.read_config import KeptField, ReadConfig
from pipeline.sources import sampling
from pipeline.sources.planning import plan_input
from pipeline.sources.read import read_range
from pipeline.sources.sampling import infer_kept_fields, sample_input
from tests.support.corpora import some_texts


def write_files(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def infer(folder, pattern, **settings):
    config = ReadConfig(input=(str(folder / pattern),), **settings)
    return infer_kept_fields(sample_input(plan_input(config), config).fields, config)


def estimate(folder, pattern, **settings):
    config = ReadConfig(input=(str(folder / pattern),), **settings)
    return sample_input(plan_input(config), config).n_documents


def test_types_are_inferred_from_the_first_rows(tmp_path):
    rows = [
        {"text": "a", "i": 1, "w": 1, "f": 0.5, "b": True, "s": "x", "n": None, "m": 1, "t": 1},
        {"text": "b", "i": 2, "w": 1.5, "f": 2.5, "b": False, "s": None, "n": None, "m": "x", "t": 1},
    ]
    write_files(tmp_path, a_jsonl="{\n", b_jsonl="\n".join(map(json.dumps, rows)))
    names = ("i", "w", "f", "b", "s", "n", "m", "t:float")
    kinds = ["int", "float", "float", "bool", "string", "string", "string", "float"]
    assert infer(tmp_path, "*.jsonl", keep_fields=names) == [
        KeptField(name.partition(":")[0], kind) for name, kind in zip(names, kinds, strict=True)
    ]


def test_types_of_csv_fields(tmp_path):
    write_files(tmp_path, a_csv="text,i,f,b,s,z,e\nt,1,1,true,x,007,\nt,,2.5,False,1,1,\n")
    kinds = [field.type for field in infer(tmp_path, "a.csv", keep_fields=tuple("ifbsze"))]
    assert kinds == ["int", "float", "bool", "string", "string", "string"]


def test_fields_that_are_nowhere(tmp_path):
    write_files(tmp_path, a_jsonl='{"text": "a", "year": 1, "tags": [1]}\n')
    with pytest.raises(ConfigError, match=r"--keep_fields=yaer is in none of the first 1 rows; they have .*year"):
        infer(tmp_path, "*", keep_fields=("yaer",))
    with pytest.raises(ConfigError, match="--pair_field=other is in none"):
        infer(tmp_path, "*", pair_field="other")
    assert infer(tmp_path, "*", keep_fields=("tags",)) == [KeptField("tags", "string")]


def test_a_field_with_a_type_may_come_after_the_first_rows(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLE_RECORDS", 200)
    write_files(tmp_path, a_jsonl='{"text": "a"}\n' * 300 + '{"text": "b", "year": 1}\n')
    with pytest.raises(ConfigError, match=r"--keep_fields=year is in none of the first 200 rows.*=year:string"):
        infer(tmp_path, "*", keep_fields=("year",))
    assert infer(tmp_path, "*", keep_fields=("year:int",)) == [KeptField("year", "int")]
    assert "--keep_fields=year is in none of the first 200 rows; they have text; rows without" in caplog.text


def test_columns_that_are_missing(tmp_path):
    write_files(tmp_path, a_csv="id,body\n1,x\n")
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    for pattern in ("a.csv", "a.parquet"):
        with pytest.raises(InputError, match=r"column 'text' is missing, the file has id, body; see --text_field"):
            infer(tmp_path, pattern, id_field="id")
        with pytest.raises(InputError, match="--id_field"):
            infer(tmp_path, pattern, id_field="key", text_field=("body",))


def test_the_number_of_documents_is_estimated(tmp_path):
    line = json.dumps({"text": "hello world, this is a line"}) + "\n"
    write_files(tmp_path, a_jsonl=line * 30_000, b_jsonl=line * 50_000, c_jsonl_gz=gzip.compress(line.encode() * 100))
    pq.write_table(pa.table({"text": ["x"] * 1234}), tmp_path / "d.parquet")
    assert estimate(tmp_path, "*") == pytest.approx(81_334, rel=0.01)
    assert estimate(tmp_path, "*", limit=10) == 10
    assert estimate(tmp_path, "*.parquet", limit=5000) == 1234


@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv", "jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet"])
def test_a_large_file_is_judged_by_its_beginning(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sampling, "SAMPLE_RECORDS", 2000)
    is_compressed = kind.count(".") == 1  # stored bytes are then read by the block
    texts = some_texts(8000, seed=3, words=(30, 90) if is_compressed else (1, 14))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    pack = {"jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress, "jsonl.zst": zstandard.compress}.get(kind, bytes)
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=500)
    elif kind in ("txt", "csv"):
        (tmp_path / f"a.{kind}").write_text("\n".join(["text", *texts]))
    else:
        (tmp_path / f"a.{kind}").write_bytes(pack(lines))
    assert estimate(tmp_path, "*") == pytest.approx(8000, rel=0.4 if is_compressed else 0.05)


def test_files_of_many_sizes_are_judged_by_the_first_of_each_kind(tmp_path):
    for i in range(30):  # longer and longer texts
        (tmp_path / f"{i:02d}.txt").write_text("".join("word " * (1 + i % 10) + "\n" for _ in range(20)))
        (tmp_path / f"{i:02d}.jsonl").write_text(json.dumps({"text": "word " * 50}) + "\n")
    assert estimate(tmp_path, "*") == 30 * 20 + 30


def test_large_documents_are_sampled_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLE_BYTES", 1000)
    rows = [json.dumps({"text": "x" * 100, **({"year": 1} if i == 199 else {})}) for i in range(300)]
    write_files(tmp_path, a_jsonl="\n".join(rows))
    assert infer(tmp_path, "*", keep_fields=("year",)) == [KeptField("year", "int")]
    assert estimate(tmp_path, "*") == pytest.approx(300, rel=0.02)
    rows[199], rows[250] = rows[250], rows[199]
    write_files(tmp_path, a_jsonl="\n".join(rows))
    with pytest.raises(ConfigError, match="in none of the first 200 rows"):
        infer(tmp_path, "*", keep_fields=("year",))


def test_a_file_is_read_up_to_where_it_is_damaged(tmp_path):
    line = json.dumps({"text": "hello", "year": 1}) + "\n"
    whole = gzip.compress(line.encode() * 100)
    write_files(tmp_path, a_jsonl_gz=whole[:-8], b_jsonl_gz=whole, c_jsonl_gz=b"\1\2\3 no gzip")
    assert infer(tmp_path, "*", keep_fields=("year",)) == [KeptField("year", "int")]
    assert 190 <= estimate(tmp_path, "*") <= 200


def test_folders_tell_the_types_of_their_fields_whether_their_files_are_sampled_or_not(tmp_path):
    for i in range(10, 22):
        folder = tmp_path / f"month=0{i % 10}" / f"b={i if i < 21 else 'x'}"
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_text('{"text": "t"}\n')
    config = ReadConfig(input=(f"{tmp_path}/**.jsonl",), keep_fields=("b", "month:int"))
    plan = plan_input(config)
    kept = infer_kept_fields(sample_input(plan, config).fields, config)
    assert [field.type for field in kept] == ["string", "int"]
    read = [item.outcome for split in plan.splits for r in split for item in read_range(r, config, kept)]
    assert len(read) == 12 and {tuple(json.loads(document.kept)) for document in read} >= {("10", 0), ("x", 1)}
