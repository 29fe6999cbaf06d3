"""The language stages: clips, each with a caption and questions about it, packed behind one prompt.

What a caption tells is what an annotator tells (or, for a share of the clips, everything); the answers to questions are
exact. The encoders are frozen, so their output comes from a store (`features.py`); the audio aligner runs here. In the
place of a clip there may be its exact description in words: what is asked is then looked up in the text.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.nn import functional

from kokanee.errors import KokaneeError
from kokanee.features import Features, read_store
from kokanee.layout import Block
from kokanee.model import Kokanee
from kokanee.prefix import Sample, branch_mask, collate_packed, pack
from kokanee.processor import Processor
from kokanee.prompt import IGNORED, Turn
from kokanee.train import Batch, Objective, Stats
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import Sense, exact, facts_of, only, sense_of_fact
from kokanee.world.language import write
from kokanee.world.questions import CAPTION_PROMPTS, Question, ask
from kokanee.world.scene import Scene, Split, sample_scene

Media = Literal["both", "seen", "heard", "text"]
MEDIA: tuple[Media, ...] = ("both", "seen", "heard", "text")
CAPTION, ANSWER = 1, 2


class Mix(BaseModel):
    """What the samples of a language stage are made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = Field(description="folder with the features of training clips")
    validation: str = Field(description="folder with the features of validation clips")
    seed: int = Field(0, description="the world's seed, as in the stores")
    both: float = Field(0.0, ge=0, description="weight of clips shown with their sound")
    seen: float = Field(0.0, ge=0, description="weight of clips shown without sound")
    heard: float = Field(0.0, ge=0, description="weight of sounds alone")
    text: float = Field(0.0, ge=0, description="weight of exact descriptions in place of clips")
    longest_s: float = Field(math.inf, gt=0, description="seconds of the longest clips to train on")
    questions: int = Field(4, ge=0, description="questions about each clip")
    exact: float = Field(0.0, ge=0, le=1, description="share of captions that tell everything, as no annotator does")
    partial: float = Field(0.2, ge=0, le=1, description="share of clips with sound asked about for one sense only")
    bias: dict[str, float] = Field(default_factory=dict, description="of the annotators, see world/annotators.py")

    @model_validator(mode="after")
    def _check(self) -> Mix:
        if not any(self.weights):
            raise ValueError("both, seen, heard and text are all 0, which leaves no samples")
        unknown = set(self.bias) - {field.name for field in fields(Bias)}
        if unknown:
            raise ValueError(f"bias has no {', '.join(sorted(unknown))}")
        return self

    @property
    def weights(self) -> list[float]:
        """The weights of `MEDIA`."""
        return [self.both, self.seen, self.heard, self.text]


