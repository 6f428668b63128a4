"""WARC files: plain text is a document whose id is its address; pages as they were fetched never are."""

import gzip
import io

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from pipeline.errors import InputError
from pipeline.read_config import ReadConfig
from pipeline.sources.planning import choose_id_field, plan_input
from tests.support.runs import read_rows, run_embed
from tests.support.sources import read_file, summarize


def make_warc(records, is_compressed=False):
    """Records of (type, address, content, content type), each in a gzip member of its own as Common Crawl has them."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=is_compressed)
    for kind, uri, content, content_type in records:
        http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], "HTTP/1.1") if kind == "response" else None
        more = {"http_headers": http} if http else {"warc_content_type": content_type}
        writer.write_record(writer.create_warc_record(uri, kind, payload=io.BytesIO(content), **more))
    return out.getvalue()


PAGES = [("conversion", f"http://a.org/{i}", f"Größe {i}\nline two".encode(), "text/plain") for i in range(3)]


@pytest.mark.parametrize("name", ["a.warc.wet.gz", "a.wet", "a.warc", "a.warc.gz"])
@pytest.mark.parametrize("is_compressed", [True, False])
def test_the_address_is_the_id(tmp_path, name, is_compressed):
    outcomes = read_file(tmp_path / name, make_warc(PAGES, is_compressed), keep_fields=("Content-Length", "WARC-Type"))
    assert [(o.id, o.text) for o in outcomes] == [(uri, content.decode()) for _, uri, content, _ in PAGES]
    assert outcomes[0].kept == b'[18,"conversion"]'


def test_another_id_field(tmp_path):
    outcomes = read_file(tmp_path / "a.wet", make_warc(PAGES), id_field="WARC-Record-ID")
    assert len({o.id for o in outcomes}) == 3 and outcomes[0].id.startswith("<urn:uuid:")


def test_records_without_documents_and_pages_as_fetched(tmp_path):
    records = [
        ("warcinfo", "", b"software: x", "application/warc-fields"),
        ("request", "http://a.org/", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        PAGES[0],
        ("response", "http://a.org/", b"<html><script>markup</script></html>", ""),
        ("metadata", "http://a.org/", b"{}", "application/json"),
        ("resource", "http://a.org/x.txt", b"plain", "text/plain; charset=utf-8"),
        ("resource", "http://a.org/x.html", b"<html>", "text/html"),
        ("conversion", "http://a.org/bad", b"bad \xff", "text/plain"),
        ("conversion", "http://a.org/empty", b"", "text/plain"),
        ("conversion", "http://a.org/large", b"x" * 2000, "text/plain"),
        PAGES[1],
    ]
    outcomes = read_file(tmp_path / "a.warc", make_warc(records), max_document_bytes=1000)
    assert summarize(outcomes) == [
        "Größe 0\nline two",
        ("not_text", 3),
        "plain",
        ("not_text", 6),
        ("invalid_utf8", 7),
        ("empty_text", 8),
        ("too_large", 9),
        "Größe 1\nline two",
    ]
    assert "type response with application/http holds no plain text" in outcomes[1].message
    assert outcomes[1].text is None


def test_files_that_are_cut_off_or_damaged(tmp_path):
    data = make_warc(PAGES)
    third = data.rindex(b"WARC/1.0")
    assert summarize(read_file(tmp_path / "a.warc", data[:-20])) == [
        "Größe 0\nline two",
        "Größe 1\nline two",
        ("truncated_file",),
    ]
    for bad in (b"WARC/9.9", b"nonsense"):
        damaged = data[:third] + bad + data[third + 8 :]
        assert summarize(read_file(tmp_path / "a.warc", damaged))[2:] == [("unreadable_file",)]
    for wrong in (b"12", b"40"):
        damaged = data.replace(b"Content-Length: 18", b"Content-Length: " + wrong, 1)
        assert summarize(read_file(tmp_path / "a.warc", damaged)) == [("unreadable_file",)]
    damaged = data.replace(b"Content-Length: 18", b"Content-Length: ab", 1)
    assert summarize(read_file(tmp_path / "a.warc", damaged)) == [("unreadable_file",)]
    cut = gzip.compress(data)[:-12]
    assert summarize(read_file(tmp_path / "a.wet.gz", cut))[-1][0] == "truncated_file"


def test_ids_of_their_own_and_derived_ids_do_not_mix(tmp_path):
    (tmp_path / "a.wet").write_bytes(make_warc(PAGES))
    (tmp_path / "b.txt").write_text("text\n")
    config = ReadConfig(input=(str(tmp_path / "*"),))
    with pytest.raises(InputError, match=r"a\.wet has ids of its own \(WARC-Target-URI\), and .*b\.txt has none"):
        choose_id_field(plan_input(config), config)


def test_files_of_one_name_do_not_collide(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.wet").write_bytes(make_warc(PAGES))
    assert len(plan_input(ReadConfig(input=(f"{tmp_path}/x/*", f"{tmp_path}/y/*"))).files) == 2


def test_an_address_that_is_there_twice_is_a_duplicate(tmp_path):
    (tmp_path / "a.warc.wet.gz").write_bytes(make_warc([*PAGES, PAGES[0]], True))
    manifest = run_embed(tmp_path / "*.wet.gz", tmp_path / "table")
    assert sorted(key[0] if isinstance(key, tuple) else key for key in read_rows(str(tmp_path / "table"))) == [
        uri for _, uri, _, _ in PAGES
    ]
    assert manifest.dead_letters == {"duplicate_id": 1}
