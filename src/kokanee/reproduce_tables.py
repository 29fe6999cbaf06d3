"""Results of `kokanee reproduce` -> the bars and tables of its page and one for a terminal, the paper's numbers beside
ours.

Results are one mapping a seed. A number is the mean of the seeds that have it; a change is that of the means of the
seeds that have both numbers. What no seed has is "–", and a stage that no seed has come to has no row.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kokanee.mrdpo_report import duration, known
from kokanee.report import BARS, NAMES
from kokanee.results import kept_share

PIPELINE = {
    "base": "Visual base",
    "sft": "SFT",
    "dpo": "DPO, one round",
    "gdpo": "gDPO, one round",
    "mrdpo": "mrDPO",
    "rebirth": "Rebirth",
}
CONTROLS = {"ce": "Cross-entropy alone", "continued": "SFT continued"}
ANNOTATORS = "annotators"
STAGES = {**PIPELINE, **CONTROLS, ANNOTATORS: "Annotators"}
PAPER = {"base": 50.7, "sft": 41.8, "dpo": 37.8, "gdpo": 39.7, "mrdpo": 22.9}
PAPER_PARTS = {"mrdpo": "Miss 10.0, Hall 12.9"}
COLUMNS = {
    **{name: ("greedy", name) for name in NAMES},
    "Total at temperature\u00a01": ("sampled", "total"),
    "Total, local": ("local", "total"),
    "Repetition": ("greedy", "repetition"),
    "Words": ("greedy", "words"),
    "Questions": ("qa", "right"),
}
INTERVALS = {"total": ("total_low", "total_high"), "right": ("low", "high")}
CHANGES = {
    "Total error": ("greedy", "total", "-40 %"),
    "Total error at temperature\u00a01": ("sampled", "total", ""),
    "Total error, local": ("local", "total", "-20 %"),
    "Hall": ("greedy", "hall", ""),
    "Hall at temperature\u00a01": ("sampled", "hall", ""),
    "Repetition": ("greedy", "repetition", "-35 %"),
    "Questions answered rightly, in points": ("qa", "right", ""),
}
CHANGED = ("mrdpo", "rebirth", *CONTROLS)
CHANGES_NOTE = """Per cent of SFT's number, of questions in points; in small from what to what or, of several seeds, the
lowest and the highest change. The columns at the right are the papers'."""
DIFFERENCES = {
    "greedy": "Total error",
    "sampled": "Total error at temperature\u00a01",
    "local": "Total error, local",
    "qa": "Questions answered rightly",
}
DIFFERENCES_NOTE = """In small: its 95 % interval, with the same clips for both stages in each draw; of several seeds,
the lowest and the highest, and in how many of them the interval holds 0 (chance?)."""
NONE = '<p class="none">Not there yet.</p>'
Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A number of all seeds. low, high: the lowest and the highest seed, or of a single one its 95 % interval. seeds:
    how many have it, where not all do."""

    value: float
    low: float | None = None
    high: float | None = None
    seeds: str = ""


def mean(found: Sequence[float | None], low: float | None = None, high: float | None = None) -> Figure | None:
    """The mean of what is known of a number for each seed. low, high: the interval of the number of a single seed."""
    there = [value for value in found if value is not None]
    if not there:
        return None
    if len(found) == 1:
        return Figure(there[0], low, high)
    seeds = "" if len(there) == len(found) else f"{len(there)} of {len(found)} seeds"
    between = (min(there), max(there)) if len(there) > 1 else (None, None)
    return Figure(fmean(there), *between, seeds)


def stage(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What is known of a stage, or of the annotators, in one seed's results; empty where that is nothing."""
    if name == ANNOTATORS:
        told = result.get(ANNOTATORS) or {}
        return {"greedy": told, **told} if told else {}
    return next((one for one in result.get("stages") or () if one["name"] == name), {})


def values(results: Results, name: str, group: str, measure: str) -> list[float | None]:
    """A number of a stage for each seed."""
    return [known((stage(result, name).get(group) or {}).get(measure)) for result in results]


def figure(results: Results, name: str, group: str, measure: str) -> Figure | None:
    """A number of a stage."""
    low, high = INTERVALS.get(measure, ("", ""))
    bounds = (values(results, name, group, bound)[0] for bound in (low, high))
    return mean(values(results, name, group, measure), *bounds)


