"""Encoder pretraining on the world's labels: the visual tower names what is in each cell, the Whisper encoder what
each half second sounds like. The heads are thrown away afterwards; what they read from is what the captioner sees.

Axes: B pictures or clips, G cells of a picture, W windows of half a second, N labelled cells or windows, D width.
"""

from __future__ import annotations

import math
import random
from dataclasses import fields
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kokanee.model import Kokanee
from kokanee.processor import Processor
from kokanee.sampling import RATE_HZ
from kokanee.train import Batch, Objective, Stats
from kokanee.world.labels import DOINGS, FrameLabels, frame_labels, window_labels
from kokanee.world.render import frames
from kokanee.world.scene import BACKGROUNDS, COLOURS, PITCHES, SHAPES, SLOT_S, SOUNDS, Split, sample_scene
from kokanee.world.sound import waveform

N_SCENES = 10_000_000
STEP_S = (0.2, 0.36)  # files have 3 or 4 frames of a twelfth of a second from one sampled frame to the next
# What is a large difference of x and y (cells), radius (shares of the frame), their changes a second, and opacity's.
SCALES = (1.0, 1.0, 0.04, 0.3, 0.3, 0.1, 1.0)
CHANGES = slice(3, 7)
SPEED = slice(3, 5)
RARITY = 10.0  # figures seldom change at a given moment
ACTING = 5.0


