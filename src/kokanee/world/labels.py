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
    Scene,
    background_at,
    is_dark,
    state_at,
)

VISIBLE = 0.5


@dataclass(frozen=True)
class FrameLabels:
    """One picture on a grid of G = side * side cells, row by row. A figure belongs to the cell of its centre.

    `present_G` 0 or 1; `colour_G`, `shape_G` class indices, -1 where nothing is; `geometry_G7` the figure's place from
    the picture's centre (x, y) in cells, its radius over the frame, and the change of x, y, radius (per second) and
    opacity (per second) there; `spins_G` 0 or 1; `background` a class index; `dark` 0 or 1.
    """

    present_G: np.ndarray
    colour_G: np.ndarray
    shape_G: np.ndarray
    geometry_G7: np.ndarray
    spins_G: np.ndarray
    background: int
    dark: int


def frame_labels(scene: Scene, time_s: float, side: int, step_s: float = 0.25) -> FrameLabels:
    """Labels of the picture at `time_s`; changes are measured to `time_s + step_s`."""
    cells = side * side
    present, spins = np.zeros(cells, np.float32), np.zeros(cells, np.float32)
    colour, shape = np.full(cells, -1), np.full(cells, -1)
    geometry = np.zeros((cells, 7), np.float32)
    nearest = np.full(cells, np.inf)
    for index, figure in enumerate(scene.figures):
        now, later = state_at(scene, index, time_s), state_at(scene, index, time_s + step_s)
        if now.opacity < VISIBLE:
            continue
        column, row = (min(max(int(v * side), 0), side - 1) for v in (now.x, now.y))
        cell = row * side + column
        dx, dy = now.x * side - column - 0.5, now.y * side - row - 0.5
        if dx * dx + dy * dy >= nearest[cell]:
            continue
        nearest[cell] = dx * dx + dy * dy
        present[cell] = 1.0
        colour[cell] = COLOURS.index(now.colour if now.blend < 0.5 else now.next_colour)
        shape[cell] = SHAPES.index(figure.shape)
        spins[cell] = now.angle_deg != later.angle_deg
        rates = [getattr(later, name) - getattr(now, name) for name in ("x", "y", "scale", "opacity")]
        from_centre = ((now.x - 0.5) * side, (now.y - 0.5) * side)
        geometry[cell] = [*from_centre, now.scale, *(rate / step_s for rate in rates)]
    background = BACKGROUNDS.index(background_at(scene, time_s))
    return FrameLabels(present, colour, shape, geometry, spins, background, int(is_dark(scene, time_s)))


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
