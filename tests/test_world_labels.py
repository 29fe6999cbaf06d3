"""Laws of the labels: they say what is in the picture and in the sound."""

from __future__ import annotations

import numpy as np
import pytest

from kokanee.world.labels import DOINGS, frame_labels, window_labels
from kokanee.world.render import BACKGROUND_RGB, RGB, frames
from kokanee.world.scene import (
    BACKGROUNDS,
    COLOURS,
    PITCHES,
    SHAPES,
    SLOT_S,
    SOUNDS,
    VERBS,
    Action,
    Ambient,
    Figure,
    Scene,
    Sound,
    sample_scene,
    state_at,
)
from kokanee.world.sound import NOISE_FLOOR, RATE_HZ, waveform

SIDE, SIZE = 3, 96


def picture_of(scene: Scene, time_s: float) -> np.ndarray:
    return frames(scene, np.array([time_s]), SIZE)[0].astype(int)


def test_a_labelled_cell_shows_its_colour_at_the_labelled_centre_and_others_show_the_background():
    checked = 0
    for index in range(60):
        scene = sample_scene("train", index)
        time_s = 0.37 * (index % 10)
        labels, picture = frame_labels(scene, time_s, SIDE), picture_of(scene, time_s)
        if labels.dark or (scene.ambient and scene.ambient.kind == "light"):
            continue
        states = [state_at(scene, number, time_s) for number in range(len(scene.figures))]
        if any(0.0 < state.blend or 0.0 < state.opacity < 1.0 for state in states):
            continue
        seen = sum(state.opacity == 1.0 for state in states)
        assert labels.present_G.sum() == seen
        for cell in range(SIDE * SIDE):
            row, column = divmod(cell, SIDE)
            if labels.present_G[cell]:
                x, y = labels.geometry_G7[cell, :2] / SIDE + 0.5
                assert (int(y * SIDE), int(x * SIDE)) == (row, column)
                colour = picture[int(y * SIZE), int(x * SIZE)]
                assert np.abs(colour - RGB[COLOURS[labels.colour_G[cell]]]).max() <= 17
                checked += 1
            else:
                assert labels.colour_G[cell] == labels.shape_G[cell] == -1
                assert not labels.geometry_G7[cell].any()
                assert labels.does_G[cell] in (-1, DOINGS.index("appears"), DOINGS.index("blinks"))
        ground = BACKGROUND_RGB[BACKGROUNDS[labels.background]]
        nearest = min(np.abs(picture[y, x] - ground).max() for y in (1, -2) for x in (1, -2))
        assert nearest <= 17
    assert checked > 40


def test_cells_go_row_by_row_and_hold_the_figure_whose_centre_they_hold():
    scene = Scene(
        4.0,
        "white",
        (Figure("red", "star", "small", "top right", 0.0), Figure("blue", "heart", "big", "bottom", 0.0)),
        (),
        (),
        None,
    )
    labels = frame_labels(scene, 1.0, SIDE)
    assert labels.present_G.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0]
    assert labels.colour_G[2] == COLOURS.index("red") and labels.shape_G[2] == SHAPES.index("star")
    assert labels.colour_G[7] == COLOURS.index("blue") and labels.shape_G[7] == SHAPES.index("heart")
    assert labels.geometry_G7[2] == pytest.approx([0.9, -0.9, 0.14, 0, 0, 0, 0], abs=1e-6)
    assert labels.background == BACKGROUNDS.index("white") and labels.dark == 0


