"""Text in any encoding gives the documents that it would give in UTF-8, and what is no text gives dead letters."""

import codecs
import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.read_config import ReadConfig
from pipeline.sources.encoding import find_encoding, is_binary_text
from tests.support.sources import read_file, summarize

TEXTS = {
    "ascii": ["seven words of plain text in here", "and a second line"],
    "latin": ["Größe und Höhe", "naïve café"],
    "latvian": ["Ābols Āda Ēna", "ĀĀĀĀ mazs"],
    "cyrillic": ["семь слов простого текста", "ещё одна строка"],
    "japanese": ["東京は日本の首都です。 大阪も大きい", "\u3000京都は古い都です"],
    "emoji": ["a 🙂 face", "🙂🙂 two"],
}
WIDE = {
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-le": lambda text: text.encode("utf-16-le"),
    "utf-16-be": lambda text: text.encode("utf-16-be"),
    "utf-16-be with mark": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "utf-32-le": lambda text: text.encode("utf-32-le"),
    "utf-32-be": lambda text: text.encode("utf-32-be"),
    "utf-8-sig": lambda text: text.encode("utf-8-sig"),
}
FORMATS = {
    "txt": lambda texts: "".join(text + "\n" for text in texts),
    "jsonl": lambda texts: "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
    "json": lambda texts: json.dumps([{"text": text} for text in texts], ensure_ascii=False),
    "csv": lambda texts: "text,n\r\n" + "".join(f'"{text}",1\r\n' for text in texts),
    "tsv": lambda texts: "text\tn\n" + "".join(f"{text}\t1\n" for text in texts),
}


@pytest.mark.parametrize("encode", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_utf16_and_utf32_are_recognised(tmp_path, texts, encode):
    for kind, write in FORMATS.items():
        data = encode(write(texts))
        assert summarize(read_file(tmp_path / f"a.{kind}", data)) == texts
        assert summarize(read_file(tmp_path / f"b.{kind}.gz", gzip.compress(data))) == texts


def test_a_large_file_of_utf16_is_read_once_whatever_a_split_is(tmp_path):
    texts = [f"línea número {i} 🙂" for i in range(20_000)]
    outcomes = read_file(tmp_path / "a.txt", "\n".join(texts).encode("utf-16"), split_bytes=1000)
    assert [o.text for o in outcomes] == texts
    assert [(o.origin.position, o.origin.unit) for o in outcomes[:2]] == [(0, "row"), (1, "row")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "iso8859-15", "utf-16", "cp037", "gb18030", "utf-7"])
def test_the_encoding_is_a_setting(tmp_path, encoding):
    texts = TEXTS["latin"]
    for kind, write in FORMATS.items():
        outcomes = read_file(tmp_path / f"a.{kind}", write(texts).encode(encoding), encoding=encoding)
        assert summarize(outcomes) == texts


def test_a_byte_order_mark_goes_before_the_setting(tmp_path):
    for encoding in ("utf-16", "utf-8-sig", "utf-32"):
        outcomes = read_file(tmp_path / "a.txt", "Größe\n".encode(encoding), encoding="cp1252")
        assert summarize(outcomes) == ["Größe"]


def test_utf8_is_not_read_as_utf16(tmp_path):
    for data in (b"plain words\n", "größe – 東京 text\n".encode()):
        with pytest.raises(ConfigError, match=r"--encoding=utf-16: .*a\.txt is UTF-8; leave the flag out"):
            read_file(tmp_path / "a.txt", data, encoding="utf-16")
    assert summarize(read_file(tmp_path / "b.txt", "你好".encode("utf-16-le"), encoding="utf-16")) == ["你好"]


@pytest.mark.parametrize(
    "encoding, bad",
    [
        ("cp1252", b"\x81"),
        ("shift_jis", b"\x81\x01"),
        ("utf-16-le", b"\x00\xd8a\0"),
        ("euc_kr", b"\xff"),
        ("ascii", b"\xe9"),
    ],
)
def test_bytes_that_cannot_be_decoded_cost_one_record(tmp_path, encoding, bad):
    lines = ["one", "two", "three", "four"]
    data = b"".join(f"{line} ".encode(encoding) + bad * (line == "two") + "x\n".encode(encoding) for line in lines)
    outcomes = read_file(tmp_path / "a.txt", data, encoding=encoding)
    assert summarize(outcomes) == ["one x", ("invalid_utf8", 1), "three x", "four x"]
    assert f"not {codecs.lookup(encoding).name}" in outcomes[1].message and outcomes[1].text.startswith("two \ufffd")
    rows = b"".join(f"{line},".encode(encoding) + bad * (line == "two") + "x\n".encode(encoding) for line in lines)
    outcomes = read_file(tmp_path / "a.csv", "text,n\n".encode(encoding) + rows, encoding=encoding)
    assert summarize(outcomes) == ["one", ("invalid_utf8", 1), "three", "four"]


