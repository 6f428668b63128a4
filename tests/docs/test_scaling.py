"""What docs/scaling.md shows of the cost model is what the model says."""

from __future__ import annotations

import re
import shlex

import pytest

from benchmarks.cost import Encoder, count_flops, main
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "scaling.md").read_text()
EXAMPLES = re.findall(r"```\n\$ \S+ -m benchmarks\.cost ([^\n]*)\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize(("arguments", "shown"), EXAMPLES)
def test_the_examples_are_what_the_model_gives(arguments, shown, capsys):
    main(shlex.split(arguments))
    assert capsys.readouterr().out == shown


def test_there_are_examples():
    assert len(EXAMPLES) == 3


def test_flops_are_those_of_the_multiplications():
    """Counted one matrix product at a time, for one layer of two tokens."""
    e, tokens = Encoder(layers=1, width=8, heads=2, feedforward=16), 2
    products = [(tokens, 8, 8)] * 4  # queries, keys, values, output
    products += [(tokens, 8, 16)] * 2 + [(tokens, 16, 8)]  # up, gate, down
    products += [(tokens, 4, tokens)] * 2 + [(tokens, tokens, 4)] * 2  # scores and values, for each of two heads
    products += [(tokens * tokens, 2, 2)] * 2  # heads mixed before and after the softmax
    products += [(1, 8, 8)]  # pooler
    assert count_flops(e, tokens) == sum(2 * m * k * n for m, k, n in products)
