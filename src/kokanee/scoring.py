"""Predictions and ground truth, by a judge -> scores of a captioner: global, by interval, by kind, video by video.

A file or interval without a caption misses all its events: it stays in the denominator, and so does a caption that the
judge could not be brought to judge. `as_published` leaves both out, as the published evaluator does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from kokanee.endpoint import Stop, Unanswered, each, run_async
from kokanee.errors import KokaneeError
from kokanee.events import Counts, Rates, Verdict, by_kind, difference, interval, rates, repetition_rate, word_count
from kokanee.ground_truth import GroundTruth, Truth, alike, place
from kokanee.judges import Judgement, LanguageModelJudge, judged
from kokanee.predictions import Prediction
from kokanee.protocol import median_run
from kokanee.world.score import UNREADABLE
from kokanee.world.score import judge as judge_exactly

MEASURES: dict[str, Callable[[Rates], float]] = {
    "missed": lambda r: r.missed,
    "incorrect": lambda r: r.incorrect,
    "hallucinated": lambda r: r.hallucinated,
    "hall": lambda r: r.hall,
    "total": lambda r: r.total,
}


class Judge(Protocol):
    """What scoring asks of a judge. `concurrency`: how many captions it may be asked about at a time."""

    @property
    def name(self) -> str: ...
    @property
    def concurrency(self) -> int: ...
    async def judge(self, truth: Truth, prediction: Prediction, run: int) -> Judgement: ...
    async def close(self) -> None: ...


class ExactJudge:
    """The world's parser. Raises `KokaneeError` for clips that are not of the world."""

    name, concurrency = "exact", 1

    async def judge(self, truth: Truth, prediction: Prediction, run: int) -> Judgement:
        if truth.facts is None:
            raise KokaneeError(
                f"The exact judge reads captions of the world only, and {truth.file} is not of it. "
                "Give a samples.jsonl of `kokanee world make` as events, or another judge."
            )
        return judged(judge_exactly(truth.facts, prediction.text))

    async def close(self) -> None:
        pass


class ModelJudge:
    """A language model, asked about `truth` and `prediction`."""

    def __init__(self, model: LanguageModelJudge) -> None:
        self.model, self.name, self.concurrency = model, model.name, model.asker.endpoint.concurrency

    async def judge(self, truth: Truth, prediction: Prediction, run: int) -> Judgement:
        return await self.model.judge(truth.events, prediction.text, run, prediction.finished)

    async def close(self) -> None:
        await self.model.asker.close()


@dataclass(frozen=True)
class Item:
    """A caption with what it is held against, and its judgement in each run.

    A judgement that could not be had is None; `failures` says why, and is "" for the others.
    """

    prediction: Prediction
    truth: Truth
    judgements: list[Judgement | None] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """The scores of one captioner on whole files (`global`) or on intervals (`local`), in per cent of events."""

    items: list[Item]
    rates: Rates
    intervals: dict[str, tuple[float, float]]
    runs: list[Rates]
    median_run: int
    kinds: dict[str, Counts]
    n_by_kind: int
    repetition: float
    words: float
    unjudged: Counter[str]
    by_file: dict[str, Counts]

    @property
    def n_told(self) -> int:
        """How many of the items have a caption."""
        return sum(bool(item.prediction.text) for item in self.items)

    @property
    def n_files(self) -> int:
        return len({item.truth.file for item in self.items})

    @property
    def n_unread(self) -> int:
        """How many captions have sentences that the exact judge could not read."""
        found = [verdict_of(item, self.median_run) for item in self.items]
        return sum(any(text.startswith(UNREADABLE) for text in v.hallucinated) for v in found if v is not None)

    def as_dict(self) -> dict[str, Any]:
        """For scores.json: all numbers, and every caption with its verdict in the median run."""
        measures = {name: of(self.rates) for name, of in MEASURES.items()}
        return {
            "captions": len(self.items),
            "told": self.n_told,
            "events": sum(len(item.truth.events) for item in self.items),
            "rates": measures,
            "intervals": self.intervals,
            "runs": [{name: of(run) for name, of in MEASURES.items()} for run in self.runs],
            "median_run": self.median_run,
            "kinds": {kind: asdict(counts) for kind, counts in sorted(self.kinds.items())},
            "repetition": self.repetition,
            "words": self.words,
            "captions_by_kind": self.n_by_kind,
            "unjudged": self.unjudged.total(),
            "unjudged_reasons": dict(self.unjudged.most_common()),
            "videos": [video_of(item, self.median_run) for item in self.items],
        }


