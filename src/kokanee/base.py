"""An audio-ready base: a Qwen2.5-VL that sees, a Whisper encoder that hears, and a fresh Q-Former between them.

The first stage of training (audio alignment) starts from it. Qwen2.5-VL may be stored in its old layout (`visual.*`,
`model.*`) or in that of transformers 5 (`model.visual.*`, `model.language_model.*`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.whisper.configuration_whisper import WhisperConfig

from kokanee.audio import STATES_PER_S
from kokanee.config import AUDIO, TEXT, VISION, KokaneeConfig
from kokanee.errors import KokaneeError
from kokanee.formats import read_json
from kokanee.model import Kokanee
from kokanee.processor import Processor, ProcessorConfig
from kokanee.published import our_key
from kokanee.tokenizer import AUDIO_TOKEN, load_tokenizer
from kokanee.weights import (
    Rename,
    check_keys,
    empty_model,
    fill,
    finish,
    listed,
    put,
    stored_shapes,
    stored_type,
    weight_files,
)

logger = logging.getLogger("kokanee")

PREPROCESSOR = "preprocessor_config.json"
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_token_id": AUDIO_TOKEN,
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "bos_token_id": "<|endoftext|>",
    "pad_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}


def make_base(
    qwen_folder: Path,
    whisper_folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    qformer: dict[str, Any] | None = None,
    n_queries: int = 1,
    window_s: float = 0.5,
    stride_s: float = 0.5,
) -> tuple[Kokanee, Processor]:
    """Join the two folders; the same `seed` gives the same Q-Former. `qformer` holds sizes other than the published.

    If the tokenizer has no `<|audio_pad|>`, it is added as an ordinary token, and the embeddings grow if they must.
    Raises `KokaneeError` if a folder is something else, or a weight is missing or left over.
    """
    qwen: Any = qwen_config(qwen_folder)
    whisper = whisper_config(whisper_folder)
    tokenizer, token_ids = with_audio_token(load_tokenizer(qwen_folder))
    config = KokaneeConfig(
        text_config={key: getattr(qwen.text_config, key) for key in TEXT}
        | {"rope_parameters": dict(qwen.text_config.rope_parameters)},
        vision_config={key: getattr(qwen.vision_config, key) for key in VISION},
        audio_config={key: getattr(whisper, key) for key in AUDIO},
        qformer_config={"encoder_hidden_size": whisper.d_model, **(qformer or {})},
        n_queries=n_queries,
        window_s=window_s,
        stride_s=stride_s,
        tie_word_embeddings=qwen.tie_word_embeddings,
        **token_ids,
    )
    model = empty_model(config)
    dtype = dtype or stored_type(weight_files(qwen_folder))
    fill_part(model, qwen_folder, our_key, dtype, ("visual.", "language_model.", "lm_head."))
    fill_part(model, whisper_folder, whisper_key, dtype, ("audio.encoder.",))
    make_fresh(model, dtype, seed)
    model = finish(model)
    grow(model, len(tokenizer))
    model.generation_config.eos_token_id = [config.eos_token_id, config.pad_token_id]
    return model, Processor(tokenizer, processor_config(qwen_folder, config))


def with_audio_token(tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with `<|audio_pad|>`, an ordinary token as published, and the ids that `KokaneeConfig` asks for."""
    if AUDIO_TOKEN not in tokenizer.get_added_vocab():
        token = AddedToken(AUDIO_TOKEN, normalized=True, special=False)
        tokenizer.add_tokens([token])
    ids = tokenizer.get_added_vocab()
    absent = [name for name in TOKENS.values() if name not in ids]
    if absent:
        raise KokaneeError(f"The tokenizer lacks {listed(absent)}. Give a Qwen2.5-VL with its own tokenizer.")
    return tokenizer, {key: ids[name] for key, name in TOKENS.items()}


