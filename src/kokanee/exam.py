"""Nano's exam: world clips that it never saw, as files, captioned and questioned, and judged exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kokanee import generation
from kokanee.captions import Decoding
from kokanee.clips import View, open_prompt, watch
from kokanee.errors import KokaneeError
from kokanee.events import Rates, rates, repetition_rate
from kokanee.formats import read_jsonl
from kokanee.model import Kokanee
from kokanee.processor import Processor
from kokanee.world.facts import Fact
from kokanee.world.score import judge

PROMPT = "Describe the video with its sounds."
CAPTION_TOKENS = 160
ANSWERING = Decoding(max_new_tokens=16)


@dataclass(frozen=True)
class Marks:
    """What came out of captions and answers.

    `rates` are in per cent of the true facts, `sounds_told` of the true sounds, `repetition` of a caption's words;
    `words` are words a caption; `answers` are right answers in per cent, None where nothing was asked.
    """

    name: str
    rates: Rates
    sounds_told: float
    repetition: float
    words: float
    answers: float | None = None
    answers_by_kind: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hall": self.rates.hall, "total": self.rates.total}


def exam(
    model: Kokanee,
    processor: Processor,
    folder: Path,
    clips: int | None = None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 25,
    report: Callable[[int, int], None] | None = None,
) -> tuple[list[Marks], list[str]]:
    """Marks of the annotators and of the model on the first (None: on all) clips of a folder of `world make`, and the
    captions.

    Captions are drawn at `temperature` (0: greedy), answers to questions are always greedy. `report(done, clips)` is
    called after each batch. Raises `KokaneeError` where the folder has too few clips, clips to train on, or clips
    without annotators.
    """
    records = read_records(folder, clips)
    truths = [facts_in(record) for record in records]
    captions: list[str] = []
    right, asked = Counter(), Counter()
    captioning = Decoding(temperature, 1.0, seed, CAPTION_TOKENS)
    model.eval()
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        seen = [watch(model, processor, folder / record["file"]) for record in part]
        keys = [record["file"] for record in part]
        captions += answers(model, processor, [(view, PROMPT) for view in seen], captioning, keys)
        questions = [(view, q) for view, record in zip(seen, part, strict=True) for q in record["questions"]]
        said = answers(model, processor, [(view, q["question"]) for view, q in questions], ANSWERING)
        for (_, question), text in zip(questions, said, strict=True):
            asked[question["kind"]] += 1
            right[question["kind"]] += text.lower() == question["answer"].lower()
        if report is not None:
            report(min(start + batch_size, len(records)), len(records))
    annotated = [record["captions_annotated"][0] for record in records]
    by_kind = {kind: 100.0 * right[kind] / asked[kind] for kind in sorted(asked)}
    overall = 100.0 * right.total() / asked.total() if asked else None
    marks = replace(mark("model", truths, captions), answers=overall, answers_by_kind=by_kind)
    return [mark("annotators", truths, annotated), marks], captions


def read_records(folder: Path, clips: int | None) -> list[dict[str, Any]]:
    """The first records of a folder of `world make`, or all of them."""
    records = read_jsonl(folder / "samples.jsonl")
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


def mark(name: str, truths: Sequence[Sequence[Fact]], captions: Sequence[str]) -> Marks:
    """Marks of captions against the facts that there were to tell."""
    verdicts = [judge(truth, caption) for truth, caption in zip(truths, captions, strict=True)]
    sounds = sum(fact.kind == "sound" for truth in truths for fact in truth)
    told = sum(fact.kind == "sound" for verdict in verdicts for fact in verdict.told)
    count = max(1, len(captions))
    return Marks(
        name,
        rates(verdict.counts for verdict in verdicts),
        100.0 * told / max(1, sounds),
        100.0 * sum(map(repetition_rate, captions)) / count,
        sum(len(caption.split()) for caption in captions) / count,
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
