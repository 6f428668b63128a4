"""Checks the machine, then makes the virtual environment: `python3 scripts/set_up.py .venv`.

Runs under any Python since 2.7, so that an old one gets a sentence and not a syntax error.
"""

from __future__ import print_function

import os
import platform
import shutil
import subprocess
import sys
import time

PYTHONS = ((3, 11), (3, 12), (3, 13))
GIGABYTES = 3


def main(venv):
    python = os.path.join(venv, "bin", "python")
    unfinished = os.path.join(venv, ".unfinished")  # pip may have left an incomplete package that it would not repair

    _require_platform()
    start = time.time()
    # An intact environment is updated by its own Python, whatever `python3` is.
    fresh = os.path.exists(unfinished) or not _is_sound(python)
    if fresh:
        _require_python()
        print(
            "Setting up %s with Python %s, TensorFlow and Beam: about %d GB on disk, a few minutes, only once."
            % (venv, platform.python_version(), GIGABYTES)
        )
        shutil.rmtree(venv, ignore_errors=True)
        os.makedirs(venv)
    else:
        print("Bringing %s up to date." % venv)
    sys.stdout.flush()
    open(unfinished, "w").close()

    if fresh:
        _run([sys.executable, "-m", "venv", venv])
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run(install + ["--requirement", "requirements.lock"])
    # The lock lists all requirements, including setuptools for the build.
    _run(install + ["--no-deps", "--no-build-isolation", "--editable", "."])
    os.remove(unfinished)
    print("Ready after %d seconds." % (time.time() - start))


def _require_platform():
    system, machine = platform.system(), platform.machine()
    if (system, machine) not in (("Linux", "x86_64"), ("Darwin", "arm64")):
        _fail(
            "embeam runs on Linux x86-64 and on macOS with Apple silicon, the only ones that tfx-bsl is built for; "
            "this is %s %s. Use such a machine, WSL 2, or `docker run --platform=linux/amd64`." % (system, machine)
        )
    libc, version = platform.libc_ver()
    if system == "Linux" and (libc != "glibc" or _numbers(version) < (2, 28)):
        _fail(
            "embeam needs a Linux with glibc 2.28 or newer, such as Debian 10 or Ubuntu 20.04 (Alpine has none); "
            "this one has %s." % (" ".join((libc, version)).strip() or "another C library")
        )
    if system == "Darwin" and _numbers(platform.mac_ver()[0]) < (12,):
        _fail("embeam needs macOS 12 or newer; this is %s." % platform.mac_ver()[0])


def _require_python():
    if sys.version_info[:2] not in PYTHONS or platform.python_implementation() != "CPython":
        names = ["%d.%d" % version for version in PYTHONS]
        _fail(
            "embeam needs CPython %s or %s; %s is %s %s. Name another one: make setup PYTHON=python3.12"
            % (
                ", ".join(names[:-1]),
                names[-1],
                sys.executable,
                platform.python_implementation(),
                platform.python_version(),
            )
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        _fail(
            "%s cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv. "
            "Or name another Python: make setup PYTHON=python3.12" % sys.executable
        )


def _is_sound(python):
    """Whether the environment has a suitable Python with a working pip: a removed or upgraded Python breaks it."""
    check = "import sys, pip; sys.exit(sys.version_info[:2] not in %r)" % (PYTHONS,)
    return os.path.exists(python) and subprocess.call([python, "-c", check], stderr=subprocess.PIPE) == 0


def _numbers(version):
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _run(command):
    status = subprocess.call(command)
    if status != 0:
        _fail("Setting up stopped: see the lines above, then run `make setup` again.")


def _fail(sentence):
    sys.exit(sentence)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        _fail("Setting up was interrupted; run `make setup` again.")