class Conversations(Objective):
    """Cross-entropy on captions and answers."""

    def __init__(self, model: Kokanee, processor: Processor, mix: Mix, seed: int) -> None:
        super().__init__()
        self.model, self.processor, self.mix, self.seed = model, processor, mix, seed
        self.bias = Bias(**mix.bias)
        self.idle_parts = bool((mix.both or mix.heard) and (mix.seen or mix.text))
        training = short_enough(read_store(Path(mix.train), model, "train", mix.seed), mix.longest_s)
        validation = read_store(Path(mix.validation), model, "validation", mix.seed)
        self.clips = {"train": by_length(training), "validation": by_length(validation)}

    def samples(self) -> dict[str, str]:
        """The clips of each split: how many, and a hash of which they are."""
        clips = {split: [clip.stretch for group in groups for clip in group] for split, groups in self.clips.items()}
        return {split: f"{len(found)} clips, {digest(found)}" for split, found in clips.items()}

    def batch(self, split: Split, number: int, size: int) -> Batch:
        """`size` clips of one length with their conversations, all shown in the same way, so that little is padding: in
        training by the weights of the mix, otherwise in all ways in turn. Equal arguments give equal batches."""
        rng = random.Random(f"{self.seed}/{split}/{number}")
        groups = self.clips[split]
        clips = rng.choices(rng.choices(groups, [len(group) for group in groups])[0], k=size)
        media = rng.choices(MEDIA, self.mix.weights)[0]
        if split != "train":
            shown: list[Media] = [way for way, weight in zip(MEDIA, self.mix.weights, strict=True) if weight]
            media = shown[number % len(shown)]
        samples, videos, audios = [], [], []
        for clip in clips:
            samples.append(self.sample(sample_scene(split, clip.stretch.index, self.mix.seed), clip, media, rng))
            videos += [clip.video_ND] if media in ("both", "seen") else []
            audios += [clip.audio_CSD] if media in ("both", "heard") else []
        batch = collate_packed([sample for sample, _ in samples], self.processor.pad_id)
        batch["sample"] = torch.tensor([clip.stretch.index for clip in clips])
        batch["roles"] = torch.stack(
            [functional.pad(roles, (0, batch["labels"].shape[1] - len(roles))) for _, roles in samples]
        )
        if videos:
            batch["video_embeds"] = torch.cat(videos)
        if audios:
            batch["audio_states"] = torch.cat(audios)
        return batch

    def sample(self, scene: Scene, clip: Features, media: Media, rng: random.Random) -> tuple[Sample, torch.Tensor]:
        """One packed sample, and which of its tokens belong to a caption and which to an answer (L,)."""
        block = block_of(clip, media, len(clip.audio_CSD) * self.model.config.audio_tokens_per_chunk)
        story = self.story(scene, clip, rng) if media == "text" else ""
        said = [self.caption(scene, clip, media, rng)]
        said += [(asked.text, asked.answer) for asked in self.questions(scene, clip, media, rng)]
        whole = [
            self.processor.prepare_ids([Turn("user", story + asked), Turn("assistant", told)], [block] if block else [])
            for asked, told in said
        ]
        packed = pack(whole, shared_length(whole))
        roles = torch.where(packed["segments"] == 1, CAPTION, ANSWER)
        return packed, torch.where(packed["labels"] == IGNORED, 0, roles)

    def story(self, scene: Scene, clip: Features, rng: random.Random) -> str:
        """All that happens in a clip, in words."""
        return write(facts_of(exact(scene, clip.stretch.start_s, clip.stretch.end_s)), rng) + "\n"

    def caption(self, scene: Scene, clip: Features, media: Media, rng: random.Random) -> tuple[str, str]:
        """A request for a caption and the caption.

        Annotators have seen and heard the clip; what was not asked for, or is not shown, they leave out. Asked for
        sounds alone they listen.
        """
        events = exact(scene, clip.stretch.start_s, clip.stretch.end_s)
        told: Sense = "both" if media in ("both", "text") else media
        asked: Sense = told
        if media == "both" and rng.random() < self.mix.partial:
            asked = told = rng.choice(("seen", "heard"))
        elif media in ("seen", "heard") and rng.random() < 0.5:
            asked = "both"
        if rng.random() < self.mix.exact:
            facts = facts_of(only(events, told))
        else:
            bias = replace(self.bias, unheard=0.0) if told == "heard" else self.bias
            facts = tuple(fact for fact in annotate(events, bias, rng) if told in ("both", sense_of_fact(fact)))
        return rng.choice(CAPTION_PROMPTS[asked]), write(facts, rng)

    def questions(self, scene: Scene, clip: Features, media: Media, rng: random.Random) -> list[Question]:
        """Questions that the given media can answer."""
        wanted, everything = self.mix.questions, media in ("both", "text")
        found = ask(scene, rng, wanted if everything else 4 * wanted, clip.stretch.start_s, clip.stretch.end_s)
        return [asked for asked in found if everything or sense_of(asked) == media][:wanted]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The mean cross-entropy of captions plus that of answers, both over label tokens; these two, and the share of
        answers whose every token is the most likely one, in per cent (in evaluation also by the way of showing).

        The wording of a caption is mostly chance, an answer's is not: as one mean, answers would hardly count.
        """
        model, media = self.model, {}
        if "video_embeds" in batch:
            media["video_embeds"] = batch["video_embeds"].float()
        if "audio_states" in batch:
            media["audio_embeds"] = model.audio.align(batch["audio_states"].float()).flatten(0, 1)
        embeds_BLH = model.embed(batch["input_ids"], **media)
        hidden_BLD = model.language_model(
            inputs_embeds=embeds_BLH,
            attention_mask=branch_mask(batch["segments"]),
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        targets_BL = batch["labels"][:, 1:]
        counted_BL = targets_BL != IGNORED
        logits_NV = model.lm_head(hidden_BLD[:, :-1][counted_BL])
        targets_N, roles_N = targets_BL[counted_BL], batch["roles"][:, 1:][counted_BL]
        losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none")
        loss = losses_N[roles_N == CAPTION].mean()
        stats = {"caption": loss.detach()}
        if bool((roles_N == ANSWER).any()):
            answers = losses_N[roles_N == ANSWER].mean()
            loss, stats["answer"] = loss + answers, answers.detach()
            rows_BL = torch.arange(len(targets_BL), device=targets_BL.device)[:, None] * (batch["segments"].max() + 1)
            branches_N = (rows_BL + batch["segments"][:, 1:])[counted_BL]
            wrong_N = (roles_N == ANSWER) & (logits_NV.argmax(-1) != targets_N)
            asked, failed = branches_N[roles_N == ANSWER].unique(), branches_N[wrong_N].unique()
            stats["answers"] = torch.tensor(100.0 * (1 - len(failed) / len(asked)))
            if not self.training:
                stats[f"answers_{way_of(batch)}"] = stats["answers"]
        return loss, stats


def way_of(batch: Batch) -> Media:
    """How the clips of a batch are shown."""
    seen, heard = "video_embeds" in batch, "audio_states" in batch
    return "both" if seen and heard else "seen" if seen else "heard" if heard else "text"


def digest(things: Sequence[Any]) -> str:
    """A hash of what these are: stretches of scenes, or anything whose `repr` says what it is."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def sense_of(question: Question) -> Media:
    """The media that a question can be answered from, and no less."""
    if question.kind in ("sound", "sound count", "pitch"):
        return "heard"
    if question.kind == "sync":
        return "both"
    about_sounds = "heard" in question.text and question.kind in ("count", "exists")
    return "heard" if about_sounds or "sounds" in question.text else "seen"


