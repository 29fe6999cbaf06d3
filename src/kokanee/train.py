"""One training loop for every stage. A stage is an `Objective`: it makes batches and turns a batch into a loss.

Every step's batch and random numbers follow from the seed and the step alone. A run that is killed and started again
therefore goes on from its last checkpoint as if nothing had happened: bit for bit on a CPU.

A run is a folder: `state.json` (the recipe; written first), `metrics.jsonl` (grows; steps that are done again after a
kill are taken out before), `tensorboard/`, and `checkpoint.safetensors`, replaced whole or not at all.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from pydantic_core import to_jsonable_python
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kokanee.errors import KokaneeError, memory_said
from kokanee.formats import (
    append_jsonl,
    differences,
    flat,
    read_json,
    read_jsonl,
    refuse_foreign,
    replaced_file,
    write_json,
    write_jsonl,
)
from kokanee.launch import check_gpu
from kokanee.recipes import Training

Batch = dict[str, torch.Tensor]
Stats = dict[str, torch.Tensor]
Report = Callable[[int, dict[str, float]], None]
STATE, METRICS, CHECKPOINT = "state.json", "metrics.jsonl", "checkpoint.safetensors"
LESS = (
    "Lower batch_size (and raise accumulate by as much), or give gradient_checkpointing: true or a bfloat16 setting "
    "where the recipe has one."
)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Objective(nn.Module):
    """What a stage has to offer: a model, batches of it, and a loss. Submodules beside `model` are always trained.

    `idle_parts` says whether a batch may leave trained weights without a gradient (those that hear, in silence).
    """

    model: Any
    idle_parts: bool = False

    def batch(self, split: Literal["train", "validation", "test"], number: int, size: int) -> Batch:
        """Batch `number` of a split. Equal arguments give equal batches. `sample`, where it is there, holds the numbers
        of the samples, for messages."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The loss, and figures by name; a figure that this batch does not define is left out."""
        raise NotImplementedError

    def name_of(self, sample: int) -> str:
        """What a sample of a batch is called, for messages."""
        return str(sample)

    def blamed(self, samples: Sequence[int]) -> Sequence[int]:
        """Which of these, the samples of a step whose loss is not finite, make it so; all, where that is not known."""
        return samples

    def samples(self) -> dict[str, str]:
        """What the batches are made of beside the recipe, by name: a run goes on only where this is the same."""
        return {}

    def finish(self) -> None:
        """Called once, after the last step, before the model is saved: what is still to be done to its weights."""


class Batches(Dataset):
    """The training batches of one process, by step and micro-step."""

    def __init__(self, objective: Objective, recipe: Training, first_step: int, rank: int, processes: int) -> None:
        self.objective, self.recipe = objective, recipe
        self.first, self.rank, self.processes = first_step * recipe.accumulate, rank, processes

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.accumulate - self.first

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError
        number = (self.first + index) * self.processes + self.rank
        return self.objective.batch("train", number, self.recipe.batch_size)


@dataclass(frozen=True)
class Run:
    """What a step needs. `wrapped` is the objective as it is called in training: the same, or shared by processes."""

    recipe: Training
    folder: Path
    objective: Objective
    wrapped: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: Any
    accelerator: Accelerator


