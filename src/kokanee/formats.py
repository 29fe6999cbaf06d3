"""Records on disk: JSON written whole or not at all, and JSON lines that only grow."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kokanee.errors import KokaneeError


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old file or the new one, never a half."""
    with replaced_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; the file takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add records to the end of a file, one line each, and see them onto the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_half_line(path)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def drop_half_line(path: Path) -> None:
    """Cut off a last line without an end: what a writer that was killed left behind."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        text = path.read_bytes()
        file.truncate(text.rfind(b"\n") + 1)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, without a half line at its end. Raises `KokaneeError` for a line that is no JSON."""
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Check the path.")
    records = []
    # str.splitlines would also cut at characters such as U+2028, which JSON texts may hold.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise KokaneeError(f"{path}, line {number} is not JSON ({error}). Mend or remove the line.") from error
    return records


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two settings, a phrase for each key."""
    return [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]
