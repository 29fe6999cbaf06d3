"""Scenes of the synthetic world: what is there, what it does and what is heard, on a grid of half seconds.

Coordinates are fractions of the frame (x to the right, y down), times are seconds from the scene's start.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("small", "big")
BACKGROUNDS = ("white", "grey", "black", "brown")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
SOUNDS = ("bell", "drum", "whistle", "buzzer", "chirp", "horn", "knock", "hiss")
PITCHES = ("low", "high")
DIRECTIONS = ("left", "right", "up", "down")
SPLITS = ("train", "validation", "test")

VERSION = 2
SLOT_S = 0.5
SPIN_DEG_PER_S = 150.0
RADIUS = {"small": 0.14, "big": 0.22}
CELL_CENTRES = (0.2, 0.5, 0.8)
DARKNESS = 0.35
VERB_SLOTS = {
    "moves": (2, 3),
    "jumps": (2, 3, 4),
    "shakes": (2, 3, 4),
    "spins": (2, 3, 4),
    "blinks": (3, 4),
    "grows": (2,),
    "shrinks": (2,),
    "turns": (1,),
    "appears": (1,),
    "disappears": (1,),
}
VERBS = tuple(VERB_SLOTS)
SHARE_OF_SPLIT = {"test": (0,), "validation": (1,), "train": tuple(range(2, 16))}

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Action:
    """One thing a figure does. `verb` is one of `VERBS`; `argument` is a direction, a colour, or empty."""

    figure: int
    verb: str
    argument: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Figure:
    """A figure as it is at first: the colour it is named by, and where and how large it is at the start."""

    colour: str
    shape: str
    size: str
    place: str
    angle_deg: float

    @property
    def name(self) -> tuple[str, str]:
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Sound:
    """`count` strokes of one kind of sound, one a slot, the first at `start_s`."""

    kind: str
    pitch: str
    count: int
    start_s: float

    @property
    def end_s(self) -> float:
        return self.start_s + SLOT_S * self.count


@dataclass(frozen=True)
class Ambient:
    """A change of the whole picture: `kind` is "background" (to `value`) or "light" ("out" or "on")."""

    kind: str
    value: str
    at_s: float


@dataclass(frozen=True)
class FigureState:
    """A figure at one moment; `scale` is its radius, `opacity` 0 to 1, `blend` how far `colour` is `next_colour`."""

    x: float
    y: float
    scale: float
    angle_deg: float
    colour: str
    next_colour: str
    blend: float
    opacity: float


@dataclass(frozen=True)
class Scene:
    """Everything about a clip. Two scenes are equal exactly when their clips are."""

    duration_s: float
    background: str
    figures: tuple[Figure, ...]
    actions: tuple[Action, ...]
    sounds: tuple[Sound, ...]
    ambient: Ambient | None
    texture_seed: int = field(default=0)

    def key(self) -> str:
        """What the scene says, without its pixels' noise and the figures' tilt: equal keys have equal ground truth."""
        figures = [(figure.name, figure.size, figure.place) for figure in self.figures]
        return repr((self.duration_s, self.background, figures, self.actions, self.sounds, self.ambient))


def split_of(scene: Scene) -> Split:
    """The one split to which a scene can belong: a hash of what it says decides, so splits never share a scene."""
    bucket = hashlib.sha256(scene.key().encode()).digest()[0] % 16
    return next(split for split in SPLITS if bucket in SHARE_OF_SPLIT[split])


@lru_cache(maxsize=1 << 14)
def sample_scene(split: Split, index: int, seed: int = 0) -> Scene:
    """Scene `index` of a split. The same arguments give the same scene on every machine."""
    rng = random.Random(f"kokanee-world-{VERSION}/{seed}/{split}/{index}")
    while True:
        scene = _draw(rng)
        if scene.actions and split_of(scene) == split and not _overlaps(scene):
            return scene


def state_at(scene: Scene, figure_index: int, time_s: float) -> FigureState:
    """Where a figure is and what it looks like at one moment."""
    figure = scene.figures[figure_index]
    column, row = place_to_cell(figure.place)
    x, y, scale = CELL_CENTRES[column], CELL_CENTRES[row], RADIUS[figure.size]
    angle, colour, next_colour, blend, opacity = figure.angle_deg, figure.colour, figure.colour, 0.0, 1.0
    for action in scene.actions:
        if action.figure != figure_index:
            continue
        length_s = action.end_s - action.start_s
        done_s = min(max(time_s - action.start_s, 0.0), length_s)
        share, running = done_s / length_s, 0.0 < done_s < length_s
        if action.verb == "moves":
            target_x, target_y = _edge(x, y, action.argument)
            x, y = x + share * (target_x - x), y + share * (target_y - y)
        elif action.verb == "jumps" and running:
            y -= 0.13 * _triangle(done_s)
        elif action.verb == "shakes" and running:
            x += 0.09 * (_triangle(done_s * 2) if done_s % 1.0 < 0.5 else -_triangle(done_s * 2))
        elif action.verb == "spins":
            angle += SPIN_DEG_PER_S * done_s
        elif action.verb == "blinks" and running and done_s % 1.0 >= 0.5:
            opacity = 0.0
        elif action.verb in ("grows", "shrinks"):
            scale += share * (RADIUS["big" if action.verb == "grows" else "small"] - scale)
        elif action.verb == "turns":
            next_colour, blend = action.argument, share
            if share == 1.0:
                colour, blend = next_colour, 0.0
        elif action.verb == "appears":
            opacity = share
        elif action.verb == "disappears":
            opacity *= 1.0 - share
    return FigureState(x, y, scale, angle, colour, next_colour, blend, opacity)


def background_at(scene: Scene, time_s: float) -> str:
    """The background's name at one moment."""
    change = scene.ambient
    return change.value if change and change.kind == "background" and time_s >= change.at_s else scene.background