def complete(*lists: Sequence[float | None]) -> list[tuple[float, ...]]:
    """The numbers of the seeds that have all of them."""
    return [tuple(value for value in row if value is not None) for row in zip(*lists, strict=True) if None not in row]


def kept(results: Results) -> Figure | None:
    """Per cent of mrDPO's fall in total error that rebirth kept, by the means of the seeds; None where it is not known,
    there is no fall, or it is that of a quick run."""
    if any(one.get("quick") for one in results):
        return None
    found = complete(*(values(results, name, "greedy", "total") for name in ("sft", "mrdpo", "rebirth")))
    of_all = kept_share(*map(fmean, zip(*found, strict=True))) if found else None
    if of_all is None:
        return None
    shares = [share for share in (kept_share(*row) for row in found) if share is not None]
    ranged = len(found) > 1 and len(shares) == len(found)
    return Figure(of_all, min(shares), max(shares)) if ranged else Figure(of_all)


def change(results: Results, name: str, group: str, measure: str) -> tuple[Figure, float, float] | None:
    """A stage's change since SFT, in per cent (of answers in points), and both numbers; None where one is not known."""
    found = complete(values(results, "sft", group, measure), values(results, name, group, measure))

    def moved(before: float, after: float) -> float:
        return after - before if group == "qa" else 100.0 * (after - before) / before

    if not found or (group != "qa" and any(before == 0 for before, _ in found)):
        return None
    before, after = map(fmean, zip(*found, strict=True))
    each = [moved(*pair) for pair in found] if len(results) > 1 else []
    return Figure(moved(before, after), min(each, default=None), max(each, default=None)), before, after


def differences(results: Results, name: str, other: str, group: str) -> list[tuple[float, ...]]:
    """How much higher a number is after one stage than after another, with the interval of that, for each seed that
    knows it; `group`: "qa", or that of a total error."""
    of = [one.get(group) or {} for one in pairs(results) if (one["stage"], one["beside"]) == (name, other)]
    return complete(*([known(one.get(end)) for one in of] for end in ("more", "low", "high")))


def pairs(results: Results) -> list[Mapping[str, Any]]:
    """All pairs of stages that seeds have compared."""
    return [one for result in results for one in result.get("compared") or ()]


def compared(results: Results) -> str:
    """Stages beside each other: how much higher their numbers are, clip by clip."""
    body = ""
    for name, other in dict.fromkeys((one["stage"], one["beside"]) for one in pairs(results)):
        cells = "".join(
            f"<td>{pointed(differences(results, name, other, group), len(results))}</td>" for group in DIFFERENCES
        )
        title = f"{title_of(results, name)} beside {title_of(results, other)}"
        body += f'<tr><th scope="row">{title}</th>{cells}</tr>'
    heads = ["Difference, in points", *DIFFERENCES.values()]
    return f'{grid(heads, body)}<p class="note">{DIFFERENCES_NOTE}</p>' if body else ""


def pointed(found: Sequence[tuple[float, ...]], n_seeds: int) -> str:
    """A difference in points, and in small its interval or, of several seeds, in how many it may be chance."""
    lacking = f"; {len(found)} of {n_seeds} seeds" if len(found) < n_seeds else ""
    if not found:
        return "–"
    if len(found) == 1:
        ((shift, low, high),) = found
        return f"{round(shift, 1) + 0.0:+.1f}<small>{low:+.1f} to {high:+.1f}{lacking}</small>"
    seeds, unsure = [shift for shift, _, _ in found], sum(low <= 0.0 <= high for _, low, high in found)
    small = f"{min(seeds):+.1f} to {max(seeds):+.1f}" + (f"; chance? {unsure} of {len(found)}" if unsure else "")
    return f"{round(fmean(seeds), 1) + 0.0:+.1f}<small>{small}{lacking}</small>"


def title_of(results: Results, name: str) -> str:
    """What a stage is called, as HTML."""
    titles = [stage(result, name).get("title") for result in results]
    return html.escape(str(next(filter(None, titles), STAGES[name])))


