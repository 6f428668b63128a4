"""The command line: flags, files of settings, help, exit codes, and what goes to which stream."""

import errno
import io
import json
import os
import re
import shutil
import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.tables.manifest import open_table
from tests.support.paths import ENCODER
from tests.support.processes import assert_one_line, start_cli
from tests.support.runs import run_embed


@pytest.fixture
def resolved(call, monkeypatch):
    """Runs `embed` up to the point where the job would begin: arguments -> configuration, Beam's options."""

    def run(*arguments):
        seen = []

        def stop(config, options=None, show_progress=False):
            seen.append((config, options))
            raise ConfigError("far enough")

        monkeypatch.setattr("pipeline.run.job.build_table", stop)
        code, out, err = call("embed", *arguments)
        assert seen, err
        assert (code, out) == (2, "") and "far enough" in err
        return seen[0]

    return run


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "a.txt").write_text("a dog\na cat\na horse\n")
    run_embed(folder / "a.txt", folder / "table", keep_text=True)
    return folder / "table"


# Flags.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["embd"], "embed"),
        (["embed", "--imput=a"], "--input"),
        (["embed", "--max_token=3"], "--max_tokens"),
        (["embed", "--batch-tokens=64"], "--batch_tokens"),
        (["embed", "--batch-tokens", "64"], "--batch_tokens"),
        (["embed", "--on-long=chunk"], "--on_long"),
        (["embed", "--direct_num_worker=2"], "--direct_num_workers"),
        (["embed", "--input=a", "--inputs=b"], "--input"),
        (["embed", "--norm"], "--normalize"),
        (["show", "DIR", "--row=3"], "--rows"),
        (["query", "DIR", "text", "--topp=3"], "--top"),
        (["embed", "a.txt"], "--input=a.txt"),
        (["embed", "--input", "a.txt", "b.txt"], "--input=b.txt"),
        (["embed", "--project", "p", "--input", "a.txt", "b.txt"], "--input=b.txt"),
        (["embed", "--save_main_session", "--input=a.txt", "b.txt"], "--input=b.txt"),
        (["embed", "--input=a", "--qqqqqqq"], "--qqqqqqq"),
        (["embed", "--input"], "--input"),
        (["embed", "--config"], "--config"),
        (["embed", "--normalize=perhaps"], "true or false"),
        (["embed", "--direct_num_workers=many"], "--direct_num_workers"),
        (["embed", "--direct_running_mode=fast"], "--direct_running_mode"),
        (["embed", "--runner_option=parallelism"], "--runner_option=parallelism=VALUE"),
        (["show"], "DIR"),
        (["show", "DIR", "--rows=many"], "--rows"),
        (["show", "DIR", "--rows=-1"], "--rows"),
        (["query", "DIR"], "TEXT"),
        (["query", "DIR", "text", "--top=0"], "--top"),
        (["query", "DIR", "text", "--top=-1"], "--top"),
        (["query", "DIR", "text", "--top=99999999999999999999"], "too large"),
        (["query", "DIR", "half", "text"], "in quotes"),
        (["show", "DIR", "DIR"], "name one table"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_that_names_the_fix(call, arguments, says, table):
    arguments = [str(table) if argument == "DIR" else argument for argument in arguments]
    if arguments[0] == "embed":  # complete but for what is wrong
        arguments += [f"--encoder={ENCODER}", "--output=/dev/null/table"]
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert says in assert_one_line(err)
    assert re.search(r"[^?.;,] A flag", err) is None, "two sentences run into each other"


def test_a_verb_is_needed(call):
    code, out, err = call()
    assert (code, out) == (2, "") and "embed" in err


def test_flags_take_their_values_in_either_form(resolved):
    config, _ = resolved(
        *("--input", "a.txt", "--input=b.txt", "--max_tokens", "16", "--dtype=int8", "--normalize"),
        *("--keep_text", "false", "--text_field=a,b", "--output", "t", "--batch_tokens=1_000"),
    )
    assert config.read.input == ("a.txt", "b.txt") and config.read.text_field == ("a", "b")
    assert (config.preprocess.max_tokens, config.batching.batch_tokens) == (16, 1000)
    assert (config.vectors.dtype, config.vectors.normalize, config.write.keep_text) == ("int8", True, False)


def test_beams_own_flags_are_passed_on(resolved):
    _, options = resolved(
        *("--input=a.txt", "--output=t", "--direct_num_workers=3", "--project", "p", "--temp_location=gs://b/t"),
        *("--experiments=a", "--experiments=b", "--runner_option=checkpointingInterval=7", "--save_main_session"),
    )
    given = options.get_all_options(retain_unknown_options=True)
    assert (given["direct_num_workers"], given["project"], given["temp_location"]) == (3, "p", "gs://b/t")
    assert set(given["experiments"]) >= {"a", "b"} and given["save_main_session"]
    assert str(given["checkpointingInterval"]) == "7"


# Files of settings.


def test_a_file_of_settings_has_the_names_of_the_flags(resolved, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'input = ["a.txt", "b.txt"]\noutput = "t"\ndirect_num_workers = 3\nsave_main_session = true\n'
        'experiments = ["a", "b"]\n[preprocess]\nmax_tokens = 16\n[vectors]\nnormalize = true\n'
        "[write]\nmax_dead_fraction = 1\n"
    )
    config, options = resolved(f"--config={path}", "--max_tokens=32", "--direct_num_workers=4")
    assert config.read.input == ("a.txt", "b.txt") and config.write.output == "t"
    assert config.preprocess.max_tokens == 32, "the command line wins"
    assert config.vectors.normalize and config.write.max_dead_fraction == 1
    given = options.get_all_options()
    assert given["direct_num_workers"] == 4, "the command line wins"
    assert given["save_main_session"] and set(given["experiments"]) >= {"a", "b"}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_file_of_settings_may_begin_with_a_byte_order_mark(resolved, tmp_path, line_end):
    (tmp_path / "run.toml").write_bytes(f"\ufeffinput = 'ü.txt'{line_end}max_tokens = 7{line_end}".encode())
    config, _ = resolved(f"--config={tmp_path}/run.toml")
    assert config.read.input == ("ü.txt",) and config.preprocess.max_tokens == 7


def test_a_file_of_settings_may_name_the_runner_and_its_options(resolved, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('runner = "FlinkRunner"\nrunner_option = ["checkpointingInterval=7"]\n')
    _, options = resolved(f"--config={path}")
    given = options.get_all_options(retain_unknown_options=True)
    assert given["runner"] == "FlinkRunner" and str(given["checkpointingInterval"]) == "7"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_token = 3", "max_tokens"),
        ("[read]\nimput = 'a'", "input"),
        ("config = 'other.toml'", "config"),
        ("max_tokens = 'many'", "--max_tokens=many is not a whole number"),
        ("max_tokens = [1]", "--max_tokens"),
        ("max_dead_fraction = [1]", "--max_dead_fraction"),
        ("max_dead_fraction = true", "--max_dead_fraction"),
        ("dtype = 8", "--dtype=8 is not one of"),
        ("output = ['a', 'b']", "--output"),
        ("normalize = 'perhaps'", "--normalize=perhaps is not true or false"),
        ("[read.input]\nx = 1", "input"),
        ("max_tokens = ", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_settings_that_cannot_work_is_one_line(call, tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_text(text)
    code, out, err = call("embed", f"--config={path}", f"--encoder={ENCODER}")
    assert (code, out) == (2, "")
    assert says in assert_one_line(err)


def test_a_file_of_settings_may_hold_every_flag_of_embed(call, tmp_path):
    (tmp_path / "a.txt").write_text("a dog\n")
    path = tmp_path / "run.toml"
    lines = [f'input = "{tmp_path}/a.txt"', f'output = "{tmp_path}/t"', f'encoder = "{ENCODER}"']
    path.write_text("\n".join([*lines, "summary_json = true", 'log_format = "json"', "debug = false"]))
    code, out, _ = call("embed", f"--config={path}")
    assert code == 0 and json.loads(out.splitlines()[-1])["rows"] == 1
    code, out, err = call("embed", f"--config={path}", "--max_tokens=1")
    assert code == 2 and json.loads(out)["exit_code"] == 2
    assert json.loads(err)["severity"] == "ERROR"
    path.write_text("\n".join([*lines, "[engine]", "debug = true"]))
    code, _, err = call("embed", f"--config={path}", "--max_tokens=1")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize("verb", ["embed", "plan"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_token = 3", "did you mean --max_tokens?"),
        ("gate = 'off'", "--gate is called --validate now"),
        ("direct_num_worker = 3", "did you mean --direct_num_workers?"),
        ("summary_json = 3", "--summary_json=3 is not true or false"),
        ("log_format = 'xml'", "--log_format=xml is not one of text, json"),
        ("runner = 3", "--runner=3 is not text"),
        ("help = true", "'help' is not a setting"),
    ],
)
def test_what_no_verb_knows_in_a_file_of_settings_is_refused(call, tmp_path, verb, text, says):
    path = tmp_path / "run.toml"
    path.write_text(text)
    code, out, err = call(verb, f"--config={path}", "--output=t")
    assert (code, out) == (2, "") and says in assert_one_line(err)


# Help.


@pytest.mark.parametrize("verb", ["", "embed", "show", "query", "export-encoder", "export-preprocessor"])
def test_help_fits_80_columns_and_goes_to_stdout(call, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call(*([verb] if verb else []), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    if verb == "embed":
        for group in ("Input", "Preprocessing", "Batching", "Encoder", "Vectors", "Output", "Engine"):
            assert f"\n{group}:\n" in out
        flat = " ".join(out.split())
        for shown in (
            "(default: float32)",
            "(default: truncate)",
            "(default: 0.1)",
            "(default: text)",
            "(default: local)",
        ):
            assert shown in flat
    for name in re.findall(r"^  (--\w+)", out, re.MULTILINE):
        assert "-" not in name[2:]


# Engines.


@pytest.mark.parametrize("runner", ["DaskRunner", "daskrunner", "apache_beam.runners.dask.dask_runner.DaskRunner"])
def test_the_engine_that_loses_results_is_refused(call, tmp_path, runner):
    code, _, err = call("embed", "--input=a", f"--output={tmp_path}/t", f"--runner={runner}")
    assert code == 2 and "loses results" in assert_one_line(err)


def test_an_unknown_engine_is_refused(call, tmp_path):
    code, _, err = call("embed", "--input=a", f"--output={tmp_path}/t", "--runner=SparkelRunner")
    assert code == 2 and "--runner=SparkelRunner" in assert_one_line(err)


@pytest.mark.parametrize(
    "runner", [None, "local", "DirectRunner", "directrunner", "FnApiRunner", "apache_beam.runners.direct.DirectRunner"]
)
def test_all_names_of_the_local_engine_mean_the_same(resolved, runner):
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    from pipeline.engines.runner import make_runner

    _, options = resolved("--input=a", "--output=t", *([f"--runner={runner}"] if runner else []))
    assert type(make_runner(options)) is FnApiRunner


# Streams and exit codes.


def test_results_alone_go_to_stdout(call, tmp_path):
    (tmp_path / "a.txt").write_text("a dog\na cat\n")
    code, out, err = call("embed", f"--input={tmp_path}/a.txt", f"--output={tmp_path}/t", f"--encoder={ENCODER}")
    assert code == 0 and out.startswith(f"{tmp_path}/t is published: 2 rows of 64 x float32\n")
    assert "Traceback" not in err
    code, out, err = call("show", tmp_path / "t", "--rows=1")
    assert (code, err) == (0, "") and "a.txt@0" in out and "a.txt@6" not in out
    code, out, err = call("query", tmp_path / "t", "a dog", "--top=1")
    assert (code, err) == (0, "") and "1.000  a.txt@0" in out


def test_a_process_that_succeeds_says_so_at_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\na cat\n")
    flags = [f"--input={tmp_path}/a.txt", f"--output={tmp_path}/t", f"--encoder={ENCODER}"]
    process = start_cli("embed", *flags, "--summary_json", "--log_format=json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["rows"] == open_table(str(tmp_path / "t"))[0].rows == 2
    assert all(json.loads(line)["severity"] == "INFO" for line in err.splitlines())


def test_a_process_that_fails_is_one_line_and_exit_1(tmp_path):
    (tmp_path / "a.txt").write_text("a dog\n\n")
    process = start_cli("embed", f"--input={tmp_path}/a.txt", f"--output={tmp_path}/t", f"--encoder={ENCODER}")
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    *where, what = err.splitlines()
    assert len(where) <= 1 and all(line.startswith("embeam: the dead letters") for line in where), err
    assert "--max_dead_fraction=0.1" in assert_one_line(what) and "while running" not in what


def test_a_run_that_fails_unexpectedly_is_one_line_that_shows_where_to_look(call, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("something")

    monkeypatch.setattr("pipeline.encoders.handler.LoadedEncoder.encode", fail)
    (tmp_path / "a.txt").write_text("a dog\n")
    arguments = ["embed", f"--input={tmp_path}/a.txt", f"--output={tmp_path}/t", f"--encoder={ENCODER}"]
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    line = assert_one_line(err)
    assert "KeyError" in line
    for flag in re.findall(r"--\w+=\w+", line):  # what it advises must be possible
        assert "Traceback" in call(*arguments, flag)[2]


VERBS = {
    ("embed", "--summary_json"): "pipeline.run.job.build_table",
    ("plan",): "pipeline.run.dry_run.make_dry_run",
    ("show", "DIR"): "pipeline.report.summary.format_table",
    ("query", "DIR", "text"): "pipeline.search.nearest.find_nearest",
    ("verify", "DIR"): "pipeline.run.verify.check_table",
    ("rollback", "DIR"): "pipeline.tables.retention.roll_back",
    ("sql", "bq://p.d.t"): "pipeline.tables.read.open_live",
    ("export-preprocessor", "--output=NEW"): "pipeline.encoders.default.default_vocabulary",
    ("export-encoder", "--output=NEW"): "pipeline.encoders.default.default_weights",
}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space and run again"),
        (OSError("64 requested and 32 written"), "the disk is full; free some space and run again"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/file"),
            "a/file: Permission denied; change its permissions, or name another path",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "Too many open files; raise the limit with ulimit -n and run again",
        ),
        (KeyError("x"), "internal error: KeyError: 'x'; run again with --debug to see where"),
    ],
    ids=["full", "numpy", "permission", "files", "internal"],
)
@pytest.mark.parametrize("arguments", VERBS, ids=lambda arguments: arguments[0])
def test_any_exception_is_one_line_in_every_verb(call, tmp_path, table, monkeypatch, arguments, error, says):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(VERBS[arguments], fail)
    given = [argument.replace("DIR", str(table)).replace("NEW", str(tmp_path / "new")) for argument in arguments]
    code, out, err = call(*given)
    assert code == 1 and assert_one_line(err) == f"embeam: {says}"
    summary = {"status": "failed", "exit_code": 1, "error": says}
    assert out == (json.dumps(summary) + "\n" if "--summary_json" in arguments else "")
    code, _, err = call(*given, "--debug")
    assert code == 1 and "Traceback" in err and err.endswith(f"embeam: {says}\n")


def test_wrong_usage_ends_with_the_summary_too(call):
    code, out, _ = call("embed", "--summary_json", "--input")
    assert code == 2 and json.loads(out)["exit_code"] == 2


def test_results_that_cannot_be_written_are_one_line_and_exit_1():
    with open("/dev/full", "w") as full:
        process = start_cli("--help", stdout=full)
        _, err = process.communicate()
    assert process.returncode == 1 and "the disk is full" in assert_one_line(err)


def test_a_table_that_is_none_is_one_line_and_exit_1(call, tmp_path, table):
    (tmp_path / "file").write_text("no table")
    verbs = [["show"], ["query", "text"], ["verify"], ["rollback"], ["rollback", "--list"]]
    on_file = [[verb, tmp_path / "file", *rest] for verb, *rest in verbs]
    for arguments in (["show", tmp_path], ["query", tmp_path, "text"], ["show", tmp_path / "none"], *on_file):
        code, out, err = call(*arguments)
        assert (code, out) == (1, "") and re.search("is not a table|is a file, not a table", assert_one_line(err))


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", buffering=1)


def test_a_pipe_that_closes_ends_a_verb_quietly(call, table, monkeypatch):
    with closed_pipe() as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        code, _, err = call("show", table)
    assert (code, err) == (0, "")


def test_a_pipe_that_is_closed_by_the_end_ends_a_process_quietly():
    with closed_pipe() as pipe:
        process = start_cli("--help", stdout=pipe)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


def test_text_that_no_terminal_can_show_does_not_end_show(call, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("日本語 naïve\n")
    run_embed(tmp_path / "a.txt", tmp_path / "t", keep_text=True)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    code, _, err = call("show", tmp_path / "t")
    assert (code, err) == (0, "")
    assert b"a.txt@0" in shown.getvalue() and rb"\u65e5\u672c\u8a9e na\xefve" in shown.getvalue()


# Queries.


def test_a_query_that_is_no_text_is_refused(call, table):
    code, out, err = call("query", table, "half \udcff")
    assert (code, out) == (2, "") and "UTF-8" in assert_one_line(err)


def test_a_table_whose_encoder_has_changed_is_not_searched(call, tmp_path):
    encoder = shutil.copytree(ENCODER, tmp_path / "encoder")
    (tmp_path / "a.txt").write_text("a dog\n")
    run_embed(tmp_path / "a.txt", tmp_path / "t", encoder=str(encoder))
    (vocabulary,) = (encoder / "assets").glob("*.txt")
    lines = vocabulary.read_text().split("\n")
    vocabulary.write_text("\n".join([*lines[:-3], lines[-2], lines[-3], lines[-1]]))
    code, out, err = call("query", tmp_path / "t", "a dog")
    assert (code, out) == (1, "") and "cannot be compared" in assert_one_line(err)
    shutil.rmtree(encoder)
    code, out, err = call("query", tmp_path / "t", "a dog")
    assert (code, out) == (1, "") and str(encoder) in assert_one_line(err)


def test_a_table_made_with_a_relative_path_is_searched_from_anywhere(call, tmp_path, monkeypatch):
    shutil.copytree(ENCODER, tmp_path / "encoder")
    (tmp_path / "a.txt").write_text("a dog\na cat\n")
    monkeypatch.chdir(tmp_path)
    run_embed("a.txt", "t", encoder="encoder")
    monkeypatch.chdir("/")
    code, out, err = call("query", tmp_path / "t", "a cat", "--top=1")
    assert (code, err) == (0, "") and "a.txt@6" in out
    assert open_table(str(tmp_path / "t"))[0].rows == 2