def matched(
    predictions: Sequence[Prediction], truth: GroundTruth, as_published: bool = False
) -> tuple[list[Item], list[Item], list[Prediction]]:
    """Global and local items, and the predictions of which nothing is known.

    A file or interval of the ground truth without any prediction gets an empty one; `as_published` leaves out what has
    no caption. Raises `KokaneeError` where there is no ground truth, where no prediction belongs to it, and where two
    are of the same.
    """
    if not truth.truths:
        raise KokaneeError("The file of events holds none. Give one that does.")
    items: dict[tuple[str, float | None, float | None, int], Item] = {}
    unknown: list[Prediction] = []
    reasons: dict[str, str] = {}
    for prediction in predictions:
        file, found = truth.names.same(prediction.file), truth.of(prediction)
        if file is not None and prediction.cut is not None and prediction.start_s is None:
            reasons[file] = prediction.reason  # a file without a caption of any of its parts
        elif found is None:
            unknown.append(prediction)
        else:
            key = (found.file, found.start_s, found.end_s, prediction.sample)
            if key in items:
                one, two = items[key].prediction.file, prediction.file
                raise KokaneeError(
                    f"{one} and {two} are both captions of {place(found)} in the ground truth. Remove one of the two."
                )
            items[key] = Item(prediction, found)
    if not items and not reasons:
        raise KokaneeError(
            "None of the captions belongs to a file of the ground truth. Check that both are of the same."
        )
    cut = next((prediction.cut for prediction in predictions if prediction.cut is not None), None)
    whole = [item for item in items.values() if item.prediction.start_s is None]
    parts = [item for item in items.values() if item.prediction.start_s is not None]
    if as_published:
        whole, parts = ([item for item in some if not item.prediction.reason] for some in (whole, parts))
        if not whole and not parts:
            raise KokaneeError("No file has a caption, and as published such files are left out. Nothing is left.")
        return whole, parts, unknown
    if whole:
        whole += silent(whole, [found for found in truth.truths if found.start_s is None], reasons)
    if parts or cut is not None:
        parts += silent(parts, truth.parts(cut), reasons)
    return whole, parts, unknown


def silent(items: Sequence[Item], truths: Sequence[Truth], reasons: dict[str, str]) -> list[Item]:
    """An item without a caption for everything that none of the items is about."""
    told: dict[str, list[Truth]] = {}
    for item in items:
        told.setdefault(item.truth.file, []).append(item.truth)
    left = [truth for truth in truths if not any(alike(truth, other) for other in told.get(truth.file, ()))]
    why = {truth.file: reasons.get(truth.file) or "no caption" for truth in left}
    return [Item(Prediction(t.file, "", t.start_s, t.end_s, reason=why[t.file]), t) for t in left]


def judge_all(
    items: Sequence[Item], judge: Judge, runs: int = 1, on_judged: Callable[[int], None] | None = None
) -> list[Item]:
    """The items with their judgements in `runs` runs. Raises `Stop`, and what is wrong with the question.

    `on_judged` is told the number of judgements after each.
    """
    found: dict[tuple[int, int], Judgement | str] = {}
    stopped: list[Stop] = []

    async def work(job: tuple[int, int]) -> Judgement:
        item = items[job[0]]
        return await judge.judge(item.truth, item.prediction, job[1])

    async def run() -> None:
        jobs = [(number, seed) for seed in range(runs) for number in range(len(items))]
        try:
            async with aclosing(each(jobs, work, judge.concurrency)) as done:
                async for job, result in done:
                    if isinstance(result, Stop):
                        stopped.append(result)  # what is under way is still finished
                        continue
                    if isinstance(result, KokaneeError) and not isinstance(result, Unanswered):
                        raise result
                    found[job] = str(result) if isinstance(result, Unanswered) else result
                    if on_judged is not None:
                        on_judged(len(found))
        finally:
            await judge.close()
        if stopped:
            raise stopped[0]

    run_async(run())
    return [judged_item(item, [found[number, seed] for seed in range(runs)]) for number, item in enumerate(items)]


def judged_item(item: Item, results: Sequence[Judgement | str]) -> Item:
    """An item with its judgements, or why it has none."""
    return replace(
        item,
        judgements=[None if isinstance(result, str) else result for result in results],
        failures=[result if isinstance(result, str) else "" for result in results],
    )


