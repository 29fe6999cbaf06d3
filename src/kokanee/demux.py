"""Opening a media file, reading its packets once, and knowing from them when every frame is shown."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.stream import Disposition

from kokanee.errors import KokaneeError

logger = logging.getLogger("kokanee")

IN_MEMORY_BYTES = 64 << 20
NOT_MEDIA_FORMATS = {"tty", "hls", "dash", "concat", "lavfi", "sdp", "webvtt_concat", "imf"}
SEEK_MARGIN_S = 2.0
DISCARD_ALL = 48  # AVDISCARD_ALL


@dataclass(frozen=True)
class FrameIndex:
    """When each frame of a file is shown, in display order.

    `shown_pts` (n,) int64 are presentation times in ticks of `time_base`; `length` is the time in ticks from the first
    frame's start to the last one's end. `packet_pts` and `packet_is_key` (packets,) hold the packets in decoding order;
    both are None where frames were counted by decoding, and a frame is then known by its number only.
    """

    shown_pts: np.ndarray
    length: int
    time_base: Fraction
    packet_pts: np.ndarray | None = None
    packet_is_key: np.ndarray | None = None

    @property
    def n_frames(self) -> int:
        return len(self.shown_pts)

    @property
    def fps(self) -> float:
        """Mean rate: frames over the time from the first one's start to the last one's end."""
        return float(self.n_frames / (self.length * self.time_base))

    @property
    def length_s(self) -> float:
        """Seconds from the first frame's start to the last one's end."""
        return float(self.length * self.time_base)

    @property
    def is_even(self) -> bool:
        """Whether each frame is shown within half a frame of its time at the mean rate."""
        expected_s = np.arange(self.n_frames) / self.fps
        return bool(np.abs(self.times_s - expected_s).max() <= 0.5 / self.fps)

    @property
    def zero_s(self) -> float:
        """The file's own time at which the picture starts, which we call 0 s."""
        return float(self.shown_pts[0] * self.time_base)

    @property
    def times_s(self) -> np.ndarray:
        """Seconds from the first frame, float64 (n,)."""
        ticks = (self.shown_pts - self.shown_pts[0]).astype(np.float64)
        return ticks * self.time_base.numerator / self.time_base.denominator


@dataclass(frozen=True)
class DecodePlan:
    """Packets that have to be decoded for some target frames, by their presentation time in ticks.

    `steps` maps it to (start afresh, is a target). Every other packet is dropped before the decoder sees it.
    """

    steps: dict[int, tuple[bool, bool]] = field(repr=False)
    first_pts: int


def plan_decoding(index: FrameIndex, targets: Sequence[int]) -> DecodePlan:
    """What to decode for the frames `targets` (display order): of each group of pictures, the part to its last target.

    A target that is shown before its group's key frame (open GOP) may lean on the group before, which is then decoded
    whole. Where a packet was left out, the decoder starts afresh at the next key frame.
    """
    assert index.packet_pts is not None and index.packet_is_key is not None
    pts = index.packet_pts
    keys = np.flatnonzero(index.packet_is_key)
    if not len(keys) or keys[0] != 0:
        keys = np.concatenate([[0], keys])
    order = np.argsort(pts, kind="stable")
    at = order[np.searchsorted(pts[order], index.shown_pts[list(targets)])]
    needed = np.zeros(len(pts), bool)
    is_target = np.zeros(len(pts), bool)
    is_target[at] = True
    for packet in at.tolist():
        group = int(np.searchsorted(keys, packet, side="right")) - 1
        if pts[packet] < pts[keys[group]] and group > 0:
            group -= 1
        needed[keys[group] : packet + 1] = True
    afresh = needed & ~np.concatenate([[False], needed[:-1]])
    rows = np.flatnonzero(needed)
    steps = dict(
        zip(pts[rows].tolist(), zip(afresh[rows].tolist(), is_target[rows].tolist(), strict=True), strict=True)
    )
    return DecodePlan(steps=steps, first_pts=int(pts[rows[0]]))


def index_packets(packets: Iterable[Any], stream: Any) -> FrameIndex | None:
    """The index of a video stream from its packets; None where they do not tell (no, or repeated, presentation times).

    Counting packets costs no decoding and is exact, where a header's frame count and rate are guesses in many
    containers and wrong in damaged files. Packets that an edit list hides are decoded but not counted.
    """
    pts, ends, shown, keys = array("q"), array("q"), array("b"), array("b")
    complete = True
    for packet in packets:
        if packet.pts is None:
            complete = False
            continue
        pts.append(packet.pts)
        ends.append(packet.pts + (packet.duration or 0))
        shown.append(not packet.is_discard)
        keys.append(packet.is_keyframe)
    packet_pts = np.array(pts, np.int64)
    is_shown = np.array(shown, bool)
    shown_pts = np.sort(packet_pts[is_shown])
    if not complete or not len(shown_pts) or len(np.unique(packet_pts)) < len(packet_pts):
        return None
    length = int(np.array(ends, np.int64)[is_shown].max() - shown_pts[0])
    length = _with_last_frame(shown_pts, length, stream)
    return FrameIndex(shown_pts, length, stream.time_base, packet_pts, np.array(keys, bool))


