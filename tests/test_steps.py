"""Laws of steps: each is done once and in order, what fails is told, what is stopped goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kokanee.errors import KokaneeError
from kokanee.steps import Step, Told, error_in, minutes_left, records, run_steps, seconds_of

GOOD = ("--version",)
BAD = ("train", "nowhere.yaml", "--out", "out")


def nothing(told: Told) -> None:
    pass


def test_steps_are_done_once_and_in_order(tmp_path):
    steps = [Step("one", "", (GOOD,), 1.0), Step("two", "", (GOOD, GOOD), 2.0, together=2)]
    told: list[Told] = []
    assert run_steps(steps, tmp_path, 1, told.append) == 2
    assert [record["name"] for record in records(tmp_path)] == ["one", "two"]
    assert [one.step.name for one in told if not one.line][:1] == ["one"] and told[-1].line.startswith("kokanee ")
    assert (tmp_path / "logs" / "two.txt").read_text().count("$ kokanee --version") == 2
    assert run_steps(steps, tmp_path, 1, nothing) == 0


def test_a_step_that_fails_says_why_and_is_the_next_to_be_done(tmp_path):
    steps = [Step("good", "", (GOOD,), 1.0), Step("bad", "", (BAD, GOOD), 1.0), Step("last", "", (GOOD,), 1.0)]
    with pytest.raises(KokaneeError, match=r"bad: nowhere\.yaml is not there.* is in .*bad\.txt"):
        run_steps(steps, tmp_path, 1, nothing)
    assert [(record["name"], record["ended"]) for record in records(tmp_path)] == [("good", True), ("bad", False)]
    assert "--version" not in (tmp_path / "logs" / "bad.txt").read_text()
    mended = [steps[0], Step("bad", "", (GOOD,), 1.0), steps[2]]
    assert run_steps(mended, tmp_path, 1, nothing) == 2


def test_what_a_command_says_last_of_its_error_is_told(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("Error: an old one.\n$ kokanee x\nhalf\nError: the new\none.\n")
    assert error_in(log) == "the new\none."
    log.write_text("$ kokanee x\nSegmentation fault\n")
    assert error_in(log) == "It failed. Segmentation fault"


def test_what_is_left_follows_from_how_long_steps_took(tmp_path):
    steps = [Step(name, "", (GOOD,), minutes) for name, minutes in (("one", 1.0), ("two", 10.0), ("three", 20.0))]
    assert minutes_left(steps, tmp_path, steps[0]) == 31.0
    (tmp_path / "steps.jsonl").write_text(
        '{"name": "one", "seconds": 30, "ended": false}\n{"name": "one", "seconds": 90, "ended": true}\n'
    )
    assert seconds_of(tmp_path) == {"one": 120.0}
    assert minutes_left(steps, tmp_path, steps[1]) == 60.0  # the machine takes twice as long
    assert minutes_left(steps, tmp_path, steps[1], since=5.0) == 55.0
    assert minutes_left(steps, tmp_path, steps[1], since=500.0) == 40.0


def test_a_command_ends_when_the_one_who_began_it_is_killed(tmp_path):
    """Its child would go on for a minute."""
    script = tmp_path / "starter.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom kokanee.steps import begun\n"
        "code = 'import time; from kokanee.launch import follow; follow(); print(1, flush=True); time.sleep(60)'\n"
        "import kokanee.steps as steps\n"
        "real = steps.subprocess.Popen\n"
        "steps.subprocess.Popen = lambda words, **how: real([sys.executable, '-c', code], **how)\n"
        "process = begun(('x',), open(sys.argv[1], 'w'), 1)\nprint(process.pid, flush=True)\nprocess.wait()\n"
    )
    log = tmp_path / "log.txt"
    starter = subprocess.Popen([sys.executable, str(script), str(log)], stdout=subprocess.PIPE, text=True)
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
