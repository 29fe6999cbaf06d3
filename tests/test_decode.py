"""The sound stays in step with the picture, whatever its times and samples are; its end is known without keeping it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.error import ArgumentError

import kokanee.decode
from kokanee.errors import KokaneeError
from kokanee.media import Sampling, file_length_s, read_clip
from media_files import encode, moving_frames, tones

SAMPLING = Sampling("salmonn2plus", 0.5, 1, 768)
SECOND = 16_000


def heard(path: Path, start_s: float | None = None, end_s: float | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    clip = read_clip(path, SAMPLING, start_s=start_s, end_s=end_s)
    assert clip.waveform is not None
    return clip.waveform, clip.notes


def shifted(path: Path, shift_s: Callable[[float], float], **picture) -> Path:
    """A file with 4 s of sound whose packet at t s is stored at t + shift_s(t); `picture` goes to `encode`."""
    whole = encode(path.with_name(f"whole-{path.name}"), sound=tones(4.0), sound_codec="flac", **picture)
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                assert packet.pts is not None and packet.time_base is not None
                if packet.stream.type == "audio":
                    packet.pts += round(shift_s(float(packet.pts * packet.time_base)) / packet.time_base)
                    packet.dts = packet.pts
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    return path


def after_two_seconds(shift_s: float) -> Callable[[float], float]:
    return lambda time_s: shift_s if time_s >= 2.0 else 0.0


def test_a_hole_of_any_length_is_silence_and_told(tmp_path: Path) -> None:
    path = shifted(tmp_path / "hole.mkv", after_two_seconds(700.0))
    waveform, notes = heard(path)
    whole = tones(4.0)[0]
    cut = len(waveform) - 700 * SECOND - 2 * SECOND
    assert len(waveform) == pytest.approx(704 * SECOND, abs=16)
    assert np.abs(waveform[: 2 * SECOND] - whole[: 2 * SECOND]).max() < 1e-3
    assert not waveform[3 * SECOND : 701 * SECOND].any()
    assert np.abs(waveform[-SECOND:] - whole[-SECOND:]).max() < 1e-3
    assert abs(cut - 2 * SECOND) < SECOND
    assert any("1 holes in the sound (700.0 s)" in note for note in notes)


def test_holes_that_are_too_short_to_be_told_do_not_add_up(tmp_path: Path) -> None:
    """50 ms between every two packets: what is heard is never more than 0.1 s from where it belongs."""
    path = shifted(tmp_path / "holes.mkv", lambda time_s: 0.05 * round(time_s / 0.288))  # 4,608 samples a packet
    waveform, notes = heard(path)
    whole = tones(4.0)[0]
    last_s = 0.05 * int(4.0 / 0.288)
    assert len(waveform) == pytest.approx((4.0 + last_s) * SECOND, abs=0.1 * SECOND)
    assert np.abs(waveform[-1000:] - whole[-1000:]).max() < 1e-3
    assert any("holes in the sound" in note for note in notes)


def test_a_clock_that_is_fast_does_not_add_up(tmp_path: Path) -> None:
    """Each packet begins 50 ms before the last one ended, as if there were more sound than time."""
    path = shifted(tmp_path / "fast.mkv", lambda time_s: -0.05 * round(time_s / 0.288))
    waveform, notes = heard(path)
    whole = tones(4.0)[0]
    fewer_s = 0.05 * int(4.0 / 0.288)
    assert len(waveform) == pytest.approx((4.0 - fewer_s) * SECOND, abs=0.1 * SECOND)
    assert np.abs(waveform[-1000:] - whole[-1000:]).max() < 1e-3
    assert any("overlaps of the sound" in note for note in notes)
    part, _ = heard(path, 2.0, 3.0)
    assert len(part) == SECOND
    shifts = range(-1700, 1700, 4)
    near = min(np.abs(part[2000:3000] - waveform[2 * SECOND + 2000 + n : 2 * SECOND + 3000 + n]).max() for n in shifts)
    assert near < 0.2


@pytest.mark.parametrize(("start_s", "end_s"), [(0.5, 5.0), (2.5, 5.0), (300.0, 310.0), (701.0, 703.5), (703.0, None)])
def test_the_sound_of_an_interval_is_that_part_of_the_whole_around_a_hole(
    tmp_path: Path, start_s: float, end_s: float | None
) -> None:
    path = shifted(tmp_path / "hole.mkv", after_two_seconds(700.0))
    whole = heard(path)[0][round(start_s * SECOND) : None if end_s is None else round(end_s * SECOND)]
    part, notes = heard(path, start_s, end_s)
    assert len(part) == pytest.approx(len(whole), abs=16)
    assert np.abs(part[: len(whole)] - whole[: len(part)]).max() < 1e-3
    assert start_s > 702 or any("holes in the sound" in note for note in notes)


def test_a_hole_that_no_true_time_would_leave_is_refused_but_not_by_a_part_beside_it(tmp_path: Path) -> None:
    path = shifted(tmp_path / "garbage.mkv", after_two_seconds(500_000.0))
    for read in (lambda: read_clip(path, SAMPLING), lambda: file_length_s(path)):
        with pytest.raises(KokaneeError, match=r"garbage\.mkv.*pauses for 138\.9 hours"):
            read()
    assert len(heard(path, 0.5, 1.5)[0]) == len(heard(path, 500_002.5, 500_003.5)[0]) == SECOND


def test_times_that_run_backwards_are_told(tmp_path: Path) -> None:
    parts = [encode(tmp_path / f"{number}.ts", sound=tones(2.0), sound_codec="aac") for number in range(2)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    waveform, notes = heard(path)
    assert len(waveform) == pytest.approx(4 * SECOND, abs=0.3 * SECOND)
    assert any("run backwards at 1 places" in note for note in notes)


def test_sound_that_no_resampler_takes_is_an_error_not_a_crash(tmp_path: Path) -> None:
    data = bytearray(encode(tmp_path / "whole.wav", sound=tones(2.0), sound_codec="pcm_s16le").read_bytes())
    data[22] = 200  # channels
    path = tmp_path / "broken.wav"
    path.write_bytes(data)
    with pytest.raises(KokaneeError, match=r"broken\.wav.*could not be decoded"):
        read_clip(path, SAMPLING)


def test_after_frames_that_no_resampler_takes_the_sound_is_in_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shifted(tmp_path / "clip.mkv", after_two_seconds(0.0))
    calls, working = iter(range(1000)), av.AudioResampler

    class Failing:
        def __init__(self, **settings) -> None:
            self.working = working(**settings)

        def resample(self, frame):
            if frame is not None and next(calls) in (4, 5, 6):
                raise ArgumentError(22, "Invalid argument")
            return self.working.resample(frame)

    monkeypatch.setattr(av, "AudioResampler", Failing)
    waveform, notes = heard(path)
    assert np.abs(waveform[-SECOND:] - tones(4.0)[0][-SECOND:]).max() < 1e-3
    assert "3 packets of sound could not be decoded" in notes


def test_samples_that_are_no_numbers_become_silence_and_are_told(tmp_path: Path) -> None:
    sound = tones(2.0)
    sound[0, 1000], sound[0, 2000] = np.nan, np.inf
    waveform, notes = heard(encode(tmp_path / "broken.wav", sound=sound, sound_codec="pcm_f32le"))
    assert np.isfinite(waveform).all()
    assert waveform[1000] == waveform[2000] == 0.0
    assert np.array_equal(waveform[3000:], sound[0, 3000:])
    assert "2 samples of sound are no finite numbers and replaced by silence" in notes


@pytest.mark.parametrize("tail_packets", [2, 256])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.wav", "pcm_s16le"), ("a.mka", "aac")]
)
def test_the_length_of_sound_is_that_of_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, tail_packets: int
) -> None:
    monkeypatch.setattr(kokanee.decode, "TAIL_PACKETS", tail_packets)
    path = encode(tmp_path / name, sound=tones(5.0), sound_codec=codec)
    assert file_length_s(path) == pytest.approx(len(heard(path)[0]) / SECOND, abs=2e-3)


def test_the_length_of_sound_is_found_without_decoding_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kokanee.decode, "TAIL_PACKETS", 4)
    kept = []
    monkeypatch.setattr(kokanee.decode.SoundReader, "_keep", lambda self, samples: kept.append(len(samples)))
    monkeypatch.setattr(kokanee.decode.SoundReader, "_fill", lambda self, n_samples: kept.append(n_samples))
    path = encode(tmp_path / "clip.mkv", moving_frames(5), sound=tones(20.0))
    file_length_s(path)
    assert sum(kept) < SECOND
