"""Captions as records (versioned JSON) and as files for people and players: txt, json, jsonl, srt, vtt.

A record is what is known of one file after it was tried:

    {"version": 1, "file": ..., "path": ..., "model": ..., "question": ..., "settings": {...},
     "captions": [{"start_s", "end_s", "sample", "seed", "text", "finished"}, ...], "notes": [...],
     "size_bytes": ..., "modified_s": ...}
    {"version": 1, "file": ..., "path": ..., "error": ...}

`file` is the path as it was given, `path` the whole path, by which a file is known. A file of which some intervals
failed has both, the captions that were made and the error, and `failed`: [{"start_s", "end_s", "error"}, ...]. Where a
list of records has several of one file, the last counts.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from kokanee.errors import KokaneeError
from kokanee.files import file_key
from kokanee.formats import read_jsonl

VERSION = 1
Record = dict[str, Any]


class Captioned(Protocol):
    """What a record keeps of a caption."""

    @property
    def text(self) -> str: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def sample(self) -> int: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def finished(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


def caption_record(
    file: Path, model: str, question: str, settings: dict[str, Any], captions: Sequence[Captioned]
) -> Record:
    """The record of a file that was captioned; its notes are those of all its captions, each once."""
    return {
        "version": VERSION,
        "file": file.as_posix(),
        "path": file_key(file),
        "model": model,
        "question": question,
        "settings": settings,
        "captions": [caption_entry(caption) for caption in captions],
        "notes": list(dict.fromkeys(note for caption in captions for note in caption.notes)),
    }


def caption_entry(caption: Captioned) -> dict[str, Any]:
    """A caption as a record keeps it."""
    return {
        "start_s": round(caption.start_s, 3),
        "end_s": round(caption.end_s, 3),
        "sample": caption.sample,
        "seed": caption.seed,
        "text": caption.text,
        "finished": caption.finished,
    }


def error_record(file: Path, error: str) -> Record:
    """The record of a file that could not be captioned, and why."""
    return {"version": VERSION, "file": file.as_posix(), "path": file_key(file), "error": error}


def key_of(record: Record) -> str:
    """What a record's file is known by, in whatever folder the record was made."""
    return record.get("path") or file_key(record["file"])


def read_records(path: str | Path) -> dict[str, Record]:
    """`file_key` of a file -> its last record, of a file of records. Raises `KokaneeError` for what is none."""
    found = {}
    for number, record in enumerate(read_jsonl(path), 1):
        known = isinstance(record, dict) and record.get("version") == VERSION and "file" in record
        if not known or not ("error" in record or "captions" in record):
            raise KokaneeError(
                f'{path}, line {number} is no record of a caption in version {VERSION}, nor {{"file": ..., "caption": '
                "...}. Mend the line, or choose another file."
            )
        found[key_of(record)] = record
    return found


def as_txt(record: Record) -> str:
    """The text alone; where intervals or samples were asked for, each after its interval and its number."""
    return "\n".join(txt_entry(caption, record["settings"]) for caption in record["captions"])


def txt_entry(caption: dict[str, Any], settings: dict[str, Any]) -> str:
    """One of the captions in a text, by the settings of its record."""
    by_interval, by_sample = settings.get("every_s") is not None, settings.get("samples", 1) > 1
    head = [f"{clock(caption['start_s'], '.')} - {clock(caption['end_s'], '.')}"] if by_interval else []
    head += [f"sample {caption['sample'] + 1}"] if by_sample else []
    return (f"[{', '.join(head)}]\n" if head else "") + caption["text"] + "\n"


def as_json(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"


def as_jsonl(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def as_srt(record: Record) -> str:
    """SubRip: numbered cues. A blank line would end a cue, so a caption's paragraphs are joined."""
    cues = [
        f"{number}\n{clock(start_s, ',')} --> {clock(end_s, ',')}\n{cue_text(text)}\n"
        for number, (start_s, end_s, text) in enumerate(cues_of(record), 1)
    ]
    return "\n".join(cues)


def as_vtt(record: Record) -> str:
    """WebVTT, with the characters escaped that it reads as markup."""
    cues = [
        f"{clock(start_s, '.')} --> {clock(end_s, '.')}\n{html.escape(cue_text(text), quote=False)}\n"
        for start_s, end_s, text in cues_of(record)
    ]
    return "\n".join(["WEBVTT\n", *cues])


FORMATS: dict[str, Callable[[Record], str]] = {
    "txt": as_txt,
    "json": as_json,
    "jsonl": as_jsonl,
    "srt": as_srt,
    "vtt": as_vtt,
}
SUBTITLES = ("srt", "vtt")


def cues_of(record: Record) -> Iterable[tuple[float, float, str]]:
    """Start, end and text of what a player shows. Raises `KokaneeError` for several captions at a time, or no time."""
    captions = record["captions"]
    if any(caption["sample"] for caption in captions):
        raise KokaneeError("Subtitles show one caption at a time, but there are several samples. Ask for one.")
    if any(caption["end_s"] <= caption["start_s"] for caption in captions):
        raise KokaneeError(f"{record['file']} has no length, so it cannot have subtitles. Choose the format txt.")
    return [(caption["start_s"], caption["end_s"], caption["text"]) for caption in captions]


def cue_text(text: str) -> str:
    """A text without empty lines, and never an empty one; the arrow that marks a cue's times is spelt differently."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines).replace("-->", "->") or "-"


def clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and thousandths: 00:01:02,500."""
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
