"""A user's type checker sees the types of the package: the examples of README.md pass, mistakes do not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import pipeline
from tests.support.paths import ROOT

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# Beam and Google's clients are left out to save time: five seconds.
SETTINGS = f"""[mypy]
strict = true
mypy_path = {ROOT}
follow_imports = silent
ignore_missing_imports = true
[mypy-apache_beam.*,google.*]
follow_imports = skip
"""
MISTAKES = {
    'pipeline.read_tabel("table")': "attr-defined",
    "pipeline.read_table(1)": "arg-type",
    'first: bytes = pipeline.read_table("table")[0][0]': "assignment",
    'pipeline.EmbedConfig(reader="text")': "call-arg",
    'pipeline.load_embedder("table").embed("a", "b", "c")': "call-arg",
    'pipeline.open_table("table")[0].n_rows': "attr-defined",
    'pipeline.Document("a", "text", n_tokens=2)': "call-arg",
}


def test_a_type_checker_sees_the_public_names_and_their_types(tmp_path):
    sources = {f"example_{i}.py": example for i, example in enumerate(EXAMPLES)}
    sources["names.py"] = f"from pipeline import {', '.join(pipeline.__all__)}\n"
    sources["wrong.py"] = "import pipeline\n" + "".join(f"{line}\n" for line in MISTAKES)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir=cache", *sources]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = re.findall(r"^(\S+):(\d+): error: .*\[([\w-]+)\]$", checked.stdout, re.MULTILINE)
    expected = [("wrong.py", str(number), code) for number, code in enumerate(MISTAKES.values(), start=2)]
    assert found == expected, checked.stdout + checked.stderr
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("name", pipeline.__all__)
def test_a_public_name_is_there(name):
    assert getattr(pipeline, name) is not None


def test_the_public_names_are_those_that_are_found_when_first_used():
    assert sorted(pipeline.__all__) == sorted(["__version__", *pipeline._HOMES])


def test_every_error_and_every_stage_of_the_configuration_is_public():
    from pipeline import config, errors

    for name, value in vars(errors).items():
        assert not (isinstance(value, type) and issubclass(value, errors.EmbeamError)) or name in pipeline.__all__, name
    assert {stage.__name__ for stage in config.STAGE_CONFIGS} <= set(pipeline.__all__)


def test_what_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'read_tabel'"):
        pipeline.read_tabel  # noqa: B018
