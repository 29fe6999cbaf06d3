"""Prompts of video-SALMONN 2 (2410.06682), built on LLaVA-OneVision: frame after frame, with sound spread over them.

A medium stands before the text of a question, without tokens around it. Each frame is its rows of visual tokens, each
row with a newline embedding after it. All audio tokens, also those of the silence that fills the last 30 s, are spread
evenly over the frames; where their numbers do not divide, some audio tokens stand twice. In a video without sound each
frame is followed by its time as text. Positions count on by one.

Tensor axes: L tokens, N tokens of one block, C chunks of sound, T audio tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from kokanee.errors import KokaneeError
from kokanee.formats import read_json
from kokanee.layout import Block
from kokanee.media import Clip
from kokanee.patches import check_frame
from kokanee.processor import Medium, Processor, ProcessorConfig, Sample
from kokanee.prompt import Draft, PromptWriter, Turn
from kokanee.tokenizer import TextEncoder, load_tokenizer

LAYOUT = "salmonn2"
PARTS_FILE = "submodule_configs.json"
"""Sizes of encoders, which the published config does not hold, beside it where they are not the published ones."""
FRONT_TOKENS_PER_S = 50  # as published, although windows of half a second give two
ZERO_TOKEN = "<|zero_pad|>"
POOLED = 2
WITHOUT_EFFECT = (
    "min_frames",
    "min_pixels",
    "max_pixels",
    "min_frame_pixels",
    "max_frame_pixels",
    "spread_pixels",
    "units_per_s",
    "positions",
    "media_start_token",
    "media_end_token",
)
"""Settings of video-SALMONN 2+ that this model does not have."""


class Salmonn2ProcessorConfig(ProcessorConfig):
    """The settings of video-SALMONN 2, by default those of the published scripts: a frame a second, 110 at most."""

    layout: Literal["salmonn2"] = LAYOUT
    rule: Literal["salmonn2plus", "salmonn2"] = Field("salmonn2", description="how frames are picked, see sampling.py")
    interval_s: float = Field(1.0, gt=0, description="seconds between frames")
    min_frames: int = 1
    max_frames: int = Field(110, ge=2, description="frames taken at most")
    temporal_patch_size: int = Field(1, ge=1, le=1, description="frames in a time step")
    merge_size: int = Field(POOLED, ge=POOLED, le=POOLED, description="patches pooled into a token, in each direction")
    pixel_mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="of red, green, blue")
    pixel_std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="of red, green, blue")
    frame_side: int = Field(384, ge=1, description="pixels, height and width of a frame, whatever its shape was")
    time_tokens: bool = Field(True, description="the time after each frame of a video without sound")

    @model_validator(mode="after")
    def _check_own(self) -> Salmonn2ProcessorConfig:
        if self.frame_side < POOLED * self.patch_size:
            raise ValueError(f"frame_side {self.frame_side} is less than two patches of {self.patch_size}")
        fields = type(self).model_fields
        changed = [name for name in WITHOUT_EFFECT if getattr(self, name) != fields[name].default]
        if changed:
            less = "less is shown with a lower max_frames or a larger interval_s"
            raise ValueError(f"video-SALMONN 2 has no {', '.join(changed)}; {less}")
        return self


@dataclass(frozen=True)
class Spread:
    """How the audio tokens of a video stand in its prompt. repeats: how often each does, (tokens,) int64. per_frame:
    how many places follow each frame. behind: how many tokens come after the last frame's."""

    repeats: np.ndarray
    per_frame: int
    behind: int


