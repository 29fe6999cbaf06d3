"""The kept part of the golden data; `benchmarks/parity.py` says what is compared and writes docs/parity.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "salmonn2plus"
sys.path.append(str(ROOT / "benchmarks"))

import parity  # noqa: E402


@pytest.mark.parametrize("group", parity.GROUPS)
def test_every_golden_quantity_is_within_its_limit(group):
    rows = parity.measure(GOLDEN, group)
    assert rows
    assert not [f"{row.group}, {row.quantity}: {row.difference:g} > {row.limit:g}" for row in rows if not row.passed]


def test_a_wrong_weight_is_noticed():
    golden = parity.Golden(GOLDEN)
    golden.model.audio.projection.weight.data.mul_(1.01)
    assert [row.quantity for row in parity.encoder_rows(golden) if not row.passed] == [
        "audio tokens, short",
        "audio tokens, mid",
    ]
