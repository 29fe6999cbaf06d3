"""Laws of marking: the pieces are the caption, and what is marked is what is alike."""

from __future__ import annotations

import random

import pytest

from kokanee.events import Incorrect, Verdict
from kokanee.spans import marked, place_of

CAPTION = "A big green triangle is on the left and a small red star is at the top right. It spins. A low bell sounds."


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("It spins.", "It spins"),
        ("a low bell", "A low bell"),
        ("The red star is at the top right.", "red star is at the top right"),
        ("The triangle is on the left.", "triangle is on the left"),
        ("A bell sounds low.", "A low bell sounds"),
        ("A dog barks.", None),
        ("on", "on"),
        ("", None),
    ],
)
def test_a_statement_is_found_where_the_caption_says_it(statement, words):
    place = place_of(statement, CAPTION)
    assert (None if place is None else CAPTION[slice(*place)]) == words


def test_places_are_those_of_the_caption_whatever_letters_it_has():
    assert place_of("a cat purrs", "İİİİ. A cat purrs. Category.") == (6, 17)
    assert place_of("cat", "A category of its own.") is None


def test_a_stretch_never_runs_across_sentences():
    assert place_of("the star at the right spins", "A star at the right. Spins a cat.") == (2, 19)


def test_marked_pieces_join_to_the_caption_and_say_why():
    verdict = Verdict((), (Incorrect("The star is blue.", "The small red star"),), ("It spins.", "A cat purrs."), 9)
    pieces = marked(CAPTION, verdict)
    assert "".join(piece.text for piece in pieces) == CAPTION
    assert [(piece.text, piece.mark) for piece in pieces if piece.mark] == [
        ("small red star", "incorrect"),
        ("It spins", "hallucinated"),
    ]
    assert pieces[1].why == "In truth: The star is blue."


def test_accusations_of_the_same_words_are_told_together():
    verdict = Verdict((), (Incorrect("The bell is high.", "low bell"),), ("A low bell sounds.",), 3)
    pieces = marked(CAPTION, verdict)
    both = next(piece for piece in pieces if piece.text == "low bell")
    assert both.mark == "incorrect" and both.why.count("\n") == 1


def test_pieces_join_to_the_caption_whatever_is_accused():
    rng = random.Random(0)
    words = CAPTION.split()
    for _ in range(200):
        said = tuple(" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(4))
        pieces = marked(CAPTION, Verdict((), (Incorrect(said[0], said[1]),), said[2:], 5))
        assert "".join(piece.text for piece in pieces) == CAPTION
