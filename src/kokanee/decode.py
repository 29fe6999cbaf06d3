"""Packets in, pictures and sound out: `PictureReader` and `SoundReader` are fed the packets of one pass over a file.

Pictures are the decoder's own, turned to RGB by swscale with PyAV's defaults (bilinear chroma, the file's own colour
matrix and range, BT.601 where it names none; no scaling). Dropping packets never changes them: every frame equals that
of a decode from start to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from kokanee.demux import DecodePlan, FrameIndex, Source, index_frames, plan_decoding
from kokanee.errors import KokaneeError
from kokanee.sampling import RATE_HZ

# Decoders in which a skipped "non-reference" picture is one that no other picture is ever made from. (In HEVC it may
# serve a higher temporal layer.)
SKIPPABLE_CODECS = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
OFFSET_IGNORED_S = 0.1
OVERLAP_S = 0.5  # more is no clock that is fast, but times that run backwards
LONGEST_SILENCE_S = 6 * 3600.0
PREROLL_S = 1.0
TAIL_PACKETS = 256

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
    to 0.1 s off is left where it is, as the published readers do; a later start, and holes of any length, are filled
    with silence, and of sounds that overlap by up to 0.5 s the end of the first is left out. Where times run backwards
    the sound is joined, and `n_backwards` counts it. Raises KokaneeError where over 6 hours of silence would be filled
    in. `first_channel` keeps channel 0 of many (video-SALMONN 2) instead of
    FFmpeg's mix-down (video-SALMONN 2+).
    """

    def __init__(self, source: Source, zero_s: float, lo_s: float, hi_s: float | None, first_channel: bool) -> None:
        assert source.audio is not None
        stream = source.audio
        self.context = stream.codec_context
        self._zero_s = zero_s
        self._set_origin(zero_s if stream.start_time is None else float(stream.start_time * stream.time_base))
        self.lo_s = lo_s
        self.lo, self.hi = round(lo_s * RATE_HZ), None if hi_s is None else round(hi_s * RATE_HZ)
        self.n_errors, self.n_holes, self.hole_s, self.n_overlaps, self.overlap_s = 0, 0, 0.0, 0, 0.0
        self.n_backwards, self.n_not_finite = 0, 0
        self._layout = None if first_channel else "mono"
        self._resampler: Any = None
        self._signature: Any = None
        self._next_s: float | None = None
        self._at: int | None = None
        self._blocks: list[np.ndarray] = []

    @property
    def end_s(self) -> float:
        """Where the sound that was heard or passed over so far ends, in seconds from 0 s."""
        return (self._next_s or 0.0) if self._at is None else self._at / RATE_HZ

    @property
    def done(self) -> bool:
        return self.hi is not None and self._at is not None and self._at >= self.hi

    def feed(self, packet: Any) -> None:
        """Take one packet of the sound stream; only its time, if it lies well before or after the interval."""
        if self.done:
            return
        if self._at is None and packet.pts is not None and self._ends_s(packet) < self.lo_s - PREROLL_S:
            self.skip(packet)
            return
        try:
            frames = self.context.decode(packet)
        except av.error.FFmpegError:
            self.n_errors += 1
            return
        for frame in frames:
            self._take(frame)

    def skip(self, packet: Any) -> None:
        """Pass over a packet, going by its time alone."""
        self._gap_s(self._time_s(packet))
        self._next_s = self._ends_s(packet)

    def finish(self) -> np.ndarray:
        """The waveform (samples,) float32; empty if the interval holds no sound. What is no finite number becomes 0."""
        try:
            for frame in self.context.decode(None) if self.context.is_open and not self.done else ():
                self._take(frame)
        except av.error.FFmpegError:
            self.n_errors += 1
        self._end_stretch()
        waveform = np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.float32)
        broken = ~np.isfinite(waveform)
        self.n_not_finite = int(broken.sum())
        waveform[broken] = 0.0
        return waveform

    def _set_origin(self, start_s: float) -> None:
        """Take the file's own time at which its sound starts; sample 0 lies there, or at 0 s if that is far from it."""
        self.offset_s = start_s - self._zero_s
        self.origin_s = start_s if abs(self.offset_s) < OFFSET_IGNORED_S else self._zero_s

    def _time_s(self, item: Any) -> float:
        """When a packet or frame starts, in seconds from 0 s: where it does not say, at the end of what came before."""
        if item.pts is None:
            return self._next_s or 0.0
        return float(item.pts * item.time_base) - self.origin_s

    def _ends_s(self, packet: Any) -> float:
        return self._time_s(packet) + float((packet.duration or 0) * packet.time_base)

    def _gap_s(self, time_s: float) -> float:
        """The seconds without sound before `time_s`, below 0 those that are there twice; 0 if they are too few to
        matter, or so many that times run back, which is counted."""
        gap_s = 0.0 if self._next_s is None else time_s - self._next_s
        self.n_backwards += gap_s < -OVERLAP_S
        return gap_s if gap_s > OFFSET_IGNORED_S or -OVERLAP_S <= gap_s < -OFFSET_IGNORED_S else 0.0

    def _take(self, frame: Any) -> None:
        if self._next_s is None and self.lo == 0 and frame.pts is not None:
            self._set_origin(float(frame.pts * frame.time_base))  # Headers are less exact than the first sound itself.
        time_s = self._time_s(frame)
        gap_s = self._gap_s(time_s)
        if self._at is None:
            gap_s = max(0.0, gap_s)  # of what was passed over nothing is there twice
            self._begin(round((time_s - gap_s) * RATE_HZ))
        signature = (frame.format.name, frame.layout.name, frame.sample_rate)
        if signature != self._signature or gap_s:
            self._end_stretch()
            self._signature = signature
            self._resampler = av.AudioResampler(format="fltp", layout=self._layout, rate=RATE_HZ)
        if gap_s > 0:
            self.n_holes, self.hole_s = self.n_holes + 1, self.hole_s + gap_s
            self._fill(round(gap_s * RATE_HZ))
        if gap_s < 0:
            self.n_overlaps, self.overlap_s = self.n_overlaps + 1, self.overlap_s - gap_s
            self._drop(round(-gap_s * RATE_HZ))
        if gap_s or self._next_s is None or time_s < self._next_s - OVERLAP_S:
            self._next_s = time_s
        if self._resample(frame):  # by its samples: what is too little to matter must not add up
            self._next_s += frame.samples / frame.sample_rate

    def _begin(self, start: int) -> None:
        """Stand at sample `start`, with silence before it if the file's first sound comes later than the interval."""
        late = self._next_s is None and self.lo < start and (self.hi is None or start < self.hi)
        self._at = self.lo if late else start
        self._fill(start - self._at)

    def _end_stretch(self) -> None:
        if self._resampler is not None:
            self._resample(None)

    def _resample(self, frame: Any) -> bool:
        """Keep a frame's sound, or with None what the resampler still holds; False where that is impossible."""
        try:
            blocks = self._resampler.resample(frame)
        except av.error.FFmpegError:
            self.n_errors += 1
            self._resampler = self._signature = None
            return False
        for block in blocks:
            if block is not None:
                self._keep(block.to_ndarray()[0])
        return True

    def _keep(self, samples: np.ndarray) -> None:
        """Append the part of `samples`, which start at sample `_at`, that lies in the interval."""
        assert self._at is not None
        begin, self._at = self._at, self._at + len(samples)
        kept = samples[max(self.lo - begin, 0) : None if self.hi is None else max(self.hi - begin, 0)]
        if len(kept):
            self._blocks.append(kept)

    def _fill(self, n_samples: int) -> None:
        """Append silence: `n_samples` from sample `_at` on, as far as they lie in the interval."""
        assert self._at is not None
        begin, self._at = self._at, self._at + n_samples
        n_kept = (self._at if self.hi is None else min(self._at, self.hi)) - max(begin, self.lo)
        if n_kept > 0:
            check_silence(n_kept / RATE_HZ, begin / RATE_HZ)
            self._blocks.append(np.zeros(n_kept, np.float32))

    def _drop(self, n_samples: int) -> None:
        """Take back the last `n_samples`, as far as they lie in the interval."""
        assert self._at is not None
        ended, self._at = self._at, self._at - n_samples
        left = (ended if self.hi is None else min(ended, self.hi)) - max(self._at, self.lo)
        while left > 0 and self._blocks:
            last = self._blocks.pop()
            if len(last) > left:
                self._blocks.append(last[:-left])
            left -= len(last)


