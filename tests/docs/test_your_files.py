"""Every command of docs/your_files.md, on a few documents of the kind that it is for."""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import iter_table
from pipeline.cli.flags import Parser as FlagParser
from pipeline.cli.flags import add_config_flags, given_settings
from pipeline.config import EmbedConfig
from tests.support.paths import ENCODER, ROOT
from tests.support.processes import Call

PAGE = (ROOT / "docs" / "your_files.md").read_text()
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}
COMMANDS = {
    title: found[1].replace("\\\n", " ")
    for title, section in SECTIONS.items()
    if (found := re.search(r"```bash\n(.*?)```", section, re.DOTALL))
}
LONG = "The first sentence is here. " * 60


def write(path: str, data: bytes | str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data if isinstance(data, bytes) else data.encode())


def as_lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_parquet(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def make_wet(*pages: tuple[str, str]) -> bytes:
    """Each record is a gzip member of its own, as Common Crawl has them."""
    out = b""
    for kind, address, content in [("warcinfo", "", "Software: x"), *(("conversion", *page) for page in pages)]:
        data = content.encode()
        address_line = f"WARC-Target-URI: {address}\r\n" if address else ""
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\n{address_line}WARC-Date: 2026-01-01T00:00:00Z\r\n"
            f"WARC-Record-ID: <urn:uuid:{len(out)}>\r\nContent-Type: text/plain\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        out += gzip.compress(head.encode() + data + b"\r\n\r\n")
    return out


def beir() -> None:
    one = {"_id": "1", "title": "A title", "text": "Its text.", "metadata": {"url": "u"}}
    write("scifact/corpus.jsonl", as_lines(one, {"_id": "2", "title": "", "text": "No title.", "metadata": {}}))


def marco() -> None:
    write("collection.tsv", '0\tThe presence of "communication\n1\tamid 10" minds\n')


def hugging_face() -> None:
    write_parquet("imdb/plain_text/train-00000-of-00001.parquet", [{"text": "good", "label": 1}])
    write_parquet("imdb/plain_text/test-00000-of-00001.parquet", [{"text": "not read", "label": 0}])


def wikipedia() -> None:
    rows = [{"id": "12", "url": "https://w/12", "title": "Anarchism", "text": LONG}]
    write_parquet("wikipedia/20231101.en/train-00000-of-00041.parquet", rows)
    write("wikipedia/20231101.en/_SUCCESS", "")


def dolma() -> None:
    record = {"id": "d1", "text": "crawled", "source": "cc", "metadata": {"url": "http://x", "length": 3}}
    write("dolma/cc-0000.json.gz", gzip.compress(as_lines(record).encode()))


def common_crawl() -> None:
    wet = make_wet(("http://a/1", "Größe of a page"), ("http://a/2", "another"))
    write("crawl-data/2026-01/wet/0.warc.wet.gz", wet)


def folder() -> None:
    write("notes/a.txt", "first\nfile\n")
    write("notes/more/b.txt", "second")
    write("notes/README.md", "not read")
    write("notes/.hidden.txt", "not read")


def requests() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a question"}]}
    write("requests.jsonl", as_lines({"custom_id": "r1", "method": "POST", "body": body}))


def stdin() -> None:
    write("export.jsonl.gz", gzip.compress(as_lines({"id": "s", "text": "piped"}).encode()))


CORPORA: dict[str, tuple[Callable[[], None], dict[str, dict[str, Any]]]] = {
    "BEIR": (
        beir,
        {
            "1": {"text": "A title Its text.", "metadata": '{"url":"u"}'},
            "2": {"text": "No title.", "metadata": "{}"},
        },
    ),
    "MS MARCO": (marco, {"0": {"text": 'The presence of "communication'}, "1": {"text": 'amid 10" minds'}}),
    "A Hugging Face data set": (hugging_face, {"train-00000-of-00001.parquet@0": {"text": "good", "label": 1}}),
    "Wikipedia": (wikipedia, {"12": {"url": "https://w/12"}}),
    "Dolma and RedPajama": (dolma, {"d1": {"text": "crawled", "source": "cc", "metadata_url": "http://x"}}),
    "Common Crawl": (
        common_crawl,
        {
            "http://a/1": {"text": "Größe of a page", "WARC-Date": "2026-01-01T00:00:00Z"},
            "http://a/2": {"text": "another"},
        },
    ),
    "A folder of text files": (folder, {"a.txt@0": {"text": "first\nfile\n"}, "more/b.txt@0": {"text": "second"}}),
    "Requests to an API": (requests, {"r1": {"text": "a question"}}),
    "Standard input": (stdin, {"s": {"text": "piped"}}),
}


def test_every_command_is_tried():
    assert list(COMMANDS) == [*CORPORA, "BigQuery"]


@pytest.mark.parametrize("title", CORPORA)
def test_a_command_reads_what_it_is_for(title, tmp_path, monkeypatch, call: Call):
    monkeypatch.chdir(tmp_path)
    make, expected = CORPORA[title]
    make()
    words = shlex.split(COMMANDS[title])
    if "|" in words:
        assert words[: words.index("|")] == ["zcat", "export.jsonl.gz"]
        piped = gzip.decompress(Path("export.jsonl.gz").read_bytes())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
        words = words[words.index("|") + 1 :]
    assert words[0] == "embeam"
    code, _, err = call(*words[1:], f"--encoder={ENCODER}", "--keep_text=true")
    assert code == 0, err
    rows = list(iter_table("table"))
    assert {row["id"] for row in rows} == set(expected)
    for row in rows:
        wanted = expected[row["id"]]
        assert {name: row[name] for name in wanted} == wanted


def test_long_articles_are_cut_at_their_sentences(tmp_path, monkeypatch, call: Call):
    monkeypatch.chdir(tmp_path)
    wikipedia()
    assert call(*shlex.split(COMMANDS["Wikipedia"])[1:], f"--encoder={ENCODER}", "--max_tokens=64")[0] == 0
    rows = sorted(iter_table("table"), key=lambda row: row["chunk"])
    text = f"Anarchism {LONG}"
    assert len(rows) > 5 and all(row["text"] == text[row["char_start"] : row["char_end"]] for row in rows)
    assert all(row["text"].endswith(".") for row in rows)


def test_the_command_for_bigquery_is_understood():
    parser = FlagParser()
    add_config_flags(parser)
    known = parser.parse_args(shlex.split(COMMANDS["BigQuery"])[2:])
    config = EmbedConfig.from_flat(given_settings(known))
    assert config.read.input == ("bq://my-project.corpus.articles",) and config.read.text_field == ("title", "body")
