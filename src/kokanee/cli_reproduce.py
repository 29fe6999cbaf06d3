"""`kokanee reproduce`: the whole method in one command."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kokanee.console import bar, key_value, said_when_stopped, say
from kokanee.errors import KokaneeError

if TYPE_CHECKING:
    from kokanee.steps import Told

LINE_EVERY_S = 60.0
SHOWN = 60  # characters of what a command says


def reproduce(
    model: Annotated[str, typer.Argument(help="What is reproduced: nano.")],
    out: Annotated[Path, typer.Option(help="Folder of the reproduction; a stopped one goes on there.")] = Path(
        "runs/reproduce"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of everything: world, weights, captions.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same path with small numbers; nothing is learnt.")
    ] = False,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Begin with this supervised model, such as nano-sft, in place of pretraining."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    processes: Annotated[
        int | None, typer.Option(min=1, help="That share the training; 2 on a CPU, 1 on a GPU.")
    ] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Folder of a finished reproduction that the report is about as well.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STEP.KEY=VALUE", help="Replace a setting, such as 5-sft.steps=2000."),
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave a control out: dpo, ce or continued.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the commands of all steps and leave.")] = False,
) -> None:
    """Train nano from nothing, with all controls, measure every stage, and write one report beside the paper's numbers.

    About four hours on two cores, less than one on an H100 (projected). It can be killed at any time and called again.
    """
    from kokanee.reproduce import CONTROLS, PAGE, RESULTS, Settings, checked_settings, left, read_results, steps_of
    from kokanee.reproduce import reproduce as work
    from kokanee.reproduce_tables import lines
    from kokanee.steps import shown

    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"there is no device {device!r}; give auto, cpu or cuda", param_hint="--device")
    if unknown := set(without or ()) - set(CONTROLS):
        raise typer.BadParameter(f"{unknown.pop()!r} is none of {', '.join(CONTROLS)}", param_hint="--without")
    changed = []
    for item in set_ or []:
        key, value = key_value(item)
        step, dot, name = key.partition(".")
        if not dot:
            raise typer.BadParameter(f"{item!r} is not STEP.KEY=VALUE", param_hint="--set")
        changed.append((step, name, value))
    device = device_here(device)
    count = processes or (1 if device == "cuda" or quick else 2)
    if start is not None and Path(start).is_dir():
        start = str(Path(start).resolve())  # steps are done in the reproduction's own folder
    settings = Settings(model, seed, quick, start, device, count, tuple(changed), tuple(without or ()))
    checked_settings(settings, out, beside or ())
    if dry_run:
        say(f"in {out}, with recipes that are written there when it begins:")
        for step in steps_of(settings):
            for command in step.commands:
                typer.echo(shown(command))
        return
    minutes = left(settings, out)
    if minutes:
        say(f"{out}: about {lasting(minutes)} left {'on two cores' if device == 'cpu' else 'on a GPU'}")
    with said_when_stopped(f"{out}: the same command again goes on."), steps_progress() as report:
        anything = work(settings, out, report, beside or ())
    if not anything:
        say(f"{out} is finished: nothing was left to do.")
    found = [read_results(folder) for folder in (*(beside or ()), out)]
    of = "a quick run, whose numbers mean nothing" if quick else f"{len(found)} seed{'s' * (len(found) > 1)}"
    say(f"per cent of the true events of {found[-1]['exam']['clips']} clips; {of}")
    typer.echo("\n".join(lines(found)))
    say(f"what came of it: {out / PAGE}, as numbers: {out / RESULTS}")


def device_here(wanted: str) -> str:
    """cpu or cuda. Raises `KokaneeError` for a GPU that is not there."""
    if wanted == "cpu":
        return wanted
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise KokaneeError("There is no GPU that torch can use. Leave --device out, or install a torch for your GPU.")
    return "cpu"


@contextmanager
def steps_progress() -> Iterator[Callable[[Told], None]]:
    """What is done and what is left on standard error: a bar on a terminal; lines elsewhere, one a step and one a
    minute."""
    from rich.console import Console

    live, said_s, name = Console(stderr=True).is_terminal, 0.0, ""
    with bar("{task.fields[figures]}", hidden=not live, remaining=False) as progress:
        task = progress.add_task("steps", total=None, figures="")

        def report(told: Told) -> None:
            nonlocal said_s, name
            line, left = told.line or told.step.title, f"about {lasting(told.minutes_left)} left"
            head = f"{told.step.name}: {line[:SHOWN]}"
            progress.update(task, completed=told.number - 1, total=told.n_steps, figures=f"{head}; {left}")
            new = told.step.name != name
            if not live and (new or time.monotonic() - said_s >= LINE_EVERY_S):
                said_s, name = time.monotonic(), told.step.name
                about = told.step.title if new else line
                say(f"step {told.number} of {told.n_steps}, {told.step.name}: {about}; {left}")

        yield report


def lasting(minutes: float) -> str:
    """A length of time in words."""
    if minutes < 1.5:
        return "1 min"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
