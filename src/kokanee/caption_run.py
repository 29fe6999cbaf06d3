"""Captions of many files: one record after the other into a file that only grows, so that a run can be killed any time.

A second run with the same settings does what is missing: files without a record, files whose record has an error (from
the first interval on that has no caption), and files that have changed since. A run with other settings, or another
model under the same name, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kokanee.captioner import BOTH, Caption, Captioner, How, Prepared, Request, check_samples, groups
from kokanee.errors import KokaneeError
from kokanee.files import file_key
from kokanee.formats import append_jsonl, differences
from kokanee.generation import Decoding
from kokanee.outputs import Record, caption_record, error_record, read_records
from kokanee.weights import fingerprint

COMPARED = ("model", "question")


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

    def settings(self, captioner: Captioner) -> dict[str, Any]:
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
            "dtype": str(captioner.model.dtype).removeprefix("torch."),
            "base": captioner.base,
            "weights": fingerprint(captioner.model),
            "processor": captioner.processor.config.model_dump(mode="json"),
        }

    def record(self, captioner: Captioner, path: Path, captions: Sequence[Caption]) -> Record:
        """The record of a file with these captions."""
        question = self.question or captioner.defaults.question
        made = caption_record(path.as_posix(), captioner.name, question, self.settings(captioner), captions)
        return made | version_of(path)


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
    captioner: Captioner,
    files: Sequence[Path],
    out: Path | None,
    task: Task,
    batch_size: int = 1,
    on_record: Callable[[Record], None] | None = None,
) -> Summary:
    """Caption `files` (each once), adding a record of each to `out` (None: to no file).

    `on_record` is told each record, also those of earlier runs. `batch_size` files are captioned together, or with
    `every_s` as many intervals of a file. A file that cannot be captioned gets an error record and does not stop the
    others. Raises `KokaneeError` when `out` was made with other settings.
    """
    check_samples(task.n_samples, task.decoding.temperature)
    known = read_records(out) if out is not None and out.is_file() else {}
    check_same(out, known, task.record(captioner, Path(), ()))
    summary, waiting = Summary(), []
    for key, path in {file_key(path): path for path in files}.items():
        before = known.get(key)
        if before is None or "error" in before or before != before | version_of(path):
            waiting.append(path)
        else:
            summary.skipped += 1
            summary.captioned += 1
            tell(on_record, before)
    for group in groups(waiting, 1 if task.every_s else batch_size):
        try:
            records = caption_group(captioner, group, task, batch_size, known)
        except Stopped as stopped:
            if out is not None:
                append_jsonl(out, [stopped.record])
            raise
        for record in records:
            if out is not None and record != known.get(file_key(record["file"])):
                append_jsonl(out, [record])
            if "error" in record:
                summary.failed[record["file"]] = record["error"]
            else:
                summary.captioned += 1
            tell(on_record, record)
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
    settings = dict(record["settings"])
    return {name: record[name] for name in COMPARED} | settings.pop("processor", {}) | settings


def version_of(path: Path) -> dict[str, Any]:
    """What tells whether a file has changed: its size in bytes and when it was written. Nothing of a missing file."""
    try:
        found = path.stat()
    except OSError:
        return {}
    return {"size_bytes": found.st_size, "modified_s": found.st_mtime}


def caption_group(
    captioner: Captioner, paths: Sequence[Path], task: Task, batch_size: int, known: Mapping[str, Record]
) -> list[Record]:
    """The records of some files that are captioned together; each that fails has its reason. `known` are records by
    `file_key`, whose intervals are not done again."""
    if task.every_s:
        return [caption_one(captioner, path, task, batch_size, known.get(file_key(path))) for path in paths]
    prepared: dict[Path, Prepared] = {}
    records: dict[Path, Record] = {}
    for path in paths:
        try:
            prepared[path] = captioner.prepare(task.request(path))
        except KokaneeError as error:
            records[path] = error_record(path.as_posix(), str(error))
    try:
        made = captioner.answer(list(prepared.values()), task.decoding, task.n_samples)
        records |= {path: task.record(captioner, path, captions) for path, captions in zip(prepared, made, strict=True)}
    except KokaneeError as error:
        if len(prepared) == 1:
            records |= {path: error_record(path.as_posix(), str(error)) for path in prepared}
    # One by one outside of the handler, whose error keeps what the batch had in memory.
    return [records[path] if path in records else caption_one(captioner, path, task, 1) for path in paths]


def caption_one(
    captioner: Captioner,
    path: Path,
    task: Task,
    batch_size: int,
    before: Record | None = None,
    on_caption: Callable[[Caption], None] | None = None,
) -> Record:
    """The record of one file: its captions, and why there are none or not all. `on_caption` is told each at once.

    What an unfinished record `before` has of the same file is kept. Raises `Stopped` on Ctrl-C after the first caption.
    """
    captions, failed = kept_of(before, path, task), {}
    try:
        for caption in captions_of(captioner, path, task, batch_size, len(captions) // task.n_samples):
            captions.append(caption)
            if on_caption is not None:
                on_caption(caption)
    except KokaneeError as error:
        failed = error_record(path.as_posix(), str(error))
    except KeyboardInterrupt as stop:
        if captions and task.every_s:
            unfinished = error_record(path.as_posix(), f"stopped after {captions[-1].end_s:g} s")
            raise Stopped(task.record(captioner, path, captions) | unfinished) from stop
        raise
    return failed if failed and not captions else task.record(captioner, path, captions) | failed


def kept_of(before: Record | None, path: Path, task: Task) -> list[Caption]:
    """The captions of whole intervals in an unfinished record of the file as it is now."""
    if before is None or "captions" not in before or "error" not in before or before != before | version_of(path):
        return []
    notes = tuple(before["notes"])
    captions = [Caption(**entry, notes=notes) for entry in before["captions"]]
    return captions[: len(captions) // task.n_samples * task.n_samples]


def captions_of(
    captioner: Captioner, path: Path, task: Task, batch_size: int = 1, skipped: int = 0
) -> Iterator[Caption]:
    """All captions that a task wants of a file, as they are made, without the first `skipped` intervals. Raises
    `KokaneeError` for what cannot be read."""
    if task.every_s is None:
        yield from captioner.answer([captioner.prepare(task.request(path))], task.decoding, task.n_samples)[0]
        return
    yield from captioner.every(
        path,
        task.every_s,
        task.question,
        task.start_s,
        task.end_s,
        use=task.use,
        n_samples=task.n_samples,
        batch_size=batch_size,
        skipped=skipped,
        **How(**asdict(task.decoding)),
    )
