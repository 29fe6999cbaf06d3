"""Scores of several captioners -> one HTML page that needs nothing else: numbers, bars, and every caption marked.

The page is `report.html` beside this file with its parts filled in. All that comes from files or models is escaped, and
what the page's script reads is JSON, so that a caption cannot change the page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import kokanee
from kokanee.events import OTHER, Counts, rates
from kokanee.formats import whole_text
from kokanee.ground_truth import Truth, alike
from kokanee.scoring import MEASURES, Item, Scores, beside, verdict_of
from kokanee.spans import marked

SCOPES = {"global": "Whole files", "local": "Intervals"}
NAMES = {
    "missed": "Miss",
    "incorrect": "Incorrect",
    "hallucinated": "Hallucinated",
    "hall": "Hall",
    "total": "Total",
}
BARS = ("missed", "incorrect", "hallucinated")
Systems = Mapping[str, Mapping[str, Scores]]


def page(systems: Systems, judge: str, events: str, as_published: bool = False, lost: str = "") -> str:
    """The page. systems: captioner -> "global" or "local" -> its scores. lost: what went wrong, told at the top."""
    scopes = [scope for scope in SCOPES if any(scope in made for made in systems.values())]
    parts = {
        "about": about(systems, judge, events, as_published),
        "lost": f'<p class="lost">{html.escape(lost)}</p>' if lost else "",
        "scopes": "\n".join(
            section(scope, {n: made[scope] for n, made in systems.items() if scope in made}) for scope in scopes
        ),
        "data": json_in_html({"systems": list(systems), "clips": clips(systems, scopes)}),
    }
    return filled("report.html", parts)


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A template beside this file with its parts, `<!--@name@-->`, filled in; "style" is how all pages look."""
    here = files("kokanee")
    parts = {"style": (here / "report.css").read_text(encoding="utf-8").rstrip(), **parts}
    head, *rest = (here / template).read_text(encoding="utf-8").split("<!--@")
    found = [head]
    for piece in rest:
        name, _, text = piece.partition("@-->")
        found += [parts[name], text]
    return whole_text("".join(found))


def about(systems: Systems, judge: str, events: str, as_published: bool) -> str:
    """By whom, on what and by which rules it was judged."""
    runs = max((len(made.runs) for scopes in systems.values() for made in scopes.values()), default=0)
    rules = (
        "as published: clips without a caption or a judgement are left out, numbers count whatever the lists say"
        if as_published
        else "Kokanee's: clips without a caption or a judgement miss everything, numbers must agree with their lists"
    )
    told = {
        "Judge": judge + (f", the run with the median total error of {runs}" if runs > 1 else ""),
        "Ground truth": events,
        "Rules": rules,
        "Made by": f"kokanee {kokanee.__version__}",
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in told.items())


def section(scope: str, systems: Mapping[str, Scores]) -> str:
    """The numbers of one scope: bars, a table, one of differences, and one by kind of event."""
    parts = (bars(systems), table(systems), differences(systems), kinds(systems))
    return f"<section><h2>{SCOPES[scope]}</h2>{''.join(parts)}</section>"


def bars(systems: Mapping[str, Scores]) -> str:
    """A stacked bar for each captioner, with the confidence interval of its total."""
    longest = max(100.0, *(made.intervals["total"][1] for made in systems.values()))
    rows = []
    for name, made in systems.items():
        parts = "".join(
            f'<i class="{part}" style="width:{MEASURES[part](made.rates) / longest:.4%}" '
            f'title="{NAMES[part]} {MEASURES[part](made.rates):.1f} %"></i>'
            for part in BARS
        )
        low, high = made.intervals["total"]
        whisker = f'<b style="left:{low / longest:.4%};width:{(high - low) / longest:.4%}"></b>'
        rows.append(
            f'<div class="bar"><span>{html.escape(name)}</span><div>{parts}{whisker}</div>'
            f"<span>{made.rates.total:.1f} %</span></div>"
        )
    legend = "".join(f'<span><i class="{part}"></i>{NAMES[part]}</span>' for part in BARS)
    return (
        f'<div class="bars">{"".join(rows)}</div><p class="legend">{legend}'
        "<span><b></b>95 % interval of the total</span></p>"
    )


def table(systems: Mapping[str, Scores]) -> str:
    """All numbers of each captioner; a click on a column's head sorts by it."""
    unjudged = any(made.unjudged for made in systems.values())
    heads = ["Captioner", "Captions", "Events", *NAMES.values(), "Repetition", "Words"] + ["Unjudged"] * unjudged
    rows = []
    for name, made in systems.items():
        told = str(made.n_told) if made.n_told == len(made.items) else f"{made.n_told} of {len(made.items)}"
        cells = [cell(name), number(made.n_told, told), number(sum(len(item.truth.events) for item in made.items))]
        for measure, of in MEASURES.items():
            low, high = made.intervals[measure]
            interval = f"<small>{low:.1f} – {high:.1f}</small>" if made.n_files > 1 else ""
            cells.append(number(of(made.rates), f"{of(made.rates):.1f}{interval}"))
        cells += [number(made.repetition, f"{made.repetition:.1f}"), number(made.words, f"{made.words:.1f}")]
        rows.append(cells + ([number(made.unjudged.total())] if unjudged else []))
    return grid(heads, rows)


