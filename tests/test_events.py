"""Laws of rates: micro-averages worked out by hand, kinds that add up, intervals that hold the truth as they say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kokanee.events import (
    AtomicEvent,
    Counts,
    Incorrect,
    Rates,
    Verdict,
    by_kind,
    difference,
    interval,
    rates,
    repetition_rate,
    right_difference,
    word_count,
)

EVENTS = (AtomicEvent("A dog runs", "seen"), AtomicEvent("It barks", "heard"), AtomicEvent("Rain falls"))


def test_rates_divide_by_the_sum_of_events():
    found = rates([Counts(1, 0, 2, 4), Counts(0, 3, 0, 16)])
    assert found == Rates(5.0, 15.0, 10.0) and found.hall == 25.0 and found.total == 30.0
    assert rates([]) == Rates(0.0, 0.0, 0.0)
    assert rates([Counts(0, 0, 3, 1)]).hallucinated == 300.0


def test_a_verdict_of_more_events_than_there_are_is_refused():
    with pytest.raises(AssertionError):
        Verdict(("a",), (Incorrect("b"),), (), 1)


def test_kinds_add_up_to_the_whole():
    verdict = Verdict(("A dog runs",), (Incorrect("It barks", "It meows"),), ("A cat",), 3)
    found = by_kind([(EVENTS, verdict), (EVENTS[:1], Verdict((), (), (), 1))])
    assert found == {"seen": Counts(1, 0, 0, 2), "heard": Counts(0, 1, 0, 1), "other": Counts(0, 0, 0, 1)}
    whole = sum(found.values(), Counts(0, 0, 0, 0))
    assert (whole.missed, whole.incorrect, whole.n_events) == (1, 1, 4)


def test_events_in_the_same_words_are_each_of_their_own_kind():
    events = [AtomicEvent("A bell", "heard"), AtomicEvent("a bell.", "seen")]
    assert by_kind([(events, Verdict((), (), (), 2))]) == {"heard": Counts(0, 0, 0, 1), "seen": Counts(0, 0, 0, 1)}


def test_events_in_other_words_are_counted_as_other():
    found = by_kind([(EVENTS[:2], Verdict(("A dog is running",), (), (), 2))])
    assert found["other"] == Counts(1, 0, 0, 0) and found["seen"].missed == 0


def test_an_interval_holds_its_rate_and_shrinks_with_more_videos():
    rng = random.Random(0)
    many = [Counts(rng.randint(0, 10), rng.randint(0, 5), rng.randint(0, 3), 20) for _ in range(400)]
    few = many[:25]
    for counts in (few, many):
        low, high = interval(counts, lambda r: r.total)
        assert low < rates(counts).total < high
    widths = [high - low for low, high in (interval(c, lambda r: r.total) for c in (few, many))]
    assert widths[1] < 0.5 * widths[0]
    assert interval(few, lambda r: r.missed) == interval(few, lambda r: r.missed)
    assert interval(few, lambda r: r.missed, seed=1) != interval(few, lambda r: r.missed)


def test_an_interval_of_alike_videos_is_a_point_and_of_none_nothing():
    assert interval([Counts(1, 1, 1, 10)] * 5, lambda r: r.total) == pytest.approx((30.0, 30.0))
    assert interval([], lambda r: r.total) == (0.0, 0.0)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(3), 0
    for trial in range(60):
        counts = [Counts(int(missed), 0, 0, 20) for missed in rng.binomial(20, 0.3, 60)]
        low, high = interval(counts, lambda r: r.missed, level=0.8, seed=trial)
        held += low <= 30.0 <= high
    assert 36 <= held <= 58


def test_words_are_counted_between_spaces_and_by_characters_where_there_are_none():
    assert [word_count(text) for text in ("", "a well-lit room -- yes", "一只狗，跑。", "狗 barks・猫")] == [0, 5, 4, 3]


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
        ("一只狗在草地上奔跑。一只狗在草地上奔跑", 5, 0.5),
    ],
)
def test_the_repetition_rate_is_this(caption: str, n: int, expected: float):
    assert repetition_rate(caption, n) == pytest.approx(expected)


def test_a_difference_is_of_the_same_videos_in_each_draw():
    """What every video has more of is told exactly, however far apart the videos are; the other way is the opposite."""
    easy_and_hard = [Counts(k % 9, 0, 0, 10) for k in range(60)]
    worse = [count + Counts(1, 0, 0, 0) for count in easy_and_hard]
    assert difference(worse, easy_and_hard, lambda r: r.missed) == pytest.approx((10.0, 10.0, 10.0))
    (low, high), (_, high_worse) = (interval(counts, lambda r: r.missed) for counts in (easy_and_hard, worse))
    assert low + 10.0 < high < high_worse, "apart, the two overlap"
    mixed = [Counts(k % 3, 0, 0, 10) for k in range(60)]
    more, low, high = difference(mixed, easy_and_hard, lambda r: r.missed)
    less, low_less, high_less = difference(easy_and_hard, mixed, lambda r: r.missed)
    assert low < more < high and (less, low_less, high_less) == pytest.approx((-more, -high, -low))
    assert difference([], [], lambda r: r.missed) == (0.0, 0.0, 0.0)


def test_answers_that_differ_in_no_video_may_differ_in_others():
    right, wrong = [Counts(0, 0, 0, 2)] * 20, [Counts(2, 0, 0, 2)] * 20
    for same in (right, wrong, right[:10] + wrong[:10]):
        assert right_difference(same, same) == pytest.approx((0.0, -16.843, 16.843), abs=1e-3), "0.83157 ** 20 is 0.025"
    one = [*right[:-1], Counts(1, 0, 0, 2)]
    assert right_difference(right, one) == difference(one, right, lambda found: found.missed)
    assert right_difference([], []) == (0.0, 0.0, 0.0)
