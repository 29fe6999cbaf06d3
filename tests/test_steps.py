"""Laws of steps: each is done once and in order, what fails is told, what is stopped goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kokanee import steps as steps_module
from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl
from kokanee.steps import Command, Step, Told, minutes_left, records, run_steps, seconds_of, shown

GOOD = ("--version",)
BAD = ("train", "nowhere.yaml", "--out", "out")


def nothing(told: Told) -> None:
    pass


def here(step: Step) -> str:
    return "here"


def test_steps_are_done_once_and_in_order(tmp_path):
    steps = [Step("one", "", (GOOD,), 1.0), Step("two", "", (GOOD, GOOD), 2.0, together=2)]
    told: list[Told] = []
    assert run_steps(steps, tmp_path, 1, here, told.append) == 2
    assert [(record["name"], record["device"]) for record in records(tmp_path)] == [("one", "here"), ("two", "here")]
    assert list(dict.fromkeys((one.number, one.step.name) for one in told)) == [(1, "one"), (2, "two")]
    for log in ("one.txt", "two.txt", "two-2.txt"):
        assert (tmp_path / "logs" / log).read_text().startswith("$ kokanee --version\nkokanee ")
    assert run_steps(steps, tmp_path, 1, here, nothing) == 0


def test_a_step_that_fails_says_why_and_is_the_next_to_be_done(tmp_path):
    steps = [Step("good", "", (GOOD,), 1.0), Step("bad", "", (BAD, GOOD), 1.0), Step("last", "", (GOOD,), 1.0)]
    with pytest.raises(KokaneeError, match=r"bad: nowhere\.yaml is not there.* is in .*bad\.txt"):
        run_steps(steps, tmp_path, 1, here, nothing)
    assert [(record["name"], record["ended"]) for record in records(tmp_path)] == [("good", True), ("bad", False)]
    assert "--version" not in (tmp_path / "logs" / "bad.txt").read_text()
    mended = [steps[0], Step("bad", "", (GOOD,), 1.0), steps[2]]
    assert run_steps(mended, tmp_path, 1, here, nothing) == 2


def test_what_a_command_says_of_its_error_is_told_and_not_what_an_earlier_one_said(tmp_path):
    command = Command(BAD, tmp_path, "bad", 1)
    command.log.parent.mkdir()
    command.log.write_text("$ kokanee x\nError: an old one.\n")
    command.begin(1)
    until(lambda: command.code is not None)
    assert command.error().startswith("nowhere.yaml is not there") and "old" in command.log.read_text()
    with command.log.open("a") as log:
        command.start = log.tell()
        log.write("half\nSegmentation fault\n")
    assert command.error() == "It failed. Segmentation fault"


def test_a_command_that_a_signal_ended_says_so(tmp_path):
    command = Command(("env",), tmp_path, "killed", 1).begin(1)
    assert command.process is not None
    command.process.kill()
    until(lambda: command.code is not None)
    assert command.error() == "It was ended by the signal 9; where that is 9, perhaps for want of memory."


def test_a_command_whose_file_is_there_is_not_called_again(tmp_path):
    (tmp_path / "one.json").touch()
    step = Step("marks", "", (BAD, GOOD), 1.0, together=2, made=("one.json", "two.json"))
    assert run_steps([step], tmp_path, 1, here, nothing) == 1
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["marks-2.txt"]


def test_a_step_that_is_to_make_more_than_it_did_is_done_again(tmp_path):
    (tmp_path / "one.json").touch()
    one, two = (Step("marks", "", (GOOD,) * count, 1.0, made=("one.json", "two.json")[:count]) for count in (1, 2))
    assert run_steps([one], tmp_path, 1, here, nothing) == 1 and run_steps([one], tmp_path, 1, here, nothing) == 0
    assert run_steps([two], tmp_path, 1, here, nothing) == 1 and (tmp_path / "logs" / "marks-2.txt").is_file()
    assert minutes_left([two], tmp_path) == 1.0


def test_how_long_a_step_takes_is_noted_while_it_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(steps_module, "NOTED_EVERY_S", 0.0)
    monkeypatch.setattr(steps_module, "POLLED_S", 0.01)
    seen = []
    step = Step("one", "", (GOOD,), 1.0)
    run_steps([step], tmp_path, 1, here, lambda told: seen.append(records(tmp_path)))
    noted = [kept[0]["seconds"] for kept in seen if kept]
    assert noted == sorted(noted) and len(set(noted)) > 1 and all(not kept[0]["ended"] for kept in seen if kept)
    (record,) = records(tmp_path)
    assert record["ended"] and record["seconds"] >= noted[-1] and max(map(len, seen)) == 1


def test_commands_are_shown_as_one_would_type_them():
    assert shown(("train", "my runs/a.yaml")) == "kokanee train 'my runs/a.yaml'"


def test_what_is_left_follows_from_how_long_steps_took(tmp_path):
    steps = [Step(name, "", (GOOD,), minutes) for name, minutes in (("one", 1.0), ("two", 10.0), ("three", 20.0))]
    assert minutes_left(steps, tmp_path) == 31.0
    (tmp_path / "steps.jsonl").write_text(
        '{"name": "one", "seconds": 30, "ended": false}\n{"name": "one", "seconds": 90, "ended": true}\n'
    )
    assert seconds_of(tmp_path) == {"one": 120.0}
    assert minutes_left(steps, tmp_path) == 60.0  # the machine takes twice as long
    for minutes, left in ((5, 55.0), (10, 45.0), (500, 40.0)):  # of several beginnings
        append_jsonl(tmp_path / "steps.jsonl", [{"name": "two", "seconds": 60 * minutes, "ended": False}])
        assert minutes_left(steps, tmp_path) == left


def test_a_command_ends_when_the_one_who_began_it_is_killed(tmp_path):
    """Its child would go on for a minute."""
    script = tmp_path / "starter.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport kokanee.steps as steps\n"
        "code = 'import time; from kokanee.launch import follow; follow(); print(1, flush=True); time.sleep(60)'\n"
        "real = steps.subprocess.Popen\n"
        "steps.subprocess.Popen = lambda words, **how: real([sys.executable, '-c', code], **how)\n"
        "process = steps.Command(('x',), Path(sys.argv[1]), 'step', 1).begin(1).process\n"
        "print(process.pid, flush=True)\nprocess.wait()\n"
    )
    log = tmp_path / "logs" / "step.txt"
    starter = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    until(lambda: log.read_text().endswith("1\n"))
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    until(lambda: not Path(f"/proc/{child}").exists() or zombie(child))


def until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def zombie(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True
