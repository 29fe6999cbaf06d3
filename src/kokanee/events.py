"""Atomic events and verdicts -> rates of missed, incorrect and hallucinated events, as the paper measures captions.

An *atomic event* is a short statement that a good caption would tell. A verdict says of one caption which events it
misses, which it tells wrongly, and what it tells that is not there. Rates divide by the number of ground-truth events,
summed over captions (micro-average; arXiv 2506.15220, section on evaluation): a caption of a clip with many events
counts for more.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

RESAMPLES = 2000
DRAWN_TOGETHER = 2**20  # videos of draws, to bound memory
OTHER = "other"
UNSPACED = "\u3040-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Japanese and Chinese characters, in a regular expression; after them what stands between sentences of these."""
BETWEEN = "\u3000-\u3004\u3008-\u303f\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"


@dataclass(frozen=True)
class AtomicEvent:
    """One statement of the ground truth. kind: "seen", "heard", "spoken", "written" or a finer one, "" if not known."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Incorrect:
    """A ground-truth event that a caption tells wrongly, and how it tells it ("" where the judge does not say)."""

    event: str
    said: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a caption got wrong, of `n_events` ground-truth events."""

    missed: tuple[str, ...]
    incorrect: tuple[Incorrect, ...]
    hallucinated: tuple[str, ...]
    n_events: int

    def __post_init__(self) -> None:
        assert len(self.missed) + len(self.incorrect) <= self.n_events, "more events missed or incorrect than there are"

    @property
    def counts(self) -> Counts:
        return Counts(len(self.missed), len(self.incorrect), len(self.hallucinated), self.n_events)


@dataclass(frozen=True)
class Counts:
    """How many events, of one caption or of many."""

    missed: int
    incorrect: int
    hallucinated: int
    n_events: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.missed + other.missed,
            self.incorrect + other.incorrect,
            self.hallucinated + other.hallucinated,
            self.n_events + other.n_events,
        )


@dataclass(frozen=True)
class Rates:
    """Per cent of the ground-truth events. Hallucinated may be above 100: there is no end to what can be invented."""

    missed: float
    incorrect: float
    hallucinated: float

    @property
    def hall(self) -> float:
        """Incorrect and hallucinated together: the paper's Hall%."""
        return self.incorrect + self.hallucinated

    @property
    def total(self) -> float:
        """The paper's Total%."""
        return self.missed + self.hall


def rates(counts: Iterable[Counts]) -> Rates:
    """Micro-averaged rates; where there are no events, what is invented counts as beside one."""
    total = sum(counts, Counts(0, 0, 0, 0))
    found = (total.missed, total.incorrect, total.hallucinated)
    return Rates(*(100.0 * count / max(1, total.n_events) for count in found))


def by_kind(judged: Iterable[tuple[Sequence[AtomicEvent], Verdict]]) -> dict[str, Counts]:
    """Counts for each kind of ground-truth event. What is invented is of no event's kind, so it is 0 in each.

    A verdict may quote an event with a number before it or in other letters; where its words are others than those of
    the ground truth, it is counted as "other".
    """
    found: dict[str, Counts] = defaultdict(lambda: Counts(0, 0, 0, 0))
    for events, verdict in judged:
        kinds = {plain(event.text): event.kind or OTHER for event in events}
        for event in events:
            found[event.kind or OTHER] += Counts(0, 0, 0, 1)
        for text in verdict.missed:
            found[kinds.get(plain(text), OTHER)] += Counts(1, 0, 0, 0)
        for wrong in verdict.incorrect:
            found[kinds.get(plain(wrong.event), OTHER)] += Counts(0, 1, 0, 0)
    return dict(found)


def plain(text: str) -> str:
    """An event without what judges change in quoting it: a number before it, case, spaces and the final point."""
    return " ".join(re.sub(r"^\s*\d+[.)]\s+", "", text).lower().split()).rstrip(".")


