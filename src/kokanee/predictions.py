"""Captions, read from their files: what captioners said, and what people wrote of the same clips."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kokanee.errors import KokaneeError
from kokanee.files import MEDIA
from kokanee.formats import read_jsonl
from kokanee.outputs import read_records

NOT_READ = (".srt", ".vtt", ".txt")
ITEM_KEYS = frozenset(("caption", "conversations", "pred"))


@dataclass(frozen=True)
class Cut:
    """Which parts of its files a run captions: `start_s` to `end_s` (None: either end), every `every_s` seconds."""

    start_s: float | None = None
    end_s: float | None = None
    every_s: float | None = None


@dataclass(frozen=True)
class Prediction:
    """One caption of a file, or of its part from `start_s` to `end_s` (seconds; None and None: the whole).

    text "" with a `reason`: there is no caption. finished False: it was cut off before its end. sample: which of
    several. cut: of a run that captions parts; where it has no caption of any part of a file, the ends are None.
    """

    file: str
    text: str
    start_s: float | None = None
    end_s: float | None = None
    sample: int = 0
    finished: bool = True
    reason: str = ""
    cut: Cut | None = None


def read_predictions(path: str | Path) -> list[Prediction]:
    """All captions of a file, and an empty one for each file or interval that has none.

    Reads the JSON lines of `kokanee caption`, and items in a list or in JSON lines: of the published result format
    (`{"id": ["0.mp4"], "pred": "..."}`), of the published test set (`{"video": "0.mp4", "conversations": [...]}`),
    and plain ones (`{"file": "0.mp4", "caption": "..."}`, of an interval also "start_s" and "end_s"). Raises
    `KokaneeError` for anything else.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not there"
        raise KokaneeError(f"{path} {problem}. Give a file of captions.")
    if path.suffix in NOT_READ:
        raise KokaneeError(f"{path} holds captions in a form that is not read. Give the captions.jsonl of the run.")
    if path.suffix != ".json":
        lines = read_jsonl(path)
        if not lines:
            raise KokaneeError(f"{path} holds no captions. Give a file of captions.")
        if lines and isinstance(lines[0], dict) and not ITEM_KEYS.isdisjoint(lines[0]):
            return [of_item(line, f"{path}, line {n}") for n, line in enumerate(read_jsonl(path, whole=True), 1)]
        return of_records(list(read_records(path).values()))
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise KokaneeError(f"{path} is not JSON ({error}). Give a file of captions.") from error
    if isinstance(found, dict) and "file" in found and ("captions" in found or "error" in found):
        return of_records([found])
    if not isinstance(found, list):
        raise KokaneeError(f"{path} holds neither a record of captions nor a list of them. Give a file of captions.")
    if not found:
        raise KokaneeError(f"{path} holds no captions. Give a file of captions.")
    return [of_item(item, f"{path}, item {number}") for number, item in enumerate(found)]


def of_records(records: Sequence[dict[str, Any]]) -> list[Prediction]:
    """The captions of a run's records, whose settings are the same."""
    settings = next((record["settings"] for record in records if "settings" in record), {})
    cut: Cut | None = Cut(*(settings.get(name) for name in ("start_s", "end_s", "every_s")))
    cut = None if cut == Cut() else cut
    return [made for record in records for made in of_record(record, cut)]


def of_record(record: dict[str, Any], cut: Cut | None) -> list[Prediction]:
    """The captions of one file's record."""
    file, reason = record["file"], record.get("error", "")
    if "captions" not in record:
        return [Prediction(file, "", reason=reason, cut=cut)]
    made = [
        Prediction(
            file,
            caption["text"],
            caption["start_s"] if cut else None,
            caption["end_s"] if cut else None,
            caption["sample"],
            caption["finished"],
            cut=cut,
        )
        for caption in record["captions"]
    ]
    failed = record.get("failed", ())
    return made + [Prediction(file, "", part["start_s"], part["end_s"], 0, True, part["error"], cut) for part in failed]


def of_item(item: Any, where: str) -> Prediction:
    """One item of a list: of the published result format, of the published test set, or a plain one.

    An id of the result format is a file's name, alone or in a list; of the test set, the caption is what "gpt" says.
    """
    item = item if isinstance(item, dict) else {}
    if "caption" in item:
        name, said = item.get("file"), item["caption"]
    elif "conversations" in item:
        name, said = item.get("video"), answer_of(item["conversations"])
    else:
        name, said = item.get("id"), item.get("pred")
        name = name[0] if isinstance(name, list) and len(name) == 1 else name
    start_s, end_s = item.get("start_s"), item.get("end_s")
    if not isinstance(name, str) or not isinstance(said, str) or not is_interval(start_s, end_s):
        raise KokaneeError(
            f'{where} is no caption. It must be like {{"file": "0.mp4", "caption": "A dog runs."}}, of an interval '
            'with "start_s": 0, "end_s": 10 as well, or like {"id": ["0.mp4"], "pred": "A dog runs."}.'
        )
    return Prediction(name, said, start_s, end_s, finished=bool(item.get("finished", True)))


def answer_of(turns: Any) -> str | None:
    """What is answered in a conversation of one question; None where it is none."""
    turns = turns if isinstance(turns, list) else []
    said = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
    return said[0] if len(said) == 1 else None


def is_interval(start_s: Any, end_s: Any) -> bool:
    """Whether two values of a file are the ends of an interval in seconds, or both None: the whole file."""
    if start_s is None and end_s is None:
        return True
    ends = [end for end in (start_s, end_s) if isinstance(end, int | float) and not isinstance(end, bool)]
    return len(ends) == 2 and 0 <= ends[0] < ends[1] < float("inf")


class FileNames:
    """Names of files, to be found by other paths of the same files."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_last: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for name in dict.fromkeys(names):
            ending = parts_of(name)
            self._by_last.setdefault(ending[0] if ending else "", []).append((name, ending))
        self._by_stem: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for name, ending in (one for some in self._by_last.values() for one in some):
            if PurePosixPath(name).suffix.lower() in MEDIA:
                self._by_stem.setdefault(PurePosixPath(ending[0]).stem, []).append((name, ending))

    def same(self, name: str) -> str | None:
        """Which of the files a name means: the one that shares most of its path's end, None where none does.

        So "0.mp4", "video/0.mp4" and "/data/video/0.mp4" are the same file where there is only one 0.mp4, and "0" is
        where none is called so. Raises `KokaneeError` where several fit equally well.
        """
        wanted = parts_of(name)
        last = wanted[0] if wanted else ""
        alike = self._by_last.get(last) or self._by_stem.get(last, [])
        shared = [n_common(wanted[1:], ending[1:]) for _, ending in alike]
        fitting = [other for (other, _), count in zip(alike, shared, strict=True) if count == max(shared)]
        if len(fitting) > 1:
            raise KokaneeError(
                f"{name} may be {fitting[0]} or {fitting[1]}. Name files so that their paths tell them apart."
            )
        return fitting[0] if fitting else None


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of a path, the last first; with letters and their accents as one character each, as they are typed."""
    return PurePosixPath(unicodedata.normalize("NFC", name)).parts[::-1]


def n_common(one: Sequence[str], two: Sequence[str]) -> int:
    """How many elements two sequences have in common at their beginning."""
    differing = (number for number, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(two)))
