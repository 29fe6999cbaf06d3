"""Results of `kokanee reproduce`, one mapping a seed -> one HTML page that needs nothing else.

The page is `reproduce_report.html` beside this file with its parts filled in; it has no script. A run may be under way:
what is not there yet is named, and its numbers are left out. Numbers of the paper are marked wherever they stand.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kokanee.errors import KokaneeError
from kokanee.mrdpo_report import duration, known
from kokanee.plots import Series, plot
from kokanee.report import filled
from kokanee.reproduce_tables import (
    CONTROLS,
    PIPELINE,
    STAGES,
    Figure,
    Results,
    bars,
    change,
    changes,
    compared,
    complete,
    differences,
    figure,
    goals,
    kept,
    kinds,
    rebirth,
    stage,
    stages,
    times,
    values,
)

NOTHING = "Nothing is measured yet."
QUICK = """A quick run: every step of it is cut short. Its numbers mean nothing; all that they show is that the path
works from end to end."""
INTERVALS = "In small: the 95 % confidence interval (clips drawn again, with replacement)."
BESIDE = {
    "dpo": "one round of plain DPO",
    "gdpo": "one round of gDPO",
    "ce": "as many rounds of cross-entropy alone",
}


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page of one run, or of several with other seeds. results: what their results.json hold."""
    if not results:
        raise KokaneeError("There are no results to make a page of. Give those of one seed at least.")
    quick = any(one.get("quick") for one in results)
    told = [*([] if quick else outcome(results)), *missing(results)]
    parts = {
        "about": about(results),
        "quick": f'<p class="lost">{QUICK}</p>' if quick else "",
        "outcome": "".join(f"<p>{text}</p>" for text in told),
        "small": INTERVALS
        if len(results) == 1
        else f"Means of {len(results)} seeds; in small the lowest and the highest.",
        "bars": bars(results),
        "stages": stages(results),
        "changes": changes(results) + compared(results),
        "rounds": "".join(round_plots(results)) or '<p class="none">No round is finished yet.</p>',
        "kinds": kinds(results),
        "rebirth": rebirth(results),
        "goals": '<p class="none">A quick run reaches none.</p>' if quick else goals(results),
        "times": times(results),
    }
    return filled("reproduce_report.html", parts)


def about(results: Results) -> str:
    """What was run, on what and for how long."""

    def each(told: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(str(one) for one in told if one not in (None, "")))

    machines = [one.get("machine") or {} for one in results]
    exams = [one.get("exam") or {} for one in results]
    took = [sum(known(step.get("seconds")) or 0.0 for step in one.get("times") or ()) for one in results]
    took = [seconds for seconds in took if seconds]
    began = [f"{one['from']}, pretraining skipped" if one.get("from") else "random weights" for one in results]
    facts = {
        "Model": each([one.get("model") for one in results]),
        "Seeds" if len(results) > 1 else "Seed": each([one.get("seed") for one in results]),
        "Began with": by_seed(results, began),
        "Exam": each([f"{one['clips']} clips, the same for every seed" for one in exams if one]),
        "Machine": each([f"{one['device']}, torch {one['torch']}" for one in machines if one]),
        "Changed": each([text for one in results for text in one.get("changed") or ()]),
        "Left out": by_seed(results, [", ".join(one.get("without") or ()) for one in results]),
        "Took": duration(fmean(took)) + (" a seed" if len(results) > 1 else "") if took else "",
        "Made by": each([f"kokanee {one['kokanee']}" for one in results if one.get("kokanee")]),
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items() if value)


def by_seed(results: Results, told: Sequence[str]) -> str:
    """What is told of each seed; once, where it is the same of all, else with the seeds that it is told of."""
    if len(set(told)) == 1:
        return told[0]
    seeds: dict[str, list[str]] = defaultdict(list)
    for text, one in zip(told, results, strict=True):
        seeds[text].append(str(one.get("seed")))
    return "; ".join(f"{text} (seed {', '.join(of)})" for text, of in seeds.items() if text)


def outcome(results: Results) -> list[str]:
    """What came of it, in sentences."""
    found = [text for text in (fall(results), beside(results), reborn(results), answers(results)) if text]
    return [text.replace(" %", "\u00a0%").replace("temperature 1", "temperature\u00a01") for text in found] or [NOTHING]


