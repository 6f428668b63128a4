"""Every schedule asks for what embeam and the service that it asks understand; of two runs at once one is refused."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hcl2
import numpy as np
import pytest
import yaml
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PortableOptions,
    StandardOptions,
    WorkerOptions,
)
from google.protobuf import json_format
from hcl2.utils import SerializationOptions

from pipeline.cli.main import EXIT_FAILED, EXIT_USAGE
from pipeline.errors import ConfigError
from pipeline.tables.lock import LOCK
from pipeline.tables.read import read_table
from tests.support.paths import ROOT
from tests.support.processes import kill_group, wait_for
from tests.support.runs import run_embed
from tests.support.schedules import LAUNCH, NAMES, SCHEDULE, check_request, read_command, read_request

EMBEAM = Path(sys.executable).with_name("embeam")
TEXTS = {"a": "Stars form in cold clouds.", "b": "The tide turned at noon.", "c": "A rogue wave stove in the windows."}

# systemd and cron

UNITS = SCHEDULE / "systemd"
UNIT_FILES = ("embeam.service", "embeam.timer")
PROGRAM, CORPUS, TABLE = "/opt/embeam/.venv/bin/embeam", "/srv/corpus/*.jsonl", "/var/lib/embeam/table"
KEYS = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec", "StartLimitBurst", "OnFailure"},
    "Service": {
        *("Type", "User", "StateDirectory", "CacheDirectory", "Environment", "ExecStart", "SuccessExitStatus", "Nice"),
        *("Restart", "RestartSec", "RestartPreventExitStatus", "TimeoutStartSec", "TimeoutStopSec", "KillMode"),
        *("NoNewPrivileges", "PrivateTmp", "ProtectHome", "ProtectSystem"),
    },
    "Timer": {"OnCalendar", "RandomizedDelaySec", "Persistent"},
    "Install": {"WantedBy"},
}


@pytest.fixture
def names(tmp_path) -> dict[str, str]:
    """What is put in place of the three names, with a corpus that is there."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = [json.dumps({"id": id, "text": text}) for id, text in TEXTS.items()]
    (corpus / "one.jsonl").write_text("\n".join(lines[:2]) + "\n")
    (corpus / "two.jsonl").write_text("\n".join(lines[2:]) + "\n")
    return {PROGRAM: str(EMBEAM), CORPUS: f"{corpus}/*.jsonl", TABLE: str(tmp_path / "table")}


