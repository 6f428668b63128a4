"""Which files an input names: globs, braces, folders and what is left out, on disks and object stores alike."""

import os
import re
import socket

import pytest
from apache_beam.io.filesystem import FileMetadata, FileSystem
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.read_config import ReadConfig
from pipeline.sources.globs import Exclusions, expand_braces, find_files, translate_glob
from pipeline.sources.names import name_as_text, parse_partition
from pipeline.sources.planning import plan_input
from pipeline.table_folders import TableFolders

FILES = (
    "a.txt",
    "b.txt",
    "c[1].txt",
    "d{x,y}.txt",
    "e\\f.txt",
    "notes.md",
    "sub/g.txt",
    "sub/deep/h.txt",
    "sub/deep/i.jsonl",
    "lang=en/j.txt",
    "_lang=de/k.txt",
    "_SUCCESS",
    "_temporary/l.txt",
    ".crc",
    ".git/m.txt",
    "sub/.DS_Store",
)
RUN = "20260101T000000.000000Z-abcdef"


class Bucket(FileSystem):
    """An object store in memory: no folders, and one listing for each prefix."""

    objects: dict[str, bytes] = {}
    listings: list[str] = []

    @classmethod
    def scheme(cls):
        return "bucket"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path):
        return tuple(path.rpartition("/")[::2])

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        self.listings.append(dir_or_prefix)
        for path in sorted(self.objects):
            if path.startswith(dir_or_prefix):
                yield self.metadata(path)

    def exists(self, path):
        return path in self.objects

    def metadata(self, path):
        return FileMetadata(path, len(self.objects[path]))

    def _none(self, *_, **__):
        raise NotImplementedError

    mkdirs = create = open = copy = rename = size = last_updated = checksum = delete = _none


@pytest.fixture(params=["disk", "bucket"])
def corpus(request, tmp_path):
    """The folder of FILES: on a local disk, and in an object store."""
    if request.param == "bucket":
        Bucket.objects = {f"bucket://b/corpus/{name}": b"text" for name in FILES} | {"bucket://b/corpus/sub/": b""}
        Bucket.listings = []
        return "bucket://b/corpus"
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text")
    return str(tmp_path)


def find(pattern, *exclude, own=""):
    return {file.path: file.name for file in find_files(pattern, Exclusions(exclude), own)}


def names(corpus, pattern, *exclude):
    found = find(f"{corpus}/{pattern}", *exclude)
    return sorted(path.removeprefix(f"{corpus}/") for path in found)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.txt", ["a.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[!a].txt", ["b.txt"]),
        ("*.txt", ["a.txt", "b.txt", "c[1].txt", "d{x,y}.txt", "e\\f.txt"]),
        ("*/*.txt", ["_lang=de/k.txt", "_temporary/l.txt", ".git/m.txt", "lang=en/j.txt", "sub/g.txt"]),
        ("s*/**.txt", ["sub/deep/h.txt", "sub/g.txt"]),
        ("sub/**", ["sub/.DS_Store", "sub/deep/h.txt", "sub/deep/i.jsonl", "sub/g.txt"]),
        ("{a,b,missing}.txt", ["a.txt", "b.txt"]),
        ("{sub/{g,deep/h},a}.txt", ["a.txt", "sub/deep/h.txt", "sub/g.txt"]),
        ("sub/**/*.{txt,jsonl}", ["sub/deep/h.txt", "sub/deep/i.jsonl"]),
        ("c[1].txt", ["c[1].txt"]),
        ("d{x,y}.txt", ["d{x,y}.txt"]),
        ("e\\f.txt", ["e\\f.txt"]),
        ("e\\*", ["e\\f.txt"]),
    ],
)
def test_globs(corpus, pattern, expected):
    assert names(corpus, pattern) == sorted(expected)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_means_its_files_without_hidden_ones(corpus, slash):
    found = find(corpus + slash)
    assert found == {f"{corpus}/{name}": name for name in found.values()}, "names begin below the folder"
    hidden = {"_SUCCESS", "_temporary/l.txt", ".crc", ".git/m.txt", "sub/.DS_Store"}
    assert set(found.values()) == set(FILES) - hidden


def test_names_begin_below_the_fixed_part_of_a_glob(corpus):
    assert list(find(f"{corpus}/sub/deep/*.txt").values()) == ["h.txt"]
    assert list(find(f"{corpus}/sub/{{deep,other}}/*.txt").values()) == ["deep/h.txt"]
    assert list(find(f"{corpus}/sub/deep/h.txt").values()) == ["h.txt"]


