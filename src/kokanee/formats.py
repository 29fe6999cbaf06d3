"""Records on disk: JSON written whole or not at all, and JSON lines that only grow."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kokanee.errors import KokaneeError

UTF8: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
"""How text is stored: UTF-8, and names of files that are none byte by byte as they are."""

LOCK = ".lock"
LOCK_WAIT_S = 8.0  # a process that made batches notices within 5 s that the one it worked for is gone
UNFINISHED = ".tmp"
UMASK = os.umask(0)
os.umask(UMASK)
READABLE = 0o666 & ~UMASK
"""The permissions of new files; safetensors by itself writes files that only their owner can read."""


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old file or the new one, never a half."""
    with replaced_file(path) as unfinished:
        unfinished.write_text(text, **UTF8)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes the place of `path` (or of what it links to) when the block ends well.

    What is there and is no file, such as a pipe, is written to directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        unfinished.chmod(READABLE)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise `KokaneeError` where no file could be written to `path`; folders on the way to it may be missing."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if there.is_dir() == (there == path) or not os.access(there, os.W_OK):
        raise KokaneeError(f"{path} cannot be written: {there} is in the way or write-protected. Choose another place.")
    folder = there if there.is_dir() else there.resolve().parent if there.is_file() else None
    if folder is not None:
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass  # access rights alone do not tell of a file system that takes no files
        except OSError as error:
            raise KokaneeError(
                f"{path} cannot be written: {folder} ({error.strerror}). Choose another place."
            ) from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `KokaneeError` if it is missing or broken."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(**UTF8))
    except FileNotFoundError:
        raise KokaneeError(f"{path} is missing. Give the folder of a complete checkpoint.") from None
    except (OSError, ValueError) as error:
        raise KokaneeError(f"{path} is not readable JSON ({error}). Download or copy it again.") from error
    if not isinstance(found, dict):
        raise KokaneeError(f"{path} holds a {type(found).__name__}, not an object. Download or copy it again.")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    try:
        text.encode(**UTF8)
    except UnicodeEncodeError:  # half characters, which only an escape can tell
        text = json.dumps(value, indent=2) + "\n"
    write_text(path, text)


def whole_text(text: str) -> str:
    """A text whose half characters (lone surrogates, which no file can hold) are put together or replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add records to the end of a file, one line each, and see them onto the disk; see `mend_end`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mend_end(path)
    with path.open("a", **UTF8) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        if path.is_file():
            os.fsync(file.fileno())


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records, one line each, whole or not at all."""
    with replaced_file(path) as unfinished, unfinished.open("w", **UTF8) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def drop_half_start(path: Path) -> None:
    """Remove a file of records in which there is only half of the first one, as a killed writer leaves it."""
    if path.is_file() and b"\n" not in path.read_bytes() and parsed(path.read_bytes()) is None:
        path.unlink()


def mend_end(path: Path) -> None:
    """End the last line of a file of records; where it is no JSON, a writer that was killed left it, and it is cut off.

    Raises `KokaneeError` for a file that does not begin with a record: it holds something else, and is left as it is.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        if not isinstance(parsed(file.readline().removeprefix(codecs.BOM_UTF8)), dict):
            raise KokaneeError(f"{path} does not begin with a record, so none is added. Choose another file.")
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        text = file.read()
        last = text.rfind(b"\n") + 1
        if parsed(text[last:].removeprefix(codecs.BOM_UTF8)) is None:
            file.truncate(last)
        else:
            file.write(b"\n")


def parsed(line: bytes) -> Any:
    """The JSON value of a line; None where it is none."""
    try:
        return json.loads(line.decode(**UTF8))
    except ValueError:
        return None


def read_jsonl(path: str | Path, whole: bool = False) -> list[dict[str, Any]]:
    """All lines of a file, without half a line at its end. Raises `KokaneeError` for another line that is no JSON;
    whole: also for the last."""
    path = Path(path)
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Check the path.")
    records = []
    # str.splitlines would also cut at characters such as U+2028, which JSON texts may hold.
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line.decode(**UTF8)))
        except ValueError as error:
            if number == len(lines) and ((records and not whole) or not line):
                break
            raise KokaneeError(f"{path}, line {number} is not JSON ({error}). Mend or remove the line.") from error
    return records


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else works in the folder meanwhile; one that is made for this and stays empty is removed again.

    Raises `KokaneeError` where somebody does.
    """
    with holding(folder / LOCK, folder):
        yield


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Nobody else adds to the file meanwhile, or to what it links to. What is there and is no file, such as a pipe,
    anybody may write to. Raises `KokaneeError` where somebody does."""
    if path.exists() and not path.is_file():
        yield
        return
    path = path.resolve()
    with holding(path.with_name(f".{path.name}{LOCK}"), path):
        yield


@contextlib.contextmanager
def holding(lock: Path, what: Path) -> Iterator[None]:
    """Hold a lock on `what`, and leave nothing of it behind. Raises `KokaneeError` where another process holds it."""
    made = not lock.parent.exists()
    # The system lets go of the lock when the process ends, however it ends, and those that it had forked.
    held = FileLock(lock)
    try:
        while not held.is_locked:
            with contextlib.suppress(FileNotFoundError):  # whoever had made the folder has just removed it
                try:
                    held.acquire(timeout=LOCK_WAIT_S)  # makes the folder
                except FileExistsError as error:  # there was one and it is gone, or there is something else
                    if not stat.S_ISDIR(os.lstat(error.filename).st_mode):
                        raise
    except Timeout:
        raise KokaneeError(f"Another process works in {what}. Wait for it, or end it.") from None
    try:
        yield
    finally:
        # While it is held, as whoever gets hold of a lock without a name takes a new one; on Windows, where this cannot
        # be, the release removes it.
        with contextlib.suppress(OSError):
            lock.unlink()
        held.release()
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                lock.parent.rmdir()


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left half written in a run's own folder."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def refuse_foreign(folder: Path, state: str, brought: Sequence[str] = ()) -> None:
    """Raise `KokaneeError` for a folder that holds files, but not the file `state` of an earlier run in it. Hidden
    files do not count, nor do those named in `brought`."""
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    names = sorted(name for name in there if name[0] != "." and name not in brought)
    if names and state not in names:
        raise KokaneeError(f"{folder} holds other files (such as {names[0]}) and no {state}. Choose an empty folder.")


def flat(settings: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Settings inside settings, each by its whole name, such as data.train.videos; `name`: of what they are inside."""
    found = {}
    for key, value in settings.items():
        whole = f"{name}.{key}" if name else key
        found |= flat(value, whole) if isinstance(value, dict) else {whole: value}
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two settings, a phrase for each of them, those inside others by their whole names."""
    before, now = flat(before), flat(now)
    return [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]
