"""LoRA adapters: folders written by peft, in the authors' names of weights or in ours, loaded strictly and merged."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key

from kokanee.errors import KokaneeError
from kokanee.formats import read_json
from kokanee.model import Kokanee
from kokanee.published import DROPPED, our_key
from kokanee.weights import listed, read_tensors, stored_shapes, weight_files

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_[A-Z]\.weight|lora_magnitude_vector(?:\.weight)?)")
LORA_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
)
PATTERNS = ("rank_pattern", "alpha_pattern")
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin an adapter that take its first value out of the base's weights: it fits only the base that is left."""
FULLY_TRAINED = ("visual.merger", "audio.qformer", "audio.projection")
"""Modules that the published recipe trains whole, beside the adapter."""


def load_adapter(model: Kokanee, folder: str | Path, *, trained: bool = False) -> PeftModel:
    """Put the LoRA adapter in `folder` onto `model`; its weights are trained further if `trained`, or else all is in
    evaluation mode.

    Takes adapters saved from Kokanee and from the authors' code, also with the modules that their recipe trains whole.
    Every stored weight is used and every weight of the adapter is found, or `KokaneeError` names those that are not.
    """
    folder = Path(folder)
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("bias", "none") != "none":
        raise KokaneeError(
            f"{folder} is an adapter of type {settings.get('peft_type')} with bias {settings.get('bias')}. "
            "Kokanee loads LoRA adapters without biases."
        )
    if str(settings.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        raise KokaneeError(
            f"{folder} was begun with {settings['init_lora_weights']!r}, which changes the base too: it does not fit "
            "the base as it is. Save it with peft's path_initial_model_for_weight_conversion, or train without it."
        )
    files = weight_files(folder, "adapter_model")
    names = {key: our_adapter_key(key) for key in stored_shapes(files) if key.removeprefix(PREFIX) not in DROPPED}
    config = LoraConfig(**{field: settings[field] for field in LORA_FIELDS if settings.get(field) is not None})
    modules = sorted({match["module"] for name in names.values() if (match := LORA_KEY.fullmatch(name))})
    whole = [module for module in FULLY_TRAINED if any(name.startswith(f"{module}.") for name in names.values())]
    known = dict(model.named_modules())
    absent = [module for module in modules if module not in known]
    if absent or not modules:
        raise KokaneeError(
            f"{folder} adapts modules that this model has not ({listed(absent)}). Give the base that it was trained on."
        )
    for field in PATTERNS:
        setattr(config, field, our_pattern(getattr(config, field), modules, f"{folder}: {field}"))
    config.target_modules = modules
    config.modules_to_save = whole or None
    adapted = wrapped(model, config)
    expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(adapted).items()}
    stored = {PREFIX + names[key]: tensor for key, tensor in read_tensors(files, set(names)).items()}
    problems = differences(expected, {key: tuple(value.shape) for key, value in stored.items()})
    if problems:
        adapted.unload()
        raise KokaneeError(f"{folder} does not fit this model: {'; '.join(problems)}. Give the base it was trained on.")
    set_peft_model_state_dict(adapted, stored)
    for name, weight in adapted.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            weight.requires_grad_(trained)
    return adapted if trained else adapted.eval()  # a new adapter has dropout until then


def wrapped(model: Kokanee, config: LoraConfig) -> PeftModel:
    """The model with an adapter of this kind on it, which changes nothing yet. Raises `ValueError` if it fits none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks for it
        made = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert isinstance(made, PeftModel)
    return made


def our_adapter_key(key: str) -> str:
    """Our name, without peft's prefix, of a stored adapter weight. Raises `KokaneeError` for a foreign one."""
    bare = key.removeprefix(PREFIX)
    if bare.startswith(("language_model.", "visual.", "audio.encoder.", "audio.projection.", "audio.qformer.encoder.")):
        return bare
    if match := LORA_KEY.fullmatch(bare):
        return f"{our_module(match['module'])}.{match['part']}"
    return our_key(bare) or bare


def our_module(name: str) -> str:
    """Our name of the authors' module `name`; the end of a name, and a name of ours, stay as they are."""
    return our_key(f"{name}.weight").removesuffix(".weight") or name


def our_pattern(pattern: dict[str, Any], modules: list[str], what: str) -> dict[str, Any]:
    """The values for single modules, named as we do. Raises `KokaneeError` for one that no adapted module has."""
    ours = {our_module(name.removeprefix("^")): value for name, value in pattern.items()}
    unused = [name for name in ours if not any(get_pattern_key([name], module) == name for module in modules)]
    if unused:
        raise KokaneeError(f"{what} names modules that are not adapted ({listed(unused)}). Mend {ADAPTER_CONFIG}.")
    return ours


def differences(expected: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What is missing, left over or of another shape, as readable phrases."""
    missing, extra = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    wrong = [
        f"{key} is {stored[key]}, not {expected[key]}"
        for key in stored
        if key in expected and stored[key] != expected[key]
    ]
    phrases = ((missing, "it lacks"), (extra, "there is no place for"), (wrong, "of another shape:"))
    return [f"{phrase} {listed(names)}" for names, phrase in phrases if names]


def merge(adapted: PeftModel) -> Kokanee:
    """The model with the adapter added into its weights. Raises `KokaneeError` if that gives numbers not finite."""
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise KokaneeError(
            f"The adapter cannot be merged ({error}). It is broken: train or download it again."
        ) from error
    assert isinstance(merged, Kokanee)
    return merged.eval()