def is_dark(scene: Scene, time_s: float) -> bool:
    """Whether the light is out at one moment."""
    change = scene.ambient
    return bool(change and change.kind == "light" and (change.value == "out") == (time_s >= change.at_s))


def place_to_cell(place: str) -> tuple[int, int]:
    """(column, row) of a place, each 0 to 2."""
    index = PLACES.index(place)
    return index % 3, index // 3


def place_of(x: float, y: float) -> str:
    """The place whose cell's centre is nearest."""
    column, row = (min(range(3), key=lambda k: abs(CELL_CENTRES[k] - v)) for v in (x, y))
    return PLACES[3 * row + column]


def _triangle(time_s: float) -> float:
    """0 to 1 and back within every second."""
    return 1.0 - abs(2.0 * (time_s % 1.0) - 1.0)


def _edge(x: float, y: float, direction: str) -> tuple[float, float]:
    near, far = CELL_CENTRES[0], CELL_CENTRES[2]
    return {"left": (near, y), "right": (far, y), "up": (x, near), "down": (x, far)}[direction]


def _draw(rng: random.Random) -> Scene:
    """Any scene; figures may overlap in it, and nothing may happen."""
    slots = rng.randint(8, 16)
    background = rng.choice(BACKGROUNDS)
    figures = _draw_figures(rng)
    actions = _draw_actions(rng, figures, slots)
    sounds = _draw_sounds(rng, actions, slots)
    ambient = _draw_ambient(rng, background, slots)
    return Scene(SLOT_S * slots, background, figures, actions, sounds, ambient, rng.getrandbits(32))


def _draw_figures(rng: random.Random) -> tuple[Figure, ...]:
    count = rng.choices((1, 2, 3), (35, 45, 20))[0]
    names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    places = rng.sample(PLACES, count)
    return tuple(
        Figure(colour, shape, rng.choice(SIZES), place, rng.uniform(-20.0, 20.0))
        for (colour, shape), place in zip(names, places, strict=True)
    )