def check_silence(silence_s: float, from_s: float) -> None:
    """Raise KokaneeError for more silence between two sounds than true times would leave."""
    if silence_s > LONGEST_SILENCE_S:
        raise KokaneeError(
            f"its sound pauses for {silence_s / 3600:.1f} hours at {from_s:.2f} s, so its times are probably wrong. "
            "Repair them, choose a part with start and end, or leave the sound out (--video-only)."
        )


def sound_end_s(source: Source, zero_s: float) -> float:
    """When the sound ends, in seconds from 0 s (`zero_s` in the file's own time).

    Packets are passed over by their times; only the last are decoded, because many codecs pad them. Raises KokaneeError
    as `SoundReader` does.
    """
    sound = SoundReader(source, zero_s, 0.0, None, first_channel=False)
    tail: deque[Any] = deque()
    for packet in source.packets():
        if source.is_picture(packet):
            continue
        tail.append(packet)
        if len(tail) > TAIL_PACKETS:
            before_s = sound.end_s
            sound.skip(tail.popleft())
            check_silence(sound.end_s - before_s, before_s)
    for packet in tail:
        sound.feed(packet)
    sound.finish()
    return sound.end_s


def index_by_decoding(source: Source) -> FrameIndex:
    """The index of a file whose packets do not tell its frames, from decoding all of it.

    The source then stands at its start. Raises KokaneeError if no frame comes out.
    """
    source.restart(threads=1)
    assert source.video is not None
    context = source.video.codec_context
    pts: list[int | None] = []
    for packet in source.packets():
        if source.is_picture(packet):
            pts.extend(_times(context, packet))
    if context.is_open:
        pts.extend(_times(context, None))
    index = index_frames(pts, source.video)
    if index is None:
        raise KokaneeError("no frame of its picture can be decoded. Repair it, or want only ('audio',).")
    source.restart(threads=1)
    return index


def _times(context: Any, packet: Any) -> list[int | None]:
    """Presentation times of the frames that a packet completes; none where the data is damaged."""
    try:
        return [frame.pts for frame in context.decode(packet)]
    except av.error.FFmpegError:
        return []
