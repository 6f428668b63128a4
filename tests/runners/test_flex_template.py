"""The container image and the Flex Template, as far as they can be checked without Docker and Google Cloud."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.cli.flags import check_beam_flags
from pipeline.cli.main import build_parsers
from pipeline.config import STAGE_CONFIGS, EmbedConfig
from pipeline.engines.dataflow import local_paths
from pipeline.errors import ConfigError
from pipeline.tables.read import read_table
from runners.flex_template.metadata import PATH, format_metadata, make_metadata
from tests.support.paths import ENCODER, ROOT
from tests.support.processes import Ended, assert_one_line, call_program

FOLDER = ROOT / "runners" / "flex_template"
MAIN = FOLDER / "main.py"
NAMES = {"PROJECT": "a-project", "REGION": "europe-west4", "BUCKET": "a-bucket", "TAG": "17"}
PARAMETERS = {parameter["name"]: parameter for parameter in make_metadata()["parameters"]}


# Versions


def read_versions() -> dict[str, str]:
    """The text of every file that names a version, by its path."""
    paths = [*FOLDER.iterdir(), ROOT / "requirements.lock", ROOT / "pyproject.toml"]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths if path.is_file()}


def find_disagreements(files: dict[str, str]) -> Iterator[str]:
    """What is said about versions in one place and otherwise in another."""
    lock, cuda = read_pins(files["requirements.lock"]), read_pins(files["runners/flex_template/cuda.lock"])
    project = tomllib.loads(files["pyproject.toml"])["project"]
    arguments, images, _ = read_dockerfile(files["runners/flex_template/Dockerfile"])
    python, beam = arguments["PYTHON_VERSION"], lock["apache-beam"]

    if not SpecifierSet(project["requires-python"]).contains(python):
        yield f"Python {python} is not {project['requires-python']}"
    expected = [
        f"apache/beam_python{python}_sdk:{beam}",
        f"gcr.io/dataflow-templates-base/python{python.replace('.', '')}-template-launcher-base:latest",
        f"python:{python}-slim-bookworm",
    ]
    if images != expected:
        yield f"the images {images} are not {expected}"
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["gpu"]]):
        if not requirement.specifier.contains(lock[requirement.name]):
            yield f"{requirement} is locked at {lock[requirement.name]}"

    truth = {"Python": python, "Beam": beam, "TensorFlow": lock["tensorflow"], "CUDA": cuda["nvidia-cuda-runtime-cu12"]}
    for path, text in files.items():
        for name, version in re.findall(r"\b(Python|Beam|TensorFlow|CUDA) (\d+\.\d+)", text):
            if path.startswith("runners/") and not f"{truth[name]}.".startswith(f"{version}."):
                yield f"{path} speaks of {name} {version}, which is {truth[name]}"

    if (installed := importlib.metadata.version("tensorflow")) != lock["tensorflow"]:
        yield f"TensorFlow {installed} is installed, and {lock['tensorflow']} locked"
    wanted = [Requirement(line) for line in importlib.metadata.requires("tensorflow") or () if "and-cuda" in line]
    if {requirement.name for requirement in wanted} != set(cuda):
        yield f"tensorflow[and-cuda] needs {[requirement.name for requirement in wanted]}, and locked are {list(cuda)}"
    for requirement in wanted:
        if not requirement.specifier.contains(cuda.get(requirement.name, "0")):
            yield f"tensorflow[and-cuda] needs {requirement}, and {cuda.get(requirement.name)} is locked"


def read_pins(text: str) -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in text.splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines if line)


def read_dockerfile(text: str) -> tuple[dict[str, str], list[str], list[list[str]]]:
    """Arguments with their values, images, and what is copied from the repository, each with its destination last."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    arguments = dict(line.split()[1].split("=", 1) for line in lines if line.startswith("ARG "))
    filled = [re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], match[0]), line) for line in lines]
    images = [line.split()[1] for line in filled if line.startswith("FROM ")]
    copies = [line.split()[1:] for line in filled if line.startswith("COPY ") and "--from=" not in line]
    return arguments, images, copies


