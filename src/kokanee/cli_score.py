"""`kokanee score`: captions of one or more captioners, held against what is true: table, scores.json, report.html."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kokanee.console import bar, say
from kokanee.errors import KokaneeError
from kokanee.formats import alone_in, check_writable, write_json, write_text

if TYPE_CHECKING:
    from kokanee.ground_truth import GroundTruth
    from kokanee.predictions import Prediction
    from kokanee.scoring import Item, Judge, Scores

VERSION = 1
REPLIES = "replies.jsonl"
SCORES = "scores.json"
REPORT = "report.html"
AGREEMENT = "agreement.json"
OF_MODELS = ("base_url", "per_minute", "budget_tokens", "budget_money", "prices")
HEAD = "| captioner | | captions | Miss | Incorrect | Hallucinated | Hall | Total | repetition | words |"


Events = Annotated[
    Path, typer.Option("--events", "-e", help="What is true: events, samples.jsonl, or the published test set.")
]
JudgeName = Annotated[str, typer.Option("--judge", "-j", help="exact (clips of the world), or openai:MODEL.")]
BaseUrl = Annotated[str | None, typer.Option(help="An OpenAI-compatible server; OpenAI, if left out.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Questions to a model at a time.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest reply of a model.")]
PerMinute = Annotated[float | None, typer.Option(min=0, help="Requests a minute at most, where a server limits them.")]
BudgetTokens = Annotated[int | None, typer.Option(min=1, help="Stop when a model has used so many.")]
BudgetMoney = Annotated[float | None, typer.Option(min=0, help="Stop when a model has cost so much; needs --prices.")]
Prices = Annotated[
    str | None, typer.Option(metavar="IN,OUT", help="Of a million tokens of questions and of replies, such as 0.5,1.5.")
]


def score(
    predictions: Annotated[
        list[Path], typer.Argument(help="Captions: files of `kokanee caption --out`, or the published result format.")
    ],
    events: Events,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for scores.json, report.html and a model's replies.")
    ],
    judge: JudgeName = "exact",
    base_url: BaseUrl = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Runs of which the median counts: 7 as published, 1 where exact.")
    ] = None,
    concurrency: Concurrency = 16,
    max_tokens: MaxTokens = 4096,
    requests_per_minute: PerMinute = None,
    budget_tokens: BudgetTokens = None,
    budget_money: BudgetMoney = None,
    prices: Prices = None,
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
    from kokanee.report import page
    from kokanee.scoring import matched, scores

    truth = read_ground_truth(events)
    predictions = list(dict.fromkeys(predictions))
    matching = {}
    for path in predictions:
        found = read_predictions(path)
        try:
            matching[path] = matched(found, truth, as_published)
        except KokaneeError as error:
            raise KokaneeError(f"{path}: {error}") from error
    asking = asked_by(base_url, concurrency, max_tokens, requests_per_minute, budget_tokens, budget_money, prices)
    with alone_in(out):
        by, runs = chosen(judge, asking, out / REPLIES, as_published, runs)
        systems, lines, made = [], [HEAD, rule(HEAD)], {}
        for name, (path, (whole, parts, unknown)) in zip(names_of(predictions), matching.items(), strict=True):
            say_counted(path, [*whole, *parts], unknown, truth, as_published)
            made[name] = {
                scope: scores(judged_items(items, by, runs, name), as_published)
                for scope, items in (("global", whole), ("local", parts))
                if items
            }
            found = {scope: result.as_dict() for scope, result in made[name].items()}
            for scope, more in besides(made, name).items():
                ends = {part: dict(zip(("more", "low", "high"), one, strict=True)) for part, one in more.items()}
                found[scope]["beside"] = {"captioner": next(iter(made)), **ends}
            unread = sum(result.n_unread for result in made[name].values()) if judge == "exact" else 0
            if unread:
                say(
                    f"{path}: {unread} captions have sentences that the exact judge cannot read, each counted as "
                    "hallucinated; of free wording --judge openai:MODEL is a fairer judge"
                )
            systems.append({"name": name, "file": path.as_posix(), **found})
            lines += [row(name, scope, result) for scope, result in made[name].items()]
        settings = {"judge": by.name, "as_published": as_published, "events": events.as_posix()}
        write_json(out / SCORES, {"version": VERSION, **settings, "systems": systems})
        unjudged = sum((result.unjudged for scopes in made.values() for result in scopes.values()), Counter[str]())
        often = unjudged.most_common(1)[0][0] if unjudged else ""
        counted = "are left out" if as_published else "count as all missed"
        lost = (
            f"{unjudged.total()} judgements failed and {counted}. Most often: {often} Where the server gave no reply, "
            "the same command asks again; replies that cannot be read are kept."
        )
        write_text(out / REPORT, page(made, by.name, events.as_posix(), as_published, lost if unjudged else ""))
    typer.echo("\n".join([*lines, *by_difference(made), *by_kind(made)]))
    say(f"captions with what is wrong in them: {out / REPORT}")
    if unjudged:
        raise KokaneeError(lost)


def say_counted(
    path: Path, items: Sequence[Item], unknown: Sequence[Prediction], truth: GroundTruth, as_published: bool
) -> None:
    """Say which captions of a file count, where not all do, and what has none."""
    from kokanee.ground_truth import place

    if unknown:
        such = place(unknown[0])
        say(f"{path}: {len(unknown)} captions of which no events are known are left out (such as of {such})")
    silent = sum(not item.prediction.text for item in items)
    if silent:
        say(f"{path}: {silent} files or intervals have no caption, and miss everything")
    counted = {item.truth.file for item in items}
    absent = [file for file in dict.fromkeys(found.file for found in truth.truths) if file not in counted]
    if absent and not as_published:
        such = f"how they were to be cut is not known (such as {absent[0]})"
        say(f"{path}: {len(absent)} files without captions of intervals are left out, as {such}")
    if as_published:
        say(f"{path}: as published, only the {len(items)} captions count that there are")


def agree(
    predictions: Annotated[Path, typer.Argument(help="Captions of clips of the world.")],
    events: Annotated[Path, typer.Option("--events", "-e", help="samples.jsonl of `kokanee world make`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for agreement.json and the model's replies.")],
    judge: Annotated[str, typer.Option("--judge", "-j", help="openai:MODEL.")],
    base_url: BaseUrl = None,
    captions: Annotated[int | None, typer.Option(min=1, help="Only the first so many captions.")] = None,
    concurrency: Concurrency = 16,
    max_tokens: MaxTokens = 4096,
    requests_per_minute: PerMinute = None,
    budget_tokens: BudgetTokens = None,
    budget_money: BudgetMoney = None,
    prices: Prices = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="Take the model's numbers, whatever its lists say.")
    ] = False,
) -> None:
    """How far a language model agrees with the exact judge, on captions of clips whose truth is known.

    Cohen's kappa of what is missed, incorrect and hallucinated, and the rank correlation of captions' total errors.
    """
    model_of(judge, "--judge", "model; give openai:MODEL")
    check_writable(out / AGREEMENT)
    from kokanee.agreement import agreement, as_table
    from kokanee.ground_truth import read_ground_truth
    from kokanee.predictions import read_predictions
    from kokanee.scoring import ExactJudge, matched

    whole, parts, _ = matched(read_predictions(predictions), read_ground_truth(events))
    items = [item for item in (*whole, *parts) if item.prediction.text][:captions]
    asking = asked_by(base_url, concurrency, max_tokens, requests_per_minute, budget_tokens, budget_money, prices)
    with alone_in(out):
        by, _ = chosen(judge, asking, out / REPLIES, as_published, 1)
        exact = judged_items(items, ExactJudge(), 1, "exact")
        other = judged_items(items, by, 1, by.name)
        found = agreement(exact, other)
        settings = {"judge": by.name, "as_published": as_published, "captions": predictions.as_posix()}
        write_json(out / AGREEMENT, {"version": VERSION, **settings, **asdict(found)})
    failures = Counter(failure for item in other for failure in item.failures if failure)
    often = f" Most often: {failures.most_common(1)[0][0]}" if failures else ""
    if not found.n_captions:
        raise KokaneeError(f"None of {len(items)} captions could be judged by {by.name}, so nothing is known.{often}")
    typer.echo(as_table(found, "exact", by.name))
    lost = len(items) - found.n_captions
    if lost:
        say(f"{lost} of {len(items)} captions could not be judged by {by.name}; they are left out.{often}")


def asked_by(
    base_url: str | None,
    concurrency: int,
    max_tokens: int,
    per_minute: float | None,
    budget_tokens: int | None,
    budget_money: float | None,
    prices: str | None,
) -> dict[str, Any]:
    """How a model is asked, as `Endpoint` wants it. Raises a usage error for prices that are none."""
    if budget_money is not None and prices is None:
        raise typer.BadParameter("needs --prices, of a million tokens in and out", param_hint="--budget-money")
    try:
        price_in, price_out = map(float, prices.split(",")) if prices is not None else (0.0, 0.0)
    except ValueError:
        raise typer.BadParameter(f"{prices!r} is not like 0.5,1.5", param_hint="--prices") from None
    return {
        "base_url": base_url,
        "concurrency": concurrency,
        "max_tokens": max_tokens,
        "per_minute": per_minute,
        "budget_tokens": budget_tokens,
        "budget_money": budget_money,
        "prices": None if prices is None else (price_in, price_out),
    }


def chosen(
    judge: str, asking: dict[str, Any], replies: Path, as_published: bool, runs: int | None
) -> tuple[Judge, int]:
    """The judge of this name, and how many runs it makes."""
    from kokanee.scoring import ExactJudge, ModelJudge

    if judge == "exact":
        given = [name for name in OF_MODELS if asking[name] is not None]
        if given:
            option = "--" + given[0].replace("per_minute", "requests_per_minute").replace("_", "-")
            raise typer.BadParameter("says nothing about the exact judge; give --judge openai:MODEL", param_hint=option)
        return ExactJudge(), runs or 1
    model = model_of(judge, "--judge", "judge; give exact or openai:MODEL")
    from kokanee.endpoint import Asker, Endpoint
    from kokanee.judges import LanguageModelJudge
    from kokanee.protocol import RUNS

    endpoint = Endpoint(model, **asking)
    return ModelJudge(LanguageModelJudge(Asker(endpoint, replies), as_published)), runs or RUNS


def model_of(name: str, option: str, wanted: str) -> str:
    """MODEL of openai:MODEL. Raises a usage error for anything else: that it is no `wanted`."""
    kind, _, model = name.partition(":")
    if kind != "openai" or not model:
        raise typer.BadParameter(f"{name!r} is no {wanted}", param_hint=option)
    return model


def judged_items(items: Sequence[Item], by: Judge, runs: int, name: str) -> list[Item]:
    """The items with their judgements, and a bar for them."""
    from kokanee.scoring import judge_all

    with bar() as progress:
        task = progress.add_task(name, total=runs * len(items))
        return judge_all(items, by, runs, on_judged=lambda done: progress.update(task, completed=done))


def names_of(paths: Sequence[Path]) -> list[str]:
    """What captioners are called: their file's name, with as many folders before it as tell them apart."""
    depth = max(len(path.parts) for path in paths)
    ways = [["/".join(path.with_suffix("").parts[-count:]) for path in paths] for count in range(1, depth + 1)]
    ways += [[path.as_posix() for path in paths]]
    return next(names for names in ways if len(set(names)) == len(names))


