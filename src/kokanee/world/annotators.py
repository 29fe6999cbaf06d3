"""Annotators: people who tell most of what they see, about half of what they hear, and now and then something wrong.

What they leave out depends on how much it stands out, and whole captions are more or less careful. Both matter:
omissions that are independent coin flips average out in training, those that people share are learnt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

from kokanee.errors import KokaneeError
from kokanee.world.facts import Event, Fact, exact, facts_of, prune, sync_action
from kokanee.world.scene import BACKGROUNDS, COLOURS, DIRECTIONS, PITCHES, PLACES, SIZES, SOUNDS, Scene


@dataclass(frozen=True)
class Bias:
    """How annotators fall short. Every field but the last two is a probability, for something of middling salience.

    unheard: a caption is written with the sound off, so that it tells no sound at all.
    sound, action, figure, ambient: a sound (with the sound on), an action, a figure with all that it does, or a
        change of background or light is passed over.
    background, size, place, pitch, count, sync: this detail of something told is left out.
    swapped: an attribute that is told (colour, size, place, direction, pitch, count, background) is told wrong.
    invented: a caption tells one thing that never happened.
    salience: how strongly omissions follow salience, as a factor on the shifts in log-odds listed in `_shift`;
        0 makes them independent of it.
    care: standard deviation, in log-odds, of how careful a whole caption is.
    """

    unheard: float = 0.2
    sound: float = 0.35
    action: float = 0.08
    figure: float = 0.02
    ambient: float = 0.12
    background: float = 0.18
    size: float = 0.2
    place: float = 0.17
    pitch: float = 0.4
    count: float = 0.3
    sync: float = 0.3
    swapped: float = 0.08
    invented: float = 0.03
    salience: float = 1.0
    care: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value, top = getattr(self, field.name), math.inf if field.name in ("salience", "care") else 1.0
            if not 0.0 <= value <= top:
                raise KokaneeError(f"Bias.{field.name} is {value}, outside 0 to {top}. Give a value inside.")


def annotate(scene: Scene | Sequence[Event], bias: Bias, rng: random.Random) -> tuple[Fact, ...]:
    """What one annotator tells of a scene, or of the events of a stretch of it: closed, in time order."""
    events = exact(scene) if isinstance(scene, Scene) else tuple(scene)
    care = rng.gauss(0.0, bias.care)
    unheard = rng.random() < bias.unheard
    told = []
    for event in events:
        if unheard and event.sense != "seen":
            continue
        share = getattr(bias, "ambient" if event.fact.kind in ("background change", "light") else event.fact.kind)
        if not _happens(rng, share, bias.salience * _shift(event, events) + care):
            told.append(event.fact)
    facts = _swap(prune(told), facts_of(events), bias.swapped, rng)
    return _invent(facts, facts_of(events), rng) if rng.random() < bias.invented else facts


def _happens(rng: random.Random, share: float, shift: float) -> bool:
    """A coin with probability `share`, shifted in log-odds."""
    if share in (0.0, 1.0):
        return share == 1.0
    return rng.random() < 1.0 / (1.0 + (1.0 - share) / share * math.exp(-shift))


def _shift(event: Event, events: Sequence[Event]) -> float:
    """How much more easily than others of its kind a thing is passed over, in log-odds."""
    fact = event.fact
    about = [other.fact for other in events if other.fact.subject == fact.subject and fact.subject]
    small = any(other.kind == "size" and other.value == "small" for other in about)
    acts = sum(other.kind == "action" for other in about)
    if fact.kind == "action":
        large = fact.value.startswith("moves") or fact.value in ("appears", "disappears")
        return (0.5 if small else -0.5) - (1.0 if large else 0.0) + 0.8 * (1.5 - (event.end_s - event.start_s))
    if fact.kind == "figure":
        return (1.0 if small else -1.0) + (1.5 if not acts else -0.5 * acts)
    if fact.kind in ("sound", "pitch", "count"):
        strokes = next((int(other.value) for other in about if other.kind == "count"), 1)
        synced = any(other.kind == "sync" for other in about)
        return 1.2 * (2 - strokes) - (0.6 if synced and fact.kind == "sound" else 0.0)
    if fact.kind in ("size", "place"):
        return 0.3 * acts - (0.5 if fact.value in ("big", "middle") else 0.0)
    return 0.0


def _swap(facts: tuple[Fact, ...], truth: tuple[Fact, ...], share: float, rng: random.Random) -> tuple[Fact, ...]:
    """The facts with some attribute values replaced by wrong ones, each figure's colour wherever it is named."""
    for figure in [fact.subject for fact in facts if fact.kind == "figure"]:
        if rng.random() < share:
            names = {fact.subject for fact in (*facts, *truth) if fact.kind == "figure"}
            turned = {fact.value.split()[-1] for fact in facts if fact.kind == "action" and fact.subject == figure}
            free = [colour for colour in COLOURS if (colour, figure[1]) not in names and colour not in turned]
            facts = _rename(facts, figure, (rng.choice(free), figure[1]))
    swapped = list(facts)
    for at, fact in enumerate(swapped):
        others = _others(fact, swapped, truth)
        if others and rng.random() < share:
            swapped[at] = wrong = Fact(fact.kind, fact.subject, rng.choice(others))
            if fact.kind == "action":
                swapped = [_follow(other, fact, wrong) for other in swapped]
    return tuple(swapped)


