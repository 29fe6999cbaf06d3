"""Steps of a long piece of work, each a few `kokanee` commands in processes of their own, done once and in order.

`steps.jsonl` says which steps are done and how long they took; what the commands say goes to `logs/STEP.txt`. Work
that is stopped goes on with the step that was under way, and that with what its command had done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl, read_jsonl
from kokanee.launch import FOLLOWED

DONE, LOGS = "steps.jsonl", "logs"
POLLED_S = 0.2
LINE_EVERY_S = "5"


@dataclass(frozen=True)
class Step:
    """Some commands (the words after `kokanee`). together: how many of them run at once. minutes: about how long it
    takes on the machine that was measured, to say what is left."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    minutes: float
    together: int = 1


@dataclass(frozen=True)
class Told:
    """How far the work is: which step is under way, the last line that its command said, minutes that are left."""

    step: Step
    number: int
    n_steps: int
    line: str
    minutes_left: float


Report = Callable[[Told], None]


def run_steps(steps: Sequence[Step], folder: Path, threads: int, report: Report) -> int:
    """Do what is not done yet; how many steps that were. `threads`: of each process.

    `report` is called at the beginning of each step and while it is under way. Raises `KokaneeError` with what a
    command said when it failed.
    """
    done = {record["name"] for record in ended(folder)}
    left = [step for step in steps if step.name not in done]
    for step in left:
        number, started = steps.index(step) + 1, time.monotonic()
        ended_well = False

        def tell(line: str, step: Step = step, number: int = number, started: float = started) -> None:
            since = (time.monotonic() - started) / 60
            report(Told(step, number, len(steps), line, minutes_left(steps, folder, step, since)))

        tell("")
        try:
            run_commands(step, folder / LOGS / f"{step.name}.txt", threads, tell)
            ended_well = True
        finally:
            seconds = round(time.monotonic() - started, 1)
            append_jsonl(folder / DONE, [{"name": step.name, "seconds": seconds, "ended": ended_well}])
    return len(left)


def run_commands(step: Step, log: Path, threads: int, tell: Callable[[str], None]) -> None:
    """Run the commands of a step. Raises `KokaneeError` for the first that fails, when none is under way any more."""
    log.parent.mkdir(parents=True, exist_ok=True)
    waiting, under_way, failed = list(step.commands), [], []
    with log.open("a", encoding="utf-8") as file:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < step.together and not failed:
                    under_way.append(begun(waiting.pop(0), file, threads))
                time.sleep(POLLED_S)
                over = [process for process in under_way if process.poll() is not None]
                under_way = [process for process in under_way if process not in over]
                failed += [process for process in over if process.returncode]
                if failed:
                    waiting.clear()
                tell(last_line(log))
        finally:
            for process in under_way:
                process.terminate()
            for process in under_way:
                process.wait()
    if failed:
        raise KokaneeError(f"{step.name}: {error_in(log)} What else it said is in {log}.")


def begun(command: Sequence[str], log: Any, threads: int) -> subprocess.Popen[bytes]:
    """A process that runs `kokanee COMMAND`, and ends when this one does."""
    log.write(f"$ kokanee {' '.join(command)}\n")
    log.flush()
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "KOKANEE_LINE_EVERY_S": LINE_EVERY_S}
    env[FOLLOWED] = str(os.getpid())
    words = [sys.executable, "-m", "kokanee", *command]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)


def last_line(log: Path) -> str:
    """The last line of a log, without those that say which command follows."""
    lines = [line for line in tail(log).splitlines() if line.strip() and not line.startswith("$ ")]
    return lines[-1].strip() if lines else ""


def error_in(log: Path) -> str:
    """What the last command that failed said of it."""
    said = tail(log)
    return said.rpartition("Error: ")[2].strip() if "Error: " in said else f"It failed. {last_line(log)}"


def tail(log: Path, size: int = 4000) -> str:
    """The end of a log."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - size))
        return file.read().decode("utf-8", "replace")


def ended(folder: Path) -> list[dict[str, Any]]:
    """The steps that are done, in the order in which they were."""
    return [record for record in records(folder) if record["ended"]]


def records(folder: Path) -> list[dict[str, Any]]:
    """All beginnings of steps that came to an end, or were stopped in a way that left time to note it."""
    return read_jsonl(folder / DONE) if (folder / DONE).is_file() else []


def seconds_of(folder: Path) -> dict[str, float]:
    """How long each step took, all its beginnings together."""
    found: dict[str, float] = {}
    for record in records(folder):
        found[record["name"]] = found.get(record["name"], 0.0) + record["seconds"]
    return found


def minutes_left(steps: Sequence[Step], folder: Path, under_way: Step, since: float = 0.0) -> float:
    """About how many minutes are left: what steps are said to take, by how much longer or shorter they took so far."""
    took, known = seconds_of(folder), {step.name: step.minutes for step in steps}
    done = {record["name"] for record in ended(folder)}
    expected = sum(known.get(name, 0.0) for name in done)
    pace = sum(took[name] for name in done) / 60 / expected if expected else 1.0
    left = sum(step.minutes for step in steps if step.name not in done)
    return max(pace * left - min(since, pace * under_way.minutes), 0.0)