def index_frames(pts: list[int | None], stream: Any) -> FrameIndex | None:
    """The index of frames that were decoded one after the other, or None if there are none.

    Where their times are missing or run backwards, they are taken as evenly spaced at the stream's stated rate.
    """
    if not pts:
        return None
    known = np.array([-1 if value is None else value for value in pts], np.int64)
    if any(value is None for value in pts) or (np.diff(known) <= 0).any():
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        return FrameIndex(np.arange(len(pts), dtype=np.int64), len(pts), 1 / rate)
    return FrameIndex(known, _with_last_frame(known, int(known[-1] - known[0]), stream), stream.time_base)


def _with_last_frame(shown_pts: np.ndarray, length: int, stream: Any) -> int:
    """`length`, or where the last frame's duration is unknown, one usual frame more."""
    last_start = int(shown_pts[-1] - shown_pts[0])
    if length > last_start:
        return length
    if len(shown_pts) > 1:
        return last_start + max(int(np.median(np.diff(shown_pts))), 1)
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    return max(round(1 / rate / stream.time_base), 1)


class Source:
    """An open media file with the picture and sound streams that will be read, and notes on what was unusual.

    A file of up to 64 MiB is read once and its packets are kept; a larger one is read twice (index, then decoding; the
    index of a file that has not changed is remembered), so memory stays bounded. `threads` are decoder threads (0: one
    per core). Raises KokaneeError, with the reason, for anything that is not a readable media file, and for wanting
    anything but "video" and "audio".
    """

    def __init__(self, path: str | os.PathLike[str], want: Sequence[str], threads: int = 0) -> None:
        if not want or set(want) - {"video", "audio"}:
            raise KokaneeError(f"want is {want!r}, but only 'video' and 'audio' can be wanted.")
        self.path = Path(path)
        self.want = want
        self.notes: list[str] = []
        self._kept: list[Any] | None = None
        self._in_memory = check_file(self.path).st_size <= IN_MEMORY_BYTES
        self._open(threads)
        self._choose_streams()

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def restart(self, threads: int) -> None:
        """Fresh decoders; `packets` begins at the beginning again."""
        self.container.close()
        notes = list(self.notes)
        self._open(threads)
        self._choose_streams()
        self.notes = notes

    @property
    def start_s(self) -> float:
        """The file's own time of its first frame or sound, by its header."""
        streams = [stream for stream in (self.video or self.hidden_video, self.audio) if stream is not None]
        for stream in streams:
            if stream.start_time is not None:
                return float(stream.start_time * stream.time_base)
        return 0.0

    @property
    def stated_s(self) -> float | None:
        """How long the header says that the chosen streams last, None where it does not say."""
        chosen = [stream for stream in (self.video, self.audio) if stream is not None]
        if all(stream.duration is not None for stream in chosen):
            return max(float(stream.duration * stream.time_base) for stream in chosen)
        others = [
            stream for stream in self.container.streams if stream.type in ("video", "audio") and stream not in chosen
        ]
        if "matroska" in self.container.format.name and self.container.duration and not others:
            return self.container.duration / av.time_base - max(0.0, self.start_s)  # it counts from the file's own 0
        return None

    def index(self) -> FrameIndex | None:
        """The frame index from the packets, or None where they do not tell."""
        assert self.video is not None
        if self._in_memory:
            self._kept = list(self._demux())
            index = index_packets((packet for packet in self._kept if packet.stream is self.video), self.video)
        else:
            stat = self.path.stat()
            index, notes = _index_of_large_file(self.path, stat.st_size, stat.st_mtime_ns, self.video.index)
            self.notes.extend(notes)
        if self.container.format.name == "avi" and self.video.codec_context.has_b_frames:
            return None  # AVI stores no presentation times; FFmpeg numbers packets as they come, not as they are shown.
        return index

    def packets(self, from_s: float | None = None) -> Iterator[Any]:
        """Packets of the chosen streams in file order; of a large file from about `from_s` (the file's own time) on."""
        if self._kept is not None:
            return iter(self._kept)
        if from_s is not None and from_s - SEEK_MARGIN_S > self.start_s + SEEK_MARGIN_S and not self._in_memory:
            try:
                self.container.seek(int((from_s - SEEK_MARGIN_S) * av.time_base))
            except av.error.FFmpegError as error:
                logger.debug("%s: cannot seek (%s), reading from the start", self.path, error)
        return self._demux()

    def is_picture(self, packet: Any) -> bool:
        return self.video is not None and packet.stream_index == self.video.index

    def _open(self, threads: int) -> None:
        self.container = open_container(self.path)
        for stream in self.container.streams.video:
            if stream.codec_context is not None:
                stream.codec_context.thread_type = "AUTO"
                stream.codec_context.thread_count = threads

    def _choose_streams(self) -> None:
        streams = self.container.streams
        pictures = [stream for stream in streams.video if not stream.disposition & Disposition.attached_pic]
        self.video = self._pick(pictures, "video") if "video" in self.want else None
        self.audio = self._pick(list(streams.audio), "audio") if "audio" in self.want else None
        self.hidden_video = pictures[0] if pictures else None
        if self.video is None and self.audio is None:
            found = ", ".join(stream.type for stream in streams) or "no streams at all"
            wanted = " or ".join(self.want)
            raise KokaneeError(
                f"{self.path} has no readable {wanted} stream (found: {found}). "
                f"Give a file with {wanted}, or do not ask for {wanted} alone."
            )
        for stream in streams:
            if stream not in (self.video, self.audio):
                ignore(stream)

    def _pick(self, candidates: list[Any], kind: str) -> Any:
        readable = [stream for stream in candidates if stream.codec_context is not None]
        if len(readable) < len(candidates):
            self.notes.append(f"{len(candidates) - len(readable)} {kind} stream(s) have an unknown coding")
        default = [stream for stream in readable if stream.disposition & Disposition.default]
        chosen = (default or readable or [None])[0]
        if len(readable) > 1:
            self.notes.append(f"{len(readable)} {kind} streams; stream {chosen.index} is used")
        return chosen

    def _demux(self) -> Iterator[Any]:
        chosen = [stream for stream in (self.video, self.audio) if stream is not None]
        return _whole_packets(self.container, chosen, self.notes)


