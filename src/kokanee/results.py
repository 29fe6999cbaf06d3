"""The results of a reproduction: marks of all stages, rounds, times and goals, gathered from what its steps left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kokanee
from kokanee.events import Counts, difference, right_difference
from kokanee.formats import read_json
from kokanee.steps import Step, records, seconds_of

VERSION = 1
MARKED = {"dpo": "dpo", "mrdpo": "6-mrdpo", "rebirth": "7-rebirth", "ce": "ce", "continued": "continued"}
TITLES = {
    "base": "Visual base",
    "sft": "SFT",
    "dpo": "DPO, one round",
    "gdpo": "gDPO, one round",
    "mrdpo": "mrDPO",
    "rebirth": "Rebirth",
    "ce": "Cross-entropy alone",
    "continued": "SFT continued",
}
COMPARED = (
    ("gdpo", "dpo"),
    ("mrdpo", "sft"),
    ("ce", "sft"),
    ("continued", "sft"),
    ("rebirth", "sft"),
    ("rebirth", "mrdpo"),
    ("rebirth", "continued"),
)
FALL, KEPT, POINTS = 40.0, 80.0, 1.0  # goals: mrDPO's fall, what rebirth keeps of it (per cent), and loses of QA


def results(settings: dict[str, Any], out: Path, steps: Sequence[Step]) -> dict[str, Any]:
    """All that came of a reproduction in `out`, ready for JSON; see `reproduce_report.page`."""
    found = {name: read_json(out / "marks" / f"{name}.json") for name in TITLES if there(out, name)}
    first = next(iter(found.values()))
    stages = [{"name": name, "title": TITLES[name], **stage_of(marks["marks"])} for name, marks in found.items()]
    rebirth = read_json(out / "7-rebirth" / "metrics.json")
    took = seconds_of(out)
    made = {
        "version": VERSION,
        "kokanee": kokanee.__version__,
        "model": settings["model"],
        "seed": settings["seed"],
        "quick": settings["quick"],
        "from": settings["start"],
        "machine": machine(steps, out),
        "exam": {"clips": first["settings"]["clips"], "seed": exam_seed(out)},
        "annotators": figures(first["marks"][0]),
        "stages": stages,
        "compared": [compared(found, *names) for names in COMPARED if all(known_by_clip(found, n) for n in names)],
        "rounds": rounds(out / "6-mrdpo"),
        "ce_rounds": rounds(out / "ce") if (out / "ce" / "metrics.json").is_file() else [],
        "rebirth": {**rebirth["captions"], "steps": read_json(out / "7-rebirth" / "state.json")["recipe"]["steps"]},
        "times": [{"name": s.name, "title": s.title, "seconds": took[s.name]} for s in steps if s.name in took],
    }
    reached = goals({stage["name"]: stage for stage in stages})
    if settings["quick"]:  # which shows nothing
        reached = [goal | {"reached": None} for goal in reached]
    return made | {"goals": reached}


def there(out: Path, name: str) -> bool:
    return (out / "marks" / f"{name}.json").is_file()


def exam_seed(out: Path) -> int:
    """The seed of the clips that stages are measured by."""
    return read_json(out / "exam" / "state.json")["seed"]


def machine(steps: Sequence[Step], out: Path) -> dict[str, Any]:
    """What the reproduction was computed on, in the order in which steps used it."""
    names = {step.name for step in steps}
    devices = dict.fromkeys(record["device"] for record in records(out) if record["name"] in names)
    return {"device": " and ".join(devices), "torch": version("torch")}


def stage_of(marks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A stage's marks: of the annotators, greedy, at temperature 1, of intervals."""
    _, greedy, sampled, local = marks
    low, high = greedy["answers_interval"]
    kinds = {
        kind: {"right": greedy["answers_by_kind"][kind], "questions": count}
        for kind, count in greedy["questions_by_kind"].items()
    }
    asked = sum(greedy["questions_by_kind"].values())
    answers = {"right": greedy["answers"], "low": low, "high": high, "questions": asked, "by_kind": kinds}
    return {"greedy": figures(greedy), "sampled": figures(sampled), "local": figures(local), "qa": answers}


