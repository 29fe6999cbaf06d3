"""A video, sound or image file -> what a model is shown of it. No torch here.

`read_clip` goes once over a file and gives a `Clip`: the sampled frames with their times, and the sound as mono 16 kHz.
`make_clip` gives the same from arrays in memory, `write_clip` (media_write.py) makes files, `read_image` reads stills,
`file_length_s` tells how long a file is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kokanee.decode import (
    OFFSET_IGNORED_S,
    PictureReader,
    SoundReader,
    Transform,
    index_by_decoding,
    sound_end_s,
)
from kokanee.demux import FrameIndex, Source, check_file
from kokanee.errors import KokaneeError
from kokanee.media_write import write_clip
from kokanee.sampling import (
    RATE_HZ,
    NoPicture,
    Sampling,
    check_interval,
    fit_waveform,
    length_s,
    sample_indices,
    step_seconds,
)

__all__ = [
    "Clip",
    "Sampling",
    "file_length_s",
    "make_clip",
    "read_clip",
    "read_image",
    "sample_indices",
    "write_clip",
]

WORTH_A_NOTE_S = 0.5


@dataclass(frozen=True)
class Clip:
    """What a model is shown of a file, or of the interval of it from `start_s` to `end_s` (seconds of the file).

    `frames`: sampled frames, each H,W,3 uint8 RGB (or what `transform` made of it); None without a picture.
    `times_s`: float64 (frames,), when each appears, in seconds from the file's first frame; where the rate varies, the
    first may have appeared before `start_s` and still be on screen.
    `step_s`: seconds per time step of two frames, as video-SALMONN 2+ counts them; None for the other rule.
    `waveform`: float32 (samples,), mono, 16 kHz, from `start_s` on, at least a second; None without sound.
    `duration_s`: length in seconds as the model's rule counts it, of sound alone without what was added to it.
    `end_s`: where the interval or the file ends: with its picture, or with sound that ends at least half a second
    later. `notes`: whatever was unusual about the file.
    """

    frames: list[np.ndarray] | None
    times_s: np.ndarray
    step_s: float | None
    waveform: np.ndarray | None
    duration_s: float
    start_s: float = 0.0
    end_s: float = inf
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
    the file, or this part of it, lacks one of several wanted, the clip does too, and its notes say so. If a frame of it
    cannot be decoded, the file is decoded from start to end, frames are counted again, and the notes say so.
    `threads`: decoder threads (0: one per core). Raises KokaneeError for what cannot be read and for empty intervals.
    """
    check_interval(start_s, end_s)
    with Source(path, want, threads) as source, named(source.path):
        return _Reading(source, sampling, start_s, end_s, transform, threads).clip()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Begin an error with the name of the file that it is about."""
    try:
        yield
    except KokaneeError as error:
        raise KokaneeError(f"{path}: {error}") from error


def file_length_s(path: str | os.PathLike[str], want: Sequence[str] = ("video", "audio")) -> float:
    """How long the wanted streams of a file last, in seconds from its first frame (without a picture: first sound).

    It ends with its picture, or with sound that ends at least half a second later. Nothing is kept, and little decoded.
    Raises KokaneeError as `read_clip` does.
    """
    with Source(path, want) as source, named(source.path):
        index = None
        if source.video is not None:
            index = source.index() or index_by_decoding(source)
        picture_s = 0.0 if index is None else index.length_s
        if source.audio is None:
            return picture_s
        sound_s = sound_end_s(source, source.start_s if index is None else index.zero_s)
        return sound_s if index is None or sound_s - picture_s >= WORTH_A_NOTE_S else picture_s


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
    times_s, duration_s, picture_s = np.zeros(0), 0.0, 0.0
    notes: list[str] = []
    try:
        if frames is not None:
            indices = sample_indices(len(frames), fps, sampling, start_s, end_s)
            duration_s, picture_s = length_s(len(frames), fps, sampling, start_s, end_s), len(frames) / fps
            times_s = np.array(indices) / fps
            shown = [
                frames[index] if transform is None else transform(frames[index], len(indices)) for index in indices
            ]
    except NoPicture as error:
        if waveform is None:
            raise
        notes.append(error.note)
    if waveform is not None:
        stop = None if end_s is None else round(end_s * RATE_HZ)
        waveform = np.asarray(waveform, np.float32)[round((start_s or 0.0) * RATE_HZ) : stop]
    clip = Clip(shown, times_s, None, waveform, duration_s, start_s or 0.0, end_s or inf, source, tuple(notes))
    return _finish(clip, picture_s, sampling)


def read_image(path: str | os.PathLike[str], notes: list[str] | None = None) -> np.ndarray:
    """A still image (PNG, JPEG, WebP, ...) as H,W,3 uint8 RGB, upright. Raises KokaneeError if it is none.

    Pillow decodes it, as it did for the published models. Of several frames the first is taken, and `notes` is told so;
    transparency is dropped, not blended; of 16 bits the upper 8 are kept. Greys of 32 bits are refused: nothing says
    which of their numbers is white.
    """
    path = Path(path)
    check_file(path)
    try:
        with Image.open(path) as image:
            n_frames = getattr(image, "n_frames", 1)
            if notes is not None and n_frames > 1:
                notes.append(f"an image of {n_frames} frames; the first is used")
            if image.mode in ("I", "F"):
                raise ValueError("greys of 32 bits without a stated white; save it with 8 or 16 bits")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError) as error:
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
        self.duration_s = 0.0

    def clip(self) -> Clip:
        source = self.source
        index = source.index() if source.video is not None else None
        if source.video is None or index is not None:
            picture, sound = self._pass(index, from_start=False)
            if picture is None or picture.done:
                return self._clip(index, picture, sound)
            source.notes.append("a sampled frame could not be decoded: frames are counted by decoding all of them")
        index = index_by_decoding(source)
        return self._clip(index, *self._pass(index, from_start=True))

    def _pass(self, index: FrameIndex | None, from_start: bool) -> tuple[PictureReader | None, SoundReader | None]:
        source, sound, from_s = self.source, None, None
        zero_s = index.zero_s if index is not None else source.start_s
        begin_s = zero_s + (self.start_s or 0.0)
        picture = self._picture(index)
        if picture is None:
            from_s = begin_s
        elif index is not None and picture.plan is not None and not from_start:
            from_s = min(float(picture.plan.first_pts * index.time_base), begin_s)
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

    def _picture(self, index: FrameIndex | None) -> PictureReader | None:
        """What reads the sampled frames; None without a picture, and where only the sound goes on."""
        if index is None:
            return None
        try:
            self.indices, self.duration_s = choose_frames(index, self.sampling, self.start_s, self.end_s)
        except NoPicture as error:
            if self.source.audio is None:
                raise
            self.source.notes.append(error.note)
            return None
        return PictureReader(self.source, index, self.indices, self.transform, self.threads)

    def _clip(self, index: FrameIndex | None, picture: PictureReader | None, sound: SoundReader | None) -> Clip:
        notes = self.source.notes
        waveform = None
        if sound is not None:
            waveform = sound.finish()
            notes.extend(_sound_notes(sound, waveform))
        elif "audio" in self.source.want:
            notes.append("no sound track")
        frames, times_s, picture_s = None, np.zeros(0), 0.0
        if picture is not None and index is not None:
            frames = [frame for frame in picture.frames if frame is not None]
            if len(frames) < len(self.indices):
                raise KokaneeError("its frames decode differently each time (damaged data). Repair or re-encode it.")
            times_s, picture_s = index.times_s[self.indices], index.length_s
            if not index.is_even:
                notes.append("frame times are uneven; frames are sampled by their numbers")
            if picture.n_errors:
                notes.append(f"{picture.n_errors} packets of picture could not be decoded")
            if picture.n_damaged:
                notes.append(f"{picture.n_damaged} of {len(frames)} sampled frames are damaged")
            if picture.resized:
                notes.append("the picture's size changes; all frames are scaled to the first one's")
        elif index is None and "video" in self.source.want:
            notes.append("no picture")
        ends_s = [sound.end_s if sound else 0.0, index.length_s if index else 0.0]
        stated_s = self.source.stated_s
        if stated_s is not None and self.end_s is None and max(ends_s) < stated_s - max(1.0, 0.02 * stated_s):
            notes.append(f"the header promises {stated_s:.1f} s, but the file ends at {max(ends_s):.1f} s (cut off?)")
        start_s, end_s, path = self.start_s or 0.0, self.end_s or inf, str(self.source.path)
        clip = Clip(frames, times_s, None, waveform, self.duration_s, start_s, end_s, path, tuple(notes))
        return _finish(clip, picture_s, self.sampling)


def choose_frames(
    index: FrameIndex, sampling: Sampling, start_s: float | None, end_s: float | None
) -> tuple[list[int], float]:
    """The sampled frames' numbers, and the clip's length in seconds.

    At a constant rate this is `sample_indices`. At a variable one the model's rule still goes by frame numbers, as
    published, but an interval has the frames that are on screen in it, from its start on, and their rate. Raises as
    `sample_indices` does.
    """
    rate = (index.n_frames, index.fps)
    if index.is_even or (start_s is None and end_s is None):
        return sample_indices(*rate, sampling, start_s, end_s), length_s(*rate, sampling, start_s, end_s)
    begin_s, stop_s = start_s or 0.0, index.length_s if end_s is None else end_s
    begin, stop = round(begin_s / index.time_base), round(stop_s / index.time_base)
    if begin >= index.length:
        raise NoPicture(start_s, end_s, index.n_frames, index.length_s)
    ticks = index.shown_pts - index.shown_pts[0]
    first = int(np.searchsorted(ticks, begin, "right")) - 1
    last = int(np.searchsorted(ticks, stop, "right" if sampling.rule == "salmonn2" else "left")) - 1
    n_frames, shown_s = max(last, first) - first + 1, min(stop_s, index.length_s) - begin_s
    indices = [first + number for number in sample_indices(n_frames, n_frames / shown_s, sampling)]
    return indices, stop_s - begin_s if sampling.rule == "salmonn2" else shown_s


def _sound_notes(sound: SoundReader, waveform: np.ndarray) -> list[str]:
    notes = []
    if sound.n_errors:
        notes.append(f"{sound.n_errors} packets of sound could not be decoded")
    if sound.n_holes:
        notes.append(f"{sound.n_holes} holes in the sound ({sound.hole_s:.1f} s) are filled with silence")
    if sound.n_overlaps:
        notes.append(f"{sound.n_overlaps} overlaps of the sound ({sound.overlap_s:.1f} s) are left out")
    if sound.n_backwards:
        notes.append(f"the times of the sound run backwards at {sound.n_backwards} places; it is joined there")
    if sound.n_not_finite:
        notes.append(f"{sound.n_not_finite} samples of sound are no finite numbers and replaced by silence")
    if len(waveform) == 0:
        notes.append(
            "the sound track has nothing to hear here" if not sound.n_errors else "the sound cannot be decoded"
        )
    elif abs(sound.offset_s) >= OFFSET_IGNORED_S:
        when = "after" if sound.offset_s > 0 else "before"
        notes.append(f"sound starts {abs(sound.offset_s):.1f} s {when} the picture")
    return notes


def _finish(clip: Clip, picture_s: float, sampling: Sampling) -> Clip:
    """`clip` with its sound fitted to the model's rule, its time step and its end.

    `picture_s` is the length of the file's whole picture, 0 where none is shown. Raises KokaneeError if there is
    neither picture nor sound.
    """
    waveform, duration_s, reach_s, notes = clip.waveform, clip.duration_s, picture_s, list(clip.notes)
    if sampling.rule == "salmonn2" and clip.frames is not None and waveform is not None and not len(waveform):
        waveform = fit_waveform(waveform, sampling, duration_s)  # a track that is silent here is a second of zeros
    elif waveform is not None and len(waveform) > 0:
        fitted = fit_waveform(waveform, sampling, None if clip.frames is None else duration_s)
        sound_s, heard_s = len(waveform) / RATE_HZ, min(len(waveform), len(fitted)) / RATE_HZ
        if clip.frames is None:
            duration_s = heard_s
            if heard_s < sound_s:
                notes.append(f"only the first {heard_s:.0f} of {sound_s:.0f} s of sound are used")
        elif abs(sound_s - duration_s) >= WORTH_A_NOTE_S:
            when = "after" if sound_s > duration_s else "before"
            notes.append(f"sound ends {abs(sound_s - duration_s):.1f} s {when} the picture")
        if clip.frames is None or clip.start_s + heard_s - picture_s >= WORTH_A_NOTE_S:
            reach_s = clip.start_s + (sound_s if clip.frames is None else heard_s)
        waveform = fitted
    elif clip.frames is None:
        raise KokaneeError(
            f"There is neither picture nor sound at {clip.start_s:g} s ({'; '.join(notes)}). "
            "Choose another part or file."
        )
    else:
        waveform = None
    return replace(
        clip,
        step_s=None if clip.frames is None else step_seconds(len(clip.frames), duration_s, sampling),
        waveform=waveform,
        duration_s=duration_s,
        end_s=min(clip.end_s, reach_s),
        notes=tuple(dict.fromkeys(notes)),
    )
