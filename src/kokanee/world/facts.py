"""Exact ground truth: a scene, or a stretch of one, as atomic facts with their times.

A fact is the smallest thing that a caption can get right or wrong. Facts lean on one another: a size needs its figure,
a pitch its sound, a simultaneity both its sound and its action. A set of facts that holds everything its members need
is *closed*; only closed sets can be said in sentences, and `close` and `prune` make closed sets of any others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kokanee.errors import KokaneeError
from kokanee.world.scene import SLOT_S, Action, Scene, Sound, background_at, place_of, state_at
from kokanee.world.words import COUNT_PHRASES, PLACE_PHRASES, SOUND_VERBS, SOURCES, sentence, with_article

KINDS = (
    "background",
    "figure",
    "size",
    "place",
    "action",
    "sound",
    "pitch",
    "count",
    "sync",
    "background change",
    "light",
)
Sense = Literal["seen", "heard", "both"]


@dataclass(frozen=True, order=True)
class Fact:
    """One atomic fact. `subject` is who it is about, `value` what is said of it:

    | kind | subject | value |
    |---|---|---|
    | background, background change | () | "grey" |
    | light | () | "out", "on" |
    | figure | ("red", "circle") | "" |
    | size, place | ("red", "circle") | "small", "top left" |
    | action | ("red", "circle") | "jumps", "moves left", "turns blue" |
    | sound | ("bell",) | "" |
    | pitch, count | ("bell",) | "high", "2" |
    | sync | ("bell",) | "red circle jumps": the sound starts when that action does |
    """

    kind: str
    subject: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class Event:
    """A fact with the stretch of the scene in which it holds, the sense that can tell it, and its plain statement."""

    fact: Fact
    start_s: float
    end_s: float
    sense: Sense
    text: str


def exact(scene: Scene, start_s: float = 0.0, end_s: float | None = None) -> tuple[Event, ...]:
    """All facts of a scene, or of the interval [start_s, end_s) of it, in time order.

    An interval's background, sizes and places are those at its start (or where the figure appears in it), and figures
    are named by their colour then. An action or a stroke of a sound belongs to the interval in which more than half
    of it lies; one cut exactly in half belongs to the earlier part. What has been half done by an interval's start
    counts as done. A simultaneity needs both starts inside. Raises KokaneeError for an empty interval.
    """
    end_s = scene.duration_s if end_s is None else end_s
    if not 0.0 <= start_s < end_s <= scene.duration_s:
        raise KokaneeError(
            f"The interval {start_s} to {end_s} s is not inside a scene of {scene.duration_s} s. "
            "Give 0 <= start_s < end_s <= the scene's duration."
        )
    events = [_event("background", (), background_at(scene, start_s), start_s, _background_end(scene, start_s, end_s))]
    names = names_in(scene, start_s, end_s)
    for index in names:
        events += _figure_events(scene, index, names[index], start_s, end_s)
    for sound in scene.sounds:
        events += _sound_events(scene, sound, names, start_s, end_s)
    change = scene.ambient
    if change is not None and start_s < change.at_s < end_s:
        kind = "background change" if change.kind == "background" else "light"
        events.append(_event(kind, (), change.value, change.at_s, change.at_s))
    return tuple(sorted(events, key=lambda event: event.start_s))


def names_in(scene: Scene, start_s: float, end_s: float) -> dict[int, tuple[str, str]]:
    """The figures seen in an interval, by index, with the names they go by in it."""
    names = {}
    for index, figure in enumerate(scene.figures):
        appears = next((a for a in scene.actions if a.figure == index and a.verb == "appears"), None)
        hidden = appears is not None and not _done(scene, index, "appears", start_s)
        if appears is not None and hidden and not _belongs(appears.start_s, appears.end_s, start_s, end_s):
            continue
        if _done(scene, index, "disappears", start_s):
            continue
        turned = _done(scene, index, "turns", start_s)
        names[index] = (turned.argument if turned else figure.colour, figure.shape)
    return names


def facts_of(events: Iterable[Event | Fact]) -> tuple[Fact, ...]:
    """The facts alone, in the same order."""
    return tuple(item.fact if isinstance(item, Event) else item for item in events)


def only(events: Iterable[Event], sense: Sense) -> tuple[Event, ...]:
    """What can be told by eyes alone ("seen"), by ears alone ("heard"), or by both (everything)."""
    return tuple(event for event in events if sense == "both" or event.sense == sense)


def sense_of_fact(fact: Fact) -> Sense:
    """The sense that it takes to tell a fact."""
    senses: dict[str, Sense] = {"sound": "heard", "pitch": "heard", "count": "heard", "sync": "both"}
    return senses.get(fact.kind, "seen")


def needs(fact: Fact) -> tuple[Fact, ...]:
    """The facts that a fact cannot be told without, those that lean on nothing first."""
    if fact.kind in ("size", "place", "action"):
        return (Fact("figure", fact.subject, ""),)
    if fact.kind in ("pitch", "count"):
        return (Fact("sound", fact.subject, ""),)
    if fact.kind == "sync":
        action = sync_action(fact)
        return (Fact("figure", action.subject, ""), action, Fact("sound", fact.subject, ""))
    return ()


def close(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """The facts and all that they need, each once, what is needed before what needs it."""
    return tuple(dict.fromkeys(needed for fact in facts for needed in (*needs(fact), fact)))


def prune(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """The facts without those whose needs are not among them."""
    facts = tuple(facts)
    there = set(facts)
    kept = tuple(fact for fact in facts if all(needed in there for needed in needs(fact)))
    return kept if len(kept) == len(facts) else prune(kept)


def sync_action(fact: Fact) -> Fact:
    """The action that a sync fact speaks of."""
    colour, shape, value = fact.value.split(" ", 2)
    return Fact("action", (colour, shape), value)


def statement(fact: Fact) -> str:
    """A fact as one plain sentence."""
    name = " ".join(fact.subject)
    if fact.kind == "background":
        return f"The background is {fact.value}."
    if fact.kind == "background change":
        return f"The background turns {fact.value}."
    if fact.kind == "light":
        return "The light goes out." if fact.value == "out" else "The light comes on."
    if fact.kind == "figure":
        return f"There is {with_article(name)}."
    if fact.kind == "size":
        return f"The {name} is {fact.value}."
    if fact.kind == "place":
        return f"The {name} is {PLACE_PHRASES[fact.value]}."
    if fact.kind == "action":
        return f"The {name} {fact.value}."
    if fact.kind == "pitch":
        return f"The {name} is {fact.value}."
    rings = f"{SOURCES[name]} {SOUND_VERBS[name]}"
    if fact.kind == "count":
        return sentence(f"{rings} {COUNT_PHRASES[fact.value]}")
    return sentence(rings if fact.kind == "sound" else f"{rings} as the {fact.value}")


def action_value(action: Action) -> str:
    """How a fact says what a figure does: the verb, with its direction or colour."""
    return f"{action.verb} {action.argument}".rstrip()


def _event(kind: str, subject: tuple[str, ...], value: str, start_s: float, end_s: float) -> Event:
    fact = Fact(kind, subject, value)
    return Event(fact, start_s, end_s, sense_of_fact(fact), statement(fact))


def _belongs(piece_start_s: float, piece_end_s: float, start_s: float, end_s: float) -> bool:
    """Whether a stretch of time belongs to an interval: more than half of it is inside, or exactly its first half."""
    inside_s = min(piece_end_s, end_s) - max(piece_start_s, start_s)
    half_s = (piece_end_s - piece_start_s) / 2
    return inside_s > half_s or (inside_s == half_s and piece_start_s >= start_s)


def _done(scene: Scene, index: int, verb: str, at_s: float) -> Action | None:
    """The figure's action of this verb that has been half done by a moment."""
    for action in scene.actions:
        if action.figure == index and action.verb == verb and (action.start_s + action.end_s) / 2 <= at_s:
            return action
    return None


