"""Laws of `kokanee score`: the table and scores.json say the same, and a second call asks nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kokanee.cli import app
from kokanee.formats import alone_in, append_jsonl, write_json
from kokanee.world.make import MakeSettings, record
from kokanee.world.scene import sample_scene
from model_server import serving


def kk(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "1000", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def world(tmp_path) -> Path:
    samples = [record(sample_scene("test", i), i, MakeSettings(0, "test"), f"{i:05d}.mp4") for i in range(6)]
    append_jsonl(tmp_path / "samples.jsonl", samples)
    for name, text in (("right", "caption_exact"), ("people", "captions_annotated")):
        said = [sample[text] if isinstance(sample[text], str) else sample[text][0] for sample in samples]
        items = [{"id": [sample["file"]], "pred": caption} for sample, caption in zip(samples, said, strict=True)]
        write_json(tmp_path / f"{name}.json", items)
    return tmp_path


def test_captioners_stand_side_by_side_in_the_table_and_in_scores_json(world):
    twice = world / "right.json", world / "people.json", world / "right.json"
    words = (*twice, "--events", world / "samples.jsonl", "--out", world / "s")
    table, beside, by_kind = kk("score", *words).stdout.split("\n\n")
    head, _, *rows = table.splitlines()
    told = json.loads((world / "s" / "scores.json").read_text())
    assert [system["name"] for system in told["systems"]] == ["right", "people"] and told["judge"] == "exact"
    assert told["systems"][0]["global"]["rates"]["total"] == 0.0
    people = told["systems"][1]["global"]
    assert rows[0].startswith("| right | global | 6 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 (0.0 to 0.0) |")
    assert f"| {people['rates']['missed']:.1f} |" in rows[1] and people["rates"]["missed"] > 10
    more = people["beside"]
    assert more["captioner"] == "right" and more["total"]["more"] == pytest.approx(people["rates"]["total"])
    assert more["missed"]["low"] < more["missed"]["more"] < more["missed"]["high"]
    assert "beside" not in told["systems"][0]["global"]
    assert beside.splitlines()[0] == "| points more than right | | Miss | Hall | Total |"
    assert beside.splitlines()[2].startswith(f"| people | global | {more['missed']['more']:+.1f} (")
    assert len(beside.splitlines()) == 3
    assert len(rows) == 2 and all(row.count("|") == head.count("|") for row in rows)
    assert "heard: Miss, Incorrect" in by_kind and len(by_kind.splitlines()) == 4
    page = (world / "s" / "report.html").read_text()
    assert "Points more than right" in page and f"{more['total']['more']:+.1f}<small>" in page
    assert f"{people['rates']['total']:.1f} %" in page and "<dd>exact</dd>" in page


def test_a_model_is_asked_once_and_what_it_did_not_judge_is_told(world):
    lists = {"Missed Event": [], "Incorrect Event": [], "Hallucination Event": ["a cat"]}
    good, given = json.dumps({"Missed": 0, "Incorrect": 0, "Hallucination": 1, **lists}), []
    with serving(lambda request: given.append(request) or good) as (_, url):
        both = (world / "people.json", world / "right.json", "-e", world / "samples.jsonl", "-j", "openai:m")
        kk("score", *both, "--base-url", url, "--runs", 1, "-o", world / "both")
        assert len(given) == 12
        given.clear()
        words = (world / "people.json", "-e", world / "samples.jsonl", "-o", world / "s", "-j", "openai:m")
        first = kk("score", *words, "--base-url", url, "--runs", 2).stdout
        assert len(given) == 12 and kk("score", *words, "--base-url", url, "--runs", 2).stdout == first
        assert len(given) == 12
    told = json.loads((world / "s" / "scores.json").read_text())
    assert told["judge"] == "openai:m" and len(told["systems"][0]["global"]["runs"]) == 2
    with serving(lambda request: "I cannot") as (_, url):
        found = kk("score", *words[:-3], world / "other", "-j", "openai:m", "--base-url", url, "--runs", 1, code=1)
    assert "6 judgements failed" in found.stderr and (world / "other" / "scores.json").is_file()
    assert "6 judgements failed" in (world / "other" / "report.html").read_text()


def test_clips_without_plain_captions_of_intervals_are_told(world):
    """Nobody knows into which intervals they were to be cut, where no run's settings say it."""
    file = json.loads((world / "samples.jsonl").read_text().splitlines()[0])["file"]
    (world / "parts.json").write_text(json.dumps([{"file": file, "start_s": 0, "end_s": 2, "caption": "A dog."}]))
    found = kk("score", world / "parts.json", "-e", world / "samples.jsonl", "-o", world / "s")
    assert "5 files without captions of intervals are left out, as how they were to be cut is not known" in found.stderr
    assert "left out" not in kk("score", world / "right.json", "-e", world / "samples.jsonl", "-o", world / "r").stderr


