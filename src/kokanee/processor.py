"""A clip and a conversation -> what the model takes: token ids, labels, 3-D positions, pixel patches, mel chunks.

A sample is a dict of tensors. Axes: L tokens, P patches, D numbers in a patch, C chunks of sound, M mel bins, F mel
frames.

    input_ids (L,) int64            labels (L,) int64, -100 = no loss       position_ids (3, L) int64
    pixel_values_videos (P, D)      video_grid_thw (1, 3)                   float32, int64
    pixel_values (P, D)             image_grid_thw (images, 3)              float32, int64
    input_features (C, M, F)                                                float32

A batch is the same with a batch axis in ids, labels and positions, and the media of all samples one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from kokanee.errors import KokaneeError, reasons
from kokanee.formats import read_json, write_text
from kokanee.layout import Block, Positions, Rules
from kokanee.media import Clip, Sampling, make_clip, read_clip
from kokanee.patches import check_frame, patchify, resize, target_size
from kokanee.prompt import IGNORED, Prompt, PromptWriter, Turn
from kokanee.sampling import RATE_HZ
from kokanee.tokenizer import AUDIO_TOKEN, TextEncoder, load_tokenizer

HOP = 160
CONFIG_FILE = "processor.json"
Sample = dict[str, torch.Tensor]
Medium = Clip | np.ndarray


class ProcessorConfig(BaseModel):
    """Settings of a processor. Unknown keys and settings that contradict each other raise `KokaneeError`.

    The defaults are those of video-SALMONN 2+: of the published scripts for training and evaluation, with the arguments
    that its README asks for. (The published example of inference takes 16 frames and 3136 pixels at least instead.)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["salmonn2plus", "salmonn2"] = Field("salmonn2plus", description="how frames are picked, see media.py")
    interval_s: float = Field(0.1, gt=0, description="seconds between frames")
    min_frames: int = Field(64, ge=1, description="frames taken even from a short clip")
    max_frames: int = Field(768, ge=1, description="frames taken at most")
    patch_size: int = Field(14, ge=1, description="pixels, height and width of a patch")
    temporal_patch_size: int = Field(2, ge=1, description="frames in a time step")
    merge_size: int = Field(2, ge=1, description="patches merged into a visual token, in each direction")
    min_pixels: int = Field(784, ge=1, description="pixels of an image at least")
    max_pixels: int = Field(61250, ge=1, description="pixels of an image at most")
    min_frame_pixels: int = Field(784, ge=1, description="pixels of a video frame at least")
    max_frame_pixels: int = Field(61250, ge=1, description="pixels of a video frame at most")
    spread_pixels: bool = Field(
        True, description="with n < max_frames, allow 0.95 * max_frames / n times as many pixels"
    )
    pixel_mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="of red, green, blue"
    )
    pixel_std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="of red, green, blue"
    )
    n_mels: int = Field(128, ge=1, description="mel bins")
    chunk_s: int = Field(30, ge=1, description="seconds of a chunk of sound")
    window_s: float = Field(0.5, gt=0, description="seconds of sound in an audio token")
    units_per_s: float = Field(2.0, gt=0, description="positions a second along the time axis")
    positions: Positions = Field(
        "trained", description="as in training, or as the published test script recomputes them"
    )
    system_prompt: str = Field("You are a helpful assistant.", description="first turn; empty = none")
    pad_token: str = "<|endoftext|>"
    turn_start_token: str = "<|im_start|>"
    turn_end_token: str = "<|im_end|>"
    media_start_token: str = "<|vision_start|>"
    media_end_token: str = "<|vision_end|>"
    image_token: str = "<|image_pad|>"
    video_token: str = "<|video_pad|>"
    audio_token: str = AUDIO_TOKEN

    def __init__(self, **settings: Any):
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise KokaneeError(f"Wrong processor settings: {reasons(error, type(self))}. Mend them.") from error

    @model_validator(mode="after")
    def _check(self) -> ProcessorConfig:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is more than max_frames {self.max_frames}")
        for least, most in (("min_pixels", "max_pixels"), ("min_frame_pixels", "max_frame_pixels")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least} {getattr(self, least)} is more than {most} {getattr(self, most)}")
        if abs(self.chunk_s / self.window_s - self.tokens_per_chunk) > 1e-6:
            raise ValueError(f"chunk_s {self.chunk_s} is no multiple of window_s {self.window_s}")
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.rule, self.interval_s, self.min_frames, self.max_frames)

    @property
    def tokens_per_chunk(self) -> int:
        return round(self.chunk_s / self.window_s)