def differences(systems: Mapping[str, Scores]) -> str:
    """How many points more each captioner has than the first, where both are of the same files."""
    first, *others = systems
    rows = []
    for name in others:
        found = beside(systems[name], systems[first])
        ends = found.values() if found else ()
        cells = [number(more, f"{more:+.1f}<small>{low:+.1f} to {high:+.1f}</small>") for more, low, high in ends]
        rows += [[cell(name), *cells]] if cells else []
    if not rows:
        return ""
    note = '<p class="note">In small the 95 % interval: where it holds 0, the difference may be chance.</p>'
    return f"<h3>Points more than {html.escape(first)}</h3>{grid(['Captioner', *NAMES.values()], rows)}{note}"


def kinds(systems: Mapping[str, Scores]) -> str:
    """Missed and incorrect events by their kind, where the ground truth says of which kind they are."""
    found = sorted({kind for made in systems.values() for kind in made.kinds})
    if found in ([], [OTHER]):
        return ""
    heads = ["Captioner", "Captions"] + [f"{kind}: {part}" for kind in found for part in ("Miss", "Incorrect")]
    rows = []
    for name, made in systems.items():
        cells = [cell(name), number(made.n_by_kind)]
        for kind in found:
            counts = made.kinds.get(kind, Counts(0, 0, 0, 0))
            rated = rates([counts])
            shown = (rated.missed, rated.incorrect) if counts.n_events else (None, None)
            of = f"<small>of {counts.n_events}</small>"
            cells += [number(value, "–" if value is None else f"{value:.1f}{of}") for value in shown]
        rows.append(cells)
    return f"<h3>By kind of event</h3>{grid(heads, rows)}"


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col"><button type="button">{html.escape(head)}</button></th>' for head in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(text: str) -> str:
    return f'<th scope="row" data-sort="{html.escape(text)}">{html.escape(text)}</th>'


def number(value: float | None, shown: str | None = None) -> str:
    return f'<td data-sort="{-1 if value is None else value:.6f}">{value if shown is None else shown}</td>'


def clips(systems: Systems, scopes: Sequence[str]) -> list[dict[str, Any]]:
    """Every file and interval with what each captioner said of it, for the page's script."""
    found: dict[tuple[str, int], list[tuple[Truth, dict[str, Any]]]] = {}
    for name, made in systems.items():
        for scope in scopes:
            for item in made[scope].items if scope in made else ():
                truth, prediction = item.truth, item.prediction
                others = found.setdefault((truth.file, prediction.sample), [])
                clip = next((clip for other, clip in others if alike(other, truth)), None)
                if clip is None:
                    clip = {
                        "file": truth.file,
                        "part": part_of(truth.start_s, truth.end_s, prediction.sample),
                        "events": [[event.text, event.kind] for event in truth.events],
                        "said": {},
                    }
                    others.append((truth, clip))
                clip["said"][name] = said_of(item, made[scope].median_run)
    return [clip for clips_of_file in found.values() for _, clip in clips_of_file]


def part_of(start_s: float | None, end_s: float | None, sample: int) -> str:
    """What is told beside a file's name: the interval, and which of several captions."""
    part = "" if start_s is None or end_s is None else f"{start_s:.1f} – {end_s:.1f} s"
    return ", ".join(filter(None, [part, f"caption {sample + 1}" if sample else ""]))


def said_of(item: Item, run: int) -> dict[str, Any]:
    """A caption in marked pieces and the verdict on it."""
    judgement, verdict = item.judgements[run], verdict_of(item, run)
    reason = item.prediction.reason or (item.failures[run] if item.failures else "")
    told: dict[str, Any] = {"reason": reason, "pieces": [[item.prediction.text, "", ""]]}
    if judgement is not None:
        counts = judgement.counts
        told["counts"] = [counts.missed, counts.incorrect, counts.hallucinated, counts.n_events]
    if verdict is not None:
        told["pieces"] = [[p.text, p.mark, p.why] for p in marked(item.prediction.text, verdict)]
        told["missed"] = list(verdict.missed)
        told["incorrect"] = [[wrong.event, wrong.said] for wrong in verdict.incorrect]
        told["hallucinated"] = list(verdict.hallucinated)
    return told


def json_in_html(value: Any) -> str:
    """JSON that can stand in a script element: no character of it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
