"""Laws of the exact judge, and verdicts worked out by hand."""

from __future__ import annotations

import random

import pytest

from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import Fact, close, exact, facts_of
from kokanee.world.language import parse, write
from kokanee.world.scene import sample_scene
from kokanee.world.score import Verdict, judge, rates, repetition_rate

CIRCLE, STAR = ("red", "circle"), ("blue", "star")
TRUTH = (
    Fact("background", (), "grey"),
    Fact("figure", CIRCLE, ""),
    Fact("size", CIRCLE, "small"),
    Fact("place", CIRCLE, "top left"),
    Fact("figure", STAR, ""),
    Fact("size", STAR, "big"),
    Fact("action", CIRCLE, "jumps"),
    Fact("action", CIRCLE, "moves left"),
    Fact("sound", ("bell",), ""),
    Fact("pitch", ("bell",), "high"),
    Fact("count", ("bell",), "2"),
    Fact("sync", ("bell",), "red circle jumps"),
)
FULL = (
    "The background is grey. A small red circle is at the top left. There is a big blue star. "
    "As the red circle jumps, a high bell rings twice. The red circle moves left."
)


def counts(caption: str, truth=TRUTH) -> tuple[int, int, int, int]:
    """(told, missed, incorrect, hallucinated)."""
    verdict = judge(truth, caption)
    assert verdict.n_events == len(truth) == len(verdict.told) + len(verdict.missed) + len(verdict.incorrect)
    return len(verdict.told), len(verdict.missed), len(verdict.incorrect), len(verdict.hallucinated)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("", ""), (12, 0, 0, 0)),
        (("The background is grey. ", ""), (11, 1, 0, 0)),
        (("is grey", "is brown"), (11, 0, 1, 0)),
        (("small", "big"), (11, 0, 1, 0)),
        (("twice", "three times"), (11, 0, 1, 0)),
        (("moves left", "moves up"), (11, 0, 1, 0)),
        (("moves left", "moves left. The red circle spins"), (12, 0, 0, 1)),
        (("bell rings", "drum beats"), (9, 0, 3, 0)),
        (("blue star", "pink star"), (11, 0, 1, 0)),
        (("blue star", "pink cross"), (10, 2, 0, 2)),
        (("circle jumps", "circle shakes"), (11, 0, 1, 0)),
        (("There is a big blue star. ", ""), (10, 2, 0, 0)),
        (("moves left", "dances"), (11, 1, 0, 1)),
        (("The red circle moves left.", "The red circle moves left. The light goes out."), (12, 0, 0, 1)),
        (("moves left.", "moves left. A low horn sounds."), (12, 0, 0, 2)),
        (("moves left.", "moves left. A red circle moves left. A high bell rings."), (12, 0, 0, 0)),
    ],
)
def test_one_change_of_a_perfect_caption_costs_this(change: tuple[str, str], expected: tuple[int, ...]):
    assert counts(FULL.replace(*change, 1)) == expected


def test_a_figure_under_a_wrong_colour_costs_one_error_all_told():
    assert counts(FULL.replace("red", "orange")) == (11, 0, 1, 0)


def test_an_empty_caption_misses_everything():
    assert counts("") == (0, 12, 0, 0)
    assert counts("We see nothing.") == (0, 12, 0, 1)


def test_against_an_empty_truth_everything_is_hallucinated():
    assert counts("A small red circle jumps. Something odd.", ()) == (0, 0, 0, 4)


def test_left_over_figures_match_by_colour_or_shape_those_of_which_most_is_told():
    truth = close([Fact("size", ("red", "circle"), "small"), Fact("size", ("red", "star"), "big")])
    assert counts("There is a big red heart. There is a small red cross.", truth) == (2, 0, 2, 0)
    assert counts("There is a small red heart. There is a big red cross.", truth) == (2, 0, 2, 0)
    assert counts("There is a small red heart. There is a small red cross.", truth) == (1, 0, 3, 0)
    assert counts("There is a small blue heart.", truth) == (0, 4, 0, 2)


def test_guessing_a_sound_does_not_pay():
    """A blind guess costs as much as silence where there is a sound to be heard, and more where there is none."""
    guess, silence = "The background is grey. We hear a high bell once.", "The background is grey."
    for seed in range(200):
        truth = exact(sample_scene("validation", seed))
        kinds = {event.fact.subject for event in truth if event.fact.kind == "sound"}
        if ("bell",) not in kinds:
            errors = [sum(counts(caption, facts_of(truth))[1:]) for caption in (guess, silence)]
            assert errors[0] - errors[1] == (0 if kinds else 3)


def test_verdicts_read_as_statements():
    verdict = judge(TRUTH, "A big red circle spins. The blue star jumps high. A high bell rings.")
    assert "The background is grey." in verdict.missed
    assert "The red circle is big. (In truth: The red circle is small.)" in verdict.incorrect
    assert 'Unreadable: "the blue star jumps high"' in verdict.hallucinated


def test_the_truth_in_any_wording_and_order_is_right():
    for seed in range(300):
        rng, events = random.Random(seed), exact(sample_scene("train", seed))
        facts = list(facts_of(events))
        rng.shuffle(facts)
        verdict = judge(events, write(facts, rng))
        assert not verdict.missed + verdict.incorrect + verdict.hallucinated
        assert set(verdict.told) == set(facts)


def test_every_true_fact_is_told_missed_or_incorrect_once():
    wild = Bias(swapped=0.6, invented=1.0, care=2.0)
    for seed in range(500):
        rng = random.Random(seed)
        truth = facts_of(exact(sample_scene("train", seed)))
        other = annotate(sample_scene("train", seed if seed % 2 else seed + 1), wild, rng)
        caption = write(other, rng)
        told, _, incorrect, hallucinated = counts(caption, truth)
        assert told + incorrect + hallucinated == len(set(parse(caption).facts))
        assert judge(truth, caption) == judge(truth, caption)


def test_rates_divide_sums_by_the_number_of_all_facts():
    verdicts = [Verdict(("a",), (), ("b",), 4), Verdict(("a", "b"), ("c",), (), 6)]
    found = rates(verdicts)
    assert (found.missed, found.incorrect, found.hallucinated) == (30.0, 10.0, 10.0)
    assert (found.hall, found.total) == (20.0, 50.0)
    assert rates([]).total == 0.0


@pytest.mark.parametrize(
    ("caption", "n", "expected"),
    [
        ("", 5, 0.0),
        ("one two three four five", 5, 0.0),
        ("a b c d e a b c d e", 5, 0.5),
        ("a b c d e A, b; c. D e", 5, 0.5),
        ("a b c d e f a b c d e g", 5, 5 / 12),
        ("a a a", 2, 2 / 3),
        ("a b a b a b", 2, 4 / 6),
        ("a b c d a b c d", 5, 0.0),
    ],
)
def test_the_repetition_rate_is_this(caption: str, n: int, expected: float):
    assert repetition_rate(caption, n) == pytest.approx(expected)


def test_saying_a_caption_over_again_repeats_half_of_it():
    for seed in range(50):
        caption = write(exact(sample_scene("train", seed)), random.Random(seed))
        assert repetition_rate(caption) < 0.2
        assert repetition_rate(f"{caption} {caption}") >= 0.5
