"""One training loop for every stage. A stage is an objective: it makes batches and turns a batch into a loss.

    class Objective(nn.Module):
        batch(split, number, size) -> dict of tensors, the same for the same arguments
        forward(batch) -> (loss, {name: number})

Every step's batch and random numbers follow from the seed and the step alone. A run that is killed and started again
therefore goes on from its last checkpoint as if nothing had happened: bit for bit on a CPU.

A run is a folder: `state.json` (the recipe; written first), `metrics.jsonl` (only grows), `tensorboard/`,
and `checkpoint.safetensors`, replaced whole or not at all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl, replaced_file, write_json
from kokanee.recipes import Recipe

logger = logging.getLogger("kokanee")
Batch = dict[str, torch.Tensor]
Report = Callable[[int, dict[str, float]], None]
STATE, METRICS, CHECKPOINT = "state.json", "metrics.jsonl", "checkpoint.safetensors"


class Objective(Protocol):
    """What a stage has to offer; see the head of this file."""

    def batch(self, split: Any, number: int, size: int) -> Batch: ...

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


class Batches(Dataset):
    """The training batches of one process, by step and micro-step."""

    def __init__(self, objective: Objective, recipe: Recipe, first_step: int, rank: int, processes: int) -> None:
        self.objective, self.recipe = objective, recipe
        self.first, self.rank, self.processes = first_step * recipe.accumulate, rank, processes

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.accumulate - self.first

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError
        number = (self.first + index) * self.processes + self.rank
        return self.objective.batch("train", number, self.recipe.batch_size)


def train(objective: nn.Module, recipe: Recipe, folder: Path, report: Report | None = None) -> dict[str, float]:
    """Train the parameters that the recipe names; returns the last evaluation's figures.

    Goes on where an earlier run in `folder` stopped. `report(step, figures)` is called after every step. Raises
    `KokaneeError` when the folder holds a run with other settings, or a loss or gradient is not finite.
    """
    accelerator = Accelerator(
        cpu=recipe.device == "cpu", mixed_precision="bf16" if recipe.autocast_bf16 else "no", log_with="tensorboard",
        project_dir=str(folder),
    )
    if accelerator.is_main_process:
        claim(folder, recipe)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")
    trained = choose(objective, recipe.train)
    optimizer = torch.optim.AdamW(
        list(trained.values()), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    step = restore(folder, trained, optimizer)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    batches = stream(Batches(objective, recipe, step, accelerator.process_index, accelerator.num_processes), recipe)
    figures: dict[str, float] = {}
    started, first = time.monotonic(), step
    while step < recipe.steps:
        rate = learning_rate(recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(recipe.seed, step, accelerator.process_index))
        figures = one_step(wrapped, trained, optimizer, batches, recipe, accelerator, step)
        step += 1
        figures.update(learning_rate=rate, steps_per_s=(step - first) / (time.monotonic() - started))
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            figures.update(evaluate(objective, recipe))
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if step % recipe.log_every == 0 or step == recipe.steps or any("/" in name for name in figures):
                append_jsonl(folder / METRICS, [{"step": step, **figures}])
                accelerator.log(figures, step=step)
            if step % recipe.save_every == 0 or step == recipe.steps:
                keep(folder, step, trained, optimizer)
            if report is not None:
                report(step, figures)
    accelerator.end_training()
    return figures


def claim(folder: Path, recipe: Recipe) -> None:
    """Make the folder this recipe's, or raise `KokaneeError` with what differs where it is another's."""
    settings = json.loads(recipe.model_dump_json())
    known = folder / STATE
    if not known.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, {"recipe": settings})
        return
    before = json.loads(known.read_text())["recipe"]
    differing = [
        f"{key}: {before.get(key)!r} before, {settings.get(key)!r} now"
        for key in sorted({*before, *settings})
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise KokaneeError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}). "
            "Continue with the old settings, or choose another folder."
        )


def choose(objective: nn.Module, prefixes: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Freeze everything but the parameters whose names begin with one of the prefixes, and the stage's own head."""
    model = getattr(objective, "model")
    own = tuple(f"{name}." for name, _ in objective.named_children() if name != "model")
    wanted = (*(f"model.{prefix}" for prefix in prefixes), *own)
    trained = {}
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
        if parameter.requires_grad:
            trained[name] = parameter
    for prefix in prefixes:
        if not any(name.startswith(f"model.{prefix}") for name in trained):
            parts = ", ".join(name for name, _ in model.named_children())
            raise KokaneeError(f"No parameter's name begins with '{prefix}'. The model's parts are: {parts}.")
    return trained


def stream(batches: Batches, recipe: Recipe) -> Iterator[Batch]:
    """The batches in order, made ahead by worker processes."""
    workers = recipe.workers
    context = {"multiprocessing_context": "fork", "prefetch_factor": 4} if workers else {}
    return iter(DataLoader(batches, batch_size=None, shuffle=False, num_workers=workers, **context))


def one_step(
    wrapped: nn.Module,
    trained: dict[str, nn.Parameter],
    optimizer: Any,
    batches: Iterator[Batch],
    recipe: Recipe,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float]:
    """One update from `accumulate` batches; the figures of the last of them. Stops before a bad number is used."""
    wrapped.train()
    optimizer.zero_grad(set_to_none=True)
    total, stats, batch = 0.0, {}, {}
    for _ in range(recipe.accumulate):
        batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
        loss, stats = wrapped(batch)
        accelerator.backward(loss / recipe.accumulate)
        total += float(loss.detach()) / recipe.accumulate
    norm = float(torch.nn.utils.clip_grad_norm_(list(trained.values()), recipe.clip))
    if not (math.isfinite(total) and math.isfinite(norm)):
        source = batch.get("sample")
        raise KokaneeError(
            f"Step {step + 1}: the loss is {total} and the gradient's length {norm}"
            + (f", with samples {source.tolist()}" if source is not None else "")
            + ". The weights were left as they were. Lower learning_rate, or look at these samples."
        )
    optimizer.step()
    return {"loss": total, "gradient": norm, **{name: float(value) for name, value in stats.items()}}


@torch.no_grad()
def evaluate(objective: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Means over the first validation batches, named `validation/...`."""
    objective.eval()
    sums: dict[str, float] = {}
    device = next(objective.parameters()).device
    for number in range(recipe.evaluate_batches):
        batch = objective.batch("validation", number, recipe.batch_size)  # pyright: ignore[reportCallIssue]
        loss, stats = objective({name: value.to(device) for name, value in batch.items()})
        for name, value in {"loss": loss, **stats}.items():
            sums[f"validation/{name}"] = sums.get(f"validation/{name}", 0.0) + float(value) / recipe.evaluate_batches
    return sums


def learning_rate(recipe: Recipe, step: int) -> float:
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


def restore(folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Take up the checkpoint of `folder`, if there is one; the number of steps done."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    names = {name.split("/", 1)[1] for name in tensors}
    if names != set(trained):
        odd = ", ".join(sorted(names ^ set(trained))[:3])
        raise KokaneeError(f"{path} holds other weights than this stage trains (such as {odd}). Remove the folder.")
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        moments = {key: tensors.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items() if value is not None}
    return step
