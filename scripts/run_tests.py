"""Runs the tests: `python scripts/run_tests.py [LANE ...]`.

Without a lane those that need nothing but the environment, which is what `make test` means. A lane is a marker of
pyproject.toml; `lanes` means all of them, and then those that compare numbers once more with older instructions. A lane
that needs programs which this machine has not is left out of `lanes`, with a line that says so.

Tests run in as many processes as there are cores, and at most four, since each takes a gigabyte. Those of a lane that
are marked `alone` come after that, one by one.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

NO_LANES = {"alone", "numeric"}  # markers that say something else
PROCESSES = ("-n", "logical", "--maxprocesses=4", "--dist=worksteal")
TOOLS = ("systemd-analyze", "terraform")  # of the lane `tools`
OLD_PROCESSOR = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
NO_TESTS = 5  # pytest's exit code if it finds none


def main(asked: list[str]) -> int:
    lanes = read_lanes()
    if unknown := set(asked) - {*lanes, "lanes"}:
        return fail(f"{', '.join(sorted(unknown))} is not a lane; there are {', '.join(lanes)}")
    if not asked:
        return run_pytest(f"not ({' or '.join(lanes)})", *PROCESSES)
    if "lanes" in asked and (missing := [name for name in TOOLS if not shutil.which(name)]):
        print(f"the lane tools is skipped, because this machine has no {' and no '.join(missing)}")
        lanes.remove("tools")
    which = " or ".join(lanes if "lanes" in asked else asked)
    codes = [run_pytest(f"({which}) and not alone", *PROCESSES), run_pytest(f"({which}) and alone")]
    if all(code == NO_TESTS for code in codes):
        return fail(f"no test is marked {which}")
    if "lanes" in asked:
        codes.append(run_pytest("numeric", *PROCESSES, environment=OLD_PROCESSOR))
    return next((code for code in codes if code not in (0, NO_TESTS)), 0)


def read_lanes() -> list[str]:
    options = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    names = [marker.partition(":")[0] for marker in options["markers"]]
    return [name for name in names if name not in NO_LANES]


def run_pytest(which: str, *options: str, environment: dict[str, str] | None = None) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, *options]
    print("pytest", *command[3:], *(f"# {name}={value}" for name, value in (environment or {}).items()), flush=True)
    return subprocess.call(command, env=os.environ | (environment or {}))


def fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
