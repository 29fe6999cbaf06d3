"""What the encoders make of a file, or of a part of it: read, encoded once, kept on disk, and put into a prompt.

While one file is encoded or used, the next is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kokanee.captions import ahead, attempt, ended_before
from kokanee.errors import KokaneeError, memory_said
from kokanee.files import is_image
from kokanee.formats import replaced_file
from kokanee.layout import Block
from kokanee.media import named, read_image
from kokanee.model import Kokanee
from kokanee.prefix import Sample
from kokanee.processor import Processor
from kokanee.prompt import Turn

LESS_SHOWN = (
    "Show less of a file: fewer frames (max_frames; in a recipe processor: {max_frames: 64}), smaller ones "
    "(max_frame_pixels), or a shorter part of it."
)
Part = tuple[Path, float | None, float | None]


@dataclass(frozen=True)
class View:
    """A clip that was watched once: its encoded media and their sizes in a prompt. notes: what was unusual about its
    file, where it has just been read."""

    block: Block
    media: Sample
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What a model is shown of a file: its block, the inputs of the encoders, and what was unusual about the file."""

    block: Block
    tensors: Sample
    notes: tuple[str, ...]


@memory_said(LESS_SHOWN)
def show(processor: Processor, path: Path, start_s: float | None = None, end_s: float | None = None) -> Shown:
    """Read a file, or a part of it. A still image is read as one, and has no parts."""
    if is_image(path) and (start_s is not None or end_s is not None):
        raise KokaneeError(f"{path} is a still image and has no intervals. Leave start and end out.")
    notes = list[str]()
    medium = read_image(path, notes) if is_image(path) else processor.read(path, start_s, end_s)
    notes += () if isinstance(medium, np.ndarray) else [*medium.notes, *ended_before(medium.end_s, end_s)]
    with named(path):
        return Shown(*processor.medium(medium), tuple(notes))


def shown_of(
    processor: Processor, path: Path, start_s: float | None = None, end_s: float | None = None
) -> Shown | KokaneeError:
    """The same, or why there is nothing."""
    return attempt(partial(show, processor, path, start_s, end_s))


@memory_said(LESS_SHOWN)
@torch.no_grad()
def see(model: Kokanee, shown: Shown) -> View:
    """Run the encoders."""
    media = model.encode_media(**{name: value.to(model.device) for name, value in shown.tensors.items()})
    return View(shown.block, media, shown.notes)


def seen(model: Kokanee, shown: Shown | KokaneeError) -> View | KokaneeError:
    """What the encoders make of what was read, or why there is nothing."""
    return shown if isinstance(shown, KokaneeError) else attempt(partial(see, model, shown))


def watch(
    model: Kokanee, processor: Processor, path: Path, start_s: float | None = None, end_s: float | None = None
) -> View:
    """Read a file, or a part of it, and run the encoders."""
    return see(model, show(processor, path, start_s, end_s))


def views(model: Kokanee, processor: Processor, parts: Iterable[Part]) -> Iterator[View | KokaneeError]:
    """What the encoders make of files and parts of them, in order, or why there is nothing. While one is encoded or
    used, the next is read."""
    for shown in ahead(parts, lambda part: shown_of(processor, *part)):
        yield seen(model, shown)


def version_of(path: Path) -> list[int] | None:
    """Size and time of change of a file, None where there is none."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def keep_view(path: Path, view: View, version: list[int] | None) -> None:
    """Write a view, whole or not at all, with the `version_of` the file that it is of."""
    with replaced_file(path) as unfinished:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in view.media.items()}
        notes = {"block": asdict(view.block), "version_of_file": version}
        save_file(tensors, unfinished, metadata={name: json.dumps(note) for name, note in notes.items()})


def kept_version(path: Path) -> list[int] | None:
    """The version of the file that a kept view is of; None where it is not known."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata().get("version_of_file", "null"))


def read_view(path: Path) -> View:
    """A view that was kept."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        block = json.loads(file.metadata()["block"])
        media = {name: file.get_tensor(name) for name in names}
    grid = block.pop("grid_thw")
    return View(Block(grid_thw=None if grid is None else tuple(grid), **block), media)


def open_prompt(processor: Processor, view: View, prompt: str) -> Sample:
    """A question about a clip, ready to be answered: a sample with the clip's encoded media."""
    return {**processor.prepare_ids([Turn("user", prompt)], [view.block]), **view.media}