def interval(
    counts: Sequence[Counts], of: Callable[[Rates], float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap confidence interval of a rate: videos are drawn again with replacement, `RESAMPLES` times.

    `counts` are those of each video. Equal arguments give equal intervals; both ends are 0 where there is no video.
    """
    return ends(resampled(counts, of, seed), level) if counts else (0.0, 0.0)


def difference(
    counts: Sequence[Counts], others: Sequence[Counts], of: Callable[[Rates], float], level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """How much higher a rate of `counts` is than that of `others`, of the same videos in the same order, and the
    bootstrap interval of that. Each draw has the same videos for both: what is hard about a video is so for both, and
    the difference is known better than either rate (whose intervals may overlap where it is far from 0).
    """
    assert len(counts) == len(others), "not the same videos"
    more = of(rates(counts)) - of(rates(others))
    low, high = ends(resampled(counts, of, seed) - resampled(others, of, seed), level) if counts else (0.0, 0.0)
    return more, low, high


def resampled(counts: Sequence[Counts], of: Callable[[Rates], float], seed: int) -> np.ndarray:
    """A rate of as many videos, drawn again with replacement, `RESAMPLES` times: (RESAMPLES,)."""
    shares_3R: Any = drawn_shares(tuple(counts), seed)
    return np.asarray(of(Rates(*shares_3R)))  # of all draws at once


@lru_cache(64)
def drawn_shares(counts: tuple[Counts, ...], seed: int) -> np.ndarray:
    """Missed, incorrect and hallucinated events of each draw in per cent, (3, RESAMPLES): the same for every rate."""
    table_N4 = np.array([(c.missed, c.incorrect, c.hallucinated, c.n_events) for c in counts], np.float64)
    rng, together = np.random.default_rng(seed), max(1, DRAWN_TOGETHER // len(counts))
    sizes = [min(together, RESAMPLES - first) for first in range(0, RESAMPLES, together)]
    sums_R4 = np.concatenate([table_N4[rng.integers(0, len(counts), (size, len(counts)))].sum(1) for size in sizes])
    return 100.0 * sums_R4[:, :3].T / np.maximum(sums_R4[:, 3], 1.0)


def right_interval(wrong: Sequence[Counts]) -> tuple[float, float]:
    """The 95 % interval of right answers in per cent; `wrong`: of each video its questions, those answered wrongly as
    missed. Where all are right, or all wrong, every draw is the same: it is that of Clopper and Pearson then, for as
    many independent answers as there are videos that anything was asked about."""
    asked, missed = (sum(getattr(count, name) for count in wrong) for name in ("n_events", "missed"))
    if not asked or missed not in (0, asked):
        return interval(wrong, lambda found: 100.0 - found.missed)
    return (0.0, unseen(wrong)) if missed else (100.0 - unseen(wrong), 100.0)


def right_difference(wrong: Sequence[Counts], others: Sequence[Counts]) -> tuple[float, float, float]:
    """How many points more of the answers are right than in `others`, and the 95 % interval of that: `difference` of
    the same videos. Where none has more right answers in one than in the other, every draw is 0: it is as wide then as
    Clopper and Pearson have it for a share of 0."""
    more, low, high = difference(wrong, others, lambda found: 100.0 - found.missed)
    if any(ours.missed != other.missed for ours, other in zip(wrong, others, strict=True)):
        return more, low, high
    return more, -unseen(wrong), unseen(wrong)


def unseen(counts: Sequence[Counts]) -> float:
    """How many per cent of videos may be so, by the 95 % interval, where none of these that were asked about is."""
    asked = sum(count.n_events > 0 for count in counts)
    return 100.0 * (1.0 - 0.025 ** (1 / asked)) if asked else 0.0


def ends(values_R: np.ndarray, level: float) -> tuple[float, float]:
    """What `level` of the values lie between."""
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, digits and apostrophes, and each Chinese or Japanese character, as these
    are written without spaces."""
    return re.findall(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[\w'])+", text)


def word_count(text: str) -> int:
    """How many words a text has: what stands between white space, and each Chinese or Japanese character."""
    return len(re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}{BETWEEN}]+", text))


def repetition_rate(caption: str, n: int = 5) -> float:
    """The share of a caption's words that lie in an n-word sequence which the caption has already said, 0 to 1.

    Words are as `words` has them; sequences run across sentences. A sequence that
    begins at word i is a repetition if the same n words also begin at some word before i (the two may overlap). All n
    of its words count, each word once however many such sequences hold it. 0 for a caption of at most n words.
    """
    said = words(caption.lower())
    seen: set[tuple[str, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(said) - n + 1):
        sequence = tuple(said[start : start + n])
        if sequence in seen:
            repeated.update(range(start, start + n))
        seen.add(sequence)
    return len(repeated) / len(said) if said else 0.0
