"""Kokanee with random weights at two sizes, and conversations of exact lengths: what benchmarks of speed run on.

small: for two cores, in the proportions of the published 7B: a visual token costs its tower 0.4 of what it costs
the decoder in a forward pass, an audio token its encoder and Q-Former 2.6 times as much as the decoder. 7b: the
published sizes (0.4 and 2.5), in bfloat16.

Axes: L tokens; C chunks of sound, M mel bins, F mel frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kokanee.layout import Block, Rules, block_ids, position_ids
from kokanee.model import Kokanee, KokaneeConfig
from kokanee.processor import Sample
from kokanee.prompt import IGNORED

KINDS = ("text", "media")  # of prompts
NOT_TEXT = 1024  # the highest ids, which hold the places of media and end answers
HEAD, TEXT = 8, 16  # tokens before the media and around them, at least


@dataclass(frozen=True)
class Size:
    """A model's sizes, the patches (rows, columns) and seconds of a time step of its videos, what it is asked."""

    config: dict[str, Any]
    rows_columns: tuple[int, int]
    step_s: float
    dtype: torch.dtype
    checkpointing: bool
    prompts: tuple[int, ...]
    answers: tuple[int, ...]


SMALL: dict[str, Any] = {
    "text_config": {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 272,
        "num_heads": 4,
        "out_hidden_size": 384,
        "fullatt_block_indexes": [1, 3],
    },
    "audio_config": {"d_model": 160, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 640},
    "qformer_config": {
        "hidden_size": 192,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "encoder_hidden_size": 160,
    },
    "image_token_id": 4090,
    "video_token_id": 4091,
    "audio_token_id": 4092,
    "vision_start_token_id": 4093,
    "vision_end_token_id": 4094,
    "bos_token_id": 4095,
    "pad_token_id": 4095,
    "eos_token_id": 4095,
}
SIZES = {
    "small": Size(SMALL, (8, 8), 0.1, torch.float32, False, (1024, 2048, 4096), (128, 256)),
    "7b": Size({"qformer_config": {}}, (16, 20), 0.2, torch.bfloat16, True, (8192, 16384, 30000), (256,)),
}


def config_of(size: Size) -> KokaneeConfig:
    """The config, without dropout."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return KokaneeConfig(**{**size.config, "qformer_config": {**size.config["qformer_config"], **still}})


def make_model(size: Size, device: str) -> Kokanee:
    """The model, frozen; its decoder computes activations again in the backward pass where the size asks for it."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Kokanee._from_config(config_of(size), dtype=size.dtype)
    model.eval().requires_grad_(False)
    if size.checkpointing:
        model.activation_checkpointing_enable()
        model.language_model.train()  # elsewhere nothing is kept
    return model


def block_of(size: Size, prompt: int) -> Block:
    """The longest video with sound that has room in a prompt of `prompt` tokens."""
    config = config_of(size)
    rows, columns = size.rows_columns
    per_step = rows * columns // config.vision_config.spatial_merge_size**2
    n_steps = (prompt - TEXT) // per_step
    while n_steps * per_step + n_chunks(size, n_steps) * config.audio_tokens_per_chunk > prompt - TEXT:
        n_steps -= 1
    assert n_steps > 0, f"a prompt of {prompt} tokens has no room for media"
    n_audio_tokens = n_chunks(size, n_steps) * config.audio_tokens_per_chunk
    return Block("video", (n_steps, rows, columns), size.step_s, n_audio_tokens)


def n_chunks(size: Size, n_steps: int) -> int:
    """Chunks of 30 s of sound beside so many time steps."""
    return math.ceil(n_steps * size.step_s / 30)


def media_of(size: Size, prompt: int, device: str) -> Sample:
    """The raw media of such a prompt, noise: patches, their grid, and mel chunks (C, M, F)."""
    config, noise = config_of(size), torch.Generator().manual_seed(0)
    grid = block_of(size, prompt).grid_thw
    assert grid is not None
    vision, audio = config.vision_config, config.audio_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    media = {
        "pixel_values_videos": torch.randn(math.prod(grid), width, generator=noise).to(size.dtype),
        "video_grid_thw": torch.tensor([grid]),
        "input_features": torch.randn(
            n_chunks(size, grid[0]), audio.num_mel_bins, 2 * audio.max_source_positions, generator=noise
        ),
    }
    return {name: value.to(device) for name, value in media.items()}


def conversation(size: Size, prompt: int, answer: int, *, media: bool, number: int = 0) -> Sample:
    """`input_ids`, `labels` (L,) and `position_ids` (3, L): a prompt of `prompt` tokens, mostly places of media or
    all text, the same for every `number`, and an answer of `answer` tokens; random text."""
    config = config_of(size)
    rules = Rules(
        config.image_token_id, config.video_token_id, config.audio_token_id, config.vision_config.spatial_merge_size
    )
    words = config.text_config.vocab_size - NOT_TEXT
    asked_L = torch.randint(words, (prompt,), generator=torch.Generator().manual_seed(0))
    said_L = torch.randint(words, (answer,), generator=torch.Generator().manual_seed(1 + number))
    blocks = []
    if media:
        block = block_of(size, prompt)
        places_N = torch.from_numpy(block_ids(block, rules))
        asked_L[HEAD - 1], asked_L[HEAD + len(places_N)] = config.vision_start_token_id, config.vision_end_token_id
        asked_L[HEAD : HEAD + len(places_N)] = places_N
        blocks = [(HEAD, block)]
    ids_L = torch.cat([asked_L, said_L])
    return {
        "input_ids": ids_L,
        "labels": torch.cat([torch.full_like(asked_L, IGNORED), said_L]),
        "position_ids": torch.from_numpy(position_ids(ids_L.numpy(), blocks, rules)),
    }


def decoder_macs(
    config: KokaneeConfig, shared: int, answers: Sequence[int], n_logits: int, backward: bool, spared: bool = False
) -> int:
    """Multiply-adds that a pass over `[shared | answer | answer | ...]` cannot do without: of the decoder's and the
    head's matrix products, and of attention between the pairs of tokens that see each other.

    The backward pass costs a frozen weight's product once more (and none for queries, keys and values of the first
    layer, before which nothing is trained), and attention's two products four. Adapters are not counted. spared:
    the last layer makes of the shared tokens keys and values alone.
    """
    text = config.text_config
    width, layers, tokens = text.hidden_size, text.num_hidden_layers, shared + sum(answers)
    head_width = width // text.num_attention_heads
    qkv = width * (width + 2 * text.num_key_value_heads * head_width)
    weights = layers * (qkv + width * width + 3 * width * text.intermediate_size)
    pairs = shared * (shared + 1) // 2 + sum(length * shared + length * (length + 1) // 2 for length in answers)
    less = shared * (2 * width * width + 3 * width * text.intermediate_size) if spared else 0
    fewer_pairs = shared * (shared + 1) // 2 if spared else 0
    products = tokens * weights - less + n_logits * width * text.vocab_size
    attention = 2 * (pairs * layers - fewer_pairs) * width
    return products + attention + backward * (products - tokens * qkv + 2 * attention)