def scores(items: Sequence[Item], as_published: bool = False) -> Scores:
    """The scores of judged items: those of the median run, with confidence intervals over files. Raises `KokaneeError`
    where nothing was judged, and what was not is left out."""
    runs = len(items[0].judgements) if items else 0
    by_run = [[counts_of(item, run, as_published) for item in items] for run in range(runs)]
    rated = [rates(counts) for counts in by_run]
    some = [run for run in range(runs) if not as_published or any(item.judgements[run] for item in items)]
    if runs and not some:
        why = Counter(failure for item in items for failure in item.failures).most_common(1)[0][0]
        raise KokaneeError(f"No caption was judged, and as published such captions are left out. Most often: {why}")
    middle = some[median_run([rated[run] for run in some])] if runs else 0
    by_file: dict[str, Counts] = {}
    for item, counts in zip(items, by_run[middle] if by_run else [], strict=True):
        by_file[item.truth.file] = by_file.get(item.truth.file, Counts(0, 0, 0, 0)) + counts
    # An item whose errors are known by number only is in no kind; one that was not judged misses all its events.
    verdicts = [(item.truth.events, known_of(item, middle, as_published)) for item in items] if runs else []
    named = [(events, verdict) for events, verdict in verdicts if verdict is not None]
    texts = [item.prediction.text for item in items if item.prediction.text]
    return Scores(
        list(items),
        rated[middle] if rated else rates([]),
        # By name, as a bootstrap draws places: the order in which captions were made must not matter.
        {name: interval([by_file[file] for file in sorted(by_file)], of) for name, of in MEASURES.items()},
        rated,
        middle,
        by_kind(named),
        len(named),
        100.0 * sum(map(repetition_rate, texts)) / max(1, len(texts)),
        sum(map(word_count, texts)) / max(1, len(texts)),
        Counter(failure for item in items for failure in item.failures if failure),
        by_file,
    )


def beside(ours: Scores, other: Scores) -> dict[str, tuple[float, float, float]] | None:
    """How many points more each measure is than another captioner's, with the 95 % interval of that (see
    `events.difference`); None where they are not of the same files and events, or of a single file."""
    events, its_events = ({file: c.n_events for file, c in made.by_file.items()} for made in (ours, other))
    if events != its_events or len(events) < 2:
        return None
    counts, others = ([made.by_file[file] for file in sorted(ours.by_file)] for made in (ours, other))
    return {name: difference(counts, others, of) for name, of in MEASURES.items()}


def counts_of(item: Item, run: int, as_published: bool) -> Counts:
    """What an item counts for in a run."""
    judgement, n_events = item.judgements[run], len(item.truth.events)
    if judgement is not None:
        return judgement.counts
    return Counts(0, 0, 0, 0) if as_published else Counts(n_events, 0, 0, n_events)


def known_of(item: Item, run: int, as_published: bool) -> Verdict | None:
    """The verdict that counts for the kinds of events: of an item that was not judged, that it misses all."""
    if item.judgements[run] is None and not as_published:
        return Verdict(tuple(event.text for event in item.truth.events), (), (), len(item.truth.events))
    return verdict_of(item, run)


def verdict_of(item: Item, run: int) -> Verdict | None:
    """Which events an item gets wrong in a run, None where only their numbers are known, or nothing."""
    judgement = item.judgements[run] if item.judgements else None
    return None if judgement is None else judgement.verdict


def video_of(item: Item, run: int) -> dict[str, Any]:
    """One caption in scores.json."""
    prediction, verdict = item.prediction, verdict_of(item, run)
    judgement = item.judgements[run]
    return {
        "file": item.truth.file,
        "start_s": prediction.start_s,
        "end_s": prediction.end_s,
        "sample": prediction.sample,
        "caption": prediction.text,
        "reason": prediction.reason or (item.failures[run] if item.failures else ""),
        "counts": None if judgement is None else asdict(judgement.counts),
        "rates": None if judgement is None else {n: of(rates([judgement.counts])) for n, of in MEASURES.items()},
        "missed": None if verdict is None else list(verdict.missed),
        "incorrect": None if verdict is None else [asdict(wrong) for wrong in verdict.incorrect],
        "hallucinated": None if verdict is None else list(verdict.hallucinated),
    }
