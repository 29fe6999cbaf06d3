"""Folders of safetensors: listing their keys without reading them, and filling a model strictly and frugally."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_max_memory
from safetensors import SafetensorError, safe_open

from kokanee.errors import KokaneeError
from kokanee.formats import read_json
from kokanee.model import Kokanee, KokaneeConfig
from kokanee.salmonn2 import Salmonn2, Salmonn2Config

logger = logging.getLogger("kokanee")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMED = 5
GIB = 2**30
KEPT_FOR_WEIGHTS = 0.9
SAMPLED = 1024
Rename = Callable[[str], str]
Device = str | torch.device | dict[str, str]


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of `folder`, sharded or not. Raises `KokaneeError` if there are none or one is missing."""
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            raise KokaneeError(f"{index} names shards that are not there: {listed(absent)}. Download them again.")
        return files
    if single.is_file():
        return [single]
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise KokaneeError(
            f"{folder} holds pickled weights ({listed(pickles)}). Loading a pickle can run any code, so Kokanee reads "
            "safetensors only. Convert them: load them with transformers where you trust them and call save_pretrained."
        )
    raise KokaneeError(f"{folder} has no {single.name} (found: {listed(found)}). Give the folder of a checkpoint.")


@contextlib.contextmanager
def opened(file: Path) -> Iterator:
    """`safe_open`, with a `KokaneeError` for a file that is no safetensors."""
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except SafetensorError as error:
        raise KokaneeError(f"{file} is no complete safetensors file ({error}). Download or copy it again.") from error


def stored_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of everything in `files`; only the headers are read."""
    shapes = {}
    for file in files:
        with opened(file) as reader:
            shapes |= {key: tuple(reader.get_slice(key).get_shape()) for key in reader.keys()}  # noqa: SIM118
    return shapes


def stored_type(files: list[Path]) -> torch.dtype:
    """The type of the first floating-point tensor in `files`."""
    for file in files:
        with opened(file) as reader:
            for key in reader.keys():  # noqa: SIM118
                tensor = reader.get_slice(key)[:0] if reader.get_slice(key).get_shape() else reader.get_tensor(key)
                if tensor.is_floating_point():
                    return tensor.dtype
    raise KokaneeError(f"{listed([file.name for file in files])} hold no floating-point weights. Download them again.")


def listed(names: list[str]) -> str:
    """At most five names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (", ".join(names[:NAMED]) or "nothing") + more


def empty_model(config: KokaneeConfig) -> Kokanee:
    """A model whose weights take no memory yet; its small computed buffers are real."""
    with init_empty_weights(include_buffers=False):
        kind: type[Kokanee] = Salmonn2 if isinstance(config, Salmonn2Config) else Kokanee
        return kind(config)


def check_keys(
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
    rename: Rename,
    dropped: Callable[[str], bool],
    what: str,
) -> dict[str, str]:
    """Stored key -> our key, after checking that every key has its place and every place its key, in the right shape.

    Keys for which `dropped` holds are left out and logged by name. Raises `KokaneeError` naming the keys otherwise.
    """
    left_out = [key for key in stored if dropped(key)]
    if left_out:
        logger.info("%s: %d weights have no use here and are left out: %s", what, len(left_out), listed(left_out))
    renamed = {key: rename(key) for key in stored if not dropped(key)}
    names = {key: name for key, name in renamed.items() if name in expected}
    unknown = sorted(set(renamed) - set(names))
    missing = sorted(set(expected) - set(names.values()))
    counts = Counter(names.values())
    twice = sorted(key for key, name in names.items() if counts[name] > 1)
    problems = []
    if twice:
        problems.append(f"{len(twice)} weights claim the same places ({listed(twice)})")
    if missing:
        problems.append(f"it lacks {len(missing)} weights ({listed(missing)})")
    if unknown:
        problems.append(f"it has {len(unknown)} weights that the model has no place for ({listed(unknown)})")
    if not problems:
        wrong = [
            f"{key} is {stored[key]}, not {expected[name]}"
            for key, name in names.items()
            if stored[key] != expected[name]
        ]
        if wrong:
            problems.append(f"{len(wrong)} weights have another shape ({listed(wrong)})")
    if problems:
        raise KokaneeError(
            f"{what} does not fit the model that its config describes: {'; '.join(problems)}. "
            "Give a complete checkpoint with the config that belongs to it."
        )
    return names