def train(
    objective: Objective,
    recipe: Training,
    folder: Path,
    trained: dict[str, nn.Parameter],
    report: Report | None = None,
    start: dict[str, str] | None = None,
    free: Sequence[str] = (),
) -> dict[str, float]:
    """Train the given weights (see `choose`); returns the last step's figures, with those of its evaluation.

    Goes on where an earlier run in `folder` stopped. `start` says what it starts from, such as fingerprints of weights;
    settings named in `free` may be others than before. The main process calls `report(step, figures)` after every step.
    Raises `KokaneeError` when the folder holds a run with other settings or from another start, another number of
    processes runs than the recipe says, or a loss or gradient is not finite.
    """
    check_gpu(recipe.device)
    accelerator = Accelerator(
        cpu=recipe.device == "cpu",
        mixed_precision="bf16" if recipe.autocast_bf16 else "no",
        log_with="tensorboard",
        project_dir=str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=objective.idle_parts)],
    )
    accelerator.wait_for_everyone()  # until all are connected: one that stopped before would be another's error
    if accelerator.num_processes != recipe.processes:
        raise KokaneeError(
            f"The recipe is for processes: {recipe.processes}, but {accelerator.num_processes} run, which gives other "
            f"batches. Start it with torchrun --nproc-per-node {recipe.processes}, or change the recipe."
        )
    claim(folder, recipe, {**(start or {}), **objective.samples()}, free=free)
    optimizer: Any = torch.optim.AdamW(
        list(trained.values()),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    step = restore(folder, trained, optimizer)
    if accelerator.is_main_process:
        forget_after(folder / METRICS, step)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.init_trackers("tensorboard")
    try:
        with memory_said(LESS):
            figures = run_steps(Run(recipe, folder, objective, wrapped, trained, optimizer, accelerator), step, report)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.wait_for_everyone()
    return figures


def claim(
    folder: Path,
    recipe: Training,
    start: dict[str, str] | None = None,
    begun: Sequence[str] = (METRICS, CHECKPOINT),
    free: Sequence[str] = (),
    brought: Sequence[str] = (),
) -> None:
    """Make the folder this recipe's with this start, or raise `KokaneeError` where it holds other files or another run,
    with what differs. A run in which none of `begun` is there yet may be replaced; settings named in `free` may change;
    files named in `brought` may have been put there before. A setting that the run was begun without had its default.
    """
    settings = {"recipe": to_jsonable_python(recipe.model_dump()), "start": start or {}}
    known = folder / STATE
    refuse_foreign(folder, STATE, brought)
    if known.is_file():
        before = read_json(known)
        fields = type(recipe).model_fields
        defaults = {
            name: to_jsonable_python(field.get_default(call_default_factory=True))
            for name, field in fields.items()
            if not field.is_required()
        }
        compared = [
            {name: value for name, value in flat(recipe_of).items() if not is_in(name, free)}
            for recipe_of in ({**defaults, **before["recipe"]}, settings["recipe"])
        ]
        differing = differences(*compared)
        was, now = before.get("start", {}), settings["start"]
        differing += [f"other {name} than before" for name in was if was[name] != now.get(name)]
        if not differing and before == settings:
            return
        if differing and is_begun(folder, begun):
            raise KokaneeError(
                f"{folder} holds a run with other settings or another start ({'; '.join(differing)}). "
                "Continue with the old ones, or choose another folder."
            )
    write_json(known, settings)


def is_begun(folder: Path, begun: Sequence[str]) -> bool:
    """Whether anything was done in a folder that is a recipe's: any of these is there."""
    return (folder / STATE).is_file() and any((folder / name).exists() for name in begun)


def is_in(name: str, settings: Sequence[str]) -> bool:
    """Whether the whole name of a setting is one of these or inside one of them."""
    return any(f"{name}.".startswith(f"{one}.") for one in settings)


def choose(objective: Objective, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Freeze everything but the named parts of the model and what is the stage's own; the parameters left, by name.

    A part is a module or a parameter, named by its whole path ("audio.encoder"); all its weights are trained, those too
    that transformers leaves as they are (Whisper's table of positions). Raises `KokaneeError` for a name that
    is none.
    """
    own = [name for name, _ in objective.named_children() if name != "model"]
    wanted = [*(f"model.{part}" for part in parts), *own]
    found, trained = set(), {}
    for name, parameter in objective.named_parameters():
        owners = {path for path in wanted if name == path or name.startswith(f"{path}.")}
        found |= owners
        parameter.requires_grad_(bool(owners))
        if owners:
            trained[name] = parameter
    for part in parts:
        if f"model.{part}" not in found:
            known = ", ".join(name for name, _ in objective.model.named_children())
            raise KokaneeError(
                f"The model has no part '{part}' to train. Its parts are {known}, and their parts (such as "
                "audio.encoder). Name some of these in train."
            )
    if not trained:
        raise KokaneeError("The recipe trains nothing. Name parts of the model in train.")
    return trained


def run_steps(run: Run, step: int, report: Report | None) -> dict[str, float]:
    """All steps from `step` on, with evaluations, records and checkpoints at their times; the last step's figures."""
    recipe, accelerator = run.recipe, run.accelerator
    if step >= recipe.steps:
        record = next((one for one in reversed(read_jsonl(run.folder / METRICS)) if one["step"] == recipe.steps), None)
        return evaluate(run) if record is None else {name: value for name, value in record.items() if name != "step"}
    batches = stream(
        Batches(run.objective, recipe, step, accelerator.process_index, accelerator.num_processes), recipe.workers
    )
    figures: dict[str, float] = {}
    started, first = time.monotonic(), step
    while step < recipe.steps:
        torch.manual_seed(step_seed(recipe.seed, step, accelerator.process_index))
        figures = one_step(run, batches, step)
        step += 1
        figures["steps_per_s"] = (step - first) / (time.monotonic() - started)
        last = step == recipe.steps
        evaluated = last or step % recipe.evaluate_every == 0
        if evaluated:
            figures.update(evaluate(run))
        if not accelerator.is_main_process:
            continue
        if evaluated or step % recipe.log_every == 0:
            append_jsonl(run.folder / METRICS, [{"step": step, **figures}])
            accelerator.log(figures, step=step)
        if last or step % recipe.save_every == 0:
            keep(run.folder, step, run.trained, run.optimizer)
        if report is not None:
            report(step, figures)
    return figures


def stream(batches: Batches, workers: int) -> Iterator[Batch]:
    """The batches in order, made ahead by worker processes."""
    settings: dict[str, Any] = {}
    if workers:
        settings["prefetch_factor"] = 4
        if "fork" in multiprocessing.get_all_start_methods():
            settings["multiprocessing_context"] = "fork"
    return iter(DataLoader(batches, batch_size=None, shuffle=False, num_workers=workers, **settings))


def one_step(run: Run, batches: Iterator[Batch], step: int) -> dict[str, float]:
    """One update from `accumulate` batches; the means of this process's figures. Stops before a bad number is used."""
    recipe, accelerator = run.recipe, run.accelerator
    rate = learning_rate(recipe, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.wrapped.train()
    run.optimizer.zero_grad(set_to_none=True)
    found, samples = [], []
    for micro_step in range(recipe.accumulate):
        batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
        samples += batch["sample"].tolist() if "sample" in batch else []
        last = micro_step == recipe.accumulate - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(run.wrapped):
            loss, stats = run.wrapped(batch)
            accelerator.backward(loss / recipe.accumulate)
        found.append({"loss": float(loss.detach()), **{name: float(value) for name, value in stats.items()}})
    norm = float(torch.nn.utils.clip_grad_norm_(list(run.trained.values()), recipe.clip))
    losses = [figures["loss"] for figures in found]
    if not all(map(math.isfinite, losses)):
        samples = run.objective.blamed(samples)
    check_finite(losses, norm, [run.objective.name_of(sample) for sample in samples], step)
    run.optimizer.step()
    figures = means(found)
    return {"loss": figures.pop("loss"), "gradient": norm, **figures, "learning_rate": rate}


def check_finite(losses: list[float], norm: float, samples: list[str], step: int) -> None:
    """Raise `KokaneeError` with the samples of the process whose loss is not finite, if a loss or the gradient is not.

    The gradient is the mean over all processes, so that one bad loss spoils it for all of them.
    """
    if all(map(math.isfinite, [*losses, norm])):
        return
    loss = sum(losses) / len(losses)
    asked = [(loss, samples)] if math.isfinite(norm) else gather_object([(loss, samples)])
    loss, samples = next((found for found in asked if not math.isfinite(found[0])), (loss, samples))
    raise KokaneeError(
        f"Step {step + 1}: the loss is {loss} and the gradient's length {norm}"
        + (f", with samples {', '.join(samples)}" if samples else "")
        + ". The weights were left as they were. Look at these samples, or begin in another folder with a lower "
        "learning_rate."
    )


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Means over the first validation batches, named `validation/...`. The processes share the batches among them."""
    recipe, accelerator = run.recipe, run.accelerator
    run.objective.eval()
    found = []
    for number in range(accelerator.process_index, recipe.evaluate_batches, accelerator.num_processes):
        batch = run.objective.batch("validation", number, recipe.batch_size)
        loss, stats = run.objective({name: value.to(accelerator.device) for name, value in batch.items()})
        found.append((number, {name: float(value) for name, value in {"loss": loss, **stats}.items()}))
    in_order = sorted(gather_object(found), key=lambda item: item[0])
    return {f"validation/{name}": value for name, value in means([figures for _, figures in in_order]).items()}


def means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every figure, over the batches that define it."""
    names = dict.fromkeys(name for figures in found for name in figures)
    values = {name: [figures[name] for figures in found if name in figures] for name in names}
    return {name: sum(given) / len(given) for name, given in values.items()}


def learning_rate(recipe: Training, step: int) -> float:
    """A linear rise over `warmup` steps, then a half cosine (or a straight line) down to `final_share` of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    gone = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    fall = {"constant": 0.0, "linear": gone, "cosine": 0.5 * (1 - math.cos(math.pi * gone))}[recipe.schedule]
    return recipe.learning_rate * (1 - (1 - recipe.final_share) * fall)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's random numbers (dropout) in one process."""
    return (seed * 1_000_003 + step) * 64 + rank


def keep(folder: Path, step: int, trained: dict[str, nn.Parameter], optimizer: Any) -> None:
    """Write the trained weights, the optimizer's moments and the step into one file that takes the old one's place."""
    tensors = {f"weight/{name}": parameter.detach().contiguous() for name, parameter in trained.items()}
    inner = getattr(optimizer, "optimizer", optimizer)
    for name, parameter in trained.items():
        for key, value in inner.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).contiguous()
    with replaced_file(folder / CHECKPOINT) as unfinished:
        save_file(tensors, unfinished, metadata={"step": str(step)})


def forget_after(metrics: Path, step: int) -> None:
    """Take out the figures of later steps, which are done again."""
    found = read_jsonl(metrics) if metrics.is_file() else []
    left = [figures for figures in found if figures["step"] <= step]
    if left != found:
        write_jsonl(metrics, left)


def restore(folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None) -> int:
    """Take up the checkpoint of `folder`, if there is one, with the optimizer's moments; the number of steps done.

    Raises `KokaneeError` if it holds other weights than `trained`, in name or shape.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    stored = {
        name.removeprefix("weight/"): value.shape for name, value in tensors.items() if name.startswith("weight/")
    }
    wanted = {name: parameter.shape for name, parameter in trained.items()}
    odd = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
    if odd:
        raise KokaneeError(
            f"{path} holds other weights than this stage trains (such as {', '.join(odd[:3])}). Remove the folder, "
            "or start from the model that the run began with."
        )
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        if optimizer is not None:
            kept = {key: tensors[f"{key}/{name}"] for key in MOMENTS if f"{key}/{name}" in tensors}
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}
    return step
