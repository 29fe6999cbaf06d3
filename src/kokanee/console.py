"""What the commands say on standard error: progress and notes. Standard output belongs to data."""

from __future__ import annotations

from typing import Any

import typer


def say(text: str) -> None:
    """A line on standard error."""
    typer.echo(text, err=True)


def key_value(item: str) -> tuple[str, Any]:
    """KEY=VALUE of an option --set; the value is YAML."""
    import yaml

    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(f"{item!r} is not KEY=VALUE", param_hint="--set")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{item!r}: the value is no YAML ({error})", param_hint="--set") from error


def bar(*more: str, hidden: bool = False) -> Any:
    """A progress bar on standard error that leaves standard output alone; `more` are templates of further columns."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(
        *columns,
        *(TextColumn(text, markup=False) for text in more),
        console=Console(stderr=True),
        redirect_stdout=False,
        redirect_stderr=False,
        disable=hidden,
    )
