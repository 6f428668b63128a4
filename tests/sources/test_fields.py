"""What fields of a record become: nested ones, ids of every kind, kept values, and texts that are blank."""

import datetime
import decimal
import json
import sys
import unicodedata
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.preprocess.wordpiece import Tokenizer, Vocabulary
from pipeline.read_config import ReadConfig
from pipeline.records import DeadLetter
from pipeline.sources.arrow_schema import find_leaves
from pipeline.sources.field_paths import MISSING, find_value
from pipeline.sources.fields import is_blank
from pipeline.sources.kept import choose_type
from pipeline.sources.parquet import open_parquet, select_columns
from pipeline.sources.planning import plan_input
from pipeline.sources.read import read_range
from pipeline.sources.sampling import infer_kept_fields, sample_input
from tests.support.paths import PREPROCESSOR


def read(path, live=(), **settings):
    """Outcomes of a file, the types of its kept fields, and the counts of kept values that became null."""
    config = ReadConfig(input=(str(path),), **settings)
    plan = plan_input(config)
    kept = infer_kept_fields(sample_input(plan, config).fields, config, live)
    nulls = Counter()
    outcomes = [item.outcome for split in plan.splits for r in split for item in read_range(r, config, kept, nulls)]
    return outcomes, kept, dict(nulls)


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept_values(outcomes):
    assert not [outcome for outcome in outcomes if isinstance(outcome, DeadLetter)]
    return [json.loads(outcome.kept) for outcome in outcomes]


BATCH = {
    "custom_id": "request-1",
    "response": {"body": {"choices": [{"index": 0, "message": {"content": "an answer", "role": "x"}}], "model": "m"}},
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nested_fields_and_positions_in_lists(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", [BATCH])
    outcomes, kept, _ = read(
        path,
        id_field="custom_id",
        text_field=("response.body.choices.0.message.content",),
        keep_fields=("response.body.model",),
    )
    assert [(d.id, d.text) for d in outcomes] == [("request-1", "an answer")]
    assert kept_values(outcomes) == [["m"]] and kept[0].name == "response_body_model"


def test_only_the_needed_leaves_of_parquet_are_read(tmp_path):
    path = write(tmp_path / "a.parquet", [BATCH])
    config = ReadConfig(input=(str(path),), text_field=("response.body.choices.0.message.content",))
    (file,) = plan_input(config).files
    with path.open("rb") as stream:
        columns = select_columns(open_parquet(stream, file), file, config)
    assert columns == ["response.body.choices.list.element.message.content"]


def test_a_name_with_a_dot_wins_over_a_path(tmp_path):
    values = {"a.b": 1, "a": {"b": 2, "b.c": 3, "l": [4, {"x": 5}]}}
    paths = ("a.b", "a.b.c", "a.l.0", "a.l.1.x", "a.l.2", "a.l.-1", "a.x", "b")
    assert [find_value(values, path) for path in paths] == [1, 3, 4, 5, *[MISSING] * 4]
    fields = list(pa.Table.from_pylist([{"a": {"b": 2, "b.c": 3}, "a.b": 1}]).schema)
    assert [find_leaves(fields, path) for path in ("a", "a.b", "a.b.c", "a.x")] == [
        range(2), range(2, 3), range(1, 2), None,
    ]  # fmt: skip
    for kind in ("jsonl", "parquet"):
        path = write(tmp_path / f"a.{kind}", [{"doc.text": "literal", "doc": {"text": "nested"}}])
        assert [d.text for d in read(path, text_field=("doc.text",))[0]] == ["literal"]


def test_columns_that_would_have_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"names 'meta_lang' twice, since the dots of meta\.lang become _"):
        ReadConfig(keep_fields=("meta_lang", "meta.lang"))


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        ([10] * 300 + [9.99], "float", [10.0] * 300 + [9.99]),
        ([1] * 300 + ["x"], "string", ["1"] * 300 + ["x"]),
        ([2**53 + 1, 0.5], "string", ["9007199254740993", "0.5"]),
        ([1, 2**63], "string", ["1", "9223372036854775808"]),
        ([True, 1], "string", ["true", "1"]),
        ([[1, "a"], {"b": 1, "a": float("nan")}], "string", ['[1,"a"]', '{"a":"NaN","b":1}']),
        ([None, None], "string", [None, None]),
    ],
)
def test_types_widen_over_all_sampled_records(tmp_path, values, kind, stored):
    path = write(tmp_path / "a.jsonl", [{"text": "t", "v": value} for value in values])
    outcomes, kept, nulls = read(path, keep_fields=("v",))
    assert kept[0].type == kind and nulls == {}
    assert [value for (value,) in kept_values(outcomes)] == stored


