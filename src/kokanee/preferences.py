"""The objective of a round: gDPO on preference pairs, packed behind one prompt a clip, against stored references.

Packed are `[prompt | chosen | rejected | ... | ground truth | answers to other questions]`, or what of them the loss
needs. A further pair of a clip costs its answers alone.

Axes: B clips of a batch, A answers of a clip at most, P pairs of the batch, N label tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from kokanee.clips import Clips
from kokanee.conversations import digest, shared_length
from kokanee.losses import answer_log_probs, dpo, gdpo
from kokanee.model import EMBED_INPUTS, Kokanee
from kokanee.prefix import Sample, collate_packed, pack, packed_log_probs
from kokanee.processor import Processor
from kokanee.prompt import IGNORED, Turn
from kokanee.train import Batch, Objective, Stats

Loss = Literal["gdpo", "dpo", "ce"]
WITH_PAIRS: tuple[Loss, ...] = ("gdpo", "dpo")
WITH_GROUND_TRUTH: tuple[Loss, ...] = ("gdpo", "ce")
PAIR, GROUND_TRUTH, ANSWER = 0, 1, 2
KEPT_TOKENS, ANSWERS_TOKENS = 4_000_000, 200  # of packed lessons in memory; of the text of one, about
WINDOW = 16  # batches that are made together, so that clips of like length can be in one


@dataclass(frozen=True)
class Lesson:
    """What is learnt about one clip: pairs of a better and a worse caption of the model's, the caption of somebody who
    saw the clip (None: nobody's), answers to other questions. cut_off: which of these texts did not come to their end,
    so that no end of them is learnt."""

    number: int
    name: str
    prompt: str
    ground_truth: str | None
    pairs: tuple[tuple[str, str], ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    cut_off: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weights:
    """What of the loss counts how much: see losses.py; `qa_weight` is of the mean cross-entropy of other answers."""

    loss: Loss = "gdpo"
    beta: float = 0.1
    gt_weight: float = 0.1
    qa_weight: float = 0.1


class Preferences(Objective):
    """Lessons about clips, the first `held_out` of them for validation. `model` has the adapter that is trained.

    `reference`: of each lesson the log-probabilities of its pairs under the round's first model, (pairs, 2).
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
        reference: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.processor, self.clips, self.lessons = model, processor, clips, lessons
        self.weights, self.held_out, self.seed = weights, held_out, seed
        self.reference = reference
        self.lengths = [clips.n_tokens(lesson.number) for lesson in lessons]
        self.packed = lru_cache(KEPT_TOKENS // (max(self.lengths, default=0) + ANSWERS_TOKENS))(self.pack)
        self.order = lru_cache(2)(self.ordered)

    def train(self, mode: bool = True) -> Preferences:
        """As usual, but what sees and hears is frozen and so never has dropout."""
        super().train(mode)
        self.model.visual.eval()
        self.model.audio.eval()
        return self

    def samples(self) -> dict[str, str]:
        return {"lessons": digest(self.lessons)}

    def name_of(self, sample: int) -> str:
        return self.lessons[sample].name

    @torch.no_grad()
    def blamed(self, samples: Sequence[int]) -> Sequence[int]:
        """Those whose loss alone is not finite; all, where none's is."""
        device = self.model.device
        batches = [{name: value.to(device) for name, value in self.collate([one]).items()} for one in samples]
        bad = [one for one, batch in zip(samples, batches, strict=True) if not torch.isfinite(self(batch)[0])]
        return bad or samples

    def batch(self, split: str, number: int, size: int) -> Batch:
        """`size` lessons; every one of the split comes once before any comes again (but those left over)."""
        if split != "train":
            chosen = [(number * size + place) % self.held_out for place in range(size)]
        else:
            per_epoch = max(1, (len(self.lessons) - self.held_out) // size)
            chosen = self.order(number // per_epoch, size)[number % per_epoch]
        return self.collate(chosen)

    def ordered(self, epoch: int, size: int) -> list[list[int]]:
        """The batches of an epoch: lessons in random order, those of like length together."""
        rng = random.Random(f"{self.seed}/lessons/{epoch}")
        numbers = list(range(self.held_out, len(self.lessons)))
        rng.shuffle(numbers)
        made = []
        for start in range(0, len(numbers), WINDOW * size):
            window = sorted(numbers[start : start + WINDOW * size], key=self.lengths.__getitem__)
            batches = [window[at : at + size] for at in range(0, len(window), size)]
            rng.shuffle(batches)
            made += batches
        whole = [batch for batch in made if len(batch) == size]
        return whole or [(numbers * size)[:size]]

    def pack(self, number: int) -> Sample:
        """The packed answers of one lesson."""
        lesson = self.lessons[number]
        block = self.clips.view(lesson.number).block
        loss = self.weights.loss
        told = [text for pair in lesson.pairs for text in pair] if loss in WITH_PAIRS else []
        told += self.truths(lesson)
        whole = [
            self.processor.prepare_ids([Turn("user", asked), Turn("assistant", text)], [block])
            for asked, text in [*((lesson.prompt, text) for text in told), *lesson.questions]
        ]
        for sample, text in zip(whole, told):
            if text and text in lesson.cut_off:
                sample["labels"][-len(self.processor.writer.turn_end) :] = IGNORED
        return pack(whole, shared_length(whole))

    def truths(self, lesson: Lesson) -> list[str]:
        """The ground truth of a lesson, if it is learnt."""
        truth = lesson.ground_truth if self.weights.loss in WITH_GROUND_TRUTH else None
        return [] if truth is None else [truth]

    def collate(self, numbers: Sequence[int]) -> Batch:
        """The packed lessons, how many pairs and ground truths each has (B,), all pairs' references (P, 2), and the
        clips' media."""
        batch = collate_packed([self.packed(number) for number in numbers], self.processor.pad_id)
        batch["sample"] = torch.tensor(numbers)
        with_pairs = self.weights.loss in WITH_PAIRS
        batch["pairs"] = torch.tensor([len(self.lessons[number].pairs) if with_pairs else 0 for number in numbers])
        batch["truths"] = torch.tensor([len(self.truths(self.lessons[number])) for number in numbers])
        if self.reference is not None:
            batch["reference"] = torch.cat([self.reference[number] for number in numbers])
        views = [self.clips.view(self.lessons[number].number).media for number in numbers]
        for name in EMBED_INPUTS:
            found = [media[name] for media in views if name in media]
            if found:
                batch[name] = torch.cat(found)
        return batch

    def log_probs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of each answer's log-probabilities (B, A), and of all label tokens the log-probability (N,) and what
        they belong to (N,): `PAIR`, `GROUND_TRUTH` or `ANSWER`."""
        media = {name: batch[name] for name in EMBED_INPUTS if name in batch}
        log_probs_N, rows_N, branches_N = packed_log_probs(self.model, batch, **media)
        n_clips, n_answers = len(batch["input_ids"]), int(batch["segments"].max())
        sums = answer_log_probs(log_probs_N, rows_N * n_answers + branches_N - 1, n_clips * n_answers)
        after_N = branches_N - 1 - 2 * batch["pairs"][rows_N]
        kinds_N = torch.where(after_N < batch["truths"][rows_N], GROUND_TRUTH, ANSWER)
        kinds_N = torch.where(after_N < 0, PAIR, kinds_N)
        return sums.view(n_clips, n_answers), log_probs_N, kinds_N

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The loss, and its parts: DPO with rewards, margin and accuracy; cross-entropies of a token."""
        sums_BA, log_probs_N, kinds_N = self.log_probs(batch)
        weights = self.weights
        stats: Stats = {}
        truth_N, answers_N = log_probs_N[kinds_N == GROUND_TRUTH], log_probs_N[kinds_N == ANSWER]
        if weights.loss == "ce":
            loss = -weights.gt_weight * (truth_N.mean() if len(truth_N) else 0.0 * log_probs_N.sum())
        else:
            preference = dpo(self.of_pairs(sums_BA, batch["pairs"]), batch["reference"], weights.beta)
            loss = preference.loss_P.mean()
            if weights.loss == "gdpo":
                loss = gdpo(preference, truth_N, weights.gt_weight)
            stats["dpo"] = preference.loss_P.detach().mean()
            stats["margin"], stats["accuracy"] = map(torch.tensor, (preference.margin, preference.accuracy))
            stats["chosen"], stats["rejected"] = preference.rewards_P2.mean(0)
        if len(truth_N):
            stats["ground_truth"] = -truth_N.detach().mean()
        if len(answers_N):
            loss, stats["qa"] = loss - weights.qa_weight * answers_N.mean(), -answers_N.detach().mean()
        return loss, stats

    def of_pairs(self, sums_BA: torch.Tensor, pairs_B: torch.Tensor) -> torch.Tensor:
        """What of all answers are pairs, (P, 2)."""
        places_A = torch.arange(sums_BA.shape[1], device=sums_BA.device)
        return sums_BA[places_A < 2 * pairs_B[:, None]].view(-1, 2)

    @torch.no_grad()
    def answer_sums(self, numbers: Sequence[int]) -> torch.Tensor:
        """The log-probabilities of the answers of some lessons (P, A), as the model is now, without dropout."""
        self.model.eval()
        batch = {name: value.to(self.model.device) for name, value in self.collate(numbers).items()}
        return self.log_probs(batch)[0].cpu()

    def references(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """The log-probabilities of the pairs of some lessons, (pairs, 2) of each, as the model is now."""
        sums_BA = self.answer_sums(numbers)
        counts = [len(self.lessons[number].pairs) for number in numbers]
        return [row_A[: 2 * count].view(-1, 2) for row_A, count in zip(sums_BA, counts, strict=True)]
