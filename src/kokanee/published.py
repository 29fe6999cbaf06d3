"""The authors' video-SALMONN 2+ layout: its config and its names of weights, and ours beside them.

Their sub-configs are stored as differences from class defaults; those defaults are the defaults of `KokaneeConfig`.
Nothing is read from disk in this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from kokanee.config import AUDIO, QFORMER, ROPE, TEXT, VISION, KokaneeConfig
from kokanee.errors import KokaneeError

ARCHITECTURE = "video_SALMONN2_plus"
FIRST_PAPER_ARCHITECTURES = ("VideoSALMONN2ForCausalLM", "video_SALMONN_2", "LlavaQwenForCausalLM")

TOKEN_IDS = (
    "image_token_id",
    "video_token_id",
    "audio_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

RENAMED = (
    (r"audio\.q_tokens$", "audio.queries"),
    (r"audio\.audio_proj\.", "audio.projection."),
    (r"audio\.qformer\.bert\.embeddings\.LayerNorm\.", "audio.qformer.layernorm."),
    (
        r"audio\.qformer\.bert\.encoder\.(layer\.\d+\.(?:cross)?attention)\.self\.",
        r"audio.qformer.encoder.\1.attention.",
    ),
    (r"audio\.qformer\.bert\.encoder\.", "audio.qformer.encoder."),
    (r"audio\.(conv1|conv2|embed_positions|layers|layer_norm)\.", r"audio.encoder.\1."),
    (r"(?:model\.)?visual\.", "visual."),
    (r"model\.language_model\.", "language_model."),
    (r"model\.(embed_tokens|layers|norm)\.", r"language_model.\1."),
    (r"lm_head\.weight$", "lm_head.weight"),
)
DROPPED = ("audio.qformer.bert.embeddings.position_ids",)
"""Saved with the weights, but without effect: there are no position embeddings."""


def our_key(key: str) -> str:
    """Our name of the authors' (or Qwen2.5-VL's) weight `key`; empty if no such weight exists there."""
    for pattern, name in RENAMED:
        if match := re.match(pattern, key):
            return match.expand(name) + key[match.end() :]
    return ""


def known(given: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The part of `given` that has one of `keys`."""
    return {key: given[key] for key in keys if key in given}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters from rope_theta and rope_scaling, whose type "mrope" is a default one with sections."""
    stored = {key: value for key, value in (config.get("rope_scaling") or {}).items() if key != "type"}
    if stored.get("rope_type") == "mrope":
        stored["rope_type"] = "default"
    return {**ROPE, **known(config, ["rope_theta"]), **stored}


def kokanee_config(config: dict[str, Any]) -> KokaneeConfig:
    """The authors' config.json as a `KokaneeConfig`. Raises `KokaneeError` where it holds what we do not build."""
    audio = config.get("audio_config") or {}
    qformer = audio.get("qformer_config") or {}
    unusual = {
        "cross_attention_freq": (qformer.get("cross_attention_freq", 1), 1),
        "add_cross_attention": (qformer.get("add_cross_attention", True), True),
        "scale_embedding": (audio.get("scale_embedding", False), False),
        "encoder_width": (qformer.get("encoder_width", AUDIO["d_model"]), audio.get("d_model", AUDIO["d_model"])),
    }
    for name, (found, expected) in unusual.items():
        if found != expected:
            raise KokaneeError(
                f"The checkpoint's audio branch has {name} = {found}, where published ones have {expected}. "
                "Kokanee cannot build it."
            )
    encoder_width = audio.get("d_model", AUDIO["d_model"])
    return KokaneeConfig(
        text_config=known(config, TEXT) | {"rope_parameters": rope_parameters(config)},
        vision_config=known(config.get("vision_config") or {}, VISION),
        audio_config=known(audio, AUDIO),
        qformer_config=known(qformer, QFORMER) | {"encoder_hidden_size": encoder_width},
        n_queries=qformer.get("query_length", 1),
        window_s=audio.get("second_per_window", 0.5),
        stride_s=audio.get("second_stride", 0.5),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        **known(config, TOKEN_IDS),
    )
