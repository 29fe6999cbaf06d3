"""Nano's exam: world clips that it never saw, as files, captioned and questioned, and judged exactly.

Axes: N samples of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kokanee.formats import read_jsonl
from kokanee.layout import Block
from kokanee.model import Kokanee
from kokanee.processor import Processor, Turn
from kokanee.world.facts import Fact
from kokanee.world.score import Rates, judge, rates, repetition_rate

PROMPT = "Describe the video with its sounds."
Sample = dict[str, torch.Tensor]


@dataclass
class Marks:
    """What came out: rates in per cent of true facts, the share of sounds told, repetition and right answers in per cent."""

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
    clips: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 25,
    report: Callable[[int, int], None] | None = None,
) -> tuple[list[Marks], list[str]]:
    """Marks of the annotators and of the model on the first clips of a folder of `world make`, and the captions."""
    records = read_jsonl(folder / "samples.jsonl")[:clips]
    truths = [[Fact(**{**e["fact"], "subject": tuple(e["fact"]["subject"])}) for e in r["events"]] for r in records]
    captions: list[str] = []
    right, asked = Counter(), Counter()
    torch.manual_seed(seed)
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        seen = [watch(model, processor, folder / record["file"]) for record in part]
        captions += answers(model, processor, [(view, PROMPT) for view in seen], 160, temperature)
        questions = [(view, q) for view, record in zip(seen, part, strict=True) for q in record["questions"]]
        said = answers(model, processor, [(view, q["question"]) for view, q in questions], 16, 0.0)
        for (_, question), text in zip(questions, said, strict=True):
            asked[question["kind"]] += 1
            right[question["kind"]] += text.strip().lower() == question["answer"].lower()
        if report is not None:
            report(min(start + batch_size, len(records)), len(records))
    annotated = [record["captions_annotated"][0] for record in records]
    by_kind = {kind: 100.0 * right[kind] / asked[kind] for kind in sorted(asked)}
    overall = 100.0 * sum(right.values()) / max(1, sum(asked.values()))
    return [
        mark("annotators", truths, annotated),
        mark("model", truths, captions, overall, by_kind),
    ], captions


def mark(
    name: str,
    truths: Sequence[Sequence[Fact]],
    captions: Sequence[str],
    answers: float | None = None,
    by_kind: dict[str, float] | None = None,
) -> Marks:
    """Marks of captions against the facts that there were to tell."""
    verdicts = [judge(truth, caption) for truth, caption in zip(truths, captions, strict=True)]
    sounds = sum(fact.kind == "sound" for truth in truths for fact in truth)
    told = sum(fact.kind == "sound" for verdict in verdicts for fact in verdict.told)
    count = max(1, len(captions))
    return Marks(
        name,
        rates(verdicts),
        100.0 * told / max(1, sounds),
        100.0 * sum(map(repetition_rate, captions)) / count,
        sum(len(caption.split()) for caption in captions) / count,
        answers,
        by_kind or {},
    )


@dataclass(frozen=True)
class View:
    """A clip that was watched once: its encoded media and their sizes in a prompt."""

    block: Block
    media: Sample


@torch.no_grad()
def watch(model: Kokanee, processor: Processor, path: Path) -> View:
    """Read a file and run the encoders."""
    clip = processor.read(path)
    sample = processor.prepare(clip, [Turn("user", PROMPT)])
    names = ("pixel_values_videos", "video_grid_thw", "input_features")
    media = model.encode_media(**{name: sample.get(name) for name in names})
    n_audio = len(media["audio_embeds"]) if "audio_embeds" in media else 0
    if "video_grid_thw" not in sample:
        return View(Block("audio", n_audio_tokens=n_audio), media)
    t, h, w = sample["video_grid_thw"][0].tolist()
    return View(Block("video", (t, h, w), clip.step_s, n_audio), media)


@torch.no_grad()
def answers(
    model: Kokanee,
    processor: Processor,
    asked: Sequence[tuple[View, str]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int = 50,
) -> list[str]:
    """Answers to questions about clips that were watched, greedily at temperature 0."""
    texts: list[str] = []
    for start in range(0, len(asked), batch_size):
        samples = [
            {**processor.prepare_ids([Turn("user", text)], [view.block]), **view.media}
            for view, text in asked[start : start + batch_size]
        ]
        batch = processor.collate(samples, padding_side="left")
        batch.pop("labels", None)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        out = model.generate(**batch, max_new_tokens=max_new_tokens, **how)
        new = out[:, batch["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]
