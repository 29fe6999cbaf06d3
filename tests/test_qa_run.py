"""Laws of a run of questions: what was stopped and goes on is as what was not, and other settings are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from kokanee.endpoint import Endpoint
from kokanee.errors import KokaneeError
from kokanee.formats import read_jsonl
from kokanee.qa import ModelExaminee, ServedExaminee
from kokanee.qa_run import run, settings_of
from kokanee.questions import Question, by_video
from kokanee.remote import RemoteCaptioner
from model_server import serving, status

QUESTIONS = [
    Question(file, text, options[0], kind, options)
    for file in ("first.mp4", "second.mp4", "silent.mp4")
    for text, kind, options in (("What barks?", "who", ("a dog", "nobody")), ("Is it loud?", "how", ("yes", "no")))
]


class Stopped(Exception):
    pass


@pytest.fixture
def videos(media, tmp_path):
    for name in ("first.mp4", "second.mp4", "silent.mp4"):
        shutil.copy(media / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def examinee(tiny):
    return ModelExaminee(*tiny, "text", 2)


def begin(examinee, videos, out, **more):
    return run(out, examinee, by_video(QUESTIONS, videos), settings_of(examinee, QUESTIONS, videos), **more)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(examinee, videos):
    whole = begin(examinee, videos, videos / "whole")

    def stop(done: int) -> None:
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        begin(examinee, videos, videos / "half", on_video=stop)
    half = videos / "half"
    assert not (half / "scores.json").exists() and len(read_jsonl(half / "answers.jsonl")) == 2
    with (half / "answers.jsonl").open("a") as file:
        file.write('{"version": 1, "file": "sil')  # killed in the middle of a line
    told = []
    assert begin(examinee, videos, half, on_video=told.append) == whole and told == [2, 3]
    for name in ("state.json", "answers.jsonl", "scores.json"):
        assert (half / name).read_text() == (videos / "whole" / name).read_text()


def test_a_run_that_is_done_computes_nothing_and_says_the_same(examinee, videos, monkeypatch):
    first = begin(examinee, videos, videos / "out")
    before = {path.name: path.read_text() for path in (videos / "out").iterdir()}
    monkeypatch.setattr(ModelExaminee, "marked", None)
    assert begin(examinee, videos, videos / "out") == first
    assert {path.name: path.read_text() for path in (videos / "out").iterdir()} == before


def test_what_is_unusual_about_a_video_is_kept(examinee, videos):
    for _ in range(2):
        found = begin(examinee, videos, videos / "out")
        assert [one.notes for one in found] == [(), (), ("no sound track",)]
    records = read_jsonl(videos / "out" / "answers.jsonl")
    assert [record.get("notes") for record in records] == [None, None, ["no sound track"]]


def test_records_hold_what_is_needed_to_mark_again(examinee, videos):
    begin(examinee, videos, videos / "out")
    records = read_jsonl(videos / "out" / "answers.jsonl")
    assert [record["file"] for record in records] == ["first.mp4", "second.mp4", "silent.mp4"]
    entries = [entry for record in records for entry in record["answers"]]
    for question, entry in zip(QUESTIONS, entries, strict=True):
        assert (entry["question"], entry["kind"], entry["answer"]) == (
            question.question,
            question.kind,
            question.answer,
        )
        best = entry["options"][entry["log_probs"].index(max(entry["log_probs"]))]
        assert entry["said"] == best and entry["right"] == (best == question.answer)
    scores = json.loads((videos / "out" / "scores.json").read_text())
    assert scores["overall"]["right"] == sum(entry["right"] for entry in entries) and scores["overall"]["asked"] == 6
    assert set(scores["kinds"]) == {"who", "how"} and scores["way"] == "text" and scores["files"] == 3


def test_unread_and_changed_videos_are_tried_again(examinee, videos):
    whole, good = begin(examinee, videos, videos / "whole"), (videos / "second.mp4").read_bytes()
    (videos / "second.mp4").write_text("no video")
    out = videos / "out"
    for _ in range(2):
        found = begin(examinee, videos, out)
        assert [bool(one.error) for one in found] == [False, True, False]
    assert len(read_jsonl(out / "answers.jsonl")) == 3  # the same error is not told twice
    assert json.loads((out / "scores.json").read_text())["unread_questions"] == 2
    (videos / "second.mp4").write_bytes(good)
    assert begin(examinee, videos, out) == whole
    shutil.copy(videos / "silent.mp4", videos / "second.mp4")
    assert begin(examinee, videos, out)[1].answers != whole[1].answers


def test_other_settings_are_refused_and_named(examinee, videos, tiny_model):
    out = videos / "out"
    begin(examinee, videos, out)
    before = (out / "answers.jsonl").read_text()
    tiny_model.lm_head.weight.data.add_(1.0)
    for other, problem in (
        (replace(examinee, way="letter"), "way: 'text' before, 'letter' now"),
        (replace(examinee, model=tiny_model), "other weights than before"),
    ):
        with pytest.raises(KokaneeError, match=problem):
            begin(other, videos, out)
    settings = settings_of(examinee, QUESTIONS, videos)
    for changed, problem in (
        ({"questions": settings_of(examinee, QUESTIONS[1:], videos)["questions"]}, "other questions than before"),
        ({"processor": settings["processor"] | {"max_frames": 3}}, "max_frames: 240 before, 3 now"),
    ):
        with pytest.raises(KokaneeError, match=problem):
            run(out, examinee, by_video(QUESTIONS, videos), settings | changed)
    assert (out / "answers.jsonl").read_text() == before
    begin(replace(examinee, batch_size=1), videos, out)


def test_answers_to_other_questions_about_a_file_are_not_taken_for_these(examinee, videos):
    begin(examinee, videos, videos / "out")
    fewer = [Question("first.mp4", "Is it loud?", "yes", "how", ("yes", "no"))]
    settings = settings_of(examinee, QUESTIONS, videos)
    (found,) = run(videos / "out", examinee, by_video(fewer, videos), settings)
    assert [answer.question for answer in found.answers] == fewer


def test_a_folder_of_something_else_is_refused(examinee, videos):
    with pytest.raises(KokaneeError, match="holds other files"):
        begin(examinee, videos, videos)


def test_a_server_is_asked_only_what_is_missing(videos):
    with serving(lambda request: "A") as (server, url):
        examinee = ServedExaminee(RemoteCaptioner(Endpoint("m", url, wait_s=0.01)), "letter", 1)
        whole = begin(examinee, videos, videos / "whole")
        server.trouble = [status(401)] * 3  # all of the first video, and one question about the second
        found = begin(examinee, videos, videos / "part")
        assert [bool(one.error) for one in found] == [True, True, False] and "401" in found[0].error
        server.requests.clear()
        assert begin(examinee, videos, videos / "part") == whole and len(server.requests) == 4
        assert begin(examinee, videos, videos / "part") == whole and len(server.requests) == 4
        assert all(one.right for found in whole for one in found.answers)
        moved = ServedExaminee(RemoteCaptioner(Endpoint("m", f"{url}/elsewhere")), "letter", 1)
        assert begin(moved, videos, videos / "part") == whole
        other = ServedExaminee(RemoteCaptioner(Endpoint("n", url)), "letter", 1)
        with pytest.raises(KokaneeError, match="model: 'openai:m' before, 'openai:n' now"):
            begin(other, videos, videos / "part")


class Noting(ServedExaminee):
    """Notes the videos in the order in which they are asked about, and what the folder holds meanwhile."""

    def each(self, videos):
        self.asked.append([video.file for video in videos])
        self.seen.append(sorted(path.name for path in self.out.iterdir()))
        with pytest.raises(KokaneeError, match="Another process works in"):
            begin(replace(self), self.videos, self.out)
        yield from super().each(videos)


def test_a_run_begun_again_is_alone_has_no_old_scores_and_tries_last_what_failed(videos, monkeypatch):
    monkeypatch.setattr("kokanee.formats.LOCK_WAIT_S", 0.1)
    (videos / "first.mp4").write_text("no video")
    with serving(lambda request: "A") as (_, url):
        examinee = Noting(RemoteCaptioner(Endpoint("m", url)), "letter", 1)
        Noting.asked, Noting.seen, Noting.videos, Noting.out = [], [], videos, videos / "out"
        some = [video for video in by_video(QUESTIONS, videos) if video.file != "silent.mp4"]
        run(videos / "out", examinee, some, settings_of(examinee, QUESTIONS, videos))
        assert (videos / "out" / "scores.json").is_file()
        begin(examinee, videos, videos / "out")
    assert Noting.asked == [["first.mp4", "second.mp4"], ["silent.mp4", "first.mp4"]]
    assert all("scores.json" not in names for names in Noting.seen)


def test_half_a_first_record_is_no_record(examinee, videos):
    whole = begin(examinee, videos, videos / "out")
    path = videos / "out" / "answers.jsonl"
    path.write_text(path.read_text()[:20])
    assert begin(examinee, videos, videos / "out") == whole and len(read_jsonl(path)) == 3
