"""Captions of many files: one record after the other into a file that only grows, so that a run can be killed any time.

A second run with the same settings does what is missing: files without a record, intervals without a caption of files
whose record has an error, and files that have changed since. A run with another question, other settings or other
weights is refused.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import kokanee
from kokanee.captions import BOTH, Caption, Decoding, FileCaptioner, Request, check_samples
from kokanee.errors import KokaneeError
from kokanee.files import file_key
from kokanee.formats import alone_at, append_jsonl, differences
from kokanee.outputs import Record, caption_record, error_record, key_of, read_records

KEPT_EVERY_S = 60.0
NOT_COMPARED = ("base", "kokanee")  # the weights say which model it is
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Task:
    """What every file of a run is asked. question None: the checkpoint's own. Times are in seconds; `every_s` None: the
    whole file (or its part from `start_s` to `end_s`) is one interval."""

    question: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    every_s: float | None = None
    n_samples: int = 1
    use: tuple[str, ...] = BOTH
    decoding: Decoding = field(default_factory=Decoding)

    def request(self, path: Path) -> Request:
        """The question about a file as a whole."""
        return Request(path, self.question, self.start_s, self.end_s, self.use)

    def settings(self, captioner: FileCaptioner) -> dict[str, Any]:
        """The settings as records keep them; those without effect are None."""
        greedy = self.decoding.temperature == 0
        return {
            "start_s": self.start_s,
            "end_s": self.end_s,
            "every_s": self.every_s,
            "samples": self.n_samples,
            "use": list(self.use),
            "temperature": self.decoding.temperature,
            "top_p": None if greedy else self.decoding.top_p,
            "seed": None if greedy else self.decoding.seed,
            "max_new_tokens": self.decoding.max_new_tokens,
            "repetition_penalty": None if self.decoding.repetition_penalty == 1 else self.decoding.repetition_penalty,
            "kokanee": kokanee.__version__,
            **captioner.identity(),
        }

    def record(
        self, captioner: FileCaptioner, path: Path, captions: Sequence[Caption], version: dict[str, Any]
    ) -> Record:
        """The record of a file with these captions; version: `version_of` the file from before it was read."""
        question = self.question or captioner.defaults.question
        return caption_record(path, captioner.name, question, self.settings(captioner), captions) | version


@dataclass(frozen=True)
class Failed:
    """An interval that has no caption, and why."""

    start_s: float
    end_s: float
    error: str


class Stopped(KeyboardInterrupt):
    """Ctrl-C in the middle of a file's intervals: `record` has those that were done."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record


@dataclass
class Summary:
    """How many files have captions now, how many of them had before, and why the others have none."""

    captioned: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def run(
    captioner: FileCaptioner,
    files: Sequence[Path],
    out: Path | None,
    task: Task,
    batch_size: int = 1,
    on_record: Callable[[Record], None] | None = None,
    on_caption: Callable[[Path, Caption], None] | None = None,
) -> Summary:
    """Caption `files` (each once), adding a record of each to `out` (None: to no file).

    `on_record` is told each record, also those of earlier runs, `on_caption` each caption of an interval at once.
    `batch_size` files are captioned together, or with `every_s` as many intervals of a file, whose captions are kept
    once a minute. A file that cannot be captioned gets an error record and does not stop the others. Raises
    `KokaneeError` when `out` was made with other settings, and when another process adds to it.
    """
    check_samples(task.n_samples, task.decoding.temperature)
    with contextlib.nullcontext() if out is None else alone_at(out):
        known = read_records(out) if out is not None and out.is_file() else {}
        check_same(out, known, task.record(captioner, Path(), (), {}))
        summary, waiting = Summary(), []
        for key, path in {file_key(path): path for path in files}.items():
            before = known.get(key)
            if before is None or "error" in before or before != before | version_of(path):
                waiting.append(path)
            else:
                summary.skipped += 1
                summary.captioned += 1
                tell(on_record, before)

        waiting.sort(key=lambda path: file_key(path) in known)  # what was never tried does not wait for what failed

        def keep(record: Record) -> None:
            if out is not None and record != known.get(key_of(record)):
                append_jsonl(out, [record])

        def by_intervals() -> Iterator[Record]:
            for path in waiting:
                heard = partial(on_caption, path) if on_caption else None
                yield caption_one(captioner, path, task, batch_size, known.get(file_key(path)), heard, keep)

        records = by_intervals() if task.every_s else whole_records(captioner, waiting, task, batch_size)
        try:
            for record in records:
                keep(record)
                if "error" in record:
                    summary.failed[record["file"]] = record["error"]
                else:
                    summary.captioned += 1
                tell(on_record, record)
        except Stopped as stopped:
            keep(stopped.record)
            raise
        return summary


def tell(on_record: Callable[[Record], None] | None, record: Record) -> None:
    if on_record is not None:
        on_record(record)


def check_same(out: Path | None, known: dict[str, Record], now: Record) -> None:
    """Raise `KokaneeError` with what differs, where `out` holds captions made with other settings."""
    for record in known.values():
        if "settings" not in record:
            continue
        differing = differences(compared(record), compared(now))
        if differing:
            raise KokaneeError(
                f"{out} holds captions made with other settings ({'; '.join(differing)}). "
                "Continue with the old settings, or write to another file."
            )