def test_versions_agree():
    assert list(find_disagreements(read_versions())) == []


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("runners/flex_template/Dockerfile", "BEAM_VERSION=2.77.0", "BEAM_VERSION=2.76.0"),
        ("runners/flex_template/Dockerfile", "PYTHON_VERSION=3.11", "PYTHON_VERSION=3.12"),
        ("runners/flex_template/Dockerfile", "LAUNCHER_PYTHON=python311", "LAUNCHER_PYTHON=python312"),
        ("runners/flex_template/Dockerfile", "FROM python:${PYTHON_VERSION}", "FROM python:3.13"),
        ("runners/flex_template/README.md", "CUDA 12.5", "CUDA 12.3"),
        ("runners/flex_template/README.md", "TensorFlow 2.21", "TensorFlow 2.20"),
        ("runners/flex_template/cuda.lock", "nvidia-cublas-cu12==12.5.3.2", "nvidia-cublas-cu12==12.4.5.8"),
        ("runners/flex_template/cuda.lock", "nvidia-nccl-cu12==2.27.7\n", ""),
        ("requirements.lock", "apache-beam==2.77.0", "apache-beam==2.78.0"),
        ("requirements.lock", "tensorflow==2.21.0", "tensorflow==2.22.0"),
        ("pyproject.toml", 'requires-python = ">=3.11', 'requires-python = ">=3.12'),
        ("pyproject.toml", "tensorflow[and-cuda]>=2.21,<2.22", "tensorflow[and-cuda]>=2.22,<2.23"),
    ],
)
def test_a_version_changed_in_one_place_is_seen(path, old, new):
    files = read_versions()
    assert old in files[path]
    files[path] = files[path].replace(old, new)
    assert list(find_disagreements(files)) != []


def test_the_image_holds_what_its_environment_names():
    text = (FOLDER / "Dockerfile").read_text()
    (home,) = re.findall(r"^WORKDIR (\S+)", text, re.M)
    (script,) = re.findall(r"FLEX_TEMPLATE_PYTHON_PY_FILE=(\S+)", text)
    copied = {}
    for *sources, destination in read_dockerfile(text)[2]:
        for source in sources:
            assert (ROOT / source).exists(), source
            target = Path(home, destination, Path(source).name if destination.endswith("/") else "")
            copied |= {target / path.relative_to(ROOT / source): path for path in [ROOT / source, *walk(ROOT / source)]}
    assert copied[Path(script)] == MAIN
    for requirements in re.findall(r"--requirement=(\S+)", text):
        assert Path(home, requirements) in copied


def walk(path: Path) -> Iterator[Path]:
    return path.rglob("*") if path.is_dir() else iter(())


# Metadata

# Values that a flag takes, and such that neither a pattern nor the command lets pass.
COUNTS = (["1", "7", "64_000_000", "2147483648"], ["-1", "1.5", "many", "", " ", "1e6"])
SHARES = (["0", "0.1", ".5", "1", "1.0"], ["2", "-0.1", "1.5", "half", "", "nan"])
SWITCHES = (["true", "false", "1", "no"], ["maybe", "", "2", "on"])
PLACES = (["gs://bucket/a folder/*.txt", "s3://bucket/x"], ["corpus/*.txt", "/tmp/table", "C:\\corpus", "gs:/bucket/x"])
TEXTS = {
    "input": (["bq://project.dataset.table", "gs://bucket/{a,b}/*.jsonl", *PLACES[0]], PLACES[1]),
    "output": (["bq://project.dataset.table", *PLACES[0]], PLACES[1]),
    "work_dir": PLACES,
    "preprocessor": PLACES,
    "encoder": (["https://models.example/encoder/1", *PLACES[0]], PLACES[1]),
    "query_dataset": (["project.dataset"], ["dataset", "project.dataset.table"]),
    "keep_fields": (["year", "year:int,lang", "score:float, seen:bool"], ["year:date", ":int", "a:int:float"]),
    "vector": (
        ["pooled_output", "sequence_output:tokens", "encoder_outputs/-2:mean", "default"],
        ["sequence_output:sum", "encoder_outputs/last:mean"],
    ),
    "accelerator": (["nvidia-l4", "nvidia-h100-80gb"], ["l4", "nvidia-l4;count:8", "nvidia-l40"]),
    "encoder_memory": (["32GB", "900MiB"], ["32", "32 GB", "lots"]),
}
# What else must be said for a flag's values to make sense.
BESIDE = {
    "chunk_overlap": {"on_long": "chunk"},
    "chunk_by": {"on_long": "chunk"},
    "encoder_processes": {"accelerator": "nvidia-l4"},
    "provisioning": {"accelerator": "nvidia-l4"},
    "query_dataset": {"query": "SELECT 1"},
}