def known_by_clip(found: dict[str, Any], name: str) -> bool:
    """Whether a stage was marked, and clip by clip, which marks of an earlier version are not."""
    return name in found and all("by_clip" in marks for marks in found[name]["marks"])


def compared(found: dict[str, Any], name: str, other: str) -> dict[str, Any]:
    """How much higher a stage's numbers are than another's, in points, with the 95 % interval of that over clips."""
    _, *ours = found[name]["marks"]
    _, *theirs = found[other]["marks"]
    pairs = dict(zip(("greedy", "sampled", "local"), zip(ours, theirs, strict=True), strict=True))
    made = {group: difference(*counted(*pair, "by_clip"), lambda rates: rates.total) for group, pair in pairs.items()}
    made["qa"] = right_difference(*counted(*pairs["greedy"], "wrong_by_clip"))
    ends = {group: dict(zip(("more", "low", "high"), one, strict=True)) for group, one in made.items()}
    return {"stage": name, "beside": other, **ends}


def counted(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> tuple[list[Counts], list[Counts]]:
    """What was counted clip by clip, in both marks."""
    first, second = ([Counts(*clip) for clip in marks[what]] for marks in (ours, theirs))
    return first, second


def figures(marks: dict[str, Any]) -> dict[str, float]:
    """Marks as one flat record."""
    low, high = marks["total_interval"]
    ends = {"hall": marks["hall"], "total": marks["total"], "total_low": low, "total_high": high}
    return {**marks["rates"], **ends, "repetition": marks["repetition"], "words": marks["words"]}


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run of mrDPO, as measured by validation clips."""
    names = ("missed", "incorrect", "hallucinated", "hall", "total", "repetition", "words")
    return [
        {
            "round": row["round"],
            **{group: {name: row[group][name] for name in names} for group in ("greedy", "sampled")},
            "qa": row["qa"],
            "kl": row.get("kl"),
        }
        for row in read_json(folder / "metrics.json")["rounds"]
    ]


def kept_share(sft: float, mrdpo: float, rebirth: float) -> float | None:
    """Per cent of the fall in total error from SFT to mrDPO that is left after rebirth; None where nothing fell."""
    return 100.0 * (sft - rebirth) / (sft - mrdpo) if sft > mrdpo else None


def goals(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was."""
    sft, mrdpo, rebirth = (stages[name] for name in ("sft", "mrdpo", "rebirth"))

    def beside(of: Callable[[dict[str, Any]], float]) -> str:
        return f"; SFT continued {of(stages['continued']):.1f} %" if "continued" in stages else ""

    found = []
    for group, name in (("greedy", "greedy"), ("sampled", "at temperature 1")):
        before, after = sft[group]["total"], mrdpo[group]["total"]
        fall = 100.0 * (before - after) / before if before else 0.0
        told = f"from {before:.1f} % to {after:.1f} %: {fall:.1f} % less"
        found.append((f"mrDPO lowers the total error by {FALL:g} % ({name})", fall >= FALL, told))
    answers = [one["qa"]["right"] for one in (sft, mrdpo, rebirth)]
    told = "{:.1f} % after SFT, {:.1f} % after mrDPO, {:.1f} % after rebirth".format(*answers)
    what = f"After rebirth, QA is within {POINTS:g} point of SFT's"
    found.append((what, answers[2] >= answers[0] - POINTS, told + beside(lambda one: one["qa"]["right"])))
    for group, name in (("greedy", "greedy"), ("sampled", "at temperature 1")):
        share = kept_share(*(one[group]["total"] for one in (sft, mrdpo, rebirth)))
        told = "mrDPO lowered no error" if share is None else f"{share:.0f} % kept"
        told += f"; total error {rebirth[group]['total']:.1f} %"
        what = f"Rebirth keeps {KEPT:g} % of mrDPO's fall in error ({name})"
        reached = share is not None and share >= KEPT
        found.append((what, reached, told + beside(lambda one, group=group: one[group]["total"])))
    return [{"what": what, "reached": bool(reached), "told": told} for what, reached, told in found]
