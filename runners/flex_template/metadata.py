"""The template's parameters, made from the configuration: `python -m runners.flex_template.metadata --write`.

The console draws a form from them, and the service checks values before it starts a machine. Every field of the
configuration is a parameter; the patterns refuse no value that the flag takes in its usual spelling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.config import ACCELERATORS, POOLINGS, STAGE_CONFIGS
from pipeline.errors import ConfigError
from pipeline.read_config import FIELD_TYPES

PATH = Path(__file__).with_name("metadata.json")
REQUIRED = ("output",)

_REPEATED = "; may be given several times"  # a parameter has one value
_ANYWHERE = "[a-z][a-z0-9]*://.+"  # workers see no folder of the machine that a job was started from
_KEPT = f"[^:,]+(:({'|'.join(FIELD_TYPES)}))?"
_TEXTS = {
    "input": _ANYWHERE,
    "output": _ANYWHERE,
    "work_dir": _ANYWHERE,
    "encoder": _ANYWHERE,
    "preprocessor": _ANYWHERE,
    "query_dataset": r"[^.]+\.[^.]+",
    "keep_fields": f"{_KEPT}(,{_KEPT})*",
    "vector": f"[^:/]+(/-?[0-9]+)?(:({'|'.join(POOLINGS)}|tokens))?",
    "accelerator": "|".join(ACCELERATORS),
    "encoder_memory": "[0-9]+(MB|GB|MiB|GiB)",
}
_BOOLEAN = "true|false|True|False|1|0|yes|no"
_COUNT, _COUNT_FROM_1 = "[0-9][0-9_]*", "[0-9_]*[1-9][0-9_]*"
_NUMBER = r"[0-9]+(\.[0-9]*)?|\.[0-9]+"
_SHARE = r"0?\.[0-9]+|0(\.0*)?|1(\.0*)?"


def make_metadata() -> dict[str, Any]:
    """The template's description, as its file holds it."""
    return {
        "name": "embeam",
        "description": "Turns a text corpus into an embedding table.",
        "parameters": [_describe(kind, f) for kind in STAGE_CONFIGS for f in dataclasses.fields(kind)],
    }


def format_metadata() -> str:
    return json.dumps(make_metadata(), indent=2) + "\n"


def _describe(kind: type, f: dataclasses.Field[Any]) -> dict[str, Any]:
    choices = f.metadata["choices"]
    parameter = {
        "name": f.name,
        "label": f.name.replace("_", " ").capitalize(),
        "helpText": f.metadata["help"].replace(_REPEATED, ""),
        "isOptional": f.name not in REQUIRED,
        "groupName": kind.__doc__,
        "paramType": _type(f),
    }
    if pattern := _pattern(kind, f):
        parameter["regexes"] = [f"^({pattern})$"]
    if choices:
        parameter["enumOptions"] = [{"value": choice, "label": choice} for choice in choices]
    if f.default not in ("", ()):
        parameter["defaultValue"] = _format(f.default)
    return parameter


def _type(f: dataclasses.Field[Any]) -> str:
    if f.metadata["choices"]:
        return "ENUM"
    if isinstance(f.default, bool):
        return "BOOLEAN"
    return "NUMBER" if isinstance(f.default, int | float) else "TEXT"


def _pattern(kind: type, f: dataclasses.Field[Any]) -> str:
    if f.metadata["choices"]:
        return "|".join(f.metadata["choices"])
    if isinstance(f.default, bool):
        return _BOOLEAN
    if isinstance(f.default, int):
        return _COUNT if _takes(kind, f, 0) else _COUNT_FROM_1
    if isinstance(f.default, float):
        return _NUMBER if _takes(kind, f, 2.0) else _SHARE
    return _TEXTS.get(f.name, "")


def _takes(kind: type, f: dataclasses.Field[Any], value: float) -> bool:
    """Whether the configuration accepts the value, with all other settings at their defaults."""
    try:
        kind(**{f.name: value})
    except ConfigError:
        return False
    return True


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the template's metadata, made from the configuration.")
    parser.add_argument("--write", action="store_true", help=f"write it to {PATH.name} instead")
    if parser.parse_args().write:
        PATH.write_text(format_metadata(), encoding="utf-8")
    else:
        print(format_metadata(), end="")


if __name__ == "__main__":
    main()
