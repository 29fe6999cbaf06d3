"""One command as several processes on this machine, with torch's launcher; a mistake in them is told once, by it."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kokanee.errors import KokaneeError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
WATCHED_S = 1.0
FOLLOWED = "KOKANEE_FOLLOWED"  # the process without which a command is to end


def is_worker() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Whether this process speaks for all: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def check_devices(processes: int) -> None:
    """Raise `KokaneeError` where there are GPUs, but not one for each of so many processes."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if count < processes:
        raise KokaneeError(
            f"{processes} processes need a GPU each, and there {'is 1' if count == 1 else f'are {count}'}. Give fewer "
            "processes, and raise accumulate by as much for the same batches, or device: cpu."
        )


def check_gpu(device: str) -> None:
    """Raise `KokaneeError` where a recipe's device is a GPU, and there is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise KokaneeError("device: cuda, but there is no GPU that torch can use. Give auto or cpu.")


def launch(processes: int, command: Sequence[str]) -> int:
    """Run `kokanee COMMAND` as several processes; the exit code. Raises the `KokaneeError` that one of them left."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[FOLLOWED] = str(os.getpid())
    for name in ("torch.distributed.elastic", *logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # some have levels of their own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(processes), "--module", "kokanee", *command]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        told = failure.error_file_data.get("message")
        if isinstance(told, str) and told:
            raise KokaneeError(told) from None
        return failure.exitcode if 0 < failure.exitcode < 128 else 1
    except SignalException:
        raise KeyboardInterrupt from None
    finally:
        os.environ.pop(FOLLOWED, None)
    return 0


def follow() -> None:
    """End this process when the one that began it is gone, if that says that it wants so or is torch's launcher; and
    all that this one began."""
    starter = int(os.environ.pop(FOLLOWED, 0)) or (os.getppid() if ERROR_FILE in os.environ else 0)
    if starter:
        threading.Thread(target=end_with, args=(starter,), daemon=True).start()


def end_with(starter: int) -> None:
    """End this process when the one that began it is gone, which may be so already: nobody else would."""
    while os.getppid() == starter:
        time.sleep(WATCHED_S)
    os._exit(1)


@contextmanager
def as_worker() -> Iterator[None]:
    """The work of one of several processes; a launched one ends with the block.

    It ends at once, as taking gloo's connections down can wait for a process that has ended. A `KokaneeError` is left
    to the launcher, which tells it once.
    """
    code = 0
    try:
        yield
    except KokaneeError as error:
        path = os.environ.get(ERROR_FILE)
        if not (is_worker() and path):
            raise
        code = 1
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": str(error), "timestamp": int(time.time())}, file)
    if is_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