def compared(record: Record) -> dict[str, Any]:
    """What records of one run have in common, each setting of the processor by its own name."""
    settings = {name: value for name, value in record["settings"].items() if name not in NOT_COMPARED}
    return {"question": record["question"]} | settings.pop("processor", {}) | settings


def version_of(path: Path) -> dict[str, Any]:
    """What tells whether a file has changed: its size in bytes and when it was written. Nothing of a missing file."""
    try:
        found = path.stat()
    except OSError:
        return {}
    return {"size_bytes": found.st_size, "modified_s": found.st_mtime}


def whole_records(captioner: FileCaptioner, paths: Sequence[Path], task: Task, batch_size: int) -> Iterator[Record]:
    """The records of files that are captioned as a whole, as they are done; each that fails has its reason."""
    versions: dict[Path, dict[str, Any]] = {}

    def requests() -> Iterator[Request]:
        for path in paths:
            versions[path] = version_of(path)
            yield task.request(path)

    for request, made in captioner.each(requests(), task.decoding, task.n_samples, batch_size):
        path = Path(request.path)
        if isinstance(made, KokaneeError):
            yield error_record(path, str(made))
        else:
            yield task.record(captioner, path, made, versions[path])


def caption_one(
    captioner: FileCaptioner,
    path: Path,
    task: Task,
    batch_size: int = 1,
    before: Record | None = None,
    on_caption: Callable[[Caption], None] | None = None,
    keep: Callable[[Record], None] | None = None,
    in_turn: bool = False,
) -> Record:
    """The record of one file: its captions, and why there are none or not all.

    `on_caption` is told each caption at once, or with `in_turn` when those of all earlier intervals are there; `keep`
    about once a minute what the record would be if nothing came after. What an unfinished record `before` has of the
    same file is not done again. Raises `Stopped` on Ctrl-C after the first caption.
    """
    captions, failed, reason, version = kept_of(before, path, task), [], "", version_of(path)
    kept_s = time.monotonic()

    def unfinished(reason: str) -> Record:
        failures = [asdict(interval) for interval in failed]
        made = task.record(captioner, path, in_order(captions), version)
        return made | error_record(path, reason) | {"failed": failures}

    try:
        for made in pieces_of(captioner, path, task, batch_size, {caption.start_s for caption in captions}, in_turn):
            if isinstance(made, Failed):
                failed.append(made)
                continue
            captions.append(made)
            if on_caption is not None:
                on_caption(made)
            if keep is not None and task.every_s and time.monotonic() - kept_s > KEPT_EVERY_S:
                keep(unfinished("not finished"))
                kept_s = time.monotonic()
    except KokaneeError as error:
        reason = str(error)
    except KeyboardInterrupt as stop:
        if captions and task.every_s:
            raise Stopped(unfinished(f"stopped after {in_order(captions)[-1].end_s:g} s")) from stop
        raise
    if failed:
        first = failed[0]
        count = "1 interval has" if len(failed) == 1 else f"{len(failed)} intervals have"
        reason = f"{count} no caption, the first from {first.start_s:g} s on: {first.error}"
    if not reason:
        return task.record(captioner, path, in_order(captions), version)
    return unfinished(reason) if captions else error_record(path, reason)


def in_order(captions: Sequence[Caption]) -> list[Caption]:
    return sorted(captions, key=lambda caption: (caption.start_s, caption.sample))


def kept_of(before: Record | None, path: Path, task: Task) -> list[Caption]:
    """The captions of whole intervals in an unfinished record of the file as it is now."""
    if before is None or "captions" not in before or "error" not in before or before != before | version_of(path):
        return []
    captions = [Caption(**entry, notes=tuple(before["notes"])) for entry in before["captions"]]
    samples = Counter(caption.start_s for caption in captions)
    return [caption for caption in captions if samples[caption.start_s] == task.n_samples]


def pieces_of(
    captioner: FileCaptioner,
    path: Path,
    task: Task,
    batch_size: int = 1,
    done_s: Collection[float] = (),
    in_turn: bool = False,
) -> Iterator[Caption | Failed]:
    """All captions that a task wants of a file, as they are made or `in_turn`, and the intervals that have none.

    Intervals that begin at `done_s` (seconds, to a thousandth) are left out. Raises `KokaneeError` for a file that
    cannot be read.
    """
    whole = task.request(path)
    if task.every_s is None:
        yield from captioner.answer([captioner.prepare(whole)], task.decoding, task.n_samples)[0]
        return
    parts = captioner.parts(path, task.every_s, task.start_s, task.end_s, task.use)
    asked = [replace(whole, start_s=start, end_s=end) for start, end in parts if round(start, 3) not in done_s]
    found = captioner.each(asked, task.decoding, task.n_samples, batch_size)
    for request, made in ordered(asked, found) if in_turn else found:
        if isinstance(made, KokaneeError):
            assert request.start_s is not None and request.end_s is not None
            yield Failed(request.start_s, request.end_s, str(made))
        else:
            yield from made


def ordered(keys: Sequence[Key], pairs: Iterable[tuple[Key, Value]]) -> Iterator[tuple[Key, Value]]:
    """The pairs in the order of `keys`, each as soon as those before it have come."""
    come: dict[Key, Value] = {}
    waiting = iter(pairs)
    for key in keys:
        while key not in come:
            come.update([next(waiting)])
        yield key, come.pop(key)
