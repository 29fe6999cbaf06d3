"""Laws of scoring: what was not said or not judged stays in the denominator, the median run counts, kinds add up."""

from __future__ import annotations

import asyncio
import json
import random
from itertools import pairwise

import pytest

from kokanee.captions import intervals
from kokanee.endpoint import Asker, BudgetSpent, Endpoint
from kokanee.errors import KokaneeError
from kokanee.events import AtomicEvent, Counts, Rates, Verdict
from kokanee.formats import append_jsonl
from kokanee.ground_truth import GroundTruth, Truth, read_ground_truth
from kokanee.judges import Judgement, LanguageModelJudge, judged
from kokanee.predictions import Cut, Prediction
from kokanee.scoring import ExactJudge, Item, ModelJudge, Scores, beside, judge_all, judged_item, matched, scores
from kokanee.world.facts import exact
from kokanee.world.language import write
from kokanee.world.make import MakeSettings, record, scene_of
from kokanee.world.scene import sample_scene
from model_server import serving, status

N_CLIPS = 12


@pytest.fixture(scope="module")
def samples():
    return [record(sample_scene("test", i), i, MakeSettings(0, "test"), f"{i:05d}.mp4") for i in range(N_CLIPS)]


@pytest.fixture(scope="module")
def truth(samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "samples.jsonl"
    append_jsonl(path, samples)
    return read_ground_truth(path)


def scored(predictions, truth, **more):
    whole, parts, _ = matched(predictions, truth, **more)
    return [scores(judge_all(items, ExactJudge()), **more) for items in (whole, parts)]


def test_the_exact_caption_has_no_error_and_none_misses_everything(samples, truth):
    right, _ = scored([Prediction(s["file"], s["caption_exact"]) for s in samples], truth)
    assert right.rates == Rates(0.0, 0.0, 0.0) and right.intervals["total"] == (0.0, 0.0)
    empty, _ = scored([Prediction(s["file"], "") for s in samples], truth)
    assert empty.rates == Rates(100.0, 0.0, 0.0) and empty.words == 0.0


def test_intervals_are_held_against_what_happens_in_them(truth):
    predictions = []
    for index in range(N_CLIPS):
        scene = sample_scene("test", index)
        for start_s, end_s in ((0.0, 2.0), (2.0, scene.duration_s)):
            text = write(exact(scene, start_s, end_s), random.Random(index))
            predictions.append(Prediction(f"{index:05d}.mp4", text, start_s, end_s))
    whole, parts = scored(predictions, truth)
    assert not whole.items and parts.rates.total == 0.0 and len(parts.items) == 2 * N_CLIPS
    swapped = [Prediction(one.file, other.text, one.start_s, one.end_s) for one, other in pairwise(predictions)]
    assert scored(swapped, truth)[1].rates.total > 30.0


def test_a_file_without_a_caption_misses_everything_but_as_published_is_left_out(samples, truth):
    some = [Prediction(s["file"], s["caption_exact"]) for s in samples[:-1]]
    failed = Prediction(samples[-1]["file"], "", reason="damaged")
    n_lost, n_all = len(truth.truths[-1].events), sum(len(t.events) for t in truth.truths)
    for predictions in (some, [*some, failed]):
        found, _ = scored(predictions, truth)
        assert found.rates.missed == pytest.approx(100 * n_lost / n_all)
        published, _ = scored(predictions, truth, as_published=True)
        assert published.rates.total == 0.0 and len(published.items) == N_CLIPS - 1


def test_kinds_add_up_and_every_caption_has_its_verdict(samples, truth):
    found, _ = scored([Prediction(s["file"], s["captions_annotated"][0]) for s in samples], truth)
    kinds = sum(found.kinds.values(), Counts(0, 0, 0, 0))
    whole = sum((item.judgements[0].counts for item in found.items), Counts(0, 0, 0, 0))
    assert (kinds.missed, kinds.incorrect, kinds.n_events) == (whole.missed, whole.incorrect, whole.n_events)
    assert "other" not in found.kinds and whole.missed > 0
    low, high = found.intervals["total"]
    assert low <= found.rates.total <= high
    told = json.loads(json.dumps(found.as_dict()))
    assert len(told["videos"]) == N_CLIPS and told["rates"]["hall"] == pytest.approx(found.rates.hall)
    assert sum(len(video["missed"]) for video in told["videos"]) == whole.missed


def test_captions_of_other_files_are_told_and_none_at_all_is_refused(samples, truth):
    _, _, unknown = matched([Prediction("other.mp4", "x"), Prediction(samples[0]["file"], "x")], truth)
    assert [prediction.file for prediction in unknown] == ["other.mp4"]
    with pytest.raises(KokaneeError, match="None of the captions belongs"):
        matched([Prediction("other.mp4", "x")], truth)


def test_the_exact_judge_refuses_what_is_not_of_the_world():
    truth = GroundTruth([Truth("a.mp4", (AtomicEvent("A dog runs"),))])
    with pytest.raises(KokaneeError, match="of the world only"):
        judge_all(matched([Prediction("a.mp4", "x")], truth)[0], ExactJudge())


def by_model(server_answer, runs=3, trouble=(), **more):
    """Scores of two captions by a model judge whose replies this makes of the request."""
    truth = GroundTruth(
        [Truth(f"{n}.mp4", (AtomicEvent("A dog runs", "seen"), AtomicEvent("It barks", "heard"))) for n in "ab"]
    )
    items, _, _ = matched([Prediction("a.mp4", "A dog runs."), Prediction("b.mp4", "A cat.")], truth)
    with serving(server_answer) as (server, url):
        server.trouble = list(trouble)
        asker = Asker(Endpoint("m", url, attempts=1, **more))
        return scores(judge_all(items, ModelJudge(LanguageModelJudge(asker)), runs)), server


def reply(missed: int) -> str:
    lists = {"Missed Event": ["A dog runs", "It barks"][:missed], "Incorrect Event": [], "Hallucination Event": []}
    return json.dumps({"Missed": missed, "Incorrect": 0, "Hallucination": 0, **lists})


def test_the_median_of_the_runs_is_reported():
    found, server = by_model(lambda request: reply(request["seed"] % 3))
    assert [run.missed for run in found.runs] == [0.0, 50.0, 100.0] and found.median_run == 1
    assert found.rates.missed == 50.0 and len(server.requests) == 6


def test_a_caption_that_was_not_judged_stays_in_the_denominator():
    found, _ = by_model(lambda r: "no" if "A cat" in r["messages"][1]["content"] else reply(0), runs=1)
    assert (
        found.unjudged.total() == 1
        and "cannot be read" in found.as_dict()["videos"][1]["reason"]
        and found.rates.missed == 50.0
    )
    assert found.as_dict()["videos"][1]["counts"] is None


def test_as_published_a_run_in_which_nothing_was_judged_is_no_run_without_errors():
    """The median is that of the others; where there are none, there is no score."""
    item = Item(Prediction("a.mp4", "A dog runs."), Truth("a.mp4", (AtomicEvent("A dog runs", "seen"),) * 2))
    half, down = Judgement(Counts(1, 0, 0, 2), None), "the server is down"
    found = scores([judged_item(item, [down, half, down, down])], as_published=True)
    assert found.median_run == 1 and found.rates.total == 50.0
    assert scores([judged_item(item, [down, half, down, down])]).rates.total == 100.0
    with pytest.raises(KokaneeError, match=r"No caption was judged.*the server is down"):
        scores([judged_item(item, [down, down])], as_published=True)


def test_a_judge_that_never_answers_ends_it_with_the_reason():
    with pytest.raises(
        KokaneeError, match=r"None of the first 8 questions got an answer of use: m refuses a question.*no"
    ):
        by_model(lambda request: None, trouble=[status(400, message="no")] * 999, runs=9, concurrency=1)


def test_a_quoted_number_does_not_hide_an_events_kind():
    quoted = {"Missed Event": ["2. It barks."], "Incorrect Event": [], "Hallucination Event": []}
    found, _ = by_model(lambda request: json.dumps({"Missed": 1, "Incorrect": 0, "Hallucination": 0, **quoted}), runs=1)
    assert {kind: counts.missed for kind, counts in found.kinds.items()} == {"heard": 2, "seen": 0}


def test_kinds_add_up_where_a_judgement_failed():
    found, _ = by_model(lambda r: "no" if "A cat" in r["messages"][1]["content"] else reply(0), runs=1)
    assert sum(counts.missed for counts in found.kinds.values()) == 2 and found.n_by_kind == 2


def cut_run(samples, every_s, stop=None, failed=()):
    """Exact captions of every `every_s` seconds up to `stop`, and files without any."""
    cut, made = Cut(every_s=every_s), []
    for sample in samples:
        if sample["file"] in failed:
            made.append(Prediction(sample["file"], "", reason="damaged", cut=cut))
            continue
        for start_s, end_s in intervals(0.0, sample["duration_s"], every_s):
            if stop is None or end_s <= stop:
                said = write(exact(scene_of(sample), start_s, end_s), random.Random(0))
                made.append(Prediction(sample["file"], said, start_s, end_s, cut=cut))
    return made


def test_intervals_that_a_run_did_not_reach_miss_everything(samples, truth):
    wanted = sum(len(intervals(0.0, sample["duration_s"], 2.0)) for sample in samples)
    _, all_told = scored(cut_run(samples, 2.0), truth)
    assert all_told.rates.total == 0.0 and len(all_told.items) == wanted
    whole, half = scored(cut_run(samples, 2.0, stop=2.0), truth)
    assert len(half.items) == wanted and 0.0 < half.rates.missed < 100.0 and not whole.items
    whole, one_failed = scored(cut_run(samples, 2.0, failed=[samples[0]["file"]]), truth)
    assert len(one_failed.items) == wanted and one_failed.rates.missed > 0.0 and not whole.items
    assert {item.prediction.reason for item in one_failed.items} == {"", "damaged"}
    _, published = scored(cut_run(samples, 2.0, stop=2.0), truth, as_published=True)
    assert published.rates.total == 0.0 and len(published.items) < wanted


def test_as_published_an_empty_caption_counts_and_a_failed_one_does_not(samples, truth):
    said = [Prediction(samples[0]["file"], ""), Prediction(samples[1]["file"], "", reason="damaged")]
    found, _ = scored(said, truth, as_published=True)
    assert len(found.items) == 1 and found.rates.missed == 100.0
    with pytest.raises(KokaneeError, match="Nothing is left"):
        matched(said[1:], truth, as_published=True)


def test_two_captions_of_one_clip_are_told(samples, truth):
    with pytest.raises(KokaneeError, match=r"a/00000.mp4 and b/00000.mp4 are both captions of 00000.mp4"):
        matched([Prediction("a/00000.mp4", "x"), Prediction("b/00000.mp4", "y")], truth)


def test_a_spent_budget_ends_it():
    with pytest.raises(BudgetSpent):
        by_model(lambda request: reply(0), budget_tokens=10, concurrency=1)


def test_a_judgement_of_numbers_alone_counts(truth):
    class Numbers:
        name, concurrency = "numbers", 4

        async def judge(self, truth, prediction, run):
            await asyncio.sleep(0)
            return Judgement(Counts(1, 0, 0, len(truth.events)), None)

        async def close(self):
            pass

    items, _, _ = matched([Prediction("00000.mp4", "x")], truth, as_published=True)
    found = scores(judge_all(items, Numbers(), 2))
    assert found.rates.missed == pytest.approx(100 / len(items[0].truth.events)) and found.kinds == {}


def test_captioners_are_held_against_each_other_on_the_same_files_alone():
    def made(*missed: int, file: str = "{}") -> Scores:
        events = tuple(AtomicEvent(f"Event {number}.") for number in range(4))
        items = []
        for number, count in enumerate(missed):
            verdict = Verdict(tuple(event.text for event in events[:count]), (), (), 4)
            truth = Truth(file.format(number), events)
            items.append(Item(Prediction(truth.file, "x"), truth, [judged(verdict)]))
        return scores(items)

    found = beside(made(1, 2, 3), made(0, 1, 2))
    assert found is not None and found["total"] == found["missed"] == pytest.approx((25.0, 25.0, 25.0))
    assert found["hallucinated"] == (0.0, 0.0, 0.0)
    assert beside(made(1, 2), made(1, 2, 3)) is None and beside(made(1), made(1)) is None
    assert beside(made(1, 2), made(1, 2, file="other {}")) is None
    twice = scores([*made(1, 2).items, *made(1, 2).items])
    assert beside(made(1, 2), twice) is None, "not of as many events: other intervals, or more captions of a file"
