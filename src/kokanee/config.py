"""The sizes of a model and the token ids that hold the places of pictures and sound."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.whisper.configuration_whisper import WhisperConfig

from kokanee.audio import tokens_per_chunk
from kokanee.errors import KokaneeError

TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "attention_dropout": 0.0,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
AUDIO = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layerdrop": 0.0,
    "activation_function": "gelu",
    "d_model": 1280,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.02,
    "scale_embedding": False,
    "max_source_positions": 1500,
}
QFORMER = {
    "hidden_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 12288,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 1,
    "encoder_hidden_size": 1280,
}
ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
DEFAULTS: dict[str, dict[str, Any]] = {
    "text_config": TEXT | {"rope_parameters": ROPE, "bos_token_id": None, "eos_token_id": None},
    "vision_config": VISION,
    "audio_config": AUDIO,
    "qformer_config": QFORMER,
}


class KokaneeConfig(PreTrainedConfig):
    """Sizes of the four parts and the ids that hold their places in a prompt.

    text_config     Qwen2.5-VL decoder
    vision_config   Qwen2.5-VL visual tower; out_hidden_size must be the decoder's hidden_size
    audio_config    Whisper encoder; 50 max_source_positions are one second of a chunk (1500: 30 s)
    qformer_config  Q-Former; encoder_hidden_size must be the encoder's d_model
    n_queries       audio tokens of one window
    window_s, stride_s  length of a window and distance of two windows, seconds

    A key left out of a sub-config that is given as a dict has its value in video-SALMONN 2+ 7B, and so has a sub-config
    left out. Raises `KokaneeError` when the sizes do not fit together, or a key is a misspelling of one of these.
    """

    model_type = "kokanee"
    sub_configs_defaults: ClassVar[Any] = {
        "text_config": Qwen2_5_VLTextConfig,
        "vision_config": Qwen2_5_VLVisionConfig,
        "audio_config": WhisperConfig,
        "qformer_config": Blip2QFormerConfig,
    }
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    part_defaults: ClassVar[dict[str, dict[str, Any]]] = DEFAULTS

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    qformer_config: Any = None
    n_queries: int = 1
    window_s: float = 0.5
    stride_s: float = 0.5
    image_token_id: int = 151655
    video_token_id: int = 151656
    audio_token_id: int = 151665
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_misspelt(kwargs, self.__dataclass_fields__)
        for name, defaults in self.part_defaults.items():
            given = getattr(self, name)
            if given is None or isinstance(given, dict):
                kind = self.sub_configs[name]
                refuse_misspelt(given or {}, {*kind.__dataclass_fields__, *kind.attribute_map})
                setattr(self, name, {**defaults, **(given or {})})
        super().__post_init__(**kwargs)
        check_sizes(self)

    @property
    def audio_tokens_per_chunk(self) -> int:
        """Audio tokens of one chunk: 60 in the published models."""
        positions = self.audio_config.max_source_positions
        return tokens_per_chunk(positions, self.window_s, self.stride_s, self.n_queries)

    @property
    def patch_sizes(self) -> dict[str, int]:
        """What the processor must know of the visual tower, by the names of its settings."""
        vision = self.vision_config
        return {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }

    def check_vision(self) -> None:
        """Raise `KokaneeError` where the tower does not fit the decoder."""
        vision, text = self.vision_config, self.text_config
        if vision.out_hidden_size != text.hidden_size:
            raise KokaneeError(
                f"vision_config.out_hidden_size is {vision.out_hidden_size}, but text_config.hidden_size is "
                f"{text.hidden_size}. Visual tokens have the decoder's width: give both the same number."
            )


def refuse_misspelt(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `KokaneeError` for a key that looks like a known one; transformers' own extra keys pass."""
    known = set(known)
    for key in set(given) - known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.9)
        if near and not key.startswith("_"):
            raise KokaneeError(f"The model's config has no key '{key}'. Did you mean '{near[0]}'?")


def check_sizes(config: KokaneeConfig) -> None:
    """Raise `KokaneeError` where two parts do not fit together."""
    text = config.text_config
    config.check_vision()
    if config.qformer_config.encoder_hidden_size != config.audio_config.d_model:
        raise KokaneeError(
            f"qformer_config.encoder_hidden_size is {config.qformer_config.encoder_hidden_size}, but "
            f"audio_config.d_model is {config.audio_config.d_model}. Give both the same number."
        )
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sections = (text.rope_parameters or {}).get("mrope_section", [16, 24, 24])
    if 2 * sum(sections) != head_size:
        raise KokaneeError(
            f"mrope_section {list(sections)} adds up to {sum(sections)}, but a head is {head_size} wide. "
            f"The three sections of text_config.rope_parameters must add up to {head_size // 2}."
        )
    tokens_per_chunk(config.audio_config.max_source_positions, config.window_s, config.stride_s, config.n_queries)
