"""A JSON file that is one array gives its elements, whatever they are, and is never held as a whole."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.read_config import ReadConfig
from pipeline.sources.compression import DamagedFile, TruncatedFile
from pipeline.sources.json_array import iterate_elements
from pipeline.sources.planning import plan_input
from pipeline.sources.read import read_range
from tests.support.sources import read_file, summarize


class SmallReads(io.BytesIO):
    """Gives a few bytes at a time, as streams may."""

    def __init__(self, data, n_bytes):
        super().__init__(data)
        self.n_bytes = n_bytes

    def read(self, size=-1):
        return super().read(self.n_bytes)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(values=st.lists(VALUES), n_bytes=st.integers(1, 20), ascii=st.booleans(), indent=st.sampled_from([None, 0, 2]))
def test_elements_are_those_of_the_json_module(values, n_bytes, ascii, indent):
    data = json.dumps(values, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")
    elements = list(iterate_elements(SmallReads(data, n_bytes), 1 << 20, "a.json"))
    assert [e.value for e in elements] == values and not any(e.error or e.is_too_large for e in elements)
    assert [json.loads(e.text.encode("utf-8", "surrogateescape")) for e in elements] == json.loads(data)


BAD = [
    '{"text" "no colon"}',
    '{"a": [1, {"b": "]}"}, ]}',
    "nonsense",
    '{"text": "a\nb"}',
    '{"text": "\\x"}',
    "[" * 50_000 + "]" * 50_000,
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_an_element_that_cannot_be_parsed_costs_itself(tmp_path, bad):
    for where in range(3):
        elements = ['{"text": "one"}', '{"text": "two, \\" [{"}']
        elements.insert(where, bad)
        outcomes = read_file(tmp_path / "a.json", "[" + ",\n".join(elements) + "]")
        expected = ["one", 'two, " [{']
        expected.insert(where, ("malformed_json", where))
        assert summarize(outcomes) == expected
        assert outcomes[where].text == bad[:1000]


def test_elements_that_are_no_objects_and_bad_bytes(tmp_path):
    data = b' \n[ 3 , "x", null, [{"text": "deep"}], {"text": "b\xff"}, {"text": "\\ud83d"}, {"n": ' + b"9" * 5000
    outcomes = read_file(tmp_path / "a.json", data + b', "text": "last"} ] \n')
    bad = [("malformed_json", i) for i in range(4)] + [("invalid_utf8", 4), ("invalid_utf8", 5)]
    assert summarize(outcomes) == [*bad, "last"]
    assert outcomes[4].text == '{"text": "b\\xff"}' and outcomes[0].message.startswith("a whole number, not an object")


def test_a_large_element_is_skipped(tmp_path):
    for large in ('{"text": "' + "x" * 900_000 + '"}', '{"text": ["' + '", "\\"], [' * 100_000 + '"]}', "é" * 700_000):
        elements = ['{"text": "one"}', large if large[0] == "{" else json.dumps({"text": large}), '{"text": "two"}']
        outcomes = read_file(tmp_path / "a.json", f"[{','.join(elements)}]", max_document_bytes=2000)
        assert summarize(outcomes) == ["one", ("too_large", 1), "two"]
        assert len(outcomes[1].text) <= 1000 and str(len(elements[1]))[:3] in outcomes[1].message


def test_a_large_file_takes_little_memory(tmp_path):
    element = json.dumps({"text": "word " * 100})
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join([element] * 20_000) + "]")
    config = ReadConfig(input=(str(path),))
    (split,) = plan_input(config).splits
    tracemalloc.start()
    n = sum(1 for r in split for _ in read_range(r, config, ()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000 and peak < 4 << 20 < path.stat().st_size


@pytest.mark.parametrize(
    "data, error, message",
    [
        ('[{"a": 1}, {"b": 2}', TruncatedFile, "its array is not closed behind element 1"),
        ('[{"a": 1}, {"b": "x', TruncatedFile, "its array is not closed behind element 1"),
        ("[", TruncatedFile, "is cut off"),
        ('[{"a": 1} {"b": 2}]', DamagedFile, "there is no comma behind element 0"),
        ('[{"a": 1}]\n[{"a": 2}]', DamagedFile, "there is more behind its array"),
        ('{"a": 1}', DamagedFile, r"does not begin with \["),
        ("", DamagedFile, r"does not begin with \["),
    ],
)
def test_files_that_are_no_array(data, error, message):
    for n_bytes in (1, 1000):
        with pytest.raises(error, match=rf"a\.json.*{message}"):
            list(iterate_elements(SmallReads(data.encode(), n_bytes), 1000, "a.json"))


def test_json_is_an_array_or_lines_by_its_first_character(tmp_path):
    for data in (
        '[{"text": "a"}]',
        ' \r\n\t[{"text": "a"}]',
        '\ufeff[{"text": "a"}]',
        '{"text": "a"}\n',
        '\ufeff\n{"text": "a"}',
    ):
        assert summarize(read_file(tmp_path / "a.json", data)) == ["a"]
    assert read_file(tmp_path / "a.json", "[]") == []
    named = read_file(tmp_path / "a.txt", '[{"text": "a"}]', input_format="json")
    lines = read_file(tmp_path / "a.jsonl", '[1, 2]\n{"text": "a"}\n')
    assert summarize(named) == ["a"] and summarize(lines) == [("malformed_json", 0), "a"]


def test_an_array_behind_many_blanks_is_an_array(tmp_path):
    assert summarize(read_file(tmp_path / "a.json", " " * 5000 + '[{"text": "a"}, {"text": "b"}]')) == ["a", "b"]