def reached(results: Results, names: Sequence[str]) -> list[str]:
    """The stages of which at least one seed has something."""
    return [name for name in names if any(stage(result, name) for result in results)]


def told(found: Figure | None, decimals: int = 1) -> str:
    """A number, and in small its interval or seeds."""
    if found is None:
        return "–"
    known_of = found.low is not None and found.high is not None
    between = f"{found.low:,.{decimals}f} – {found.high:,.{decimals}f}" if known_of else ""
    small = ", ".join(filter(None, [between, found.seeds]))
    return f"{found.value:,.{decimals}f}" + (f"<small>{small}</small>" if small else "")


def grid(heads: Sequence[str], body: str, notes: Mapping[str, str] | None = None) -> str:
    """A table. heads: HTML; notes: a head's class."""
    top = "".join(f'<th scope="col" class="{(notes or {}).get(head, "")}">{head}</th>' for head in heads)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(results: Results) -> str:
    """A stacked bar for each stage, with the interval of its total or all seeds, and below it the paper's total."""
    names = [name for name in reached(results, list(STAGES)) if figure(results, name, "greedy", "total")]
    if not names:
        return NONE
    totals = [figure(results, name, "greedy", "total") for name in names]
    longest = 1.03 * max([one.high or one.value for one in totals if one] + [PAPER.get(name, 0.0) for name in names])
    rows = "".join(bar(results, name, longest) for name in names)
    legend = "".join(f'<span><i class="{part}"></i>{NAMES[part]}</span>' for part in BARS)
    each = '<i class="seed"></i>each seed' if len(results) > 1 else "<b></b>95 % interval of the total"
    paper = '<span><i class="paper"></i>the paper\'s total (7B, other clips: not comparable in level)</span>'
    return f'<div class="bars">{rows}</div><p class="legend">{legend}<span>{each}</span>{paper}</p>'


def bar(results: Results, name: str, longest: float) -> str:
    """The bar of a stage."""
    parts = ""
    for part in BARS:
        found = figure(results, name, "greedy", part)
        if found:
            share = f"width:{found.value / longest:.4%}"
            parts += f'<i class="{part}" style="{share}" title="{NAMES[part]} {found.value:.1f} %"></i>'
    total = figure(results, name, "greedy", "total")
    if len(results) > 1:
        seeds = [value for value in values(results, name, "greedy", "total") if value is not None]
        parts += "".join(f'<i class="seed" style="left:{value / longest:.4%}"></i>' for value in seeds)
    elif total and total.low is not None and total.high is not None:
        parts += f'<b style="left:{total.low / longest:.4%};width:{(total.high - total.low) / longest:.4%}"></b>'
    theirs = PAPER.get(name)
    paper = f'<div class="theirs" style="width:{theirs / longest:.4%}"></div>' if theirs else ""
    said = f'<small class="paper">paper {theirs:.1f} %</small>' if theirs else ""
    shown = f"{total.value:.1f} %" if total else "–"
    return (
        f'<div class="bar{" apart" if name in ("ce", ANNOTATORS) else ""}"><span>{title_of(results, name)}</span>'
        f'<div><div class="ours">{parts}</div>{paper}</div><span>{shown}{said}</span></div>'
    )


def stages(results: Results) -> str:
    """All numbers of each stage, and the paper's total."""
    groups = {"": list(PIPELINE), "Controls": list(CONTROLS), "Those who wrote the captions": [ANNOTATORS]}
    heads = ["Stage", *(NAMES.get(name, name) for name in COLUMNS), "The paper's total"]
    body = ""
    for group, names in groups.items():
        there = reached(results, names)
        if group and there:
            body += f'<tr class="group"><th colspan="{len(heads)}" scope="rowgroup">{group}</th></tr>'
        for name in there:
            cells = "".join(
                f'<td class="{"total" if column == "total" else ""}">{told(figure(results, name, *of))}</td>'
                for column, of in COLUMNS.items()
            )
            small = f"<small>{PAPER_PARTS[name]}</small>" if name in PAPER_PARTS else ""
            paper = f"{PAPER[name]:.1f}{small}" if name in PAPER else "–"
            body += f'<tr><th scope="row">{title_of(results, name)}</th>{cells}<td class="paper">{paper}</td></tr>'
    return grid(heads, body, {"The paper's total": "paper"}) if body else NONE


