"""Laws of the exam: marks are what the judge says, and watching a file is what the processor makes of it."""

from __future__ import annotations

import json

import pytest

from kokanee import exam as exam_module
from kokanee.captioner import Captioner
from kokanee.captions import Decoding
from kokanee.errors import KokaneeError
from kokanee.events import Counts, rates
from kokanee.exam import PROMPT, answers, exam, facts_in, mark, parts_of
from kokanee.formats import read_jsonl
from kokanee.views import watch
from kokanee.world.facts import Fact, exact
from kokanee.world.make import make
from kokanee.world.scene import sample_scene
from kokanee.world.score import judge


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make(folder, 3, split="test", size_px=48, fps=8.0, questions=2, annotators=1)
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(exam_module, "CAPTION_TOKENS", 6)
    monkeypatch.setattr(exam_module, "ANSWERING", Decoding(max_new_tokens=3))


def test_marks_of_captions_are_worked_out_by_hand():
    bell = (Fact("sound", ("bell",), ""), Fact("pitch", ("bell",), "high"))
    star = (Fact("figure", ("red", "star"), ""),)
    marks = mark("hand", [bell, star], ["A drum beats.", "There is a red star. There is a red star."])
    assert marks.rates == rates(
        judge(truth, said).counts for truth, said in ((bell, "A drum beats."), (star, "There is a red star."))
    )
    assert marks.sounds_told == 0.0 and marks.words == pytest.approx((3 + 10) / 2) and marks.answers is None
    assert mark("hand", [star], ["There is a red star."]).sounds_told is None
    told = mark("hand", [bell], ["A bell rings."])
    assert told.sounds_told == 100.0 and told.rates.missed == 50.0 and told.rates.hall == 0.0


def test_no_caption_misses_everything():
    facts = [event.fact for event in exact(sample_scene("test", 0))]
    marks = mark("silent", [facts], [""])
    assert (marks.rates.missed, marks.rates.hall, marks.repetition, marks.words) == (100.0, 0.0, 0.0, 0.0)
    as_dict = marks.as_dict()
    assert as_dict["total"] == 100.0 and json.loads(json.dumps(as_dict)) == as_dict


def test_a_records_facts_are_those_of_its_scene(clips):
    for index, record in enumerate(read_jsonl(clips / "samples.jsonl")):
        assert facts_in(record) == [event.fact for event in exact(sample_scene("test", index))]


def test_the_exam_marks_annotators_and_model_and_counts_right_answers(tiny, clips, monkeypatch):
    records = read_jsonl(clips / "samples.jsonl")
    right = iter([question["answer"].upper() for record in records for question in record["questions"]])

    def told(model, processor, asked, decoding, keys=None):
        return ["There is a red star." if text == exam_module.PROMPT else next(right) for _, text in asked]

    monkeypatch.setattr(exam_module, "answers", told)
    reports = []
    found, captions = exam(*tiny, clips, 3, batch_size=2, report=lambda done, total: reports.append((done, total)))
    truths = [facts_in(record) for record in records]
    annotated = [record["captions_annotated"][0] for record in records]
    assert captions == [annotated, ["There is a red star."] * 3] and reports == [(2, 3), (3, 3)]
    assert found[0] == mark("annotators", truths, annotated)
    assert found[1].rates == mark("greedy", truths, captions[1]).rates
    assert found[1].answers == 100.0 and set(found[1].answers_by_kind.values()) == {100.0}
    assert found[1].answers_interval == (pytest.approx(100 * 0.025 ** (1 / 3)), 100.0)
    assert sum(found[1].by_clip, Counts(0, 0, 0, 0)).n_events == sum(map(len, truths)) and len(found[1].by_clip) == 3
    assert [clip.n_events for clip in found[1].wrong_by_clip] == [len(record["questions"]) for record in records]
    assert sum(found[1].questions_by_kind.values()) == sum(len(record["questions"]) for record in records)


def test_an_exam_is_the_same_every_time_and_its_batches_change_nothing(tiny, clips):
    once = exam(*tiny, clips, batch_size=3)
    assert once == exam(*tiny, clips, 3, batch_size=3) == exam(*tiny, clips, 3, batch_size=1)
    drawn = [exam(*tiny, clips, 2, temperatures=[1.5], seed=seed)[1][1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_full_exam_holds_what_the_single_ones_hold_and_every_interval(tiny, clips):
    marks, captions = exam(*tiny, clips, temperatures=[0.0, 1.0], every_s=2.0, seed=3)
    assert [one.name for one in marks] == ["annotators", "greedy", "temperature 1", "every 2 s"]
    assert [marks[:2], captions[:2]] == list(exam(*tiny, clips))
    assert captions[2] == exam(*tiny, clips, temperatures=[1.0], seed=3)[1][1]
    assert (marks, captions) == exam(*tiny, clips, temperatures=[0.0, 1.0], every_s=2.0, seed=3, batch_size=1)
    records = read_jsonl(clips / "samples.jsonl")
    parts = parts_of(records, 2.0)
    captioner = Captioner(*tiny)
    owner, first = parts[0]
    said = captioner.caption(clips / first.file, PROMPT, first.start_s, first.end_s, max_new_tokens=6).text
    assert owner == 0 and len(parts) == len(captions[3]) and captions[3][0] == said
    assert {owner for owner, _ in parts} == {0, 1, 2} and marks[3].rates.missed > 0
    assert marks[3].total_interval[0] <= marks[3].rates.total <= marks[3].total_interval[1]


def test_answers_about_what_was_watched_are_those_about_the_file(tiny, clips):
    model, processor = tiny
    path, question = clips / "00001.mp4", "What happens in the video?"
    wanted = Captioner(model, processor).caption(path, question, max_new_tokens=5).text.strip()
    views = [watch(model, processor, path), watch(model, processor, clips / "00000.mp4")]
    said = answers(model, processor, [(views[0], question), (views[1], question)], Decoding(max_new_tokens=5))
    assert said[0] == wanted


def test_a_folder_with_too_few_clips_or_no_annotators_is_refused(tiny, clips, tmp_path):
    with pytest.raises(KokaneeError, match="has 3 clips, not 4"):
        exam(*tiny, clips, 4)
    make(tmp_path, 1, split="test", size_px=48, fps=8.0, annotators=0)
    with pytest.raises(KokaneeError, match="without an annotator"):
        exam(*tiny, tmp_path, 1)
    make(tmp_path / "seen", 1, split="train", size_px=48, fps=8.0, annotators=1)
    with pytest.raises(KokaneeError, match="to train on"):
        exam(*tiny, tmp_path / "seen", 1)
