"""Laws of the sound: equal input gives equal samples, and every kind and pitch can be told from every other."""

from __future__ import annotations

import numpy as np
import pytest

from kokanee.world.scene import PITCHES, SLOT_S, SOUNDS, Scene, Sound, sample_scene
from kokanee.world.sound import NOISE_FLOOR, RATE_HZ, waveform

SLOT = round(SLOT_S * RATE_HZ)


def scene_with(*sounds: Sound, seed: int = 3, duration_s: float = 4.0) -> Scene:
    return Scene(duration_s, "grey", (), (), sounds, None, texture_seed=seed)


def slots(scene: Scene) -> np.ndarray:
    """The sound cut into half seconds: (slots, samples)."""
    return waveform(scene).reshape(-1, SLOT)


def loudness(samples: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(samples, dtype=np.float64), axis=-1))


def spectrum(kind: str, pitch: str, seed: int) -> np.ndarray:
    """The power of one stroke in quarters of an octave from 50 Hz on, adding up to 1."""
    stroke = slots(scene_with(Sound(kind, pitch, 1, 0.5), seed=seed, duration_s=1.0))[1]
    bands = np.floor(4 * np.log2(np.fft.rfftfreq(len(stroke), 1 / RATE_HZ)[1:] / 50)).clip(0).astype(int)
    power = np.bincount(bands, np.square(np.abs(np.fft.rfft(stroke)))[1:])
    return power / power.sum()


def centroid(power: np.ndarray) -> float:
    """The middle of a spectrum, in quarters of an octave."""
    return float((power * np.arange(len(power))).sum())


def test_equal_input_gives_equal_samples():
    for index in range(4):
        scene = sample_scene("train", index)
        wave = waveform(scene)
        assert np.array_equal(wave, waveform(scene))
        assert wave.dtype == np.float32 and wave.shape == (round(scene.duration_s * RATE_HZ),)
        assert np.abs(wave).max() <= 1.0


def test_another_rate_gives_the_same_length_in_seconds():
    scene = sample_scene("train", 0)
    assert len(waveform(scene, 8000)) == scene.duration_s * 8000


def test_silence_is_the_noise_floor():
    assert loudness(slots(scene_with())) == pytest.approx(NOISE_FLOOR, rel=0.05)


def test_strokes_lie_inside_their_slots():
    for kind in SOUNDS:
        for pitch in PITCHES:
            levels = loudness(slots(scene_with(Sound(kind, pitch, 3, 1.0))))
            assert (levels[2:5] > 10 * NOISE_FLOOR).all(), (kind, pitch)
            assert levels[[0, 1, 5, 6, 7]] == pytest.approx(NOISE_FLOOR, rel=0.1), (kind, pitch)
            edges = slots(scene_with(Sound(kind, pitch, 3, 1.0)))[2:5]
            assert loudness(edges[:, : round(0.02 * RATE_HZ)]) == pytest.approx(NOISE_FLOOR, rel=0.3)
            assert loudness(edges[:, -round(0.03 * RATE_HZ) :]) == pytest.approx(NOISE_FLOOR, rel=0.3)


def test_strokes_at_the_end_of_a_scene_are_not_cut():
    levels = loudness(slots(scene_with(Sound("horn", "low", 2, 3.0))))
    assert levels[7] == pytest.approx(levels[6], rel=0.1)


@pytest.mark.parametrize("kind", SOUNDS)
def test_the_high_one_has_its_power_higher_up(kind):
    low, high = ([centroid(spectrum(kind, pitch, seed)) for seed in range(6)] for pitch in PITCHES)
    assert min(high) > max(low) + 1.0


def test_every_kind_and_pitch_is_nearest_to_its_own_spectrum():
    """The mean spectrum of eight strokes is known; four others are told by it."""
    names = [(kind, pitch) for kind in SOUNDS for pitch in PITCHES]
    known = np.sqrt([np.mean([spectrum(*name, seed) for seed in range(8)], axis=0) for name in names])
    for number, name in enumerate(names):
        assert all(np.argmax(known @ np.sqrt(spectrum(*name, seed))) == number for seed in range(8, 12)), name


def test_volumes_differ_but_every_stroke_is_far_above_the_noise():
    levels = [loudness(slots(scene_with(Sound("bell", "low", 1, 1.0), seed=seed)))[2] for seed in range(20)]
    assert 1.5 < max(levels) / min(levels) < 4.0 and min(levels) > 10 * NOISE_FLOOR
