"""Writing frames and sound as an MP4 file (H.264 + AAC). What it writes, `media.read_clip` reads.

The bytes depend on the arguments and on FFmpeg's version only: one encoder thread, no dates, no tags of the muxer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from kokanee.errors import KokaneeError
from kokanee.formats import replaced_file

AAC_BITS_PER_SAMPLE = 4


def write_clip(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    fps: float | Fraction,
    waveform: np.ndarray | None = None,
    rate_hz: int = 16000,
    *,
    crf: float = 18.0,
    preset: str = "veryfast",
    keyframe_every: int = 250,
) -> Path:
    """Encode `frames` (each H,W,3 uint8 RGB, even sides) and `waveform` (float32 mono in -1..1, or None) into `path`.

    Frames are taken one by one, so a generator serves for any length. Picture: H.264, yuv420p, BT.601, `crf` (lower is
    finer), a key frame at least every `keyframe_every` frames. Sound: AAC at 4 bits a sample. The file appears at
    `path` whole or not at all; missing folders are made. Raises KokaneeError when there is no frame, or a frame has a
    wrong type, an odd side or another size than the first.
    """
    path = Path(path)
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise KokaneeError(f"Cannot write {path.name}: a rate of {fps} frames a second. Give fps above zero.")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise KokaneeError(f"Cannot write {path.name}: there is no frame. Give at least one H,W,3 uint8 array.")
    options = {"fflags": "+bitexact"}
    try:
        with replaced_file(path) as name, av.open(str(name), "w", format="mp4", container_options=options) as container:
            video = _video_stream(container, first.shape, rate, crf, preset, keyframe_every)
            sound = None if waveform is None else _SoundTrack(container, np.asarray(waveform, np.float32), rate_hz)
            reformatter = VideoReformatter()
            for index, array in enumerate(chain([first], frames)):
                container.mux(video.encode(_picture(array, first.shape, index, rate, reformatter, path)))
                if sound is not None:
                    sound.write_until(int((index + 1) / rate * rate_hz))
            container.mux(video.encode(None))
            if sound is not None:
                sound.finish()
    except av.error.FFmpegError as error:
        raise KokaneeError(f"Cannot write {path}: {error}. Check the folder, its free space and the sizes.") from error
    return path


def _video_stream(
    container: Any, shape: tuple[int, ...], rate: Fraction, crf: float, preset: str, keyframe_every: int
) -> Any:
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2 or 0 in shape:
        raise KokaneeError(
            f"Cannot write frames of shape {shape}: H.264 in yuv420p holds H,W,3 with even H and W. Crop or pad them."
        )
    # x264's macroblock tree gives now these bytes, now others, for the same pictures (docs/log.md).
    params = f"keyint={keyframe_every}:threads=1:mbtree=0"
    options = {"crf": f"{crf:g}", "preset": preset, "x264-params": params}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = shape[0], shape[1]
    stream.pix_fmt = "yuv420p"
    stream.time_base = 1 / rate
    stream.codec_context.thread_count = 1
    stream.codec_context.color_range = int(ColorRange.MPEG)
    stream.codec_context.colorspace = 6  # AVCOL_SPC_SMPTE170M: the BT.601 matrix that `_picture` converts with
    return stream


def _picture(
    array: np.ndarray, shape: tuple[int, ...], index: int, rate: Fraction, reformatter: VideoReformatter, path: Path
) -> av.VideoFrame:
    if array.shape != shape or array.dtype != np.uint8:
        raise KokaneeError(
            f"Cannot write {path.name}: frame {index} is {array.dtype}{list(array.shape)}, but the first one says "
            f"uint8{list(shape)}. Give uint8 frames of one size."
        )
    picture = reformatter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
        threads=1,
    )
    picture.pts, picture.time_base = index, 1 / rate
    return picture


class _SoundTrack:
    """An AAC track fed in step with the picture, so that the muxer never has to hold more than a moment of either."""

    def __init__(self, container: Any, waveform: np.ndarray, rate_hz: int) -> None:
        if waveform.ndim != 1 or not np.isfinite(waveform).all():
            raise KokaneeError(
                f"Cannot write a waveform of shape {waveform.shape}: it must be one channel of finite numbers."
            )
        self.container, self.rate_hz = container, rate_hz
        self.waveform = np.clip(waveform, -1.0, 1.0)
        self.stream = container.add_stream("aac", rate=rate_hz, layout="mono")
        self.stream.bit_rate = AAC_BITS_PER_SAMPLE * rate_hz
        self.written = 0

    def write_until(self, stop: int) -> None:
        stop = min(stop, len(self.waveform))
        for begin in range(self.written, stop, 1024):
            samples = self.waveform[begin : min(begin + 1024, stop)]
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = self.rate_hz, begin, Fraction(1, self.rate_hz)
            self.container.mux(self.stream.encode(frame))
        self.written = max(self.written, stop)

    def finish(self) -> None:
        self.write_until(len(self.waveform))
        self.container.mux(self.stream.encode(None))
