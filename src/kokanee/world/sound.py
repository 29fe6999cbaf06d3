"""A scene's sound: mono, float32, strokes made from sines and noise on a soft noise floor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kokanee.world.scene import SLOT_S, Scene, Sound

RATE_HZ = 16_000
STROKE_S = 0.4
NOISE_FLOOR = 0.003
PITCH_HZ = {
    "bell": (520.0, 1250.0),
    "drum": (65.0, 170.0),
    "whistle": (900.0, 2100.0),
    "buzzer": (95.0, 260.0),
    "chirp": (1600.0, 3400.0),
    "horn": (150.0, 360.0),
    "knock": (280.0, 900.0),
    "hiss": (900.0, 5000.0),
}


def waveform(scene: Scene, rate_hz: int = RATE_HZ) -> np.ndarray:
    """The scene's sound: float32 (duration_s * rate_hz,) within +-1. Equal input gives equal samples."""
    rng = np.random.default_rng([scene.texture_seed, 1])
    wave = rng.normal(0.0, NOISE_FLOOR, round(scene.duration_s * rate_hz))
    for sound in scene.sounds:
        volume, detune = rng.uniform(0.2, 0.6), rng.uniform(0.95, 1.05)
        for stroke in range(sound.count):
            samples = volume * _stroke(sound, detune, rng, rate_hz)
            start = round((sound.start_s + SLOT_S * stroke + rng.uniform(0.02, 0.06)) * rate_hz)
            room = wave[start : start + len(samples)]
            room += samples[: len(room)]
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


def _stroke(sound: Sound, detune: float, rng: np.random.Generator, rate_hz: int) -> np.ndarray:
    """One stroke of about unit loudness, STROKE_S long."""
    t = np.arange(round(STROKE_S * rate_hz)) / rate_hz
    pitch_hz = PITCH_HZ[sound.kind][sound.pitch == "high"] * detune
    return _MAKERS[sound.kind](t, pitch_hz, rng)


def _sine(t: np.ndarray, hz: float | np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * hz * t)


def _held(t: np.ndarray, attack_s: float) -> np.ndarray:
    """An envelope that rises, holds and falls."""
    return np.minimum(1.0, np.minimum(t / attack_s, (STROKE_S - t) / attack_s))


def _bell(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    partials = ((1.0, 1.0, 6.0), (2.76, 0.6, 9.0), (5.4, 0.3, 14.0))
    return np.sum([level * _sine(t, hz * ratio) * np.exp(-decay * t) for ratio, level, decay in partials], axis=0)


def _drum(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    skin = np.sin(2 * np.pi * hz * (t + 0.04 * (1 - np.exp(-t / 0.04)))) * np.exp(-11 * t)
    return 1.3 * skin + 0.5 * rng.normal(size=len(t)) * np.exp(-70 * t)


def _whistle(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    return _held(t, 0.03) * np.sin(2 * np.pi * hz * t + 2.0 * _sine(t, 7.0))


def _buzzer(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    return 0.6 * _held(t, 0.01) * np.tanh(8 * _sine(t, hz))


def _chirp(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    phase = t % 0.13
    return np.sin(2 * np.pi * hz * (phase + 2.2 * phase**2)) * np.sin(np.pi * np.minimum(phase / 0.09, 1.0)) ** 2


def _horn(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    tone = np.sum([(_sine(t, hz * k) + _sine(t, 1.26 * hz * k)) / k for k in range(1, 6)], axis=0)
    return 0.4 * _held(t, 0.06) * tone


def _knock(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    """Two raps on wood."""
    raps = np.zeros(len(t))
    for late_s in (0.0, 0.14):
        raps += np.where(t >= late_s, _sine(t - late_s, hz) * np.exp(-60 * np.maximum(t - late_s, 0.0)), 0.0)
    return 1.4 * raps


def _hiss(t: np.ndarray, hz: float, rng: np.random.Generator) -> np.ndarray:
    """Noise around `hz`: shaped in the spectrum, so that it has no edges."""
    spectrum = np.fft.rfft(rng.normal(size=len(t)))
    bins_hz = np.fft.rfftfreq(len(t), t[1] - t[0])
    shaped = np.fft.irfft(spectrum * np.exp(-0.5 * ((bins_hz - hz) / (0.35 * hz)) ** 2), len(t))
    return _held(t, 0.05) * shaped / max(np.std(shaped), 1e-9) * 0.4


_MAKERS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "bell": _bell,
    "drum": _drum,
    "whistle": _whistle,
    "buzzer": _buzzer,
    "chirp": _chirp,
    "horn": _horn,
    "knock": _knock,
    "hiss": _hiss,
}
