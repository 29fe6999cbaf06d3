"""Kills a small run of mrDPO at random moments, starts it again each time, and compares the weights that it ends with.

python tests/kill_mrdpo.py [--kills 10] [--seed N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from mrdpo_runs import run, small_recipe, weights


def one_life(checkpoint: str, stores: dict[str, str], folder: str) -> None:
    """What a process does until it has done all or is killed."""
    torch.set_num_threads(1)
    run(small_recipe(checkpoint, stores), Path(folder))


def kill_often(checkpoint: Path, stores: dict[str, str], folder: Path, kills: int, seed: int) -> list[float]:
    """Kill runs `kills` times by SIGKILL, each within the first third of a whole run's time; the moments in seconds.

    A run that ends between two kills is compared with one that was never killed, and another begins. Raises
    `AssertionError` where weights differ.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mrdpo_runs"])

    def start(name: str) -> Any:
        process = context.Process(target=one_life, args=(str(checkpoint), stores, str(folder / name)))
        process.start()
        return process

    started = time.monotonic()
    whole = start("whole")
    whole.join()
    took_s, rng, moments, number = time.monotonic() - started, random.Random(seed), [], 0
    assert whole.exitcode == 0, "the run failed though nobody killed it"
    while len(moments) < kills or not (folder / f"killed-{number}" / "metrics.json").is_file():
        process, moment_s = start(f"killed-{number}"), rng.uniform(0, took_s / 3)
        process.join(moment_s if len(moments) < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            moments.append(moment_s)
            continue
        assert process.exitcode == 0, f"killed at {moments} s (seed {seed}), it does not go on"
        assert weights(folder / f"killed-{number}") == weights(folder / "whole"), f"killed at {moments} s, seed {seed}"
        number += len(moments) < kills
    return moments


def main() -> None:
    from conftest import TINY
    from kokanee.checkpoints import save
    from kokanee.features import fill_store
    from kokanee.stages import fresh_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
        model, processor = fresh_model(folder / "model.yaml")
        checkpoint = save(model.eval(), processor, folder / "checkpoint")
        stores = {"train": str(folder / "train"), "validation": str(folder / "validation")}
        fill_store(model, processor, folder / "train", "train", 6, seed=0, share_cut=0.5)
        fill_store(model, processor, folder / "validation", "validation", 3, seed=0, share_cut=0.0)
        moments = kill_often(checkpoint, stores, folder, asked.kills, asked.seed)
    shown = ", ".join(f"{moment:.2f}" for moment in moments)
    print(
        f"killed {len(moments)} times (seed {asked.seed}), after {shown} s; the weights are those of a run never killed"
    )


if __name__ == "__main__":
    main()
