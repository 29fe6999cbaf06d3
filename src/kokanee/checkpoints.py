"""Checkpoints: Kokanee's own folders, the authors' (2+ and 2), hub names, adapters, and fresh bases.

Own folder: config.json, generation_config.json, model.safetensors (or shards with an index), processor.json and the
tokenizer's files. Everything is loaded strictly: each stored weight is used or named as left out, each weight of the
model is found or named as missing.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from kokanee import published
from kokanee.adapters import ADAPTER_CONFIG, load_adapter, merge
from kokanee.base import make_base
from kokanee.errors import KokaneeError
from kokanee.formats import READABLE, UNFINISHED, read_json
from kokanee.model import Kokanee, KokaneeConfig
from kokanee.processor import CONFIG_FILE, Processor
from kokanee.salmonn2 import Salmonn2Config
from kokanee.salmonn2_prompt import Salmonn2Processor, published_args, published_parts
from kokanee.weights import (
    Device,
    check_keys,
    empty_model,
    fill,
    finish,
    listed,
    placed,
    read_tensors,
    stored_shapes,
    stored_type,
    weight_files,
)

__all__ = ["assemble", "convert", "load", "load_adapter", "locate", "merge", "save"]

CONFIG = "config.json"
EMBEDDED = ("nano", "nano-sft")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DOWNLOADED = ["*.safetensors", "*.json", "*.txt"]
Layout = Literal["kokanee", "salmonn2plus", "salmonn2", "adapter"]
Type = torch.dtype | str | None
OWN_TYPES = (KokaneeConfig.model_type, Salmonn2Config.model_type)


def load(
    name_or_folder: str | Path,
    *,
    dtype: Type = None,
    device: Device = "cpu",
    base: str | Path | None = None,
    attention: str = "sdpa",
    **processor_settings: Any,
) -> tuple[Kokanee, Processor]:
    """The model (in evaluation mode) and the processor of a checkpoint.

    `name_or_folder`: "nano" or "nano-sft", a Kokanee folder, a folder in the authors' layout of video-SALMONN 2+ or of
    video-SALMONN 2, a folder with a LoRA adapter (merged into `base`, or into the base that it names), or the hub's
    name of any of these.
    `dtype`: "bfloat16", torch.float32, ...; None keeps the stored type. `device`: one, "auto" to spread the model over
    all accelerators, or a map from beginnings of names to devices. `processor_settings` replace single settings of
    the processor. Raises `KokaneeError` for anything else, saying what was found.
    """
    folder = locate(name_or_folder)
    layout = identify(folder)
    below = base_of(folder, base)
    if below is not None:
        if layout != "adapter":
            raise KokaneeError(f"{folder} is a whole model, not an adapter, so it needs no base. Leave `base` out.")
        model, processor = load(below, dtype=dtype, device=device, attention=attention, **processor_settings)
        return merge(load_adapter(model, folder)), processor
    kind = Salmonn2Processor if is_salmonn2(folder, layout) else Processor
    processor = kind.from_pretrained(folder, **processor_settings)
    config = ours(folder, processor) if layout == "kokanee" else theirs(folder, processor)
    model = load_weights(folder, config, layout, as_type(dtype), device, attention)
    check_tokens(model.config, processor)
    return model, processor


def locate(name_or_folder: str | Path) -> Path:
    """The folder of a checkpoint: itself, one of `EMBEDDED`, or a download of a hub name. Else `KokaneeError`."""
    if str(name_or_folder) in EMBEDDED:
        return Path(str(importlib.resources.files("kokanee"))) / str(name_or_folder)
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() or not HUB_NAME.fullmatch(str(name_or_folder)):
        kind = "a file" if folder.is_file() else "not a folder here"
        raise KokaneeError(
            f"{name_or_folder} is {kind}, and no name of a model. Give a checkpoint's folder, "
            f"{' or '.join(EMBEDDED)}, or a hub name such as tsinghua-ee/video-SALMONN2_plus_7B_full."
        )
    try:
        found = snapshot_download(str(name_or_folder), allow_patterns=DOWNLOADED, ignore_patterns=["*.fp32*", "*/*"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KokaneeError(
            f"There is no folder {name_or_folder}, and the hub did not give a model of this name ({reason}). "
            "Check the name and the connection, or download the checkpoint elsewhere and give its folder."
        ) from error
    return Path(found)


def identify(folder: Path) -> Layout:
    """Which layout `folder` has. Raises `KokaneeError`, saying what was found, for one that cannot be loaded."""
    if is_adapter(folder):
        return "adapter"
    if not (folder / CONFIG).is_file():
        inside = folder / "model"
        remedy = f"Give {inside}." if (inside / CONFIG).is_file() else "Give the folder of a checkpoint."
        names = sorted(path.name for path in folder.iterdir())
        raise KokaneeError(f"{folder} holds no model: {CONFIG} is missing (found: {listed(names)}). {remedy}")
    config = read_json(folder / CONFIG)
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if kind in OWN_TYPES:
        if not (folder / CONFIG_FILE).is_file():
            raise KokaneeError(
                f"{folder} holds a Kokanee model without its {CONFIG_FILE}, so what the model was shown in training is "
                "not known. Copy the file from the checkpoint that the model comes from."
            )
        return "kokanee"
    if published.ARCHITECTURE in architectures or (kind == "qwen2_5_vl" and config.get("audio_config")):
        return "salmonn2plus"
    if published.SALMONN2_ARCHITECTURE in architectures or kind == published.SALMONN2_TYPE:
        return "salmonn2"
    found = f"{folder} holds a model of type {kind!r}, architectures {architectures}"
    if "mm_vision_tower" in config:
        raise KokaneeError(
            f"{found}: a LLaVA that cannot hear. Give a video-SALMONN 2 trained from it, such as tsinghua-ee/"
            "video-SALMONN-2."
        )
    if kind == "qwen2_5_vl":
        raise KokaneeError(
            f"{found}: a Qwen2.5-VL that cannot hear. "
            "Join it with a Whisper first: kokanee convert QWEN OUT --whisper WHISPER."
        )
    with contextlib.suppress(KokaneeError):
        found += f", weights {listed(sorted(stored_shapes(weight_files(folder))))}"
    raise KokaneeError(f"{found}. Give a Kokanee folder or a video-SALMONN 2+ or 2 checkpoint.")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()


def base_of(folder: Path, base: str | Path | None = None) -> Path | None:
    """Where what an adapter is merged into is: `base`, or else what its config names; None for a whole model.

    Raises `KokaneeError` for an adapter whose base cannot be found from here.
    """
    if base is not None:
        return locate(base)
    if not is_adapter(folder):
        return None
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    try:
        return locate(name)
    except KokaneeError as error:
        raise KokaneeError(
            f"{folder} is an adapter alone, and its base ({name or 'not named'}) is not here. Give `base` (--base): "
            "the model that it was trained on, for published adapters the audio-aligned one of their size, such as "
            f"tsinghua-ee/video_SALMONN2plus_7B_audioAlign (3B, 72B). {error if name else ''}".strip()
        ) from error


def is_salmonn2(folder: Path, layout: Layout) -> bool:
    """Whether a folder holds a model of the first paper, in the authors' layout or in ours."""
    return layout == "salmonn2" or read_json(folder / CONFIG).get("model_type") == Salmonn2Config.model_type


