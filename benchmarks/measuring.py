"""Time and memory of several ways to do the same work, measured in turns in one run."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

Work = Callable[[], Any]
Seconds = dict[str, list[float]]


def machine(device: str) -> str:
    """What the numbers were measured on."""
    where = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{where}, Python {platform.python_version()}, {versions}"


def interleaved(works: Mapping[str, Work], repeats: int, device: str) -> Seconds:
    """Seconds of each work, done in turns: the first, the second, ..., the first, the second, ..."""
    seconds: Seconds = {name: [] for name in works}
    for repeat in range(repeats):
        for name, work in works.items():
            wait(device)
            started = time.perf_counter()
            work()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
            print(f"{repeat=} {name}: {seconds[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return seconds


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(seconds: list[float]) -> str:
    """Median (least to most)."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def table_head(cell: str) -> str:
    """The head of the table that `table_rows` fills; `cell` says what is in its first column."""
    columns = (cell, "way", "text: s, median (least to most)", "times ours", "peak MB")
    columns = (*columns, "media: s, encoders included", "times ours", "peak MB")
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def table_rows(
    cell: str, ways: Sequence[str], seconds: Mapping[str, Seconds], memory: Mapping[str, Mapping[str, float | None]]
) -> str:
    """A line for each way, the first of which is ours: seconds and peak memory on each kind of prompt."""
    lines = []
    for way in ways:
        parts = []
        for kind, of_kind in seconds.items():
            taken, ours, peak = of_kind.get(way), of_kind[ways[0]], memory[way][kind]
            ratio = f"{statistics.median(taken) / statistics.median(ours):.2f}" if taken else ""
            parts += [spread(taken) if taken else "", ratio, "" if peak is None else f"{peak:.0f}"]
        lines.append(f"| {cell} | {way} | {' | '.join(parts)} |")
    return "\n".join(lines)


def peak_mb(work: Work, device: str) -> float:
    """MB that the work takes at its highest, above what was there: of tensors on CUDA, else resident (Linux)."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # so that nothing that was freed is taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the highest is forgotten
    before = resident_mb("VmRSS")
    work()
    return resident_mb("VmHWM") - before


def resident_mb(field: str) -> float:
    """A figure of this process's memory: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def in_own_process(*arguments: str) -> Any:
    """What the running script prints last, as JSON, when it is called again with these arguments added."""
    command = [sys.executable, *sys.argv, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def product(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Work:
    """A plain matrix product of so many rows, inner and outer columns: how fast the device multiplies."""
    rows, inner, outer = shape
    left, right = (torch.randn(size, device=device).to(dtype) for size in ((rows, inner), (inner, outer)))
    return lambda: left @ right


def reading(n_bytes: int, device: str) -> Work:
    """Adding up so many bytes: how fast the device reads."""
    numbers = torch.ones(n_bytes // 4, device=device)
    return numbers.sum


def gigaflops(macs: float, seconds: list[float]) -> float:
    """10^9 operations a second at the median; a multiply-add is two."""
    return 2e-9 * macs / statistics.median(seconds)