def short_enough(clips: list[Features], longest_s: float) -> list[Features]:
    """The clips that last at most `longest_s`. Raises `KokaneeError` where there are none."""
    kept = [clip for clip in clips if clip.stretch.end_s - clip.stretch.start_s <= longest_s]
    if not kept:
        raise KokaneeError(f"None of the {len(clips)} training clips lasts at most {longest_s} s. Raise longest_s.")
    return kept


def by_length(clips: list[Features]) -> list[list[Features]]:
    """Clips in groups of equal numbers of visual tokens, so that a batch needs no padding for them."""
    groups = defaultdict(list)
    for clip in clips:
        groups[len(clip.video_ND)].append(clip)
    return [groups[length] for length in sorted(groups)]


def block_of(clip: Features, media: Media, n_audio_tokens: int) -> Block | None:
    """The sizes of a clip's media in a prompt; none for text alone."""
    if media == "text":
        return None
    if media == "heard":
        return Block("audio", n_audio_tokens=n_audio_tokens)
    return Block("video", clip.grid_thw, clip.step_s, n_audio_tokens if media == "both" else 0)


def shared_length(samples: Sequence[Sample]) -> int:
    """How many tokens all conversations begin with, but for the last one before a label and what follows it."""
    unlabelled = min(int((sample["labels"] != IGNORED).nonzero()[0]) for sample in samples) - 1
    ids_SL = torch.stack([sample["input_ids"][:unlabelled] for sample in samples])
    return int((ids_SL == ids_SL[0]).all(0).cumprod(0).sum())
