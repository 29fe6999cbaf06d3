"""`kokanee events`: captions that tell the truth -> their atomic events, which `kokanee score --events` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kokanee.cli_score import (
    BaseUrl,
    BudgetMoney,
    BudgetTokens,
    Concurrency,
    MaxTokens,
    PerMinute,
    Prices,
    asked_by,
    model_of,
)
from kokanee.console import bar, say
from kokanee.errors import KokaneeError
from kokanee.formats import alone_at, check_writable


def events(
    captions: Annotated[
        Path,
        typer.Argument(help="True captions: of `kokanee caption`, of a published file, or written by hand."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of events (JSON lines); what it holds is kept.")],
    model: Annotated[str, typer.Option("--model", "-m", help="openai:MODEL.")],
    base_url: BaseUrl = None,
    concurrency: Concurrency = 16,
    max_tokens: MaxTokens = 4096,
    requests_per_minute: PerMinute = None,
    budget_tokens: BudgetTokens = None,
    budget_money: BudgetMoney = None,
    prices: Prices = None,
) -> None:
    """Split captions into atomic events: the ground truth that captioners are scored against.

    A second call with the same --out makes only what is missing: no line that is there is changed, whoever wrote
    it. A model's replies are kept beside it.
    """
    if out.suffix == ".json":
        raise typer.BadParameter(f"{out} would hold JSON lines; let its name end in .jsonl", param_hint="--out")
    name = model_of(model, "--model", "model; give openai:MODEL")
    asking = asked_by(base_url, concurrency, max_tokens, requests_per_minute, budget_tokens, budget_money, prices)
    check_writable(out)
    from kokanee.endpoint import Asker, Endpoint
    from kokanee.extraction import extract, plan, set_half_aside
    from kokanee.ground_truth import place
    from kokanee.predictions import read_predictions

    found, endpoint = read_predictions(captions), Endpoint(name, **asking)
    with alone_at(out):
        todo = plan(found, out)
        if aside := set_half_aside(out):  # only now, as the plan refuses a file that holds something else
            say(f"{out}: its last line was cut off, and stands in {aside} now")
        if todo.empty:
            count = f"{len(todo.empty)} of {len(found)} captions"
            say(f"{captions}: {count} left out, as they are empty (such as {place(todo.empty[0])})")
        if todo.changed:
            names = ", ".join(map(place, todo.changed))
            say(f"The captions of these have changed since, and their events are kept: {names}.")
            say(f"To have them made again, delete their lines in {out}.")
        asker = Asker(endpoint, out.with_suffix(".replies.jsonl"))
        try:
            with bar(hidden=not todo.missing) as progress:
                task = progress.add_task(out.stem, total=len(todo.missing))
                failed = extract(todo.missing, asker, out, lambda done: progress.update(task, completed=done))
        finally:
            say(told(out))
    for caption, error in failed:
        say(f"{place(caption)}: {error}")
    if failed:
        raise KokaneeError(
            f"{len(failed)} of {len(todo.missing)} captions got no events. Where the server gave no reply, the "
            "same command asks again; replies that cannot be used are kept: choose another model for these, or write "
            "their lines by hand."
        )


def told(out: Path) -> str:
    """What a file of events holds, so that a model that tells too little or too much is noticed."""
    from kokanee.ground_truth import read_ground_truth

    counts = [len(truth.events) for truth in read_ground_truth(out).truths] if out.is_file() else []
    many = f"events of {len(counts)} captions, {min(counts)} to {max(counts)} each" if counts else "no events yet"
    return f"{out}: {many}"
