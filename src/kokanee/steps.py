"""Steps of a long piece of work, each a few `kokanee` commands in processes of their own, done once and in order.

`steps.jsonl` says which steps are done and how long they took; what the commands say goes to `logs/STEP.txt`. Work
that is stopped goes on with the step that was under way, and that with what its command had done.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kokanee.errors import KokaneeError
from kokanee.formats import read_jsonl, write_jsonl
from kokanee.launch import FOLLOWED

DONE, LOGS = "steps.jsonl", "logs"
POLLED_S = 0.2
LINE_EVERY_S = "5"
NOTED_EVERY_S = 60.0  # a step that is killed has taken so much more at most
TAIL = 4000  # bytes


@dataclass(frozen=True)
class Step:
    """Some commands (the words after `kokanee`). minutes: about how long they take on the machine that was measured, to
    say what is left. together: how many of them run at once. made: of each command the file that it writes, whole or
    not at all; where it is there, the command is not called again."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    minutes: float
    together: int = 1
    made: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """How far the work is: which step is under way, the last line that its command said, minutes that are left."""

    step: Step
    number: int
    n_steps: int
    line: str
    minutes_left: float


Report = Callable[[Told], None]


def run_steps(steps: Sequence[Step], folder: Path, threads: int, device: Callable[[Step], str], report: Report) -> int:
    """Do what is not done yet, with `folder` as the working directory; how many steps that were. `threads`: of each
    process; `device`: what to note that a step ran on.

    `report` is called at the beginning of each step and while it is under way. Raises `KokaneeError` with what a
    command said when it failed.
    """
    left = [step for step in steps if not is_done(step, folder)]
    for step in left:
        clock = Clock(step.name, device(step), folder)

        def tell(line: str, step: Step = step, clock: Clock = clock) -> None:
            if clock.since_noted_s > NOTED_EVERY_S:
                clock.note()
            report(Told(step, steps.index(step) + 1, len(steps), line, minutes_left(steps, folder)))

        tell("")
        try:
            run_commands(step, folder, threads, tell)
        except BaseException:
            clock.note()
            raise
        clock.note(ended=True)
    return len(left)


class Clock:
    """How long a step has taken since it began, as the last record of `steps.jsonl`."""

    def __init__(self, step: str, device: str, folder: Path) -> None:
        self.step, self.device, self.path, self.before = step, device, folder / DONE, records(folder)
        self.began_s = self.noted_s = time.monotonic()

    @property
    def since_noted_s(self) -> float:
        return time.monotonic() - self.noted_s

    def note(self, ended: bool = False) -> None:
        """Write it down in place of what was written of this beginning before."""
        self.noted_s = time.monotonic()
        seconds = round(self.noted_s - self.began_s, 1)
        record = {"name": self.step, "seconds": seconds, "ended": ended, "device": self.device}
        write_jsonl(self.path, [*self.before, record])


def run_commands(step: Step, folder: Path, threads: int, tell: Callable[[str], None]) -> None:
    """Run the commands of a step. Raises `KokaneeError` for the first that fails, when none is under way any more."""
    waiting = [Command(words, folder, step.name, number) for number, words in enumerate(step.commands, 1)]
    waiting = [one for one, file in zip_longest(waiting, step.made) if not (file and (folder / file).is_file())]
    under_way: list[Command] = []
    failed: list[Command] = []
    try:
        while waiting or under_way:
            while waiting and len(under_way) < step.together and not failed:
                under_way.append(waiting.pop(0).begin(threads))
            time.sleep(POLLED_S)
            over = [command for command in under_way if command.code is not None]
            under_way = [command for command in under_way if command not in over]
            failed += [command for command in over if command.code]
            if failed:
                waiting.clear()
            if under_way:
                tell(under_way[-1].last_line())
    finally:
        for command in under_way:
            command.stop()
    if failed:
        raise KokaneeError(f"{step.name}: {failed[0].error()} What else it said is in {failed[0].log}.")


class Command:
    """One `kokanee` command of a step: a process with a log of its own, which ends when this process does."""

    def __init__(self, words: Sequence[str], folder: Path, step: str, number: int) -> None:
        self.words, self.folder = words, folder
        self.log = folder / LOGS / (f"{step}.txt" if number == 1 else f"{step}-{number}.txt")
        self.process: subprocess.Popen[bytes] | None = None
        self.start = 0

    def begin(self, threads: int) -> Command:
        """Start it; what it says is added to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "KOKANEE_LINE_EVERY_S": LINE_EVERY_S}
        env[FOLLOWED] = str(os.getpid())
        with self.log.open("ab") as log:
            log.write(f"$ {shown(self.words)}\n".encode())
            log.flush()
            self.start = log.tell()
            command = [sys.executable, "-m", "kokanee", *self.words]
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        return self

    @property
    def code(self) -> int | None:
        """Its exit code; None while it is under way."""
        assert self.process is not None
        return self.process.poll()

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait()

    def said(self) -> str:
        """What it has said since it began, of much the end."""
        with self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(self.start, file.tell() - TAIL))
            return file.read().decode("utf-8", "replace")

    def last_line(self) -> str:
        """The last thing that it said, no data."""
        lines = [line.strip() for line in self.said().splitlines() if line.strip() and line[0] not in "{|"]
        return lines[-1] if lines else ""

    def error(self) -> str:
        """Why it failed."""
        if self.code is not None and self.code < 0:
            return f"It was ended by the signal {-self.code}; where that is 9, perhaps for want of memory."
        _, found, told = self.said().rpartition("Error: ")
        return told.strip() if found else f"It failed. {self.last_line()}".strip()


def shown(words: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["kokanee", *words])


def is_done(step: Step, folder: Path) -> bool:
    """Whether nothing is left to do of a step: it has ended, and what it makes is there."""
    done = {record["name"] for record in ended(folder)}
    return step.name in done and all((folder / file).is_file() for file in step.made)


def ended(folder: Path) -> list[dict[str, Any]]:
    """The steps that are done, in the order in which they were."""
    return [record for record in records(folder) if record["ended"]]


def records(folder: Path) -> list[dict[str, Any]]:
    """All beginnings of steps, but those of which nothing was noted before they were killed."""
    return read_jsonl(folder / DONE) if (folder / DONE).is_file() else []


def seconds_of(folder: Path) -> dict[str, float]:
    """How long each step took, all its beginnings together."""
    found: dict[str, float] = {}
    for record in records(folder):
        found[record["name"]] = found.get(record["name"], 0.0) + record["seconds"]
    return found


def minutes_left(steps: Sequence[Step], folder: Path) -> float:
    """About how many minutes are left: what steps are said to take, by how much longer or shorter they took so far,
    but for what those that are under way have taken."""
    took, done = seconds_of(folder), [step for step in steps if is_done(step, folder)]
    expected = sum(step.minutes for step in done)
    pace = sum(took[step.name] for step in done) / 60 / expected if expected else 1.0
    begun: dict[str, float] = {}
    for record in records(folder):
        begun[record["name"]] = 0.0 if record["ended"] else begun.get(record["name"], 0.0) + record["seconds"]
    left = [pace * step.minutes - begun.get(step.name, 0.0) / 60 for step in steps if step not in done]
    return sum(max(minutes, 0.0) for minutes in left)
