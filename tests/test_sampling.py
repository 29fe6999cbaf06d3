"""The published sampling rules, checked against what the published code picked."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kokanee.errors import KokaneeError
from kokanee.sampling import (
    RATE_HZ,
    NoPicture,
    Sampling,
    fit_waveform,
    frame_span,
    length_s,
    sample_indices,
    step_seconds,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "frame_sampling.json").read_text())


def salmonn2(case: dict) -> Sampling:
    return Sampling("salmonn2", 1 / case["video_fps"], 1, round(case["max_time"] * case["video_fps"]))


@pytest.mark.parametrize("case", GOLDEN["salmonn2plus"])
def test_salmonn2plus_picks_the_published_frames_and_step(case: dict) -> None:
    sampling = Sampling("salmonn2plus", case["base_interval"], case["video_min_frames"], case["video_max_frames"])
    indices = sample_indices(case["num_frames"], case["avg_fps"], sampling)
    duration_s = length_s(case["num_frames"], case["avg_fps"], sampling)
    assert indices == case["frame_indices"]
    assert duration_s == case["video_length_s"]
    assert step_seconds(len(indices), duration_s, sampling) == case["second_per_grid_t"]


@pytest.mark.parametrize("case", GOLDEN["salmonn2"])
def test_salmonn2_picks_the_published_frames_and_refuses_what_it_refused(case: dict) -> None:
    clip = (case["total_frames"], case["avg_fps"], salmonn2(case), *(case["timestamps"] or (None, None)))
    if case["error"]:
        with pytest.raises(KokaneeError):
            sample_indices(*clip)
        return
    assert sample_indices(*clip) == case["frame_indices"]
    assert length_s(*clip) == case["real_time"]


@pytest.mark.parametrize("case", [case for case in GOLDEN["audio_slices"] if not case["error"]])
def test_salmonn2_hears_the_published_samples(case: dict) -> None:
    sampling, (start_s, end_s) = salmonn2(case), case["timestamps"] or (None, None)
    numbers = np.arange(1, case["wav_samples"] + 1, dtype=np.float64)
    numbers = numbers[round((start_s or 0) * RATE_HZ) : None if end_s is None else round(end_s * RATE_HZ)]
    video = case["video"]
    duration_s = video and length_s(video["total_frames"], video["avg_fps"], sampling, start_s, end_s)
    heard = fit_waveform(numbers, sampling, duration_s)
    chunks = case["chunks"]
    assert len(heard) == sum(chunk["samples"] for chunk in chunks)
    assert (heard[0], heard[-1]) == (chunks[0]["first_sample_number"], chunks[-1]["last_sample_number"])


def test_salmonn2plus_hears_all_of_the_sound_and_at_least_a_second() -> None:
    sampling = Sampling("salmonn2plus", 0.1, 16, 768)
    assert len(fit_waveform(np.ones(50_000, np.float32), sampling, 1.0)) == 50_000
    padded = fit_waveform(np.ones(100, np.float32), sampling, 1.0)
    assert len(padded) == RATE_HZ
    assert padded.dtype == np.float32
    assert padded.sum() == 100


@pytest.mark.parametrize(("start_s", "end_s"), [(2.0, 5.0), (0.52, 7.333), (9.96, 10.0), (3.0, 3.001), (8.0, 99.0)])
def test_an_interval_of_salmonn2plus_is_read_as_if_the_file_were_cut(start_s: float, end_s: float) -> None:
    sampling = Sampling("salmonn2plus", 0.2, 4, 64)
    first, last = frame_span(250, 25.0, sampling, start_s, end_s)
    cut = sample_indices(last - first + 1, 25.0, sampling)
    assert sample_indices(250, 25.0, sampling, start_s, end_s) == [first + index for index in cut]
    assert length_s(250, 25.0, sampling, start_s, end_s) == (last - first + 1) / 25.0


def test_neighbouring_intervals_of_salmonn2plus_leave_no_frame_out_and_share_what_is_on_screen_between_them() -> None:
    sampling = Sampling("salmonn2plus", 0.01, 1, 10_000)
    edges_s = [0.0, 1.02, 3.32, 3.36, 8.0, 10.0]
    parts = [sample_indices(250, 25.0, sampling, start_s, end_s) for start_s, end_s in pairwise(edges_s)]
    shared = [set(one) & set(two) for one, two in pairwise(parts)]
    assert shared == [{25}, set(), set(), set()]  # 1.02 s is in the middle of a frame, the others are at borders
    assert sorted({index for part in parts for index in part}) == list(range(250))


@pytest.mark.parametrize(
    ("ends_s", "slides"),
    [((3.0, 5.0), [0]), ((8.0, 10.0), [1]), ((3.0, 6.0), [0, 1]), ((10.0, 15.0), [2]), ((14, 99), [2])],
)
def test_of_slides_an_interval_of_salmonn2plus_has_those_that_are_on_screen(ends_s, slides) -> None:
    """Three pictures of five seconds each."""
    first, last = frame_span(3, 1 / 5, Sampling("salmonn2plus", 0.2, 1, 64), *ends_s)
    assert list(range(first, last + 1)) == slides


@pytest.mark.parametrize(
    ("start_s", "end_s"), [(-1.0, None), (5.0, 5.0), (5.0, 2.0), (10.5, 12.0), (float("nan"), None), (0, float("inf"))]
)
def test_an_empty_or_impossible_interval_is_refused(start_s: float, end_s: float | None) -> None:
    with pytest.raises(KokaneeError, match=r"interval|time"):
        sample_indices(250, 25.0, Sampling("salmonn2plus", 0.2, 4, 64), start_s, end_s)


@pytest.mark.parametrize("numbers", [("other", 0.1, 1, 2), ("salmonn2", 0.0, 1, 2), ("salmonn2", 1.0, 0, 2)])
def test_a_sampling_that_makes_no_sense_is_refused(numbers: tuple) -> None:
    with pytest.raises(KokaneeError):
        Sampling(*numbers)


def test_the_last_frame_is_on_screen_up_to_the_end():
    plus = Sampling("salmonn2plus", 0.25, 1, 8)
    assert sample_indices(60, 1.0, plus, 59.7, 60.0) == [59] and frame_span(60, 1.0, plus, 59.7) == (59, 59)
    with pytest.raises(NoPicture):
        frame_span(60, 1.0, plus, 60.0)
