"""Which frames and which stretch of sound a model is shown: the published rules, one per model, as pure functions.

"salmonn2plus" (video-SALMONN 2+) spreads round(length / interval) frames evenly from the first frame to the last.
"salmonn2" (video-SALMONN 2) takes every k-th frame, and an even spread only where that gives more than `max_frames`.
Neither is ever replaced by the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kokanee.errors import KokaneeError

RATE_HZ = 16000
FRAMES_PER_STEP = 2
SHORTEST_SOUND_S = 1
NO_FRAME = 1e-6  # of a frame: what products of seconds and rates are wrong by


@dataclass(frozen=True)
class Sampling:
    """How a model samples a clip: one of the two published rules and its numbers.

    `interval_s` is the time between sampled frames in seconds (for "salmonn2" one over its frame rate), `min_frames`
    and `max_frames` bound their number ("salmonn2" has no lower bound but needs two).
    """

    rule: Literal["salmonn2plus", "salmonn2"]
    interval_s: float
    min_frames: int
    max_frames: int

    def __post_init__(self) -> None:
        if self.rule not in ("salmonn2plus", "salmonn2"):
            raise KokaneeError(f"Unknown sampling rule {self.rule!r}. There are 'salmonn2plus' and 'salmonn2'.")
        if not (self.interval_s > 0 and math.isfinite(self.interval_s)):
            raise KokaneeError(f"interval_s is {self.interval_s}, but frames must be a positive time apart.")
        if not 1 <= self.min_frames <= self.max_frames:
            raise KokaneeError(
                f"min_frames {self.min_frames} and max_frames {self.max_frames} leave no number of frames. "
                "Choose 1 <= min_frames <= max_frames."
            )


class NoPicture(KokaneeError):
    """The picture, `length_s` seconds long, has no frame in an interval. `note` says so where the sound goes on."""

    def __init__(self, start_s: float | None, end_s: float | None, n_frames: int, length_s: float) -> None:
        self.note = f"no picture here (it lasts {length_s:.2f} s)"
        super().__init__(
            f"No picture between {start_s or 0.0:g} s and {'the end' if end_s is None else f'{end_s:g} s'}: "
            f"it lasts {length_s:.2f} s ({n_frames} frames). Choose an interval inside it."
        )


class TooFewFrames(NoPicture):
    """One frame alone would be shown, and the model needs two. `note` says so where there is sound to hear."""

    def __init__(self, n_shown: int, n_frames: int, fps: float) -> None:
        self.note = (
            "too short for this model to see, which needs two frames; it hears the sound alone (a smaller interval_s "
            "shows more)"
        )
        KokaneeError.__init__(
            self,
            f"Only {n_shown} frame would be shown of {n_frames} at {fps:g} a second, and this model needs two. "
            "Give a longer clip or interval, or a smaller interval_s.",
        )


def check_interval(start_s: float | None, end_s: float | None) -> None:
    """Raise KokaneeError unless 0 <= start_s < end_s and both are finite (None: the clip's own start or end)."""
    for name, value in (("start_s", start_s), ("end_s", end_s)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise KokaneeError(f"{name} is {value}, but it must be a time of 0 seconds or more.")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise KokaneeError(
            f"The interval from {start_s or 0.0:g} s to {end_s:g} s is empty. Give an end after the start."
        )


def frame_span(
    n_frames: int, fps: float, sampling: Sampling, start_s: float | None = None, end_s: float | None = None
) -> tuple[int, int]:
    """First and last frame (both included) of the interval. Raises `NoPicture` if it holds no frame.

    Under "salmonn2" the frame nearest to `end_s` still belongs to it, as published. Under "salmonn2plus", whose authors
    have no intervals, the frames are those that are on screen in it, from the one at `start_s` on; the one that comes
    on at `end_s` is the next interval's first.
    """
    check_interval(start_s, end_s)
    first, last = 0 if start_s is None else round(start_s * fps), n_frames - 1
    if sampling.rule == "salmonn2plus" and start_s is not None:
        first = math.floor(start_s * fps + NO_FRAME)
        first = min(first, last) if start_s < n_frames / fps else first
    if end_s is not None:
        published = sampling.rule == "salmonn2"
        last = min(round(end_s * fps) if published else max(math.ceil(end_s * fps - NO_FRAME) - 1, first), last)
    if n_frames < 1 or first > last:
        raise NoPicture(start_s, end_s, n_frames, n_frames / fps)
    return first, last


def sample_indices(
    n_frames: int, fps: float, sampling: Sampling, start_s: float | None = None, end_s: float | None = None
) -> list[int]:
    """Frames to show the model: increasing indices into a clip of `n_frames` frames at `fps` frames a second.

    Raises `NoPicture` when the interval holds no frame, and `TooFewFrames` when "salmonn2" would show fewer than two.
    """
    first, last = frame_span(n_frames, fps, sampling, start_s, end_s)
    if sampling.rule == "salmonn2plus":
        wanted = round(length_s(n_frames, fps, sampling, start_s, end_s) / sampling.interval_s)
        wanted = min(max(wanted, sampling.min_frames), sampling.max_frames)
        return (first + np.unique(np.linspace(0, last - first, wanted, dtype=int))).tolist()
    step = max(round(fps / (1 / sampling.interval_s)), 1)
    indices = list(range(first, last + 1, step))
    if len(indices) > sampling.max_frames:
        indices = np.linspace(first, last, sampling.max_frames, dtype=int).tolist()
    if len(indices) < 2:
        raise TooFewFrames(len(indices), n_frames, fps)
    return indices


def length_s(
    n_frames: int, fps: float, sampling: Sampling, start_s: float | None = None, end_s: float | None = None
) -> float:
    """The clip's length in seconds as the model counts it.

    "salmonn2plus": frames of the interval over `fps`. "salmonn2": the interval as it was asked for, even past the
    file's end (so the published model was trained), else frames over `fps`.
    """
    if sampling.rule == "salmonn2" and not (start_s is None and end_s is None):
        return (n_frames / fps if end_s is None else end_s) - (start_s or 0)
    first, last = frame_span(n_frames, fps, sampling, start_s, end_s)
    return (last - first + 1) / fps


def step_seconds(n_shown: int, duration_s: float, sampling: Sampling) -> float | None:
    """Seconds per time step (two frames) that "salmonn2plus" is told: 2 * length / n. None for "salmonn2"."""
    return FRAMES_PER_STEP / (n_shown / duration_s) if sampling.rule == "salmonn2plus" else None


def fit_waveform(waveform: np.ndarray, sampling: Sampling, duration_s: float | None) -> np.ndarray:
    """The sound that the model hears, of a mono 16 kHz waveform that has been cut to the interval already.

    Both models: zeros up to one second. "salmonn2" then keeps round(16000 * duration_s) samples, and without a picture
    (`duration_s` None) as much as it has frames for (max_frames * interval_s). "salmonn2plus" keeps everything.
    """
    shortest = SHORTEST_SOUND_S * RATE_HZ
    if len(waveform) < shortest:
        waveform = np.concatenate([waveform, np.zeros(shortest - len(waveform), waveform.dtype)])
    if sampling.rule == "salmonn2":
        seconds = sampling.max_frames * sampling.interval_s if duration_s is None else duration_s
        waveform = waveform[: round(RATE_HZ * seconds)]
    return waveform
