"""Laws of the pictures: equal input gives equal bytes, and what is drawn is what the scene says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kokanee.world.render import BACKGROUND_RGB, RGB, frames
from kokanee.world.scene import (
    BACKGROUNDS,
    COLOURS,
    DARKNESS,
    SHAPES,
    Action,
    Ambient,
    Figure,
    Scene,
    sample_scene,
    state_at,
)

SIZE = 96
TINT_AND_GRAIN = 17  # tint up to 10 grey levels, grain up to 6, rounding


def scene_with(*figures: Figure, actions: tuple[Action, ...] = (), ambient: Ambient | None = None, ground="grey"):
    return Scene(6.0, ground, figures, actions, (), ambient, texture_seed=5)


def at(scene: Scene, time_s: float, x: float, y: float, size: int = SIZE) -> np.ndarray:
    """The colour of one point of a picture, as numbers that can be subtracted."""
    return frames(scene, np.array([time_s]), size)[0, round(y * size), round(x * size)].astype(int)


def far(colour: np.ndarray, wanted: tuple[int, ...]) -> int:
    return int(np.abs(colour - np.array(wanted)).max())


def test_equal_input_gives_equal_bytes():
    times_s = np.array([0.0, 0.7, 3.1])
    for index in range(3):
        scene = sample_scene("train", index)
        assert np.array_equal(frames(scene, times_s, 64), frames(scene, times_s, 64))


def test_a_picture_does_not_depend_on_the_others_of_its_clip():
    scene, times_s = sample_scene("train", 4), np.linspace(0.0, 3.9, 8)
    together = frames(scene, times_s, 64)
    assert together.shape == (8, 64, 64, 3) and together.dtype == np.uint8
    alone = [frames(scene, times_s[k : k + 1], 64)[0] for k in range(8)]
    assert np.array_equal(together, np.stack(alone))


def test_another_texture_is_another_picture_of_the_same_scene():
    scene = sample_scene("train", 0)
    one, other = (frames(replace(scene, texture_seed=seed), np.zeros(1), 64).astype(int) for seed in (1, 2))
    assert 0 < np.abs(one - other).max() <= 2 * TINT_AND_GRAIN


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS[::3])
def test_a_figure_has_its_colour_at_its_centre_and_the_background_around_it(shape, colour):
    scene = scene_with(Figure(colour, shape, "small", "middle", 0.0))
    assert far(at(scene, 0.0, 0.5, 0.5), RGB[colour]) <= TINT_AND_GRAIN
    for x, y in ((0.1, 0.1), (0.9, 0.5), (0.5, 0.95)):
        assert far(at(scene, 0.0, x, y), BACKGROUND_RGB["grey"]) <= TINT_AND_GRAIN


@pytest.mark.parametrize("ground", BACKGROUNDS)
def test_backgrounds_have_their_colours(ground):
    assert far(at(scene_with(ground=ground), 0.0, 0.5, 0.5), BACKGROUND_RGB[ground]) <= TINT_AND_GRAIN


def test_every_visible_figure_of_a_scene_is_drawn_where_its_state_says():
    checked = 0
    for index in range(40):
        scene = sample_scene("train", index)
        for time_s in (0.0, 1.3, 2.6, 3.9):
            for number in range(len(scene.figures)):
                state = state_at(scene, number, time_s)
                light = scene.ambient is None or scene.ambient.kind != "light"
                if state.opacity == 1.0 and state.blend == 0.0 and light:
                    assert far(at(scene, time_s, state.x, state.y), RGB[state.colour]) <= TINT_AND_GRAIN
                    checked += 1
    assert checked > 100


def test_big_figures_are_larger_than_small_ones_and_shapes_differ():
    def area(shape: str, size: str) -> float:
        picture = frames(scene_with(Figure("red", shape, size, "middle", 0.0)), np.zeros(1), SIZE)[0].astype(int)
        return float((picture[..., 0] - picture[..., 1] > 60).mean())

    for shape in SHAPES:
        assert 1.8 < area(shape, "big") / area(shape, "small") < 3.0
    pictures = [
        frames(scene_with(Figure("red", shape, "big", "middle", 0.0)), np.zeros(1), SIZE)[0].astype(int)
        for shape in SHAPES
    ]
    for one in range(len(SHAPES)):
        for other in range(one):
            assert (np.abs(pictures[one] - pictures[other]).max(-1) > 60).mean() > 0.01


def test_what_is_not_there_yet_or_no_more_is_not_drawn():
    figure = Figure("red", "square", "big", "middle", 0.0)
    appears = scene_with(figure, actions=(Action(0, "appears", "", 1.0, 2.0),))
    vanishes = scene_with(figure, actions=(Action(0, "disappears", "", 1.0, 2.0),))
    empty = scene_with()
    for scene, time_s in ((appears, 0.5), (vanishes, 2.5)):
        assert np.array_equal(frames(scene, np.array([time_s]), SIZE), frames(empty, np.array([time_s]), SIZE))


def test_a_figure_that_turns_is_half_way_between_its_colours():
    scene = scene_with(Figure("red", "square", "big", "middle", 0.0), actions=(Action(0, "turns", "blue", 1.0, 2.0),))
    middle = tuple(round((one + other) / 2) for one, other in zip(RGB["red"], RGB["blue"], strict=True))
    for time_s, wanted in ((1.0, RGB["red"]), (1.5, middle), (2.0, RGB["blue"])):
        assert far(at(scene, time_s, 0.5, 0.5), wanted) <= TINT_AND_GRAIN


def test_the_dark_is_darker_and_fades_in():
    scene = scene_with(ambient=Ambient("light", "out", 2.0), ground="white")
    levels = [at(scene, time_s, 0.5, 0.5).mean() for time_s in (1.0, 2.0, 2.125, 2.25, 4.0)]
    assert levels == sorted(levels, reverse=True) and levels[0] == levels[1] and levels[3] == levels[4]
    assert levels[4] / levels[0] == pytest.approx(DARKNESS, abs=0.05)