def examples(parameter: dict) -> tuple[list[str], list[str]]:
    if parameter["paramType"] == "ENUM":
        return [option["value"] for option in parameter["enumOptions"]], ["", "nonsense", "auto,text"]
    if parameter["paramType"] == "BOOLEAN":
        return SWITCHES
    if parameter["paramType"] == "NUMBER":
        return SHARES if "fraction" in parameter["name"] else COUNTS
    return TEXTS[parameter["name"]]


def passes(parameter: dict, value: str) -> bool:
    return all(re.fullmatch(regex, value) for regex in parameter["regexes"])


def test_the_committed_metadata_is_what_the_configuration_gives():
    assert PATH.read_text() == format_metadata(), "run: python -m runners.flex_template.metadata --write"


def test_every_setting_is_a_parameter_with_the_settings_default():
    assert list(PARAMETERS) == [f.name for kind in STAGE_CONFIGS for f in fields(kind)]
    assert [name for name, parameter in PARAMETERS.items() if not parameter["isOptional"]] == ["output"]
    defaults = {
        name: parameter["defaultValue"] for name, parameter in PARAMETERS.items() if "defaultValue" in parameter
    }
    assert EmbedConfig.from_flat(defaults) == EmbedConfig()
    for parameter in PARAMETERS.values():
        assert parameter["label"] and parameter["helpText"] and parameter["groupName"]
        assert "regexes" not in parameter or passes(parameter, parameter.get("defaultValue", "")) == (
            "defaultValue" in parameter
        )


@pytest.mark.parametrize("name", [name for name, parameter in PARAMETERS.items() if "regexes" in parameter])
def test_a_pattern_and_the_command_take_and_refuse_the_same(name):
    good, bad = examples(PARAMETERS[name])
    for value in good:
        assert passes(PARAMETERS[name], value), value
        # [CLS] and [SEP] alone, and more MiB than zstd has: the command says so
        if (name, value) not in [("max_tokens", "1"), *(("max_window", count) for count in COUNTS[0][2:])]:
            EmbedConfig.from_flat({name: value} | BESIDE.get(name, {}))
    for value in bad:
        assert not passes(PARAMETERS[name], value), value
        with pytest.raises(ConfigError):
            refuse_local(EmbedConfig.from_flat({name: value} | BESIDE.get(name, {})))
    if PARAMETERS[name]["paramType"] == "NUMBER" and name not in ("max_dead_fraction", "max_delete_fraction"):
        assert passes(PARAMETERS[name], "0") == takes_zero(name)


def refuse_local(config: EmbedConfig) -> None:
    """As a job on Dataflow refuses what only this machine has."""
    for flag, path in local_paths(config):
        raise ConfigError(f"--{flag}={path}")


def takes_zero(name: str) -> bool:
    try:
        EmbedConfig.from_flat({name: 0})
    except ConfigError:
        return False
    return True