class VisualLabels(Objective):
    """Cell by cell: which cell is it, is there a figure, its colour and shape, where and how large it is and how that
    changes, what it does; and the background and the light. The tower's visual tokens are the cells.

    A token has to say which cell it is because the tower knows relative places only, and a small language model is slow
    to find out places from the order of tokens (docs/log.md)."""

    parts: ClassVar = {
        "present": 1,
        "colour": len(COLOURS),
        "shape": len(SHAPES),
        "geometry": len(SCALES),
        "does": len(DOINGS),
        "background": len(BACKGROUNDS),
        "dark": 1,
    }

    def __init__(self, model: Kokanee, processor: Processor, seed: int) -> None:
        super().__init__()
        self.model, self.processor, self.seed = model, processor, seed
        self.side_px = square_side_px(processor, 2)
        self.cells = self.side_px // (processor.config.patch_size * processor.config.merge_size)
        self.sizes = {**self.parts, "cell": self.cells**2}
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(self.sizes.values()))

    def batch(self, split: Split, number: int, size: int) -> Batch:
        """`size` moments of as many scenes, each two frames long: patches and labels. Equal arguments, equal batch."""
        rng = random.Random(f"{self.seed}/{split}/{number}")
        indices, pictures, labels = [], [], []
        for _ in range(size):
            indices.append(rng.randrange(N_SCENES))
            scene = sample_scene(split, indices[-1], self.seed)
            step_s = rng.uniform(*STEP_S)
            time_s = rng.uniform(0.0, scene.duration_s - step_s)
            pictures += list(frames(scene, np.array([time_s, time_s + step_s]), self.side_px))
            labels.append(frame_labels(scene, time_s, self.cells, step_s))
        patches_PX, grid_thw = self.processor.pixels(pictures)
        batch = {"sample": torch.tensor(indices), "pixel_values": patches_PX, "grid": torch.tensor([grid_thw])}
        for field in fields(FrameLabels):
            values = np.stack([np.asarray(getattr(label, field.name)) for label in labels])
            batch[field.name.partition("_")[0]] = torch.from_numpy(values)
        return batch

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The sum of the parts' losses, and the share of right answers for each part."""
        tokens_ND = self.model.encode_video(batch["pixel_values"], batch["grid"])
        said_BGX = self.head(tokens_ND).unflatten(0, (-1, self.cells**2))
        said = dict(zip(self.sizes, said_BGX.split(list(self.sizes.values()), dim=-1), strict=True))
        there_BG = batch["present"] > 0
        present_BG = said["present"][..., 0]
        background_BC, dark_B = said["background"].mean(1), said["dark"].mean(1)[:, 0]
        loss = 4 * functional.binary_cross_entropy_with_logits(present_BG, batch["present"])
        cells_BG = torch.arange(self.cells**2, device=there_BG.device).expand_as(there_BG)
        loss = loss + 3 * functional.cross_entropy(said["cell"].flatten(0, 1), cells_BG.flatten())
        right = {"present": (present_BG > 0) == there_BG, "cell": said["cell"].argmax(-1) == cells_BG}
        if bool(there_BG.any()):
            truth = {name: batch[name][there_BG] for name in ("colour", "shape", "geometry")}
            figures_loss, figures_right = self.figures({name: said[name][there_BG] for name in truth}, truth)
            loss, right = loss + figures_loss, {**right, **figures_right}
        known_BG = batch["does"] >= 0
        if bool(known_BG.any()):
            does_loss, does_right = doings(said["does"][known_BG], batch["does"][known_BG])
            loss, right = loss + does_loss, {**right, **does_right}
        loss = (
            loss
            + functional.cross_entropy(background_BC, batch["background"])
            + functional.binary_cross_entropy_with_logits(dark_B, batch["dark"].float())
        )
        right["background"] = background_BC.argmax(-1) == batch["background"]
        right["dark"] = (dark_B > 0) == (batch["dark"] > 0)
        return loss, shares(right)

    @torch.no_grad()
    def finish(self) -> None:
        """Scale the visual tokens to a mean length of 1, about that of text embeddings, and the head to read them so.

        Labels alone make tokens thirty times as long as text, and what a decoder's layers add to such a token is lost
        beside it.
        """
        batch = self.batch("validation", 0, 32)
        patches, grid = (batch[name].to(self.model.device) for name in ("pixel_values", "grid"))
        length = self.model.encode_video(patches, grid).norm(dim=-1).mean()
        last = self.model.visual.merger.mlp[-1]
        last.weight /= length
        last.bias /= length
        self.head.weight *= length

    def figures(self, said: Batch, truth: Batch) -> tuple[torch.Tensor, Stats]:
        """The loss of the cells that hold a figure, and which of their answers are right.

        What changes weighs more than what stays: as few figures change, "nothing does" would be a good answer.
        """
        geometry_NG, truth_NG = said["geometry"], truth["geometry"] / truth["geometry"].new_tensor(SCALES)
        weights_NG = torch.ones_like(truth_NG)
        weights_NG[:, CHANGES] += (RARITY - 1) * (truth_NG[:, CHANGES].abs() > 0.05)
        loss = (
            functional.cross_entropy(said["colour"], truth["colour"])
            + 2 * functional.cross_entropy(said["shape"], truth["shape"])
            + 2 * (weights_NG * (geometry_NG - truth_NG).abs()).mean()
        )
        speed_N2, true_speed_N2 = geometry_NG[:, SPEED], truth_NG[:, SPEED]
        moves_N = true_speed_N2.abs().amax(1) > 0.1 / SCALES[3]
        changes = {"grows": 5, "fades": 6}
        return loss, {
            "colour": said["colour"].argmax(-1) == truth["colour"],
            "shape": said["shape"].argmax(-1) == truth["shape"],
            "size": ((geometry_NG - truth_NG)[:, 2].abs() < 1),
            "direction": (direction(speed_N2) == direction(true_speed_N2))[moves_N],
            **{
                name: (geometry_NG[:, part].sign() == truth_NG[:, part].sign())[truth_NG[:, part].abs() > 0.5]
                for name, part in changes.items()
            },
        }