def row(name: str, scope: str, made: Scores) -> str:
    """One line of the table."""
    from kokanee.scoring import MEASURES

    cells = [f"{of(made.rates):.1f}" for of in MEASURES.values()]
    low, high = made.intervals["total"]
    cells[-1] += f" ({low:.1f} to {high:.1f})" if made.n_files > 1 else ""
    captions = f"{made.n_told} of {len(made.items)}" if made.n_told < len(made.items) else made.n_told
    return f"| {name} | {scope} | {captions} | {' | '.join(cells)} | {made.repetition:.1f} | {made.words:.1f} |"


def besides(made: dict[str, dict[str, Scores]], name: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By scope: how many points more a captioner's measures are than the first one's, on the same files."""
    from kokanee.scoring import beside

    first = next(iter(made))
    found = {scope: beside(own, made[first][scope]) for scope, own in made[name].items() if scope in made[first]}
    return {scope: one for scope, one in found.items() if one is not None and name != first}


def by_difference(made: dict[str, dict[str, Scores]]) -> list[str]:
    """A table of the captioners beside the first of them; nothing where none can be held against it."""
    lines = []
    for name in made:
        for scope, found in besides(made, name).items():
            cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*found[part]) for part in ("missed", "hall", "total")]
            lines.append(f"| {name} | {scope} | {' | '.join(cells)} |")
    head = f"| points more than {next(iter(made))} | | Miss | Hall | Total |"
    return ["", head, rule(head), *lines] if lines else []


def by_kind(made: dict[str, dict[str, Scores]]) -> list[str]:
    """A table of what is missed and incorrect of each kind of event; nothing where no kinds are known."""
    from kokanee.events import OTHER, rates

    kinds = sorted({kind for scopes in made.values() for result in scopes.values() for kind in result.kinds})
    if kinds in ([], [OTHER]):
        return []
    head = f"| captioner | | {' | '.join(f'{kind}: Miss, Incorrect' for kind in kinds)} |"
    lines = ["", head, rule(head)]
    for name, scopes in made.items():
        for scope, result in scopes.items():
            known = [kind in result.kinds and result.kinds[kind].n_events > 0 for kind in kinds]
            found = [rates([result.kinds[kind]]) if there else None for kind, there in zip(kinds, known, strict=True)]
            cells = ["–" if rated is None else f"{rated.missed:.1f}, {rated.incorrect:.1f}" for rated in found]
            lines.append(f"| {name} | {scope} | {' | '.join(cells)} |")
    return lines


def rule(head: str) -> str:
    """The line under a table's head."""
    return "|---" * (head.count("|") - 1) + "|"
