"""Clips as the language model is shown them, encoded, and what is true of them: what rounds of mrDPO sample and judge.

Encoders and aligners are frozen there, so that what they make of a clip is computed once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from kokanee.conversations import block_of
from kokanee.events import AtomicEvent
from kokanee.features import Features, read_store
from kokanee.ground_truth import Truth
from kokanee.layout import Block
from kokanee.model import Kokanee
from kokanee.prefix import Sample
from kokanee.processor import Processor
from kokanee.prompt import Turn
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import exact, facts_of
from kokanee.world.language import write
from kokanee.world.questions import CAPTION_PROMPTS, ask
from kokanee.world.scene import Split, sample_scene

GroundTruthCaption = Literal["annotated", "exact"]


@dataclass(frozen=True)
class View:
    """A clip that was watched once: its encoded media and their sizes in a prompt."""

    block: Block
    media: Sample


@dataclass(frozen=True)
class Task:
    """A request for a caption of clip number `number`, with a caption of somebody who saw it and all that is true.

    questions: other questions about the clip, with their answers.
    """

    number: int
    name: str
    prompt: str
    ground_truth: str
    truth: Truth
    questions: tuple[tuple[str, str], ...] = ()


class Clips(Protocol):
    """A collection of clips. `n_tokens`: how long clip `number` is in a prompt, to batch like with like."""

    def __len__(self) -> int: ...
    def n_tokens(self, number: int) -> int: ...
    def view(self, number: int) -> View: ...
    def task(self, number: int, ground_truth: GroundTruthCaption, n_questions: int, key: str) -> Task:
        """`key`: what the random choices (of a prompt, an annotator, questions) follow from."""
        ...


class WorldClips:
    """Clips of the world, from the features of a store (`features.py`). The audio aligner runs here, once a clip."""

    def __init__(
        self, model: Kokanee, processor: Processor, folder: Path, split: Split, seed: int, bias: Bias
    ) -> None:
        self.model, self.processor, self.split, self.seed, self.bias = model, processor, split, seed, bias
        self.features = read_store(folder, model, split, seed)
        self.heard: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    def n_tokens(self, number: int) -> int:
        clip = self.features[number]
        return len(clip.video_ND) + self.n_audio_tokens(clip)

    def n_audio_tokens(self, clip: Features) -> int:
        return len(clip.audio_CSD) * self.model.config.audio_tokens_per_chunk

    @torch.no_grad()
    def view(self, number: int) -> View:
        clip = self.features[number]
        if number not in self.heard:
            states_CSD = clip.audio_CSD.to(self.model.device, self.model.dtype)
            self.heard[number] = self.model.audio.align(states_CSD).flatten(0, 1).cpu()
        media = {"video_embeds": clip.video_ND.to(self.model.dtype), "audio_embeds": self.heard[number]}
        return View(block_of(clip, "both", self.n_audio_tokens(clip)), media)

    def task(self, number: int, ground_truth: GroundTruthCaption, n_questions: int, key: str) -> Task:
        stretch = self.features[number].stretch
        scene = sample_scene(self.split, stretch.index, self.seed)
        rng = random.Random(f"{key}/{self.split}/{stretch.index}")
        ends = (stretch.start_s, stretch.end_s)
        events = exact(scene, *ends)
        facts = facts_of(events) if ground_truth == "exact" else annotate(events, self.bias, rng)
        found = tuple(AtomicEvent(event.text, event.sense) for event in events)
        name = f"{self.split}-{stretch.index:05d}"
        return Task(
            number,
            name,
            rng.choice(CAPTION_PROMPTS["both"]),
            write(facts, rng),
            Truth(name, found, *ends, tuple(event.fact for event in events)),
            tuple((asked.text, asked.answer) for asked in ask(scene, rng, n_questions, *ends)),
        )


def open_prompt(processor: Processor, view: View, prompt: str) -> Sample:
    """A question about a clip, ready to be answered: a sample with the clip's encoded media."""
    return {**processor.prepare_ids([Turn("user", prompt)], [view.block]), **view.media}
