"""From a recipe to a trained model: the starting model, the stage's objective, the loop, the folder at the end."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import GenerationConfig

from kokanee.checkpoints import load, save
from kokanee.conversations import Conversations, Mix
from kokanee.defaults import Defaults, origin
from kokanee.encoders import SoundLabels, VisualLabels
from kokanee.errors import KokaneeError
from kokanee.formats import alone_in, read_json, remove_unfinished
from kokanee.launch import is_main
from kokanee.model import Kokanee, KokaneeConfig
from kokanee.processor import Processor, ProcessorConfig
from kokanee.recipes import Recipe, checked, read_yaml
from kokanee.salmonn2 import refuse_salmonn2
from kokanee.tokenizer import build_tokenizer
from kokanee.train import STATE, Objective, Report, choose, means, restore, train
from kokanee.weights import fingerprint
from kokanee.world.facts import exact
from kokanee.world.language import write
from kokanee.world.questions import CAPTION_PROMPTS, ask
from kokanee.world.scene import sample_scene

PROMPT_EVERY = 20  # scenes to a repetition of the caption prompts in the texts that the tokenizer is learnt from


class TokenizerSizes(BaseModel):
    """Settings of a fresh model's tokenizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(ge=1, description="tokens at most")
    captions: int = Field(ge=1, description="scenes whose texts it is trained on")


class Sizes(BaseModel):
    """A fresh model: what a YAML file of sizes holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, Any] = Field(description="keys of KokaneeConfig")
    processor: dict[str, Any] = Field(description="keys of ProcessorConfig")
    tokenizer: TokenizerSizes
    captioner: dict[str, Any] = Field(default_factory=dict, description="what it is asked when the user does not say")
    seed: int = Field(0, description="of the random weights")


def run_stage(recipe: Recipe, folder: Path, report: Report | None = None) -> dict[str, float]:
    """Train one stage in `folder` and leave the model in `folder/model`; the last step's figures (see `train`). Raises
    `KokaneeError` where another process works in the folder."""
    torch.manual_seed(recipe.seed)
    model, processor = starting_model(recipe.model)
    objective = make_objective(recipe, model, processor)
    start = {"weights": fingerprint(model), "processor": fingerprint_of(processor)}
    trained = choose(objective, recipe.train)
    with alone_in(folder) if is_main() else contextlib.nullcontext():
        figures = train(objective, recipe, folder, trained, report, start)
        objective.finish()
        if is_main():
            remove_unfinished(folder)  # what killed runs left half written: the folder is this run's
            save(model.eval(), processor, folder / "model")
            starting_defaults(recipe.model).save(folder / "model")
    return figures


def fingerprint_of(processor: Processor) -> str:
    """A hash of a processor's settings and tokenizer."""
    text = processor.config.model_dump_json() + processor.tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def gates(
    folder: Path, samples: int, batch_size: int = 250, report: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """What an encoder's finished run names rightly in `samples` pictures or clips of the test split, in per cent.

    `report(done, samples)` is called after each batch. Raises `KokaneeError` where `folder` holds no finished run of an
    encoder.
    """
    known = folder / STATE
    settings = read_json(known).get("recipe") if known.is_file() else None
    if settings is None:
        raise KokaneeError(f"{folder} holds no run of a recipe. Give the folder of `kokanee train --out`.")
    recipe = checked(Recipe, settings, str(known))
    if recipe.stage == "conversations":
        raise KokaneeError(f"{folder} is a run of a language model, which has no labels. Use `kokanee world exam`.")
    objective = make_objective(recipe, *starting_model(recipe.model)).eval()
    step = restore(folder, choose(objective, recipe.train))
    if step < recipe.steps:
        raise KokaneeError(f"{folder} is at step {step} of {recipe.steps}. Let it finish with `kokanee train` first.")
    found = []
    for number, start in enumerate(range(0, samples, batch_size)):
        size = min(batch_size, samples - start)
        loss, shares = objective(objective.batch("test", number, size))
        found.append({"loss": float(loss), **{name: float(value) for name, value in shares.items()}})
        if report is not None:
            report(start + size, samples)
    return means(found)


def make_objective(recipe: Recipe, model: Kokanee, processor: Processor) -> Objective:
    """The objective of a recipe's stage. Raises `KokaneeError` where the recipe's `data` is not for this stage."""
    refuse_salmonn2(model)
    if recipe.stage == "conversations":
        return Conversations(model, processor, checked(Mix, recipe.data, "data"), recipe.seed)
    if recipe.data:
        raise KokaneeError(
            f"The stage '{recipe.stage}' makes its samples from scenes, but the recipe's data has "
            f"{', '.join(recipe.data)}. Take data out of the recipe."
        )
    encoder = VisualLabels if recipe.stage == "visual encoder" else SoundLabels
    return encoder(model, processor, recipe.seed)


def starting_model(name: str) -> tuple[Kokanee, Processor]:
    """The checkpoint of this name, or a fresh model of the sizes in a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return fresh_model(Path(name))
    return load(name, dtype="float32")


def starting_defaults(name: str) -> Defaults:
    """What the model of `starting_model` is asked when the user does not say."""
    if name.endswith((".yaml", ".yml")):
        return Defaults(**checked(Sizes, read_yaml(name), name).captioner)
    return Defaults.of(origin(name))


def fresh_model(path: Path) -> tuple[Kokanee, Processor]:
    """A model with random weights and a tokenizer trained on the world's language; equal files give equal models.

    Sets torch's random seed to the file's. Raises `KokaneeError` that names each wrong setting.
    """
    sizes = checked(Sizes, read_yaml(path), str(path))
    tokenizer = build_tokenizer(world_texts(sizes.tokenizer.captions), sizes.tokenizer.vocab_size)
    processor = Processor(tokenizer, ProcessorConfig(**sizes.processor))
    names, special = processor.config, tokenizer.get_added_vocab()
    ids: dict[str, Any] = {
        "image_token_id": processor.rules.image_id,
        "video_token_id": processor.rules.video_id,
        "audio_token_id": processor.rules.audio_id,
        "vision_start_token_id": special[names.media_start_token],
        "vision_end_token_id": special[names.media_end_token],
        "pad_token_id": processor.pad_id,
        "bos_token_id": processor.pad_id,
        "eos_token_id": special[names.turn_end_token],
    }
    text_config = {**sizes.model.get("text_config", {}), "vocab_size": len(tokenizer)}
    torch.manual_seed(sizes.seed)
    model = Kokanee(KokaneeConfig(**{**sizes.model, "text_config": text_config}, **ids))
    model.generation_config = GenerationConfig(eos_token_id=ids["eos_token_id"], pad_token_id=processor.pad_id)
    return model, processor


def world_texts(scenes: int) -> list[str]:
    """Captions, prompts and questions of training scenes: what the tokenizer's words are learnt from."""
    rng = random.Random("tokenizer")
    texts = [prompt for prompts in CAPTION_PROMPTS.values() for prompt in prompts] * max(1, scenes // PROMPT_EVERY)
    for index in range(scenes):
        scene = sample_scene("train", index)
        texts.append(write(exact(scene), rng))
        texts += [text for question in ask(scene, rng, 4) for text in (question.text, question.answer)]
    return texts