def fill(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def read_unit(text: str) -> configparser.ConfigParser:
    """A unit's settings; of those that are given twice, as systemd allows and ours do not, it complains."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(re.sub(r"\\\n\s*", " ", text))
    return parser


def split_command(text: str) -> list[str]:
    """ExecStart as systemd splits it, which is as a shell does while nothing in it means more."""
    command = read_unit(text)["Service"]["ExecStart"]
    assert not set(command) & set("%$;")
    return shlex.split(command)


def embed_environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}


def find_program(name: str) -> str:
    """Fails without a program that only some machines have."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"this test needs {name}, and there is none in $PATH: install it", pytrace=False)
    return path


def start(command: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=embed_environment(), start_new_session=True, **pipes)  # type: ignore[call-overload]


def list_forms(file: str) -> list[str]:
    """A unit as it is, and with what it has as a comment."""
    text = (UNITS / file).read_text()
    assert text.count("\n#OnFailure=") == (file == "embeam.service")
    return [text, text.replace("\n#OnFailure=", "\nOnFailure=")]


@pytest.mark.parametrize("file", UNIT_FILES)
def test_the_units_hold_what_systemd_knows(file):
    for form in list_forms(file):
        for section, settings in read_unit(form).items():
            assert set(settings) <= KEYS.get(section, set()), section


@pytest.mark.tools
@pytest.mark.parametrize("file", UNIT_FILES)
def test_systemd_verifies_the_units(file, names, tmp_path):
    """It knows more than the table above."""
    systemd = find_program("systemd-analyze")
    for form in list_forms(file):
        for name in UNIT_FILES:
            text = form if name == file else (UNITS / name).read_text()
            (tmp_path / name).write_text(fill(text, names) if name == "embeam.service" else text)
        told = subprocess.run([systemd, "verify", tmp_path / file], capture_output=True, text=True)
        assert told.returncode == 0 and file not in told.stderr, told.stderr


def test_the_service_asks_for_what_embeam_takes_and_may_write_where_it_writes():
    text = (UNITS / "embeam.service").read_text()
    service = read_unit(text)["Service"]
    program, *arguments = split_command(text)
    command = read_command(arguments)
    assert (program, command.config.read.input, command.config.write.output) == (PROGRAM, (CORPUS,), TABLE)
    assert command.summary_json and command.log_format == "json"
    assert service["ProtectSystem"] == "strict" and service["ProtectHome"] == "true"
    assert TABLE.startswith(f"/var/lib/{service['StateDirectory']}/")
    assert service["Environment"] == f"EMBEAM_CACHE_DIR=/var/cache/{service['CacheDirectory']}"
    for path in (PROGRAM, CORPUS):
        assert not path.startswith(("/home/", "/root/", "/run/user/", "/tmp/"))


def test_a_misspelt_flag_of_the_service_would_be_seen():
    text = (UNITS / "embeam.service").read_text().replace("--id_field", "--id_feild")
    with pytest.raises(ConfigError, match="id_field"):
        read_command(split_command(text)[1:])


def test_the_timer_starts_one_run_at_a_time_and_makes_up_for_nights_that_it_missed():
    service = read_unit((UNITS / "embeam.service").read_text())["Service"]
    timer = read_unit((UNITS / "embeam.timer").read_text())["Timer"]
    assert service["Type"] == "oneshot" and "RemainAfterExit" not in service  # or it would start once and never again
    assert timer["Persistent"] == "true" and timer["RandomizedDelaySec"] and timer["OnCalendar"]
    assert service["RestartPreventExitStatus"] == str(EXIT_USAGE)
    assert service["SuccessExitStatus"] == str(128 + signal.SIGTERM)


def test_the_service_s_command_makes_the_table_and_keeps_it_consistent(names, call):
    _, *arguments = split_command(fill((UNITS / "embeam.service").read_text(), names))
    summaries, pointers = [], []
    for _ in range(2):
        code, out, err = call(*arguments)
        assert code == 0, err
        summaries.append(json.loads(out.splitlines()[-1]))
        pointers.append(Path(names[TABLE], "CURRENT").read_text())
    assert [(told["status"], told["rows"], told["encoded_chunks"]) for told in summaries] == [
        ("published", 3, 3),
        ("published", 3, 0),
    ]
    assert pointers[0] != pointers[1]  # its age tells when a run has last succeeded
    assert sorted(read_table(names[TABLE])[0]) == list(TEXTS)


@contextmanager
def held(command: list[str], table: Path) -> Iterator[subprocess.Popen]:
    """A run that has the table and stands still until the end of the block."""
    process = start(command)
    try:
        wait_for(lambda: (table / LOCK).exists() and (table / LOCK).read_text(), process)
        os.killpg(process.pid, signal.SIGSTOP)
        assert not (table / "CURRENT").exists()
        yield process
        os.killpg(process.pid, signal.SIGCONT)
        process.wait()
    finally:
        if process.poll() is None:
            kill_group(process)


@pytest.mark.package
@pytest.mark.timeout(300)
def test_of_two_runs_at_once_the_second_is_refused_and_the_first_is_right(names, tmp_path):
    command, table = split_command(fill((UNITS / "embeam.service").read_text(), names)), Path(names[TABLE])
    with held(command, table) as first:
        second = subprocess.run(command, env=embed_environment(), capture_output=True, text=True)
    out, err = first.communicate()

    assert second.returncode == EXIT_FAILED
    told = json.loads(second.stdout.splitlines()[-1])
    assert (told["status"], told["exit_code"]) == ("failed", EXIT_FAILED)
    owner = rf"run \S+ on \S+, process {first.pid}, has held it since .* UTC"
    assert re.fullmatch(rf"--output={table} is in use: {owner}; wait for it, or stop it", told["error"])
    assert [json.loads(line)["message"] for line in second.stderr.splitlines()] == [told["error"]]

    assert first.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["rows"] == len(TEXTS)
    run_embed(names[CORPUS], tmp_path / "alone", id_field="id", encoder="")
    ids, vectors = read_table(str(table))
    expected_ids, expected = read_table(str(tmp_path / "alone"))
    order, expected_order = np.argsort(ids), np.argsort(expected_ids)
    assert [ids[i] for i in order] == [expected_ids[i] for i in expected_order] == list(TEXTS)
    np.testing.assert_allclose(vectors[order], expected[expected_order], atol=1e-6)


def read_cron(text: str) -> tuple[dict[str, str], list[str], str, str]:
    """A file of /etc/cron.d: its variables, and of its one line the five fields, the user and the command."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    variables = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]+=", line))
    (line,) = lines[len(variables) :]
    *fields, user, command = line.split(maxsplit=6)
    return variables, fields, user, command


@pytest.mark.package
@pytest.mark.timeout(300)
def test_cron_mails_what_a_run_says_only_if_it_has_failed(names):
    variables, fields, user, command = read_cron(fill((UNITS / "embeam.cron").read_text(), names))
    assert all(re.fullmatch(r"\*|\d+", field) for field in fields) and user == "embeam" and variables["MAILTO"]
    assert "%" not in command  # cron's line break

    def run() -> subprocess.CompletedProcess:
        environment = {**embed_environment(), **variables}
        return subprocess.run([variables["SHELL"], "-c", command], env=environment, capture_output=True, text=True)

    quiet = run()
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert sorted(read_table(names[TABLE])[0]) == list(TEXTS)

    variables["CORPUS"] = "/nowhere/*.jsonl"
    loud = run()
    *_, last = loud.stdout.splitlines()
    assert json.loads(last)["status"] == "failed" and "/nowhere/*.jsonl" in last and "Traceback" not in loud.stdout


# Kubernetes

CRON_JOB = SCHEDULE / "kubernetes" / "cronjob.yaml"
FLINK = ROOT / "runners" / "flink" / "kubernetes.yaml"


def read_cron_job() -> dict[str, Any]:
    return yaml.safe_load(CRON_JOB.read_text())


def test_the_cron_job_is_one_run_at_a_time_that_ends():
    job = read_cron_job()
    assert (job["apiVersion"], job["kind"], job["metadata"]) == ("batch/v1", "CronJob", {"name": "embeam"})
    spec, template = job["spec"], job["spec"]["jobTemplate"]["spec"]
    assert set(spec) == {
        *("schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "jobTemplate"),
        *("successfulJobsHistoryLimit", "failedJobsHistoryLimit"),
    }
    assert re.fullmatch(r"(\S+ ){4}\S+", spec["schedule"]) and spec["concurrencyPolicy"] == "Forbid"
    assert set(template) == {"backoffLimit", "activeDeadlineSeconds", "podFailurePolicy", "template"}
    assert 0 < template["backoffLimit"] < 6 and 3600 < template["activeDeadlineSeconds"] < 24 * 3600
    pod = template["template"]["spec"]
    assert set(pod) == {"restartPolicy", "terminationGracePeriodSeconds", "containers"}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy wants it
    (container,) = pod["containers"]
    (rule,) = template["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [EXIT_USAGE]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    assert set(container) == {"name", "image", "command", "args", "resources"}


def test_the_cron_job_submits_to_the_cluster_beside_it():
    (container,) = read_cron_job()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["embeam"] and all(type(argument) is str for argument in container["args"])
    command = read_command(container["args"])
    config, options = command.config, command.options
    assert command.summary_json and options.view_as(StandardOptions).runner == "FlinkRunner"
    for path in (*config.read.input, config.write.output):
        assert path.startswith("gs://my-bucket/")

    cluster = list(yaml.safe_load_all(FLINK.read_text()))
    (service,) = [part for part in cluster if part["kind"] == "Service"]
    (rest,) = [port["port"] for port in service["spec"]["ports"] if port["name"] == "rest"]
    pods = [part["spec"]["template"]["spec"] for part in cluster if part["kind"] == "Deployment"]
    (pool,) = [c for pod in pods for c in pod["containers"] if "runners.worker_pool" in c.get("command", [])]
    (port,) = [argument.removeprefix("--port=") for argument in pool["command"] if argument.startswith("--port=")]
    flink, portable = options.view_as(FlinkRunnerOptions), options.view_as(PortableOptions)
    assert flink.flink_master == f"{service['metadata']['name']}:{rest}"
    assert (portable.environment_type, portable.environment_config) == ("EXTERNAL", f"localhost:{port}")
    (version,) = {
        re.match(r"flink:(\d+\.\d+)", c["image"])[1]  # type: ignore[index]
        for pod in pods
        for c in pod["containers"]
        if c["image"].startswith("flink:")
    }
    assert flink.flink_version == version and container["image"] == pool["image"]


# Cloud Scheduler

SCHEDULER = SCHEDULE / "cloud_scheduler"
LAUNCHER = ROOT / "runners" / "flex_template" / "launch.sh"


@pytest.fixture
def run_script(tmp_path):
    """Runs a script with a gcloud that notes what it is asked for, and fails where its words hold one of `missing`."""
    stub, calls = tmp_path / "bin" / "gcloud", tmp_path / "calls"
    stub.parent.mkdir()
    stub.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"print(json.dumps(sys.argv[1:]), file=open({str(calls)!r}, 'a'))\n"
        "sys.exit(any(words in ' '.join(sys.argv) for words in os.environ['MISSING'].split('|') if words))\n"
    )
    stub.chmod(0o755)

    def run(script: Path, *arguments: str, missing: str = ""):
        calls.write_text("")
        environment = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "MISSING": missing, **NAMES}
        result = subprocess.run(
            ["bash", str(script), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return result, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def flag(call: list[str], name: str) -> str:
    (value,) = [argument.partition("=")[2] for argument in call if argument.startswith(f"--{name}=")]
    return value


def read_grants(calls: list[list[str]]) -> set[tuple[str, str, str]]:
    """The roles that a script gives: who, which role, and on which resource, by gcloud's command group."""
    verb = "add-iam-policy-binding"
    bindings = [call for call in calls if verb in call]
    return {
        (
            flag(call, "member").removeprefix("serviceAccount:embeam-").partition("@")[0],
            flag(call, "role"),
            " ".join(call[: call.index(verb)]),
        )
        for call in bindings
    }


def read_terraform() -> dict[str, Any]:
    """main.tf's blocks by their kind and labels, such as resource.google_service_account.worker."""
    options = SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)
    with open(SCHEDULER / "main.tf") as file:
        blocks: dict[str, Any] = {}
        for kind, found in hcl2.load(file, serialization_options=options).items():
            for block in found:
                path = [kind]
                for _ in range({"resource": 2, "variable": 1, "provider": 1}.get(kind, 0)):
                    ((label, block),) = block.items()
                    path.append(label)
                blocks[".".join(path)] = block
    return blocks


