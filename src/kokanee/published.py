"""The authors' layouts, of video-SALMONN 2+ and of video-SALMONN 2: configs and names of weights, and ours beside them.

Sub-configs of 2+ are stored as differences from class defaults; those defaults are the defaults of `KokaneeConfig`. The
config of 2 does not say how large the encoders are; the published sizes are the defaults of `Salmonn2Config`.
Nothing is read from disk in this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from kokanee.config import AUDIO, QFORMER, ROPE, TEXT, VISION, KokaneeConfig
from kokanee.errors import KokaneeError
from kokanee.salmonn2 import SIGLIP, Salmonn2Config

ARCHITECTURE = "video_SALMONN2_plus"
SALMONN2_ARCHITECTURE, SALMONN2_TYPE = "VideoSALMONN2ForCausalLM", "video_salmonn_2"

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

QFORMER_RENAMED = (
    (r"embeddings\.LayerNorm\.", "audio.qformer.layernorm."),
    (r"encoder\.(layer\.\d+\.(?:cross)?attention)\.self\.", r"audio.qformer.encoder.\1.attention."),
    (r"encoder\.", "audio.qformer.encoder."),
)
RENAMED = (
    (r"audio\.q_tokens$", "audio.queries"),
    (r"audio\.audio_proj\.", "audio.projection."),
    *((rf"audio\.qformer\.bert\.{pattern}", name) for pattern, name in QFORMER_RENAMED),
    (r"audio\.(conv1|conv2|embed_positions|layers|layer_norm)\.", r"audio.encoder.\1."),
    (r"(?:model\.)?visual\.", "visual."),
    (r"model\.language_model\.", "language_model."),
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "visual.encoder."),
    (r"model\.mm_projector\.", "visual.projection."),
    (r"model\.image_newline$", "visual.newline"),
    (r"speech_encoder\.", "audio.encoder."),
    (r"speech_query_tokens$", "audio.queries"),
    *((rf"speech_Qformer\.bert\.{pattern}", name) for pattern, name in QFORMER_RENAMED),
    (r"speech_llama_proj\.", "audio.projection."),
    (r"ln_speech\.", "audio.norm."),
    (r"final_linear\.", "audio.final."),
    (r"model\.(embed_tokens|layers|norm)\.", r"language_model.\1."),
    (r"lm_head\.weight$", "lm_head.weight"),
)
DROPPED = (
    "audio.qformer.bert.embeddings.position_ids",
    "speech_Qformer.bert.embeddings.position_ids",
    "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
    "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
)
"""Saved with the weights, but without effect: there are no position embeddings, and SigLIP's last norm is not used."""


def our_key(key: str) -> str:
    """Our name of the authors' (or Qwen2.5-VL's) weight `key`, of either layout; empty if none is called so."""
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


SALMONN2_FIXED = {
    "mm_pooling_position": "after",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "max",
    "mm_spatial_pool_stride": 2,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "use_final_linear": True,
    "window_level_Qformer": True,
}
"""What Kokanee builds of the settings of video-SALMONN 2."""
SALMONN2_PARTS = {"siglip_vision": SIGLIP, "whisper_encoder": AUDIO, "speech_qformer": QFORMER}


def salmonn2_config(
    config: dict[str, Any], settings: dict[str, Any], parts: dict[str, Any], token_ids: dict[str, Any]
) -> Salmonn2Config:
    """The config.json of a video-SALMONN 2 as a `Salmonn2Config`.

    `settings` are its `model_args`. `parts` are sizes of encoders other than the published, by the names of
    `SALMONN2_PARTS`; SigLIP's layers are counted as its own config does, one more than there are. `token_ids` are those
    that hold the places of media, and padding. Raises `KokaneeError` where the config holds what we do not build.
    """
    for name, expected in SALMONN2_FIXED.items():
        if settings.get(name, expected) != expected:
            raise KokaneeError(
                f"The checkpoint has {name} = {settings[name]!r}, where published ones have {expected!r}. "
                "Kokanee cannot build it."
            )
    siglip, whisper, qformer = (known(parts.get(name) or {}, sizes) for name, sizes in SALMONN2_PARTS.items())
    if "num_hidden_layers" in siglip:
        siglip["num_hidden_layers"] -= 1
    heads = config.get("num_attention_heads", TEXT["num_attention_heads"])
    half = config.get("hidden_size", TEXT["hidden_size"]) // heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # of no effect: all rows are equal
    return Salmonn2Config(
        text_config=known(config, TEXT) | {"rope_parameters": rope_parameters(config) | {"mrope_section": sections}},
        vision_config=siglip,
        audio_config=whisper,
        qformer_config=qformer | {"encoder_hidden_size": whisper.get("d_model", AUDIO["d_model"])},
        n_queries=settings.get("num_speech_query_token", 1),
        window_s=settings.get("second_per_window", 0.5),
        stride_s=settings.get("second_stride", 0.5),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        **known(config, TOKEN_IDS) | token_ids,
    )
