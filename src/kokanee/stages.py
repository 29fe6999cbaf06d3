"""From a recipe to a trained model: the starting model, the stage's objective, the loop, the folder at the end."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from kokanee.checkpoints import load, save
from kokanee.conversations import Conversations, Mix
from kokanee.encoders import SoundLabels, VisualLabels
from kokanee.errors import KokaneeError
from kokanee.model import Kokanee, KokaneeConfig
from kokanee.processor import Processor, ProcessorConfig
from kokanee.recipes import Recipe, read_yaml
from kokanee.tokenizer import build_tokenizer
from kokanee.train import Report, train
from kokanee.world.facts import exact
from kokanee.world.language import write
from kokanee.world.questions import CAPTION_PROMPTS, ask
from kokanee.world.scene import sample_scene


def run_stage(recipe: Recipe, folder: Path, report: Report | None = None) -> dict[str, float]:
    """Train one stage in `folder` and leave the model in `folder/model`; the last evaluation's figures."""
    model, processor = starting_model(recipe.model)
    objective = make_objective(recipe, model, processor)
    figures = train(objective, recipe, folder, report)
    if int(os.environ.get("RANK", "0")) == 0:
        save(model.eval(), processor, folder / "model")
    return figures


def make_objective(recipe: Recipe, model: Kokanee, processor: Processor) -> nn.Module:
    """The objective of a recipe's stage."""
    if recipe.stage == "visual encoder":
        return VisualLabels(model, processor, recipe.seed)
    if recipe.stage == "sound encoder":
        return SoundLabels(model, processor, recipe.seed)
    return Conversations(model, processor, Mix(**recipe.data), recipe.seed)


def starting_model(name: str) -> tuple[Kokanee, Processor]:
    """The checkpoint of this name, or a fresh model of the sizes in a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return fresh_model(Path(name))
    return load(name, dtype="float32")


def fresh_model(path: Path) -> tuple[Kokanee, Processor]:
    """A model with random weights and a tokenizer trained on the world's language; the same file gives the same model."""
    settings = read_yaml(path)
    unknown = set(settings) - {"model", "processor", "tokenizer", "seed"}
    if unknown:
        raise KokaneeError(f"{path}: unknown settings {sorted(unknown)}. Known: model, processor, tokenizer, seed.")
    wanted = settings["tokenizer"]
    tokenizer = build_tokenizer(world_texts(wanted["captions"]), wanted["vocab_size"])
    processor = Processor(tokenizer, ProcessorConfig(**settings["processor"]))
    names, special = processor.config, tokenizer.get_added_vocab()
    ids = {
        "image_token_id": processor.rules.image_id,
        "video_token_id": processor.rules.video_id,
        "audio_token_id": processor.rules.audio_id,
        "vision_start_token_id": special[names.media_start_token],
        "vision_end_token_id": special[names.media_end_token],
        "pad_token_id": processor.pad_id,
        "bos_token_id": processor.pad_id,
        "eos_token_id": special[names.turn_end_token],
    }
    sizes = settings["model"]
    sizes["text_config"]["vocab_size"] = len(tokenizer)
    torch.manual_seed(settings.get("seed", 0))
    model = Kokanee(KokaneeConfig(**sizes, **ids))
    model.generation_config = GenerationConfig(eos_token_id=ids["eos_token_id"], pad_token_id=processor.pad_id)
    return model, processor


def world_texts(scenes: int) -> list[str]:
    """Captions, prompts and questions of training scenes: what the tokenizer's words are learnt from."""
    rng = random.Random("tokenizer")
    texts = [prompt for prompts in CAPTION_PROMPTS.values() for prompt in prompts]
    for index in range(scenes):
        scene = sample_scene("train", index)
        texts.append(write(exact(scene), rng))
        texts += [text for question in ask(scene, rng, 4) for text in (question.text, question.answer)]
    return texts
