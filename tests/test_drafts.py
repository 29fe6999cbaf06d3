"""Laws of drafts: what a model says of clips follows from the tasks, and files that end early are gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from kokanee.captions import Decoding
from kokanee.clips import WorldClips, WorldData
from kokanee.drafts import Team, Writer, candidates, figures, verdicts
from kokanee.endpoint import Unanswered
from kokanee.errors import KokaneeError
from kokanee.events import Counts, repetition_rate
from kokanee.formats import read_jsonl
from kokanee.judges import judged
from kokanee.pairs import Candidate
from kokanee.scoring import ExactJudge
from kokanee.world.score import judge

WAYS = [Decoding(1.0, 1.0, 5, 10), Decoding(0.5, 1.0, 6, 10)]


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture
def team() -> Team:
    return Team(PartialState(cpu=True))


@pytest.fixture
def clips(tiny, tiny_stores) -> WorldClips:
    return WorldClips(*tiny, WorldData(features=tiny_stores["train"]), "train")


@pytest.fixture
def tasks(clips):
    return [clips.task(number, 2, "key") for number in range(len(clips))]


def written(tiny, team, clips, tasks, path: Path, report: Any = quiet) -> list[dict[str, Any]]:
    return Writer(*tiny, 4, team).captions(path, clips, tasks, WAYS, 2, report)


def test_every_clip_has_all_its_captions_with_how_they_were_drawn(tiny, team, clips, tasks, tmp_path):
    found = written(tiny, team, clips, tasks, tmp_path / "drafts.jsonl")
    assert [draft["clip"] for draft in found] == [task.name for task in tasks]
    assert all(draft["temperatures"] == [1.0, 1.0, 0.5, 0.5] and draft["seeds"] == [5, 5, 6, 6] for draft in found)
    assert all(len(draft["captions"]) == len(draft["finished"]) == 4 for draft in found)
    alone = Writer(*tiny, 1, team).captions(tmp_path / "alone.jsonl", clips, tasks[3:4], WAYS, 2, quiet)
    assert alone[0] == found[3]  # whatever the batch


@pytest.mark.parametrize("kept", [0, 1, 4, 5])
def test_a_file_that_ends_early_is_gone_on_with(tiny, team, clips, tasks, tmp_path, kept):
    written(tiny, team, clips, tasks, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:7])
    written(tiny, team, clips, tasks, tmp_path / "part.jsonl")
    assert (tmp_path / "part.jsonl").read_bytes() == b"".join(lines)


def test_verdicts_are_the_judges_and_are_asked_for_once(tiny, team, clips, tasks, tmp_path):
    drafts = written(tiny, team, clips, tasks, tmp_path / "drafts.jsonl")
    told: list[int] = []
    path = tmp_path / "verdicts.jsonl"
    found = verdicts(path, ExactJudge, tasks, drafts, team, lambda done, total: told.append(done))
    assert told == list(range(1, 4 * len(tasks) + 1))
    for task, draft, verdict in zip(tasks, drafts, found, strict=True):
        exact = [judge(task.truth.facts, text) for text in draft["captions"]]
        assert [Counts(**counts) for counts in verdict["counts"]] == [one.counts for one in exact]
        assert [one["missed"] for one in verdict["verdicts"]] == [list(one.missed) for one in exact]
        assert verdict["repetition"] == [repetition_rate(text) for text in draft["captions"]]
        assert verdict["ground_truth"] == task.ground_truth
    assert verdicts(path, ExactJudge, tasks, drafts, team, lambda *_: pytest.fail("asked again")) == found
    with pytest.raises(KokaneeError, match="other clips"):
        verdicts(path, ExactJudge, tasks[::-1], drafts, team, quiet)


class Silent:
    """A judge that never answers about captions of odd length."""

    name, concurrency = "silent", 1

    async def judge(self, truth, prediction, run):
        if len(prediction.text) % 2:
            raise Unanswered("it did not answer")
        return judged(judge(truth.facts, prediction.text))

    async def close(self):
        pass


def test_too_many_captions_without_a_verdict_stop_the_run_and_are_asked_for_again(tiny, team, clips, tasks, tmp_path):
    drafts = written(tiny, team, clips, tasks, tmp_path / "drafts.jsonl")
    odd = sum(len(text) % 2 for draft in drafts for text in draft["captions"])
    assert odd
    with pytest.raises(KokaneeError, match=rf"{odd} of \d+ captions could not be judged.*did not answer"):
        verdicts(tmp_path / "verdicts.jsonl", Silent, tasks, drafts, team, quiet, 0.0)
    assert not (tmp_path / "verdicts.jsonl").exists()
    found = verdicts(tmp_path / "verdicts.jsonl", Silent, tasks, drafts, team, quiet, 1.0)
    assert sum(counts is None for record in found for counts in record["counts"]) == odd


def test_a_caption_that_was_not_judged_is_no_candidate():
    draft = {"captions": ["One.", "Two."], "finished": [True, False]}
    counts = {"missed": 1, "incorrect": 0, "hallucinated": 2, "n_events": 4}
    found = candidates(draft, {"counts": [None, counts], "repetition": [0.0, 0.25]})
    assert found == [Candidate("Two.", Counts(1, 0, 2, 4), 0.25, finished=False)]


def test_figures_are_of_all_events_together():
    made = [Candidate("a b", Counts(1, 1, 0, 4), 0.5), Candidate("c d e f", Counts(3, 0, 2, 12), 0.0)]
    assert figures(made) == {
        "missed": 25.0,
        "incorrect": 6.25,
        "hallucinated": 12.5,
        "hall": 18.75,
        "total": 43.75,
        "repetition": 25.0,
        "words": 3.0,
    }


def test_answers_are_right_where_they_are_the_same_but_for_case(tiny, team, clips, tasks, monkeypatch):
    writer = Writer(*tiny, 3, team)
    asked = [task for task in tasks if task.questions]
    right = {(task.name, question): answer for task in asked for question, answer in task.questions}

    monkeypatch.setattr(Writer, "said", lambda self, clips, tasks, decoding: [[("?", True)] for _ in tasks])
    assert writer.right_answers(clips, asked) == 0.0
    monkeypatch.setattr(
        Writer, "said", lambda self, clips, tasks, decoding: [[(right[t.name, t.prompt].upper(), True)] for t in tasks]
    )
    assert writer.right_answers(clips, asked) == 100.0
    assert writer.right_answers(clips, []) is None


def test_records_are_in_the_order_of_the_tasks(tiny, team, clips, tasks, tmp_path):
    backwards = tasks[::-1]
    found = written(tiny, team, clips, backwards, tmp_path / "drafts.jsonl")
    assert [record["clip"] for record in read_jsonl(tmp_path / "drafts.jsonl")] == [task.name for task in backwards]
    assert found[0] == written(tiny, team, clips, tasks, tmp_path / "forwards.jsonl")[-1]
