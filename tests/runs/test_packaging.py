"""What `--setup_file=./setup.py` sends to workers: an installation from it can do all that the source tree can."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.runners.portability.stager import Stager

from pipeline import __version__
from pipeline.tables.read import read_table
from tests.support.paths import ROOT

pytestmark = [pytest.mark.package, pytest.mark.timeout(300)]
SITE = Path(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The archive that Beam makes of setup.py, from a copy of the tree, since it builds in place."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for name in ("pipeline", "runners"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source / name)
    archives = folder / "archives"
    archives.mkdir()
    return Path(Stager._build_setup_package(str(source / "setup.py"), str(archives)))


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory) -> Path:
    """A virtual environment with the archive installed, and the dependencies of this one within reach."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    tools = folder / "tools"  # what builds it, and nothing else of this environment
    tools.mkdir()
    for path in (*SITE.glob("setuptools"), *SITE.glob("setuptools-*.dist-info")):
        (tools / path.name).symlink_to(path)
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(python, "-m", "pip", "install", *offline, package, PYTHONPATH=str(tools))
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{SITE}\n")  # without the .pth files there, so not this source tree
    return folder / "venv"


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, "CUDA_VISIBLE_DEVICES": "-1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def list_files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(path.relative_to(folder))


def test_every_file_of_the_package_is_packed_and_installed(package, installed):
    files = set(list_files(ROOT / "pipeline"))
    builtin = {f"encoders/builtin/{name}" for name in ("vocabulary.txt", "weights.npz", "MODEL_CARD.md")}
    assert builtin | {"py.typed"} <= files
    with tarfile.open(package) as archive:
        paths = [Path(*Path(name).parts[1:]) for name in archive.getnames()]
    packed = {str(path.relative_to("pipeline")) for path in paths if path.is_relative_to("pipeline")}
    assert files - packed == set()
    (packages,) = (installed / "lib").glob("python*/site-packages")
    assert files - set(list_files(packages / "pipeline")) == set()


def test_the_installation_is_what_runs(installed, tmp_path):
    where = run(installed / "bin" / "python", "-c", "import pipeline; print(pipeline.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(installed)
    assert run(installed / "bin" / "embeam", "--version", cwd=tmp_path).strip() == f"embeam {__version__}"


def test_the_installation_embeds_in_another_folder(installed, tmp_path):
    (tmp_path / "corpus.txt").write_text("Stars form in cold clouds.\nThe tide turned at noon.\n")
    run(installed / "bin" / "embeam", "embed", "--input=corpus.txt", "--output=table", cwd=tmp_path)
    ids, vectors = read_table(str(tmp_path / "table"))
    assert sorted(ids) == ["corpus.txt@0", "corpus.txt@27"] and len(vectors) == 2