def test_an_object_store_is_listed_once(corpus):
    if corpus.startswith("bucket://"):
        names(corpus, "sub/{deep,other}/*.{txt,jsonl}")
        assert Bucket.listings == [f"{corpus}/sub/"]


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (["*.md"], ["notes.md"]),
        (["deep"], ["sub/deep/h.txt", "sub/deep/i.jsonl"]),
        (["sub/deep/*.txt"], ["sub/deep/h.txt"]),
        (["sub/"], ["sub/g.txt", "sub/deep/h.txt", "sub/deep/i.jsonl"]),
        (["{a,b}.txt", "**/*.jsonl"], ["a.txt", "b.txt", "sub/deep/i.jsonl"]),
    ],
    ids=str,
)
def test_exclusions(corpus, exclude, left_out):
    everything = names(corpus, "")
    assert names(corpus, "", *exclude) == [name for name in everything if name not in left_out]


def test_an_exclusion_may_be_a_whole_path_and_one_without_use_is_told(corpus, caplog):
    assert names(corpus, "*.txt", f"{corpus}/a.txt") == names(corpus, "[!a]*.txt")
    exclusions = Exclusions(["*.md", "nothing", "no/path"])
    find_files(corpus, exclusions)
    assert exclusions.unused == ["nothing", "no/path"]


@pytest.mark.parametrize(
    ("pattern", "exclude", "says"),
    [
        ("none*", [], "matches no file; check the path, and quote"),
        ("*.md", ["*.md"], "check the path and --exclude"),
        ("[z-a]*", [], "is not a glob"),
    ],
)
def test_what_matches_nothing_is_an_error(corpus, pattern, exclude, says):
    with pytest.raises(InputError, match=f"--input=.*{says}|{says}"):
        names(corpus, pattern, *exclude)


@pytest.mark.parametrize("name", ["x y.txt", "a#b%.txt", "é.txt"])
def test_file_urls(tmp_path, name):
    (tmp_path / name).write_text("text")
    assert list(find((tmp_path / name).as_uri())) == [str(tmp_path / name)]
    assert list(find(f"file://localhost{tmp_path}/*")) == [str(tmp_path / name)]


# What cannot be opened