def test_what_does_not_fit_is_null_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "t", "v": v} for v in (1, 2.0, 2.5, "x", True, [1], 2**64, "\ud83d")])
    outcomes, _, nulls = read(path, keep_fields=("v:int",))
    assert [value for (value,) in kept_values(outcomes)] == [1, 2, *[None] * 6] and nulls == {"v": 6}
    strict, _, _ = read(path, keep_fields=("v:int",), on_kept_mismatch="dead_letter")
    assert [isinstance(outcome, DeadLetter) for outcome in strict] == [False] * 2 + [True] * 6


def test_the_live_type_stays_if_it_holds_the_values(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "t", "v": 1, "n": {"v": 0.5}}])
    for live, kind in (("float", "float"), ("string", "string"), ("int", "int"), ("bool", "string")):
        assert read(path, [ReadConfig(keep_fields=(f"v:{live}",)).kept_fields()[0]], keep_fields=("v",))[1][0].type == (
            kind
        )
    assert read(path, ReadConfig(keep_fields=("n.v:int",)).kept_fields(), keep_fields=("n.v",))[1][0].type == "float"


def test_arrow_types_become_plain_values(tmp_path):
    broken = pa.array([b"ok", b"\xff"], pa.large_binary())
    strings = pa.Array.from_buffers(pa.large_string(), 2, broken.buffers())
    columns = {
        "text": pa.array(["one", "two"], pa.large_string()),
        "s": strings,
        "list": pa.ListArray.from_arrays([0, 1, 2], strings),
        "struct": pa.StructArray.from_arrays([strings], ["x"]),
        "dict": pa.array([b"ok", b"\xff"]).view(pa.string()).dictionary_encode(),
        "ns": pa.array([1_706_788_800_000_000_001, 0], pa.timestamp("ns")),
        "far": pa.array([2**50, None], pa.timestamp("ms", "UTC")),
        "day": pa.array([datetime.date(2026, 1, 31), None]),
        "money": pa.array([decimal.Decimal("1.50"), decimal.Decimal("-0.25")]),
        "pause": pa.array([1500, -1], pa.duration("ms")),
        "raw": pa.array([b"\x01\xff", b"\x02\x00"], pa.binary(2)),
        "map": pa.array([[("b", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())),
        "none": pa.array([None, None], pa.int32()),
    }
    path = write(tmp_path / "a.parquet", pa.table(columns))
    names = [name for name in columns if name != "text"]
    outcomes, kept, nulls = read(path, keep_fields=tuple(names))
    first, second = (dict(zip(names, row, strict=True)) for row in kept_values(outcomes))
    assert first == {
        "s": "ok", "list": '["ok"]', "struct": '{"x":"ok"}', "dict": "ok", "ns": "2024-02-01T12:00:00.000000001",
        "far": first["far"],
        "day": "2026-01-31", "money": "1.50", "pause": "PT1.5S", "raw": "01ff", "map": '{"a":2,"b":1}', "none": None,
    }  # fmt: skip
    assert first["far"].endswith("Z") and int(first["far"][:5]) > 9999
    assert {name for name, value in second.items() if value is None} == {
        "s", "list", "struct", "dict", "far", "day", "none",
    }  # fmt: skip
    assert nulls == {"s": 1, "list": 1, "struct": 1, "dict": 1}
    assert {field.name: field.type for field in kept}["none"] == "int"


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string()])
def test_one_bad_byte_costs_one_document(tmp_path, kind):
    storage = pa.large_binary() if kind == pa.large_string() else pa.binary()
    texts = pa.Array.from_buffers(kind, 3, pa.array([b"a", b"\xff", b"c"], storage).buffers())
    nested = pa.StructArray.from_arrays([texts], ["body"])
    path = write(tmp_path / "a.parquet", pa.table({"text": texts, "doc": nested}))
    for field in ("text", "doc.body"):
        outcomes, _, _ = read(path, text_field=(field,))
        assert [getattr(o, "reason", "") or o.text for o in outcomes] == ["a", "invalid_utf8", "c"]


