"""A run of mrDPO -> one HTML page that needs nothing else: the outcome, all figures, captions before and after.

The page is `mrdpo_report.html` beside this file with its parts filled in; it has no script. A run may be under way:
a round counts from when its metrics.json is there. What no file holds is not known, and left out.
"""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import kokanee
from kokanee.errors import KokaneeError
from kokanee.events import Counts, Incorrect, Verdict, interval, rates
from kokanee.formats import read_json, read_jsonl
from kokanee.plots import Series, plot
from kokanee.report import NAMES, filled
from kokanee.spans import marked

STATE, METRICS, STEPS = "state.json", "metrics.json", "train/metrics.jsonl"
CAPTIONS, VERDICTS = "validation.jsonl", "validation-verdicts.jsonl"
DROPPED, HELD_OUT = "dropped: ", "validation/"
SHOWN, BINS = 12, 20
COUNTED = ("missed", "incorrect", "hallucinated")
REWARDS = """In DPO a reward is beta times the log-probability of a caption less its log-probability under the round's
reference; the margin is that of the chosen less that of the rejected. Held-out pairs are of the round, and were not
trained on."""
LOSSES = {
    "gdpo": "gDPO, beta {beta}, weight of the ground truth {gt_weight}",
    "dpo": "DPO, beta {beta}",
    "ce": "cross-entropy of ground-truth captions, weight {gt_weight}",
}
GROUPS = {
    "greedy": "Greedy captions",
    "sampled": "Captions at temperature 1",
    "model": "The model",
    "pairs": "Preference pairs",
    "training": "The last step of training",
    "seconds": "Time",
}
OF_MODEL = {"qa": "answers", "kl": "kl", "clips": "clips"}
LABELS = {
    **NAMES,
    "answers": "Questions answered rightly",
    "clips": "Validation clips",
    "qa": "Cross-entropy of the answers",
    "kl": "KL to the round's reference",
    "dpo": "DPO loss",
    "margin": "Reward margin",
    "chosen": "Reward of the chosen",
    "rejected": "Reward of the rejected",
    "ground_truth": "Ground truth's cross-entropy",
}


@dataclass(frozen=True)
class Round:
    """A round's folder. figures: by group of the table and name, empty while it is under way; steps: as logged."""

    number: int
    folder: Path
    figures: Mapping[str, Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]

    def figure(self, group: str, name: str) -> float | None:
        """A number, or None where it is not known."""
        return known(self.figures.get(group, {}).get(name))


@dataclass(frozen=True)
class Told:
    """A greedy caption of a validation clip, and what is known of it."""

    prompt: str
    caption: str
    truth: str = ""
    counts: Counts | None = None
    missed: Sequence[str] = ()
    incorrect: Sequence[Incorrect] = ()
    hallucinated: Sequence[str] = ()

    @property
    def error(self) -> float:
        """The total error, per cent of events; not a number where it is not known."""
        return rates([self.counts]).total if self.counts else math.nan

    @property
    def lists(self) -> dict[str, list[str]]:
        """What is wrong with it, by the name of the mistake."""
        wrong = [item.event + (f" Said: {item.said}" if item.said else "") for item in self.incorrect]
        return {"Missed": list(self.missed), "Incorrect": wrong, "Hallucinated": list(self.hallucinated)}


def run_page(folder: Path) -> str:
    """The page of the run in a folder. Raises `KokaneeError` where there is none, or one of another stage."""
    recipe = recipe_of(folder)
    rounds = within(rounds_of(folder), recipe)
    finished = [one for one in rounds if one.figures]
    parts = {
        "about": about(recipe, finished),
        "outcome": "".join(f"<p>{html.escape(text)}</p>" for text in [*outcome(recipe, rounds), *left(folder)]),
        "captions": "".join(caption_plots(recipe["rounds"], finished)),
        "training": "".join(training_plots(recipe, rounds)),
        "rewards": "" if recipe.get("loss") == "ce" else REWARDS,
        "table": table(finished),
        "changes": changes(finished),
    }
    return filled("mrdpo_report.html", parts)


