"""Nano's exam: world clips that it never saw, as files, captioned and questioned, and judged exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kokanee import generation
from kokanee.captions import Decoding, intervals
from kokanee.errors import KokaneeError
from kokanee.events import Counts, Rates, interval, rates, repetition_rate, right_interval, word_count
from kokanee.files import SAMPLES
from kokanee.formats import read_jsonl
from kokanee.ground_truth import Truth, truth_of_sample
from kokanee.model import Kokanee
from kokanee.processor import Processor
from kokanee.questions import same
from kokanee.views import Part, View, open_prompt, views
from kokanee.world.facts import Fact
from kokanee.world.score import judge

PROMPT = "Describe the video with its sounds."
CAPTION_TOKENS = 160
ANSWERING = Decoding(max_new_tokens=16)


@dataclass(frozen=True)
class Marks:
    """What came out of captions and answers.

    `rates` are in per cent of the true facts, `sounds_told` of the true sounds (None where there are none),
    `repetition` of a caption's words; `words` are words a caption; `answers` are right answers in per cent, None where
    nothing was asked. Intervals are of 95 % confidence: of the total error and of the answers, over clips.
    `by_clip` are the counts of each clip; `wrong_by_clip` its questions, those answered wrongly as missed.
    """

    name: str
    rates: Rates
    sounds_told: float | None
    repetition: float
    words: float
    answers: float | None = None
    answers_by_kind: dict[str, float] = field(default_factory=dict)
    total_interval: tuple[float, float] | None = None
    answers_interval: tuple[float, float] | None = None
    questions_by_kind: dict[str, int] = field(default_factory=dict)
    by_clip: tuple[Counts, ...] = ()
    wrong_by_clip: tuple[Counts, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        made = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        counts = {name: [list(one.values()) for one in made[name]] for name in ("by_clip", "wrong_by_clip")}
        return made | counts | {"hall": self.rates.hall, "total": self.rates.total}


def exam(
    model: Kokanee,
    processor: Processor,
    folder: Path,
    clips: int | None = None,
    *,
    temperatures: Sequence[float] = (0.0,),
    every_s: float | None = None,
    seed: int = 0,
    batch_size: int = 25,
    report: Callable[[int, int], None] | None = None,
) -> tuple[list[Marks], list[list[str]]]:
    """Marks on the first (None: on all) clips of a folder of `world make`, and the captions behind them: of the
    annotators, of the model at each temperature, and with `every_s` of its greedy captions of every interval.

    Captions are drawn at `temperatures` (0: greedy); answers to questions are always greedy, and stand with the marks
    of the first. `report(done, clips)` is called after each batch. Raises `KokaneeError` where the folder has too few
    clips, clips to train on, or clips without annotators.
    """
    records = read_records(folder, clips)
    model.eval()
    decodings = [Decoding(temperature, 1.0, seed, CAPTION_TOKENS) for temperature in temperatures]
    told: list[list[str]] = [[] for _ in decodings]
    right: list[list[tuple[str, bool]]] = []
    pieces: list[str] = []
    truths = [facts_in(record) for record in records]
    owners, parts = zip(*parts_of(records, every_s), strict=True) if every_s else ((), ())
    for start in range(0, len(records), batch_size):
        some = records[start : start + batch_size]
        seen = watched(model, processor, [(folder / record["file"], None, None) for record in some])
        keys = [record["file"] for record in some]
        for captions, decoding in zip(told, decodings, strict=True):
            captions += answers(model, processor, [(view, PROMPT) for view in seen], decoding, keys)
        right += answered(model, processor, seen, some)
        mine = [part for part, owner in zip(parts, owners, strict=True) if start <= owner < start + batch_size]
        cut = watched(model, processor, [(folder / part.file, part.start_s, part.end_s) for part in mine])
        pieces += answers(model, processor, [(view, PROMPT) for view in cut], Decoding(max_new_tokens=CAPTION_TOKENS))
        if report is not None:
            report(min(start + batch_size, len(records)), len(records))
    annotated = [record["captions_annotated"][0] for record in records]
    marks = [mark("annotators", truths, annotated)]
    names = [f"temperature {temperature:g}" if temperature else "greedy" for temperature in temperatures]
    marks += [mark(name, truths, captions) for name, captions in zip(names, told, strict=True)]
    marks[1] = with_answers(marks[1], right)
    if every_s:
        marks.append(mark(f"every {every_s:g} s", [part.facts or () for part in parts], pieces, owners))
    return marks, [annotated, *told, *([pieces] if every_s else [])]


def watched(model: Kokanee, processor: Processor, parts: Sequence[Part]) -> list[View]:
    """What the encoders make of all parts. Raises `KokaneeError` for the first that cannot be read."""
    found = []
    for view in views(model, processor, parts):
        if isinstance(view, KokaneeError):
            raise view
        found.append(view)
    return found


def parts_of(records: Sequence[dict[str, Any]], every_s: float) -> list[tuple[int, Truth]]:
    """The intervals of clips with what is true of each, by the place of the clip."""
    return [
        (place, truth_of_sample(record, *ends))
        for place, record in enumerate(records)
        for ends in intervals(0.0, record["duration_s"], every_s)
    ]


def answered(
    model: Kokanee, processor: Processor, seen: Sequence[View], records: Sequence[dict[str, Any]]
) -> list[list[tuple[str, bool]]]:
    """The kinds of the questions about each clip, and whether they were answered rightly."""
    asked = [(view, record, q) for view, record in zip(seen, records, strict=True) for q in record["questions"]]
    said = iter(answers(model, processor, [(view, q["question"]) for view, _, q in asked], ANSWERING))
    return [[(q["kind"], same(next(said), q["answer"])) for q in record["questions"]] for record in records]


def with_answers(marks: Marks, right: Sequence[Sequence[tuple[str, bool]]]) -> Marks:
    """Marks with those of answers: of each clip the kinds of its questions, and which were answered rightly."""
    asked = Counter(kind for clip in right for kind, _ in clip)
    well = Counter(kind for clip in right for kind, good in clip if good)
    if not asked:
        return marks
    wrong = [Counts(sum(not good for _, good in clip), 0, 0, len(clip)) for clip in right]
    return replace(
        marks,
        answers=100.0 * well.total() / asked.total(),
        answers_by_kind={kind: 100.0 * well[kind] / asked[kind] for kind in sorted(asked)},
        answers_interval=right_interval(wrong),
        questions_by_kind={kind: asked[kind] for kind in sorted(asked)},
        wrong_by_clip=tuple(wrong),
    )


def read_records(folder: Path, clips: int | None) -> list[dict[str, Any]]:
    """The first records of a folder of `world make`, or all of them."""
    records = read_jsonl(folder / SAMPLES)
    clips = len(records) if clips is None else clips
    if not 1 <= clips <= len(records):
        raise KokaneeError(f"{folder} has {len(records)} clips, not {clips}. Make more, or ask for 1 or more of these.")
    if not all(record["captions_annotated"] for record in records[:clips]):
        raise KokaneeError(f"{folder} has clips without an annotator's caption. Make it with one annotator or more.")
    if any(record["split"] == "train" for record in records[:clips]):
        raise KokaneeError(f"{folder} has clips to train on. Make others: kokanee world make --split test.")
    return records[:clips]


def facts_in(record: dict[str, Any]) -> list[Fact]:
    """The facts that there are to tell of a clip."""
    facts = [event["fact"] for event in record["events"]]
    return [Fact(fact["kind"], tuple(fact["subject"]), fact["value"]) for fact in facts]


def mark(
    name: str,
    truths: Sequence[Sequence[Fact]],
    captions: Sequence[str],
    owners: Sequence[int] | None = None,
) -> Marks:
    """Marks of captions against the facts that there were to tell; `owners`: which clip each is of, if of parts."""
    verdicts = [judge(truth, caption) for truth, caption in zip(truths, captions, strict=True)]
    sounds = sum(fact.kind == "sound" for truth in truths for fact in truth)
    told = sum(fact.kind == "sound" for verdict in verdicts for fact in verdict.told)
    count = max(1, len(captions))
    by_clip: dict[int, Counts] = {}
    for place, verdict in zip(owners or range(len(verdicts)), verdicts, strict=True):
        by_clip[place] = by_clip.get(place, Counts(0, 0, 0, 0)) + verdict.counts
    return Marks(
        name,
        rates(verdict.counts for verdict in verdicts),
        100.0 * told / sounds if sounds else None,
        100.0 * sum(map(repetition_rate, captions)) / count,
        sum(map(word_count, captions)) / count,
        total_interval=interval(list(by_clip.values()), lambda found: found.total),
        by_clip=tuple(by_clip.values()),
    )


def answers(
    model: Kokanee,
    processor: Processor,
    asked: Sequence[tuple[View, str]],
    decoding: Decoding,
    keys: Sequence[str] | None = None,
    batch_size: int = 50,
) -> list[str]:
    """Answers to questions about clips that were watched, stripped of white space. `keys`: see `generation.steps`."""
    texts: list[str] = []
    for start in range(0, len(asked), batch_size):
        samples = [open_prompt(processor, view, text) for view, text in asked[start : start + batch_size]]
        batch, part = processor.collate(samples, padding_side="left"), slice(start, start + batch_size)
        found = generation.answers(model, batch, decoding, keys=None if keys is None else keys[part])
        texts += [generation.text_of(processor.tokenizer, answer.ids).strip() for answer in found]
    return texts