def placed(model: Kokanee, device: Device, dtype: torch.dtype) -> dict[str, str | int | torch.device]:
    """Where the parts of an empty `model` go: beginning of a name -> device; the longest beginning counts.

    "auto" spreads the model over all accelerators (then the CPU) as they have room. Raises `KokaneeError` where all
    together have not enough.
    """
    if isinstance(device, dict):
        return dict(device)
    if str(device) != "auto":
        return {"": usable(device)}
    model.tie_weights()
    # What a long clip's activations and cache need cannot be known here, but it is never nothing.
    room = {place: size if place == "cpu" else int(KEPT_FOR_WEIGHTS * size) for place, size in get_max_memory().items()}
    whole = list(model._no_split_modules)
    places = infer_auto_device_map(model, room, no_split_module_classes=whole, dtype=dtype)
    if "disk" in places.values():
        needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
        free = ", ".join(f"{size / GIB:.2f} GiB on {device}" for device, size in room.items())
        raise KokaneeError(
            f"The model needs {needed / GIB:.2f} GiB in {str(dtype).removeprefix('torch.')}, and there is room for "
            f"{free}. Give dtype bfloat16 if it is another, or take a machine with more memory."
        )
    return places


def usable(device: str | torch.device) -> torch.device:
    """The torch device; `KokaneeError` if there is no such device here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise KokaneeError(
            f"The device {device} cannot be used here ({reason}). Give 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error


def place_of(name: str, places: dict[str, str | int | torch.device]) -> str | int | torch.device:
    """The device of the weight `name`."""
    held = [part for part in places if not part or name == part or name.startswith(f"{part}.")]
    if not held:
        raise KokaneeError(f"The device map has no place for {name}. Add one, or use 'auto'.")
    return places[max(held, key=len)]


def fill(
    model: Kokanee,
    files: list[Path],
    names: dict[str, str],
    dtype: torch.dtype,
    places: dict[str, str | int | torch.device] | None = None,
) -> None:
    """Read the tensors named in `names` (stored key -> our key) straight into `model`, one at a time."""
    for file in files:
        with opened(file) as reader:
            for key in reader.keys():  # noqa: SIM118
                if key in names:
                    tensor = reader.get_tensor(key)
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    put(model, names[key], tensor.to(place_of(names[key], places or {"": "cpu"}), kind))


def put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the weight `name` of `model`; whether it is trained stays as it was."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    trained = getattr(module, leaf).requires_grad
    setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=trained))


def finish(model: Kokanee, places: dict[str, str | int | torch.device] | None = None) -> Kokanee:
    """Tie what is tied, move the buffers, and check that nothing was left without memory."""
    model.tie_weights()
    empty = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert not empty, f"weights were never filled: {listed(empty)}"
    places = places or {"": torch.device("cpu")}
    if set(places) == {""}:
        model.to(places[""])  # pyright: ignore[reportArgumentType]
    else:
        dispatch_model(model, places)
    return model.eval()


def read_tensors(files: list[Path], keys: set[str]) -> dict[str, torch.Tensor]:
    """The tensors `keys` of `files`; keys that are not there are left out."""
    found = {}
    for file in files:
        with opened(file) as reader:
            found |= {key: reader.get_tensor(key) for key in reader.keys() if key in keys}  # noqa: SIM118
    return found


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the weights another type. What is no weight, such as the speeds at which positions turn, stays precise."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the weights: the name and shape of each, and some thousand of its values, evenly spread.

    So models that differ by training or by an adapter differ here, and a large model costs little more than a small.
    Of weights that are off the device between uses, only names and shapes count.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            values = tensor.detach().flatten()
            digest.update(values[:: max(1, len(values) // SAMPLED)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
