"""What a training step of each of nano's stages takes: making its batches, the step itself, and how many kernels it is.

    python benchmarks/nano_steps.py [--device cuda] [--repeats 10]

The recipes of `recipes/nano/` on `nano-sft`, of whose sizes all stages are. On a CPU a step is that of one of the
processes that share it, on one thread: one batch, made before it. On a GPU one process makes the batches of a step one
after the other, and workers make them ahead, as in `kokanee reproduce nano`.

On a GPU nano is too small for a step to take longer than telling the device what to do: its kernels count, however
much each computes. Counted is, of all batches of a step, what torch dispatches in forward and backward (without the
optimizer), but for what only looks at a tensor in another way; reads are results that the processor waits for.

`minutes`: the recipe's steps times what one takes; without evaluations, checkpoints, captions and imports.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kokanee import prefix
from kokanee.adapting import adapted
from kokanee.checkpoints import load
from kokanee.clips import WorldClips, WorldData
from kokanee.features import fill_store
from kokanee.model import Kokanee
from kokanee.mrdpo_recipe import MrdpoRecipe
from kokanee.preferences import Lesson, Preferences, Weights
from kokanee.prefix import branch_attention_in, branch_mask
from kokanee.processor import Processor
from kokanee.rebirth import RebirthRecipe
from kokanee.recipes import Recipe, Training, read_recipe, read_yaml
from kokanee.reproduce import GPU_WORKERS, shipped_recipes
from kokanee.stages import make_objective
from kokanee.train import Batch, Objective, choose
from kokanee.world.scene import Split
from measuring import interleaved, machine, spread

CLIPS: dict[Split, int] = {"train": 500, "validation": 16}
MODEL = "nano-sft"
PRETRAINING = ("1-see", "2-hear", "3-base", "4-align", "5-sft")
TUNING = ("6-mrdpo", "7-rebirth")
LOOKS = {"_unsafe_view", "empty", "empty_like"}  # beside what torch calls a view
READ = "_local_scalar_dense"


class Kernels(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def stage(name: str, model: Kokanee, processor: Processor, store: Path) -> tuple[Objective, Training]:
    """A stage of pretraining."""
    path = shipped_recipes() / f"{name}.yaml"
    data = read_yaml(path).get("data", {})
    data |= {part: str(store / part) for part in CLIPS if data}
    recipe = read_recipe(path, data=data)
    assert isinstance(recipe, Recipe)
    objective = make_objective(recipe, model, processor)
    choose(objective, recipe.train)
    return objective, recipe


def tuning(name: str, model: Kokanee, processor: Processor, store: Path) -> tuple[Objective, Training]:
    """A round of mrDPO on pairs of two annotators' captions, or rebirth tuning on one of them."""
    settings = read_yaml(shipped_recipes() / f"{name}.yaml")
    recipe = (MrdpoRecipe if name == "6-mrdpo" else RebirthRecipe)(**settings)
    questions, weights = recipe.questions, Weights("ce", gt_weight=1.0, qa_weight=recipe.qa_weight)
    if isinstance(recipe, MrdpoRecipe):
        questions, weights = 0, Weights(recipe.loss, recipe.beta, recipe.gt_weight, recipe.qa_weight)
    clips = WorldClips(model, processor, WorldData.model_validate({"features": str(store / "train")}), "train")
    lessons = []
    for number in range(len(clips)):
        task, other = (clips.task(number, questions, annotator) for annotator in ("one", "another"))
        pairs = ((task.ground_truth, other.ground_truth),) if weights.loss == "gdpo" else ()
        lessons.append(Lesson(number, task.name, task.prompt, task.ground_truth, pairs, task.questions))
        clips.view(number)
    objective = Preferences(
        adapted(model, recipe.lora).get_base_model(),  # pyright: ignore[reportArgumentType]
        processor,
        clips,
        lessons,
        weights,
        held_out=recipe.n_held_out,
        seed=0,
        reference=[torch.zeros(1, 2)] * len(lessons),
    )
    for weight, parameter in objective.named_parameters():
        parameter.requires_grad_("lora_" in weight)
    return objective, recipe


def kernels_of(objective: Objective, batch: Batch) -> tuple[int, int]:
    """How many kernels forward and backward are, and how many reads; counted on the processor, as a GPU would do it."""
    masked = mock.patch.object(prefix, "short_mask", lambda segments, heads: branch_mask(segments))
    with packed(objective), masked, Kernels() as kernels:
        loss, stats = objective(batch)
        loss.backward()
        read = [float(value) for value in (loss.detach(), *stats.values())]
    objective.zero_grad()
    count = sum(times for name, times in kernels.found.items() if name not in LOOKS and name != READ)
    assert read and count
    return count, kernels.found[READ]


def packed(objective: Objective) -> contextlib.AbstractContextManager[None]:
    """What a step of the objective is done inside."""
    return branch_attention_in(objective.model) if isinstance(objective, Preferences) else contextlib.nullcontext()


def measured(name: str, objective: Objective, recipe: Training, repeats: int, device: str) -> str:
    """A line of the table."""

    def batch_of(number: int) -> Batch:
        return objective.batch("train", number, recipe.batch_size)

    objective.train()
    count, reads = kernels_of(objective, batch_of(0))
    objective.to(device)
    weights = [one for one in objective.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    in_a_step = recipe.processes if device == "cuda" else 1
    batches: list[Batch] = []

    def make() -> None:
        batches.extend(batch_of(len(batches) + 1) for _ in range(in_a_step))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in batches[-in_a_step:]:
            loss, stats = objective({key: value.to(device) for key, value in batch.items()})
            (loss / in_a_step).backward()
            assert all(math.isfinite(float(value)) for value in (loss.detach(), *stats.values()))
        assert math.isfinite(float(torch.nn.utils.clip_grad_norm_(weights, recipe.clip)))
        optimizer.step()

    with packed(objective):
        make()
        step()  # what is only done the first time
        seconds = interleaved({"making": make, "step": step}, repeats, device)
    making, stepping = (statistics.median(seconds[what]) for what in ("making", "step"))
    each = max(making / GPU_WORKERS, stepping) if device == "cuda" else making + stepping
    rounds = recipe.rounds if isinstance(recipe, MrdpoRecipe) else 1
    cells = (name, f"{rounds} x {recipe.steps}" if rounds > 1 else recipe.steps, spread(seconds["making"]))
    cells = (*cells, spread(seconds["step"]), recipe.processes * count, recipe.processes * reads)
    return f"| {' | '.join(map(str, cells))} | {rounds * recipe.steps * each / 60:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(options.device), "\n")
    columns = ("stage", "steps", "making its batches, s", "a step, s", "kernels", "reads", "minutes")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as folder:
        for part, clips in CLIPS.items():
            fill_store(*load(MODEL, dtype="float32"), Path(folder) / part, part, clips, 0, 0.4)
        for name in (*PRETRAINING, *TUNING):
            torch.manual_seed(0)
            prepare = stage if name in PRETRAINING else tuning
            objective, recipe = prepare(name, *load(MODEL, dtype="float32"), Path(folder))
            print(measured(name, objective, recipe, options.repeats, options.device), flush=True)


if __name__ == "__main__":
    main()