def lines(results: Results) -> list[str]:
    """The stages as lines of a Markdown table: means, and the 95 % interval of one seed or the range of several."""
    heads = ["Miss", "Hall", "Total", "Total, temperature 1", "Total, local", "repetition", "questions"]
    columns = [COLUMNS["missed"], COLUMNS["hall"], COLUMNS["total"], ("sampled", "total"), ("local", "total")]
    columns += [COLUMNS["Repetition"], COLUMNS["Questions"]]
    made = [f"| {' | '.join(['stage', *heads])} | the paper's total |", "|---" * (len(heads) + 2) + "|"]
    for name in reached(results, list(STAGES)):
        cells = [plainly(figure(results, name, *of)) for of in columns]
        paper = f"{PAPER[name]:.1f}" if name in PAPER else ""
        total = figure(results, name, "greedy", "total")
        seeds = f" ({total.seeds})" if total and total.seeds else ""
        made.append(f"| {' | '.join([STAGES[name] + seeds, *cells])} | {paper} |")
    return made


def plainly(found: Figure | None) -> str:
    """A number, and in brackets what it lies between, where that is known and not one number."""
    if found is None:
        return ""
    ends = [f"{end:.1f}" for end in (found.low, found.high) if end is not None]
    between = f" ({' to '.join(ends)})" if len(set(ends)) == 2 else ""
    return f"{found.value:.1f}{between}"


def changes(results: Results) -> str:
    """What each stage changes since SFT, and what mrDPO does in the papers."""
    names = reached(results, CHANGED)
    if not names or not reached(results, ["sft"]):
        return NONE
    papers = {"The first paper's mrDPO": "paper", "The second paper's mrDPO": "paper"}
    second = {"Total error": f"{100 * (PAPER['mrdpo'] - PAPER['sft']) / PAPER['sft']:+.0f} %"}
    body = ""
    for row, (group, measure, first) in CHANGES.items():
        cells = "".join(f"<td>{moved(change(results, name, group, measure), group == 'qa')}</td>" for name in names)
        paper = "".join(f'<td class="paper">{text or "–"}</td>' for text in (first, second.get(row)))
        body += f'<tr><th scope="row">{row}</th>{cells}{paper}</tr>'
    heads = ["Change", *(title_of(results, name) for name in names), *papers]
    return f'{grid(heads, body, papers)}<p class="note">{CHANGES_NOTE}</p>'


def moved(found: tuple[Figure, float, float] | None, points: bool) -> str:
    """A change, and in small from what to what, or the lowest and highest of several seeds."""
    if found is None:
        return "–"
    shift, before, after = found
    signed = f"{round(shift.value, 1) + 0.0:+.1f}{'' if points else ' %'}"
    if shift.low is not None and shift.high is not None:
        return f"{signed}<small>{shift.low:+.1f} to {shift.high:+.1f}</small>"
    return f"{signed}<small>{before:.1f} to {after:.1f}</small>"


def kinds(results: Results) -> str:
    """Answers by kind of question, with bars."""
    names = [name for name in ("sft", "mrdpo", "rebirth", "continued") if figure(results, name, "qa", "right")]
    of = {name: [((stage(one, name).get("qa") or {}).get("by_kind") or {}) for one in results] for name in names}
    found = dict.fromkeys(kind for name in names for one in of[name] for kind in one)
    body = row_of_kind("All", [figure(results, name, "qa", "right") for name in names], asked(results, names))
    for kind in found:
        rights = [mean([known((one.get(kind) or {}).get("right")) for one in of[name]]) for name in names]
        counts = [(one.get(kind) or {}).get("questions") for name in names for one in of[name]]
        body += row_of_kind(html.escape(kind), rights, next(filter(None, counts), None))
    return grid(["Kind", "Questions", *(title_of(results, name) for name in names)], body) if names else NONE


def row_of_kind(kind: str, rights: Sequence[Figure | None], n_questions: Any) -> str:
    cells = "".join(
        f'<td>{told(one)}<i class="share" style="--share:{one.value if one else 0:.1f}%"></i></td>' for one in rights
    )
    return f'<tr><th scope="row">{kind}</th><td>{count(n_questions)}</td>{cells}</tr>'