def _others(fact: Fact, facts: Sequence[Fact], truth: Sequence[Fact]) -> list[str]:
    """The wrong values that a fact could be given; none where its value is no attribute."""
    if fact.kind == "action":
        verb = fact.value.split()[0]
        values = {"moves": DIRECTIONS, "turns": [c for c in COLOURS if c != fact.subject[0]]}.get(verb, ())
        said = {other.value for other in (*facts, *truth) if other.kind == "action" and other.subject == fact.subject}
        return [f"{verb} {value}" for value in values if f"{verb} {value}" not in said]
    if fact.kind == "background change":
        said = {other.value for other in facts if other.kind == "background"}
        return [value for value in BACKGROUNDS if value != fact.value and value not in said]
    values = {"background": BACKGROUNDS, "size": SIZES, "place": PLACES, "pitch": PITCHES, "count": ("1", "2", "3")}
    return [value for value in values.get(fact.kind, ()) if value != fact.value]


def _follow(fact: Fact, before: Fact, after: Fact) -> Fact:
    """A sync fact that follows its action from one value to another."""
    if fact.kind == "sync" and sync_action(fact) == before:
        return Fact("sync", fact.subject, f"{' '.join(after.subject)} {after.value}")
    return fact


def _rename(facts: tuple[Fact, ...], before: tuple[str, ...], after: tuple[str, ...]) -> tuple[Fact, ...]:
    """The facts with one figure called by another name, in its actions' simultaneities too."""
    renamed = []
    for fact in facts:
        if fact.subject == before:
            fact = Fact(fact.kind, after, fact.value)
        elif fact.kind == "sync" and sync_action(fact).subject == before:
            fact = Fact("sync", fact.subject, f"{' '.join(after)} {sync_action(fact).value}")
        renamed.append(fact)
    return tuple(renamed)


def _invent(facts: tuple[Fact, ...], truth: tuple[Fact, ...], rng: random.Random) -> tuple[Fact, ...]:
    """The facts and one thing that never happened: a sound, a figure's action, or the light going out."""
    figures = [fact for fact in facts if fact.kind == "figure"]
    choice = rng.choice(("sound", "action", "light") if figures else ("sound", "light"))
    if choice == "sound":
        there = {fact.subject for fact in truth if fact.kind == "sound"}
        subject = rng.choice([(kind,) for kind in SOUNDS if (kind,) not in there])
        details = [Fact("pitch", subject, rng.choice(PITCHES)), Fact("count", subject, rng.choice("123"))]
        added = (Fact("sound", subject, ""), *rng.sample(details, rng.randint(0, 2)))
    elif choice == "action":
        figure = rng.choice(figures)
        said = {fact.value for fact in (*truth, *facts) if fact.kind == "action"}
        free = [verb for verb in ("jumps", "shakes", "blinks", "disappears") if verb not in said]
        added = (Fact("action", figure.subject, rng.choice(free)),) if free else ()
    else:
        added = () if any(fact.kind == "light" for fact in truth) else (Fact("light", (), "out"),)
    first = max((at + 1 for at, fact in enumerate(facts) if fact.kind in ("figure", "background")), default=0)
    at = rng.randint(first, len(facts))
    return (*facts[:at], *added, *facts[at:])
