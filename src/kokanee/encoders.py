"""Encoder pretraining on the world's labels: the visual tower names what is in each cell, the Whisper encoder what
each half second sounds like. The heads are thrown away afterwards; what they read from is what the captioner sees.

Axes: B pictures or clips, G cells of a picture, W windows of half a second, N labelled cells or windows, D width.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kokanee.attention import SEGMENT_ATTENTION
from kokanee.model import Kokanee
from kokanee.processor import RATE_HZ, Processor
from kokanee.world.labels import frame_labels, window_labels
from kokanee.world.render import frames
from kokanee.world.scene import BACKGROUNDS, COLOURS, PITCHES, SHAPES, SLOT_S, SOUNDS, Split, sample_scene
from kokanee.world.sound import waveform

Batch = dict[str, torch.Tensor]
Stats = dict[str, torch.Tensor]
N_SCENES = 10_000_000
N_GEOMETRY = 7
RARITY = 10.0  # about one moving figure in thirty spins


class VisualLabels(nn.Module):
    """Cell by cell: is there a figure, its colour and shape, where and how large it is and how that changes; and the
    background and the light. The tower's visual tokens are the cells."""

    parts = {"present": 1, "colour": len(COLOURS), "shape": len(SHAPES), "geometry": N_GEOMETRY, "spins": 1}
    whole = {"background": len(BACKGROUNDS), "dark": 1}

    def __init__(self, model: Kokanee, processor: Processor, seed: int) -> None:
        super().__init__()
        self.model, self.processor, self.seed = model, processor, seed
        model.visual.config._attn_implementation = SEGMENT_ATTENTION
        sizes = {**self.parts, **self.whole}
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(sizes.values()))
        self.sizes = sizes
        config = processor.config
        self.side_px = int(config.max_frame_pixels**0.5)
        self.cells = self.side_px // (config.patch_size * config.merge_size)

    def batch(self, split: Split, number: int, size: int) -> Batch:
        """`size` moments of as many scenes, each two frames long: patches and labels. Equal arguments, equal batch."""
        rng = random.Random(f"{self.seed}/{split}/{number}")
        pictures, labels = [], []
        for _ in range(size):
            scene = sample_scene(split, rng.randrange(N_SCENES), self.seed)
            step_s = rng.uniform(0.15, 0.27)
            time_s = rng.uniform(0.0, scene.duration_s - step_s)
            pictures += list(frames(scene, np.array([time_s, time_s + step_s]), self.side_px))
            labels.append(frame_labels(scene, time_s, self.cells, step_s))
        patches_PX, grid_thw = self.processor.pixels(pictures)
        batch = {"pixel_values": patches_PX, "grid": torch.tensor([grid_thw])}
        for part in ("present", "colour", "shape", "geometry", "spins", "background", "dark"):
            name = "geometry_G7" if part == "geometry" else part if part in self.whole else f"{part}_G"
            batch[part] = torch.from_numpy(np.stack([np.asarray(getattr(label, name)) for label in labels]))
        return batch

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The sum of the parts' losses, and the share of right answers for each part."""
        tokens_ND = self.model.encode_video(batch["pixel_values"], batch["grid"])
        said_BGX = self.head(tokens_ND).unflatten(0, (-1, self.cells**2))
        said = dict(zip(self.sizes, said_BGX.split(list(self.sizes.values()), dim=-1), strict=True))
        there_BG = batch["present"] > 0
        colour_NC, shape_NC = said["colour"][there_BG], said["shape"][there_BG]
        background_BC, dark_B = said["background"].mean(1), said["dark"].mean(1)[:, 0]
        present_BG, spins_N = said["present"][..., 0], said["spins"][there_BG][:, 0]
        spin_truth_N = batch["spins"][there_BG]
        loss = (
            4 * functional.binary_cross_entropy_with_logits(present_BG, batch["present"])
            + functional.cross_entropy(colour_NC, batch["colour"][there_BG])
            + 2 * functional.cross_entropy(shape_NC, batch["shape"][there_BG])
            + 2 * functional.l1_loss(said["geometry"][there_BG], batch["geometry"][there_BG])
            + functional.binary_cross_entropy_with_logits(spins_N, spin_truth_N, pos_weight=spins_N.new_tensor(RARITY))
            + functional.cross_entropy(background_BC, batch["background"])
            + functional.binary_cross_entropy_with_logits(dark_B, batch["dark"].float())
        )
        stats = {
            "present": share((present_BG > 0) == there_BG),
            "colour": share(colour_NC.argmax(-1) == batch["colour"][there_BG]),
            "shape": share(shape_NC.argmax(-1) == batch["shape"][there_BG]),
            "spins": share(spins_N[spin_truth_N > 0] > 0),
            "still": share(spins_N[spin_truth_N == 0] < 0),
            "background": share(background_BC.argmax(-1) == batch["background"]),
            "dark": share((dark_B > 0) == (batch["dark"] > 0)),
        }
        return loss, stats


class SoundLabels(nn.Module):
    """Window by window: which kind of sound is it, or silence; is it low or high; does a sound begin here."""

    def __init__(self, model: Kokanee, processor: Processor, seed: int) -> None:
        super().__init__()
        self.model, self.processor, self.seed = model, processor, seed
        self.sizes = {"kind": len(SOUNDS) + 1, "pitch": len(PITCHES), "onset": 1}
        self.head = nn.Linear(model.config.audio_config.d_model, sum(self.sizes.values()))
        self.windows = round(processor.config.chunk_s / SLOT_S)

    def batch(self, split: Split, number: int, size: int) -> Batch:
        """The first chunk of the sound of `size` scenes: mel features and labels. Equal arguments, equal batch."""
        rng = random.Random(f"{self.seed}/{split}/{number}")
        features, labels = [], []
        for _ in range(size):
            scene = sample_scene(split, rng.randrange(N_SCENES), self.seed)
            features.append(self.processor.features(waveform(scene)[: self.processor.config.chunk_s * RATE_HZ]))
            labels.append(window_labels(scene, self.windows))
        kind, pitch, onset = (torch.from_numpy(np.stack(part)) for part in zip(*labels, strict=True))
        return {"input_features": torch.cat(features), "kind": kind, "pitch": pitch, "onset": onset}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Stats]:
        """The sum of the parts' losses, and the share of right answers: over windows with a sound, and over silence."""
        states_BSD = self.model.audio.encode(batch["input_features"])
        windows_BWD = states_BSD.unflatten(1, (self.windows, -1)).mean(2)
        kind_BWC, pitch_BWC, onset_BW1 = self.head(windows_BWD).split(list(self.sizes.values()), dim=-1)
        sounds_BW = batch["pitch"] >= 0
        loss = (
            functional.cross_entropy(kind_BWC.flatten(0, 1), batch["kind"].flatten())
            + functional.cross_entropy(pitch_BWC.flatten(0, 1), batch["pitch"].flatten(), ignore_index=-1)
            + functional.binary_cross_entropy_with_logits(onset_BW1[..., 0], batch["onset"])
        )
        right_BW = kind_BWC.argmax(-1) == batch["kind"]
        stats = {
            "kind": share(right_BW[sounds_BW]),
            "silence": share(right_BW[~sounds_BW]),
            "pitch": share((pitch_BWC.argmax(-1) == batch["pitch"])[sounds_BW]),
            "onset": share((onset_BW1[..., 0] > 0) == (batch["onset"] > 0)),
        }
        return loss, stats


def share(right: torch.Tensor) -> torch.Tensor:
    """Per cent that is true."""
    return 100.0 * right.float().mean()
