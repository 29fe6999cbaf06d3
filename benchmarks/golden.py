"""A folder of golden numbers from the published video-SALMONN 2+, with the model and processor of its checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from kokanee import checkpoints
from kokanee.processor import Processor, ProcessorConfig
from kokanee.prompt import published_turns

CASES = ("av", "video", "audio", "image")
WAVES = {"av": "mid", "audio": "long"}
TEXT = ("input_ids", "attention_mask", "position_ids")
Tensors = dict[str, torch.Tensor]


class Golden:
    """A folder of golden data, with the model and the processor made from its checkpoint."""

    def __init__(self, folder: Path, attention: str = "sdpa") -> None:
        self.folder = folder
        with tempfile.TemporaryDirectory() as joined:
            for part in ("checkpoint", "tokenizer"):
                for file in (folder / part).iterdir():
                    os.symlink(file.resolve(), Path(joined) / file.name)
            self.model, self.processor = checkpoints.load(joined, dtype="float32", attention=attention)

    def tensors(self, name: str) -> Tensors:
        path = self.folder / name
        found = load_file(path) if path.is_file() else {}
        return {
            key: value.long() if value.dtype == torch.int16 and "wave" not in key else value
            for key, value in found.items()
        }

    def read(self, name: str) -> Any:
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else {}

    @cached_property
    def audio(self) -> Tensors:
        kept = self.tensors("pixels_and_mel.safetensors")
        return {key: value for key, value in kept.items() if key.startswith("wave")} | self.tensors("audio.safetensors")

    @cached_property
    def forward(self) -> Tensors:
        return self.tensors("forward.safetensors")

    def features(self, wave: str) -> torch.Tensor | None:
        """Log-mel chunks (C, M, F) of a waveform, or None if the folder lacks it."""
        stored = self.audio.get("wave.long" if wave == "exact30" else f"wave.{wave}")
        if stored is None:
            return None
        samples = stored.numpy().astype(np.float32) / 32768
        return self.processor.features(samples[:480000] if wave == "exact30" else samples)

    def case(self, name: str) -> Tensors:
        return {key.split(".", 1)[1]: value for key, value in self.forward.items() if key.startswith(f"{name}.")}

    def sizer(self) -> Processor:
        """A processor with the data settings of the forward cases."""
        known = self.read("forward.json")["data_settings"]
        return Processor(
            self.processor.tokenizer,
            ProcessorConfig(
                max_frames=known["video_max_frames"],
                min_frames=known["video_min_frames"],
                interval_s=known["base_interval"],
                min_pixels=known["min_pixels"],
                max_pixels=known["max_pixels"],
                min_frame_pixels=known["video_min_frame_pixels"],
                max_frame_pixels=known["video_max_frame_pixels"],
            ),
        )

    def pixels(self, name: str) -> tuple[torch.Tensor, list[int]]:
        """Patches and grid that our processor makes of a case's frames."""
        case, sizer = self.case(name), self.sizer()
        if name == "image":
            image = case["image"].numpy()
            sample = sizer.prepare(image, published_turns([{"from": "human", "value": "<image>"}]))
            return sample["pixel_values"], sample["image_grid_thw"][0].tolist()
        frames = list(case["frames"].permute(0, 2, 3, 1).contiguous().numpy())
        patches, grid = sizer.pixels([sizer.fit(frame, len(frames)) for frame in frames])
        return patches, list(grid)

    def media(self, name: str) -> Tensors:
        """The media arguments of the model for a case; stored audio tokens where the folder lacks the waveform."""
        case: Tensors = {}
        if name in WAVES:
            features = self.features(WAVES[name])
            key = "audio_embeds" if features is None else "input_features"
            case[key] = self.audio[f"tokens.{WAVES[name]}"].flatten(0, 1) if features is None else features
        if name != "audio":
            kind, suffix = ("image", "") if name == "image" else ("video", "_videos")
            stored = self.case(name)
            case[f"pixel_values{suffix}"] = stored.get(f"pixel_values{suffix}", self.pixels(name)[0])
            case[f"{kind}_grid_thw"] = stored[f"{kind}_grid_thw"]
        return case

    def text(self, name: str) -> Tensors:
        return {
            key: value
            for key, value in self.case(name).items()
            if key in ("input_ids", "attention_mask", "position_ids")
        }