def _draw_actions(rng: random.Random, figures: tuple[Figure, ...], slots: int) -> tuple[Action, ...]:
    """Actions one after another, now and then two at once, each possible in the state that those before it left."""
    wanted = rng.randint(1, min(4, slots // 3))
    cells = [place_to_cell(figure.place) for figure in figures]
    sizes = [figure.size for figure in figures]
    taken = {figure.name for figure in figures}
    gone, busy_until, actions = set(), [0] * len(figures), []
    slot = rng.randint(1, 3)
    while len(actions) < wanted and slot < slots:
        index = rng.choice([i for i in range(len(figures)) if i not in gone] or [0])
        if index in gone:
            break
        done = {(action.verb, action.argument) for action in actions if action.figure == index}
        verb, argument = _draw_verb(rng, figures[index], cells[index], sizes[index], taken, done)
        length = rng.choice(VERB_SLOTS[verb])
        start = max(slot, busy_until[index])
        if start + length > slots or any(a.start_s == start * SLOT_S for a in actions):
            slot += 1
            continue
        actions.append(Action(index, verb, argument, start * SLOT_S, (start + length) * SLOT_S))
        busy_until[index] = start + length
        if verb == "moves":
            cells[index] = place_to_cell(
                place_of(*_edge(CELL_CENTRES[cells[index][0]], CELL_CENTRES[cells[index][1]], argument))
            )
        elif verb in ("grows", "shrinks"):
            sizes[index] = "big" if verb == "grows" else "small"
        elif verb == "turns":
            taken.add((argument, figures[index].shape))
        elif verb == "disappears":
            gone.add(index)
        slot = start + (rng.randint(1, length) if rng.random() < 0.2 else length + rng.randint(0, 2))
    return tuple(sorted(actions, key=lambda action: action.start_s))


def _draw_verb(
    rng: random.Random,
    figure: Figure,
    cell: tuple[int, int],
    size: str,
    taken: set[tuple[str, str]],
    done: set[tuple[str, str]],
) -> tuple[str, str]:
    """A verb and its argument that the figure can do now and has not `done` before; `taken` are names in use."""
    column, row = cell
    possible = [("jumps", ""), ("shakes", ""), ("blinks", ""), ("disappears", "")]
    possible += [("spins", "")] if figure.shape != "circle" else []
    possible += [("grows", "") if size == "small" else ("shrinks", "")]
    possible += [("appears", "")] if not done else []
    moves = [("left", column > 0), ("right", column < 2), ("up", row > 0), ("down", row < 2)]
    possible += [("moves", direction) for direction, free in moves if free]
    if not any(verb == "turns" for verb, _ in done):
        colour = rng.choice([colour for colour in COLOURS if (colour, figure.shape) not in taken])
        possible.append(("turns", colour))
    weight = {"disappears": 0.4, "appears": 0.8}
    possible = [choice for choice in possible if choice not in done]
    return rng.choices(possible, [weight.get(verb, 1.0) for verb, _ in possible])[0]


def _draw_sounds(rng: random.Random, actions: tuple[Action, ...], slots: int) -> tuple[Sound, ...]:
    """Sounds that do not overlap: each starts with an action, or at least a second from the start of any. No later
    stroke falls on an action's start."""
    starts = {round(action.start_s / SLOT_S) for action in actions}
    sounds, used = [], [False] * slots
    for kind in rng.sample(SOUNDS, rng.choices((0, 1, 2, 3), (15, 40, 32, 13))[0]):
        count = rng.choices((1, 2, 3), (40, 35, 25))[0]
        together = rng.random() < 0.5
        fits = [
            slot
            for slot in range(slots - count + 1)
            if not any(used[max(slot - 1, 0) : slot + count + 1])
            and starts.isdisjoint(range(slot + 1, slot + count))
            and (slot in starts if together else all(abs(slot - start) >= 2 for start in starts))
        ]
        if fits:
            slot = rng.choice(fits)
            used[slot : slot + count] = [True] * count
            sounds.append(Sound(kind, rng.choice(PITCHES), count, slot * SLOT_S))
    return tuple(sorted(sounds, key=lambda sound: sound.start_s))


def _draw_ambient(rng: random.Random, background: str, slots: int) -> Ambient | None:
    kind = rng.choices((None, "background", "out", "on"), (70, 16, 7, 7))[0]
    if kind is None:
        return None
    at_s = SLOT_S * rng.randint(2, slots - 2)
    if kind == "background":
        return Ambient("background", rng.choice([name for name in BACKGROUNDS if name != background]), at_s)
    return Ambient("light", kind, at_s)


def _overlaps(scene: Scene) -> bool:
    """Whether two figures ever come closer than their radii allow, looked at four times a second."""
    for step in range(round(scene.duration_s * 4)):
        states = [state_at(scene, index, step / 4) for index in range(len(scene.figures))]
        for a, b in itertools.combinations(states, 2):
            if (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (0.9 * (a.scale + b.scale)) ** 2:
                return True
    return False