@pytest.mark.parametrize(
    ("verb", "argument", "column", "rate"),
    [("moves", "left", 3, -0.15), ("moves", "down", 4, 0.15), ("grows", "", 5, 0.04), ("disappears", "", 6, -0.5)],
)
def test_changes_are_counted_by_the_second(verb, argument, column, rate):
    figure = Figure("red", "star", "small", "middle", 0.0)
    scene = Scene(4.0, "white", (figure,), (Action(0, verb, argument, 1.0, 3.0),), (), None)
    cell = int(frame_labels(scene, 1.2, SIDE).present_G.argmax())
    for step_s in (0.15, 0.25):
        changes = frame_labels(scene, 1.2, SIDE, step_s).geometry_G7[cell, 3:]
        assert changes[column - 3] == pytest.approx(rate, abs=1e-6) and np.count_nonzero(np.abs(changes) > 1e-6) == 1
    assert not np.abs(frame_labels(scene, 0.2, SIDE).geometry_G7[cell, 3:]).max() > 1e-6


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_figure_does_is_told_while_it_does_it(verb):
    size = "big" if verb == "shrinks" else "small"
    figures = (Figure("red", "star", size, "left", 0.0), Figure("red", "cross", size, "right", 0.0))
    detail = {"moves": "up", "turns": "blue"}.get(verb, "")
    scene = Scene(4.0, "white", figures, (Action(1, verb, detail, 1.0, 2.0),), (), None)
    for time_s in (0.5, 1.2, 1.6, 2.5):
        does = frame_labels(scene, time_s, SIDE, 0.3).does_G
        assert does[3] == DOINGS.index("rests")
        told = {int(label) for label in does} - {-1, DOINGS.index("rests")}
        now, later = state_at(scene, 1, time_s), state_at(scene, 1, time_s + 0.3)
        acts = now != later and max(now.opacity, later.opacity) >= 0.5
        assert told == ({DOINGS.index(verb)} if acts else set())
        assert acts or not 1.0 < time_s < 2.0 or verb in ("appears", "disappears", "blinks")


def test_the_action_that_fills_most_of_the_time_is_told():
    figure = Figure("red", "star", "small", "middle", 0.0)
    acts = (Action(0, "spins", "", 1.0, 2.0), Action(0, "grows", "", 2.0, 3.0))
    scene = Scene(4.0, "white", (figure,), acts, (), None)
    found = [frame_labels(scene, time_s, 3, 0.3).does_G[4] for time_s in (1.8, 1.9)]
    assert found == [DOINGS.index("spins"), DOINGS.index("grows")]


def test_a_figure_that_is_hidden_has_no_label():
    figure = Figure("red", "star", "small", "middle", 0.0)
    scene = Scene(4.0, "white", (figure,), (Action(0, "blinks", "", 1.0, 3.0),), (), None)
    assert [frame_labels(scene, time_s, SIDE).present_G.sum() for time_s in (0.5, 1.2, 1.7, 3.5)] == [1, 1, 0, 1]


def test_the_light_is_labelled():
    scene = Scene(4.0, "white", (), (), (), Ambient("light", "out", 2.0))
    assert [frame_labels(scene, time_s, SIDE).dark for time_s in (1.9, 2.0, 3.0)] == [0, 1, 1]


def test_window_labels_agree_with_the_energy_of_the_sound():
    for index in range(40):
        scene = sample_scene("validation", index)
        windows = round(scene.duration_s / SLOT_S)
        kind, pitch, onset = window_labels(scene, windows)
        samples = waveform(scene).reshape(windows, round(SLOT_S * RATE_HZ))
        loud = np.sqrt(np.mean(np.square(samples, dtype=np.float64), axis=1)) > 3 * NOISE_FLOOR
        assert np.array_equal(loud, kind < len(SOUNDS)) and np.array_equal(loud, pitch >= 0)
        assert onset.sum() == len(scene.sounds) and loud[onset > 0].all()


def test_windows_are_labelled_with_kind_pitch_and_onset_up_to_their_number():
    scene = Scene(4.0, "white", (), (), (Sound("drum", "low", 2, 0.5), Sound("bell", "high", 3, 3.0)), None)
    kind, pitch, onset = window_labels(scene, 7)
    drum, bell, silence = SOUNDS.index("drum"), SOUNDS.index("bell"), len(SOUNDS)
    assert kind.tolist() == [silence, drum, drum, silence, silence, silence, bell]
    assert pitch.tolist() == [-1, PITCHES.index("low"), PITCHES.index("low"), -1, -1, -1, PITCHES.index("high")]
    assert onset.tolist() == [0, 1, 0, 0, 0, 0, 1]
    assert not window_labels(scene, 1)[2].any() and (window_labels(scene, 1)[0] == silence).all()
