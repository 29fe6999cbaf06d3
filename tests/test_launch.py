"""Laws of several processes: those that a launcher started do not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kokanee.errors import KokaneeError
from kokanee.launch import FOLLOWED, check_devices

WORKER = """
import os, time
os.environ |= {{"RANK": "0", "TORCHELASTIC_ERROR_FILE": "none"}}
from kokanee.launch import as_worker, follow
follow()
with as_worker():
    open({pid!r}, "w").write(str(os.getpid()))
    time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").is_dir() else True
    )


def test_a_worker_ends_when_its_launcher_was_killed(tmp_path):
    told = tmp_path / "pid"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER.format(worker=WORKER.format(pid=str(told)))])
    deadline = time.monotonic() + 60
    while not (told.is_file() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(told.read_text())
    assert is_alive(worker)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


def test_a_worker_ends_whose_launcher_was_killed_before_it_began_to_look(tmp_path):
    env = {**os.environ, "RANK": "0", FOLLOWED: "1"}  # the first process of all did not begin it
    worker = "import time; from kokanee.launch import follow; follow(); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", worker], env=env, timeout=30).returncode == 1


def test_processes_without_a_gpu_each_are_told_before_they_are_launched(monkeypatch):
    check_devices(2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_devices(1)
    with pytest.raises(KokaneeError, match=r"2 processes need a GPU each, and there is 1\. Give fewer"):
        check_devices(2)