def test_files_that_cannot_be_opened_are_found_with_the_reason(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.txt"))
    errors = {file.name: file.error for file in find_files(f"{tmp_path}/*.txt", Exclusions(()))}
    assert errors.pop("a.txt") == ""
    assert {name: error[:12] for name, error in errors.items()} == {
        "dangling.txt": "is a link to",
        "loop.txt": "is a link to",
        "pipe.txt": "is a pipe, n",
        "socket.txt": "is a socket,",
    }
    plan = plan_input(ReadConfig(input=(str(tmp_path),)))
    assert [file.name for file in plan.files] == ["a.txt"] and plan.empty_files == ()
    assert sorted(os.path.basename(bad.file) for bad in plan.bad_files) == sorted(errors)
    assert set(plan.sources) == {str(path) for path in tmp_path.iterdir()}


def test_a_file_that_cannot_be_opened_when_it_is_planned(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")

    def refuse(path, mode):
        if path.endswith("b.txt"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr("pipeline.files.open", refuse, raising=False)
    plan = plan_input(ReadConfig(input=(str(tmp_path),)))
    assert [file.name for file in plan.files] == ["a.txt"]
    ((file, reason, message),) = plan.bad_files
    assert (file, reason) == (str(tmp_path / "b.txt"), "unreadable_file") and "Permission denied" in message


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"sub cannot be listed: Permission denied; .*--exclude"):
        find(f"{tmp_path}/**.txt")
    assert list(find(str(tmp_path), "sub").values()) == ["b.txt"]


def test_linked_folders_are_told_where_they_are_not_searched(tmp_path, caplog):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("text")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    assert list(find(str(tmp_path)).values()) == ["real/a.txt"]
    assert "2 linked folders are not searched" in caplog.text
    assert sorted(find(f"{tmp_path}/*/a.txt").values()) == ["link/a.txt", "real/a.txt"]


def test_unknown_formats_in_a_folder_are_all_told(tmp_path):
    for name in ("a.txt", "b.pdf", "c.doc", "d"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=r"b\.pdf: the extension .*--exclude='\*\.pdf'; 2 other files .*c\.doc, .*d$"):
        plan_input(ReadConfig(input=(str(tmp_path),)))
    config = ReadConfig(input=(str(tmp_path),), exclude=("*.pdf", "*.doc", "d"))
    assert [file.name for file in plan_input(config).files] == ["a.txt"]


# Tables among the input


TABLE = (
    "CURRENT",
    "lock",
    f"snapshots/{RUN}/manifest.json",
    f"snapshots/{RUN}/embeddings-00000-of-00001.parquet",
    f"snapshots/{RUN}/dead_letters-00000-of-00001.jsonl",
    f"attempts/{RUN}/dead_letters-0123.jsonl",
    f"rejected/{RUN}/dead_letters-00000-of-00001.jsonl",
    "journal/0123456789abcdef0123456789abcdef/0123.seg",
)


def write_table(corpus, folder, some=TABLE):
    for name in some:
        if corpus.startswith("bucket://"):
            Bucket.objects[f"{corpus}/{folder}/{name}"] = b"{}"
            continue
        path = f"{corpus}/{folder}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write("{}")


def test_tables_among_the_input_are_left_out(corpus, caplog):
    before = names(corpus, "")
    write_table(corpus, "sub/table")
    write_table(corpus, "attempted", TABLE[5:6])  # a run was killed before anything was published
    write_table(corpus, "copied", [name.rpartition("/")[2] for name in TABLE[2:5]])  # a snapshot by itself
    write_table(corpus, "named", ["CURRENT", "snapshots/other/embeddings-00000-of-00001.parquet"])
    assert names(corpus, "") == before
    assert names(corpus, "**.jsonl") == ["sub/deep/i.jsonl"]
    tables = set(re.findall(r"(\S+) is a table of embeam", caplog.text))
    assert tables == {f"{corpus}/{name}" for name in ("sub/table", "attempted", "copied", "named")}


@pytest.mark.parametrize("pattern", [f"snapshots/{RUN}/*.jsonl", "snapshots/*/dead*.jsonl", f"attempts/{RUN}/*.jsonl"])
def test_a_glob_into_a_table_is_refused_and_a_file_of_it_may_be_named(corpus, pattern):
    write_table(corpus, "t")
    with pytest.raises(InputError, match="matches only files of tables"):
        names(corpus, f"t/{pattern}")
    name = f"t/{TABLE[4]}"
    assert names(corpus, name) == [name]


def test_the_runs_own_table_is_left_out_whatever_it_holds(corpus):
    before = names(corpus, "")
    write_table(corpus, "table", ["lock", "attempts/strange/x.jsonl"])
    assert sorted(find(corpus, own=f"{corpus}/table").values()) == before


def test_folders_that_only_look_like_tables_are_read():
    paths = ["/c/journal/a.txt", "/c/snapshots/2026/b.txt", "/c/attempts/c.txt", "/c/manifest.json", "/d/CURRENT"]
    folders = TableFolders([*paths, "/d/snapshots.txt", "/e/embeddings-00000-of-00001.parquet"])
    assert not any(folders.find(path) for path in paths)


# Names


def test_names_that_are_not_utf8_are_found_and_stored_as_text(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    (file,) = plan_input(ReadConfig(input=(str(tmp_path),))).files
    assert os.fsencode(file.path) == os.fsencode(tmp_path) + b"/caf\xe9.txt"
    assert (file.name, file.source) == (r"caf\xe9.txt", rf"{tmp_path}/caf\xe9.txt")


NAMES = st.lists(st.sampled_from(["\\", "x", "e", "9", "é", "/", "\udce9", "\udcff", "\\xe9"]), max_size=8).map("".join)


@given(NAMES, NAMES)
def test_different_names_stay_different(a, b):
    text = name_as_text(a)
    text.encode()
    assert (text == name_as_text(b)) == (a == b)
    if text != a:
        back = re.sub(r"\\(\\|x([0-9a-f]{2}))", lambda m: chr(0xDC00 + int(m[2], 16)) if m[2] else "\\", text)
        assert back == a


def test_partition_folders():
    assert parse_partition("/data/year=2026/lang=zh%2FTW/a=b.txt") == (("year", "2026"), ("lang", "zh/TW"))
    assert parse_partition("gs://b/k=1/x/k=2/a.txt") == (("k", "2"),)
    assert parse_partition("/data/=x/a.txt") == ()


@given(st.lists(st.sampled_from("ab/.\\*?"), max_size=6).map("".join), st.text("ab/.\\", max_size=6))
def test_globs_mean_what_beams_do(glob, path):
    """Except that ours match a backslash, and no slash with a question mark."""
    theirs = FileSystem.translate_pattern(glob).replace(r"[^/\\]*", "[^/]*")
    theirs = theirs if "?" not in glob else re.sub(r"(?<!\\)\.(?!\*)", "[^/]", theirs)
    assert bool(re.fullmatch(translate_glob(glob), path)) == bool(re.match(theirs, path))


def test_braces():
    assert expand_braces("a{b,c{d,e}}f") == ["abf", "acdf", "acef"]
    assert expand_braces("{a}{,x}{}") == ["{a}{}", "{a}x{}"]
