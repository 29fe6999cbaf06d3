"""Laws of `kokanee qa`: the table and scores.json say the same, a second call goes on, mistakes are one message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kokanee import cli_qa
from kokanee.cli import Commands
from kokanee.cli_qa import qa
from kokanee.formats import write_json
from model_server import serving

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.command("qa")(qa)


@app.callback()
def top() -> None:
    """Commands by name, as in cli.py."""


def kk(*words, code=0):
    result = CliRunner().invoke(app, ["qa", *map(str, words)], env={"COLUMNS": "1000", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def asked(media, tmp_path) -> Path:
    """Three videos, and choices to make about them; mixed: one question is open, and a video has two names."""
    for name in ("first.mp4", "second.mp4", "silent.mp4"):
        shutil.copy(media / name, tmp_path / name)
    choices = [
        {"video": name, "question": text, "options": options, "answer": "B", "type": kind}
        for name in ("first", "second.mp4", "silent.mp4")
        for text, kind, options in (
            ("What barks?", "who", ["A. a dog", "B. a cat", "C. a cow", "D. a man"]),
            ("Is it loud?", "how", ["A. yes", "B. no"]),
        )
    ]
    write_json(tmp_path / "choices.json", choices)
    renamed = {**choices[1], "video": "first.mp4"}
    opened = {"file": "first.mp4", "question": "What?", "answer": "a dog"}
    write_json(tmp_path / "mixed.json", [choices[0], renamed, *choices[2:], opened])
    return tmp_path


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each line by the first."""
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in r.split("|")[1:-1]] for r in table.splitlines() if r)}


