"""Packets in, pictures and sound out: `PictureReader` and `SoundReader` are fed the packets of one pass over a file.

Pictures are the decoder's own, turned to RGB by swscale with PyAV's defaults (bilinear chroma, the file's own colour
matrix and range, BT.601 where it names none; no scaling). Dropping packets never changes them: every frame equals that
of a decode from start to end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from kokanee.demux import DecodePlan, FrameIndex, Source, index_frames, plan_decoding
from kokanee.sampling import RATE_HZ

# Decoders in which a skipped "non-reference" picture is one that no other picture is ever made from. (In HEVC it may
# serve a higher temporal layer.)
SKIPPABLE_CODECS = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
OFFSET_IGNORED_S = 0.1
LONGEST_GAP_S = 600.0
PREROLL_S = 1.0

Transform = Callable[[np.ndarray, int], np.ndarray]


class PictureReader:
    """Picks the frames `targets` (display order) out of the packets that it is fed.

    With an index made from packets it decodes only what the targets need; with one made by decoding it decodes
    everything and counts. `frames` holds the pictures (H,W,3 uint8, or what `transform(frame, number of targets)` makes
    of each), None where a frame has not come out. `done` stays False if the frames come in another order than their
    times say.
    """

    def __init__(
        self, source: Source, index: FrameIndex, targets: Sequence[int], transform: Transform | None, threads: int
    ) -> None:
        assert source.video is not None
        self.context = source.video.codec_context
        self.frames: list[np.ndarray | None] = [None] * len(targets)
        self.plan: DecodePlan | None = None
        self.n_damaged, self.n_errors = 0, 0
        self.resized = False
        self._transform = transform
        self._to_rgb = RgbConverter(threads)
        self._size: tuple[int, int] | None = None
        self._n_seen = 0
        self._last_pts: int | None = None
        self._disordered = False
        self._left = len(targets)
        if index.packet_pts is None:
            self._slots: dict[int | None, int] = {target: slot for slot, target in enumerate(targets)}
        else:
            self.plan = plan_decoding(index, targets)
            self._slots = {int(index.shown_pts[target]): slot for slot, target in enumerate(targets)}
        self._may_skip = self.context.name in SKIPPABLE_CODECS

    @property
    def done(self) -> bool:
        return self._left == 0 and not self._disordered

    def feed(self, packet: Any) -> None:
        """Take one packet of the video stream; drop it where the plan has no use for it."""
        if self.plan is not None:
            step = self.plan.steps.get(packet.pts)
            if step is None:
                return
            afresh, is_target = step
            if afresh:
                self.drain()
                self.context.flush_buffers()
            if self._may_skip:
                self.context.skip_frame = "DEFAULT" if is_target else "NONREF"
        self._decode(packet)

    def drain(self) -> None:
        """Collect the pictures that the decoder still holds."""
        if self.context.is_open:
            self._decode(None)

    def _decode(self, packet: Any) -> None:
        try:
            frames = self.context.decode(packet)
        except av.error.FFmpegError:
            self.n_errors += 1
            return
        self._take(frames)

    def _take(self, frames: list[Any]) -> None:
        for frame in frames:
            if self.plan is not None:
                self._disordered |= self._last_pts is not None and (frame.pts is None or frame.pts <= self._last_pts)
                self._last_pts = frame.pts
            slot = self._slots.get(self._n_seen if self.plan is None else frame.pts)
            self._n_seen += 1
            if slot is None or self.frames[slot] is not None:
                continue
            size = (frame.width, frame.height)
            self._size = self._size or size
            self.resized |= size != self._size
            self.n_damaged += frame.is_corrupt
            picture = self._to_rgb(frame, self._size)
            self.frames[slot] = picture if self._transform is None else self._transform(picture, len(self.frames))
            self._left -= 1


class RgbConverter:
    """Decoded frames -> H,W,3 uint8 RGB, upright. One swscale context is shared by all frames."""

    def __init__(self, threads: int) -> None:
        self._reformatter, self._threads = VideoReformatter(), threads

    def __call__(self, frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
        """The frame, turned and mirrored as its display matrix says; scaled to `size` (width, height) if need be."""
        width, height = size or (frame.width, frame.height)
        picture = self._reformatter.reformat(frame, width, height, format="rgb24", threads=self._threads)
        plane = picture.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:height, : 3 * width]
        return upright(rows.reshape(height, width, 3), display_matrix(frame))


def display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """The turning part (a, b, c, d) of a frame's display matrix: shown x = a*x + c*y, y = b*x + d*y. None: as is."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    return a, b, c, d


def upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """`image` (H,W,C) as it is to be shown: mirrored, and turned by the quarter turn nearest to the angle."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, flip_x, flip_y = image.transpose(1, 0, 2), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


class SoundReader:
    """Collects the sound between two moments as mono 16 kHz float32, in step with the picture.

    `zero_s` is the file's own time of our 0 s, `lo_s` and `hi_s` the interval (None: to the end). Sound that starts up
    to 0.1 s off is left where it is, as the published readers do; a later start, and holes, are filled with silence.
    `first_channel` keeps channel 0 of many (video-SALMONN 2) instead of FFmpeg's mix-down (video-SALMONN 2+).
    """

    def __init__(self, source: Source, zero_s: float, lo_s: float, hi_s: float | None, first_channel: bool) -> None:
        assert source.audio is not None
        stream = source.audio
        self.context, self.time_base = stream.codec_context, stream.time_base
        self._zero_s = zero_s
        self._set_origin(zero_s if stream.start_time is None else float(stream.start_time * stream.time_base))
        self.lo_s = lo_s
        self.lo, self.hi = round(lo_s * RATE_HZ), None if hi_s is None else round(hi_s * RATE_HZ)
        self.n_errors, self.n_holes, self.hole_s = 0, 0, 0.0
        self._layout = None if first_channel else "mono"
        self._resampler: Any = None
        self._signature: Any = None
        self._next_s: float | None = None
        self._at: int | None = None
        self._blocks: list[np.ndarray] = []

    @property
    def end_s(self) -> float:
        """Where the sound that was heard so far ends, in seconds from 0 s."""
        return self._next_s or 0.0

    @property
    def done(self) -> bool:
        return self.hi is not None and self._at is not None and self._at >= self.hi

    def feed(self, packet: Any) -> None:
        """Take one packet of the sound stream, unless it lies well before or after the interval."""
        if self.done or (self._at is None and packet.pts is not None and self._ends_s(packet) < self.lo_s - PREROLL_S):
            return
        try:
            frames = self.context.decode(packet)
        except av.error.FFmpegError:
            self.n_errors += 1
            return
        for frame in frames:
            self._take(frame)

    def _ends_s(self, packet: Any) -> float:
        return float((packet.pts + (packet.duration or 0)) * self.time_base) - self.origin_s

    def finish(self) -> np.ndarray:
        """The waveform (samples,) float32; empty if the interval holds no sound."""
        try:
            for frame in self.context.decode(None) if self.context.is_open and not self.done else ():
                self._take(frame)
        except av.error.FFmpegError:
            self.n_errors += 1
        self._end_stretch()
        return np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.float32)

    def _set_origin(self, start_s: float) -> None:
        """Take the file's own time at which its sound starts; sample 0 lies there, or at 0 s if that is far from it."""
        self.offset_s = start_s - self._zero_s
        self.origin_s = start_s if abs(self.offset_s) < OFFSET_IGNORED_S else self._zero_s

    def _take(self, frame: Any) -> None:
        if self._at is None and self.lo == 0 and frame.pts is not None:
            self._set_origin(float(frame.pts * frame.time_base))  # Headers are less exact than the first sound itself.
        time_s = None if frame.pts is None else float(frame.pts * frame.time_base) - self.origin_s
        signature = (frame.format.name, frame.layout.name, frame.sample_rate)
        hole_s = 0.0 if time_s is None or self._next_s is None else time_s - self._next_s
        if signature != self._signature or OFFSET_IGNORED_S < hole_s < LONGEST_GAP_S:
            self._end_stretch()
            self._signature = signature
            self._resampler = av.AudioResampler(format="fltp", layout=self._layout, rate=RATE_HZ)
            if OFFSET_IGNORED_S < hole_s < LONGEST_GAP_S:
                self.n_holes, self.hole_s = self.n_holes + 1, self.hole_s + hole_s
                self._keep(np.zeros(round(hole_s * RATE_HZ), np.float32))
        if self._at is None:
            self._at = round((time_s or 0.0) * RATE_HZ)
        self._next_s = (time_s if time_s is not None else self._next_s or 0.0) + frame.samples / frame.sample_rate
        self._resample(frame)

    def _end_stretch(self) -> None:
        if self._resampler is not None:
            self._resample(None)

    def _resample(self, frame: Any) -> None:
        for block in self._resampler.resample(frame):
            if block is not None:
                self._keep(block.to_ndarray()[0])

    def _keep(self, samples: np.ndarray) -> None:
        """Append the part of `samples`, which start at sample `_at`, that lies in the interval."""
        assert self._at is not None
        begin, self._at = self._at, self._at + len(samples)
        if not self._blocks and begin > self.lo and (self.hi is None or begin < self.hi):
            self._blocks.append(np.zeros(begin - self.lo, np.float32))
        kept = samples[max(self.lo - begin, 0) : None if self.hi is None else max(self.hi - begin, 0)]
        if len(kept):
            self._blocks.append(kept)


def index_by_decoding(source: Source) -> FrameIndex | None:
    """The index of a file whose packets do not tell its frames, from decoding all of it; None if no frame comes out."""
    assert source.video is not None
    context = source.video.codec_context
    pts: list[int | None] = []
    for packet in source.packets():
        if source.is_picture(packet):
            pts.extend(_times(context, packet))
    if context.is_open:
        pts.extend(_times(context, None))
    return index_frames(pts, source.video)


def _times(context: Any, packet: Any) -> list[int | None]:
    """Presentation times of the frames that a packet completes; none where the data is damaged."""
    try:
        return [frame.pts for frame in context.decode(packet)]
    except av.error.FFmpegError:
        return []
