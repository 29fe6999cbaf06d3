"""Laws of pairs: the better is chosen, ties and doubtful ones are dropped and counted, nothing is lost on the way."""

from __future__ import annotations

import random

import pytest

from kokanee.errors import KokaneeError
from kokanee.events import Counts
from kokanee.formats import append_jsonl, write_json
from kokanee.pairs import ALIKE, FEWER, SAME, SILENT, Candidate, Pair, PairRules, dropped, picked, read_pairs


def candidate(text, missed=0, incorrect=0, hallucinated=0, n_events=10, repetition=0.0):
    return Candidate(text, Counts(missed, incorrect, hallucinated, n_events), repetition)


def test_the_score_is_the_weighted_share_of_errors():
    rules = PairRules(hallucination_weight=1.5, repetition_weight=2.0)
    assert candidate("a", 3, 1, 2, 10, 0.25).score(rules) == pytest.approx((3 + 1.5 * 3) / 10 + 2.0 * 0.25)
    assert candidate("a", 3, 1, 2).score(PairRules()) == pytest.approx(0.6)


def test_the_best_is_chosen_over_the_worst_and_no_caption_is_in_two_pairs():
    some = [candidate(name, missed) for name, missed in (("c", 5), ("a", 1), ("d", 9), ("b", 4))]
    found, lost = picked(some, PairRules(max_pairs=5))
    assert [(chosen.text, rejected.text) for chosen, rejected in found] == [("a", "d"), ("b", "c")]
    assert lost == {} and picked(some, PairRules())[0] == found[:1]


def test_hallucination_and_repetition_can_turn_a_preference():
    quiet, wordy = candidate("quiet", missed=4), candidate("wordy", missed=1, hallucinated=2)
    assert picked([quiet, wordy], PairRules())[0] == [(wordy, quiet)]
    assert picked([quiet, wordy], PairRules(hallucination_weight=3.0))[0] == [(quiet, wordy)]
    again = candidate("again", missed=1, hallucinated=2, repetition=0.5)
    assert picked([quiet, again], PairRules())[0] == [(quiet, again)]


def test_what_is_no_preference_is_dropped_and_counted():
    close = [candidate("a", 1), candidate("b", 1)], [candidate("a", 1), candidate("b", 2)]
    found = [picked(some, PairRules(min_gap=0.2)) for some in (*close, [candidate("a")], [candidate("a")] * 3, [])]
    assert all(pairs == [] for pairs, _ in found)
    assert dropped(counts for _, counts in found) == {ALIKE: 2, FEWER: 2, SAME: 1}
    assert picked(close[0], PairRules(min_gap=0.0)) == ([], {ALIKE: 1})
    assert len(picked(close[1], PairRules(min_gap=0.1))[0]) == 1


def test_silence_is_never_chosen_but_may_be_rejected():
    silent, wrong, good = candidate("", missed=10), candidate("wrong", 9, 0, 4), candidate("good", 3)
    assert picked([silent, wrong], PairRules()) == ([], {SILENT: 1})
    assert picked([silent, good], PairRules())[0] == [(good, silent)]


def test_the_order_of_the_samples_changes_nothing():
    rng = random.Random(0)
    for _ in range(50):
        some = [candidate(f"text {n}", rng.randint(0, 4), hallucinated=rng.randint(0, 2)) for n in range(6)]
        rules = PairRules(max_pairs=3)
        found = picked(some, rules)
        rng.shuffle(some)
        assert picked(some, rules) == found
        assert all(chosen.score(rules) < rejected.score(rules) for chosen, rejected in found[0])


def test_pairs_come_back_from_their_file(tmp_path):
    pairs = [
        Pair("a.mp4", "What happens?", "A dog runs.", "A cat.", "A dog runs and barks.", None, None, 0.1, 0.7),
        Pair("b.mp4", "Und?", "Ein Hund\u2028läuft.", "", start_s=2.0, end_s=4.5),
    ]
    append_jsonl(tmp_path / "pairs.jsonl", [pair.as_record() for pair in pairs])
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    append_jsonl(tmp_path / "trl.jsonl", [pair.as_trl() for pair in pairs])
    assert read_pairs(str(tmp_path / "trl.jsonl")) == pairs
    assert pairs[0].as_trl()["rejected"] == [{"role": "assistant", "content": "A cat."}]


def turns(**said):
    return [{"from": who, "value": text} for who, text in said.items()]


def test_gpt_is_the_chosen_answer_in_one_published_form_and_the_truth_in_the_other(tmp_path):
    first = {"video": "a.mp4", "conversations": turns(human="<image>\nTell.", gpt="good", reject_gpt="bad", gt="true")}
    second = {"video": "a.mp4", "conversations": turns(human="<video>\nTell.", gpt="true", chosen="good", reject="bad")}
    write_json(tmp_path / "pairs.json", [first, second])
    assert read_pairs(tmp_path / "pairs.json") == [Pair("a.mp4", "Tell.", "good", "bad", "true")] * 2


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"video": "a.mp4", "conversations": turns(human="x", gpt="y")}, "is no preference"),
        (
            {"video": "a.mp4", "conversations": turns(human="x", gpt="y", reject_gpt="z", chosen="c")},
            "is no preference",
        ),
        ({"conversations": turns(human="x", gpt="y", reject_gpt="z")}, "names no video"),
        ({"video": "a.mp4", "conversations": turns(human="x", gpt="y", reject_gpt="z") * 2}, "several turns"),
        ("text", "is no preference"),
    ],
)
def test_what_is_no_pair_is_told_with_its_place(tmp_path, item, reason):
    write_json(tmp_path / "pairs.json", [item])
    with pytest.raises(KokaneeError, match=rf"item 0 .*{reason}"):
        read_pairs(tmp_path / "pairs.json")
    append_jsonl(tmp_path / "pairs.jsonl", [{"version": 1, "file": "a.mp4"}])
    with pytest.raises(KokaneeError, match="line 1 is no preference pair"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_an_empty_file_holds_no_pairs_and_is_told(tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(KokaneeError, match="is empty"):
        read_pairs(tmp_path / "pairs.jsonl")