def test_agreement_of_a_model_with_the_exact_judge(world):
    def careful(request):
        asked = request["messages"][-1]["content"].split("\n\n<description>")[0]
        events = [line.split(". ", 1)[1] for line in asked.splitlines()[1:]]
        lists = {"Missed Event": events, "Incorrect Event": [], "Hallucination Event": []}
        return json.dumps({"Missed": len(events), "Incorrect": 0, "Hallucination": 0, **lists})

    out = world / "agreement"
    with serving(careful) as (_, url):
        words = ("agree", world / "people.json", "-e", world / "samples.jsonl", "-o", out, "-j", "openai:m")
        table = kk(*words, "--base-url", url, "--captions", 4).stdout
    told = json.loads((out / "agreement.json").read_text())
    assert told["by_verdict"]["missed"]["yes_two"] == 1.0 and told["by_verdict"]["missed"]["kappa"] == 0.0
    assert told["n_captions"] == told["n_lists"] == 4 and told["unknown"] == 0 and told["totals"][1] == 100.0
    assert "rank correlation of the totals of 4 captions (Spearman): –" in table
    with serving(lambda request: "I cannot") as (_, url):
        found = kk(*words[:5], world / "none", "-j", "openai:m", "--base-url", url, code=1)
    assert "None of 6 captions could be judged by openai:m" in found.stderr


@pytest.mark.parametrize("command", [["score"], ["agree", "-j", "openai:m", "--base-url", "http://localhost:9/v1"]])
def test_two_runs_do_not_write_to_one_folder_at_once(world, monkeypatch, command):
    monkeypatch.setattr("kokanee.formats.LOCK_WAIT_S", 0.1)
    words = (*command, world / "right.json", "-e", world / "samples.jsonl", "-o", world / "s")
    with alone_in(world / "s"):
        assert "Another process works in" in kk(*words, code=1).stderr
        assert [path.name for path in (world / "s").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["{w}/right.json", "-e", "{w}/no.jsonl"], 1, "no.jsonl is not there"),
        (["{w}/right.json", "-e", "{w}/none.jsonl"], 1, "holds none"),
        (["{w}/none.json", "-e", "{w}/samples.jsonl"], 1, "holds no captions"),
        (["{w}/none.jsonl", "-e", "{w}/samples.jsonl"], 1, "holds no captions"),
        (["{w}/no.json", "-e", "{w}/samples.jsonl"], 1, "no.json is not there"),
        (["{w}/right.json", "-e", "{w}/samples.jsonl", "-j", "human"], 2, "is no judge"),
        (["{w}/right.json", "-e", "{w}/published.json"], 1, "None of the captions belongs"),
        (["{w}/right.json", "-e", "{w}/known.json"], 1, "of the world only"),
    ],
)
def test_mistakes_are_one_message(world, words, code, reason):
    write_json(world / "published.json", [{"video": "video/0.mp4", "events": ["A dog runs"]}])
    write_json(world / "none.json", [])
    (world / "none.jsonl").touch()
    write_json(world / "known.json", [{"video": "video/00000.mp4", "events": ["A dog runs"]}])
    found = kk("score", *(word.format(w=world) for word in words), "--out", world / "s", code=code)
    assert reason in found.stderr and not (world / "s" / "scores.json").exists()