def evaluate(value: Any, blocks: dict[str, Any], names: dict[str, str]) -> Any:
    """A value with Terraform's references to variables and accounts replaced."""
    if not isinstance(value, str):
        return value
    accounts = "resource.google_service_account."
    known = {f"var.{name.lower()}": value for name, value in names.items()}
    known |= {
        f"var.{name}": block["default"] for name, block in select(blocks, "variable.") if "default" in block
    } | known
    for name, block in select(blocks, accounts):
        email = f"{block['account_id']}@{names['PROJECT']}.iam.gserviceaccount.com"
        known |= {f"google_service_account.{name}.email": email}
        known |= {f"google_service_account.{name}.member": f"serviceAccount:{email}"}
    return re.sub(r"\$\{([a-z_.]+)\}", lambda match: known[match[1]], value)


def select(blocks: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    return [(name.removeprefix(prefix), block) for name, block in blocks.items() if name.startswith(prefix)]


def test_the_request_is_one_that_dataflow_and_embeam_take():
    command = check_request(read_request(NAMES))
    assert command.config.read.input == ("gs://a-bucket/corpus/*.jsonl",)
    assert command.config.write.output == "gs://a-bucket/table"
    cloud = command.options.view_as(GoogleCloudOptions)
    assert cloud.service_account_email == "embeam-worker@a-project.iam.gserviceaccount.com"


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("containerSpecGcsPath", "containerSpecPath", json_format.ParseError),
        ("launcherMachineType", "launcherMachine", json_format.ParseError),
        ("id_field", "id_feild", KeyError),
        ("gs://a-bucket/table", "table", AssertionError),
        ("embeam-table", "Embeam_Table", AssertionError),
        ("sdk_container_image", "id_field", ConfigError),
    ],
)
def test_a_mistake_in_the_request_would_be_seen(old, new, error):
    body = json.dumps(read_request(NAMES))
    assert old in body
    with pytest.raises(error):
        check_request(json.loads(body.replace(old, new)))


