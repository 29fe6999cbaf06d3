"""The settings that runs share which tune a model by an adapter on captions of its own or of another model's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from kokanee.clips import FileData, WorldData
from kokanee.recipes import Training

FREE = (
    "judging",
    "unjudged",
    "workers",
    "log_every",
    "save_every",
    "caption_batch",
    "gradient_checkpointing",
    "data.train.unreadable",
    "data.validation.unreadable",
)
"""Settings that a run may go on with changed: they change nothing that is done, and what comes by rounding at most."""
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


class Tuning(Training):
    """A run that captions clips and then trains an adapter; `data` are its clips."""

    model: str = Field(description="folder or hub name of the model that is trained, that of supervised fine-tuning")
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    processor: dict[str, Any] = Field(
        default_factory=dict, description="settings of the processor to replace, such as max_frames; for clips in files"
    )
    max_new_tokens: int = Field(1024, ge=1)
    caption_batch: int = Field(8, ge=1, description="clips captioned together")
    judge: str = Field("exact", description="exact (clips of the world), or openai:MODEL")
    judging: Judging = Judging()
    unjudged: float = Field(0.02, ge=0, le=1, description="largest share of captions that may stay without a verdict")
    lora: Lora = Lora()
    questions: int = Field(4, ge=0, description="questions about each clip, where they are learnt too")
    validation_clips: int = Field(200, ge=1, description="clips to be measured by; fewer, where there are fewer")

    @model_validator(mode="after")
    def _one_precision(self) -> Tuning:
        if self.autocast_bf16:
            raise ValueError("autocast_bf16 would make captions and training differ; give dtype: bfloat16")
        return self

    @property
    def n_held_out(self) -> int:
        """Clips that are not trained on, to check by."""
        return self.evaluate_batches * self.batch_size

    def unreadable(self, data: Source) -> float:
        """The largest share of clips that may be left out as unreadable."""
        return data.unreadable if isinstance(data, FileData) else 0.0
