"""Media files made on the spot for tests, and their decode from start to end, with which a reader must agree."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

X264_B_FRAMES = {"x264-params": "keyint=30:bframes=3:b-pyramid=normal:scenecut=0"}
X264_OPEN_GOP = {"x264-params": "keyint=20:min-keyint=20:scenecut=0:open-gop=1:bframes=3"}


def moving_frames(n_frames: int, height: int = 64, width: int = 96, seed: int = 0) -> list[np.ndarray]:
    """Frames (H,W,3 uint8) that all differ: drifting noise and a bar that moves and changes colour."""
    noise = np.random.default_rng(seed).integers(0, 60, (height + n_frames, width + n_frames, 3), np.uint8)
    frames = []
    for number in range(n_frames):
        frame = noise[number : number + height, number // 2 : number // 2 + width].copy()
        left = 3 * number % (width - 16)
        frame[8:24, left : left + 16] = (250, 7 * number % 256, 30)
        frames.append(frame)
    return frames


def tones(duration_s: float, rate_hz: int = 16000, channels: int = 1) -> np.ndarray:
    """(channels, samples) float32: a rising tone in channel 0, a lower one of half its loudness in channel 1."""
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    waves = [0.3 * np.sin(2 * np.pi * (300 * time_s + 40 * time_s**2)), 0.15 * np.sin(2 * np.pi * 200 * time_s)]
    return np.stack(waves[:channels]).astype(np.float32)


def encode(
    path: Path,
    frames: Sequence[np.ndarray] | None = None,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int | Fraction = 25,
    options: dict[str, str] | None = None,
    b_frames: int | None = None,
    pts: Sequence[int] | None = None,
    rotation: tuple[float, bool] | None = None,
    sound: np.ndarray | None = None,
    sound_codec: str = "aac",
    sound_rate_hz: int = 16000,
    sound_start_s: float = 0.0,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
    copies: int = 1,
) -> Path:
    """Write a file. `pts` are in thousandths of a second (None: even), `sound` is (channels, samples)."""
    with av.open(str(path), "w", format=format, container_options=container_options or {}) as container:
        pictures: list[Any] = []
        tracks: list[Any] = []
        for _ in range(copies):
            if frames is not None:
                pictures.append(_add_picture(container, frames, codec, pix_fmt, fps, options, b_frames, pts, rotation))
            if sound is not None:
                layout = "mono" if len(sound) == 1 else "stereo"
                tracks.append(container.add_stream(sound_codec, rate=sound_rate_hz, layout=layout))
        for stream in pictures:
            for number, array in enumerate(frames or ()):
                picture = av.VideoFrame.from_ndarray(array, format="rgb24")
                if pts is not None:
                    picture.pts, picture.time_base = pts[number], Fraction(1, 1000)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        for stream in tracks:
            assert sound is not None
            _write_sound(container, stream, sound, sound_rate_hz, sound_start_s)
    return path


def _add_picture(container, frames, codec, pix_fmt, fps, options, b_frames, pts, rotation) -> Any:
    stream = container.add_stream(codec, rate=fps, options=options or {})
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt = pix_fmt
    stream.codec_context.thread_count = 1
    if b_frames is not None:
        stream.codec_context.max_b_frames = b_frames
    if pts is not None:
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
    if rotation is not None:
        stream.set_display_rotation(rotation[0], hflip=rotation[1])
    return stream


def _write_sound(container, stream, sound: np.ndarray, rate_hz: int, start_s: float) -> None:
    layout = "mono" if len(sound) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=layout)
    frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
    cut = av.AudioResampler(
        format=stream.codec_context.format.name,
        layout=layout,
        rate=rate_hz,
        frame_size=stream.codec_context.frame_size or 1024,
    )
    at = round(start_s * rate_hz)
    for piece in [*cut.resample(frame), *cut.resample(None)]:
        if piece is not None:
            piece.pts, piece.time_base = at, Fraction(1, rate_hz)
            at += piece.samples
            container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def decode_all(path: Path) -> tuple[list[np.ndarray], list[float | None]]:
    """All frames as RGB with their times in seconds, decoded one after the other."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames]
