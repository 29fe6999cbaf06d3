"""The recipe of a run of mrDPO: what is sampled, judged, preferred and trained in each round."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, Tag, model_validator

from kokanee.captions import Decoding
from kokanee.clips import FileData, WorldData
from kokanee.pairs import PairRules
from kokanee.preferences import Loss
from kokanee.recipes import Training

FREE = (
    "rounds",
    "patience",
    "keep",
    "keep_media",
    "judging",
    "unjudged",
    "workers",
    "log_every",
    "save_every",
    "caption_batch",
    "gradient_checkpointing",
)
"""Settings that a run may go on with changed: they change no round that is done, and the others by rounding at most."""
FORBID = ConfigDict(frozen=True, extra="forbid")


class Lora(BaseModel):
    """The adapter of a round; the defaults are the paper's."""

    model_config = FORBID

    r: int = Field(default=128, ge=1)
    alpha: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


class Judging(BaseModel):
    """How a language model is asked for verdicts; see `endpoint.Endpoint`."""

    model_config = FORBID

    base_url: str | None = None
    concurrency: int = Field(default=16, ge=1)
    max_tokens: int = Field(default=4096, ge=1)
    per_minute: float | None = None
    budget_tokens: int | None = None
    budget_money: float | None = None
    prices: tuple[float, float] | None = None


def kind_of(data: Any) -> str:
    """Which clips settings are of, by the names of the settings; so that mistakes in them are told as those of one."""
    names = data if isinstance(data, dict) else type(data).model_fields if isinstance(data, BaseModel) else ()
    return FileData.__name__ if set(names) & set(FileData.model_fields) else WorldData.__name__


Source = Annotated[
    Annotated[WorldData, Tag(WorldData.__name__)] | Annotated[FileData, Tag(FileData.__name__)], Discriminator(kind_of)
]


class Data(BaseModel):
    """The clips: to learn from, and to be measured by after each round."""

    model_config = FORBID

    train: Source
    validation: Source


class MrdpoRecipe(Training):
    """A run of mrDPO. The loop's settings (`steps`, `learning_rate`, `warmup`, ...) are those of one round.

    Defaults that the paper gives are the paper's: rounds, steps, top_p, beta, gt_weight, lora, qa_from_round.
    """

    stage: Literal["mrdpo"]
    model: str = Field(description="folder or hub name of the model to start from, that of supervised fine-tuning")
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    rounds: int = Field(6, ge=1)
    steps: int = Field(1000, ge=1, description="of each round")
    clips: int = Field(ge=1, description="clips that are captioned in each round")
    samples: int = Field(4, ge=1, description="captions of each clip at each temperature; not given in the paper")
    temperatures: tuple[float, ...] = Field((1.0,), min_length=1, description="that captions are sampled at")
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(1024, ge=1)
    caption_batch: int = Field(8, ge=1, description="clips captioned together")
    judge: str = Field("exact", description="exact (clips of the world), or openai:MODEL")
    judging: Judging = Judging()
    unjudged: float = Field(0.02, ge=0, le=1, description="largest share of captions that may stay without a verdict")
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
    lora: Lora = Lora()
    qa_from_round: int = Field(6, ge=1, description="from this round on questions are answered too")
    questions: int = Field(4, ge=0, description="questions about each clip then")
    qa_weight: float = Field(0.1, ge=0, description="of their answers' cross-entropy; not given in the paper")
    validation_clips: int = Field(200, ge=1, description="clips to be measured by; fewer, where there are fewer")
    patience: int | None = Field(None, ge=1, description="stop after so many rounds without a lower validation error")
    keep: Literal["last", "best"] = Field("last", description="whose weights are left; best: on validation, greedy")
    data: Data

    @model_validator(mode="after")
    def _check(self) -> MrdpoRecipe:
        if self.autocast_bf16:
            raise ValueError("autocast_bf16 would make references and policy differ; give dtype: bfloat16")
        return self

    @property
    def n_held_out(self) -> int:
        """Clips of a round that are not trained on, to check by."""
        return self.evaluate_batches * self.batch_size

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
