"""What the commands say on standard error: progress and notes. Standard output belongs to data."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from kokanee.launch import is_worker

POWER_OF_TEN = re.compile(r"[+-]?\d+[eE][+-]?\d+")
BAR_WIDTH = 16  # leaves room for figures where a line has 80 columns
LINE_EVERY_S = float(os.environ.get("KOKANEE_LINE_EVERY_S", 60.0))


def say(text: str) -> None:
    """A line on standard error."""
    typer.echo(text, err=True)


@contextmanager
def said_when_stopped(text: str) -> Iterator[None]:
    """Says on Ctrl-C what becomes of what was done; of several processes the launcher does."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_worker():
            say(text)
        raise


def counted(number: int, what: str) -> str:
    """So many of something, such as "1 video" or "2 videos"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def key_value(item: str) -> tuple[str, Any]:
    """KEY=VALUE of an option --set; the value is YAML."""
    import yaml

    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(f"{item!r} is not KEY=VALUE", param_hint="--set")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{item!r}: the value is no YAML ({error})", param_hint="--set") from error
    is_number = isinstance(found, str) and POWER_OF_TEN.fullmatch(found)  # a text to YAML, which wants 4.0e-3
    return key.strip(), float(found) if is_number else found


@dataclass
class Work:
    """A piece of work that is told of in lines."""

    description: str
    total: float | None
    completed: float
    fields: dict[str, Any]
    ended: bool = False


class Lines:
    """What a rich.progress.Progress is to its caller, told in lines: one a minute, and one where a piece of work is
    done."""

    def __init__(self, columns: Sequence[str], console: Any, hidden: bool) -> None:
        self.columns, self.console, self.hidden = columns, console, hidden
        self.tasks: list[Work] = []
        self.said_s = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, description: str, total: float | None = None, visible: bool = True, **fields: Any) -> int:
        self.tasks.append(Work(description, total, 0, fields))
        return len(self.tasks) - 1

    def stop_task(self, number: int) -> None:
        pass

    def reset(self, number: int, total: float | None = None, visible: bool = True, **fields: Any) -> None:
        task = self.tasks[number]
        task.total, task.completed, task.ended = total, 0, False
        task.fields.update(fields)

    def advance(self, number: int, advance: float = 1) -> None:
        self.update(number, completed=self.tasks[number].completed + advance)

    def update(
        self,
        number: int,
        completed: float | None = None,
        total: float | None = None,
        advance: float = 0,
        **fields: Any,
    ) -> None:
        task = self.tasks[number]
        task.total = task.total if total is None else total
        task.completed = task.completed + advance if completed is None else completed
        task.fields.update(fields)
        ended, task.ended = task.ended, task.total is not None and task.completed >= task.total
        if not self.hidden and ((task.ended and not ended) or time.monotonic() - self.said_s >= LINE_EVERY_S):
            self.said_s = time.monotonic()
            done = f"{task.completed:g}" + ("" if task.total is None else f" of {task.total:g}")
            say(" ".join([f"{task.description}: {done}", *(text.format(task=task) for text in self.columns)]).rstrip())


def bar(*more: str, hidden: bool = False, remaining: bool = True) -> Any:
    """Progress on standard error, which leaves standard output alone: bars on a terminal, lines elsewhere. `more` are
    templates of further columns; `remaining`: whether a bar tells how long the rest will take."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return Lines(more, console, hidden)
    columns = (TextColumn("{task.description}"), BarColumn(BAR_WIDTH), MofNCompleteColumn())
    return Progress(
        *columns,
        *([TimeRemainingColumn()] if remaining else []),
        *(TextColumn(text, markup=False) for text in more),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=hidden,
    )