class Processor:
    """Turns clips and conversations into samples, and samples into batches. `from_pretrained` loads a saved one."""

    config_class: ClassVar[type[ProcessorConfig]] = ProcessorConfig

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: ProcessorConfig | None = None):
        self.tokenizer = tokenizer
        self.config = config = config or ProcessorConfig()
        self.pad_id = self._id(config.pad_token)
        self.rules = Rules(
            image_id=self._id(config.image_token),
            video_id=self._id(config.video_token),
            audio_id=self._id(config.audio_token),
            merge_size=config.merge_size,
            audio_tokens_per_s=1.0 / config.window_s,
            units_per_s=config.units_per_s,
            positions=config.positions,
        )
        self.writer = self._make_writer()

    def _make_writer(self) -> PromptWriter:
        config = self.config
        return PromptWriter(
            TextEncoder(self.tokenizer),
            self.rules,
            config.system_prompt,
            turn_start_id=self._id(config.turn_start_token),
            turn_end_id=self._id(config.turn_end_token),
            media_start_id=self._id(config.media_start_token),
            media_end_id=self._id(config.media_end_token),
        )

    @property
    def place_ids(self) -> dict[str, int]:
        """The ids that hold the places of media, by their names in the model's config."""
        rules = self.rules
        return {"image_token_id": rules.image_id, "video_token_id": rules.video_id, "audio_token_id": rules.audio_id}

    def _id(self, name: str) -> int:
        known = self.tokenizer.get_added_vocab()
        if name not in known:
            raise KokaneeError(
                f"The tokenizer has no token {name!r} (its added tokens: {', '.join(known) or 'none'}). "
                "Add it, or name the right token in the processor's settings."
            )
        return known[name]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> Processor:
        """Load from `folder`; `settings` replace single settings of the saved `ProcessorConfig`.

        A folder in the authors' layout has no `processor.json`: then the settings are the published ones, with patch
        sizes and pixel statistics from `preprocessor_config.json` if it is there. Raises `KokaneeError` if the folder
        or its tokenizer is missing, or a setting is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise KokaneeError(f"{folder} is no folder. Give the folder of a checkpoint.")
        own = folder / CONFIG_FILE
        known = read_json(own) if own.is_file() else cls.published_settings(folder)
        return cls(cls.read_tokenizer(folder), cls.config_class(**{**known, **settings}))

    @classmethod
    def published_settings(cls, folder: Path) -> dict[str, Any]:
        """The settings that a folder in the authors' layout names."""
        path = folder / "preprocessor_config.json"
        theirs = read_json(path) if path.is_file() else {}
        names = {"image_mean": "pixel_mean", "image_std": "pixel_std"}
        keys = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        return {names.get(key, key): theirs[key] for key in keys if key in theirs}

    @classmethod
    def read_tokenizer(cls, folder: Path) -> PreTrainedTokenizerFast:
        """The tokenizer of a folder, with all tokens that the processor needs."""
        return load_tokenizer(folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `processor.json` and the tokenizer's files to `folder`, which is made if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        write_text(folder / CONFIG_FILE, self.config.model_dump_json(indent=2) + "\n")

    def read(
        self,
        path: str | Path,
        start_s: float | None = None,
        end_s: float | None = None,
        use: Sequence[str] = ("video", "audio"),
        threads: int = 0,
    ) -> Clip:
        """Read a file, or its part from `start_s` to `end_s`, sampled and resized for the model (see `read_clip`)."""
        return read_clip(
            path,
            self.config.sampling,
            start_s=start_s,
            end_s=end_s,
            transform=self.fit,
            want=tuple(use),
            threads=threads,
        )

    def make_clip(self, frames: Sequence[np.ndarray] | None, fps: float, waveform: np.ndarray | None = None) -> Clip:
        """The clip that `read` gives of a file with these frames (H, W, 3) uint8 and this waveform at 16 kHz."""
        return make_clip(frames, fps, waveform, self.config.sampling, transform=self.fit)

    def frame_size(self, height: int, width: int, n_frames: int) -> tuple[int, int]:
        """Height and width in pixels that a frame gets in a clip of `n_frames` sampled frames."""
        config = self.config
        max_pixels: float = config.max_frame_pixels
        if config.spread_pixels and n_frames < config.max_frames:
            max_pixels = 0.95 * config.max_frames / n_frames * config.max_frame_pixels
        return target_size(height, width, config.patch_size * config.merge_size, config.min_frame_pixels, max_pixels)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image gets."""
        config = self.config
        factor = config.patch_size * config.merge_size
        return target_size(height, width, factor, config.min_pixels, config.max_pixels)

    def fit(self, frame_HWC: np.ndarray, n_frames: int) -> np.ndarray:
        """One frame (H, W, 3) uint8 of a clip of `n_frames`, resized for the model."""
        check_frame(frame_HWC)
        height, width, _ = frame_HWC.shape
        return resize(frame_HWC, *self.frame_size(height, width, n_frames))

    def n_audio_tokens(self, n_samples: int) -> int:
        """Audio tokens of a waveform of `n_samples` at 16 kHz: those of every started chunk, of one chunk at least."""
        return max(math.ceil(n_samples / (self.config.chunk_s * RATE_HZ)), 1) * self.config.tokens_per_chunk

    def pixels(self, frames: Sequence[np.ndarray]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Resized frames -> patches (P, D) float32 and their grid (time steps, rows, columns)."""
        config = self.config
        return patchify(
            frames,
            config.patch_size,
            config.temporal_patch_size,
            config.merge_size,
            config.pixel_mean,
            config.pixel_std,
        )

    @cached_property
    def _mel(self) -> WhisperFeatureExtractor:
        return WhisperFeatureExtractor(
            feature_size=self.config.n_mels, sampling_rate=RATE_HZ, hop_length=HOP, chunk_length=self.config.chunk_s
        )

    def features(self, waveform: np.ndarray) -> torch.Tensor:
        """Waveform (samples,) at 16 kHz -> log-mel chunks (C, M, F) float32, each padded and normalised on its own."""
        if waveform.ndim != 1:
            raise KokaneeError(f"A waveform of shape {waveform.shape} is not mono. Give one row of samples at 16 kHz.")
        n_chunk = self.config.chunk_s * RATE_HZ
        waveform = np.asarray(waveform, dtype=np.float32)
        chunks = [waveform[start : start + n_chunk] for start in range(0, max(len(waveform), 1), n_chunk)]
        chunks[0] = np.pad(chunks[0], (0, max(RATE_HZ - len(chunks[0]), 0)))
        features = [self._mel(chunk, sampling_rate=RATE_HZ, return_tensors="pt")["input_features"] for chunk in chunks]
        return torch.cat(features)

    def prepare(self, media: Medium | Sequence[Medium] | None, turns: Sequence[Turn]) -> Sample:
        """One sample (see the head of this file) of a clip, an image (H, W, 3) uint8, several of them, or text alone.

        A clip with frames is a medium of kind "video", with or without its sound; a clip without frames is "audio". The
        frames of a clip are taken as they are (`read` and `make_clip` resize them); images are resized here. When the
        last turn is the user's, the prompt ends with the header of an answer, ready for generation. Raises
        `KokaneeError` for a clip with neither frames nor sound, and for a conversation without room for the media.
        """
        if media is None:
            return self.prepare_ids(turns)
        media = [media] if isinstance(media, (Clip, np.ndarray)) else media
        prepared = [self.medium(medium) for medium in media]
        prompt = self.writer.write(turns, [block for block, _ in prepared])
        tensors = {id(block): tensors for block, tensors in prepared}
        return {**_sample(prompt), **_concatenate([tensors[id(block)] for block in prompt.placed])}

    def medium(self, medium: Medium) -> tuple[Block, Sample]:
        """The block of one medium, and its tensors, as the model's `encode_media` takes them."""
        if isinstance(medium, np.ndarray):
            check_frame(medium)
            pixels_PD, grid_thw = self.pixels([resize(medium, *self.image_size(*medium.shape[:2]))])
            return Block("image", grid_thw), {"pixel_values": pixels_PD, "image_grid_thw": torch.tensor([grid_thw])}
        if not isinstance(medium, Clip):
            raise KokaneeError(
                f"A {type(medium).__name__} is no medium. Give a Clip, as from Processor.read, or an image as an array."
            )
        tensors: Sample = {}
        n_audio_tokens = 0
        if medium.waveform is not None:
            tensors["input_features"] = self.features(medium.waveform)
            n_audio_tokens = self.n_audio_tokens(len(medium.waveform))
        if not medium.frames:
            if not n_audio_tokens:
                raise KokaneeError(
                    f"{medium.source} has neither frames nor sound to prepare. Read at least one of them."
                )
            return Block("audio", n_audio_tokens=n_audio_tokens), tensors
        tensors["pixel_values_videos"], grid_thw = self.pixels(medium.frames)
        tensors["video_grid_thw"] = torch.tensor([grid_thw])
        return Block("video", grid_thw, medium.step_s, n_audio_tokens), tensors

    def prepare_ids(self, turns: Sequence[Turn], blocks: Sequence[Block] = ()) -> Sample:
        """`input_ids`, `labels` and `position_ids` of a conversation about media of which only the sizes are given."""
        return _sample(self.writer.write(turns, blocks))

    def answer_ids(self, text: str) -> torch.Tensor:
        """Ids (L,) of an answer after an open prompt: its text, the end of the turn and a newline."""
        return torch.from_numpy(self.writer.answer_ids(text))

    def with_answer(self, prompt: Sample, text: str) -> Sample:
        """An open prompt's sample with an answer put after it: the same as preparing the conversation with the answer.

        Positions count on from the prompt's last one. Raises `KokaneeError` if the prompt does not end with the header
        of an answer.
        """
        header = self.writer.answer_start
        if prompt["input_ids"][-len(header) :].tolist() != header.tolist():
            raise KokaneeError(
                "This prompt is not open for an answer. Prepare a conversation that ends with a question."
            )
        answer_L = self.answer_ids(text)
        first = int(prompt["position_ids"][0, -1]) + 1
        positions_3L = torch.arange(first, first + len(answer_L)).expand(3, -1)
        return {
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], answer_L]),
            "labels": torch.cat([prompt["labels"], answer_L]),
            "position_ids": torch.cat([prompt["position_ids"], positions_3L], dim=1),
        }

    def collate(self, samples: Sequence[Sample], padding_side: Literal["right", "left"] = "right") -> Sample:
        """Samples -> a batch: `input_ids`, `attention_mask`, `labels` (B, L), `position_ids` (3, B, L), and media.

        Padding: ids with the pad token, labels with -100, positions with 1. All other tensors are concatenated in the
        order of the samples; samples with different media mix freely. Pad on the left for generation.
        """
        if not samples:
            raise KokaneeError("A batch needs at least one sample. Give some.")
        n_batch, length = len(samples), max(len(sample["input_ids"]) for sample in samples)
        batch = {
            "input_ids": torch.full((n_batch, length), self.pad_id),
            "attention_mask": torch.zeros(n_batch, length, dtype=torch.int64),
            "labels": torch.full((n_batch, length), IGNORED),
            "position_ids": torch.ones(3, n_batch, length, dtype=torch.int64),
        }
        for row, sample in enumerate(samples):
            n_tokens = len(sample["input_ids"])
            place = slice(0, n_tokens) if padding_side == "right" else slice(length - n_tokens, length)
            batch["input_ids"][row, place] = sample["input_ids"]
            batch["attention_mask"][row, place] = 1
            batch["labels"][row, place] = sample["labels"]
            batch["position_ids"][:, row, place] = sample["position_ids"]
        return batch | _concatenate([{key: sample[key] for key in sample if key not in batch} for sample in samples])


def _sample(prompt: Prompt) -> Sample:
    return {
        "input_ids": torch.from_numpy(prompt.ids_L),
        "labels": torch.from_numpy(prompt.labels_L),
        "position_ids": torch.from_numpy(prompt.positions_3L),
    }


def _concatenate(parts: Sequence[Sample]) -> Sample:
    """The tensors of the parts, one after the other under each key."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: torch.cat([part[key] for part in parts if key in part]) for key in keys}
