"""Laws of the exact judge, and verdicts worked out by hand."""

from __future__ import annotations

import random

import pytest

from kokanee.events import Incorrect, repetition_rate
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import Fact, close, exact, facts_of
from kokanee.world.language import parse, write
from kokanee.world.scene import sample_scene
from kokanee.world.score import judge

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
    assert Incorrect("The red circle is small.", "The red circle is big.") in verdict.incorrect
    assert 'Unreadable: "the blue star jumps high"' in verdict.hallucinated


def test_the_truth_in_any_wording_and_order_is_right():
    for seed in range(300):
        rng, events = random.Random(seed), exact(sample_scene("train", seed))
        facts = list(facts_of(events))
        rng.shuffle(facts)
        verdict = judge(events, write(facts, rng))
        assert not (verdict.missed or verdict.incorrect or verdict.hallucinated)
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


def test_saying_a_caption_over_again_repeats_half_of_it():
    for seed in range(50):
        caption = write(exact(sample_scene("train", seed)), random.Random(seed))
        assert repetition_rate(caption) < 0.2
        assert repetition_rate(f"{caption} {caption}") >= 0.5
