"""Values as their spelling suggests: cells of text formats, and names of folders."""

from __future__ import annotations

import math
import re
from typing import Any


def parse_spelling(value: str) -> Any:
    """The number, boolean or null that a text spells, or the text itself."""
    if not value:
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for parse in (int, float):
        try:
            number = parse(value)
        except ValueError:
            continue
        # Leading zeros, plus signs and underscores are spellings of names, not of numbers: 007 is not 7.
        is_number = re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", value, re.ASCII)
        return number if is_number and math.isfinite(number) else value
    return value