def qwen_config(folder: Path) -> Qwen2_5_VLConfig:
    """The config of a plain Qwen2.5-VL; `KokaneeError` if the folder holds another model."""
    stored = read_json(folder / "config.json")
    if stored.get("model_type") != "qwen2_5_vl" or stored.get("audio_config"):
        raise KokaneeError(
            f"{folder} holds a model of type {stored.get('model_type')!r}"
            f"{' that already hears' if stored.get('audio_config') else ''}. Give a plain Qwen2.5-VL."
        )
    return Qwen2_5_VLConfig.from_dict(stored)


def whisper_config(folder: Path) -> WhisperConfig:
    """The config of a Whisper; `KokaneeError` if the folder holds another model."""
    stored = read_json(folder / "config.json")
    if stored.get("model_type") != "whisper":
        raise KokaneeError(f"{folder} holds a model of type {stored.get('model_type')!r}. Give a Whisper.")
    return WhisperConfig.from_dict(stored)


def whisper_key(key: str) -> str:
    """Our name of a weight of a Whisper encoder."""
    return f"audio.{key.removeprefix('model.')}"


def fill_part(model: Kokanee, folder: Path, rename: Rename, dtype: torch.dtype, prefixes: tuple[str, ...]) -> None:
    """Fill the weights of `model` that begin with `prefixes` from `folder`, strictly."""
    files = weight_files(folder)
    tied = model.config.tie_word_embeddings
    expected = {
        name: tuple(weight.shape)
        for name, weight in model.named_parameters(remove_duplicate=False)
        if name.startswith(prefixes) and not (tied and name.startswith("lm_head."))
    }
    unused = ("model.decoder.", "decoder.", "proj_out.") if rename is whisper_key else ("lm_head.",) if tied else ()
    names = check_keys(
        expected, stored_shapes(files), rename, lambda key: bool(unused) and key.startswith(unused), str(folder)
    )
    fill(model, files, names, dtype)


def make_fresh(model: Kokanee, dtype: torch.dtype, seed: int) -> None:
    """Fill what is still empty as the published base does: normal weights, zero biases, unit norms."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.qformer_config.initializer_range
    for name, weight in list(model.audio.named_parameters()):
        if not weight.is_meta:
            continue
        if name.endswith(".bias"):
            fresh = torch.zeros(weight.shape)
        elif "norm" in name.lower():
            fresh = torch.ones(weight.shape)
        else:
            fresh = torch.empty(weight.shape).normal_(std=std, generator=generator)
        put(model.audio, name, fresh.to(dtype))


def grow(model: Kokanee, n_tokens: int) -> None:
    """Add rows to the embeddings until every token id has one; new rows are the mean of the old."""
    old = model.config.text_config.vocab_size
    if n_tokens <= old:
        return
    logger.info("the embeddings grow from %d to %d rows for new tokens", old, n_tokens)
    embeddings: Any = model.get_input_embeddings()
    for module in (embeddings, model.lm_head):
        weight_VD = module.weight.data
        rows = weight_VD.float().mean(0, keepdim=True).to(weight_VD.dtype).expand(n_tokens - old, -1)
        module.weight = torch.nn.Parameter(torch.cat([weight_VD, rows]))
    embeddings.num_embeddings = model.lm_head.out_features = n_tokens
    model.language_model.vocab_size = model.config.text_config.vocab_size = n_tokens
    model.tie_weights()


def processor_config(qwen_folder: Path, config: KokaneeConfig) -> ProcessorConfig:
    """The published settings, with the sizes of this model and the pixel statistics of its Qwen2.5-VL."""
    stored = read_json(qwen_folder / PREPROCESSOR) if (qwen_folder / PREPROCESSOR).is_file() else {}
    statistics = {
        ours: stored[name]
        for name, ours in (("image_mean", "pixel_mean"), ("image_std", "pixel_std"))
        if name in stored
    }
    return ProcessorConfig(
        patch_size=config.vision_config.patch_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        n_mels=config.audio_config.num_mel_bins,
        chunk_s=config.audio_config.max_source_positions // STATES_PER_S,
        window_s=config.stride_s / config.n_queries,
        **statistics,
    )
