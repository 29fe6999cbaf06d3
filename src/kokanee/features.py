"""What the frozen encoders make of world clips, computed once and kept on disk.

A store is a folder: `state.json` (what was encoded by which encoders) and shards of safetensors. A shard holds, for
each of its clips, the visual tokens (float16, all clips' one after another), the Whisper encoder's states (float16)
and which stretch of which scene the clip is.

Axes: K clips of a shard, N visual tokens, C audio chunks, S encoder states, D width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kokanee.encoders import square_side_px
from kokanee.errors import KokaneeError
from kokanee.formats import differences, refuse_foreign, replaced_file, write_json
from kokanee.model import Kokanee
from kokanee.processor import Processor
from kokanee.salmonn2 import refuse_salmonn2
from kokanee.sampling import RATE_HZ, length_s, sample_indices, step_seconds
from kokanee.world.render import frames
from kokanee.world.scene import SLOT_S, VERSION, Scene, Split, sample_scene
from kokanee.world.sound import waveform

STATE = "state.json"
FPS = 12.0
SHARD = 250
SHORTEST_S = 2.0


@dataclass(frozen=True)
class Stretch:
    """A clip: the scene `index` of a split from `start_s` to `end_s`."""

    index: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Features:
    """One clip as the encoders see it: `video_ND`, its grid in patches and seconds a step; `audio_CSD`."""

    stretch: Stretch
    video_ND: torch.Tensor
    grid_thw: tuple[int, int, int]
    step_s: float
    audio_CSD: torch.Tensor


def stretch_of(split: Split, index: int, seed: int, share_cut: float) -> tuple[Scene, Stretch]:
    """Scene `index` and the stretch shown of it: all, or for `share_cut` of the scenes an interval of 2 s or more.

    An interval cuts no action and no sound in two, so that nobody has to judge what belongs to it; a scene without
    such an interval is shown whole.
    """
    scene = sample_scene(split, index, seed)
    whole = Stretch(index, 0.0, scene.duration_s)
    rng = random.Random(f"stretch/{seed}/{split}/{index}")
    if rng.random() >= share_cut:
        return scene, whole
    inside = {
        slot * SLOT_S
        for piece in (*scene.actions, *scene.sounds)
        for slot in range(round(piece.start_s / SLOT_S) + 1, round(piece.end_s / SLOT_S))
    }
    edges_s = [slot * SLOT_S for slot in range(round(scene.duration_s / SLOT_S) + 1) if slot * SLOT_S not in inside]
    stretches = [Stretch(index, start_s, end_s) for start_s, end_s in itertools.combinations(edges_s, 2)]
    fits = [stretch for stretch in stretches if SHORTEST_S <= stretch.end_s - stretch.start_s < scene.duration_s]
    return scene, rng.choice(fits) if fits else whole


@torch.no_grad()
def encode(model: Kokanee, processor: Processor, scene: Scene, stretch: Stretch) -> Features:
    """The features of a stretch, from the same frames and samples that a file of it at `FPS` would give."""
    sampling = processor.config.sampling
    n_frames = round((stretch.end_s - stretch.start_s) * FPS)
    indices = sample_indices(n_frames, FPS, sampling)
    times_s = stretch.start_s + np.array(indices) / FPS
    pixels_PX, grid_thw = processor.pixels(list(frames(scene, times_s, square_side_px(processor, len(indices)))))
    step_s = step_seconds(len(indices), length_s(n_frames, FPS, sampling), sampling)
    assert step_s is not None, "features are for models that are told the time of a step"
    wave = waveform(scene)[round(stretch.start_s * RATE_HZ) : round(stretch.end_s * RATE_HZ)]
    video_ND = model.encode_video(pixels_PX.to(model.device), torch.tensor([grid_thw], device=model.device))
    audio_CSD = model.audio.encode(processor.features(wave).to(model.device))
    return Features(stretch, video_ND.half().cpu(), grid_thw, step_s, audio_CSD.half().cpu())


def fill_store(
    model: Kokanee,
    processor: Processor,
    folder: Path,
    split: Split,
    clips: int,
    seed: int,
    share_cut: float,
    part: tuple[int, int] = (0, 1),
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Encode the first `clips` scenes of a split; goes on where it stopped, also with more clips than before. `part`
    (k, n): every n-th shard, from k.

    `report(done, clips)` is called after each shard. Raises `KokaneeError` where the folder holds the features of other
    encoders or settings, or of more clips.
    """
    refuse_salmonn2(model)
    settings = {**origin(model, split, seed), "clips": clips, "share_cut": share_cut}
    known = folder / STATE
    refuse_foreign(folder, STATE)
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else settings
    differing = differences({**before, "clips": max(clips, before["clips"])}, settings)
    if differing:
        raise KokaneeError(f"{folder} holds other features ({'; '.join(differing)}). Remove it, or use another.")
    write_json(known, settings)
    model.eval()
    for shard in range(part[0], -(-clips // SHARD), part[1]):
        path = shard_path(folder, shard)
        numbers = range(shard * SHARD, min((shard + 1) * SHARD, clips))
        if not path.is_file() or clips_in(path) < len(numbers):
            found = [encode(model, processor, *stretch_of(split, index, seed, share_cut)) for index in numbers]
            write_shard(path, found)
        if report is not None:
            report(min((shard + 1) * SHARD, clips), clips)


def write_shard(path: Path, found: list[Features]) -> None:
    """Write one shard, whole or not at all."""
    tensors = {
        "video": torch.cat([features.video_ND for features in found]),
        "grids": torch.tensor([features.grid_thw for features in found]),
        "steps_s": torch.tensor([features.step_s for features in found], dtype=torch.float64),
        "audio": torch.cat([features.audio_CSD for features in found]),
        "chunks": torch.tensor([len(features.audio_CSD) for features in found]),
        "index": torch.tensor([features.stretch.index for features in found]),
        "from_to_s": torch.tensor([(f.stretch.start_s, f.stretch.end_s) for f in found], dtype=torch.float64),
    }
    with replaced_file(path) as unfinished:
        save_file(tensors, unfinished)


def origin(model: Kokanee, split: Split, seed: int) -> dict[str, Any]:
    """Whose features of which clips these are."""
    return {"encoders": fingerprint(model), "world": VERSION, "split": split, "seed": seed}


def read_store(folder: Path, model: Kokanee, split: Split, seed: int) -> list[Features]:
    """All clips of a store, their tensors mapped from disk.

    Raises `KokaneeError` where it is missing, unfinished, of other encoders than the model's, or of other clips.
    """
    refuse_salmonn2(model)
    known = folder / STATE
    if not known.is_file():
        raise KokaneeError(f"{folder} holds no features. Make them first, with `kokanee world features`.")
    state = json.loads(known.read_text(encoding="utf-8"))
    wanted = origin(model, split, seed)
    differing = differences({name: state.get(name) for name in wanted}, wanted)
    if differing:
        raise KokaneeError(
            f"{folder} holds other features ({'; '.join(differing)}; encoders are known by a hash of their weights). "
            f"Make those of this model with `kokanee world features MODEL FOLDER --split {split} --seed {seed}`."
        )
    clips, merge_size = state["clips"], model.config.vision_config.spatial_merge_size
    paths = [shard_path(folder, shard) for shard in range(-(-clips // SHARD))]
    sizes = [min(SHARD, clips - first) for first in range(0, clips, SHARD)]
    missing = [
        path.name for path, size in zip(paths, sizes, strict=True) if not path.is_file() or clips_in(path) < size
    ]
    if missing:
        raise KokaneeError(
            f"{folder} is unfinished: {len(missing)} of {len(paths)} shards are not whole (such as {missing[0]}). "
            "Start the making of features again; it goes on where it stopped."
        )
    return [features for path in paths for features in read_shard(path, merge_size)]


def clips_in(path: Path) -> int:
    """How many clips a shard holds."""
    with safe_open(path, "pt") as file:
        return file.get_slice("index").get_shape()[0]


def read_shard(path: Path, merge_size: int) -> list[Features]:
    """The clips of one shard."""
    tensors = load_file(path)
    grids = [(t, h, w) for t, h, w in tensors["grids"].tolist()]
    stretches = [
        Stretch(index, start_s, end_s)
        for index, (start_s, end_s) in zip(tensors["index"].tolist(), tensors["from_to_s"].tolist(), strict=True)
    ]
    videos = tensors["video"].split([t * h * w // merge_size**2 for t, h, w in grids])
    audios = tensors["audio"].split(tensors["chunks"].tolist())
    clips = zip(stretches, videos, grids, tensors["steps_s"].tolist(), audios, strict=True)
    return [Features(*parts) for parts in clips]


def shard_path(folder: Path, shard: int) -> Path:
    """Where shard number `shard` lies."""
    return folder / f"shard-{shard:05d}.safetensors"


def fingerprint(model: Kokanee) -> str:
    """A hash of the weights of both encoders."""
    digest = hashlib.sha256()
    for part in (model.visual, model.audio.encoder):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
