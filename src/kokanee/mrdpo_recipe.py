"""The recipe of a run of mrDPO: what is sampled, judged, preferred and trained in each round."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, PositiveFloat, model_validator

from kokanee.captions import Decoding
from kokanee.clips import FileData
from kokanee.pairs import PairRules
from kokanee.preferences import Loss
from kokanee.tuning import FORBID, FREE, Source, Tuning

FREE_IN_ROUNDS = (*FREE, "rounds", "patience", "keep", "keep_media")
"""Settings that a run may go on with changed: they change no round that is done."""


class Data(BaseModel):
    """The clips: to learn from, and to be measured by after each round."""

    model_config = FORBID

    train: Source
    validation: Source


class MrdpoRecipe(Tuning):
    """A run of mrDPO. The loop's settings (`steps`, `learning_rate`, `warmup`, ...) are those of one round.

    Defaults that the paper gives are the paper's: rounds, steps, top_p, beta, gt_weight, lora, qa_from_round.
    """

    stage: Literal["mrdpo"]
    rounds: int = Field(6, ge=1)
    steps: int = Field(1000, ge=1, description="of each round")
    clips: int = Field(ge=1, description="clips that are captioned in each round")
    samples: int = Field(4, ge=1, description="captions of each clip at each temperature; not given in the paper")
    temperatures: tuple[float, ...] = Field((1.0,), min_length=1, description="that captions are sampled at")
    top_p: float = Field(0.9, gt=0, le=1)
    pairs: PairRules = PairRules()
    loss: Loss = Field("gdpo", description="dpo: without the ground truth; ce: the ground truth alone")
    rates: tuple[PositiveFloat, ...] = Field(
        (1.0,), min_length=1, description="learning rate of each round, as a share of learning_rate; the last goes on"
    )
    beta: float = Field(0.1, gt=0)
    gt_weight: float = Field(0.1, ge=0, description="of the ground truth's cross-entropy, lambda in the paper")
    keep_media: bool = Field(
        True, description="false: what encoders made of a round's files is removed after the round"
    )
    proxy: bool = Field(True, description="a new adapter each round; false: one adapter is trained on")
    qa_from_round: int = Field(6, ge=1, description="from this round on questions are answered too")
    qa_weight: float = Field(0.1, ge=0, description="of their answers' cross-entropy; not given in the paper")
    patience: int | None = Field(None, ge=1, description="stop after so many rounds without a lower validation error")
    keep: Literal["last", "best"] = Field("last", description="whose weights are left; best: on validation, greedy")
    data: Data

    @model_validator(mode="after")
    def _judged_clips(self) -> MrdpoRecipe:
        for part, data in (("train", self.data.train), ("validation", self.data.validation)):
            if isinstance(data, FileData) and None in (data.captions, data.events):
                raise ValueError(f"data.{part} needs captions and events of its videos")
        return self

    def seed_of(self, number: int) -> int:
        """The seed of a round."""
        return self.seed * 1000 + number

    def rate_of(self, number: int) -> float:
        """The highest learning rate of a round."""
        return self.learning_rate * self.rates[min(number, len(self.rates)) - 1]

    def decodings(self, number: int) -> list[Decoding]:
        """How captions are sampled in a round, with other random numbers at each temperature."""
        seeds = [self.seed_of(number) + 1_000_000 * place for place in range(len(self.temperatures))]
        return [
            Decoding(temperature, self.top_p, seed, self.max_new_tokens)
            for temperature, seed in zip(self.temperatures, seeds, strict=True)
        ]
