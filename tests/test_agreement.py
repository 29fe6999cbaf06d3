"""Laws of agreement between judges: full is 1, chance is 0, and what a judge leaves out is said."""

from __future__ import annotations

import random

import pytest

from kokanee.agreement import agreement, as_table, kappa, spearman
from kokanee.events import AtomicEvent, Counts, Incorrect, Verdict
from kokanee.ground_truth import Truth
from kokanee.judges import Judgement, judged
from kokanee.predictions import Prediction
from kokanee.scoring import Item

TEXTS = ("A dog runs.", "A bell rings.", "A car stops.", "It rains.")


def item(judgement: Judgement | None) -> Item:
    return Item(Prediction("a.mp4", "x"), Truth("a.mp4", tuple(map(AtomicEvent, TEXTS))), [judgement])


def verdict(missed=(), incorrect=(), hallucinated=()) -> Judgement:
    return judged(Verdict(tuple(missed), tuple(map(Incorrect, incorrect)), tuple(hallucinated), len(TEXTS)))


def test_kappa_of_the_textbook():
    answers = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    found = kappa(answers)
    assert (found.yes_one, found.yes_two, found.same) == (0.5, 0.6, 0.7) and found.kappa == pytest.approx(0.4)


def test_answers_that_have_nothing_to_do_with_each_other_have_no_kappa_to_speak_of():
    rng = random.Random(0)
    found = kappa([(rng.random() < 0.3, rng.random() < 0.6) for _ in range(20000)]).kappa
    assert found is not None and abs(found) < 0.02
    assert kappa([(True, True)] * 5).kappa is None and kappa([]).kappa is None


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 3, 2, 4], 0.9486832980505138),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation(one, two, found):
    assert spearman(one, two) == (None if found is None else pytest.approx(found))


def test_a_judge_agrees_with_itself_however_it_quotes():
    one = [item(verdict(TEXTS[:2], TEXTS[2:3], ["A cat."])), item(verdict(TEXTS[3:]))]
    two = [
        item(verdict(["1. a dog runs", "A  bell rings"], ["A car stops"], ["A cat"])),
        item(verdict(["4) It rains"])),
    ]
    found = agreement(one, two)
    assert [made.kappa for made in found.by_verdict.values()] == [1.0, 1.0, 1.0]
    assert found.rank_correlation == pytest.approx(1.0) and found.unknown == 0 and found.n_lists == 2


def test_numbers_alone_count_for_totals_and_what_is_not_judged_counts_for_nothing():
    one = [item(verdict(TEXTS[:2])), item(verdict()), item(verdict(TEXTS))]
    two = [item(Judgement(Counts(2, 0, 1, 4), None)), item(verdict(["A fox sings."])), item(None)]
    found = agreement(one, two)
    assert (found.n_captions, found.n_lists, found.unknown) == (2, 1, 1)
    assert found.by_verdict["missed"].n == 4 and found.by_verdict["hallucinated"].n == 2
    assert found.totals == (25.0, 50.0)
    assert "2 captions" in as_table(found, "exact", "m") and "| missed | event | 4 |" in as_table(found, "exact", "m")