def test_the_request_names_what_the_flex_template_s_script_makes(run_script):
    _, (call,) = run_script(LAUNCHER, "run", "output=gs://a-bucket/table")
    launch = read_request(NAMES)["launchParameter"]
    assert launch["containerSpecGcsPath"] == flag(call, "template-file-gcs-location")
    assert f"^~~^sdk_container_image={launch['parameters']['sdk_container_image']}" in flag_values(call, "parameters")
    for name, field in (
        ("staging-location", "stagingLocation"),
        ("temp-location", "tempLocation"),
        ("launcher-machine-type", "launcherMachineType"),
    ):
        assert launch["environment"][field] == flag(call, name)
    options = check_request(read_request(NAMES)).options
    assert options.view_as(WorkerOptions).sdk_container_image == launch["parameters"]["sdk_container_image"]


def flag_values(call: list[str], name: str) -> list[str]:
    return [argument.partition("=")[2] for argument in call if argument.startswith(f"--{name}=")]


@pytest.mark.parametrize(
    ("missing", "verb", "headers"), [("describe", "create", "headers"), ("", "update", "update-headers")]
)
def test_the_script_makes_or_changes_the_schedule(run_script, missing, verb, headers):
    result, calls = run_script(SCHEDULER / "create.sh", missing=missing)
    assert result.returncode == 0, result.stderr
    call = calls[-1]
    assert call[:5] == ["scheduler", "jobs", verb, "http", "embeam"]
    assert json.loads(flag(call, "message-body")) == read_request(NAMES)
    assert flag(call, "uri") == LAUNCH.format(**NAMES) and flag(call, headers) == "Content-Type=application/json"
    assert flag(call, "location") == NAMES["REGION"]
    assert flag(call, "oauth-service-account-email") == "embeam-scheduler@a-project.iam.gserviceaccount.com"
    made = [call[3] for call in calls if call[:3] == ["iam", "service-accounts", "create"]]
    assert made == (["embeam-scheduler", "embeam-worker"] if missing else [])
    assert all(flag(call, "project") == "a-project" for call in calls)


