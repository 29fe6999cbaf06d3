"""A scene's pictures. Axes: T frames, H and W pixels, 3 colours (RGB)."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from kokanee.world.scene import DARKNESS, FigureState, Scene, background_at, is_dark, state_at

RGB = {
    "red": (222, 32, 32),
    "orange": (250, 140, 20),
    "yellow": (246, 222, 40),
    "green": (30, 160, 60),
    "cyan": (50, 205, 220),
    "blue": (36, 70, 220),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
}
BACKGROUND_RGB = {"white": (236, 236, 236), "grey": (140, 140, 140), "black": (22, 22, 22), "brown": (100, 66, 40)}
SUPERSAMPLING = 2
FADE_S = 0.25


def frames(scene: Scene, times_s: np.ndarray, size_px: int) -> np.ndarray:
    """The pictures at the given moments: uint8 (T, size_px, size_px, 3). Equal input gives equal bytes."""
    rng = np.random.default_rng(scene.texture_seed)
    tint = rng.uniform(-10.0, 10.0, 3)
    grain_HWC = _grain(rng, size_px)
    pictures_THWC = np.stack([_draw_frame(scene, float(time_s), size_px, tint) for time_s in times_s])
    noisy_THWC = pictures_THWC.astype(np.int16) + grain_HWC
    return np.clip(noisy_THWC, 0, 255).astype(np.uint8)


def _grain(rng: np.random.Generator, size_px: int) -> np.ndarray:
    """A still pattern of soft blotches, the same for every frame of a clip: int16 (H, W, 1), about +-6 grey levels."""
    coarse = Image.fromarray(rng.uniform(-6.0, 6.0, (8, 8)).astype(np.float32))
    return np.asarray(coarse.resize((size_px, size_px), Image.Resampling.BILINEAR)).astype(np.int16)[:, :, None]


def _draw_frame(scene: Scene, time_s: float, size_px: int, tint: np.ndarray) -> np.ndarray:
    side = size_px * SUPERSAMPLING
    light = _light(scene, time_s)
    ground = _shade(BACKGROUND_RGB[background_at(scene, time_s)], tint, light)
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for index, figure in enumerate(scene.figures):
        state = state_at(scene, index, time_s)
        if state.opacity > 0.02:
            paint = _mix(RGB[state.colour], RGB[state.next_colour], state.blend)
            _draw_figure(draw, figure.shape, state, side, _mix(ground, _shade(paint, tint, light), state.opacity))
    return np.asarray(image.reduce(SUPERSAMPLING))


def _light(scene: Scene, time_s: float) -> float:
    """1.0 in the light, DARKNESS in the dark, in between within FADE_S after a change."""
    now = DARKNESS if is_dark(scene, time_s) else 1.0
    if scene.ambient is None or scene.ambient.kind != "light":
        return now
    since_s = time_s - scene.ambient.at_s
    if not 0.0 <= since_s < FADE_S:
        return now
    before = 1.0 + DARKNESS - now
    return before + (now - before) * since_s / FADE_S


def _shade(rgb: tuple[int, ...], tint: np.ndarray, light: float) -> tuple[int, ...]:
    return tuple(int(min(max((value + shift) * light, 0), 255)) for value, shift in zip(rgb, tint, strict=True))


def _mix(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _draw_figure(draw: ImageDraw.ImageDraw, shape: str, state: FigureState, side: int, paint: tuple[int, ...]) -> None:
    x, y, radius = state.x * side, state.y * side, state.scale * side
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paint)
        return
    turn = math.radians(state.angle_deg)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    draw.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in OUTLINES[shape]], fill=paint)


def _regular(corners: int, inner: float | None = None) -> list[tuple[float, float]]:
    """A regular polygon of radius 1, a point upwards; with `inner` a star with that inner radius."""
    radii = [1.0] if inner is None else [1.0, inner]
    steps = corners * len(radii)
    angles = [2 * math.pi * k / steps - math.pi / 2 for k in range(steps)]
    return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


def _cross(arm: float = 0.36) -> list[tuple[float, float]]:
    corner = [(arm, arm), (arm, 1.0), (-arm, 1.0)]
    points = []
    for k in range(4):
        cos, sin = (1, 0, -1, 0)[k], (0, 1, 0, -1)[k]
        points += [(u * cos - v * sin, u * sin + v * cos) for u, v in corner]
    return points


OUTLINES = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": _regular(3),
    "star": _regular(5, inner=0.42),
    "heart": _heart(),
    "cross": _cross(),
}