def ours(folder: Path, processor: Processor) -> KokaneeConfig:
    """The config of a Kokanee folder."""
    kind = Salmonn2Config if isinstance(processor, Salmonn2Processor) else KokaneeConfig
    return kind.from_pretrained(folder)


def theirs(folder: Path, processor: Processor) -> KokaneeConfig:
    """The config of a folder in one of the authors' layouts. Raises `KokaneeError` for embeddings without room for the
    tokens that hold the places of media."""
    stored = read_json(folder / CONFIG)
    if not isinstance(processor, Salmonn2Processor):
        return published.kokanee_config(stored)
    ids = processor.place_ids | {"pad_token_id": processor.pad_id}
    config = published.salmonn2_config(stored, published_args(folder), published_parts(folder), ids)
    rows, needed = config.text_config.vocab_size, max(ids.values()) + 1
    if needed > rows:
        raise KokaneeError(
            f"{folder} has embeddings of {rows} tokens, and {needed} are needed with those that hold the places of "
            "media. Give the tokenizer that belongs to the checkpoint, or add rows to its embeddings."
        )
    return config


def as_type(dtype: Type) -> torch.dtype | None:
    """A torch type from itself, its name, or None. Raises `KokaneeError` for anything else."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise KokaneeError(f"{dtype} is no type for weights. Give 'bfloat16', 'float32' or 'float16'.")
    return found


def load_weights(
    folder: Path,
    config: KokaneeConfig,
    layout: Layout,
    dtype: torch.dtype | None,
    device: Device,
    attention: str,
) -> Kokanee:
    """Build the model of `config` and fill it from `folder`, strictly and without a second copy in memory."""
    files = weight_files(folder)
    dtype = dtype or stored_type(files)
    config._attn_implementation = attention
    config.dtype = dtype
    model = empty_model(config)
    stored = stored_shapes(files)
    expected = expected_shapes(model)
    tied = config.tie_word_embeddings and "lm_head.weight" in stored
    if tied:
        check_tied(files, "lm_head.weight", embedding_key(stored))
    places = placed(model, device, dtype)
    names = check_keys(
        expected,
        stored,
        rename=str if layout == "kokanee" else published.our_key,
        dropped=lambda key: key in published.DROPPED or (tied and key == "lm_head.weight"),
        what=str(folder),
    )
    fill(model, files, names, dtype, places)
    model.generation_config = generation_config(folder, model)
    return finish(model, places)


def expected_shapes(model: Kokanee) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a checkpoint must hold; a tied lm_head is not one of them."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def embedding_key(stored: dict[str, Any]) -> str:
    """The stored name of the word embeddings, whatever the layout."""
    return next((key for key in stored if key.endswith("embed_tokens.weight")), "")


def check_tied(files: list[Path], head: str, embedding: str) -> None:
    """Raise `KokaneeError` if a stored lm_head differs from the word embeddings that the config ties it to."""
    found = read_tensors(files, {head, embedding})
    if embedding in found and not torch.equal(found[head], found[embedding]):
        raise KokaneeError(
            f"The config ties lm_head to the word embeddings, but the stored {head} differs from {embedding}. "
            'Set "tie_word_embeddings": false in config.json if the stored lm_head is meant.'
        )


def generation_config(folder: Path, model: Kokanee) -> GenerationConfig:
    """Ids from the folder's generation_config.json, or from the config, and the penalty of repetitions, which is a
    default (`Defaults`); other settings of decoding are the caller's."""
    path = folder / "generation_config.json"
    stored = read_json(path) if path.is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {name: stored[name] for name in ("repetition_penalty",) if stored.get(name)}
    return GenerationConfig(**{name: stored.get(name, getattr(model.config, name)) for name in names}, **kept)


