"""What is found, refused, cut up and inferred before anything is read."""

import gzip
import random

import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.read_config import ReadConfig
from pipeline.sources.detection import detect_format
from pipeline.sources.planning import plan_input
from pipeline.sources.source import TO_THE_END


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def plan(folder, *patterns, **settings):
    return plan_input(ReadConfig(input=tuple(f"{folder}/{p}" for p in patterns), **settings))


def test_files_are_sorted_deduplicated_and_named_after_their_glob(tmp_path):
    write(tmp_path, b_txt="b", a_txt="a", sub__c_txt="c", d_jsonl_gz=gzip.compress(b"{}"), z_txt="")
    found = plan(tmp_path, "*.txt", "*", "**.txt", "sub/c.txt")
    assert [(f.index, f.name, f.format, f.compression) for f in found.files] == [
        (0, "a.txt", "text", ""),
        (1, "b.txt", "text", ""),
        (2, "d.jsonl.gz", "jsonl", "gzip"),
        (3, "sub/c.txt", "text", ""),
    ]
    assert found.empty_files == (str(tmp_path / "z.txt"),)
    assert found.total_bytes == 3 + len(gzip.compress(b"{}"))
    assert plan(tmp_path, "sub/c.txt").files[0].name == "c.txt"
    assert plan(tmp_path, "sub/").files[0].name == "c.txt"


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    write(tmp_path, a_txt="a")
    monkeypatch.chdir(tmp_path)
    (file,) = plan_input(ReadConfig(input=("*.txt", "./a.txt"))).files
    assert file.path == str(tmp_path / "a.txt")


def test_a_name_that_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("a")
    assert [f.name for f in plan(tmp_path, "a[1].txt").files] == ["a[1].txt"]


@pytest.mark.parametrize("pattern", ["*.txt", "none.txt", "nowhere/*"])
def test_a_glob_that_matches_nothing(tmp_path, pattern):
    write(tmp_path, a_csv="text\na\n")
    with pytest.raises(InputError, match=r"--input=.* matches no file; check"):
        plan(tmp_path, "*.csv", pattern)


def test_no_input_and_folders(tmp_path):
    with pytest.raises(InputError, match="--input is missing"):
        plan_input(ReadConfig())
    with pytest.raises(InputError, match="is a folder without files to read"):
        plan(tmp_path, ".")


@pytest.mark.parametrize(
    "path, expected",
    [
        ("gs://b/x/a.TXT", ("text", "")),
        ("a.text.zst", ("text", "zstd")),
        ("a.ndjson.zstd", ("jsonl", "zstd")),
        ("a.json", ("json", "")),
        ("a.jsonl.xz", ("jsonl", "xz")),
        ("CC-MAIN-20240101-00000.warc.wet.gz", ("warc", "gzip")),
        ("a.b.csv.bz2", ("csv", "bzip2")),
        ("a.tsv", ("tsv", "")),
        ("a.parquet", ("parquet", "")),
        ("train.tfrecord-00003-of-00010", ("tfrecord", "")),
        ("train.tfrecords-00003-of-00010.gz", ("tfrecord", "gzip")),
        ("part-00000-of-00010.tfrecord", ("tfrecord", "")),
    ],
)
def test_formats_go_by_the_extension(path, expected):
    assert detect_format(path) == expected


@pytest.mark.parametrize("path", ["a.dat", "README", "a.gz", ".gz", "dir.txt/a"])
def test_unknown_extensions_are_refused_unless_the_format_is_given(path):
    with pytest.raises(InputError, match="--input_format=text"):
        detect_format(path)
    assert detect_format(path, "jsonl")[0] == "jsonl"


def test_parquet_in_gzip_is_refused():
    with pytest.raises(InputError, match="unpack"):
        detect_format("a.parquet.gz")


def test_names_that_collide(tmp_path):
    write(tmp_path, x__a_jsonl="{}", y__a_jsonl="{}")
    with pytest.raises(InputError, match=r"both named 'a.jsonl'.*--id_field"):
        plan(tmp_path, "x/*", "y/*")
    assert len(plan(tmp_path, "x/*", "y/*", id_field="id").files) == 2
    assert [f.name for f in plan(tmp_path, "**.jsonl").files] == ["x/a.jsonl", "y/a.jsonl"]


@pytest.mark.parametrize("settings", [{"id_field": "id"}, {"pair_field": "p"}, {"keep_fields": ("k",)}])
def test_text_has_no_fields(tmp_path, settings):
    write(tmp_path, a_txt="a")
    with pytest.raises(ConfigError, match="is plain text and has no fields; use JSON lines"):
        plan(tmp_path, "a.txt", **settings)


def test_large_files_are_split_and_small_ones_grouped(tmp_path):
    write(
        tmp_path,
        a_txt="x" * 1000,
        b_txt="x" * 40,
        c_txt="x" * 40,
        d_txt="x" * 40,
        e_txt_gz=gzip.compress(random.randbytes(1000)),
    )
    splits = plan(tmp_path, "*", split_bytes=100).splits
    shape = [[(r.file.name, r.start, r.end) for r in split] for split in splits]
    assert shape[:10] == [[("a.txt", i * 100, i * 100 + 100)] for i in range(10)]
    assert shape[10:12] == [[("b.txt", 0, 40), ("c.txt", 0, 40)], [("d.txt", 0, 40)]]
    assert shape[12:] == [[("e.txt.gz", 0, TO_THE_END)]]
    assert len(plan(tmp_path, "a.txt", split_bytes=100, text_mode="paragraph").splits) == 1
    assert len(plan(tmp_path, "*", split_bytes=100, limit=5).splits) == 1