def asked(results: Results, names: Sequence[str]) -> float | None:
    """How many questions the first seed that has any asks."""
    found = [value for name in names for value in values(results, name, "qa", "questions")]
    return next(filter(None, found), None)


def count(value: Any) -> str:
    number = known(value)
    return "–" if number is None else f"{number:,.0f}"


def rebirth(results: Results) -> str:
    """What rebirth was trained on, and how much of mrDPO's fall it kept."""
    told_of = [one.get("rebirth") or {} for one in results]
    rows = {
        "Captions of the mrDPO model": [one.get("captions") for one in told_of],
        "Kept": [one.get("kept") for one in told_of],
        **{
            f"Dropped: {reason}": [(one.get("dropped") or {}).get(reason, 0) if one else None for one in told_of]
            for reason in dict.fromkeys(reason for one in told_of for reason in one.get("dropped") or ())
        },
        "Steps of training": [one.get("steps") for one in told_of],
    }
    figures = {name: mean([known(value) for value in found]) for name, found in rows.items()}
    share, captions = kept(results), figures["Captions of the mrDPO model"]
    if not share and not any(figures.values()):
        return NONE
    body = ""
    for name, one in figures.items():
        part = ""
        if one and captions and captions.value and name != "Steps of training" and one is not captions:
            part = f"{100 * one.value / captions.value:.1f} %"
        cells = f"<td>{told(one, 0)}</td><td>{part}</td>"
        body += f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'
    if not share:
        return grid(["", "", "of all captions"], body)
    seeds = "" if share.low is None else f" ({share.low:.1f} – {share.high:.1f} %)"
    fallen = f"Of mrDPO's fall in total error rebirth kept <strong>{share.value:.1f} %</strong>{seeds}."
    return f"{grid(['', '', 'of all captions'], body)}<p>{fallen}</p>"


def goals(results: Results) -> str:
    """What was to be reached, whether it was, and by which numbers."""
    found = dict.fromkeys(goal["what"] for one in results for goal in one.get("goals") or ())
    items = ""
    for what in found:
        of = [goal for one in results for goal in one.get("goals") or () if goal["what"] == what]
        known_of = [bool(goal["reached"]) for goal in of if goal.get("reached") is not None]
        good = sum(known_of)
        word = "Not known" if not known_of else "Reached" if good == len(known_of) else "Not reached"
        if 0 < good < len(known_of):
            word += f" by {len(known_of) - good} of {len(known_of)} seeds"
        why = "; ".join(dict.fromkeys(str(goal["told"]) for goal in of if goal.get("told")))
        kind = {"Reached": "reached", "Not known": "none"}.get(word, "unreached")
        small = f"<small>{html.escape(why)}</small>" if why else ""
        items += f'<li class="{kind}"><strong>{word}</strong> <span>{html.escape(str(what))}{small}</span></li>'
    return f'<ul class="goals">{items}</ul>' if items else NONE


def times(results: Results) -> str:
    """How long each step took, and all of them."""
    lists = [one.get("times") or () for one in results]
    titles = {step["name"]: step.get("title") or step["name"] for found in lists for step in found}
    if not titles:
        return NONE
    took = [{step["name"]: known(step.get("seconds")) for step in found} for found in lists]
    means = {name: mean([one.get(name) for one in took]) for name in titles}
    whole = sum(one.value for one in means.values() if one)
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(titles[name]))}</th><td>{html.escape(name)}</td>'
        f"<td>{lasted(one)}</td><td>{f'{100 * one.value / whole:.0f} %' if one and whole else '–'}</td></tr>"
        for name, one in means.items()
    )
    body += f'<tr class="all"><th scope="row">All</th><td></td><td>{duration(whole)}</td><td></td></tr>'
    return grid(["Step", "Name", "Took", "of all"], body)


def lasted(found: Figure | None) -> str:
    if found is None:
        return "–"
    spread = found.low is not None and found.high is not None and found.low != found.high
    small = f"<small>{duration(found.low or 0.0)} – {duration(found.high or 0.0)}</small>" if spread else ""
    return duration(found.value) + small
