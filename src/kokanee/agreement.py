"""How far two judges agree on the same captions: Cohen's kappa for each kind of verdict, rank correlation of totals.

An event of the ground truth is missed or not, incorrect or not: each event is a unit. What is hallucinated has no such
list, so there the unit is the caption: does it invent anything?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kokanee.events import Verdict, plain, rates
from kokanee.judges import Judgement
from kokanee.scoring import Item


@dataclass(frozen=True)
class Kappa:
    """Two judges' yes or no on `n` units: how often each says yes and both say the same, as shares from 0 to 1.

    kappa: Cohen's, the agreement beyond that of chance: 1 is full, 0 is chance; None where both always say the same
    one thing, so that chance would agree as well.
    """

    n: int
    yes_one: float
    yes_two: float
    same: float
    kappa: float | None


@dataclass(frozen=True)
class Agreement:
    """How two judges agree. by_verdict: "missed", "incorrect", "hallucinated"; rank_correlation: Spearman's, of the
    total errors of captions, None where one judge gives all the same. n_captions: judged by both. n_lists: those of
    which both name the events. unknown: events that the second judge named and that are none of the ground truth's.
    """

    by_verdict: dict[str, Kappa]
    rank_correlation: float | None
    totals: tuple[float, float]
    n_captions: int
    n_lists: int
    unknown: int


def agreement(items: Sequence[Item], others: Sequence[Item]) -> Agreement:
    """Compares the first runs of two judges on the same items, in the same order."""
    pairs = [
        (item, item.judgements[0], other.judgements[0])
        for item, other in zip(items, others, strict=True)
        if item.judgements[0] is not None and other.judgements[0] is not None
    ]
    said: dict[str, list[tuple[bool, bool]]] = {"missed": [], "incorrect": [], "hallucinated": []}
    unknown = n_lists = 0
    for item, one, two in pairs:
        said["hallucinated"].append((one.counts.hallucinated > 0, two.counts.hallucinated > 0))
        if one.verdict is None or two.verdict is None:
            continue
        n_lists += 1
        texts = [plain(event.text) for event in item.truth.events]
        for name in ("missed", "incorrect"):
            first, second = named(one.verdict, name), named(two.verdict, name)
            said[name] += [(text in first, text in second) for text in texts]
            unknown += len(second - set(texts))
    totals = [(rates([one.counts]).total, rates([two.counts]).total) for _, one, two in pairs]
    return Agreement(
        {name: kappa(answers) for name, answers in said.items()},
        spearman([one for one, _ in totals], [two for _, two in totals]),
        (total_of([one for _, one, _ in pairs]), total_of([two for _, _, two in pairs])),
        len(pairs),
        n_lists,
        unknown,
    )


def named(verdict: Verdict, name: str) -> set[str]:
    """The events that a verdict calls missed or incorrect."""
    return {plain(text) for text in (verdict.missed if name == "missed" else [w.event for w in verdict.incorrect])}


def total_of(judgements: Sequence[Judgement]) -> float:
    return rates([judgement.counts for judgement in judgements]).total


def kappa(answers: Sequence[tuple[bool, bool]]) -> Kappa:
    """Cohen's kappa of two judges' answers to the same questions."""
    if not answers:
        return Kappa(0, 0.0, 0.0, 0.0, None)
    n = len(answers)
    one, two = sum(first for first, _ in answers) / n, sum(second for _, second in answers) / n
    same = sum(first == second for first, second in answers) / n
    chance = one * two + (1 - one) * (1 - two)
    return Kappa(n, one, two, same, None if chance == 1 else (same - chance) / (1 - chance))


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where one side has no order."""
    if len(set(one)) < 2 or len(set(two)) < 2:
        return None
    return float(np.corrcoef(ranks(one), ranks(two))[0, 1])


def ranks(values: Sequence[float]) -> np.ndarray:
    """The rank of each value, from 0; equal values have the mean of their ranks."""
    _, place, count = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    first = np.cumsum(count) - count
    return (first + (count - 1) / 2)[place]


def as_table(found: Agreement, one: str, two: str) -> str:
    """The table of an agreement, in Markdown."""
    lines = [
        f"| verdict | unit | n | {one} says yes | {two} says yes | same | kappa |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, made in found.by_verdict.items():
        shown = "–" if made.kappa is None else f"{made.kappa:.2f}"
        unit = "caption" if name == "hallucinated" else "event"
        shares = " | ".join(f"{100 * share:.1f} %" for share in (made.yes_one, made.yes_two, made.same))
        lines.append(f"| {name} | {unit} | {made.n} | {shares} | {shown} |")
    order = "–" if found.rank_correlation is None else f"{found.rank_correlation:.2f}"
    return "\n".join(
        [
            *lines,
            "",
            f"Total error: {found.totals[0]:.1f} by {one}, {found.totals[1]:.1f} by {two}; rank correlation of the "
            f"totals of {found.n_captions} captions (Spearman): {order}.",
            f"Both name the events of {found.n_lists} captions; {found.unknown} events that {two} names are not in the "
            "ground truth.",
        ]
    )
