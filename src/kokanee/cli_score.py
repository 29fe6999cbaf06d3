"""`kokanee score`: captions of one or more captioners, held against what is true, as a table and as scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kokanee.console import bar, say
from kokanee.errors import KokaneeError
from kokanee.formats import check_writable, write_json

if TYPE_CHECKING:
    from kokanee.scoring import Judge, Scores

VERSION = 1
REPLIES = "replies.jsonl"
SCORES = "scores.json"
COLUMNS = ("missed", "incorrect", "hallucinated", "hall", "total")
HEAD = "| captioner | | captions | Miss | Incorrect | Hallucinated | Hall | Total | repetition | words |"


def score(
    predictions: Annotated[
        list[Path], typer.Argument(help="Captions: files of `kokanee caption --out`, or the published result format.")
    ],
    events: Annotated[
        Path, typer.Option("--events", "-e", help="What is true: events, samples.jsonl, or the published test set.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for scores.json and a model's replies.")],
    judge: Annotated[str, typer.Option("--judge", "-j", help="exact (clips of the world), or openai:MODEL.")] = "exact",
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server; OpenAI, if left out.")] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Runs of which the median counts: 7 as published, 1 where exact.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions to a model at a time.")] = 16,
    budget_tokens: Annotated[int | None, typer.Option(min=1, help="Stop when a model has used so many.")] = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="Leave failed captions out, and take numbers whatever lists say.")
    ] = False,
) -> None:
    """How complete and how accurate captions are: events missed, told wrongly, and invented.

    Numbers are per cent of the ground-truth events, with 95 % confidence intervals over files. A second call with the
    same --out asks a model nothing that it has answered.
    """
    check_writable(out / SCORES)
    from kokanee.ground_truth import read_ground_truth
    from kokanee.predictions import read_predictions
    from kokanee.scoring import matched

    truth = read_ground_truth(events)
    predictions = list(dict.fromkeys(predictions))
    matching = {path: matched(read_predictions(path), truth, as_published) for path in predictions}
    by, runs = chosen(judge, base_url, concurrency, budget_tokens, out / REPLIES, as_published, runs)
    systems, lines = [], [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for name, (path, (whole, parts, unknown)) in zip(names_of(predictions), matching.items(), strict=True):
        if unknown:
            say(f"{path}: of {len(unknown)} captions nothing is known (such as of {unknown[0].file}); left out")
        silent = sum(not item.prediction.text for item in (*whole, *parts))
        if silent:
            say(f"{path}: {silent} files or intervals have no caption, and miss everything")
        system: dict[str, Any] = {"name": name, "file": path.as_posix()}
        for scope, items in (("global", whole), ("local", parts)):
            if items:
                made = judged_scores(items, by, runs, name, as_published)
                system[scope] = made.as_dict()
                lines.append(row(name, scope, made))
        systems.append(system)
    settings = {"judge": by.name, "as_published": as_published, "events": events.as_posix()}
    write_json(out / SCORES, {"version": VERSION, **settings, "systems": systems})
    typer.echo("\n".join(lines))
    lost = sum(made.get(scope, {}).get("unjudged", 0) for made in systems for scope in ("global", "local"))
    if lost:
        raise KokaneeError(
            f"{lost} judgements failed and count as all missed. Where the server gave no reply, the same command asks "
            "again; replies that cannot be read are kept: choose another model for these."
        )


def chosen(
    judge: str,
    base_url: str | None,
    concurrency: int,
    budget_tokens: int | None,
    replies: Path,
    as_published: bool,
    runs: int | None,
) -> tuple[Judge, int]:
    """The judge of this name, and how many runs it makes."""
    from kokanee.scoring import ExactJudge, ModelJudge

    if judge == "exact":
        return ExactJudge(), runs or 1
    kind, _, model = judge.partition(":")
    if kind != "openai" or not model:
        raise typer.BadParameter(f"{judge!r} is no judge; give exact or openai:MODEL", param_hint="--judge")
    from kokanee.endpoint import Asker, Endpoint
    from kokanee.judges import LanguageModelJudge
    from kokanee.protocol import RUNS

    endpoint = Endpoint(model, base_url, concurrency=concurrency, budget_tokens=budget_tokens)
    return ModelJudge(LanguageModelJudge(Asker(endpoint, replies), as_published)), runs or RUNS


def judged_scores(items: Sequence[Any], by: Judge, runs: int, name: str, as_published: bool) -> Scores:
    """The scores of some captions, with a bar for the judgements."""
    from kokanee.scoring import judge_all, scores

    with bar() as progress:
        task = progress.add_task(name, total=runs * len(items))
        judged = judge_all(items, by, runs, on_judged=lambda done: progress.update(task, completed=done))
    return scores(judged, as_published)


def names_of(paths: Sequence[Path]) -> list[str]:
    """What captioners are called: their file's name, or its folder's too where that is not enough."""
    stems = [path.stem for path in paths]
    return [path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in paths]


def row(name: str, scope: str, made: Scores) -> str:
    """One line of the table."""
    told = made.as_dict()
    cells = [f"{told['rates'][column]:.1f}" for column in COLUMNS]
    low, high = made.intervals["total"]
    cells[-1] += f" ({low:.1f} to {high:.1f})"
    return f"| {name} | {scope} | {len(made.items)} | {' | '.join(cells)} | {made.repetition:.1f} | {made.words:.1f} |"