def test_two_bad_bytes_do_not_become_a_letter(tmp_path):
    """As surrogateescape would make them: 0xC3 0xA9 are no ASCII, but are a letter in UTF-8."""
    assert summarize(read_file(tmp_path / "a.txt", b"\xc3\xa9\nb", encoding="ascii")) == [("invalid_utf8", 0), "b"]


@pytest.mark.parametrize(
    "name, hint",
    [
        ("utf-9", "did you mean utf-8"),
        ("latin1x", "did you mean latin1"),
        ("base64", "--encoding=base64"),
        ("", "use one"),
    ],
)
def test_names_of_no_encoding(name, hint):
    with pytest.raises(ConfigError, match=hint):
        ReadConfig(encoding=name)


def test_carriage_returns_alone_end_lines(tmp_path):
    for kind, write in FORMATS.items():
        data = write(TEXTS["latin"]).replace("\r\n", "\n").replace("\n", "\r")
        assert summarize(read_file(tmp_path / f"a.{kind}", data.encode())) == TEXTS["latin"]
        assert summarize(read_file(tmp_path / f"b.{kind}", data.encode("utf-16"))) == TEXTS["latin"]
    mixed = read_file(tmp_path / "c.txt", b"one\rtwo\nthree")
    assert summarize(mixed) == ["one\rtwo", "three"]
    cut = b"x" * 4095 + b"\r\n" + b"y\r\n"  # the first 4096 bytes end between the two
    assert summarize(read_file(tmp_path / "d.txt", cut)) == ["x" * 4095, "y"]


def test_binary_text_is_a_dead_letter(tmp_path):
    data = json.dumps({"text": "a\0b\0c\0d\0"}) + "\n" + json.dumps({"text": "one\0nul, \x1b[1mand colours"}) + "\n"
    outcomes = read_file(tmp_path / "a.jsonl", data.encode())
    assert summarize(outcomes) == [("binary_text", 0), "one\0nul, \x1b[1mand colours"]
    assert "--encoding" in outcomes[0].message


@given(st.text(alphabet="ab é東🙂\0\x01\x1f\n\t"))
def test_binary_text_is_controls_by_half(text):
    n = sum(c in "\0\x01\x1f" for c in text)
    assert is_binary_text(text) == (n > 0 and n >= len(text) / 2)


def test_long_binary_text():
    randomly = random.Random(1)
    for n in (1000, 5000, 100_000):
        words = "".join(randomly.choices("abc defgh", k=n))
        assert not is_binary_text(words) and not is_binary_text(words + "\0" * (n // 10))
        assert is_binary_text("\0".join(words) + "\0") and is_binary_text("\0" + "\0".join(words))
        assert is_binary_text("".join(randomly.choices("\x02\x1f\x03ab", k=n)))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_utf8_without_nuls_is_taken_for_nothing_else(text):
    assert find_encoding(text.lstrip("\ufeff").encode(), "utf-8") == ""


def test_nuls_in_utf8_are_taken_for_nothing_else():
    for data in (b"", b"\0", b"\0" * 100, b"a\0", b"nul\0inside a line\nand\0here\n", "é\0東\0".encode() * 9):
        assert find_encoding(data, "utf-8") == ""


def test_one_carriage_return_in_a_long_first_line_ends_no_line(tmp_path):
    long = "aa\rbb" + "c" * 5000
    outcomes = read_file(tmp_path / "a.txt", f"{long}\nsecond\rline\nthird\n")
    assert [outcome.text for outcome in outcomes] == [long, "second\rline", "third"]


@pytest.mark.parametrize("name", ["idna", "punycode"])
def test_encodings_that_cannot_be_read_leniently_are_refused(name):
    with pytest.raises(ConfigError, match=f"--encoding={name} is not a text encoding"):
        ReadConfig(encoding=name)
