"""Where a caption says what a verdict accuses it of, so that people can see it: statements -> marked pieces of text.

A verdict names what is wrong in words of its own, rarely in those of the caption. The place is therefore an estimate:
the words themselves where the caption has them, otherwise the stretch within a sentence that shares most with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kokanee.events import Verdict

WORD = re.compile(r"[\w']+")
SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
LIGHT = frozenset(("a", "an", "the", "is", "are", "of", "and", "in", "at", "on", "to", "it", "there", "with", "as"))
LIGHT_WEIGHT = 0.25
ALIKE = 0.6
INCORRECT, HALLUCINATED = "incorrect", "hallucinated"


@dataclass(frozen=True)
class Piece:
    """A stretch of a caption. mark: "", "incorrect" or "hallucinated"; why: what a reader is told about it."""

    text: str
    mark: str = ""
    why: str = ""


def place_of(statement: str, caption: str, alike: float = ALIKE) -> tuple[int, int] | None:
    """The start and end of the characters that say a statement; None where no stretch is alike enough.

    Likeness is the F1 of the words that both have, common little words counting a quarter.
    """
    wanted = statement.strip().strip(".!?\"'")
    found = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", caption, re.IGNORECASE) if wanted else None
    if found is not None:
        return found.span()
    said = Counter(word.lower() for word in WORD.findall(statement))
    whole = sum(weight(word) * count for word, count in said.items())
    best, place = alike, None
    for sentence in SENTENCE.finditer(caption):
        words = [(match.group().lower(), match.span()) for match in WORD.finditer(caption, *sentence.span())]
        for start, (first, (begin, _)) in enumerate(words):
            if first not in said:
                continue
            left, shared, length = Counter(said), 0.0, 0.0
            for word, (_, end) in words[start:]:
                length += weight(word)
                if 2 * whole / (length + whole) <= best:
                    break  # longer stretches can only be less alike
                if left[word]:
                    left[word] -= 1
                    shared += weight(word)
                    likeness = 2 * shared / (length + whole)
                    if likeness > best:
                        best, place = likeness, (begin, end)
    return place


def weight(word: str) -> float:
    return LIGHT_WEIGHT if word in LIGHT else 1.0


def marked(caption: str, verdict: Verdict) -> list[Piece]:
    """The caption in pieces, which joined are the caption. What has no place in it marks nothing.

    Where two accusations are about the same words, the one that comes first marks them, incorrect before hallucinated.
    """
    accused = [(wrong.said or wrong.event, INCORRECT, f"In truth: {wrong.event}") for wrong in verdict.incorrect] + [
        (text, HALLUCINATED, f"Nothing supports: {text}") for text in verdict.hallucinated
    ]
    marks: list[tuple[int, int, str, str]] = []
    for text, mark, why in accused:
        quoted = re.fullmatch(r'Unreadable: "(.*)"', text, re.DOTALL)  # what the exact judge cannot read
        place = place_of(quoted.group(1) if quoted else text, caption)
        if place is not None:
            marks.append((*place, mark, why))
    return cut(caption, marks)


def cut(caption: str, marks: Sequence[tuple[int, int, str, str]]) -> list[Piece]:
    """The caption cut at the ends of (start, end, mark, why); of marks that overlap the first in the list counts."""
    edges = sorted({0, len(caption), *(edge for mark in marks for edge in mark[:2])})
    pieces: list[Piece] = []
    for start, end in pairwise(edges):
        over = [(mark, why) for first, last, mark, why in marks if first <= start and end <= last]
        mark = over[0][0] if over else ""
        why = "\n".join(dict.fromkeys(why for _, why in over))
        pieces.append(Piece(caption[start:end], mark, why))
    return pieces
