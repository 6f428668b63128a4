"""CSV and TSV as people have them: stray quotes, other delimiters, no header, ragged rows, repeated columns."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, InputError
from pipeline.read_config import ReadConfig
from pipeline.sources.compression import WrongColumns
from pipeline.sources.csv import CsvSource
from pipeline.sources.planning import plan_input
from pipeline.sources.sampling import sample_input
from pipeline.sources.source import FileRange, InputFile
from tests.support.sources import read_file, summarize


def read_records(path, data, **settings):
    """What the source itself yields, or raises."""
    path.write_text(data)
    config = ReadConfig(input=(str(path),), **settings)
    (file,) = plan_input(config).files
    return list(CsvSource(",", '"').read_records(FileRange.whole(file), config))


STRAY = 'id{0}text\n1{0}"To be\n2{0}a plain line\n3{0}nine feet by 10"\n4{0}last\n'


def test_quotes_in_tsv_are_text(tmp_path):
    outcomes = read_file(tmp_path / "a.tsv", STRAY.format("\t"), id_field="id")
    assert [(o.id, o.text) for o in outcomes] == [
        ("1", '"To be'),
        ("2", "a plain line"),
        ("3", 'nine feet by 10"'),
        ("4", "last"),
    ]


def test_quotes_are_what_the_setting_says(tmp_path):
    assert summarize(read_file(tmp_path / "a.csv", STRAY.format(","), quote="none")) == [
        '"To be',
        "a plain line",
        'nine feet by 10"',
        "last",
    ]
    assert summarize(read_file(tmp_path / "a.tsv", 'id\ttext\n1\t"a\tb"\n', quote='"')) == ["a\tb"]
    assert summarize(read_file(tmp_path / "b.csv", "id,text\n1,'a, ''b'''\n", quote="'")) == ["a, 'b'"]
    assert summarize(read_file(tmp_path / "c.csv", 'id,text\n1,ßa, "bß\n', quote="ß")) == ['a, "b']


@pytest.mark.parametrize("n", [10, 100, 5000])
@pytest.mark.parametrize("closed", [True, False])
def test_a_stray_quote_costs_one_line(tmp_path, n, closed):
    lines = [
        "id,text",
        '0,"To be',
        *(f"{i},row {i}" for i in range(1, n)),
        f'{n},nine feet by 10"' if closed else "x,y",
    ]
    outcomes = read_file(tmp_path / "a.csv", "\n".join(lines))
    rest = [*(f"row {i}" for i in range(1, n)), 'nine feet by 10"' if closed else "y"]
    assert summarize(outcomes) == [("malformed_csv", 0), *rest]
    assert outcomes[0].text == '0,"To be'


def test_text_behind_a_closing_quote_costs_one_line(tmp_path):
    data = 'id,text\n1,"open\n2,plain\n3,"junk" x\n4,"ok"\n5,last\n'
    assert summarize(read_file(tmp_path / "a.csv", data)) == [
        ("malformed_csv", 0),
        "plain",
        ("malformed_csv", 2),
        "ok",
        "last",
    ]


def test_a_long_cell_that_is_no_row_is_bounded_by_lines(tmp_path):
    cell = "\n".join(f"line {i}" for i in range(1200))
    data = f'id,text\n1,"{cell}"\n2,fine\n'
    outcomes = read_file(tmp_path / "a.csv", data)
    assert outcomes[0].reason == "malformed_csv" and "--max_quoted_lines=1000" in outcomes[0].message
    assert summarize(outcomes)[-1] == "fine"
    for n in (1200, 0):
        assert summarize(read_file(tmp_path / "a.csv", data, max_quoted_lines=n)) == [cell, "fine"]


CELLS = [
    "a letter,\nwith verses\n\nand, commas",
    "\n".join(f"{i},item" + ", more" * (i % 2) for i in range(30)),
    "\n".join("an item of a list," for _ in range(30)),
    "\n".join("no delimiter" for _ in range(900)),
    'she said "yes",\nand left',
]


@pytest.mark.parametrize("cell", CELLS)
def test_genuine_cells_of_many_lines_stay(tmp_path, cell):
    out = io.StringIO()
    csv.writer(out).writerows([["id", "text"], ["1", cell], ["2", "after"]])
    assert summarize(read_file(tmp_path / "a.csv", out.getvalue())) == [cell, "after"]


def test_a_cell_that_holds_a_table_needs_the_setting(tmp_path):
    cell = "\n".join(f"{i},x" for i in range(12))
    data = f'id,text\n1,"begin\n{cell}\nend"\n'
    outcomes = read_file(tmp_path / "a.csv", data)
    assert outcomes[0].reason == "malformed_csv" and "--max_quoted_lines=0" in outcomes[0].message
    assert summarize(read_file(tmp_path / "a.csv", data, max_quoted_lines=0)) == [f"begin\n{cell}\nend"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.text(alphabet='ab,;"\n\té'), min_size=2, max_size=2).filter(lambda row: any(row)), min_size=1
    ),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    delimiter=st.sampled_from(",;\t"),
)
def test_what_the_csv_module_writes_is_read(tmp_path_factory, rows, quoting, delimiter):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as out:
        csv.writer(out, quoting=quoting, delimiter=delimiter, lineterminator="\n").writerows(rows)
    config = ReadConfig(columns=("a", "text"), quote='"', delimiter=delimiter, max_quoted_lines=0)
    file = FileRange.whole(InputFile(0, str(path), "a.csv", path.stat().st_size, "csv"))
    records = list(CsvSource(",", '"').read_records(file, config))
    assert [[r.values["a"], r.values["text"]] for r in records] == rows


@pytest.mark.parametrize(
    "name, character", [(";", ";"), ("|", "|"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), ("\x01", "\x01")]
)
def test_the_delimiter_is_a_setting(tmp_path, name, character):
    data = f"id{character}text\n1{character}a, b\n"
    assert summarize(read_file(tmp_path / "a.csv", data, delimiter=name)) == ["a, b"]


def test_files_without_a_header(tmp_path):
    data = "1\tone\n2\ttwo\n"
    named = read_file(tmp_path / "a.tsv", data, columns=("id", "text"), id_field="id")
    numbered = read_file(tmp_path / "a.tsv", data, header="none", id_field="1", text_field=("2",))
    assert [(o.id, o.text, o.origin.position) for o in named] == [
        ("1", "one", 0),
        ("2", "two", 1),
    ] and named == numbered
    renamed = read_file(tmp_path / "b.tsv", "k\tv\n" + data, columns=("id", "text"), header="first", id_field="id")
    assert [(o.id, o.text) for o in renamed] == [("1", "one"), ("2", "two")]
    assert summarize(read_file(tmp_path / "c.csv", 'x,"y\nz"\n', header="none", text_field=("2",))) == ["y\nz"]


def test_ms_marco_without_header(tmp_path):
    data = '1185869\t)what was the "immediate impact\n1185868\t_________ justice is designed to\n'
    outcomes = read_file(tmp_path / "queries.tsv", data, input_format="tsv", columns=("id", "text"), id_field="id")
    assert [(o.id, o.text) for o in outcomes] == [
        ("1185869", ')what was the "immediate impact'),
        ("1185868", "_________ justice is designed to"),
    ]


def test_a_header_that_is_taken_for_a_row_is_refused(tmp_path):
    with pytest.raises(WrongColumns, match=r"the first row holds the names of --columns.*--header=first"):
        read_records(tmp_path / "a.csv", "id,text\n1,a\n", columns=("id", "text"))


def test_ragged_rows(tmp_path):
    for suffix, d in ((".csv", ","), (".tsv", "\t")):
        data = "id,text\n1\n2,two,,\n3,three,more\n4,\n5,five\n".replace(",", d)
        outcomes = read_file(tmp_path / f"a{suffix}", data, on_empty="embed")
        assert summarize(outcomes) == [("malformed_csv", 0), "two", ("malformed_csv", 2), "", "five"]
        assert outcomes[2].message == "row 2 has 3 cells, but there are 2 columns"


def test_repeated_columns_are_refused(tmp_path):
    data = "id,text,lang,text,lang\n1,a,en,b,de\n"
    with pytest.raises(WrongColumns, match=r"a\.csv: there are several columns with the name 'text': id, text, lang"):
        read_records(tmp_path / "a.csv", data)
    with pytest.raises(WrongColumns, match="the name 'text' and 'lang'"):
        read_records(tmp_path / "a.csv", data, keep_fields=("lang",))
    config = ReadConfig(input=(str(tmp_path / "a.csv"),))
    with pytest.raises(InputError, match="several columns with the name 'text'"):
        sample_input(plan_input(config), config)
    unused = read_file(tmp_path / "b.csv", "id,text,,\n1,a,,\n")  # as spreadsheets write them
    assert summarize(unused) == ["a"]


def test_a_missing_column_is_an_error_of_the_file(tmp_path):
    with pytest.raises(
        WrongColumns, match=r"a\.csv: column 'text' is missing, the file has id, body; see --text_field"
    ):
        read_records(tmp_path / "a.csv", "id,body\n1,a\n")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"delimiter": ",,"}, "--delimiter=',,' is not one character"),
        ({"delimiter": "\n"}, "--delimiter='.n' is not one character"),
        ({"quote": "off"}, "--quote='off' is not one character"),
        ({"quote": ";", "delimiter": ";"}, "--quote=; is also the --delimiter"),
        ({"columns": ("a", "b", "a")}, "--columns names 'a' twice"),
        ({"header": "second"}, "--header=second is not one of"),
        ({"max_quoted_lines": -1}, "--max_quoted_lines=-1 is negative"),
        ({"max_window": 0}, "--max_window=0 is not a number of MiB"),
        ({"max_window": 4096}, "--max_window=4096 is not a number of MiB from 1 to 2048"),
    ],
)
def test_settings_that_cannot_work(given, message):
    with pytest.raises(ConfigError, match=message):
        ReadConfig(**given)


@pytest.mark.parametrize("given", [{"delimiter": ";"}, {"quote": "none"}, {"columns": ("a",)}, {"header": "none"}])
def test_a_dialect_without_a_file_of_the_kind_is_refused(tmp_path, given):
    (tmp_path / "a.txt").write_text("one;two\n")
    with pytest.raises(ConfigError, match="is for CSV and TSV files, and the input is text"):
        plan_input(ReadConfig(input=(str(tmp_path / "*"),), **given))


def test_a_list_in_a_quoted_cell_is_no_stray_quote(tmp_path):
    cities = "\n".join(f"City {i}, Country {i}" for i in range(12))
    data = "id,text\n" + "".join(f"{i},row {i}\n" for i in range(20)) + f'cities,"{cities}"\nlast,one\n'
    outcomes = read_file(tmp_path / "a.csv", data, id_field="id")
    assert [outcome.id for outcome in outcomes] == [*map(str, range(20)), "cities", "last"]
    assert outcomes[20].text == cities
