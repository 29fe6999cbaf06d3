"""Reading captions back: a sentence becomes a row of letters, one a phrase, and small patterns over letters read it.

The letters: a article, s size, c colour, f shape, p place, v action, k background colour, g "background",
i "is", n what sounds, r how it sounds, l pitch, t how often, d number, h "is heard", H "we hear", E "there is",
w "can be seen", z "turns" + background colour, L light, y "while", T "then", O "on a", & "and", N "nothing happens",
and the comma. Words that mean nothing here are "?", which no pattern matches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from kokanee.world import words
from kokanee.world.facts import Fact
from kokanee.world.scene import BACKGROUNDS, COLOURS, PITCHES, SHAPES


@dataclass(frozen=True)
class Parsed:
    """What a caption says: facts in order of mention, repetitions kept, and the sentences that say nothing readable."""

    facts: tuple[Fact, ...]
    unparsed: tuple[str, ...]


def parse(text: str) -> Parsed:
    """The facts that a caption states. Case, spaces and a missing last full stop do not matter.

    Naming a figure or a sound states that it is there, and a simultaneity states its sound and its action. A sentence
    is read as a whole or not at all. Every string can be parsed; one that says nothing has no facts.
    """
    facts: list[Fact] = []
    unparsed = []
    for piece in _SENTENCE_END.split(text.lower()):
        piece = " ".join(piece.split())
        if not piece:
            continue
        said = _read_sentence(piece) if len(piece) <= _LONGEST else None
        if said is None:
            unparsed.append(piece)
        else:
            facts.extend(said)
    return Parsed(tuple(facts), tuple(unparsed))


_SENTENCE_END = re.compile(r"[.!?;\n]+")
_WORD = re.compile(r"[^\s,]+|,")
_LONGEST = 500  # characters; no sentence that is written comes near, and longer ones would fill the cache


def _build_lexicon() -> dict[str, list[tuple[tuple[str, ...], str, str]]]:
    """First word -> (all words, letter, value) of the phrases that begin with it, the longest first."""
    entries: list[tuple[str, str, str]] = []
    entries += [(word, "a", "") for word in ("a", "an", "the", "another")]
    entries += [(word, "c", word) for word in COLOURS] + [(word, "f", word) for word in SHAPES]
    entries += [(word, "k", word) for word in BACKGROUNDS] + [("background", "g", ""), ("on a", "O", "")]
    entries += [(f"{change} {word}", "z", word) for change in words.CHANGES for word in BACKGROUNDS]
    entries += [(phrase, "p", value) for value, phrase in words.PLACE_PHRASES.items()]
    entries += [(word, "l", word) for word in PITCHES] + [("is", "i", ""), ("are", "i", "")]
    entries += [(word, "n", kind) for kind, phrase in words.SOURCES.items() for word in (phrase.split()[-1], kind)]
    entries += [(word, "r", kind) for kind, word in words.SOUND_VERBS.items()]
    entries += [(phrase, "t", value) for value, phrase in words.COUNT_PHRASES.items()]
    entries += [(word, "d", value) for value, word in words.NUMERALS.items()]
    for letter, table in (("s", words.SIZE_WORDS), ("v", words.ACTION_PHRASES), ("L", words.LIGHT_SENTENCES)):
        entries += [(phrase, letter, value) for value, phrases in table.items() for phrase in phrases]
    for letter, phrases in (
        ("E", words.EXISTS_WORDS),
        ("H", words.HEARD_BEFORE),
        ("h", words.HEARD_AFTER),
        ("w", words.VISIBLE_WORDS),
        ("y", words.SYNC_WORDS),
        ("T", words.THEN_WORDS),
        ("N", words.NOTHING),
        ("&", ("and",)),
        (",", (",",)),
    ):
        entries += [(phrase, letter, phrase) for phrase in phrases]
    lexicon: dict[str, list[tuple[tuple[str, ...], str, str]]] = {}
    for phrase, letter, value in entries:
        parts = tuple(phrase.split())
        lexicon.setdefault(parts[0], []).append((parts, letter, value))
    for choices in lexicon.values():
        choices.sort(key=lambda choice: -len(choice[0]))
    return lexicon


_LEXICON = _build_lexicon()


def _letters(piece: str) -> tuple[str, list[str]]:
    """The letters of a sentence and the values that stand behind them."""
    parts = _WORD.findall(piece)
    letters, values, at = [], [], 0
    while at < len(parts):
        for phrase, letter, value in _LEXICON.get(parts[at], ()):
            if len(phrase) == 1 or tuple(parts[at : at + len(phrase)]) == phrase:
                letters.append(letter)
                values.append(value)
                at += len(phrase)
                break
        else:
            return "?", []
    return "".join(letters), values


_NAMED = "as?cf"
_FIGURE = re.compile(f"{_NAMED}p?")
_PRESENCE = re.compile(
    f"(?:(?:p,?)?E{_NAMED}|E{_NAMED}p?(?:(?:,|,?&){_NAMED}p?)*|{_NAMED}(?:i?p|w|wp)(?:,?&{_NAMED}(?:i?p|w|wp))*|pi{_NAMED})"
)
_ACTS = re.compile(f"{_NAMED}p?vp?(?:(?:,|,?&)T?v)*(?:,?&T?{_NAMED}p?vp?)*")
_ACT = re.compile(f"{_NAMED}p?vp?")
_SOUND = re.compile("H?al?n[rh]?t?|nrt?|H?dl?rh?")


@lru_cache(maxsize=1 << 16)
def _read_sentence(piece: str) -> tuple[Fact, ...] | None:
    """The facts of one lower-case sentence, or None where it cannot be read."""
    letters, values = _letters(piece)
    if letters.startswith("T"):
        skip = 2 if letters[1:2] == "," else 1
        letters, values = letters[skip:], values[skip:]
    facts: list[Fact] = []
    if letters.startswith("Okg"):
        facts.append(Fact("background", (), values[1]))
        skip = 4 if letters[3:4] == "," else 3
        letters, values = letters[skip:], values[skip:]
    said = _read_rest(letters, values)
    return None if said is None else (*facts, *said)


def _read_rest(letters: str, values: list[str]) -> tuple[Fact, ...] | None:
    if letters in ("agik", "Eakg"):
        return (Fact("background", (), values[letters.index("k")]),)
    if letters == "agz":
        return (Fact("background change", (), values[2]),)
    if letters == "L":
        return (Fact("light", (), values[0]),)
    if letters == "N":
        return ()
    if letters == "acfis":
        return _figures(letters, values)
    if letters == "anil":
        return (Fact("sound", (values[1],), ""), Fact("pitch", (values[1],), values[3]))
    if "y" in letters:
        return _read_sync(letters, values)
    if _PRESENCE.fullmatch(letters):
        return _figures(letters, values)
    if _ACTS.fullmatch(letters):
        return _figures(letters, values)
    return _sound(letters, values)


def _read_sync(letters: str, values: list[str]) -> tuple[Fact, ...] | None:
    """ "As A, B" and "B as A", where one of A and B acts and the other sounds."""
    at = letters.index("y")
    if at == 0:
        at = letters.find(",")
        halves = (letters[1:at], values[1:at]), (letters[at + 1 :], values[at + 1 :])
    else:
        halves = (letters[:at], values[:at]), (letters[at + 1 :], values[at + 1 :])
    if at < 0:
        return None
    acting, sounding = halves if _ACT.fullmatch(halves[0][0]) else halves[::-1]
    if not _ACT.fullmatch(acting[0]):
        return None
    sound = _sound(*sounding)
    if sound is None:
        return None
    acts = _figures(*acting)
    action = next(fact for fact in acts if fact.kind == "action")
    return (*acts, *sound, Fact("sync", sound[0].subject, f"{' '.join(action.subject)} {action.value}"))


def _figures(letters: str, values: list[str]) -> tuple[Fact, ...]:
    """The facts of a row of figures, each with what is said before and after its name."""
    starts = [match.start() for match in _FIGURE.finditer(letters)]
    facts = []
    for start, end in zip(starts, [*starts[1:], len(letters)], strict=True):
        begin = 0 if start == starts[0] else start
        shape = letters.index("f", start)
        subject = (values[shape - 1], values[shape])
        facts.append(Fact("figure", subject, ""))
        for kind, letter in (("size", "s"), ("place", "p"), ("action", "v")):
            facts += [Fact(kind, subject, values[at]) for at in range(begin, end) if letters[at] == letter]
    return tuple(facts)


def _sound(letters: str, values: list[str]) -> tuple[Fact, ...] | None:
    """The facts of one sound, the sound itself first; None where its noun and its verb do not belong together."""
    if not _SOUND.fullmatch(letters):
        return None
    kinds = {value for letter, value in zip(letters, values, strict=True) if letter in "nr"}
    if len(kinds) != 1:
        return None
    subject = (kinds.pop(),)
    facts = [Fact("sound", subject, "")]
    for kind, group in (("pitch", "l"), ("count", "td")):
        facts += [Fact(kind, subject, value) for letter, value in zip(letters, values, strict=True) if letter in group]
    return tuple(facts)