def test_the_table_and_scores_json_say_the_same(asked, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(cli_qa, "ENOUGH", 3)
    words = (asked / "choices.json", "--model", tiny_checkpoint, "--out", asked / "out")
    result = kk(*words)
    told, table = json.loads((asked / "out" / "scores.json").read_text()), rows(result.stdout)
    assert "6 questions about 3 videos, by letter" in result.stderr and told["way"] == "letter"
    shares = {**told["kinds"], "overall": told["overall"]}
    assert list(table) == ["kind", "---", "how", "who", "overall"]
    for name, share in shares.items():
        low, high = share["interval"]
        cells = (str(share["asked"]), f"{share['percent']:.1f}", f"{low:.1f} to {high:.1f}", f"{share['chance']:.1f}")
        assert tuple(table[name]) == cells
    assert (table["how"][-1], table["who"][-1], table["overall"][-1]) == ("50.0", "25.0", "37.5")
    assert kk(*words).stdout == result.stdout == kk(*words[:-2], "--batch-size", 3).stdout
    monkeypatch.setattr(cli_qa, "ENOUGH", 4)
    assert rows(kk(*words).stdout)["overall"][2] == "–"  # of so few videos, no interval
    assert "way: 'letter' before, 'text' now" in kk(*words, "--by", "text", code=1).stderr


def test_two_runs_are_held_against_each_other(asked, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(cli_qa, "ENOUGH", 3)
    words, out = (asked / "mixed.json", "-m", tiny_checkpoint), asked / "out"
    before = kk(*words, "--by", "letter", "-o", out)
    both = (*words, "--by", "text", "-o", asked / "text", "--beside", out)
    result = kk(*both)
    shares, _, leads = result.stdout.partition(f"| points more than {out.as_posix()} |")
    found, first, now = rows(leads), rows(before.stdout), rows(shares)
    told = json.loads((asked / "text" / "scores.json").read_text())["beside"][out.as_posix()]
    for name in ("how", "who", "overall"):
        more = float(now[name][1]) - float(first[name][1])
        assert float(found[name][1]) == pytest.approx(more, abs=0.11) and found[name][0] == now[name][0]
        assert found[name][1] == f"{told[name]['more']:+.1f}"
        assert found[name][2] == "{:+.1f} to {:+.1f}".format(*told[name]["interval"])
    assert kk(*both).stdout == result.stdout == kk(*both[:5], *both[7:]).stdout  # again, and without --out
    assert rows(kk(*both, "--limit", 1).stdout.partition("points more")[2])["overall"][0] == "2"
    same = kk(*words, "--by", "letter", "--beside", out).stdout.partition("points more")[2]
    assert rows(same)["overall"][1:] == ["+0.0", "-70.8 to +70.8"]  # of three videos none differs


def test_what_is_not_as_one_may_think_is_said(asked, tiny_checkpoint):
    told = kk(asked / "choices.json", "-m", tiny_checkpoint, "-o", asked / "out").stderr
    assert "1 video with something unusual (such as silent.mp4: no sound track)" in told and "times" not in told
    choices = json.loads((asked / "choices.json").read_text())
    write_json(asked / "parts.json", [{**choices[0], "start": 0, "end": 1}, *choices[1:]])
    told = kk(asked / "parts.json", "-m", tiny_checkpoint, "--by", "text", "--beside", asked / "out").stderr
    assert "1 question with times (start, end) that are not used" in told
    assert f"{asked / 'out'} was asked by letter, which is not compared like with like" in told


def test_a_run_of_other_questions_is_no_run_to_hold_against(asked, tiny_checkpoint):
    other = {"video": "first.mp4", "question": "Who sings?", "options": ["a dog", "a cat"], "answer": "A"}
    write_json(asked / "other.json", [other])
    kk(asked / "other.json", "-m", tiny_checkpoint, "-o", asked / "out")
    words = (asked / "choices.json", "-m", tiny_checkpoint, "--beside")
    assert "answers none of these questions" in kk(*words, asked / "out", code=1).stderr
    assert "answers.jsonl is not there" in kk(*words, asked, code=1).stderr


def test_questions_without_options_are_left_out_and_counted(asked, tiny_checkpoint):
    words = (asked / "mixed.json", "-m", tiny_checkpoint)
    table = rows(kk(*words, "--by", "text").stdout)
    assert table["overall"][0] == "6" and table["left out: no options"][0] == "1"
    result = kk(*words)
    table = rows(result.stdout)
    assert "by answer" in result.stderr and table["overall"][0] == "7" and table["overall"][-1] == "–"
    assert table["other"][0] == "1" and table["other"][2] == "–"
    assert all(word not in result.stderr for word in ("single letter", "synthetic", "more than once"))


def test_what_makes_answers_worthless_is_said(asked):
    """Options under a name that is not known, and a model that knows its world alone."""
    one = {"video": "first.mp4", "question": "What barks?", "opts": ["a dog", "a cat"], "answer": "A"}
    write_json(asked / "opts.json", [one, {**one, "options": []}, {**one, "answer": "a dog"}])
    said = kk(asked / "opts.json").stderr
    assert '2 open questions have a single letter for an answer. If there are options, call them "options"' in said
    assert "nano: knows the synthetic world" in said
    assert "3 questions about 1 video, by answer" in said
    assert "1 question asked more than once about the same video; each counts as often" in said
    by_letter = kk(asked / "choices.json", "-o", asked / "by nano").stderr
    assert json.loads((asked / "by nano" / "scores.json").read_text())["name"] == "nano"
    assert "by letter" in by_letter and "nano has never read a list of options" in by_letter
    assert "never read" not in said


def test_a_longer_run_goes_on_from_a_shorter_one(asked, tiny_checkpoint):
    words = (asked / "choices.json", "-m", tiny_checkpoint, "--by", "text", "-o", asked / "out")
    assert rows(kk(*words, "--limit", 1).stdout)["overall"][:3] == [
        "2",
        *rows(kk(*words, "--limit", 1).stdout)["overall"][1:3],
    ]
    first = (asked / "out" / "answers.jsonl").read_text()
    whole = kk(*words).stdout
    assert (asked / "out" / "answers.jsonl").read_text().startswith(first)
    assert whole == kk(*words[:-2]).stdout and rows(whole)["overall"][0] == "6"


def test_unreadable_videos_are_left_out_counted_and_named(asked, tiny_checkpoint):
    (asked / "second.mp4").write_text("no video")
    result = kk(asked / "choices.json", "-m", tiny_checkpoint, "-o", asked / "out", code=1)
    table = rows(result.stdout)
    assert table["overall"][0] == "4" and table["left out: videos without answers (1)"][0] == "2"
    assert "1 of 3 videos without answers, and 2 questions left out" in result.stderr
    assert "second.mp4" in result.stderr
    for name in ("first.mp4", "silent.mp4"):
        (asked / name).write_text("no video")
    assert kk(asked / "choices.json", "-m", tiny_checkpoint, code=1).stdout == ""


def test_videos_may_lie_elsewhere(asked, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    shutil.copy(asked / "choices.json", folder / "q.json")
    assert "None of the 3 videos is there (such as first" in kk(folder / "q.json", "-m", tiny_checkpoint, code=1).stderr
    assert rows(kk(folder / "q.json", "-m", tiny_checkpoint, "--videos", asked).stdout)["overall"][0] == "6"


def test_a_server_can_be_asked(asked):
    with serving(lambda request: "B.") as (server, url):
        words = (asked / "choices.json", "--model", "openai:m", "--base-url", url, "--set", "max_frames=2")
        result = kk(*words, "--out", asked / "out", "--batch-size", 3)
        assert kk(*words, "--out", asked / "out").stdout == result.stdout and len(server.requests) == 6
    assert rows(result.stdout)["overall"] == ["6", "100.0", "–", "37.5"]
    assert "openai:m: 6 questions about 3 videos, by letter" in result.stderr
    state = json.loads((asked / "out" / "state.json").read_text())
    assert state["model"] == "openai:m" and state["processor"]["max_frames"] == 2 and "weights" not in state


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["{a}/none.json"], 1, "none.json is not there"),
        (["{a}/broken.json"], 1, "broken.json, item 0"),
        (["{a}/open.json", "--by", "letter"], 1, "No question has options"),
        (["{a}/choices.json", "--by", "luck"], 2, "luck"),
        (["{a}/choices.json", "--limit", "0"], 2, "limit"),
        (["{a}/choices.json", "--set", "max_frames"], 2, "is not KEY=VALUE"),
        (["{a}/choices.json", "--set", "frames=3"], 1, "frames"),
        (["{a}/choices.json", "--out", "{a}/first.mp4"], 1, "cannot be written"),
        (["{a}/choices.json", "--out", "{a}"], 1, "holds other files"),
        (["{a}/choices.json", "--model", "{a}/none"], 1, "no name of a model"),
        (
            ["{a}/choices.json", "--model", "openai:m", "--base-url", "http://a", "--by", "text"],
            1,
            "how likely options",
        ),
        (["{a}/choices.json", "--model", "openai:m", "--dtype", "bfloat16"], 2, "says nothing about a server's model"),
        (["{a}/choices.json", "--base-url", "http://a"], 2, "is no model of a server"),
    ],
)
def test_mistakes_are_one_message(asked, tiny_checkpoint, words, code, reason):
    write_json(asked / "broken.json", [{"video": "first.mp4", "question": "What?"}])
    write_json(asked / "open.json", [{"video": "first.mp4", "question": "What?", "answer": "a dog"}])
    words = [word.format(a=asked) for word in words]
    given = words if "--model" in words else [*words, "--model", tiny_checkpoint]
    result = kk(*given, code=code)
    assert reason in result.stderr and result.stdout == "" and not (asked / "scores.json").exists()


def test_nothing_heavy_is_loaded_with_the_command():
    heavy = "{'torch', 'transformers', 'av'} & set(sys.modules)"
    code = f"import sys, kokanee.cli_qa, kokanee.questions; print(*({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