def fall(results: Results) -> str:
    """What mrDPO did to the total error, of greedy captions and at temperature 1."""
    greedy, drawn = (change(results, "mrdpo", group, "total") for group in ("greedy", "sampled"))
    if not greedy:
        start = figure(results, "sft", "greedy", "total")
        return f"After SFT the total error of greedy captions is {start.value:.1f} %." if start else ""
    lowered = greedy[0].value < 0
    verb = "lowered" if lowered else "did not lower"
    text = f"mrDPO {verb} the total error of greedy captions: {went(greedy)}"
    text += chance(results, "mrdpo", "sft", "greedy")
    if drawn:
        same = (drawn[0].value < 0) == lowered
        but = "" if same else "but it lowered that " if drawn[0].value < 0 else "but it did not lower that "
        text += f"; {but}at temperature 1 {went(drawn)}"
    hall = change(results, "mrdpo", "greedy", "hall")
    if lowered and hall and hall[0].value >= 0:
        text += f". Hall, a part of it, did not fall: {went(hall)}"
    return f"{text}."


def went(found: tuple[Figure, float, float]) -> str:
    """From what to what a number went."""
    shift, before, after = found
    return f"from {before:.1f} % to {after:.1f} % ({moved(shift.value)})"


def moved(share: float) -> str:
    size = f"{abs(share):.1f}"
    return "no change" if size == "0.0" else f"{size} % {'more' if share > 0 else 'less'}"


def chance(results: Results, name: str, other: str, group: str) -> str:
    """That two stages are not told apart, with the difference that they have; "" where they are, or nobody knows."""
    found = differences(results, name, other, group)
    unsure = [(shift, low, high) for shift, low, high in found if low <= 0.0 <= high]
    if not unsure:
        return ""
    if len(found) > 1:
        return f" (which may be chance in {len(unsure)} of {len(found)} seeds)"
    ((shift, low, high),) = unsure
    return f" (which may be chance: {shift:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})"


def beside(results: Results) -> str:
    """Where one round, and training without preferences, came to; and what mrDPO did no better than."""
    mrdpo = figure(results, "mrdpo", "greedy", "total")
    found = {name: figure(results, name, "greedy", "total") for name in BESIDE}
    there = {name: one for name, one in found.items() if one}
    if not there:
        return ""
    told = [f"{BESIDE[name]} {one.value:.1f} %" for name, one in there.items()]
    text = f"{'Beside it' if mrdpo else 'So far'}: {', '.join(told)}."
    for name in there:
        pairs = complete(values(results, name, "greedy", "total"), values(results, "mrdpo", "greedy", "total"))
        if mrdpo and pairs and fmean(other for other, _ in pairs) <= fmean(ours for _, ours in pairs):
            text += f" mrDPO did not do better than {BESIDE[name]}."
    return text


def reborn(results: Results) -> str:
    """How much of mrDPO's fall rebirth kept, beside SFT continued."""
    after, share = figure(results, "rebirth", "greedy", "total"), kept(results)
    if not after:
        return ""
    error = f"the total error is {after.value:.1f} %"
    fallen = change(results, "mrdpo", "greedy", "total")
    if fallen and fallen[0].value >= 0:
        text = f"mrDPO did not lower the total error, so that rebirth had nothing to keep: {error}."
    elif share is None:
        text = f"After rebirth {error}."
    elif share.value <= 0:
        text = f"Rebirth did not keep any of mrDPO's fall: {error}."
    else:
        text = f"Rebirth kept {'only ' if share.value < 50 else ''}{share.value:.0f} % of mrDPO's fall: {error}."
    control = change(results, "continued", "greedy", "total")
    if control:
        text += f" SFT, continued for as many steps on the original captions, is at {control[2]:.1f} %"
        text += f" ({moved(control[0].value)})."
        pairs = complete(values(results, "rebirth", "greedy", "total"), values(results, "continued", "greedy", "total"))
        if pairs and fmean(ours for ours, _ in pairs) >= fmean(other for _, other in pairs):
            text += " Rebirth did not do better than that."
        elif unsure := chance(results, "rebirth", "continued", "greedy"):
            text += f" Rebirth is below that{unsure}."
    return text