def spread_sound(n_tokens: int, n_frames: int, duration_s: float) -> Spread:
    """Spread `n_tokens` audio tokens over the frames of a clip of `duration_s` seconds.

    The first 50 * duration_s tokens (in practice all) are stretched to a multiple of `n_frames` by nearest neighbour,
    whose index is a product in float32; those after them stand once, behind the last frame.
    """
    front = min(n_tokens, round(FRONT_TOKENS_PER_S * duration_s))
    stretched = front + -front % n_frames
    repeats = np.ones(n_tokens, dtype=np.int64)
    if front:
        sources = np.arange(stretched, dtype=np.float32) * np.float32(front / stretched)
        repeats[:front] = np.bincount(np.minimum(sources.astype(np.int64), front - 1), minlength=front)
    return Spread(repeats, stretched // n_frames, n_tokens - front)


def spread_of(block: Block) -> Spread:
    """How the sound of a block stands in its prompt. Raises `KokaneeError` for frames without their time."""
    if block.grid_thw is None:
        return Spread(np.ones(block.n_audio_tokens, dtype=np.int64), 0, block.n_audio_tokens)
    n_frames = block.grid_thw[0]
    return spread_sound(block.n_audio_tokens, n_frames, n_frames * seconds_of_step(block))


def seconds_of_step(block: Block) -> float:
    """Seconds from a frame to the next. Raises `KokaneeError` where the block does not say."""
    if block.step_s is None:
        raise KokaneeError("Frames of video-SALMONN 2 come with their time. Give the block's step_s.")
    return block.step_s


class FramePromptWriter(PromptWriter):
    """Writes the prompts of video-SALMONN 2. Pieces of a turn are encoded each on its own, as published.

    `zero_id` holds the place of a vector of zeros; `time_tokens`: see `Salmonn2ProcessorConfig`. The loss is on the
    assistant's texts and the end of their turns alone; the published code also puts it on the tokens around the turns
    of user and system.
    """

    def __init__(self, *arguments: Any, zero_id: int, time_tokens: bool, **ids: int):
        super().__init__(*arguments, **ids)
        self.zero_id, self.time_tokens = zero_id, time_tokens
        self.newline = self.encode("\n")

    def _add_question(self, draft: Draft, turn: Turn, waiting: list[Block]) -> None:
        draft.add(self.turn_start, self.encode("user"), self.newline)
        text = turn.text
        if turn.slots:
            (offset, _), *more = turn.slots
            if more or not waiting:
                raise KokaneeError(
                    "The conversation has a place for one more medium than it was given, or than this model takes: one "
                    "in a turn. Give that medium, or take the place away."
                )
            block = waiting.pop(0)
            draft.placed.append((draft.length, block))
            draft.add(self.block_ids(block), self.newline)
            text = text if offset == 0 else "\n" + text.strip()
        draft.add(self.encode(text), self.turn_end)

    def block_ids(self, block: Block) -> np.ndarray:
        """The ids (N,) of a block: places of its tokens, and times. Raises `KokaneeError` for frames without time."""
        spread = spread_of(block)
        behind = np.full(spread.behind, self.rules.audio_id, dtype=np.int64)
        if block.grid_thw is None:
            return behind
        n_frames, n_rows, n_columns = block.grid_thw
        frame = np.full(n_rows // POOLED * (n_columns // POOLED + 1), self.rules.video_id, dtype=np.int64)
        if block.n_audio_tokens:
            frame = np.concatenate([frame, np.full(spread.per_frame, self.rules.audio_id)])
        if block.n_audio_tokens or not self.time_tokens:
            return np.concatenate([np.tile(frame, n_frames), behind])
        times = self._times(n_frames, seconds_of_step(block))
        return np.concatenate([part for time in times for part in (frame, time)])

    def _times(self, n_frames: int, step_s: float) -> list[np.ndarray]:
        """The ids of each frame's time in seconds; shorter ones are filled up with places of zeros, which are seen."""
        times = [self.encode(str(round(step_s * number, 1))) for number in range(1, n_frames + 1)]
        longest = max(map(len, times))
        return [np.concatenate([time, np.full(longest - len(time), self.zero_id)]) for time in times]

    def _positions(self, ids_L: np.ndarray, placed: Sequence[tuple[int, Block]]) -> np.ndarray:
        return np.tile(np.arange(len(ids_L), dtype=np.int64), (3, 1))


class Salmonn2Processor(Processor):
    """`Processor` of video-SALMONN 2. Frames are (frames, 3, side, side) in `pixel_values_videos`; with sound come
    `audio_segments` (C,), the number of each chunk in its clip, and `audio_repeats` (C, T), how often each audio token
    stands in the prompt. It takes one clip a question, and no images."""

    config_class: ClassVar = Salmonn2ProcessorConfig
    config: Salmonn2ProcessorConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _make_writer(self) -> PromptWriter:
        config = self.config
        return FramePromptWriter(
            TextEncoder(self.tokenizer),
            self.rules,
            config.system_prompt,
            turn_start_id=self._id(config.turn_start_token),
            turn_end_id=self._id(config.turn_end_token),
            zero_id=self._id(ZERO_TOKEN),
            time_tokens=config.time_tokens,
        )

    @property
    def place_ids(self) -> dict[str, int]:
        return super().place_ids | {"zero_token_id": self._id(ZERO_TOKEN)}

    @classmethod
    def published_settings(cls, folder: Path) -> dict[str, Any]:
        """The settings that a published folder names. Raises `KokaneeError` for windows that Kokanee does not cut."""
        settings, parts = published_args(folder), published_parts(folder)
        window_s, stride_s = settings.get("second_per_window", 0.5), settings.get("second_stride", 0.5)
        if window_s != stride_s:
            raise KokaneeError(
                f"{folder} hears windows of {window_s} s every {stride_s} s. Kokanee prepares windows that follow each "
                "other, as the published ones do."
            )
        siglip, whisper = parts.get("siglip_vision") or {}, parts.get("whisper_encoder") or {}
        found = {
            "time_tokens": settings.get("add_time_token"),
            "interval_s": 1 / settings.get("fps", 1),
            "window_s": stride_s / settings.get("num_speech_query_token", 1),
            "frame_side": siglip.get("image_size"),
            "patch_size": siglip.get("patch_size"),
            "n_mels": whisper.get("num_mel_bins"),
        }
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def read_tokenizer(cls, folder: Path) -> PreTrainedTokenizerFast:
        """The folder's tokenizer; the published ones have no tokens that hold the places of media, so they get some."""
        tokenizer = load_tokenizer(folder)
        names = cls.config_class()
        for name in (names.image_token, names.video_token, names.audio_token, ZERO_TOKEN):
            if name not in tokenizer.get_added_vocab():
                token: Any = AddedToken(name, normalized=False, special=True)
                tokenizer.add_tokens(token)
        return tokenizer

    def frame_size(self, height: int, width: int, n_frames: int) -> tuple[int, int]:
        return self.config.frame_side, self.config.frame_side

    def fit(self, frame_HWC: np.ndarray, n_frames: int) -> np.ndarray:
        """One frame (H, W, 3) uint8 as a square: bicubic by Pillow, as in training (torch differs by a step of 255)."""
        check_frame(frame_HWC)
        side = self.config.frame_side
        return np.asarray(Image.fromarray(frame_HWC).resize((side, side), Image.Resampling.BICUBIC))

    def pixels(self, frames: Sequence[np.ndarray]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Resized frames -> pixels (frames, 3, side, side) float32, and the numbers of frames, rows and columns."""
        side = self.config.frame_side
        for frame in frames:
            check_frame(frame)
        if {frame.shape[:2] for frame in frames} != {(side, side)}:
            raise KokaneeError(
                f"This model sees frames of {side} x {side} pixels; these have others. "
                "Let Processor.read or Processor.make_clip resize them."
            )
        pixels_FCHW = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255.0
        mean_C11 = torch.tensor(self.config.pixel_mean)[:, None, None]
        std_C11 = torch.tensor(self.config.pixel_std)[:, None, None]
        patches = side // self.config.patch_size
        return (pixels_FCHW - mean_C11) / std_C11, (len(frames), patches, patches)

    def medium(self, medium: Medium) -> tuple[Block, Sample]:
        if not isinstance(medium, Clip):
            raise KokaneeError("video-SALMONN 2 takes clips alone, no images. Give a video or sound.")
        block, tensors = super().medium(medium)
        if block.grid_thw is not None:
            block = Block("video", block.grid_thw, medium.duration_s / block.grid_thw[0], block.n_audio_tokens)
        if block.n_audio_tokens:
            tensors |= self.placed_sound(block)
        return block, tensors

    def placed_sound(self, block: Block) -> Sample:
        """`audio_segments` and `audio_repeats` of a block."""
        repeats_CT = torch.from_numpy(spread_of(block).repeats).view(-1, self.config.tokens_per_chunk)
        return {"audio_segments": torch.arange(len(repeats_CT)), "audio_repeats": repeats_CT}


def published_args(folder: Path) -> dict[str, Any]:
    """What a published config.json says of the model that was trained: its `model_args`. The same names on its top
    level are those of the model that training began with.

    Raises `KokaneeError` where it does not say anything.
    """
    found = read_json(folder / "config.json").get("model_args")
    if not found:
        raise KokaneeError(
            f"{folder}: config.json has no model_args, in which a video-SALMONN 2 keeps how it sees and hears. Add "
            'those of its training; "model_args": {"add_time_token": true, "fps": 1} stands for the published settings.'
        )
    return found


def published_parts(folder: Path) -> dict[str, Any]:
    """Sizes of encoders that are not the published ones."""
    return read_json(folder / PARTS_FILE) if (folder / PARTS_FILE).is_file() else {}
