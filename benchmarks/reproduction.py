"""How long `kokanee reproduce nano` takes on this machine, from nothing and with all controls, projected from two small
runs of the same path.

    python benchmarks/reproduction.py [--device cuda] [--processes 1] [--shares 0.01 0.03] [--rounds 2]

Both runs have every step and control, with the commands and recipes of a true one but for their numbers: steps,
warmup, clips of features, of rounds, of validation and of the exam, and batches of evaluation are about `--shares` of
the whole. A straight line through the seconds of both gives what a step takes whatever its size (fixed: imports, the
model, ...) and what all of it takes. Of a line that would begin below 0 only the larger run is taken, as one through 0;
where the larger run took no longer than the smaller, their mean is taken for fixed. A second more or less of a small
run may be a minute of the whole, so that nothing else should run meanwhile.

What the machine does at once is not divided, so that the line is straight: each step has shares of its own, the nearest
at which it has a multiple of 20 steps of pretraining, of the clips that all processes caption together, or of the clips
of the exam that are looked at together; the larger is three times the smaller or more. Features are
counted by the clips of the process that has most of them; the smaller run measures a few clips, and goes on with the
features of the larger.

Captions of a model that has learnt nothing never end, so that `nano-sft`, of the same sizes, stands for the model that
each step of pretraining leaves. A round of so few clips learns from all pairs, however close, and is checked by one
batch. Marks are those of as many models, the middle ones, as are measured at once, times how often that is done. With
fewer `--rounds` than the recipe has, the others are added as long as the mean of those that were done.

Not counted: checkpoints on the way, reading more features than the small runs have, captions growing longer from round
to round, and the report. On a GPU the validation clips of the small runs are one batch, those of the whole two.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from kokanee import reproduce
from kokanee.checkpoints import locate
from kokanee.cli_reproduce import device_here
from kokanee.errors import KokaneeError
from kokanee.features import SHARD
from kokanee.formats import write_text
from kokanee.reproduce import CONTROLS, PRETRAINING, RECIPES, THREADS, Settings, device_name, recipes_of, sized_for
from kokanee.reproduce import steps_of as true_steps
from kokanee.steps import Step, Told, run_steps, seconds_of
from measuring import machine

STAND_IN = "nano-sft"
ROUNDS, REBIRTH = "6-mrdpo", "7-rebirth"
STEPS_TOGETHER, EXAM_TOGETHER = 20, 25
LEAST_APART = 3  # times that the larger run is the smaller
FEW_CLIPS = 10  # of features, of each part in the smaller run
IMPORTED = ("stages", "mrdpo", "rebirth", "exam")
Counts = tuple[int, int]
Changes = dict[str, Any]


@dataclass(frozen=True)
class Small:
    """A small reproduction in `folder`. clips, validation, exam: how many clips there are features of, and files;
    shares: of each training step, what share of its steps is done."""

    settings: Settings
    folder: Path
    clips: int
    validation: int
    exam: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Row:
    """What a step took in both small runs, in seconds, and which share of it they were; times: how many of what was
    timed the step has."""

    name: str
    shares: Sequence[float]
    seconds: Sequence[float]
    times: int = 1

    @property
    def line(self) -> tuple[float, float]:
        """Seconds at share 0, and what is added up to share 1; see above."""
        (less, more), (first, second) = self.shares, self.seconds
        slope = (second - first) / (more - less) if more > less else 0.0
        if slope <= 0:
            return (first + second) / 2, 0.0
        fixed = first - slope * less
        return (fixed, slope) if fixed >= 0 else (0.0, second / more)

    @property
    def fixed_s(self) -> float:
        return self.times * self.line[0]

    @property
    def whole_s(self) -> float:
        return self.times * sum(self.line)

    def __str__(self) -> str:
        taken = [f"{seconds:.1f} ({share:.1%})" for seconds, share in zip(self.seconds, self.shares, strict=True)]
        return f"| {self.name} | {' | '.join(taken)} | {self.fixed_s:.1f} | {self.whole_s / 60:.1f} |"


def counts(shares: Sequence[float], whole: int, together: int) -> Counts:
    """How many of `whole` are done in the smaller run and in the larger, as multiples of `together`."""
    first = max(1, round(shares[0] * whole / together))
    second = max(LEAST_APART * first, round(shares[1] * whole / together))
    return min(first * together, whole), min(second * together, whole)


def pretraining(recipe: Changes, steps: int, processes: int) -> Changes:
    """What is replaced in a recipe of pretraining; as large a share of all its evaluations comes in one, at the end."""
    share = steps / recipe["steps"]
    batches = share * math.ceil(recipe["steps"] / recipe["evaluate_every"]) * recipe["evaluate_batches"]
    made = {"steps": steps, "evaluate_every": steps, "warmup": scaled(share, recipe["warmup"])}
    return made | {"evaluate_batches": scaled(1 / processes, batches) * processes}


def tuning(recipe: Changes, clips: int, share: float) -> Changes:
    """What is replaced in a recipe of tuning, of all of whose clips so many are a share."""
    made = {name: scaled(share, recipe[name]) for name in ("steps", "warmup", "validation_clips")}
    return made | {"clips": clips, "evaluate_batches": 1}


def scaled(share: float, whole: float) -> int:
    return max(1, round(share * whole))


def small_runs(settings: Settings, shares: Sequence[float], rounds: int, folder: Path) -> tuple[Small, Small]:
    """The smaller and the larger run, in folders inside `folder`."""
    whole = recipes_of(settings)
    changes: tuple[dict[str, Changes], dict[str, Changes]] = ({}, {})
    for name in PRETRAINING:
        for place, steps in enumerate(counts(shares, whole[name]["steps"], STEPS_TOGETHER)):
            changes[place][name] = pretraining(whole[name], steps, settings.processes)
    for name, clips in ((ROUNDS, whole[ROUNDS]["clips"]), (REBIRTH, reproduce.CLIPS)):
        together = sized_for(settings, whole[name])["caption_batch"] * settings.processes
        for place, some in enumerate(counts(shares, clips, together)):
            changes[place][name] = tuning(whole[name], some, some / clips)
    for change in changes:
        change[ROUNDS] |= {"rounds": rounds, "pairs.min_gap": 0.0}
    wanted = [max(changes[1][name][part] for name in (ROUNDS, REBIRTH)) for part in ("clips", "validation_clips")]
    at_once = SHARD * feature_processes(settings)
    stores = ((FEW_CLIPS, FEW_CLIPS), (math.ceil(wanted[0] / at_once) * at_once, wanted[1]))
    exams = counts(shares, reproduce.EXAM_CLIPS, EXAM_TOGETHER)
    first, second = (
        Small(
            replace(settings, changed=tuple((name, *one) for name, made in change.items() for one in made.items())),
            folder / str(place),
            *stores[place],
            exams[place],
            {name: made["steps"] / whole[name]["steps"] for name, made in change.items()},
        )
        for place, change in enumerate(changes)
    )
    return first, second


def steps_of(settings: Settings) -> list[Step]:
    """The steps in order, each control as one of its own."""
    made = []
    for step in true_steps(settings):
        if step.name != "controls":
            made.append(step)
            continue
        for command, file in zip(step.commands, step.made, strict=True):
            name = command[-1]
            made.append(Step(name, CONTROLS[name], (command,), step.minutes, 1, (file,)))
    return made


def small_steps(small: Small) -> list[Step]:
    """The steps of a small run; of the marks those of as many models, the middle ones, as are measured at once."""
    sizes = {"CLIPS": small.clips, "VALIDATION_CLIPS": small.validation, "EXAM_CLIPS": small.exam}
    with mock.patch.dict(vars(reproduce), sizes):
        *steps, marks = steps_of(small.settings)
    first = (len(marks.commands) - marks.together) // 2
    some = slice(first, first + marks.together)
    return [*steps, replace(marks, commands=marks.commands[some], made=marks.made[some])]


def feature_processes(settings: Settings) -> int:
    """How many processes share the making of features."""
    step = next(step for step in true_steps(settings) if step.name == "features")
    return int(word_after("--processes", step.commands[0]))


def word_after(option: str, words: Sequence[str]) -> str:
    return words[words.index(option) + 1]


def busiest(step: Step) -> int:
    """How many clips the process encodes that encodes most; processes share whole shards."""
    found = 0
    for words in step.commands:
        clips, processes = (int(word_after(option, words)) for option in ("--clips", "--processes"))
        found += min(clips, SHARD * math.ceil(math.ceil(clips / SHARD) / processes))
    return found


def begin(small: Small) -> None:
    """Write the recipes, as a reproduction does."""
    for name, recipe in recipes_of(small.settings).items():
        text = yaml.safe_dump(sized_for(small.settings, recipe), sort_keys=False)
        write_text(small.folder / RECIPES / f"{name}.yaml", text)


def timed(small: Small, step: Step, rounds: int) -> float:
    """Do a step; how many seconds it took, with rounds that were left out."""

    def report(_: Told) -> None:
        pass

    run_steps([step], small.folder, THREADS, partial(device_name, small.settings, small.folder), report)
    seconds = seconds_of(small.folder)[step.name]
    if step.name in PRETRAINING:
        model = small.folder / step.name / "model"
        shutil.rmtree(model)
        shutil.copytree(locate(STAND_IN), model)
    if step.name in (ROUNDS, "ce"):
        seconds += left_out(small.folder / step.name, rounds)
    print(f"{step.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds


def left_out(run: Path, rounds: int) -> float:
    """Seconds of the rounds that a run of mrDPO has less than `rounds`, as long as the mean of those it has."""
    ends = [path.stat().st_mtime for path in sorted(run.glob("round-*/metrics.json"))]
    done = len(ends) - 1  # the first are the figures before all rounds
    return (rounds - done) * (ends[-1] - ends[0]) / done


def shares_of(runs: Sequence[Small], steps: Sequence[Step], true: Step) -> list[float]:
    """Which share of a step is done in each run. true: the step of a true reproduction."""
    if true.name == "features":
        return [busiest(step) / busiest(true) for step in steps]
    if true.name in ("exam", "marks"):
        return [small.exam / reproduce.EXAM_CLIPS for small in runs]
    if true.name == "gdpo":
        return [1.0 for _ in runs]
    like = {"dpo": ROUNDS, "ce": ROUNDS, "continued": REBIRTH}
    return [small.shares[like.get(true.name, true.name)] for small in runs]


def row_of(runs: Sequence[Small], steps: Sequence[Step], true: Step, rounds: int) -> Row:
    """Do a step in both runs. true: the step of a true reproduction, whose runs of mrDPO have so many `rounds`."""
    seconds = [timed(small, step, rounds) for small, step in zip(runs, steps, strict=True)]
    if true.name == "features":
        copied, kept = (small.folder / "features" for small in runs)
        shutil.rmtree(copied)
        shutil.copytree(kept, copied)
    times = math.ceil(len(true.commands) / true.together) if true.name == "marks" else 1
    return Row(true.name, shares_of(runs, steps, true), seconds, times)


def warm_up(device: str) -> None:
    """Read what commands import, so that the first is no slower than the others; and use the GPU once."""
    for name in IMPORTED:
        import_module(f"kokanee.{name}")
    import_module("tensorboardX")
    if device == "cuda":
        torch.randn(64, 64, device=device).matmul(torch.randn(64, 64, device=device)).sum().item()


def rows(settings: Settings, shares: Sequence[float], rounds: int, folder: Path) -> list[Row]:
    """All steps, each in both runs before the next."""
    runs = small_runs(settings, shares, rounds, folder)
    for small in runs:
        begin(small)
    all_rounds, found = recipes_of(settings)[ROUNDS]["rounds"], []
    for true, *steps in zip(steps_of(settings), *map(small_steps, runs), strict=True):
        found.append(row_of(runs, steps, true, all_rounds))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def sum_of(found: Sequence[Row]) -> str:
    """The last row of the table."""
    taken = [sum(row.seconds[place] for row in found) for place in (0, 1)]
    fixed_s, whole_s = sum(row.fixed_s for row in found), sum(row.whole_s for row in found)
    return f"| sum | {taken[0]:.0f} | {taken[1]:.0f} | {fixed_s:.0f} | {whole_s / 60:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--processes", type=int, help="that share the training; 2 on a CPU, 1 on a GPU")
    parser.add_argument("--shares", type=float, nargs=2, default=(0.01, 0.03), metavar=("LESS", "MORE"))
    parser.add_argument("--rounds", type=int, help="of mrDPO in the small runs; all on a CPU, 2 on a GPU")
    options = parser.parse_args()
    if not 0 < options.shares[0] < options.shares[1] < 1:
        parser.error("--shares: give two between 0 and 1, the smaller first")
    started = time.monotonic()
    try:
        device = device_here(options.device)
        settings = Settings(device=device, processes=options.processes or (1 if device == "cuda" else 2))
        rounds = options.rounds or (2 if device == "cuda" else recipes_of(settings)[ROUNDS]["rounds"])
        warm_up(device)
        with tempfile.TemporaryDirectory() as folder:
            found = rows(settings, options.shares, rounds, Path(folder))
    except KokaneeError as error:
        raise SystemExit(f"Error: {error}") from None
    print(f"{machine(device)}, processes: {settings.processes}; {time.monotonic() - started:.0f} s for this\n")
    print("| step | a small run, s (share) | a larger one, s (share) | fixed, s | whole, minutes |")
    print(f"{'|---' * 5}|", *found, sum_of(found), sep="\n")


if __name__ == "__main__":
    main()
