"""Laws of scenes: what can be drawn, what cannot, and to which split it belongs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from kokanee.world.scene import (
    CELL_CENTRES,
    COLOURS,
    PLACES,
    RADIUS,
    SHAPES,
    SLOT_S,
    SOUNDS,
    SPLITS,
    VERB_SLOTS,
    VERBS,
    Action,
    Ambient,
    Figure,
    Scene,
    background_at,
    is_dark,
    place_of,
    place_to_cell,
    sample_scene,
    split_of,
    state_at,
)

PINNED = (4.5, "black", ("green", "triangle"), 2555656496)
SCENES = [sample_scene("train", index) for index in range(240)]


def on_grid(time_s: float) -> bool:
    return (time_s / SLOT_S).is_integer()


def test_equal_arguments_give_equal_scenes_and_others_give_others():
    for split in SPLITS:
        assert sample_scene(split, 3, 1) == sample_scene(split, 3, 1)
    keys = {sample_scene(split, index, seed).key() for split in SPLITS for index in range(4) for seed in (0, 1)}
    assert len(keys) == len(SPLITS) * 4 * 2


def test_scenes_are_the_same_on_every_machine():
    """A change of the world's random draws would make other worlds of all that was published."""
    scene = sample_scene("test", 0)
    assert (scene.duration_s, scene.background, scene.figures[0].name, scene.texture_seed) == PINNED


def test_splits_never_share_a_scene_whatever_the_seed():
    for split in SPLITS:
        for seed in (0, 12345):
            assert all(split_of(sample_scene(split, index, seed)) == split for index in range(8))


def test_the_split_depends_on_what_a_scene_says_and_not_on_its_noise_or_the_tilt_of_its_figures():
    for scene in SCENES[:30]:
        figures = tuple(replace(figure, angle_deg=figure.angle_deg + 3.0) for figure in scene.figures)
        other = replace(scene, figures=figures, texture_seed=99)
        assert other != scene and other.key() == scene.key() and split_of(other) == split_of(scene)


def test_all_times_lie_on_the_grid_of_half_seconds_and_inside_the_scene():
    for scene in SCENES:
        assert 4.0 <= scene.duration_s <= 8.0 and on_grid(scene.duration_s)
        spans = [(item.start_s, item.end_s) for item in (*scene.actions, *scene.sounds)]
        assert all(on_grid(a) and on_grid(b) and 0.0 <= a < b <= scene.duration_s for a, b in spans)
        if scene.ambient:
            assert on_grid(scene.ambient.at_s) and 0.0 < scene.ambient.at_s < scene.duration_s


def test_only_the_first_stroke_of_a_sound_falls_on_the_start_of_an_action():
    for scene in SCENES:
        starts = {action.start_s for action in scene.actions}
        for sound in scene.sounds:
            assert starts.isdisjoint(sound.start_s + 0.5 * stroke for stroke in range(1, sound.count))


def test_actions_have_their_lengths_and_no_two_start_together():
    for scene in SCENES:
        starts = [action.start_s for action in scene.actions]
        assert starts and len(set(starts)) == len(starts) and starts == sorted(starts)
        assert all((a.end_s - a.start_s) / SLOT_S in VERB_SLOTS[a.verb] for a in scene.actions)


def test_a_figure_does_one_thing_at_a_time_and_nothing_twice():
    for scene in SCENES:
        for index in range(len(scene.figures)):
            own = [action for action in scene.actions if action.figure == index]
            assert all(one.end_s <= other.start_s for one, other in itertools.pairwise(own))
            assert len({(action.verb, action.argument) for action in own}) == len(own)


def test_figures_do_only_what_they_can():
    for scene in SCENES:
        for index, figure in enumerate(scene.figures):
            own = [action for action in scene.actions if action.figure == index]
            verbs = [action.verb for action in own]
            assert not (figure.shape == "circle" and "spins" in verbs), "a circle that spins looks still"
            assert "appears" not in verbs[1:], "what appears was not there"
            assert "disappears" not in verbs[:-1], "what is gone does nothing"
            assert verbs.count("turns") <= 1
            size = figure.size
            for action in own:
                before, after = (state_at(scene, index, at_s) for at_s in (action.start_s, action.end_s))
                if action.verb == "moves":
                    assert math.dist((before.x, before.y), (after.x, after.y)) > 0.25
                if action.verb in ("grows", "shrinks"):
                    assert size == ("small" if action.verb == "grows" else "big")
                    size = "big" if action.verb == "grows" else "small"
                    assert after.scale == pytest.approx(RADIUS[size])


def test_no_two_figures_ever_have_the_same_name():
    for scene in SCENES:
        names = [figure.name for figure in scene.figures]
        names += [(a.argument, scene.figures[a.figure].shape) for a in scene.actions if a.verb == "turns"]
        assert len(set(names)) == len(names)


