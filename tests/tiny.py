"""A tiny model with a tokenizer of its own, for laws that hold at every size."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from kokanee.model import Kokanee, KokaneeConfig
from kokanee.processor import Processor, ProcessorConfig, Sample
from kokanee.prompt import Turn
from kokanee.salmonn2 import Salmonn2, Salmonn2Config
from kokanee.salmonn2_prompt import ZERO_TOKEN, Salmonn2Processor, Salmonn2ProcessorConfig
from kokanee.tokenizer import build_tokenizer

WIDTH = 64
SETTINGS: dict[str, Any] = {
    "min_frames": 2,
    "max_frames": 8,
    "merge_size": 4,
    "min_frame_pixels": 56 * 56,
    "max_frame_pixels": 56 * 56,
    "min_pixels": 56 * 56,
    "max_pixels": 56 * 56,
    "spread_pixels": False,
    "n_mels": 16,
    "chunk_s": 2,
}
SALMONN2_SETTINGS: dict[str, Any] = {"frame_side": 56, "interval_s": 0.5, "max_frames": 8, "n_mels": 16, "chunk_s": 2}


@cache
def tiny_processor() -> Processor:
    return Processor(build_tokenizer(["a dog barks twice .", "what happens ?"], 300), ProcessorConfig(**SETTINGS))


def tiny_config(**changes: Any) -> KokaneeConfig:
    processor = tiny_processor()
    added = processor.tokenizer.get_added_vocab()
    sizes: dict[str, Any] = {
        "text_config": {
            "vocab_size": len(processor.tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "spatial_merge_size": 4,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "num_mel_bins": SETTINGS["n_mels"],
            "max_source_positions": 50 * SETTINGS["chunk_s"],
        },
        "qformer_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "encoder_hidden_size": 32,
        },
        "vision_start_token_id": added["<|vision_start|>"],
        "vision_end_token_id": added["<|vision_end|>"],
        "bos_token_id": added["<|endoftext|>"],
        "pad_token_id": added["<|endoftext|>"],
        "eos_token_id": added["<|im_end|>"],
    }
    sizes |= {f"{kind}_token_id": added[f"<|{kind}_pad|>"] for kind in ("image", "video", "audio")}
    return KokaneeConfig(**{**sizes, **changes})


@cache
def salmonn2_processor() -> Salmonn2Processor:
    """A processor of the first paper's video-SALMONN 2, with chunks of sound of 2 s and frames of 4 x 4 patches."""
    tokenizer = build_tokenizer(["a dog barks twice .", "what happens ?"], 301)
    tokenizer.add_tokens([ZERO_TOKEN], special_tokens=True)
    return Salmonn2Processor(tokenizer, Salmonn2ProcessorConfig(**SALMONN2_SETTINGS))


def salmonn2_model(seed: int = 0) -> Salmonn2:
    """A video-SALMONN 2 in evaluation mode; weights are larger than at the start of training."""
    processor, sizes = salmonn2_processor(), tiny_config().to_dict()
    known = {name: sizes[name] for name in ("text_config", "audio_config", "qformer_config")}
    known["text_config"]["vocab_size"] = len(processor.tokenizer)
    siglip = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {f"{name}_token_id": processor.tokenizer.get_added_vocab()["<|im_end|>"] for name in ("eos", "bos")}
    torch.manual_seed(seed)
    ids: dict[str, Any] = {**processor.place_ids, **ends, "pad_token_id": processor.pad_id}
    model = Salmonn2(Salmonn2Config(vision_config=siglip | {"image_size": 56}, **known, **ids))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(4)
    return model.eval()


def tiny_model(seed: int = 0, **changes: Any) -> Kokanee:
    """A model in evaluation mode; weights are larger than at the start of training, so that differences show."""
    torch.manual_seed(seed)
    model = Kokanee(tiny_config(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed_positions" not in name:
                weight.mul_(4)
    return model.eval()


def tiny_sample(kind: str, answer: str | None = None, seed: int = 0) -> Sample:
    """One sample of kind "av", "video", "audio", "image" or "text", open unless it has an answer."""
    processor, random = tiny_processor(), np.random.default_rng(seed)
    pictures = list(random.integers(0, 256, (4 + 2 * seed, 56, 56, 3), dtype=np.uint8))
    sound = random.normal(0, 0.1, 48000).astype(np.float32)
    turns = [Turn("user", "what happens ?")] + ([Turn("assistant", answer)] if answer else [])
    if kind == "image":
        return processor.prepare(pictures[0], turns)
    if kind == "text":
        return processor.prepare(None, turns)
    clip = processor.make_clip(None if kind == "audio" else pictures, 4.0, None if kind == "video" else sound)
    return processor.prepare(clip, turns)
