"""Folders of safetensors: listing their keys without reading them, and filling a model strictly and frugally."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from safetensors import SafetensorError, safe_open

from kokanee.errors import KokaneeError
from kokanee.model import Kokanee, KokaneeConfig

logger = logging.getLogger("kokanee")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMED = 5
Rename = Callable[[str], str]
Device = str | torch.device | dict[str, str]


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises `KokaneeError` if it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KokaneeError(f"{path} is missing. Give the folder of a complete checkpoint.") from None
    except (OSError, ValueError) as error:
        raise KokaneeError(f"{path} is not readable JSON ({error}). Download or copy it again.") from error
    if not isinstance(found, dict):
        raise KokaneeError(f"{path} holds a {type(found).__name__}, not an object. Download or copy it again.")
    return found


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
        return Kokanee(config)


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

    "auto" spreads the model over all accelerators (then the CPU) as they have room.
    """
    if isinstance(device, dict):
        return dict(device)
    if str(device) != "auto":
        return {"": usable(device)}
    model.tie_weights()
    return infer_auto_device_map(model, no_split_module_classes=list(Kokanee._no_split_modules), dtype=dtype)


def usable(device: str | torch.device) -> torch.device:
    """The torch device; `KokaneeError` if there is no such device here."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise KokaneeError(
            f"{device} is no device ({error}). Give 'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'."
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise KokaneeError(
            "PyTorch finds no CUDA GPU here. Give device 'cpu', or install a PyTorch built for your GPU."
        )
    return place


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