def check_file(path: Path) -> os.stat_result:
    """The file's status. Raises KokaneeError when there is no such file, it is a folder, empty, or may not be read."""
    if not path.exists():
        raise KokaneeError(f"{path} does not exist. Check the path.")
    if not path.is_file():
        raise KokaneeError(f"{path} is not a file. Give one media file, or caption a folder as a whole.")
    stat = path.stat()
    if stat.st_size == 0:
        raise KokaneeError(f"{path} is empty (0 bytes). Copy or download it again.")
    if not os.access(path, os.R_OK):
        raise KokaneeError(f"{path} may not be read (permissions). Change them or run as another user.")
    return stat


def open_container(path: Path) -> Any:
    """An open PyAV container. Raises KokaneeError for what FFmpeg cannot read, and for lists of other files."""
    try:
        # Only local files: a playlist that poses as a video must not make FFmpeg open addresses.
        container = av.open(
            str(path.absolute()), container_options={"protocol_whitelist": "file"}, metadata_errors="replace"
        )
    except av.error.FFmpegError as error:
        raise KokaneeError(
            f"{path} is not a media file that FFmpeg can read, or it is cut off before its index ({error.strerror}). "
            "Check it with a player, or copy it again."
        ) from error
    if set(container.format.name.split(",")) & NOT_MEDIA_FORMATS:
        container.close()
        raise KokaneeError(f"{path} is text or a list of other files, not a media file. Give the media file itself.")
    return container


def ignore(stream: Any) -> None:
    """Have the demuxer skip a stream's data, where PyAV can say so (since 18; before, it is only not handed out)."""
    if hasattr(stream, "discard"):
        stream.discard = DISCARD_ALL


def _whole_packets(container: Any, streams: list[Any], notes: list[str]) -> Iterator[Any]:
    """Packets with content, up to the end or to where the file stops being readable."""
    try:
        for packet in container.demux(streams):
            if packet.size:
                yield packet
    except IndexError:
        return  # PyAV at the end of a file in which another stream began: all packets have been given
    except av.error.FFmpegError as error:
        note = f"reading stopped before the file's end ({error.strerror})"
        if note not in notes:
            notes.append(note)


@lru_cache(maxsize=16)
def _index_of_large_file(
    path: Path, size: int, mtime_ns: int, stream_index: int
) -> tuple[FrameIndex | None, tuple[str, ...]]:
    """The index of a file too large to keep. `size` and `mtime_ns` are part of the key: a changed file is read anew."""
    notes: list[str] = []
    with open_container(path) as container:
        for stream in container.streams:
            if stream.index != stream_index:
                ignore(stream)
        video = container.streams[stream_index]
        return index_packets(_whole_packets(container, [video], notes), video), tuple(notes)