def test_duplicate_and_missing_columns_of_parquet_are_named(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, ["text", "text", "id"])
    path = write(tmp_path / "a.parquet", twice)
    with pytest.raises(InputError, match="several columns with the name 'text': text, text, id"):
        read(path)
    config = ReadConfig(input=(str(path),), text_field=("txet",), on_bad_file="skip")
    plan = plan_input(config)
    (item,) = read_range(plan.splits[0][0], config, ())
    assert item.outcome.reason == "missing_field" and "did you mean --text_field=text?" in item.outcome.message


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (pa.array([1.0, 2.0]), ["1", "2"]),
        (pa.array([2**64 - 1, 7], pa.uint64()), ["18446744073709551615", "7"]),
        (pa.array([decimal.Decimal("12.00"), decimal.Decimal("3.00")]), ["12", "3"]),
        (pa.array([b"key", b"007"]), ["key", "007"]),
        (pa.array([bytes(range(16)), b"\xff" * 16], pa.binary(16)).cast(pa.uuid()),
         ["00010203-0405-0607-0809-0a0b0c0d0e0f", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
        (pa.array([decimal.Decimal(10**37 + 7), None], pa.decimal128(38, 0)), [str(10**37 + 7), "missing_field"]),
        (pa.array([1.5, float("nan")]), ["wrong_type", "missing_field"]),
        (pa.array([2.0**60, float("inf")]), ["wrong_type", "wrong_type"]),
    ],
    ids=["double", "uint64", "decimal", "bytes", "uuid", "many digits", "no whole number", "no exact number"],
)  # fmt: skip
def test_ids_of_every_kind(tmp_path, values, ids):
    path = write(tmp_path / "a.parquet", pa.table({"id": values, "text": ["a", "b"]}))
    assert [getattr(o, "reason", "") or o.id for o in read(path, id_field="id")[0]] == ids


def test_leading_zeros_of_ids_stay(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n007,a\n1.0,b\n")
    assert [d.id for d in read(tmp_path / "a.csv", id_field="id")[0]] == ["007", "1.0"]


def test_a_misspelt_field_names_the_nearest_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"_id": "1", "text": "t", "meta": {"lang": "en"}}])
    for settings, flag in (
        ({"text_field": ("txt",)}, "--text_field=text"),
        ({"text_field": ("text", "txet")}, "--text_field=text"),
        ({"id_field": "id"}, "--id_field=_id"),
        ({"pair_field": "meta.lnag"}, "--pair_field=meta.lang"),
        ({"keep_fields": ("meta.lagn",)}, "--keep_fields=meta.lang"),
    ):
        with pytest.raises(ConfigError, match=f"they have _id, text, meta.*did you mean {flag}\\?"):
            read(path, **settings)
    config = ReadConfig(input=(str(path),), text_field=("txt",))
    (item,) = read_range(plan_input(config).splits[0][0], config, ())
    assert "the record has _id, text, meta; did you mean --text_field=text?" in item.outcome.message


def test_beir(tmp_path):
    rows = [
        {"_id": "d1", "title": "Title", "text": "Body", "metadata": {"url": "u", "n": [1]}},
        {"_id": "d2", "title": "", "text": "Body", "metadata": {}},
    ]
    path = write(tmp_path / "corpus.jsonl", rows)
    outcomes, _, _ = read(path, id_field="_id", text_field=("title", "text"), keep_fields=("metadata",))
    assert [(d.id, d.text) for d in outcomes] == [("d1", "Title Body"), ("d2", "Body")]
    assert kept_values(outcomes) == [['{"n":[1],"url":"u"}'], ["{}"]]


def test_a_text_without_tokens_is_blank():
    """Every assigned code point that alone gives no token, by the exact tokeniser; line ends of all kinds besides."""
    vocabulary = Vocabulary.read(f"{PREPROCESSOR}/assets/vocab.txt", lower_case=True)
    known = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    _, splits = Tokenizer(vocabulary).tokenize(known)
    dropped = {c for c, begin, end in zip(known, splits, splits[1:], strict=False) if begin == end}
    assert {c for c in known if is_blank(c)} - dropped <= set("\u1680\u2028\u2029")
    assert dropped <= {c for c in known if is_blank(c)}
    assert (
        is_blank("") and is_blank("\x00\u200b\ufeff \u00ad\ufe0f\n") and not is_blank("\u200bx") and not is_blank("-")
    )


def test_texts_without_visible_characters(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "\u200b\ufeff"}, {"text": "\x00\x01"}, {"text": "a\u200b"}])
    assert [getattr(o, "reason", "") or o.text for o in read(path)[0]] == ["empty_text", "empty_text", "a\u200b"]


@pytest.mark.parametrize(
    ("live", "kinds", "chosen"),
    [
        ("int", {"bool"}, "string"),
        ("int", {"float"}, "float"),
        ("bool", {"int"}, "string"),
        ("float", {"long"}, "string"),
        ("float", {"int"}, "float"),
        ("int", {"long"}, "int"),
        ("", {"bool"}, "bool"),
        ("string", {"int"}, "string"),
    ],
)
def test_a_live_type_widens_and_never_narrows(live, kinds, chosen):
    assert choose_type(kinds, live) == chosen
