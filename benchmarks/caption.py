"""Time and peak memory of captioning a clip from a cold start, start-up apart from work.

    python benchmarks/caption.py [examples/clip.mp4] [--repeats 5]

Each row is a fresh process; medians, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import torch
import transformers

IMPORT = "import torch, transformers, kokanee.captioner"
LOAD = "from kokanee import Captioner; Captioner.from_pretrained('nano')"
WORK = """
import time
from kokanee import Captioner
captioner = Captioner.from_pretrained('nano')
started = time.perf_counter()
captioner.caption({clip!r})
print(time.perf_counter() - started)
"""


def run(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak resident memory in MB and the output of a fresh process."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} … ended with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024, output


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("clip", nargs="?", default="examples/clip.mp4")
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    kokanee = [sys.executable, "-m", "kokanee"]
    rows = {
        "`kokanee --help`": [*kokanee, "--help"],
        "importing torch, transformers and Kokanee": [sys.executable, "-c", IMPORT],
        "the same and loading nano": [sys.executable, "-c", LOAD],
        f"`kokanee caption {given.clip}`": [*kokanee, "caption", given.clip],
    }
    results: dict[str, list[tuple[float, float, str]]] = {name: [] for name in rows}
    work = []
    for _ in range(given.repeats):
        for name, command in rows.items():
            results[name].append(run(command))
        work.append(float(run([sys.executable, "-c", WORK.format(clip=given.clip)])[2]))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ",
        end="",
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {given.repeats} runs\n")
    print("| what | seconds, median (least to most) | peak memory, MB |\n|---|---|---|")
    for name, found in results.items():
        seconds = [one[0] for one in found]
        memory = statistics.median(one[1] for one in found)
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {memory:.0f} |"
        )
    spread = f"{statistics.median(work):.2f} ({min(work):.2f} to {max(work):.2f})"
    print(f"| reading, encoding and captioning alone, in a warm process | {spread} | |")


if __name__ == "__main__":
    main()
