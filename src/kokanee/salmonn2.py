"""video-SALMONN 2 of the first paper (arXiv 2410.06682): SigLIP frames with newlines, sound spread over them, Qwen2.

The same interface as `Kokanee`, whose decoder it shares: Qwen2 is Qwen2.5-VL's with three equal rows of positions.

Axes: F frames, N patches of a frame, D width of the tower, H width of the language model, R rows and columns of pooled
patches, C audio chunks, T audio tokens of a chunk, M mel bins.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization
from transformers.generation.logits_process import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.whisper.configuration_whisper import WhisperConfig

from kokanee.audio import AudioBranch
from kokanee.config import DEFAULTS, QFORMER, KokaneeConfig
from kokanee.errors import KokaneeError
from kokanee.model import Kokanee
from kokanee.salmonn2_prompt import POOLED

FRAMES_AT_ONCE = 16  # activations of all frames of a clip would be some GB
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "vision_use_head": False,
}


class Salmonn2Config(KokaneeConfig):
    """Sizes of the parts of video-SALMONN 2; see `KokaneeConfig`. A key left out has its value in the 7B model.

    vision_config   SigLIP without its last layer and its pooling head, which are not used
    zero_token_id   holds the places of zero vectors in a prompt
    """

    model_type = "kokanee_salmonn2"
    sub_configs_defaults: ClassVar[Any] = KokaneeConfig.sub_configs_defaults | {"vision_config": SiglipVisionConfig}
    part_defaults: ClassVar[dict[str, dict[str, Any]]] = DEFAULTS | {
        "text_config": DEFAULTS["text_config"] | {"max_position_embeddings": 32768},
        "vision_config": SIGLIP,
        "qformer_config": QFORMER | {"hidden_size": 768, "intermediate_size": 3072},
    }

    image_token_id: int = 151646
    video_token_id: int = 151647
    audio_token_id: int = 151648
    zero_token_id: int = 151649

    @property
    def patch_sizes(self) -> dict[str, int]:
        vision = self.vision_config
        return {"patch_size": vision.patch_size, "frame_side": vision.image_size}

    def check_vision(self) -> None:
        vision = self.vision_config
        if vision.image_size // vision.patch_size < POOLED:
            raise KokaneeError(
                f"vision_config.image_size is {vision.image_size}, with patches of {vision.patch_size}. A frame needs "
                "two rows of patches at least."
            )


class FrameTower(nn.Module):
    """Frames -> visual tokens: SigLIP, projection, the largest of each 2 x 2 patches, a newline after each row.

    `forward` takes pixels (F, 3, side, side) and returns (F * R * (R + 1), H).
    """

    def __init__(self, config: SiglipVisionConfig, out_width: int) -> None:
        super().__init__()
        self.encoder = SiglipVisionModel._from_config(config)
        unused: Any = nn.Identity()
        self.encoder.post_layernorm = unused  # the states of the last layer are used as they are
        width = config.hidden_size
        self.projection = nn.Sequential(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.newline = nn.Parameter(torch.randn(out_width) / math.sqrt(out_width))

    def pool(self, states_FND: torch.Tensor) -> torch.Tensor:
        """Projected and pooled patches, (F, R, R, H)."""
        tokens_FHN = self.projection(states_FND).transpose(1, 2)
        side = math.isqrt(tokens_FHN.shape[-1])
        return functional.max_pool2d(tokens_FHN.unflatten(-1, (side, side)), POOLED).permute(0, 2, 3, 1)

    def forward(self, pixels_FCHW: torch.Tensor) -> torch.Tensor:
        rows = []
        for some in pixels_FCHW.split(FRAMES_AT_ONCE):
            pooled_FRRH = self.pool(self.encoder(some).last_hidden_state)
            newline_FR1H = self.newline.to(pooled_FRRH.device).expand(*pooled_FRRH.shape[:2], 1, -1)
            rows.append(torch.cat([pooled_FRRH, newline_FR1H], dim=2).flatten(0, 2))
        return torch.cat(rows)


class DeepAudioBranch(AudioBranch):
    """`AudioBranch` with a norm before the Q-Former and two more layers behind it."""

    def __init__(self, audio_config: WhisperConfig, qformer_config: Blip2QFormerConfig, out_width: int, **sizes: Any):
        super().__init__(audio_config, qformer_config, out_width, **sizes)
        self.norm = nn.LayerNorm(audio_config.d_model)
        self.final = nn.Sequential(nn.Linear(out_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def align(self, states_CSD: torch.Tensor) -> torch.Tensor:
        return self.final(super().align(self.norm(states_CSD)))


class Salmonn2(Kokanee):
    """video-SALMONN 2 (arXiv 2410.06682): sees frames, hears, and writes; see `Kokanee`.

    .visual  FrameTower: SigLIP, projection, newlines
    .audio   DeepAudioBranch

    `pixel_values_videos` are the frames of the whole batch (F, 3, side, side), `audio_segments` (C,) the number of each
    chunk in its clip, `audio_repeats` (C, T) how often each audio token stands in the prompt; see `Salmonn2Processor`.
    """

    config_class = Salmonn2Config
    config: Salmonn2Config  # pyright: ignore[reportIncompatibleVariableOverride]
    visual: FrameTower  # pyright: ignore[reportIncompatibleVariableOverride]
    audio_branch: ClassVar[type[AudioBranch]] = DeepAudioBranch
    penalizes_prompts: ClassVar[bool] = False
    _no_split_modules: ClassVar[Any] = ["Qwen2_5_VLDecoderLayer", "SiglipEncoderLayer", "WhisperEncoderLayer"]

    def make_tower(self, config: KokaneeConfig) -> FrameTower:
        return FrameTower(config.vision_config, config.text_config.hidden_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FrameTower):
            width = len(module.newline)
            initialization.normal_(module.newline, mean=0.0, std=1 / math.sqrt(width))

    def encode_video(self, pixel_values_videos_FCHW: torch.Tensor, video_grid_thw: torch.Tensor) -> torch.Tensor:
        """Frames of one or more videos (F, 3, side, side) and their grids (videos, 3) -> (N, H), newlines included."""
        side = self.config.vision_config.image_size
        if tuple(pixel_values_videos_FCHW.shape[1:]) != (3, side, side):
            raise KokaneeError(
                f"Frames have shape {tuple(pixel_values_videos_FCHW.shape[1:])}, but this model sees (3, {side}, "
                f"{side}). Prepare them with the model's own processor."
            )
        return self.visual(pixel_values_videos_FCHW.to(self.visual.newline.dtype))

    def encode_images(self, pixel_values_PX: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        raise KokaneeError("video-SALMONN 2 takes videos and sound, no images.")

    def encode_audio(
        self,
        input_features_CMF: torch.Tensor,
        audio_segments_C: torch.Tensor | None = None,
        audio_repeats_CT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mel chunks -> (N, H): audio tokens as often as they stand in the prompt. Without numbers and repeats the
        chunks are those of one clip, and each token stands once."""
        tokens_CTH = self.audio(input_features_CMF)
        if audio_segments_C is None:
            audio_segments_C = torch.arange(len(tokens_CTH), device=tokens_CTH.device)
        positions_CH = segment_positions(audio_segments_C.to(tokens_CTH.device), tokens_CTH.shape[-1])
        tokens_NH = (tokens_CTH + positions_CH[:, None].to(tokens_CTH.dtype)).flatten(0, 1)
        if audio_repeats_CT is None:
            return tokens_NH
        return tokens_NH.repeat_interleave(audio_repeats_CT.to(tokens_NH.device).flatten(), dim=0)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        **kwargs: Any,
    ) -> Any:
        """See transformers. A penalty of repetitions counts what was generated alone, as in the published code, whose
        prompts are embeddings."""
        given = (generation_config or self.generation_config).repetition_penalty
        penalty, prompt = kwargs.get("repetition_penalty") or given or 1.0, kwargs.get("input_ids", inputs)
        if penalty != 1.0 and prompt is not None:
            said = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=prompt.shape[1])
            logits_processor = LogitsProcessorList([said, *(logits_processor or [])])
            kwargs["repetition_penalty"] = 1.0
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def embed(self, input_ids_BL: torch.Tensor, **media: torch.Tensor | None) -> torch.Tensor:
        """See `Kokanee.embed`; the places of zeros hold zeros."""
        zero_BL1 = (input_ids_BL == self.config.zero_token_id)[..., None]
        return super().embed(input_ids_BL, **media).masked_fill(zero_BL1, 0.0)


def segment_positions(segments_C: torch.Tensor, width: int) -> torch.Tensor:
    """What is added to all audio tokens of a chunk, by its number in its clip: (C, width) float32. Zeros for the first;
    for number s, sines and cosines of (s - 1) / 10000^(2k / width) in turn."""
    rates_K = 10000.0 ** (-torch.arange(0, width, 2, device=segments_C.device, dtype=torch.float32) / width)
    angles_CK = (segments_C[:, None] - 1) * rates_K
    waves_CH = torch.stack([angles_CK.sin(), angles_CK.cos()], dim=-1).flatten(1)
    return torch.where(segments_C[:, None] > 0, waves_CH, 0.0)


def refuse_salmonn2(model: Kokanee) -> None:
    """Raise `KokaneeError` for a video-SALMONN 2, where features of the world's clips are made or learnt from."""
    if isinstance(model, Salmonn2):
        raise KokaneeError(
            "Kokanee makes features of the world's clips for video-SALMONN 2+ alone, and this is a video-SALMONN 2. "
            "Train it on files: data with videos and captions (docs/own.md)."
        )
