"""Facts as sentences, in many wordings, and sentences as facts again: `write` and `parse` are each other's inverse.

A caption goes through its facts in their order: the background, the figures, then what happens and what is heard.
Facts that belong together share a sentence. What is not among the facts is simply not said, so the words of a caption
with gaps are as natural as those of a full one. `words.py` holds the vocabulary, `grammar.py` the reading.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from kokanee.errors import KokaneeError
from kokanee.world import words
from kokanee.world.facts import Event, Fact, facts_of, needs, sync_action
from kokanee.world.grammar import Parsed, parse

__all__ = ["Parsed", "parse", "write"]


def write(facts: Iterable[Event | Fact], rng: random.Random) -> str:
    """A caption that states exactly these facts: `set(parse(write(facts, rng)).facts) == set(facts)`.

    The wording is drawn from `rng`, with a lean towards one way of saying things in each caption. No facts give a
    sentence that says so. Raises KokaneeError for facts that are not closed (see `facts.close` and `facts.prune`) or
    that give a figure two sizes or places, or a sound two pitches or counts.
    """
    told = tuple(dict.fromkeys(facts_of(facts)))
    _check(told)
    return _Writer(told, rng).caption()


def _check(facts: tuple[Fact, ...]) -> None:
    there, slots = set(facts), set()
    for fact in facts:
        missing = [needed for needed in needs(fact) if needed not in there]
        if missing:
            raise KokaneeError(f"{fact} cannot be told without {missing[0]}. Use facts.close or facts.prune first.")
        if fact.kind in ("size", "place", "pitch", "count"):
            if (fact.kind, fact.subject) in slots:
                raise KokaneeError(f"{' '.join(fact.subject)} has more than one {fact.kind}. Keep one of them.")
            slots.add((fact.kind, fact.subject))


class _Writer:
    """One caption in the making: `left` holds the facts that are still to be said."""

    def __init__(self, facts: tuple[Fact, ...], rng: random.Random) -> None:
        self.rng = rng
        self.lean = rng.random()
        self.facts = facts
        self.left = dict.fromkeys(facts)
        self.named: set[tuple[str, ...]] = set()
        self.sentences: list[str] = []
        self.happened = False

    def caption(self) -> str:
        late = {fact.subject for fact in self.facts if fact.kind == "action" and self.chance(0.3)}
        late |= {fact.subject for fact in self.facts if fact.kind == "action" and fact.value == "appears"}
        for fact in self.facts:
            if fact not in self.left:
                continue
            if fact.kind == "background":
                self.background(fact, late)
            elif fact.kind == "figure" and fact.subject not in late:
                self.presence(late)
            elif fact.kind in ("action", "sound"):
                self.happening(fact)
            elif fact.kind == "sync":
                self.happens(self.together(fact))
            elif fact.kind in ("background change", "light"):
                self.take(fact)
                self.happens(self.ambient(fact))
        if not self.sentences:
            self.sentences.append(self.pick(words.NOTHING))
        return " ".join(words.sentence(text) for text in self.sentences)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, options: Sequence[str]) -> str:
        """One of several wordings, more often than not the one that this caption leans to."""
        return options[int(self.lean * len(options))] if self.chance(0.5) else self.rng.choice(options)

    def take(self, fact: Fact) -> Fact:
        self.left.pop(fact, None)
        return fact

    def value(self, kind: str, subject: tuple[str, ...]) -> str:
        """The value of a fact that is still to be said, which is taken; "" where there is none."""
        fact = next((fact for fact in self.left if fact.kind == kind and fact.subject == subject), None)
        return self.take(fact).value if fact else ""

    def happens(self, text: str) -> None:
        """Adds a sentence about something that happens, with a "then" now and then."""
        if self.happened and self.chance(0.3):
            word = self.pick(words.THEN_WORDS)
            text = f"{word} {text}" if word == "then" else f"{word}, {text}"
        self.happened = True
        self.sentences.append(text)

    def figure(self, subject: tuple[str, ...]) -> str:
        """A figure's name, with "a" and its size at the first mention, with "the" later."""
        name = " ".join(subject)
        size = self.value("size", subject)
        if size:
            name = f"{self.pick(words.SIZE_WORDS[size])} {name}"
        first = subject not in self.named
        self.named.add(subject)
        self.take(Fact("figure", subject, ""))
        return words.with_article(name) if first else f"the {name}"

    def place(self, subject: tuple[str, ...]) -> str:
        place = self.value("place", subject)
        return words.PLACE_PHRASES[place] if place else ""

    def background(self, fact: Fact, late: set[tuple[str, ...]]) -> None:
        self.take(fact)
        colour = fact.value
        waits = any(left.kind == "figure" and left.subject not in late for left in self.left)
        if waits and self.chance(0.25):
            self.presence(late, f"on a {colour} background, ")
        else:
            exists = self.pick(("there is", "we see", "the scene shows"))
            self.sentences.append(self.pick((f"the background is {colour}", f"{exists} a {colour} background")))

    def presence(self, late: set[tuple[str, ...]], before: str = "") -> None:
        """One sentence for the next figure, or for it and the one after."""
        waiting = [fact.subject for fact in self.left if fact.kind == "figure" and fact.subject not in late]
        subjects = waiting[: 2 if self.chance(0.35) else 1]
        told = [(self.figure(subject), self.place(subject)) for subject in subjects]
        exists = self.pick(("there is", "we see", "the scene shows"))
        if len(told) == 2:
            if all(place for _, place in told) and self.chance(0.5):
                text = " and ".join(f"{name} is {place}" for name, place in told)
            else:
                text = f"{exists} " + " and ".join(f"{name} {place}".rstrip() for name, place in told)
        else:
            name, place = told[0]
            options = (f"{exists} {name}", f"{name} {self.pick(words.VISIBLE_WORDS)}")
            if place:
                options = (f"{exists} {name} {place}", f"{name} is {place}", f"{place} is {name}")
                options += (f"{place}, {exists} {name}", f"{name} can be seen {place}")
                options = options[:3] if before else options
            text = self.pick(options[:1] if before and not place else options)
        self.sentences.append(before + text)

    def happening(self, fact: Fact) -> None:
        """An action or a sound, together with what happens at the same moment, or followed by what comes next."""
        for sync in self.left:
            if sync.kind == "sync" and (fact == sync_action(sync) or fact.subject == sync.subject):
                self.happens(self.together(sync))
                return
        self.take(fact)
        self.happens(self.sound(fact) if fact.kind == "sound" else self.acting(fact))

    def acting(self, fact: Fact) -> str:
        text = self.act(fact)
        following = next((left for left in self.left if left.kind in _HAPPENINGS), None)
        if following is None or following.kind != "action" or following.subject != fact.subject:
            return text
        alone = not any(left.kind == "sync" and sync_action(left) == following for left in self.left)
        if alone and self.chance(0.5):
            self.take(following)
            text += self.pick((" and then ", ", then ", " and ")) + self.pick(words.ACTION_PHRASES[following.value])
        return text

    def act(self, fact: Fact) -> str:
        """What a figure does, as a clause; its size and place are said here if they have not been said before."""
        self.take(fact)
        figure, place = self.figure(fact.subject), self.place(fact.subject)
        phrase = self.pick(words.ACTION_PHRASES[fact.value])
        parts = (figure, phrase, place) if fact.value == "appears" else (figure, place, phrase)
        return " ".join(part for part in parts if part)

    def sound(self, fact: Fact) -> str:
        """What is heard, as a clause, with its pitch and its number of strokes if they are to be said."""
        self.take(Fact("sound", fact.subject, ""))
        kind = fact.subject[0]
        pitch, count = self.value("pitch", fact.subject), self.value("count", fact.subject)
        often = words.COUNT_PHRASES[count] if count else ""
        noun = f"a {pitch} {kind}" if pitch else f"a {kind}"
        options = [f"{self.pick(words.HEARD_BEFORE)} {noun} {often}", f"{noun} {self.pick(_SINGULAR)} {often}"]
        if kind in words.PLURALS and count in ("2", "3"):
            things = f"{words.NUMERALS[count]} {pitch} {words.PLURALS[kind]}"
            options += [f"we hear {things}", f"{things} {self.pick(_PLURAL)}"]
        if words.SOURCES[kind] == f"a {kind}":
            options += [f"{noun} {words.SOUND_VERBS[kind]} {often}"] * 2
        elif not pitch:
            options += [f"{words.SOURCES[kind]} {words.SOUND_VERBS[kind]} {often}"] * 2
        return " ".join(self.pick(options).split())

    def together(self, sync: Fact) -> str:
        """A sound and an action that start at the same moment."""
        self.take(sync)
        act, sound = self.act(sync_action(sync)), self.sound(Fact("sound", sync.subject, ""))
        word = self.pick(words.SYNC_WORDS)
        return self.pick((f"{word} {act}, {sound}", f"{sound} {word} {act}", f"{act} {word} {sound}"))

    def ambient(self, fact: Fact) -> str:
        if fact.kind == "light":
            return self.pick(words.LIGHT_SENTENCES[fact.value])
        return f"the background {self.pick(words.CHANGES)} {fact.value}"


_SINGULAR = tuple(phrase for phrase in words.HEARD_AFTER if phrase not in ("are heard", "sound"))
_PLURAL = ("are heard", "sound")
_HAPPENINGS = ("action", "sound", "background change", "light")
