"""Small runs of mrDPO, for laws that hold at every size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from kokanee.mrdpo import run_mrdpo
from kokanee.mrdpo_recipe import MrdpoRecipe

SMALL: dict[str, Any] = {
    "stage": "mrdpo",
    "rounds": 2,
    "steps": 3,
    "clips": 6,
    "samples": 4,
    "temperatures": [1.0, 0.5],
    "top_p": 1.0,
    "max_new_tokens": 12,
    "caption_batch": 2,
    "pairs": {"min_gap": 0.0, "max_pairs": 2},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "qa_from_round": 2,
    "questions": 2,
    "validation_clips": 3,
    "batch_size": 1,
    "accumulate": 2,
    "evaluate_batches": 1,
    "learning_rate": 0.01,
    "save_every": 1,
    "log_every": 1,
    "workers": 0,
    "device": "cpu",
}


def small_recipe(checkpoint: Path | str, stores: dict[str, str], **replaced: Any) -> MrdpoRecipe:
    data = {split: {"features": folder} for split, folder in stores.items()}
    return MrdpoRecipe(**copy.deepcopy({**SMALL, "model": str(checkpoint), "data": data, **replaced}))


def quiet(what: str, done: int, total: int, figures: dict[str, float]) -> None:
    pass


def weights(folder: Path) -> bytes:
    """The weights that a run left."""
    return (folder / "model" / "model.safetensors").read_bytes()


def run(recipe: MrdpoRecipe, folder: Path) -> list[dict[str, Any]]:
    return run_mrdpo(recipe, folder, quiet)