def test_the_script_stops_at_the_first_thing_that_fails(run_script):
    result, calls = run_script(SCHEDULER / "create.sh", missing="roles/dataflow.worker")
    assert result.returncode == 1 and "roles/dataflow.worker" in " ".join(calls[-1])
    result, calls = run_script(SCHEDULER / "create.sh", "now")
    assert result.returncode == 2 and "takes no arguments" in result.stderr and not calls


def test_terraform_makes_the_schedule_that_the_script_makes(run_script):
    _, calls = run_script(SCHEDULER / "create.sh", missing="scheduler jobs describe")
    call, blocks = calls[-1], read_terraform()
    job = blocks["resource.google_cloud_scheduler_job.embeam"]
    (target,), (retry,) = job["http_target"], job["retry_config"]
    (token,) = target["oauth_token"]
    assert set(job) == {"name", "schedule", "time_zone", "attempt_deadline", "http_target", "retry_config"}
    assert set(target) == {"http_method", "uri", "headers", "body", "oauth_token"}

    def value(text: Any) -> Any:
        return evaluate(text, blocks, NAMES)

    assert (job["name"], value(job["schedule"])) == (call[4], flag(call, "schedule"))
    assert (job["time_zone"], job["attempt_deadline"]) == (flag(call, "time-zone"), flag(call, "attempt-deadline"))
    assert str(retry["retry_count"]) == flag(call, "max-retry-attempts")
    assert (target["http_method"].lower(), value(target["uri"])) == (flag(call, "http-method"), flag(call, "uri"))
    assert ["=".join(header) for header in target["headers"].items()] == [flag(call, "headers")]
    assert value(token["service_account_email"]) == flag(call, "oauth-service-account-email")
    assert token["scope"] == flag(call, "oauth-token-scope")

    assert target["body"] == "${base64encode(local.request)}"
    request = blocks["locals"]["request"]
    assert re.match(r'\$\{templatefile\("\$\{path\.module\}/request\.json", \{.*\}\)\}$', request)
    filled = {name: value(f"${{{reference}}}") for name, reference in re.findall(r"([A-Z]+) = ([a-z.]+)", request)}
    assert read_request(filled) == json.loads(flag(call, "message-body"))