def doings(said_ND: torch.Tensor, truth_N: torch.Tensor) -> tuple[torch.Tensor, Stats]:
    """The loss of what figures are said to do, and which of those that rest, and that act, are rightly said to."""
    weights_D = said_ND.new_full((len(DOINGS),), ACTING)
    weights_D[0] = 1.0
    right_N = said_ND.argmax(-1) == truth_N
    acting_N = truth_N > 0
    return 2 * functional.cross_entropy(said_ND, truth_N, weights_D), {
        "action": right_N[acting_N],
        "rests": right_N[~acting_N],
    }


def direction(speed_N2: torch.Tensor) -> torch.Tensor:
    """Which of the four ways a speed goes most: 0 to 3 (N,)."""
    axis_N1 = speed_N2.abs().argmax(1, keepdim=True)
    return 2 * axis_N1[:, 0] + (speed_N2.gather(1, axis_N1)[:, 0] > 0)


class SoundLabels(Objective):
    """Window by window: which kind of sound is it, or silence; is it low or high; does a sound begin here."""

    sizes: ClassVar = {"kind": len(SOUNDS) + 1, "pitch": len(PITCHES), "onset": 1}

    def __init__(self, model: Kokanee, processor: Processor, seed: int) -> None:
        super().__init__()
        self.model, self.processor, self.seed = model, processor, seed
        self.head = nn.Linear(model.config.audio_config.d_model, sum(self.sizes.values()))
        self.windows = round(processor.config.chunk_s / SLOT_S)

    def batch(self, split: Split, number: int, size: int) -> Batch:
        """The first chunk of the sound of `size` scenes: mel features and labels. Equal arguments, equal batch."""
        rng = random.Random(f"{self.seed}/{split}/{number}")
        indices, features, labels = [], [], []
        for _ in range(size):
            indices.append(rng.randrange(N_SCENES))
            scene = sample_scene(split, indices[-1], self.seed)
            features.append(self.processor.features(waveform(scene)[: self.processor.config.chunk_s * RATE_HZ]))
            labels.append(window_labels(scene, self.windows))
        kind, pitch, onset = (torch.from_numpy(np.stack(part)) for part in zip(*labels, strict=True))
        batch = {"kind": kind, "pitch": pitch, "onset": onset}
        return {"sample": torch.tensor(indices), "input_features": torch.cat(features), **batch}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The sum of the parts' losses, and the share of right answers: over windows with a sound, and over silence."""
        states_BSD = self.model.audio.encode(batch["input_features"])
        windows_BWD = states_BSD.unflatten(1, (self.windows, -1)).mean(2)
        kind_BWC, pitch_BWC, onset_BW1 = self.head(windows_BWD).split(list(self.sizes.values()), dim=-1)
        sounds_BW = batch["pitch"] >= 0
        loss = functional.cross_entropy(kind_BWC.flatten(0, 1), batch["kind"].flatten())
        if bool(sounds_BW.any()):
            pitch = functional.cross_entropy(pitch_BWC.flatten(0, 1), batch["pitch"].flatten(), ignore_index=-1)
            loss = loss + pitch
        loss = loss + functional.binary_cross_entropy_with_logits(onset_BW1[..., 0], batch["onset"])
        right_BW = kind_BWC.argmax(-1) == batch["kind"]
        right = {
            "kind": right_BW[sounds_BW],
            "silence": right_BW[~sounds_BW],
            "pitch": (pitch_BWC.argmax(-1) == batch["pitch"])[sounds_BW],
            "onset": (onset_BW1[..., 0] > 0) == (batch["onset"] > 0),
        }
        return loss, shares(right)


def square_side_px(processor: Processor, n_frames: int) -> int:
    """Side of the largest square frame that the processor makes in a clip of `n_frames` frames."""
    side_px = math.isqrt(processor.config.max_frame_pixels)
    return processor.frame_size(side_px, side_px, n_frames)[0]


def shares(right: dict[str, torch.Tensor]) -> Stats:
    """Per cent that is true, for everything that was asked at all."""
    return {name: 100.0 * answers.float().mean() for name, answers in right.items() if answers.numel()}
