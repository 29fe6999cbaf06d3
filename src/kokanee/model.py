"""The audio-visual language model: embeddings of pictures and sound scattered into a Qwen2.5-VL text decoder.

Axes: B batch, L sequence, D or H width of the language model, V vocabulary, N tokens of one medium over the whole
batch (in sample order), P patches, C audio chunks, M mel bins, F mel frames. The leading 3 of positions is time,
height, width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)

from kokanee.attention import SEGMENT_ATTENTION
from kokanee.audio import AudioBranch
from kokanee.config import KokaneeConfig
from kokanee.errors import KokaneeError
from kokanee.prompt import IGNORED

__all__ = ["IGNORED", "Kokanee", "KokaneeConfig"]

MEDIA = ("image", "video", "audio")
PIXEL_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "input_features")
SPREAD_INPUTS = ("audio_segments", "audio_repeats")
EMBED_INPUTS = ("image_embeds", "video_embeds", "audio_embeds")
MEDIA_INPUTS = (*PIXEL_INPUTS, *SPREAD_INPUTS, *EMBED_INPUTS)


class PatchProjection(nn.Conv3d):
    """The tower's patch embedding as the matrix product that it is: its patches do not overlap, and each comes alone.

    A 3-D convolution of the same numbers takes about four times as long on a CPU, in bfloat16 seventeen times.
    """

    def forward(self, patches_PCTHW: torch.Tensor) -> torch.Tensor:
        embeds_PD = functional.linear(patches_PCTHW.flatten(1), self.weight.flatten(1), self.bias)
        return embeds_PD[..., None, None, None]

    @classmethod
    def like(cls, conv: nn.Conv3d) -> PatchProjection:
        """One of the same sizes, with fresh weights."""
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        return cls(*sizes, bias=conv.bias is not None)  # pyright: ignore[reportArgumentType]


class Kokanee(PreTrainedModel, GenerationMixin):
    """video-SALMONN 2+ (arXiv 2506.15220): sees, hears and writes.

    .visual          Qwen2.5-VL tower, frames -> visual tokens
    .audio           AudioBranch, mel chunks -> audio tokens
    .language_model  Qwen2.5-VL decoder with three-dimensional positions
    .lm_head         width -> vocabulary

    `forward` takes a batch made by `Processor.collate`: input_ids, attention_mask (B, L), position_ids (3, B, L) and
    labels (B, L; -100 = ignored), and the media of the whole batch in sample order, raw or as embeddings (N, H).
    `.loss` (with labels) is the mean cross-entropy over the label tokens. `.logits` is (B, L, V); with
    `logits_to_keep=k` only of the last k positions, with a tensor of indices only of those. With labels and no
    `logits_to_keep`, logits are made at label positions alone and `.logits` is None; `logits_to_keep=0` asks for all.
    `KokaneeError` is raised where placeholders and media disagree, or media come without positions.

    `generate` continues each prompt's positions from its last token, in all three rows, as in training.
    """

    config_class = KokaneeConfig
    config: KokaneeConfig
    visual: Qwen2_5_VisionTransformerPretrainedModel
    audio: AudioBranch
    language_model: Qwen2_5_VLTextModel
    lm_head: nn.Linear
    audio_branch: ClassVar[type[AudioBranch]] = AudioBranch
    penalizes_prompts: ClassVar[bool] = True
    """Whether a penalty of repetitions counts the words of the prompt, as where this model was published."""
    base_model_prefix = ""
    input_modalities: ClassVar = ["image", "video", "audio", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _no_split_modules: ClassVar[Any] = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "WhisperEncoderLayer"]
    _tied_weights_keys: ClassVar = {"lm_head.weight": "language_model.embed_tokens.weight"}

    def __init__(self, config: KokaneeConfig) -> None:
        super().__init__(config)
        self.visual = self.make_tower(config)
        self.audio = self.audio_branch(
            config.audio_config,
            config.qformer_config,
            config.text_config.hidden_size,
            window_s=config.window_s,
            stride_s=config.stride_s,
            n_queries=config.n_queries,
        )
        self.language_model = Qwen2_5_VLTextModel._from_config(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def make_tower(self, config: KokaneeConfig) -> Any:
        """The visual encoder, with fresh weights."""
        # Its own copy of the config, as the name of its attention means nothing to other models.
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(copy.deepcopy(config.vision_config))
        if tower.config._attn_implementation == "sdpa":
            tower.config._attn_implementation = SEGMENT_ATTENTION
        tower.patch_embed.proj = PatchProjection.like(tower.patch_embed.proj)
        return tower

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AudioBranch):
            initialization.normal_(module.queries, mean=0.0, std=module.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def encode_video(self, pixel_values_videos_PX: torch.Tensor, video_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches of one or more videos (P, 3 * 2 * patch * patch) and their grids (videos, 3) -> (N, H)."""
        patches_PX = pixel_values_videos_PX.to(self.visual.patch_embed.proj.weight.dtype)
        return self.visual(patches_PX, grid_thw=video_grid_thw).pooler_output

    def encode_images(self, pixel_values_PX: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches of one or more images and their grids (images, 3) -> (N, H)."""
        return self.encode_video(pixel_values_PX, image_grid_thw)

    def encode_audio(
        self,
        input_features_CMF: torch.Tensor,
        audio_segments_C: torch.Tensor | None = None,
        audio_repeats_CT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mel chunks (C, M, F) -> (N, H), N = C * tokens per chunk. The others belong to `salmonn2.Salmonn2`."""
        if audio_segments_C is not None or audio_repeats_CT is not None:
            raise KokaneeError("This model does not spread sound over frames. Prepare it with its own processor.")
        return self.audio(input_features_CMF).flatten(0, 1)

    def encode_media(
        self,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_segments: torch.Tensor | None = None,
        audio_repeats: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        video_embeds: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run the encoders whose input is given: {"image_embeds" | "video_embeds" | "audio_embeds": (N, H)}.

        Embeddings that were computed before are passed through; giving both raises `KokaneeError`.
        """
        for raw, ready, name in (
            (pixel_values, image_embeds, "image"),
            (pixel_values_videos, video_embeds, "video"),
            (input_features, audio_embeds, "audio"),
        ):
            if raw is not None and ready is not None:
                raise KokaneeError(f"Both raw {name} input and {name}_embeds were given. Give one of them.")
        if pixel_values is not None:
            image_embeds = self.encode_images(pixel_values, need_grid(image_grid_thw, "image_grid_thw"))
        if pixel_values_videos is not None:
            video_embeds = self.encode_video(pixel_values_videos, need_grid(video_grid_thw, "video_grid_thw"))
        if input_features is not None:
            audio_embeds = self.encode_audio(input_features, audio_segments, audio_repeats)
        found = {"image_embeds": image_embeds, "video_embeds": video_embeds, "audio_embeds": audio_embeds}
        return {name: embeds for name, embeds in found.items() if embeds is not None}

    def placeholder_id(self, medium: str) -> int:
        """The token id that holds the place of one "image", "video" or "audio" token."""
        return getattr(self.config, f"{medium}_token_id")

    def embed(self, input_ids_BL: torch.Tensor, **media: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings (B, L, H) with the media's tokens in their places.

        `media` are the arguments of `encode_media`. Raises `KokaneeError` when the number of placeholders of a
        medium is not the number of its tokens.
        """
        embeds_BLH = self.get_input_embeddings()(input_ids_BL)
        encoded = self.encode_media(**media)
        for medium in MEDIA:
            media_NH = encoded.get(f"{medium}_embeds")
            place_BL = input_ids_BL == self.placeholder_id(medium)
            n_places = int(place_BL.sum())
            n_tokens = 0 if media_NH is None else media_NH.shape[0]
            if n_places != n_tokens:
                raise KokaneeError(
                    f"The prompt has {n_places} {medium} placeholders (id {self.placeholder_id(medium)}), but there "
                    f"are {n_tokens} {medium} tokens. Prepare prompt and media together with the model's processor."
                )
            if media_NH is not None and n_tokens:
                media_NH = media_NH.to(embeds_BLH.device, embeds_BLH.dtype)
                embeds_BLH = embeds_BLH.masked_scatter(place_BL[..., None], media_NH)
        return embeds_BLH

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_segments: torch.Tensor | None = None,
        audio_repeats: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        video_embeds: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Loss and logits of a batch; see the class. Extra arguments reach the decoder's attention."""
        media = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "input_features": input_features,
            "audio_segments": audio_segments,
            "audio_repeats": audio_repeats,
            "image_embeds": image_embeds,
            "video_embeds": video_embeds,
            "audio_embeds": audio_embeds,
        }
        if inputs_embeds is None:
            started = past_key_values is not None and past_key_values.get_seq_length() > 0
            inputs_embeds = self.embed_step(input_ids, started, position_ids, media)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BLD = outputs.last_hidden_state
        loss = None if labels is None else self.label_loss(hidden_BLD, labels)
        logits = None
        if labels is None or logits_to_keep is not None:
            logits = self.lm_head(kept(hidden_BLD, 0 if logits_to_keep is None else logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def embed_step(
        self,
        input_ids_BL: torch.Tensor | None,
        started: bool,
        position_ids_3BL: torch.Tensor | None,
        media: dict[str, torch.Tensor | None],
    ) -> torch.Tensor:
        """Embeddings of a prompt with its media, or of tokens that come after it (`started`)."""
        if input_ids_BL is None:
            raise KokaneeError("Neither input_ids nor inputs_embeds were given. Give one of them.")
        has_media = any(value is not None for value in media.values())
        if has_media and position_ids_3BL is None:
            raise KokaneeError(
                "Pictures or sound were given without position_ids. Pass the positions that the processor made."
            )
        if started and not has_media:
            # A token generated after the prompt is never a placeholder, whatever its id.
            return self.get_input_embeddings()(input_ids_BL)
        return self.embed(input_ids_BL, **media)

    def label_loss(self, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over labels that are not -100; the state before a label predicts it."""
        targets_BL = labels_BL[:, 1:]
        counted_BL = targets_BL != IGNORED
        logits_NV = self.lm_head(hidden_BLD[:, :-1][counted_BL])
        return functional.cross_entropy(logits_NV.float(), targets_BL[counted_BL])

    if TYPE_CHECKING:  # the mixin types `self` by a protocol that no model of transformers fulfils

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """One step's arguments of `forward`: media enter at the prefill only, unless there is no cache."""
        prepared = super().prepare_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        inputs = prepared(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in MEDIA_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Several answers to a prompt: media are encoded once, and their tokens repeated sample by sample."""
        if expand_size > 1 and input_ids is not None:
            media = {name: model_kwargs.pop(name, None) for name in MEDIA_INPUTS}
            encoded = self.encode_media(**media)
            for medium in MEDIA:
                if f"{medium}_embeds" in encoded:
                    counts = (input_ids == self.placeholder_id(medium)).sum(dim=1).tolist()
                    encoded[f"{medium}_embeds"] = repeat_samples(encoded[f"{medium}_embeds"], counts, expand_size)
        else:
            encoded = {}
        expanded = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        input_ids, model_kwargs = expanded(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return input_ids, {**model_kwargs, **encoded}


def kept(hidden_BLD: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """The last `positions` states (0: all), or those at a tensor of indices."""
    if isinstance(positions, int):
        return hidden_BLD[:, -positions:] if positions else hidden_BLD
    return hidden_BLD[:, positions]


def need_grid(grid_thw: torch.Tensor | None, name: str) -> torch.Tensor:
    """`grid_thw`, or a `KokaneeError` when patches came without it."""
    if grid_thw is None:
        raise KokaneeError(f"Patches were given without {name}, their numbers of steps, rows and columns. Pass both.")
    return grid_thw


def repeat_samples(tokens_NH: torch.Tensor, counts: list[int], times: int) -> torch.Tensor:
    """Repeat each sample's tokens `times` times in a row; `counts` are the tokens of every sample."""
    if sum(counts) != tokens_NH.shape[0]:
        raise KokaneeError(
            f"The prompts hold places for {sum(counts)} tokens, but the encoder made {tokens_NH.shape[0]}. "
            "Prepare prompt and media together with the model's processor."
        )
    return torch.cat([sample.repeat(times, 1) for sample in tokens_NH.split(counts)])