def recipe_of(folder: Path) -> dict[str, Any]:
    """The settings of a run of mrDPO."""
    if not (folder / STATE).is_file():
        raise KokaneeError(f"{folder} holds no run: it has no {STATE}. Give the folder of a run of mrDPO.")
    found = read_json(folder / STATE).get("recipe")
    recipe: dict[str, Any] = found if isinstance(found, dict) else {}
    if recipe.get("stage") != "mrdpo":
        stage = f"a run of the stage {recipe.get('stage')!r}, which has no rounds"
        raise KokaneeError(f"{folder} holds {stage}. Give the folder of a run of mrDPO.")
    return recipe


def within(rounds: Sequence[Round], recipe: Mapping[str, Any]) -> list[Round]:
    """The rounds that count: the recipe may have been given fewer, or less patience, since there were more."""
    rounds, done = [one for one in rounds if one.number <= recipe["rounds"]], []
    for count, one in enumerate(rounds, 1):
        if "total" in one.figures.get("greedy", ()):
            done.append(one.figures)
            if is_over(done, recipe.get("patience")):
                return rounds[:count]
    return rounds


def total_of(found: Mapping[str, Any]) -> float:
    """The error by which rounds are compared: of greedy captions of the validation clips."""
    return found["greedy"]["total"]


def best(found: Sequence[Mapping[str, Any]]) -> int:
    """The round with the lowest validation error, the first of equals."""
    return min(range(len(found)), key=lambda number: (total_of(found[number]), number))