def _figure_events(scene: Scene, index: int, name: tuple[str, str], start_s: float, end_s: float) -> list[Event]:
    figure = scene.figures[index]
    inside = [a for a in scene.actions if a.figure == index and _belongs(a.start_s, a.end_s, start_s, end_s)]
    seen_s = next((max(a.start_s, start_s) for a in inside if a.verb == "appears"), start_s)
    gone_s = next((min(a.end_s, end_s) for a in inside if a.verb == "disappears"), end_s)
    moved_s = next((a.start_s for a in inside if a.verb == "moves"), gone_s)
    sized_s = next((a.start_s for a in inside if a.verb in ("grows", "shrinks")), gone_s)
    size = figure.size
    for verb, after in (("grows", "big"), ("shrinks", "small")):
        done, other = _done(scene, index, verb, seen_s), _done(scene, index, _OPPOSITE[verb], seen_s)
        if done and (other is None or other.start_s < done.start_s):
            size = after
    state = state_at(scene, index, seen_s)
    events = [
        _event("figure", name, "", seen_s, gone_s),
        _event("size", name, size, seen_s, max(sized_s, seen_s)),
        _event("place", name, place_of(state.x, state.y), seen_s, max(moved_s, seen_s)),
    ]
    for action in inside:
        times = max(action.start_s, start_s), min(action.end_s, end_s)
        events.append(_event("action", name, action_value(action), *times))
    return events


_OPPOSITE = {"grows": "shrinks", "shrinks": "grows"}


def _sound_events(
    scene: Scene, sound: Sound, names: dict[int, tuple[str, str]], start_s: float, end_s: float
) -> list[Event]:
    strokes_s = [sound.start_s + SLOT_S * stroke for stroke in range(sound.count)]
    heard_s = [at_s for at_s in strokes_s if _belongs(at_s, at_s + SLOT_S, start_s, end_s)]
    if not heard_s:
        return []
    times = max(heard_s[0], start_s), min(heard_s[-1] + SLOT_S, end_s)
    subject = (sound.kind,)
    events = [
        _event("sound", subject, "", *times),
        _event("pitch", subject, sound.pitch, *times),
        _event("count", subject, str(len(heard_s)), *times),
    ]
    for action in scene.actions:
        together = action.start_s == sound.start_s >= start_s and heard_s[0] == sound.start_s
        if together and action.figure in names and _belongs(action.start_s, action.end_s, start_s, end_s):
            value = f"{' '.join(names[action.figure])} {action_value(action)}"
            events.append(_event("sync", subject, value, *times))
    return events


def _background_end(scene: Scene, start_s: float, end_s: float) -> float:
    change = scene.ambient
    changes = change is not None and change.kind == "background" and start_s < change.at_s < end_s
    return change.at_s if changes and change is not None else end_s