# Launching


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs launch.sh with a gcloud that only notes what it was asked for; returns its result and those calls."""
    stub, log = tmp_path / "bin" / "gcloud", tmp_path / "calls"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\n{ printf "%s\\0" "$@"; echo; } >> "$CALLS"\ncase "$*" in *"$GCLOUD_FAILS_AT"*) exit 3 ;; esac\n'
    )
    stub.chmod(0o755)

    def run(*arguments: str, fails_at: str = "nothing", **environment: str):
        log.write_text("")
        result = subprocess.run(
            ["bash", str(FOLDER / "launch.sh"), *arguments],
            env={
                "PATH": f"{stub.parent}:{os.environ['PATH']}",
                "CALLS": str(log),
                "GCLOUD_FAILS_AT": fails_at,
                **NAMES,
                **environment,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return result, [line.split("\0")[:-1] for line in log.read_text().splitlines()]

    return run


def flag(call: list[str], name: str) -> str:
    (value,) = [argument.removeprefix(f"--{name}=") for argument in call if argument.startswith(f"--{name}=")]
    return value


def parameters(call: list[str]) -> dict[str, str]:
    """A call's parameters as gcloud reads them: after ^X^, X parts them in place of a comma."""
    found: dict[str, str] = {}
    for argument in call:
        if argument.startswith("--parameters="):
            _, separator, text = argument.removeprefix("--parameters=").split("^", 2)
            found |= dict(part.split("=", 1) for part in text.split(separator))
    return found


def test_build_makes_the_repository_the_image_and_the_template(launch):
    result, (describe, create, submit) = launch("build", fails_at="repositories describe")
    assert result.returncode == 0, result.stderr
    for call in (describe, create):
        assert call[:2] == ["artifacts", "repositories"] and "embeam" in call
        assert flag(call, "project") == "a-project" and flag(call, "location") == "europe-west4"
    assert flag(create, "repository-format") == "docker"
    assert submit[:3] == ["builds", "submit", str(ROOT)] and flag(submit, "project") == "a-project"

    given = dict(part.split("=", 1) for part in flag(submit, "substitutions").split(","))
    build = (FOLDER / "cloudbuild.yaml").read_text()
    assert flag(submit, "config") == str(FOLDER / "cloudbuild.yaml")
    assert set(given) == set(re.findall(r"\$\{(_\w+)\}", build))
    commands = [step["args"] for step in yaml.safe_load(build)["steps"]]
    assert (ROOT / flag(commands[0], "file")).samefile(FOLDER / "Dockerfile")
    assert (ROOT / flag(commands[-1], "metadata-file")).samefile(PATH)
    assert given == {
        "_IMAGE": "europe-west4-docker.pkg.dev/a-project/embeam/embeam:17",
        "_TEMPLATE": "gs://a-bucket/embeam/templates/17.json",
    }


def test_a_repository_that_is_there_is_not_made_again(launch):
    result, calls = launch("build")
    assert result.returncode == 0 and [call[1] for call in calls] == ["repositories", "submit"]


