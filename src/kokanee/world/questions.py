"""Questions about a scene that have one exact answer of one to four words, and the prompts that ask for a caption."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from kokanee.errors import KokaneeError
from kokanee.world import words
from kokanee.world.facts import action_value, exact, facts_of, names_in, sync_action
from kokanee.world.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PITCHES,
    PLACES,
    SHAPES,
    SIZES,
    SOUNDS,
    Action,
    Scene,
    Sound,
)

CAPTION_PROMPTS = {
    "both": (
        "Describe the video.",
        "Describe the video with its sounds.",
        "What happens in the video?",
        "What can be seen and heard in the video?",
        "Tell all that is seen and heard.",
    ),
    "seen": ("Describe only what can be seen.", "What can be seen in the video?", "Describe the picture only."),
    "heard": ("Describe only what can be heard.", "What sounds can be heard?", "Describe the sounds only."),
}
KINDS = (
    "colour",
    "shape",
    "count",
    "size",
    "place",
    "action",
    "direction",
    "sound",
    "sound count",
    "pitch",
    "sync",
    "background",
    "exists",
)
YES_NO = ("yes", "no")
NUMBERS = ("one", "two", "three")


@dataclass(frozen=True)
class Question:
    """A question, its only right answer, its kind (one of `KINDS`), and the answers that questions like it can have.

    `options` is empty where the answers cannot be listed.
    """

    text: str
    answer: str
    kind: str
    options: tuple[str, ...] = ()


def ask(
    scene: Scene, rng: random.Random, n: int = 1, start_s: float = 0.0, end_s: float | None = None
) -> list[Question]:
    """At most `n` different questions about a scene or an interval of it; fewer where it offers no more.

    A kind comes again only when every kind that the interval offers has come. Yes/no questions are drawn so that both
    answers are equally likely. Where something changes, "at first" stands for the interval's start. Nothing is asked
    about an action or a sound that the interval cuts, nor about the figure whose action it is.
    """
    if n < 0:
        raise KokaneeError(f"Cannot ask {n} questions. Give 0 or more.")
    view = _View(scene, start_s, scene.duration_s if end_s is None else end_s)
    asked: dict[str, Question] = {}
    offered = list(KINDS)
    while offered and len(asked) < n:
        for kind in rng.sample(offered, len(offered)):
            fresh = [question for question in _MAKERS[kind](view, rng) if question.text not in asked]
            if not fresh:
                offered.remove(kind)
            elif len(asked) < n:
                question = rng.choice(fresh)
                asked[question.text] = question
    return list(asked.values())


class _View:
    """An interval, sorted for asking. What the interval cuts is set apart, so that no answer is a matter of taste."""

    def __init__(self, scene: Scene, start_s: float, end_s: float) -> None:
        self.facts = facts_of(exact(scene, start_s, end_s))
        names = names_in(scene, start_s, end_s)
        cut = [a for a in scene.actions if _cut(a.start_s, a.end_s, start_s, end_s)]
        cut_figures = {names[a.figure] for a in cut if a.figure in names}
        self.everyone = list(names.values())
        self.figures = [name for name in names.values() if name not in cut_figures]
        self.countable = bool(names) and not any(a.verb in ("appears", "disappears") for a in cut)
        colours = [(a, colour) for a in cut for colour in (scene.figures[a.figure].colour, a.argument)]
        self.cut_names = [(colour, scene.figures[a.figure].shape) for a, colour in colours]
        self.cut_sounds = [(s.kind,) for s in scene.sounds if _cut(s.start_s, s.end_s, start_s, end_s)]
        self.all_sounds = [fact.subject for fact in self.facts if fact.kind == "sound"]
        self.sounds = [subject for subject in self.all_sounds if subject not in self.cut_sounds]
        syncs = [fact for fact in self.facts if fact.kind == "sync" and fact.subject in self.sounds]
        self.syncs = [fact for fact in syncs if sync_action(fact).subject in self.figures]
        whole = [a for a in scene.actions if names.get(a.figure) in self.figures and _within(a, start_s, end_s)]
        heard = [s for s in scene.sounds if (s.kind,) in self.sounds]
        self.apart = [
            (sound.kind, f"{' '.join(names[action.figure])} {action_value(action)}")
            for sound in heard
            for action in whole
            if not (sound.start_s < action.end_s and action.start_s < sound.end_s)
        ]

    def value(self, kind: str, subject: tuple[str, ...] = ()) -> str:
        """The value of a single-valued fact; "" where there is none."""
        return next((fact.value for fact in self.facts if (fact.kind, fact.subject) == (kind, subject)), "")

    def actions(self, figure: tuple[str, ...]) -> list[str]:
        return [fact.value for fact in self.facts if fact.kind == "action" and fact.subject == figure]

    def turned(self, figure: tuple[str, ...]) -> str:
        """The colour that a figure turns, or ""."""
        return next((value.split()[1] for value in self.actions(figure) if value.startswith("turns")), "")

    def at_first(self, figure: tuple[str, ...], *verbs: str) -> str:
        """Words that point at the start of the interval, if the figure does any of these in it; "" if not."""
        return " at first" if any(value.split()[0] in verbs for value in self.actions(figure)) else ""


def _cut(piece_start_s: float, piece_end_s: float, start_s: float, end_s: float) -> bool:
    """Whether an interval holds a part of a stretch of time, but not all of it."""
    overlaps = piece_start_s < end_s and piece_end_s > start_s
    return overlaps and not (start_s <= piece_start_s and piece_end_s <= end_s)


def _within(piece: Action | Sound, start_s: float, end_s: float) -> bool:
    return start_s <= piece.start_s and piece.end_s <= end_s


def _colour(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    for colour, shape in view.figures:
        if [other for _, other in view.everyone].count(shape) != 1:
            continue
        first = view.at_first((colour, shape), "turns")
        text = rng.choice((f"What colour is the {shape}{first}?", f"Which colour does the {shape} have{first}?"))
        questions.append(Question(text, colour, "colour", COLOURS))
        if turned := view.turned((colour, shape)):
            questions.append(Question(f"What colour does the {shape} turn?", turned, "colour", COLOURS))
    return questions


def _shape(view: _View, rng: random.Random) -> list[Question]:
    colours = [colour for figure in view.everyone for colour in (figure[0], view.turned(figure))]
    return [
        Question(rng.choice((f"What is {colour}?", f"What shape is the {colour} figure?")), shape, "shape", SHAPES)
        for colour, shape in view.figures
        if colours.count(colour) == 1
    ]


def _count(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    if view.countable:
        text = rng.choice(("How many figures are there?", "How many figures can be seen?"))
        questions.append(Question(text, NUMBERS[len(view.everyone) - 1], "count", NUMBERS))
    if view.sounds and not view.cut_sounds:
        text = rng.choice(("How many different sounds are there?", "How many different sounds can be heard?"))
        questions.append(Question(text, NUMBERS[len(view.sounds) - 1], "count", NUMBERS))
    return questions


def _size(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    for figure in view.figures:
        name, first = " ".join(figure), view.at_first(figure, "grows", "shrinks")
        text = rng.choice((f"Is the {name} small or big{first}?", f"What size is the {name}{first}?"))
        questions.append(Question(text, view.value("size", figure), "size", SIZES))
    return questions


def _place(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    for figure in view.figures:
        name, first = " ".join(figure), view.at_first(figure, "moves")
        text = rng.choice((f"Where is the {name}{first}?", f"In what place is the {name}{first}?"))
        questions.append(Question(text, view.value("place", figure), "place", PLACES))
    return questions


def _action(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    everyone = [value for figure in view.everyone for value in view.actions(figure)]
    for figure in view.figures:
        name, actions = " ".join(figure), view.actions(figure)
        if len(actions) == 1:
            questions.append(Question(f"What does the {name} do?", actions[0], "action", tuple(words.ACTION_PHRASES)))
        elif actions:
            for which, value in (("first", actions[0]), ("last", actions[-1])):
                text = f"What does the {name} do {which}?"
                questions.append(Question(text, value, "action", tuple(words.ACTION_PHRASES)))
        for value in actions:
            if everyone.count(value) == 1 and 1 < len(view.everyone) == len(view.figures):
                names = tuple(" ".join(other) for other in view.figures)
                questions.append(Question(f"What {value}?", name, "action", names))
    return questions


def _direction(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    for figure in view.figures:
        ways = [value.split()[1] for value in view.actions(figure) if value.startswith("moves")]
        if len(ways) == 1:
            name = " ".join(figure)
            text = rng.choice((f"Which way does the {name} move?", f"In which direction does the {name} move?"))
            questions.append(Question(text, ways[0], "direction", DIRECTIONS))
    return questions


def _sound(view: _View, rng: random.Random) -> list[Question]:
    kinds = [] if view.cut_sounds else [kind for (kind,) in view.sounds]
    if len(kinds) == 1:
        return [Question(rng.choice(("What sound is heard?", "What can be heard?")), kinds[0], "sound", SOUNDS)]
    if not kinds:
        return []
    return [
        Question("What sound is heard first?", kinds[0], "sound", SOUNDS),
        Question("What sound is heard last?", kinds[-1], "sound", SOUNDS),
    ]


def _sound_count(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    for subject in view.sounds:
        text = rng.choice(("How many times is the {} heard?", "How often is the {} heard?")).format(subject[0])
        answer = words.COUNT_PHRASES[view.value("count", subject)]
        questions.append(Question(text, answer, "sound count", tuple(words.COUNT_PHRASES.values())))
    return questions


def _pitch(view: _View, rng: random.Random) -> list[Question]:
    return [
        Question(
            rng.choice((f"Is the {kind} low or high?", f"What pitch does the {kind} have?")),
            view.value("pitch", (kind,)),
            "pitch",
            PITCHES,
        )
        for (kind,) in view.sounds
    ]


def _sync(view: _View, rng: random.Random) -> list[Question]:
    questions = []
    for fact in view.syncs:
        text = rng.choice((f"What sound is heard when the {fact.value}?", f"What sounds just as the {fact.value}?"))
        questions.append(Question(text, fact.subject[0], "sync", SOUNDS))
        text = f"What happens just as the {fact.subject[0]} sounds?"
        questions.append(Question(text, fact.value, "sync"))
    synced = [(fact.subject[0], fact.value) for fact in view.syncs]
    text = "Is the {} heard just as the {}?"
    yes, no = ([text.format(*pair) for pair in pairs] for pairs in (synced, view.apart))
    return questions + _balanced(yes, no, "sync", rng)


def _background(view: _View, rng: random.Random) -> list[Question]:
    change = view.value("background change")
    first = " at first" if change else ""
    text = rng.choice((f"What colour is the background{first}?", f"Which colour does the background have{first}?"))
    questions = [Question(text, view.value("background"), "background", BACKGROUNDS)]
    if change:
        questions.append(Question("What colour does the background turn?", change, "background", BACKGROUNDS))
    return questions


def _exists(view: _View, rng: random.Random) -> list[Question]:
    """One yes/no question about a figure, a sound or an action: what is asked about says nothing about the answer."""
    for topic in rng.sample((_figure_there, _sound_there, _action_done), 3):
        if questions := topic(view, rng):
            return questions
    return []


def _figure_there(view: _View, rng: random.Random) -> list[Question]:
    """Whether some figure is there; one that is not shares a colour or a shape with one that is."""
    seen = [name for figure in view.everyone for name in (figure, (view.turned(figure) or figure[0], figure[1]))]
    near = [(c, s) for c in COLOURS for s in SHAPES if any(c == colour or s == shape for colour, shape in seen)]
    absent = [name for name in near if name not in seen and name not in view.cut_names]
    text = rng.choice(("Is there {}?", "Can {} be seen?"))
    yes, no = ([text.format(words.with_article(" ".join(n))) for n in names] for names in (view.figures, absent))
    return _balanced(yes, no, "exists", rng)


def _sound_there(view: _View, rng: random.Random) -> list[Question]:
    near = (*view.all_sounds, *view.cut_sounds)
    text = rng.choice(("Is a {} heard?", "Can a {} be heard?"))
    yes = [text.format(kind) for (kind,) in view.sounds]
    return _balanced(yes, [text.format(kind) for kind in SOUNDS if (kind,) not in near], "exists", rng)


def _action_done(view: _View, rng: random.Random) -> list[Question]:
    """Whether some figure does something; what it does not do is done by another, where there is such a thing."""
    done = [(figure, value) for figure in view.figures for value in view.actions(figure)]
    other = [(figure, value) for figure in view.figures for _, value in done if (figure, value) not in done]
    if not other or rng.random() < 0.5:
        verbs = [value for value in words.ACTION_PHRASES if not value.startswith("turns")]
        other = [(figure, value) for figure in view.figures for value in verbs if (figure, value) not in done]
    text = "Is it true that the {} {}?"
    yes, no = ([text.format(" ".join(figure), value) for figure, value in pairs] for pairs in (done, other))
    return _balanced(yes, no, "exists", rng)


def _balanced(yes: list[str], no: list[str], kind: str, rng: random.Random) -> list[Question]:
    """One yes/no question, with an even chance of either answer; none where only one answer is possible."""
    if not yes or not no:
        return []
    answer = rng.random() < 0.5
    return [Question(rng.choice(yes if answer else no), YES_NO[0] if answer else YES_NO[1], kind, YES_NO)]


_MAKERS: dict[str, Callable[[_View, random.Random], list[Question]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "size": _size,
    "place": _place,
    "action": _action,
    "direction": _direction,
    "sound": _sound,
    "sound count": _sound_count,
    "pitch": _pitch,
    "sync": _sync,
    "background": _background,
    "exists": _exists,
}
