"""Recipes: the settings of one training stage, read from YAML and checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kokanee.errors import KokaneeError, reasons

Stage = Literal["visual encoder", "sound encoder", "conversations"]
Checked = TypeVar("Checked", bound=BaseModel)


class Training(BaseModel):
    """How weights are trained. Lengths of time are counted in steps, a step being one update of the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="samples in a batch of one process")
    accumulate: int = Field(1, ge=1, description="batches in a step")
    processes: int = Field(1, ge=1, description="processes that share the work, on one machine")
    workers: int = Field(1, ge=0, description="extra processes that prepare batches, for each process")
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = Field(0, ge=0)
    final_share: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(1.0, gt=0, description="longest gradient that is used unshortened")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast_bf16: bool = Field(False, description="run the model's matrix products in bfloat16")
    log_every: int = Field(50, ge=1)
    evaluate_every: int = Field(500, ge=1)
    evaluate_batches: int = Field(8, ge=1)
    save_every: int = Field(500, ge=1)


class Recipe(Training):
    """One stage of training."""

    stage: Stage = Field(description="what is learnt: labels by an encoder, or answers by the language model")
    model: str = Field(
        description="folder or hub name of the model to start from, or a YAML file of a fresh one's sizes"
    )
    train: tuple[str, ...] = Field(description="names of the parts that are trained; all others are frozen")
    data: dict[str, Any] = Field(default_factory=dict, description="settings of the stage's samples")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises `KokaneeError` where it is missing or does not."""
    path = Path(path)
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Give the path of a YAML file.")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise KokaneeError(f"{path} is no YAML: {error}. Mend the file.") from error
    if not isinstance(value, dict):
        raise KokaneeError(f"{path} holds no settings (key: value lines), but {type(value).__name__}. Mend the file.")
    return value


def read_recipe(path: str | Path, **replaced: Any) -> Recipe:
    """The recipe in a YAML file, with single settings replaced. Raises `KokaneeError` that names each wrong setting."""
    return checked(Recipe, {**read_yaml(path), **replaced}, str(path))


def checked(model: type[Checked], settings: dict[str, Any], source: str) -> Checked:
    """`model` made of the settings of `source`. Raises `KokaneeError` that names each wrong setting."""
    try:
        return model(**settings)
    except ValidationError as error:
        raise KokaneeError(f"{source}: {reasons(error, model)}. Mend these settings.") from error
