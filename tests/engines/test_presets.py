"""The table of GPUs in runners/README.md is the one in the code."""

from __future__ import annotations

import re

from pipeline.config import ACCELERATORS
from pipeline.engines.presets import PRESETS
from tests.support.paths import ROOT

ROW = re.compile(r"^\| `(nvidia-[\w-]+)` \| ([\w-]+)[^|]* \| ([\d,]+) \| (\d+) \| (\w+) \|$", re.MULTILINE)


def test_the_readme_has_the_presets():
    text = (ROOT / "runners" / "README.md").read_text()
    rows = {
        name: (machine, int(tokens.replace(",", "")), int(threads), precision)
        for name, machine, tokens, threads, precision in ROW.findall(text)
    }
    assert rows == {name: (p.machine_type, p.batch_tokens, p.threads, p.half_precision) for name, p in PRESETS.items()}
    assert set(rows) == set(ACCELERATORS)
