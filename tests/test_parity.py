"""The kept part of the golden data; `benchmarks/parity.py` and `benchmarks/parity_salmonn2.py` say what is compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "salmonn2plus"
FIRST = ROOT / "tests" / "golden" / "salmonn2"
sys.path.append(str(ROOT / "benchmarks"))

import parity  # noqa: E402
import parity_salmonn2  # noqa: E402

MODELS = ((parity, GOLDEN), (parity_salmonn2, FIRST))


@pytest.mark.parametrize(
    ("models", "folder", "group"),
    [(models, folder, group) for models, folder in MODELS for group in models.GROUPS],
)
def test_every_golden_quantity_is_within_its_limit(models, folder, group):
    rows = models.measure(folder, group)
    assert rows
    assert not [f"{row.group}, {row.quantity}: {row.difference:g} > {row.limit:g}" for row in rows if not row.passed]


def test_a_wrong_weight_is_noticed():
    golden = parity.Golden(GOLDEN)
    golden.model.audio.projection.weight.data.mul_(1.01)
    assert [row.quantity for row in parity.encoder_rows(golden) if not row.passed] == [
        "audio tokens, short",
        "audio tokens, mid",
    ]


def test_a_wrong_weight_of_the_first_papers_model_is_noticed():
    golden = parity_salmonn2.Golden(FIRST)
    golden.model.visual.newline.data.mul_(1.01)
    off = [row.quantity for row in parity_salmonn2.encoder_rows(golden) if not row.passed]
    assert off and all(name.startswith("embeddings") and "audio_only" not in name for name in off)
