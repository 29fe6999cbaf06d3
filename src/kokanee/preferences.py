"""The objective of a round: gDPO on preference pairs, each packed behind one prompt, against stored references.

Packed are `[prompt | chosen | rejected | ground truth | answers to other questions]`, or what of them the loss needs.

Axes: P pairs of a batch, A answers of a pair, N label tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from kokanee.clips import Clips
from kokanee.conversations import shared_length
from kokanee.losses import answer_log_probs, dpo
from kokanee.model import EMBED_INPUTS, Kokanee
from kokanee.prefix import Sample, collate_packed, pack, packed_log_probs
from kokanee.processor import Processor
from kokanee.prompt import Turn
from kokanee.train import Batch, Objective, Stats

Loss = Literal["gdpo", "dpo", "ce"]
PACKED: dict[Loss, tuple[str, ...]] = {
    "gdpo": ("chosen", "rejected", "ground_truth"),
    "dpo": ("chosen", "rejected"),
    "ce": ("ground_truth",),
}
WINDOW = 16  # batches that are made together, so that clips of like length can be in one


@dataclass(frozen=True)
class Lesson:
    """What is learnt about one clip: answers to its prompt, the better and the worse one and somebody's, and others.

    chosen and rejected are "" where the loss does not need them.
    """

    number: int
    name: str
    prompt: str
    ground_truth: str
    chosen: str = ""
    rejected: str = ""
    questions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Weights:
    """What of the loss counts how much: see losses.py; `qa_weight` is of the mean cross-entropy of other answers."""

    loss: Loss = "gdpo"
    beta: float = 0.1
    gt_weight: float = 0.1
    qa_weight: float = 0.1


class Preferences(Objective):
    """Lessons about clips, the first `held_out` of them for validation. `model` has the adapter that is trained.

    `reference_P2`: the log-probabilities of chosen and rejected answers under the model without this round's adapter.
    """

    def __init__(
        self,
        model: Kokanee,
        processor: Processor,
        clips: Clips,
        lessons: Sequence[Lesson],
        weights: Weights,
        *,
        held_out: int,
        seed: int,
        reference_P2: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.processor, self.clips, self.lessons = model, processor, clips, lessons
        self.weights, self.held_out, self.seed = weights, held_out, seed
        self.reference_P2 = reference_P2
        self.packed = lru_cache(4096)(self.pack)

    def name_of(self, sample: int) -> str:
        return self.lessons[sample].name

    def batch(self, split: str, number: int, size: int) -> Batch:
        """`size` lessons; every one of the split comes once before any comes again (but those left over)."""
        if split != "train":
            chosen = [(number * size + place) % self.held_out for place in range(size)]
        else:
            per_epoch = max(1, (len(self.lessons) - self.held_out) // size)
            chosen = self.order(number // per_epoch, size)[number % per_epoch]
        return self.collate(chosen)

    def order(self, epoch: int, size: int) -> list[list[int]]:
        """The batches of an epoch: lessons in random order, those of like length together."""
        rng = random.Random(f"{self.seed}/lessons/{epoch}")
        numbers = list(range(self.held_out, len(self.lessons)))
        rng.shuffle(numbers)
        made = []
        for start in range(0, len(numbers), WINDOW * size):
            window = sorted(numbers[start : start + WINDOW * size], key=self.length)
            batches = [window[at : at + size] for at in range(0, len(window), size)]
            rng.shuffle(batches)
            made += batches
        whole = [batch for batch in made if len(batch) == size]
        return whole or [(numbers * size)[:size]]

    def length(self, number: int) -> int:
        return self.clips.n_tokens(self.lessons[number].number)

    def pack(self, number: int) -> Sample:
        """The packed answers of one lesson."""
        lesson = self.lessons[number]
        block = self.clips.view(lesson.number).block
        said = [(lesson.prompt, getattr(lesson, name)) for name in PACKED[self.weights.loss]]
        whole = [
            self.processor.prepare_ids([Turn("user", asked), Turn("assistant", told)], [block])
            for asked, told in [*said, *lesson.questions]
        ]
        return pack(whole, shared_length(whole))

    def collate(self, numbers: Sequence[int]) -> Batch:
        """The packed lessons, their references (P, 2), and the media of their clips one after the other."""
        batch = collate_packed([self.packed(number) for number in numbers], self.processor.pad_id)
        batch["sample"] = torch.tensor(numbers)
        if self.reference_P2 is not None:
            batch["reference"] = self.reference_P2[numbers]
        views = [self.clips.view(self.lessons[number].number).media for number in numbers]
        for name in EMBED_INPUTS:
            found = [media[name] for media in views if name in media]
            if found:
                batch[name] = torch.cat(found)
        return batch

    def log_probs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of each answer's log-probabilities (P, A), and of all label tokens the log-probability (N,) and the
        answer's number (N,)."""
        media = {name: batch[name] for name in EMBED_INPUTS if name in batch}
        log_probs_N, rows_N, branches_N = packed_log_probs(self.model, batch, **media)
        shape = (len(batch["input_ids"]), int(batch["segments"].max()))
        answers_N = branches_N - 1
        sums = answer_log_probs(log_probs_N, rows_N * shape[1] + answers_N, shape[0] * shape[1])
        return sums.view(shape), log_probs_N, answers_N

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The loss, and its parts: DPO with rewards, margin and accuracy; cross-entropies of a token."""
        sums_PA, log_probs_N, answers_N = self.log_probs(batch)
        packed, weights = PACKED[self.weights.loss], self.weights
        loss, stats = sums_PA.new_zeros(()), Stats()
        if "chosen" in packed:
            preference = dpo(sums_PA[:, :2], batch["reference"], weights.beta)
            loss = loss + preference.loss_P.mean()
            stats["dpo"] = preference.loss_P.detach().mean()
            stats["margin"], stats["accuracy"] = map(torch.tensor, (preference.margin, preference.accuracy))
            stats["chosen"], stats["rejected"] = preference.rewards_P2.mean(0)
        if "ground_truth" in packed:
            entropy = -log_probs_N[answers_N == packed.index("ground_truth")].mean()
            loss, stats["ground_truth"] = loss + weights.gt_weight * entropy, entropy.detach()
        if bool((answers_N >= len(packed)).any()):
            entropy = -log_probs_N[answers_N >= len(packed)].mean()
            loss, stats["qa"] = loss + weights.qa_weight * entropy, entropy.detach()
        return loss, stats

    @torch.no_grad()
    def answer_sums(self, numbers: Sequence[int]) -> torch.Tensor:
        """The log-probabilities of the answers of some lessons (P, A), as the model is now, without dropout."""
        self.model.eval()
        batch = {name: value.to(self.model.device) for name, value in self.collate(numbers).items()}
        return self.log_probs(batch)[0].cpu()

    def references(self, numbers: Sequence[int]) -> list[tuple[float, float]]:
        """The log-probabilities of chosen and rejected of some lessons, as the model is now."""
        return [(chosen, rejected) for chosen, rejected in self.answer_sums(numbers)[:, :2].tolist()]
