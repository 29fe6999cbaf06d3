"""What the commands say on standard error: progress and notes. Standard output belongs to data."""

from __future__ import annotations

from typing import Any

import typer


def say(text: str) -> None:
    """A line on standard error."""
    typer.echo(text, err=True)


def bar(*more: str, hidden: bool = False) -> Any:
    """A progress bar on standard error that leaves standard output alone; `more` are templates of further columns."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(
        *columns,
        *(TextColumn(text) for text in more),
        console=Console(stderr=True),
        redirect_stdout=False,
        redirect_stderr=False,
        disable=hidden,
    )
