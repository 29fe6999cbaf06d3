"""Laws of results: goals are reached by the numbers alone, shares and falls are worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from kokanee.formats import append_jsonl, write_json
from kokanee.results import compared, figures, goals, kept_share, known_by_clip, machine, results, stage_of
from kokanee.steps import Step


def stage(total: float, sampled: float, right: float) -> dict[str, Any]:
    return {"greedy": {"total": total}, "sampled": {"total": sampled}, "qa": {"right": right}}


def stages(**replaced: dict[str, Any]) -> dict[str, dict[str, Any]]:
    made = {"sft": stage(50, 60, 94), "mrdpo": stage(30, 36, 92), "rebirth": stage(34, 36, 93)}
    return made | {"continued": stage(49, 59, 94.5)} | replaced


def test_the_share_that_rebirth_keeps_is_of_mrdpos_fall():
    assert kept_share(50, 30, 34) == pytest.approx(80.0) and kept_share(60, 36, 36) == pytest.approx(100.0)
    assert kept_share(50, 30, 55) == pytest.approx(-25.0)
    assert kept_share(50, 50, 34) is None and kept_share(50, 51, 34) is None


def test_every_goal_is_reached_at_its_bound_and_not_beyond_it():
    assert [goal["reached"] for goal in goals(stages())] == [True] * 5
    for replaced, lost in (
        ({"mrdpo": stage(30.5, 36, 92)}, 0),
        ({"mrdpo": stage(30, 36.5, 92)}, 1),
        ({"rebirth": stage(34, 36, 92.9)}, 2),
        ({"rebirth": stage(34.1, 36, 93)}, 3),
        ({"rebirth": stage(34, 41, 93)}, 4),
    ):
        found = [goal["reached"] for goal in goals(stages(**replaced))]
        assert not found[lost] and sum(found) >= 4 - (lost == 0)
    assert not any(goal["reached"] for goal in goals(stages(mrdpo=stage(60, 70, 90), rebirth=stage(60, 70, 90))))


def test_goals_tell_their_numbers_and_the_control_where_there_is_one():
    told = [goal["told"] for goal in goals(stages())]
    assert told[0] == "from 50.0 % to 30.0 %: 40.0 % less"
    assert told[2] == "94.0 % after SFT, 92.0 % after mrDPO, 93.0 % after rebirth; SFT continued 94.5 %"
    assert told[3] == "80 % kept; total error 34.0 %; SFT continued 49.0 %"
    without = stages()
    del without["continued"]
    assert not any("continued" in goal["told"] for goal in goals(without))
    assert goals(stages(mrdpo=stage(50, 36, 92)))[3]["told"].startswith("mrDPO lowered no error")


MARKS = {
    "rates": {"missed": 20.0, "incorrect": 3.0, "hallucinated": 2.0},
    "hall": 5.0,
    "total": 25.0,
    "total_interval": [23.0, 27.0],
    "repetition": 1.0,
    "words": 30.0,
    "answers": 75.0,
    "answers_interval": [70.0, 80.0],
    "answers_by_kind": {"colour": 50.0, "shape": 100.0},
    "questions_by_kind": {"colour": 2, "shape": 2},
}


def test_marks_become_one_flat_record():
    marks = MARKS
    flat = figures(marks)
    assert flat["missed"] == 20.0 and (flat["total_low"], flat["total_high"]) == (23.0, 27.0)
    made = stage_of([marks, marks, {**marks, "total": 40.0}, {**marks, "total": 22.0}])
    assert [made[group]["total"] for group in ("greedy", "sampled", "local")] == [25.0, 40.0, 22.0]
    assert made["qa"] == {
        "right": 75.0,
        "low": 70.0,
        "high": 80.0,
        "questions": 4,
        "by_kind": {"colour": {"right": 50.0, "questions": 2}, "shape": {"right": 100.0, "questions": 2}},
    }


def test_every_device_that_worked_on_a_step_is_named(tmp_path):
    steps = [Step("one", "", (), 1.0), Step("two", "", (), 1.0)]
    told = [("one", "a GPU", False), ("one", "2 cores", True), ("other", "a phone", True), ("two", "2 cores", False)]
    names = ("name", "device", "ended")
    append_jsonl(tmp_path / "steps.jsonl", [{"seconds": 9.0, **dict(zip(names, one, strict=True))} for one in told])
    assert machine(steps, tmp_path)["device"] == "a GPU and 2 cores"


def test_a_control_that_has_not_ended_is_left_out(tmp_path):
    settings = {"model": "nano", "seed": 1, "quick": True, "start": "nano-sft"}
    stages = {
        f"marks/{name}.json": {"settings": {"clips": 4}, "marks": [MARKS] * 4} for name in ("sft", "mrdpo", "rebirth")
    }
    for name, made in {
        **stages,
        "7-rebirth/metrics.json": {"captions": {"kept": 3}},
        "7-rebirth/state.json": {"recipe": {"steps": 5}},
        "exam/state.json": {"seed": 1},
        "6-mrdpo/metrics.json": {"rounds": []},
        "ce/state.json": {"recipe": {}},
    }.items():
        write_json(tmp_path / name, made)
    assert results(settings, tmp_path, [])["ce_rounds"] == []


def marked(*wrong: int) -> dict[str, Any]:
    """Marks of a stage, each of them with so many of ten events missed in the clips, and questions answered wrongly."""
    counts = [[missed, 0, 0, 10] for missed in wrong]
    one = {"by_clip": counts, "wrong_by_clip": counts}
    return {"marks": [{"by_clip": []}, one, one, one]}


def test_stages_are_compared_clip_by_clip():
    found = {"mrdpo": marked(1, 2, 3, 4), "sft": marked(3, 4, 5, 6), "old": {"marks": [{}, {}, {}, {}]}}
    less = {"more": pytest.approx(-20.0), "low": pytest.approx(-20.0), "high": pytest.approx(-20.0)}
    right = {"more": pytest.approx(20.0), "low": pytest.approx(20.0), "high": pytest.approx(20.0)}
    wanted = {"stage": "mrdpo", "beside": "sft", "greedy": less, "sampled": less, "local": less, "qa": right}
    assert compared(found, "mrdpo", "sft") == wanted
    assert [known_by_clip(found, name) for name in ("mrdpo", "old", "none")] == [True, False, False]