def test_sounds_neither_overlap_nor_touch():
    for scene in SCENES:
        assert len({sound.kind for sound in scene.sounds}) == len(scene.sounds)
        assert all(one.end_s < other.start_s for one, other in itertools.pairwise(scene.sounds))


def test_a_sound_starts_with_an_action_or_a_second_from_any():
    apart = [min(abs(a.start_s - sound.start_s) for a in scene.actions) for scene in SCENES for sound in scene.sounds]
    assert all(gap_s == 0.0 or gap_s >= 1.0 for gap_s in apart)
    assert 0.2 < sum(gap_s == 0.0 for gap_s in apart) / len(apart) < 0.8


def test_figures_do_not_overlap_and_their_centres_stay_in_the_picture():
    for scene in SCENES:
        for step in range(round(scene.duration_s * 4)):
            states = [state_at(scene, index, step / 4) for index in range(len(scene.figures))]
            assert all(0.0 < state.x < 1.0 and 0.0 < state.y < 1.0 for state in states)
            for one, other in itertools.combinations(states, 2):
                assert math.dist((one.x, one.y), (other.x, other.y)) >= 0.9 * (one.scale + other.scale) - 1e-9


def test_all_that_there_is_occurs():
    figures = [figure for scene in SCENES for figure in scene.figures]
    assert {figure.colour for figure in figures} == set(COLOURS) and {f.shape for f in figures} == set(SHAPES)
    assert {figure.place for figure in figures} == set(PLACES)
    assert {action.verb for scene in SCENES for action in scene.actions} == set(VERBS)
    assert {sound.kind for scene in SCENES for sound in scene.sounds} == set(SOUNDS)
    assert {scene.ambient and scene.ambient.value for scene in SCENES} >= {None, "out", "on", "white", "black"}
    assert {len(scene.sounds) for scene in SCENES} >= {0, 1, 2, 3} and {len(s.figures) for s in SCENES} == {1, 2, 3}


def test_places_are_cells():
    for place in PLACES:
        column, row = place_to_cell(place)
        assert place_of(CELL_CENTRES[column], CELL_CENTRES[row]) == place
    assert place_to_cell("top right") == (2, 0) and place_to_cell("bottom") == (1, 2)


def one_figure(*actions: Action, ambient: Ambient | None = None) -> Scene:
    return Scene(6.0, "grey", (Figure("red", "star", "small", "middle", 10.0),), actions, (), ambient)


@pytest.mark.parametrize(
    ("verb", "argument", "name", "at_s", "value"),
    [
        ("moves", "left", "x", 2.0, 0.35),
        ("moves", "left", "x", 3.0, 0.2),
        ("moves", "down", "y", 9.0, 0.8),
        ("jumps", "", "y", 1.5, 0.37),
        ("jumps", "", "y", 2.0, 0.5),
        ("shakes", "", "x", 1.25, 0.59),
        ("shakes", "", "x", 1.75, 0.41),
        ("spins", "", "angle_deg", 2.0, 160.0),
        ("blinks", "", "opacity", 1.25, 1.0),
        ("blinks", "", "opacity", 1.75, 0.0),
        ("blinks", "", "opacity", 3.0, 1.0),
        ("grows", "", "scale", 2.0, 0.18),
        ("grows", "", "scale", 5.0, 0.22),
        ("turns", "blue", "blend", 2.0, 0.5),
        ("turns", "blue", "colour", 3.0, "blue"),
        ("appears", "", "opacity", 0.5, 0.0),
        ("appears", "", "opacity", 2.0, 0.5),
        ("disappears", "", "opacity", 0.5, 1.0),
        ("disappears", "", "opacity", 3.5, 0.0),
    ],
)
def test_an_action_from_1_to_3_s_looks_like_this(verb, argument, name, at_s, value):
    found = getattr(state_at(one_figure(Action(0, verb, argument, 1.0, 3.0)), 0, at_s), name)
    assert found == (value if isinstance(value, str) else pytest.approx(value))


def test_a_figure_that_does_nothing_stays_as_it_is():
    scene = one_figure(Action(0, "jumps", "", 1.0, 2.0))
    assert {state_at(scene, 0, at_s) for at_s in (0.0, 0.9, 1.0, 2.0, 5.9)} == {state_at(scene, 0, 0.0)}


def test_the_picture_changes_as_a_whole_from_its_moment_on():
    changed = one_figure(ambient=Ambient("background", "brown", 2.0))
    assert [background_at(changed, at_s) for at_s in (0.0, 1.9, 2.0, 5.0)] == ["grey", "grey", "brown", "brown"]
    out, on = (one_figure(ambient=Ambient("light", value, 2.0)) for value in ("out", "on"))
    assert [is_dark(out, at_s) for at_s in (0.0, 1.9, 2.0, 5.0)] == [False, False, True, True]
    assert [is_dark(on, at_s) for at_s in (0.0, 1.9, 2.0, 5.0)] == [True, True, False, False]
    assert not is_dark(changed, 3.0) and background_at(out, 3.0) == "grey"