def check_tokens(config: KokaneeConfig, processor: Processor) -> None:
    """Raise `KokaneeError` where the processor would prepare what the model does not expect."""
    settings = processor.config
    pairs = {
        **{name: (number, getattr(config, name)) for name, number in processor.place_ids.items()},
        **{name: (getattr(settings, name), size) for name, size in config.patch_sizes.items()},
        "n_mels": (settings.n_mels, config.audio_config.num_mel_bins),
        "audio tokens per chunk": (settings.tokens_per_chunk, config.audio_tokens_per_chunk),
    }
    differing = [f"{name} is {ours}, the model has {its}" for name, (ours, its) in pairs.items() if ours != its]
    if differing:
        raise KokaneeError(
            f"The processor does not belong to this model: {'; '.join(differing)}. "
            "Give the model's own tokenizer and processor.json, and leave these settings as they are there."
        )


def save(model: Kokanee, processor: Processor, folder: str | Path) -> Path:
    """Write a Kokanee folder; a finished one appears at once or not at all. An older one there is replaced.

    Raises `KokaneeError` for a model with an unmerged adapter, and for a folder that holds anything else.
    """
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise KokaneeError("The model has an adapter that is not merged. Call checkpoints.merge first.")
    with replaced(Path(folder)) as unfinished, silent():
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return Path(folder)


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends without an error."""
    folder = folder.resolve()
    if folder.exists() and not is_own(folder) and (folder.is_file() or any(folder.iterdir())):
        raise KokaneeError(f"{folder} exists and is no Kokanee folder. Choose another place, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=UNFINISHED, dir=folder.parent))
    unfinished, old = work / "new", work / "old"
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():
            file.chmod(READABLE)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(work, ignore_errors=True)


def is_own(folder: Path) -> bool:
    """Whether a folder holds a checkpoint as `save` writes it."""
    try:
        kind = read_json(folder / CONFIG).get("model_type")
    except KokaneeError:
        return False
    return kind in OWN_TYPES and (folder / CONFIG_FILE).is_file()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """transformers without its progress bars: a library does not write to the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def convert(source: str | Path, folder: str | Path, *, dtype: Type = None, base: str | Path | None = None) -> Path:
    """Write any checkpoint that `load` takes as a Kokanee folder. Raises `KokaneeError` where that would replace it."""
    source = locate(source)
    below = base_of(source, base)
    for used in (source, *([] if below is None else [below])):
        if used.resolve().is_relative_to(Path(folder).resolve()):
            raise KokaneeError(f"{folder} holds {used}, which is to be converted. Choose another place.")
    return save(*load(source, dtype=dtype, base=base), folder)


def assemble(
    qwen: str | Path, whisper: str | Path, folder: str | Path, *, dtype: Type = None, seed: int = 0, **sizes: Any
) -> Path:
    """Write an audio-ready base of a Qwen2.5-VL and a Whisper (folders or hub names) with a fresh Q-Former.

    `sizes` are `qformer`, `n_queries`, `window_s` and `stride_s` of `base.make_base`; left out, they are the published.
    """
    model, processor = make_base(locate(qwen), locate(whisper), dtype=as_type(dtype), seed=seed, **sizes)
    check_tokens(model.config, processor)
    return save(model, processor, folder)
