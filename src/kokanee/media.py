"""A video, sound or image file -> what a model is shown of it. No torch here.

`read_clip` goes once over a file and gives a `Clip`: the sampled frames with their times, and the sound as mono 16 kHz.
`make_clip` gives the same from arrays in memory, `write_clip` (media_write.py) makes files, `read_image` reads stills.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kokanee.decode import (
    OFFSET_IGNORED_S,
    PictureReader,
    SoundReader,
    Transform,
    index_by_decoding,
)
from kokanee.demux import FrameIndex, Source, check_file
from kokanee.errors import KokaneeError
from kokanee.media_write import write_clip
from kokanee.sampling import (
    RATE_HZ,
    Sampling,
    check_interval,
    fit_waveform,
    frame_span,
    length_s,
    sample_indices,
    step_seconds,
)

__all__ = ["Clip", "Sampling", "make_clip", "read_clip", "read_image", "sample_indices", "write_clip"]

WORTH_A_NOTE_S = 0.5


@dataclass(frozen=True)
class Clip:
    """What a model is shown of a file, or of the interval of it that starts at `start_s`.

    `frames`: sampled frames, each H,W,3 uint8 RGB (or what `transform` made of it); None without a picture.
    `times_s`: float64 (frames,), when each is shown, in seconds from the file's first frame.
    `step_s`: seconds per time step of two frames, as video-SALMONN 2+ counts them; None for the other rule.
    `waveform`: float32 (samples,), mono, 16 kHz, from `start_s` on; None without sound.
    `duration_s`: length in seconds as the model's rule counts it. `notes`: whatever was unusual about the file.
    """

    frames: list[np.ndarray] | None
    times_s: np.ndarray
    step_s: float | None
    waveform: np.ndarray | None
    duration_s: float
    start_s: float = 0.0
    source: str = ""
    notes: tuple[str, ...] = ()


def read_clip(
    path: str | os.PathLike[str],
    sampling: Sampling,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    transform: Transform | None = None,
    want: Sequence[str] = ("video", "audio"),
    threads: int = 0,
) -> Clip:
    """Read what `sampling` shows of a file, or of its part from `start_s` to `end_s` (seconds, fractions allowed).

    Frames are counted by their packets, not by the header's estimate; `transform(frame, number of frames)` is applied
    to each as it is decoded, so that full-size frames need not be kept. `want` may leave out "video" or "audio"; where
    the file lacks one of several wanted streams, the clip does too, and its notes say so. If a sampled frame cannot be
    decoded, the file is decoded from start to end, frames are counted again by what came out, and the notes say so.
    `threads`: decoder threads (0: one per core). Raises KokaneeError for what cannot be read and for empty intervals.
    """
    check_interval(start_s, end_s)
    if not want or set(want) - {"video", "audio"}:
        raise KokaneeError(f"want is {want!r}, but only 'video' and 'audio' can be wanted.")
    with Source(path, want, threads) as source:
        try:
            return _Reading(source, sampling, start_s, end_s, transform, threads).clip()
        except KokaneeError as error:
            if str(source.path) in str(error):
                raise
            raise KokaneeError(f"{source.path}: {error}") from error


def make_clip(
    frames: Sequence[np.ndarray] | np.ndarray | None,
    fps: float,
    waveform: np.ndarray | None,
    sampling: Sampling,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    transform: Transform | None = None,
    source: str = "memory",
) -> Clip:
    """The clip that `read_clip` gives of a file with these frames (all of them, at `fps`) and this 16 kHz waveform.

    Only sampled frames are taken out of `frames`, so it may be any sequence that makes them when asked. Raises
    KokaneeError as `read_clip` does.
    """
    check_interval(start_s, end_s)
    shown: list[np.ndarray] | None = None
    times_s, duration_s = np.zeros(0), None
    if frames is not None:
        indices = sample_indices(len(frames), fps, sampling, start_s, end_s)
        duration_s = length_s(len(frames), fps, sampling, start_s, end_s)
        times_s = np.array(indices) / fps
        shown = [frames[index] if transform is None else transform(frames[index], len(indices)) for index in indices]
    if waveform is not None:
        stop = None if end_s is None else round(end_s * RATE_HZ)
        waveform = np.asarray(waveform, np.float32)[round((start_s or 0.0) * RATE_HZ) : stop]
    return _finish(shown, times_s, waveform, duration_s, sampling, start_s, source, [])


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """A still image (PNG, JPEG, WebP, ...) as H,W,3 uint8 RGB, upright. Raises KokaneeError if it is none.

    Pillow decodes it, as it did for the published models. Of an animation the first frame is taken; transparency is
    dropped, not blended.
    """
    path = Path(path)
    check_file(path)
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise KokaneeError(
            f"{path} is no image that can be read ({error}). Give a PNG, JPEG or another still."
        ) from error


class _Reading:
    """One reading of an open file: picture and sound in one pass, and a complete second one if that fell short."""

    def __init__(
        self,
        source: Source,
        sampling: Sampling,
        start_s: float | None,
        end_s: float | None,
        transform: Transform | None,
        threads: int,
    ) -> None:
        self.source, self.sampling = source, sampling
        self.start_s, self.end_s = start_s, end_s
        self.transform, self.threads = transform, threads
        self.indices: list[int] = []
        self.duration_s: float | None = None

    def clip(self) -> Clip:
        source = self.source
        index = source.index() if source.video is not None else None
        picture, sound = None, None
        if source.video is None or index is not None:
            picture, sound = self._pass(index, from_start=False)
            if picture is not None and not picture.done:
                source.notes.append("a sampled frame could not be decoded: frames are counted by decoding all of them")
        if source.video is not None and (picture is None or not picture.done):
            source.restart(threads=1)
            index = index_by_decoding(source)
            if index is None:
                raise KokaneeError("no frame of its picture can be decoded. Repair it, or want only ('audio',).")
            source.restart(threads=1)
            picture, sound = self._pass(index, from_start=True)
        return self._clip(index, picture, sound)

    def _pass(self, index: FrameIndex | None, from_start: bool) -> tuple[PictureReader | None, SoundReader | None]:
        source, picture, sound, from_s = self.source, None, None, None
        zero_s = index.zero_s if index is not None else source.start_s
        if index is not None:
            self.indices, self.duration_s = choose_frames(index, self.sampling, self.start_s, self.end_s)
            picture = PictureReader(source, index, self.indices, self.transform, self.threads)
            if picture.plan is not None and not from_start:
                from_s = min(float(picture.plan.first_pts * index.time_base), zero_s + (self.start_s or 0.0))
        elif self.start_s:
            from_s = zero_s + self.start_s
        if source.audio is not None:
            sound = SoundReader(source, zero_s, self.start_s or 0.0, self.end_s, self.sampling.rule == "salmonn2")
        for packet in source.packets(from_s):
            if source.is_picture(packet):
                if picture is not None and not picture.done:
                    picture.feed(packet)
            elif sound is not None:
                sound.feed(packet)
            if (picture is None or picture.done) and (sound is None or sound.done):
                break
        if picture is not None and not picture.done:
            picture.drain()
        return picture, sound

    def _clip(self, index: FrameIndex | None, picture: PictureReader | None, sound: SoundReader | None) -> Clip:
        notes = self.source.notes
        waveform = None
        if sound is not None:
            waveform = sound.finish()
            notes.extend(_sound_notes(sound, waveform))
        elif "audio" in self.source.want:
            notes.append("no sound track")
        frames, times_s = None, np.zeros(0)
        if picture is not None and index is not None:
            frames = [frame for frame in picture.frames if frame is not None]
            if len(frames) < len(self.indices):
                raise KokaneeError("its frames decode differently each time (damaged data). Repair or re-encode it.")
            times_s = index.times_s[self.indices]
            if picture.n_errors:
                notes.append(f"{picture.n_errors} packets of picture could not be decoded")
            if picture.n_damaged:
                notes.append(f"{picture.n_damaged} of {len(frames)} sampled frames are damaged")
            if picture.resized:
                notes.append("the picture's size changes; all frames are scaled to the first one's")
        elif "video" in self.source.want:
            notes.append("no picture")
        ends_s = [sound.end_s if sound else 0.0, float(index.length * index.time_base) if index else 0.0]
        stated_s = self.source.stated_s
        if stated_s is not None and self.end_s is None and max(ends_s) < stated_s - max(1.0, 0.02 * stated_s):
            notes.append(f"the header promises {stated_s:.1f} s, but the file ends at {max(ends_s):.1f} s (cut off?)")
        return _finish(
            frames, times_s, waveform, self.duration_s, self.sampling, self.start_s, str(self.source.path), notes
        )


def choose_frames(
    index: FrameIndex, sampling: Sampling, start_s: float | None, end_s: float | None
) -> tuple[list[int], float]:
    """The sampled frames' numbers, and the clip's length in seconds.

    At a constant rate this is `sample_indices`. At a variable one the model's rule still goes by frame numbers, as
    published, but an interval is found by the frames' true times and has the rate of its own frames.
    """
    span = (index.n_frames, index.fps)
    expected_s = np.arange(index.n_frames) / index.fps
    steady = np.abs(index.times_s - expected_s).max() <= 0.5 / index.fps
    if steady or (start_s is None and end_s is None):
        return sample_indices(*span, sampling, start_s, end_s), length_s(*span, sampling, start_s, end_s)
    edges_s = np.append(index.times_s, float(index.length * index.time_base))
    even_s = [None if time_s is None else _even_time(time_s, edges_s, index.fps) for time_s in (start_s, end_s)]
    first, last = frame_span(*span, sampling, *even_s)
    fps = (last - first + 1) / (edges_s[last + 1] - edges_s[first])
    duration_s = (last - first + 1) / fps
    if sampling.rule == "salmonn2":
        duration_s = (edges_s[-1] if end_s is None else end_s) - (start_s or 0.0)
    return [first + number for number in sample_indices(last - first + 1, fps, sampling)], float(duration_s)


def _even_time(time_s: float, edges_s: np.ndarray, fps: float) -> float:
    """Where `time_s` would lie if the same frames were evenly spaced."""
    if time_s >= edges_s[-1]:
        return (len(edges_s) - 1) / fps + time_s - edges_s[-1]
    return float(np.interp(time_s, edges_s, np.arange(len(edges_s)))) / fps


def _sound_notes(sound: SoundReader, waveform: np.ndarray) -> list[str]:
    notes = []
    if sound.n_errors:
        notes.append(f"{sound.n_errors} packets of sound could not be decoded")
    if sound.n_holes:
        notes.append(f"{sound.n_holes} holes in the sound ({sound.hole_s:.1f} s) are filled with silence")
    if len(waveform) == 0:
        notes.append(
            "the sound track has nothing to hear here" if not sound.n_errors else "the sound cannot be decoded"
        )
    elif abs(sound.offset_s) >= OFFSET_IGNORED_S:
        when = "after" if sound.offset_s > 0 else "before"
        notes.append(f"sound starts {abs(sound.offset_s):.1f} s {when} the picture")
    return notes


def _finish(
    frames: list[np.ndarray] | None,
    times_s: np.ndarray,
    waveform: np.ndarray | None,
    duration_s: float | None,
    sampling: Sampling,
    start_s: float | None,
    source: str,
    notes: list[str],
) -> Clip:
    """The clip of these parts; sound is fitted to the model's rule. Raises KokaneeError if there is nothing at all."""
    if waveform is not None and len(waveform) == 0:
        waveform = None
    if frames is None and waveform is None:
        raise KokaneeError(
            f"{source} has neither picture nor sound here ({'; '.join(notes)}). Choose another part or file."
        )
    if waveform is not None:
        sound_s = len(waveform) / RATE_HZ
        if duration_s is not None and abs(sound_s - duration_s) >= WORTH_A_NOTE_S:
            when = "after" if sound_s > duration_s else "before"
            notes = [*notes, f"sound ends {abs(sound_s - duration_s):.1f} s {when} the picture"]
        fitted = fit_waveform(waveform, sampling, duration_s)
        if frames is None and len(fitted) < len(waveform):
            notes = [*notes, f"only the first {len(fitted) / RATE_HZ:.0f} of {sound_s:.0f} s of sound are used"]
        waveform = fitted
    if duration_s is None:
        assert waveform is not None
        duration_s = len(waveform) / RATE_HZ
    step_s = None if frames is None else step_seconds(len(frames), duration_s, sampling)
    return Clip(
        frames=frames,
        times_s=times_s,
        step_s=step_s,
        waveform=waveform,
        duration_s=duration_s,
        start_s=start_s or 0.0,
        source=source,
        notes=tuple(dict.fromkeys(notes)),
    )
