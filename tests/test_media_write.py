from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kokanee.errors import KokaneeError
from kokanee.media import Sampling, read_clip, write_clip
from media_files import decode_all, moving_frames, tones

EVERY_FRAME = Sampling("salmonn2plus", 0.001, 1, 10_000)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    frames, sound = [frame // 2 + 60 for frame in moving_frames(36)], tones(3.0)[0]
    clip = read_clip(write_clip(tmp_path / "clip.mp4", frames, 12, sound, crf=10), EVERY_FRAME)
    assert clip.frames is not None
    assert clip.waveform is not None
    assert clip.duration_s == 3.0
    assert np.allclose(clip.times_s, np.arange(36) / 12)
    for shown, given in zip(clip.frames, frames, strict=True):
        assert np.abs(shown.mean((0, 1)) - given.mean((0, 1))).max() < 2
    assert 48_000 <= len(clip.waveform) < 49_024
    assert np.corrcoef(clip.waveform[:48_000], sound)[0, 1] > 0.99


def test_plain_colours_survive(tmp_path: Path) -> None:
    colours = [(220, 40, 40), (40, 200, 60), (40, 60, 220), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
    frames = [np.full((32, 32, 3), colour, np.uint8) for colour in colours]
    shown, _ = decode_all(write_clip(tmp_path / "clip.mp4", frames, 2))
    for frame, colour in zip(shown, colours, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 4


def test_a_flash_and_a_click_stay_together(tmp_path: Path) -> None:
    frames = [np.full((32, 32, 3), 255 if number == 18 else 0, np.uint8) for number in range(36)]
    sound = np.zeros(48_000, np.float32)
    sound[24_000:24_400] = 0.8
    clip = read_clip(write_clip(tmp_path / "clip.mp4", frames, 12, sound), EVERY_FRAME)
    assert clip.frames is not None
    assert clip.waveform is not None
    assert clip.times_s[np.argmax([frame.mean() for frame in clip.frames])] == 1.5
    assert np.argmax(np.abs(clip.waveform) > 0.3) / 16000 == pytest.approx(1.5, abs=0.005)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    frames, sound = moving_frames(20), tones(1.6)[0]
    written = {write_clip(tmp_path / "clip.mp4", iter(frames), 12.5, sound).read_bytes() for _ in range(12)}
    assert len(written) == 1


def test_folders_are_made(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "deep" / "er" / "clip.mp4", moving_frames(2), 12)
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def breaks() -> Iterator[np.ndarray]:
        yield from moving_frames(5)
        raise RuntimeError("renderer")

    path = write_clip(tmp_path / "clip.mp4", moving_frames(5), 12)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="renderer"):
        write_clip(path, breaks(), 12)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "fps", "sound", "message"),
    [
        ([], 12, None, "no frame"),
        ([np.zeros((33, 32, 3), np.uint8)], 12, None, "even"),
        ([np.zeros((32, 32), np.uint8)], 12, None, "H,W,3"),
        ([np.zeros((32, 32, 3), np.float32)], 12, None, "uint8"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)], 12, None, "frame 1"),
        ([np.zeros((32, 32, 3), np.uint8)], 0, None, "above zero"),
        ([np.zeros((32, 32, 3), np.uint8)], 12, np.full(100, np.nan), "finite"),
        ([np.zeros((32, 32, 3), np.uint8)], 12, np.zeros((2, 100)), "one channel"),
    ],
)
def test_what_cannot_be_written_is_refused_with_a_reason(tmp_path: Path, frames, fps, sound, message: str) -> None:
    with pytest.raises(KokaneeError, match=message):
        write_clip(tmp_path / "clip.mp4", frames, fps, sound)
    assert not list(tmp_path.iterdir())