def answers(results: Results) -> str:
    """What mrDPO did to answers, and whether rebirth brought them back."""
    names = [name for name in ("sft", "mrdpo", "rebirth", "continued") if figure(results, name, "qa", "right")]
    if not names:
        return ""
    lists = [values(results, name, "qa", "right") for name in names]
    means = dict(zip(names, map(fmean, zip(*rows, strict=True)), strict=True)) if (rows := complete(*lists)) else {}
    told = []
    for name in names:
        one = figure(results, name, "qa", "right")
        title = PIPELINE.get(name) or CONTROLS[name]
        told.append(f"{title} {means.get(name, one.value if one else 0.0):.1f} %")
    text = f"Questions answered rightly: {', '.join(told)}."
    if "sft" in means and "mrdpo" in means:
        text += regained(means["sft"], means["mrdpo"], means.get("rebirth"), results)
    if "rebirth" in means and means["rebirth"] < means.get("continued", 0.0):
        text += " Rebirth did not reach SFT continued."
    return text


def regained(sft: float, mrdpo: float, rebirth: float | None, results: Results) -> str:
    """What mrDPO cost and rebirth brought back, in points."""
    if mrdpo >= sft:
        lost = "" if rebirth is None or rebirth >= sft else f", but rebirth cost {sft - rebirth:.1f} points"
        return f" mrDPO cost none{lost}."
    text = f" mrDPO cost {sft - mrdpo:.1f} points{chance(results, 'mrdpo', 'sft', 'qa')}"
    if rebirth is None:
        return f"{text}."
    if rebirth <= mrdpo:
        return f"{text}, which rebirth did not bring back."
    back = "brought them back" if rebirth >= sft else f"brought back {rebirth - mrdpo:.1f} of them"
    return f"{text}, and rebirth {back}{chance(results, 'rebirth', 'mrdpo', 'qa')}."


def missing(results: Results) -> list[str]:
    """Which stages are not there yet."""
    told = []
    for name in [*PIPELINE, *CONTROLS]:
        lacking = [one for one in results if not stage(one, name) and not left_out(one, name)]
        if lacking:
            seeds = ", ".join(html.escape(str(one.get("seed"))) for one in lacking)
            told.append(STAGES[name] + ("" if len(lacking) == len(results) else f" (seed {seeds})"))
    return [f"Not there yet: {', '.join(told)}."] if told else []


def left_out(result: Mapping[str, Any], name: str) -> bool:
    """Whether a run is to have no such stage."""
    return name in (result.get("without") or ()) or (name == "base" and bool(result.get("from")))


def by_round(results: Results, rounds: str, group: str, measure: str) -> list[tuple[float, float]]:
    """(round, number) of every seed, in the order of rounds. rounds: "rounds", or "ce_rounds" of the control."""
    found = []
    for result in results:
        for one in result.get(rounds) or ():
            value = known((one.get(group) or {}).get(measure) if group else one.get(measure))
            if value is not None:
                found.append((float(one["round"]), value))
    return sorted(found)


def averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of each round."""
    found: dict[float, list[float]] = defaultdict(list)
    for x, y in points:
        found[x].append(y)
    return [(x, fmean(ys)) for x, ys in found.items()]


def round_plots(results: Results) -> list[str]:
    """What rounds of mrDPO, and of cross-entropy alone, did to validation clips."""
    numbers = [one["round"] for result in results for of in ("rounds", "ce_rounds") for one in result.get(of) or ()]
    n_rounds = max(numbers, default=0) or 1

    def drawn(title: str, unit: str, group: str, measure: str, decimals: int = 1, from_zero: bool = True) -> str:
        lines = {of: by_round(results, of, group, measure) for of in ("rounds", "ce_rounds")}
        each = sorted(lines["rounds"] + lines["ce_rounds"]) if len(results) > 1 else []
        series = [
            Series("each seed", "faint", "dots", each, quiet=True),
            Series("mrDPO", "first", "line", averaged(lines["rounds"])),
            Series("cross-entropy alone", "second", "line", averaged(lines["ce_rounds"])),
        ]
        return plot(title, unit, series, n_rounds, decimals, from_zero)

    return [
        drawn("Total error, greedy", "% of events", "greedy", "total"),
        drawn("Total error, temperature 1", "% of events", "sampled", "total"),
        drawn("Repetition", "% of words, greedy", "greedy", "repetition"),
        drawn("Questions answered rightly", "%", "", "qa", from_zero=False),
        drawn("Length", "words a caption, greedy", "greedy", "words"),
        drawn("KL to the round's reference", "nats a caption", "", "kl", 2),
    ]
