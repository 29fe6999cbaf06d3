"""Whatever the container, `read_clip` shows the frames that a decode from start to end gives, and says what was odd."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image

import kokanee.demux
from kokanee.errors import KokaneeError
from kokanee.media import Sampling, file_length_s, make_clip, read_clip, read_image, sample_indices
from media_files import X264_B_FRAMES, X264_OPEN_GOP, decode_all, encode, moving_frames, tones

SPARSE = Sampling("salmonn2plus", 0.7, 1, 768)
DENSE = Sampling("salmonn2plus", 0.1, 1, 768)
EVERY_FRAME = Sampling("salmonn2plus", 0.001, 1, 10_000)
SALMONN2 = Sampling("salmonn2", 0.5, 2, 110)

CONTAINERS = {
    "closed-gop.mp4": {"options": X264_B_FRAMES, "sound": tones(4.0)},
    "open-gop.mp4": {"options": X264_OPEN_GOP},
    "open-gop.ts": {"options": X264_OPEN_GOP, "sound": tones(4.0), "sound_codec": "libmp3lame"},
    "one-gop.mkv": {
        "options": {"x264-params": "keyint=250:bframes=5"},
        "sound": tones(4.0, 48_000),
        "sound_codec": "libopus",
        "sound_rate_hz": 48_000,
    },
    "no-key-frames.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=20"}},
    "no-times.avi": {"options": X264_B_FRAMES, "sound": tones(4.0), "sound_codec": "libmp3lame"},
    "elementary.h264": {"options": X264_B_FRAMES, "format": "h264"},
    "hevc.mp4": {
        "codec": "libx265",
        "options": {"x265-params": "keyint=20:min-keyint=20:scenecut=0:bframes=4:open-gop=1:log-level=none"},
    },
    "hevc-layers.mkv": {"codec": "libx265", "options": {"x265-params": "keyint=20:temporal-layers=1:log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "16"}},
    "vp8.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "b_frames": 2, "sound": tones(4.0, 44_100), "sound_rate_hz": 44_100},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "lossless.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}
CONTAINERS["mpeg2.mpg"]["sound_codec"] = "mp2"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


def make(folder: Path, name: str) -> Path:
    path = folder / name
    return path if path.exists() else encode(path, moving_frames(100), **CONTAINERS[name])


def equal(left: list[np.ndarray] | None, right: list[np.ndarray]) -> bool:
    return left is not None and len(left) == len(right) and all(map(np.array_equal, left, right))


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_equal_those_of_a_decode_from_start_to_end(folder: Path, name: str) -> None:
    path = make(folder, name)
    all_frames, all_times_s = decode_all(path)
    for sampling, threads in ((SPARSE, 1), (SPARSE, 0), (DENSE, 0), (EVERY_FRAME, 1), (SALMONN2, 0)):
        clip = read_clip(path, sampling, threads=threads)
        indices = sample_indices(100, 25.0, sampling)
        assert equal(clip.frames, [all_frames[index] for index in indices])
        assert clip.duration_s == 4.0
        if None not in all_times_s and name != "no-times.avi":
            assert np.allclose(clip.times_s, np.array(all_times_s, float)[indices] - float(all_times_s[0] or 0.0))


@pytest.mark.parametrize("name", ["closed-gop.mp4", "open-gop.ts", "one-gop.mkv", "vp9.webm", "no-times.avi"])
@pytest.mark.parametrize(("start_s", "end_s"), [(1.0, 2.0), (0.5, None), (None, 1.28), (3.1, 3.3), (2.04, 9.0)])
def test_an_interval_holds_the_frames_of_that_time(
    folder: Path, name: str, start_s: float | None, end_s: float | None
) -> None:
    path = make(folder, name)
    all_frames, _ = decode_all(path)
    clip = read_clip(path, DENSE, start_s=start_s, end_s=end_s)
    assert equal(clip.frames, [all_frames[i] for i in sample_indices(100, 25.0, DENSE, start_s, end_s)])
    assert clip.start_s == (start_s or 0.0)
    assert (clip.times_s >= (start_s or 0.0) - 0.021).all()
    assert (clip.times_s < (end_s or 4.0)).all()


@pytest.mark.parametrize("name", ["closed-gop.mp4", "open-gop.ts", "one-gop.mkv"])
def test_the_sound_of_an_interval_is_that_part_of_the_whole_within_a_millisecond(folder: Path, name: str) -> None:
    whole = read_clip(make(folder, name), DENSE).waveform
    part = read_clip(make(folder, name), DENSE, start_s=1.25, end_s=3.5).waveform
    assert whole is not None
    assert part is not None
    assert len(part) == 36_000
    shifts = [np.abs(part[16:-16] - whole[20_016 + shift : 55_984 + shift]).max() for shift in range(-16, 17)]
    assert min(shifts) < 2e-3


@pytest.mark.parametrize("name", ["closed-gop.mp4", "open-gop.ts", "one-gop.mkv", "no-times.avi", "vp9.webm"])
@pytest.mark.parametrize("start_s", [None, 3.2])
def test_a_file_too_large_to_keep_gives_the_same_clip(
    folder: Path, name: str, start_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(folder, name)
    small = read_clip(path, DENSE, start_s=start_s)
    monkeypatch.setattr(kokanee.demux, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(kokanee.demux, "SEEK_MARGIN_S", 0.2)
    large = read_clip(path, DENSE, start_s=start_s)
    assert small.frames is not None
    assert equal(large.frames, small.frames)
    assert np.array_equal(large.times_s, small.times_s)
    if small.waveform is not None:
        assert large.waveform is not None
        assert abs(len(large.waveform) - len(small.waveform)) <= 16
        shorter = min(len(large.waveform), len(small.waveform))
        assert np.corrcoef(large.waveform[:shorter], small.waveform[:shorter])[0, 1] > 0.99


def test_the_index_of_a_large_file_is_made_once_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kokanee.demux, "IN_MEMORY_BYTES", 0)
    path = encode(tmp_path / "clip.mp4", moving_frames(50))
    before = kokanee.demux._index_of_large_file.cache_info().misses
    for start_s in (0.0, 0.5, 1.0):
        read_clip(path, DENSE, start_s=start_s)
    assert kokanee.demux._index_of_large_file.cache_info().misses == before + 1
    encode(path, moving_frames(75))
    assert read_clip(path, DENSE).duration_s == 3.0


def test_frames_in_memory_and_in_a_file_give_the_same_clip(tmp_path: Path) -> None:
    frames, sound = moving_frames(75), tones(2.5)
    path = encode(tmp_path / "clip.mkv", frames, codec="ffv1", pix_fmt="bgr0", sound=sound, sound_codec="flac")
    for sampling in (DENSE, SPARSE, SALMONN2):
        for start_s, end_s in ((None, None), (0.52, 2.3), (1.0, None)):
            read = read_clip(path, sampling, start_s=start_s, end_s=end_s)
            made = make_clip(frames, 25.0, sound[0], sampling, start_s=start_s, end_s=end_s)
            assert made.frames is not None
            assert equal(read.frames, made.frames)
            assert np.allclose(read.times_s, made.times_s)
            assert (read.step_s, read.duration_s, read.start_s) == (made.step_s, made.duration_s, made.start_s)
            assert read.waveform is not None
            assert made.waveform is not None
            assert len(read.waveform) == len(made.waveform)
            assert np.abs(read.waveform - made.waveform).max() < 1e-3


def test_the_transform_sees_each_frame_once_with_their_number(folder: Path) -> None:
    seen = []

    def halve(frame: np.ndarray, n_frames: int) -> np.ndarray:
        seen.append(n_frames)
        return frame[::2, ::2]

    path = make(folder, "closed-gop.mp4")
    clip = read_clip(path, SPARSE, transform=halve)
    whole = read_clip(path, SPARSE)
    assert whole.frames is not None
    assert equal(clip.frames, [frame[::2, ::2] for frame in whole.frames])
    assert seen == [len(whole.frames)] * len(whole.frames)


def test_a_variable_rate_goes_by_number_but_tells_and_cuts_by_true_time(tmp_path: Path) -> None:
    pts = [*range(0, 2000, 40), *range(2000, 12_000, 400)]
    frames = moving_frames(len(pts))
    path = encode(tmp_path / "variable.mkv", frames, codec="ffv1", pix_fmt="bgr0", pts=pts)
    clip = read_clip(path, EVERY_FRAME)
    assert equal(clip.frames, frames)
    assert np.allclose(clip.times_s, np.array(pts) / 1000)
    assert "frame times are uneven; frames are sampled by their numbers" in clip.notes
    slow = read_clip(path, EVERY_FRAME, start_s=4.0, end_s=8.0)
    assert slow.times_s.tolist() == [number / 1000 for number in range(4000, 8000, 400)]
    assert slow.duration_s == pytest.approx(4.0)
    assert slow.step_s == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("start_s", "end_s", "numbers", "duration_s"),
    [
        (25.0, 35.0, [49], 10.0),
        (5.0, 15.0, [49], 10.0),
        (0.0, 10.0, range(50), 10.0),
        (1.9, 2.0, [47, 48, 49], 0.1),
        (30.0, 40.02, [49, 50], 10.02),
        (40.0, 60.0, [50], 0.04),
        (39.0, None, [49, 50], 1.04),
    ],
)
def test_an_interval_of_a_variable_rate_holds_what_is_on_screen_in_it(
    tmp_path: Path, start_s: float, end_s: float | None, numbers: list[int], duration_s: float
) -> None:
    pts = [*range(0, 2000, 40), 40_000]
    frames = moving_frames(len(pts))
    path = encode(tmp_path / "slides.mkv", frames, codec="ffv1", pix_fmt="bgr0", pts=pts)
    clip = read_clip(path, EVERY_FRAME, start_s=start_s, end_s=end_s)
    assert equal(clip.frames, [frames[number] for number in numbers])
    assert clip.times_s.tolist() == [pts[number] / 1000 for number in numbers]
    assert clip.duration_s == pytest.approx(duration_s)
    assert (clip.start_s, clip.end_s) == pytest.approx((start_s, start_s + duration_s))
    assert clip.step_s == pytest.approx(2 * duration_s / len(numbers))
    with pytest.raises(KokaneeError, match=r"lasts 40\.04 s \(51 frames\)"):
        read_clip(path, EVERY_FRAME, start_s=40.04)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_frames_are_turned_upright(tmp_path: Path, quarter_turns: int, mirrored: bool) -> None:
    path = encode(tmp_path / "turned.mp4", moving_frames(10), rotation=(90.0 * quarter_turns, mirrored))
    stored, _ = decode_all(path)
    expected = [np.rot90(frame, quarter_turns) for frame in stored]
    expected = [frame[:, ::-1] if mirrored else frame for frame in expected]
    clip = read_clip(path, EVERY_FRAME)
    assert equal(clip.frames, expected)
    assert clip.frames is not None
    assert clip.frames[0].flags.c_contiguous


def test_odd_sizes_lose_no_row_or_column(tmp_path: Path) -> None:
    frames = moving_frames(10, 37, 51)
    path = encode(tmp_path / "odd.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    assert equal(read_clip(path, EVERY_FRAME).frames, frames)
    path = encode(tmp_path / "odd.mp4", frames, pix_fmt="yuv444p")
    assert equal(read_clip(path, EVERY_FRAME).frames, decode_all(path)[0])


def test_one_frame_is_a_clip_for_salmonn2plus_and_refused_for_salmonn2(tmp_path: Path) -> None:
    path = encode(tmp_path / "one.mp4", moving_frames(1))
    clip = read_clip(path, DENSE)
    assert clip.frames is not None
    assert (len(clip.frames), clip.duration_s, clip.step_s) == (1, 0.04, 0.08)
    with pytest.raises(KokaneeError, match=r"one\.mp4.*needs two"):
        read_clip(path, SALMONN2)


def test_a_stream_without_a_stated_length_is_counted(tmp_path: Path) -> None:
    path = encode(tmp_path / "live.mkv", moving_frames(60), container_options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
        assert container.streams.video[0].duration is None
    clip = read_clip(path, DENSE)
    assert clip.duration_s == pytest.approx(2.4)


def test_a_silent_file_has_no_waveform_and_says_so(folder: Path) -> None:
    clip = read_clip(make(folder, "vp9.webm"), DENSE)
    assert clip.waveform is None
    assert clip.notes == ("no sound track",)
    assert read_clip(make(folder, "vp9.webm"), DENSE, want=("video",)).notes == ()


@pytest.mark.parametrize(
    ("name", "codec"), [("sound.mp3", "libmp3lame"), ("sound.m4a", "aac"), ("sound.wav", "pcm_s16le")]
)
def test_sound_alone_is_a_clip(tmp_path: Path, name: str, codec: str) -> None:
    path = encode(tmp_path / name, sound=tones(5.0), sound_codec=codec)
    clip = read_clip(path, DENSE)
    assert (clip.frames, clip.step_s, len(clip.times_s)) == (None, None, 0)
    assert clip.waveform is not None
    assert clip.duration_s == len(clip.waveform) / 16_000 == pytest.approx(5.0, abs=0.1)
    assert clip.notes == ("no picture",)
    part = read_clip(path, DENSE, start_s=1.5, end_s=4.25, want=("audio",))
    assert part.waveform is not None
    assert len(part.waveform) == 44_000
    with pytest.raises(KokaneeError, match=r"no readable video.*found: audio"):
        read_clip(path, DENSE, want=("video",))
    with pytest.raises(KokaneeError, match="neither"):
        read_clip(path, DENSE, start_s=7.0)


def test_a_cover_picture_is_no_film(tmp_path: Path) -> None:
    cover = encode(tmp_path / "cover.png", moving_frames(1), codec="png", pix_fmt="rgb24", format="image2")
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as out, av.open(str(cover)) as picture:
        sound = out.add_stream("libmp3lame", rate=16_000, layout="mono")
        image = out.add_stream_from_template(picture.streams.video[0])
        image.disposition = Disposition.attached_pic
        for packet in picture.demux(video=0):
            if packet.size:
                packet.stream = image
                out.mux(packet)
        frame = av.AudioFrame.from_ndarray(tones(2.0), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    clip = read_clip(path, DENSE)
    assert clip.frames is None
    assert clip.waveform is not None


def test_where_only_the_sound_goes_on_it_alone_is_a_clip(tmp_path: Path) -> None:
    frames, sound = moving_frames(25), tones(6.0)
    path = encode(tmp_path / "clip.mkv", frames, codec="ffv1", pix_fmt="bgr0", sound=sound, sound_codec="flac")
    for clip in (
        read_clip(path, DENSE, start_s=2.0, end_s=4.0),
        make_clip(frames, 25.0, sound[0], DENSE, start_s=2.0, end_s=4.0),
    ):
        assert (clip.frames, clip.duration_s, clip.start_s, clip.end_s) == (None, 2.0, 2.0, 4.0)
        assert clip.waveform is not None
        assert np.abs(clip.waveform - sound[0, 32_000:64_000]).max() < 1e-3
        assert clip.notes == ("no picture here (it lasts 1.00 s)",)
    with pytest.raises(KokaneeError, match=r"clip\.mkv.*neither picture nor sound at 7 s.*lasts 1\.00 s"):
        read_clip(path, DENSE, start_s=7.0)
    with pytest.raises(KokaneeError, match=r"No picture between 2 s and the end"):
        read_clip(path, DENSE, start_s=2.0, want=("video",))


def test_sound_under_a_second_lasts_as_long_as_it_is(tmp_path: Path) -> None:
    path = encode(tmp_path / "sound.wav", sound=tones(5.0), sound_codec="pcm_s16le")
    clip = read_clip(path, DENSE, start_s=4.0, end_s=4.6)
    assert (clip.duration_s, clip.end_s) == pytest.approx((0.6, 4.6))
    assert clip.waveform is not None
    assert len(clip.waveform) == 16_000
    assert make_clip(None, 25.0, tones(0.3)[0], SALMONN2).duration_s == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("picture_s", "sound_s", "length_s"), [(2.0, None, 2.0), (2.0, 1.0, 2.0), (2.0, 2.3, 2.0), (2.0, 5.0, 5.0)]
)
@pytest.mark.parametrize("in_memory_bytes", [0, 64 << 20])
def test_a_file_lasts_as_long_as_its_picture_or_much_longer_sound(
    tmp_path: Path,
    picture_s: float,
    sound_s: float | None,
    length_s: float,
    in_memory_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kokanee.demux, "IN_MEMORY_BYTES", in_memory_bytes)
    sound = None if sound_s is None else tones(sound_s)
    path = encode(tmp_path / "clip.mkv", moving_frames(round(25 * picture_s)), sound=sound, sound_codec="flac")
    assert file_length_s(path) == pytest.approx(length_s)
    assert read_clip(path, DENSE).end_s == pytest.approx(length_s)
    assert file_length_s(path, ("video",)) == pytest.approx(picture_s)
    if sound_s is not None:
        assert file_length_s(path, ("audio",)) == pytest.approx(sound_s)
    else:
        with pytest.raises(KokaneeError, match="no readable audio"):
            file_length_s(path, ("audio",))


def test_an_error_names_its_file_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encode(Path("a"), moving_frames(25), format="mp4")
    with pytest.raises(KokaneeError, match=r"^a: No picture"):
        read_clip("a", DENSE, start_s=5.0)


@pytest.mark.parametrize(("sound_s", "note"), [(2.0, "sound ends 2.0 s before"), (6.0, "sound ends 2.0 s after")])
def test_sound_of_another_length_is_kept_and_noted(tmp_path: Path, sound_s: float, note: str) -> None:
    path = encode(tmp_path / "clip.mkv", moving_frames(100), sound=tones(sound_s), sound_codec="flac")
    clip = read_clip(path, DENSE)
    assert clip.waveform is not None
    assert clip.duration_s == 4.0
    assert len(clip.waveform) == round(sound_s * 16_000)
    assert any(line.startswith(note) for line in clip.notes)
    published = read_clip(path, SALMONN2)
    assert published.waveform is not None
    assert len(published.waveform) == min(round(sound_s * 16_000), 64_000)


def test_sound_that_starts_late_keeps_its_time(tmp_path: Path) -> None:
    path = encode(tmp_path / "late.mkv", moving_frames(75), sound=tones(2.0), sound_codec="flac", sound_start_s=1.0)
    clip = read_clip(path, DENSE)
    assert clip.waveform is not None
    assert np.array_equal(clip.waveform[:16_000], np.zeros(16_000))
    assert np.abs(clip.waveform[16_000:] - tones(2.0)[0]).max() < 1e-3
    assert clip.notes == ("sound starts 1.0 s after the picture",)


def test_many_channels_are_mixed_or_the_first_kept_as_each_model_was_trained(tmp_path: Path) -> None:
    sound = tones(3.0, channels=2)
    path = encode(tmp_path / "stereo.mkv", moving_frames(75), sound=sound, sound_codec="flac")
    mixed, first = read_clip(path, DENSE).waveform, read_clip(path, SALMONN2).waveform
    assert first is not None
    assert mixed is not None
    assert np.abs(first - sound[0]).max() < 1e-3
    scale = float(mixed @ sound.sum(0) / (sound.sum(0) @ sound.sum(0)))
    assert np.abs(mixed - scale * sound.sum(0)).max() < 1e-3


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz(tmp_path: Path, rate_hz: int) -> None:
    path = encode(tmp_path / "rate.mkv", sound=tones(3.0, rate_hz), sound_codec="pcm_s16le", sound_rate_hz=rate_hz)
    waveform = read_clip(path, DENSE).waveform
    assert waveform is not None
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 48_000) <= 2
    expected = tones(3.0)[0]
    assert np.abs(waveform[500:47_500] - expected[500:47_500]).max() < 0.02


def test_of_several_streams_the_first_is_used_and_noted(tmp_path: Path) -> None:
    path = encode(tmp_path / "two.mkv", moving_frames(50), sound=tones(2.0), copies=2)
    clip = read_clip(path, DENSE)
    assert equal(clip.frames, [decode_all(path)[0][index] for index in sample_indices(50, 25.0, DENSE)])
    assert clip.notes == ("2 video streams; stream 0 is used", "2 audio streams; stream 1 is used")


@pytest.mark.parametrize("name", ["cut.mkv", "cut.mp4", "cut.ts"])
def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(tmp_path: Path, name: str) -> None:
    whole = encode(
        tmp_path / f"whole-{name}",
        moving_frames(100),
        options=X264_B_FRAMES,
        sound=tones(4.0),
        container_options={"movflags": "faststart"} if name.endswith("mp4") else None,
    )
    path = tmp_path / name
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    all_frames, _ = decode_all(whole)
    clip = read_clip(path, EVERY_FRAME)
    assert clip.frames is not None
    assert 20 < len(clip.frames) < 90
    matches = [np.array_equal(shown, given) for shown, given in zip(clip.frames, all_frames)]
    assert sum(matches) > 0.8 * len(matches)
    if name != "cut.ts":
        assert any("cut off" in note for note in clip.notes)


def test_an_mp4_without_its_index_is_refused(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", moving_frames(50))
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(KokaneeError, match=r"cut\.mp4.*cut off"):
        read_clip(path, DENSE)


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_damage_in_the_middle_is_told_and_what_decodes_is_shown(tmp_path: Path, codec: str) -> None:
    whole = encode(tmp_path / "whole.mkv", moving_frames(100), codec=codec, options={"g": "20"}, sound=tones(4.0))
    path = tmp_path / "damaged.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for number, packet in enumerate(packet for packet in source.demux() if packet.size):
            stream = streams[packet.stream_index]
            if packet.stream.type == "video" and 60 < number < 75:
                broken = av.Packet(b"\xff" * packet.size)
                broken.pts, broken.dts, broken.time_base = packet.pts, packet.dts, packet.time_base
                packet = broken
            packet.stream = stream
            out.mux(packet)
    decoded, times_s = decode_tolerantly(path)
    clip = read_clip(path, EVERY_FRAME)
    assert len(decoded) < 100
    assert equal(clip.frames, decoded)
    assert np.allclose(clip.times_s, times_s)
    assert any("could not be decoded" in note for note in clip.notes)


def decode_tolerantly(path: Path) -> tuple[list[np.ndarray], list[float]]:
    frames = []
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        context.thread_count = 1
        for packet in container.demux(video=0):
            try:
                frames += context.decode(packet if packet.size else None)
            except FFmpegError:
                continue
    return [frame.to_ndarray(format="rgb24") for frame in frames], [
        float(frame.pts * Fraction(1, 1000)) for frame in frames
    ]


def test_damaged_sound_is_told(tmp_path: Path) -> None:
    path = encode(tmp_path / "whole.mkv", moving_frames(50), sound=tones(2.0), sound_codec="aac")
    broken = tmp_path / "broken.mkv"
    with av.open(str(path)) as source, av.open(str(broken), "w") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size and not (packet.stream.type == "audio" and 0.8 < float(packet.pts * packet.time_base) < 1.5):
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    clip = read_clip(broken, DENSE)
    assert clip.waveform is not None
    assert any("holes in the sound" in note for note in clip.notes)
    whole = read_clip(path, DENSE).waveform
    assert whole is not None
    assert np.abs(clip.waveform[28_000:31_000] - whole[28_000:31_000]).max() < 0.02


def test_a_picture_that_changes_size_is_scaled_to_its_first(tmp_path: Path) -> None:
    parts = [encode(tmp_path / f"{size}.ts", moving_frames(25, size, size)) for size in (64, 96)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = read_clip(path, EVERY_FRAME)
    assert clip.frames is not None
    assert {frame.shape for frame in clip.frames} == {(64, 64, 3)}
    assert any("size changes" in note for note in clip.notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mp4", None, "does not exist"),
        ("empty.mp4", b"", "0 bytes"),
        ("noise.mp4", bytes(range(256)) * 40, "not a media file"),
        ("notes.txt", b"Dear diary,\n" * 100, "not a media file"),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nother.ts\n#EXT-X-ENDLIST\n", "media file"),
        ("list.ffconcat", b"ffconcat version 1.0\nfile other.mp4\n", "media file"),
    ],
)
def test_what_is_no_media_file_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    encode(tmp_path / "other.ts", moving_frames(5))
    encode(tmp_path / "other.mp4", moving_frames(5))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(KokaneeError, match=message) as error:
        read_clip(tmp_path / name, DENSE)
    assert name in str(error.value)


def test_a_folder_and_a_senseless_wish_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(KokaneeError, match="not a file"):
        read_clip(tmp_path, DENSE)
    with pytest.raises(KokaneeError, match="can be wanted"):
        read_clip(make(folder, "closed-gop.mp4"), DENSE, want=("picture",))
    with pytest.raises(KokaneeError, match=r"closed-gop\.mp4.*lasts 4\.00 s"):
        read_clip(make(folder, "closed-gop.mp4"), DENSE, start_s=5.0)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_an_image_is_read_as_pillow_reads_it(tmp_path: Path, mode: str) -> None:
    Image.fromarray(moving_frames(1, 61, 83)[0]).convert(mode).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert np.array_equal(image, np.array(Image.open(tmp_path / "image.png").convert("RGB")))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_of_16_bits_the_upper_8_are_shown(tmp_path: Path, ending: str) -> None:
    grey = np.arange(0, 65_536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / f"deep.{ending}")
    image = read_image(tmp_path / f"deep.{ending}")
    assert np.array_equal(image, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_a_grey_without_a_stated_white_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(KokaneeError, match=r"float\.tif.*8 or 16 bits"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("ending", ["webp", "png", "tif", "gif"])
def test_of_several_frames_the_first_is_read_and_noted(tmp_path: Path, ending: str) -> None:
    pictures = [Image.new("RGB", (16, 16), (250 * (number == 1), 0, 0)) for number in range(3)]
    pictures[0].save(tmp_path / f"many.{ending}", save_all=True, append_images=pictures[1:])
    notes: list[str] = []
    assert not read_image(tmp_path / f"many.{ending}", notes).any()
    assert notes == ["an image of 3 frames; the first is used"]


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    photograph = Image.fromarray(moving_frames(1, 61, 83)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "turned.jpg", exif=exif)
    photograph.save(tmp_path / "stored.jpg")
    assert np.array_equal(read_image(tmp_path / "turned.jpg"), np.rot90(read_image(tmp_path / "stored.jpg"), -1))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    sound = encode(tmp_path / "sound.wav", sound=tones(1.0), sound_codec="pcm_s16le")
    cut = tmp_path / "cut.png"
    Image.fromarray(moving_frames(1)[0]).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    for path in (sound, cut):
        with pytest.raises(KokaneeError, match=f"{path.name} is no image"):
            read_image(path)
    with pytest.raises(KokaneeError, match="does not exist"):
        read_image(tmp_path / "missing.png")


def test_packets_end_where_pyav_trips_over_a_stream_that_began_later() -> None:
    """As at the end of an MPEG-TS recording of 60 MB, which is too large to make here."""

    class Container:
        def demux(self, streams: list[Any]) -> Iterator[SimpleNamespace]:
            yield from (SimpleNamespace(size=1), SimpleNamespace(size=0), SimpleNamespace(size=2))
            raise IndexError("list index out of range")

    notes: list[str] = []
    assert [packet.size for packet in kokanee.demux._whole_packets(Container(), [], notes)] == [1, 2] and not notes


def test_a_matroska_file_whose_picture_starts_late_is_whole(tmp_path: Path) -> None:
    late = [3000 + 40 * number for number in range(50)]
    path = encode(tmp_path / "late.mkv", moving_frames(50), pts=late, sound=tones(2.0), sound_start_s=3.0)
    assert not [note for note in read_clip(path, DENSE).notes if "cut off" in note]


@pytest.mark.parametrize("error", [TypeError("Missing dimensions"), struct.error("unpack requires 4 bytes")])
def test_an_image_that_pillow_trips_over_is_told_as_any_other(tmp_path: Path, monkeypatch, error) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")

    def trip(*_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", trip)
    with pytest.raises(KokaneeError, match=r"image\.png is no image that can be read"):
        read_image(tmp_path / "image.png")
