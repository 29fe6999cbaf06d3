"""Labels for encoder pretraining: what a frame shows cell by cell, and what a half second sounds like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kokanee.world.scene import (
    BACKGROUNDS,
    COLOURS,
    PITCHES,
    SHAPES,
    SLOT_S,
    SOUNDS,
    VERBS,
    Scene,
    background_at,
    is_dark,
    state_at,
)

VISIBLE = 0.5
DOINGS = ("rests", *VERBS)


@dataclass(frozen=True)
class FrameLabels:
    """One picture on a grid of G = side * side cells, row by row. A figure belongs to the cell of its centre.

    `present_G` 0 or 1; `colour_G`, `shape_G` class indices, -1 where nothing is; `geometry_G7` the figure's place from
    the picture's centre (x, y) in cells, its radius over the frame, and the change of x, y, radius (per second) and
    opacity (per second) there; `does_G` what it is seen to do, an index into DOINGS, -1 where nothing is; `background`
    a class index; `dark` 0 or 1. A figure that is only just appearing has no label but `does_G`.
    """

    present_G: np.ndarray
    colour_G: np.ndarray
    shape_G: np.ndarray
    geometry_G7: np.ndarray
    does_G: np.ndarray
    background: int
    dark: int


def frame_labels(scene: Scene, time_s: float, side: int, step_s: float = 0.25) -> FrameLabels:
    """Labels of the picture at `time_s`; changes are measured to `time_s + step_s`."""
    cells = side * side
    present = np.zeros(cells, np.float32)
    colour, shape, does = (np.full(cells, -1) for _ in range(3))
    geometry = np.zeros((cells, 7), np.float32)
    nearest = np.full(cells, np.inf)
    for index, figure in enumerate(scene.figures):
        now, later = state_at(scene, index, time_s), state_at(scene, index, time_s + step_s)
        if max(now.opacity, later.opacity) < VISIBLE:
            continue
        column, row = (min(max(int(v * side), 0), side - 1) for v in (now.x, now.y))
        cell = row * side + column
        dx, dy = now.x * side - column - 0.5, now.y * side - row - 0.5
        if now.opacity < VISIBLE:
            does[cell] = doing(scene, index, time_s, time_s + step_s) if does[cell] < 0 else does[cell]
            continue
        if dx * dx + dy * dy >= nearest[cell]:
            continue
        nearest[cell] = dx * dx + dy * dy
        present[cell] = 1.0
        colour[cell] = COLOURS.index(now.colour if now.blend < 0.5 else now.next_colour)
        shape[cell] = SHAPES.index(figure.shape)
        does[cell] = doing(scene, index, time_s, time_s + step_s)
        rates = [getattr(later, name) - getattr(now, name) for name in ("x", "y", "scale", "opacity")]
        from_centre = ((now.x - 0.5) * side, (now.y - 0.5) * side)
        geometry[cell] = [*from_centre, now.scale, *(rate / step_s for rate in rates)]
    background = BACKGROUNDS.index(background_at(scene, time_s))
    return FrameLabels(present, colour, shape, geometry, does, background, int(is_dark(scene, time_s)))


def doing(scene: Scene, figure_index: int, from_s: float, to_s: float) -> int:
    """What two pictures of a figure show it do, an index into DOINGS: it rests where both are the same."""
    if state_at(scene, figure_index, from_s) == state_at(scene, figure_index, to_s):
        return 0
    acts = [action for action in scene.actions if action.figure == figure_index]
    longest = max(acts, key=lambda action: min(to_s, action.end_s) - max(from_s, action.start_s))
    return DOINGS.index(longest.verb)


def window_labels(scene: Scene, windows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each window of half a second holds: (kind_W, pitch_W, onset_W).

    Kinds are indices into SOUNDS, silence is len(SOUNDS); the pitch of silence is -1; onset is 1 where a sound begins.
    """
    kind, pitch, onset = np.full(windows, len(SOUNDS)), np.full(windows, -1), np.zeros(windows, np.float32)
    for sound in scene.sounds:
        first = round(sound.start_s / SLOT_S)
        last = min(first + sound.count, windows)
        kind[first:last] = SOUNDS.index(sound.kind)
        pitch[first:last] = PITCHES.index(sound.pitch)
        onset[first : first + 1] = 1.0
    return kind, pitch, onset