def test_terraform_grants_what_the_script_grants_and_no_more(run_script):
    _, calls = run_script(SCHEDULER / "create.sh")
    blocks, grants = read_terraform(), set()
    groups = {
        "google_project_iam_member": "projects",
        "google_storage_bucket_iam_member": "storage buckets",
        "google_service_account_iam_member": "iam service-accounts",
        "google_artifact_registry_repository_iam_member": "artifacts repositories",
    }
    for kind, group in groups.items():
        for _, block in select(blocks, f"resource.{kind}."):
            member = evaluate(block["member"], blocks, NAMES).removeprefix("serviceAccount:embeam-").partition("@")[0]
            roles = re.findall(r'"(roles/[\w.]+)"', block.get("for_each", "")) or [block["role"]]
            grants |= {(member, role, group) for role in roles}
    assert grants == read_grants(calls) and len(grants) == 7
    assert blocks["resource.google_service_account_iam_member.scheduler"]["service_account_id"] == (
        "${google_service_account.worker.name}"
    )
    kinds = {name.split(".")[1] for name, _ in select(blocks, "") if name.startswith("resource.")}
    assert kinds == {*groups, "google_service_account", "google_cloud_scheduler_job"}


def test_the_names_to_change_are_the_same_everywhere():
    script = dict(re.findall(r"^(PROJECT|REGION|BUCKET)=\$\{\1:-(.+)\}$", (SCHEDULER / "create.sh").read_text(), re.M))
    blocks = read_terraform()
    assert {name.upper(): blocks[f"variable.{name}"]["default"] for name in ("project", "region", "bucket")} == script
    assert dict(re.findall(r"^(PROJECT|REGION|BUCKET)=\$\{\1:-(.+)\}$", LAUNCHER.read_text(), re.M)) == script
    dag = (SCHEDULE / "airflow" / "embeam_dag.py").read_text()
    assert dict(re.findall(r'^(PROJECT|REGION|BUCKET) = "(.+)"$', dag, re.M)) == script


@pytest.mark.tools
def test_terraform_finds_nothing_to_format():
    """Terraform itself reads the file; its parser in Python does so in the tests above."""
    terraform = find_program("terraform")
    told = subprocess.run([terraform, "fmt", "-check", "-diff", str(SCHEDULER)], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