def test_run_passes_every_parameter_whole(launch):
    wanted = {
        "input": "gs://a-bucket/{news,mail}/*.jsonl",
        "output": "gs://a-bucket/table",
        "keep_fields": "year:int,lang",
        "row_restriction": "day = '2026-01-31'",
        "accelerator": "nvidia-l4",
        "dataflow_service_options": "enable_google_cloud_profiler,automatically_use_created_reservation",
    }
    result, (call,) = launch("run", *(f"{name}={value}" for name, value in wanted.items()), "--max-workers=20")
    assert result.returncode == 0, result.stderr
    image = "europe-west4-docker.pkg.dev/a-project/embeam/embeam:17"
    assert parameters(call) == wanted | {"sdk_container_image": image}
    assert call[:3] == ["dataflow", "flex-template", "run"]
    assert re.fullmatch(r"embeam-\d{8}-\d{6}", call[3])
    assert flag(call, "template-file-gcs-location") == "gs://a-bucket/embeam/templates/17.json"
    assert flag(call, "project") == "a-project" and flag(call, "region") == "europe-west4"
    assert flag(call, "staging-location") != flag(call, "temp-location")
    assert all(flag(call, name).startswith("gs://a-bucket/") for name in ("staging-location", "temp-location"))
    assert flag(call, "max-workers") == "20" and flag(call, "launcher-machine-type")

    embed = build_parsers()[1]
    known, rest = embed.parse_known_args([f"--{name}={value}" for name, value in parameters(call).items()])
    assert known.flag_input == [wanted["input"]] and known.flag_keep_fields == [wanted["keep_fields"]]
    assert len(check_beam_flags(rest, embed.flags())) == 2  # the image and the service options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say build or run"),
        (["deploy"], "say build or run"),
        (["build", "17"], "build takes nothing"),
        (["run", "gs://a-bucket/x.txt"], "neither NAME=VALUE nor a flag"),
    ],
)
def test_wrong_usage_is_refused_before_gcloud_is_asked(launch, arguments, said):
    result, calls = launch(*arguments)
    assert result.returncode == 2 and said in result.stderr and calls == []


def test_an_image_is_named_after_a_commit_or_as_told(launch):
    result, calls = launch("build", TAG="", GIT_DIR="/nowhere")
    assert result.returncode == 2 and "set TAG" in result.stderr and calls == []


@pytest.mark.parametrize(
    ("arguments", "fails_at"),
    [
        (["build"], "artifacts repositories"),
        (["build"], "builds submit"),
        (["run", "output=gs://a-bucket/table"], "flex-template run"),
    ],
)
def test_where_gcloud_fails_the_script_ends(launch, arguments, fails_at):
    result, calls = launch(*arguments, fails_at=fails_at)
    assert result.returncode == 3 and fails_at in " ".join(calls[-1])


# The program that the launcher runs


@pytest.fixture
def run_main(capfd, monkeypatch, tmp_path) -> Callable[..., Ended]:
    """Runs the program in this process: its arguments -> exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(MAIN), *arguments])
        return call_program(capfd, lambda: runpy.run_path(str(MAIN), run_name="__main__"))

    return run


def test_main_embeds(run_main, tmp_path):
    (tmp_path / "corpus.txt").write_text("Stars form in cold clouds.\nThe tide turned at noon.\n")
    code, _, err = run_main("--input=corpus.txt", "--output=table", f"--encoder={ENCODER}")
    assert code == 0, err
    ids, vectors = read_table(str(tmp_path / "table"))
    assert len(ids) == len(vectors) == 2


def test_main_knows_the_flags_of_a_launcher(run_main):
    """It gets as far as a check of ours that comes after every flag has been read."""
    labels = json.dumps({"goog-dataflow-provided-template-type": "flex"}, indent=3)
    code, _, err = run_main(
        "--runner=DataflowRunner",
        "--project=a-project",
        "--region=europe-west4",
        "--job_name=embeam-20261125-081500",
        "--staging_location=gs://a-bucket/staging",
        "--temp_location=gs://a-bucket/temp",
        "--template_location=gs://a-bucket/staging/template_launches/1/job_object",
        "--service_account_email=worker@a-project.iam.gserviceaccount.com",
        "--sdk_container_image=europe-west4-docker.pkg.dev/a-project/embeam/embeam:17",
        "--max_num_workers=20",
        "--num_workers=2",
        "--worker_machine_type=n2-standard-4",
        "--subnetwork=regions/europe-west4/subnetworks/default",
        "--experiments=use_runner_v2",
        "--enable_streaming_engine",
        f"--labels={labels}",
        "--input=gs://a-bucket/corpus/*.txt",
        "--output=table",
    )
    assert code == 2
    assert "--output=table is on this machine" in assert_one_line(err)