def is_over(found: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` rounds brought no lower error."""
    return patience is not None and len(found) - 1 - best(found) >= patience


def rounds_of(folder: Path) -> list[Round]:
    """All rounds that have begun, in order."""
    found = []
    for place in folder.iterdir():
        match = re.fullmatch(r"round-(\d+)", place.name)
        if match:
            figures = grouped(read_json(place / METRICS)) if (place / METRICS).is_file() else {}
            records = read_jsonl(place / STEPS) if (place / STEPS).is_file() else []
            steps = {record["step"]: record for record in records}  # those done again after a kill count
            found.append(Round(int(match[1]), place, figures, [steps[step] for step in sorted(steps)]))
    return sorted(found, key=lambda one: one.number)


def grouped(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A round's metrics by group of the table."""
    pairs = dict(metrics.get("pairs") or {})
    made = {"pairs": pairs.pop("pairs")} if "pairs" in pairs else {}
    lost = {f"{DROPPED}{reason}": count for reason, count in pairs.pop("dropped", {}).items()}
    return {
        **{group: metrics.get(group) or {} for group in GROUPS},
        "model": {label: metrics[name] for name, label in OF_MODEL.items() if name in metrics},
        "pairs": {**made, **lost, **pairs},
    }


def known(value: Any) -> float | None:
    """A finite number, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def about(recipe: Mapping[str, Any], finished: Sequence[Round]) -> str:
    """What the run was."""
    recipe = defaultdict(lambda: "not known", recipe)
    warm = " and ".join(f"{value:g}" for value in recipe.get("temperatures") or ()) or "not known"
    sampled = f"{{samples}} of each of {{clips}} clips a round at temperature {warm}, top-p {{top_p}}"
    captions = "{clips} a round, from the ground truth" if recipe["loss"] == "ce" else sampled
    loss = LOSSES.get(recipe["loss"], recipe["loss"])
    lora = "LoRA of rank {r}, alpha {alpha}, ".format_map(defaultdict(lambda: "not known", recipe.get("lora", {})))
    took = sum(known(value) or 0.0 for one in finished for value in one.figures["seconds"].values())
    rates = (recipe.get("rates") or [1.0])[: recipe["rounds"]]
    slower = f" x {', '.join(f'{rate:g}' for rate in rates)}" if set(rates) != {1.0} else ""
    told = {
        "Model": recipe["model"],
        "Loss": str(loss).format_map(recipe),
        "Rounds": "{rounds} of {steps} steps, learning rate {learning_rate}".format_map(recipe) + slower,
        "Captions": captions.format_map(recipe),
        "Adapter": lora + ("new and merged every round" if recipe.get("proxy") else "the same in all rounds"),
        "Took": f"{duration(took)}, each part since it was last begun or continued" if took else "",
        "Made by": f"kokanee {kokanee.__version__}",
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in told.items() if value)


def outcome(recipe: Mapping[str, Any], rounds: Sequence[Round]) -> list[str]:
    """What came of it, in sentences."""
    finished = [one for one in rounds if one.figures]
    greedy = dict(by_round(finished, "greedy", "total"))
    if not finished or finished[0].number not in greedy:
        return ["Nothing is measured yet."]
    first, last = finished[0], finished[-1]
    best = next(one for one in finished if greedy.get(one.number) == min(greedy.values()))
    sentences = []
    if last is first:
        sentences.append(f"Before the first round the total error of greedy captions is {went(first, first)}.")
    else:
        many = "one round" if last.number == 1 else f"{last.number} rounds"
        sentences.append(f"In {many} the total error of greedy captions went {went(first, last)}.")
        if best is first:
            sentences.append("No round's greedy captions are better than those of the start.")
        elif best is not last:
            sentences.append(f"It was lowest after round {best.number}, on these same clips: {went(first, best)}.")
    patience = recipe.get("patience")
    if patience and last.number - best.number >= patience and last.number < recipe["rounds"]:
        sentences.append(f"Stopped early: {patience} rounds brought no lower error.")
    elif last.number < recipe["rounds"]:
        reached = [
            f"; round {one.number} has reached step {one.steps[-1]['step']} of {recipe['steps']}"
            for one in rounds
            if one.number > last.number and one.steps
        ]
        sentences.append(f"Not finished: {last.number} of {recipe['rounds']} rounds are done{''.join(reached)}.")
    return sentences


def left(folder: Path) -> list[str]:
    """Which round the model is of, where that is not the last."""
    found = read_json(folder / METRICS) if (folder / METRICS).is_file() else {"kept": 0, "rounds": [{}]}
    last = len(found["rounds"]) - 1
    return [f"The model is that of round {found['kept']}, the best."] if found["kept"] < last else []


def went(first: Round, last: Round) -> str:
    """The total error of a round and of a later one, of greedy captions and at temperature 1."""
    phrases = []
    for group in ("greedy", "sampled"):
        before, after = first.figure(group, "total"), last.figure(group, "total")
        if before is not None and after is not None:
            share = 100.0 * (after - before) / before if before else 0.0
            size = f"{abs(share):.1f}"
            moved = "no change" if size == "0.0" else f"{size} % {'more' if share > 0 else 'less'}"
            change = f"from {before:.1f} % to {after:.1f} % ({moved})"
            phrases.append(f"{after:.1f} %" if first is last else change)
    return ", at temperature 1 ".join(phrases).replace(" %", "\u00a0%")


def by_round(finished: Sequence[Round], group: str, name: str) -> list[tuple[float, float]]:
    """The points of a figure, where it is known."""
    return [(one.number, value) for one in finished if (value := one.figure(group, name)) is not None]


def caption_plots(n_rounds: int, finished: Sequence[Round]) -> list[str]:
    """What the captions and answers of validation clips are like."""

    def lines(name: str, groups: Sequence[str] = ("greedy", "sampled")) -> list[Series]:
        told = {"greedy": ("greedy", "first"), "sampled": ("temperature 1", "second")}
        return [Series(*told[group], "line", by_round(finished, group, name)) for group in groups]

    def bars(names: Sequence[str]) -> list[Series]:
        return [Series(NAMES[name], name, "bars", by_round(finished, "greedy", name)) for name in names]

    answers = Series("greedy answers", "first", "line", by_round(finished, "model", "answers"))
    return [
        plot("Total error", "% of events", [*bars(COUNTED), *lines("total", ["sampled"])], n_rounds),
        plot("Miss", "% of events", lines("missed"), n_rounds),
        plot("Hall", "% of events", [*bars(COUNTED[1:]), *lines("hall", ["sampled"])], n_rounds),
        plot("Repetition", "% of words", lines("repetition"), n_rounds),
        plot("Length", "words a caption", lines("words"), n_rounds),
        plot("Questions answered rightly", "%", [answers], n_rounds),
    ]


def training_plots(recipe: Mapping[str, Any], rounds: Sequence[Round]) -> list[str]:
    """What was learnt from, and how far it was learnt."""
    n_rounds = recipe["rounds"]
    finished = [one for one in rounds if one.figures]

    def learnt(name: str) -> list[Series]:
        return [
            Series("all steps", "faint", "curve", curve(rounds, name, recipe["steps"])),
            Series("last step", "first", "dots", by_round(finished, "training", name)),
            Series("held out", "second", "dots", by_round(finished, "training", HELD_OUT + name)),
        ]

    lost = [
        (one.number, sum(one.figure("pairs", name) or 0 for name in one.figures["pairs"] if DROPPED in name))
        for one in finished
        if one.figures["pairs"]
    ]
    pairs = [
        Series("pairs", "right", "bars", by_round(finished, "pairs", "pairs")),
        Series("dropped", "missed", "bars", lost),
    ]
    scores = [
        Series("rejected", "hallucinated", "line", by_round(finished, "pairs", "rejected_score")),
        Series("chosen", "right", "line", by_round(finished, "pairs", "chosen_score")),
    ]
    moved = [Series("the new model", "first", "line", by_round(finished, "model", "kl"))]
    first_only = "" if recipe.get("proxy", True) else "; measured in round 1 only, as the adapter goes on"
    return [
        plot("Pairs", "a round", pairs, n_rounds, 0),
        plot("Error of the pairs' captions", "of events and words, weighed as for pairs", scores, n_rounds, 2),
        plot("KL to the round's reference", f"nats a caption, estimated{first_only}", moved, n_rounds, 2),
        plot("Reward margin", "", learnt("margin"), n_rounds, 2),
        plot("Accuracy", "share of pairs with chosen above rejected", learnt("accuracy"), n_rounds, 2),
        plot("Loss", "", learnt("loss"), n_rounds, 3),
    ]


def curve(rounds: Sequence[Round], name: str, n_steps: int) -> list[tuple[float, float]]:
    """A figure of training over all rounds: the means over each twentieth of a round."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for one in rounds:
        for record in one.steps:
            value = known(record.get(name))
            if value is not None:
                x = one.number - 1 + record["step"] / n_steps
                bins.setdefault(math.ceil(BINS * x - 1e-9), []).append((x, value))
    return [(fmean([x for x, _ in found]), fmean([y for _, y in found])) for found in bins.values()]


def table(finished: Sequence[Round]) -> str:
    """All figures, a column a round."""
    head = "".join(f'<th scope="col">{one.number or "start"}</th>' for one in finished)
    body = []
    for group, title in GROUPS.items():
        names = dict.fromkeys(name for one in finished for name in one.figures[group])
        if names:
            body.append(f'<tr class="group"><th colspan="{len(finished) + 1}" scope="rowgroup">{title}</th></tr>')
        for name in names:
            cells = "".join(f"<td>{cell(one, group, name)}</td>" for one in finished)
            body.append(f'<tr><th scope="row">{html.escape(label(name))}</th>{cells}</tr>')
    return f'<table><thead><tr><th scope="col">Round</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def label(name: str) -> str:
    """What a figure is called."""
    if name.startswith(HELD_OUT):
        return f"Held out: {label(name.removeprefix(HELD_OUT))}"
    return LABELS.get(name, name[:1].upper() + name[1:].replace("_", " "))


def cell(one: Round, group: str, name: str) -> str:
    """A figure as it is shown; the total error of greedy captions with its interval, where verdicts are known."""
    value = one.figure(group, name)
    if value is None:
        return "–"
    if group == "seconds":
        return duration(value)
    if isinstance(value, int):
        return str(value)
    if group == "training" or name == "kl" or name.endswith("score"):
        return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
    told = told_in(one.folder).values() if (group, name) == ("greedy", "total") else ()
    counts = [item.counts for item in told if item.counts]
    low, high = interval(counts, lambda found: found.total)
    return f"{value:.1f}" + (f"<small>{low:.1f} – {high:.1f}</small>" if counts else "")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def told_in(place: Path) -> dict[str, Told]:
    """The greedy captions in a round's folder, by clip."""
    records = read_jsonl(place / CAPTIONS) if (place / CAPTIONS).is_file() else []
    verdicts = read_jsonl(place / VERDICTS) if (place / VERDICTS).is_file() else []
    judged = {verdict["clip"]: verdict for verdict in verdicts}
    found = {}
    for record in records:
        verdict = judged.get(record["clip"], {})
        counts = (verdict.get("counts") or [None])[0]
        wrong = (verdict.get("verdicts") or [None])[0] or {}
        found[record["clip"]] = Told(
            record["prompt"],
            record["captions"][0],
            verdict.get("ground_truth") or "",
            Counts(**counts) if counts else None,
            wrong.get("missed") or (),
            [Incorrect(item["event"], item.get("said") or "") for item in wrong.get("incorrect") or ()],
            wrong.get("hallucinated") or (),
        )
    return found


def changes(finished: Sequence[Round]) -> str:
    """The clips whose greedy captions gained and lost most from the first to the last finished round."""
    if len(finished) < 2:
        return '<p class="none">No round is finished yet.</p>'
    before, after = told_in(finished[0].folder), told_in(finished[-1].folder)
    both = [clip for clip in before if clip in after]
    gains = {clip: before[clip].error - after[clip].error for clip in both}
    order = sorted((clip for clip in both if not math.isnan(gains[clip])), key=lambda clip: (-gains[clip], clip))
    if order:
        lost = [clip for clip in reversed(order) if gains[clip] < 0]
        lists = {"Gained most": [clip for clip in order if gains[clip] > 0], "Lost most": lost}
        better, worse = map(len, lists.values())
        note = f"Of {len(order)} captions {better} have a lower total error than before, {worse} a higher one."
    else:
        lists = {"Changed": [clip for clip in both if before[clip].caption != after[clip].caption]}
        note = f"Of {len(both)} captions {len(lists['Changed'])} have changed; for better or worse is not known."
    last = finished[-1].number
    shown = [
        f"<h3>{title}</h3>{''.join(article(clip, before[clip], after[clip], last) for clip in clips[:SHOWN])}"
        for title, clips in lists.items()
        if clips
    ]
    return f'<p class="note">{note}</p>{"".join(shown)}'


def article(clip: str, before: Told, after: Told, last: int) -> str:
    """A clip: what is true, what was said before, and what is said now."""
    truth = before.truth or after.truth
    told = f'<div class="system"><h4>Somebody who saw it</h4><p>{html.escape(truth)}</p></div>' if truth else ""
    said = box("Before", before, after) + box(f"After round {last}", after, before)
    head = f"<h3>{html.escape(clip)} <small>{html.escape(after.prompt)}</small></h3>"
    return f'<article>{head}<div class="systems">{told}{said}</div></article>'


def box(title: str, told: Told, other: Told) -> str:
    """A caption, marked, and what is wrong with it; paler what is wrong with the other too."""
    counts = told.counts
    error = f" <small>total error {told.error:.0f} % of {counts.n_events} events</small>" if counts else ""
    verdict = Verdict((), tuple(told.incorrect), tuple(told.hallucinated), len(told.incorrect))
    text = "".join(
        f'<mark class="{piece.mark}" title="{html.escape(piece.why)}">{html.escape(piece.text)}</mark>'
        if piece.mark
        else html.escape(piece.text)
        for piece in marked(told.caption, verdict)
    )
    said = f"<p>{text}</p>" if told.caption else '<p class="none">No caption.</p>'
    for name, items in told.lists.items():
        bullets = "".join(
            f"<li{' class=both' if item in other.lists[name] else ''}>{html.escape(item)}</li>" for item in items
        )
        said += f"<h5>{name}</h5><ul>{bullets}</ul>" if items else ""
    return f'<div class="system"><h4>{title}{error}</h4>{said}</div>'
