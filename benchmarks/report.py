"""Formats results as a table and as JSON, each with the machine that they were measured on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

from benchmarks.measure import BenchmarkError, Ratio, Report, Run, median, steady_rate, whole_rate

_PACKAGES = ("apache-beam", "tensorflow", "tensorflow-text", "tfx-bsl", "numpy")


def describe_hardware() -> dict[str, Any]:
    """Processor, cores, memory, versions, and load of the machine."""
    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            facts = [line.partition(":") for line in file]
    except OSError:
        return platform.processor()
    values = {name.strip(): value.strip() for name, _, value in reversed(facts)}
    family = f", family {values['cpu family']} model {values['model']}" if "cpu family" in values else ""
    return values.get("model name", platform.machine()) + family


def format_hardware() -> str:
    return "\n".join(f"  {name:16} {value}" for name, value in describe_hardware().items()) + "\n"


def format_report(report: Report) -> str:
    """A table of medians, one line per side, and the ratios."""
    width, per_second = max(map(len, report.sides)), f"{report.unit}/s"
    head = f"{'whole s':>9} {per_second:>13} {'start-up s':>11} {'steady ' + per_second:>20} {'peak MB':>8}"
    lines = [report.title, f"  {'':{width}} {head}"]
    for name, runs in report.sides.items():
        lines.append(f"  {name:{width}} {' '.join(_format_cells(runs))}")
    runs_each = max(map(len, report.sides.values()))
    lines.append(f"  medians of {runs_each} runs of each side, by turns")
    lines += [f"  {name}: {_format_fact(value)}" for name, value in report.facts.items()]
    lines += [format_ratio(ratio) for ratio in report.ratios]
    return "\n".join(lines)


def _format_cells(runs: list[Run]) -> list[str]:
    return [
        f"{median(runs, 'whole_seconds'):9.1f}",
        f"{whole_rate(runs):13,.1f}",
        f"{median(runs, 'start_up_seconds'):11.1f}",
        _format_steady_rate(runs),
        f"{median(runs, 'peak_bytes') / 1e6:8,.0f}",
    ]


def _format_steady_rate(runs: list[Run]) -> str:
    try:
        return f"{steady_rate(runs):20,.1f}"
    except BenchmarkError:
        return f"{'-':>20}"


def _format_fact(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_ratio(ratio: Ratio) -> str:
    bound = ""
    if ratio.holds is not None:
        words = f"at least {ratio.at_least:g}" if ratio.at_least is not None else f"at most {ratio.at_most:g}"
        bound = f" ({words}: {'holds' if ratio.holds else 'MISSED'})"
    return f"  => {ratio.name}: {ratio.value:.2f} {ratio.unit}{bound}"


def write_json(name: str, report: Report, options: Mapping[str, Any], path: str) -> None:
    values = {
        "benchmark": name,
        "title": report.title,
        "hardware": describe_hardware(),
        "options": {key: value for key, value in options.items() if key not in ("names", "folder", "models")},
        "ratios": [ratio._asdict() | {"holds": ratio.holds} for ratio in report.ratios],
        "facts": report.facts,
        "unit": report.unit,
        "runs": report.sides,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.write("\n")
