"""What is true of clips: atomic events of whole files and of their intervals, read from three kinds of files.

- Kokanee's own, JSON lines: {"version": 1, "file", "start_s", "end_s", "events": [{"text", "kind"}, ...]}, where
  `start_s` and `end_s` (seconds) are null for a whole file (`kokanee events` adds where the events come from);
- `samples.jsonl` of `kokanee world make`, whose scenes also say what is true of any interval;
- the published test set's JSON: [{"video", "events": ["...", ...]}, ...].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kokanee.captions import intervals
from kokanee.errors import KokaneeError
from kokanee.events import AtomicEvent
from kokanee.files import SAMPLES
from kokanee.formats import read_jsonl
from kokanee.predictions import Cut, FileNames, Prediction, is_interval
from kokanee.world.facts import Fact, exact
from kokanee.world.make import scene_of

VERSION = 1
MOST = 0.75  # of a last interval, whose end may lie after the file's
SAME_S = 0.1  # an interval's ends may differ by this: players and readers round times


@dataclass(frozen=True)
class Truth:
    """The events of a file or an interval (None and None: the whole); of the world also as facts.

    caption_sha256: the beginning of the hash of the caption that the events were made from, where they were.
    """

    file: str
    events: tuple[AtomicEvent, ...]
    start_s: float | None = None
    end_s: float | None = None
    facts: tuple[Fact, ...] | None = None
    caption_sha256: str | None = None


class GroundTruth:
    """All that is true of some files. `of` finds what a prediction is to be held against.

    Raises `KokaneeError` for two truths of the same file or interval: which of them counts, only the user knows.
    """

    def __init__(self, truths: Sequence[Truth], samples: dict[str, dict[str, Any]] | None = None) -> None:
        self.truths, self.samples = list(truths), samples or {}
        self.names = FileNames(truth.file for truth in self.truths)
        self._by_file: dict[str, list[Truth]] = {}
        for truth in self.truths:
            if self.find(truth) is not None:
                raise KokaneeError(f"There are events of {place(truth)} twice. Remove one of the two.")
            self._by_file.setdefault(truth.file, []).append(truth)

    def of(self, prediction: Prediction) -> Truth | None:
        """What is true of the prediction's file or interval, None where it is not known."""
        file = self.names.same(prediction.file)
        if file is None:
            return None
        prediction = replace(prediction, file=file)
        found = self.find(prediction) or self.cut_short(prediction)
        if found is not None or prediction.start_s is None or file not in self.samples:
            return found
        return truth_of_sample(self.samples[file], prediction.start_s, prediction.end_s)

    def parts(self, cut: Cut | None) -> list[Truth]:
        """What is true of each interval that a run should have captioned.

        These are the intervals that the ground truth has; of a clip of the world without any, those that follow from
        how the run cuts it.
        """
        found = [truth for truth in self.truths if truth.start_s is not None]
        have = {truth.file for truth in found}
        for file, sample in self.samples.items() if cut is not None else ():
            if file not in have and cut is not None:
                start_s, length_s = cut.start_s or 0.0, sample["duration_s"]
                stop_s = length_s if cut.end_s is None else min(cut.end_s, length_s)
                whole = [(start_s, stop_s)] if start_s < stop_s else []
                cuts = whole if cut.every_s is None or not whole else intervals(start_s, length_s, cut.every_s, stop_s)
                found += [truth_of_sample(sample, *ends) for ends in cuts]
        return found

    def cut_short(self, prediction: Prediction) -> Truth | None:
        """The file's last interval, where it ends after the file, so that the run's last was shorter: most of it."""
        if prediction.start_s is None or prediction.end_s is None or prediction.cut is None:
            return None
        parts = [truth for truth in self._by_file.get(prediction.file, ()) if truth.start_s is not None]
        last = max(parts, key=lambda truth: truth.start_s or 0.0, default=None)
        if last is None or last.start_s is None or last.end_s is None or prediction.end_s > last.end_s:
            return None
        told_s, whole_s = prediction.end_s - prediction.start_s, last.end_s - last.start_s
        shorter = prediction.cut.every_s is not None and told_s < prediction.cut.every_s
        same = shorter and abs(prediction.start_s - last.start_s) <= SAME_S
        return last if same and told_s >= MOST * whole_s else None

    def find(self, item: Truth | Prediction) -> Truth | None:
        """What is told of the file of exactly this name, and of the same interval."""
        return next((truth for truth in self._by_file.get(item.file, ()) if alike(truth, item)), None)


def alike(one: Truth | Prediction, two: Truth | Prediction) -> bool:
    """Whether both are about the same interval."""
    pairs = ((one.start_s, two.start_s), (one.end_s, two.end_s))
    return all(a is b if a is None or b is None else abs(a - b) <= SAME_S for a, b in pairs)


def place(item: Truth | Prediction) -> str:
    """A file, or an interval of it, for messages."""
    return item.file if item.start_s is None else f"{item.file} from {item.start_s:g} to {item.end_s:g} s"


def truth_of_sample(sample: dict[str, Any], start_s: float | None = None, end_s: float | None = None) -> Truth:
    """The events and facts of a clip of the world, or of an interval of it."""
    scene = scene_of(sample)
    stop_s = scene.duration_s if end_s is None else min(end_s, scene.duration_s)
    events = exact(scene, start_s or 0.0, stop_s)
    return Truth(
        sample["file"],
        tuple(AtomicEvent(event.text, event.sense) for event in events),
        start_s,
        end_s,
        tuple(event.fact for event in events),
    )


def read_ground_truth(path: str | Path) -> GroundTruth:
    """The ground truth in a file of any of the three kinds. Raises `KokaneeError` for anything else."""
    path = Path(path)
    path = path / SAMPLES if path.is_dir() else path
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Give a file of events, or a folder of `kokanee world make`.")
    if path.suffix == ".json":
        return GroundTruth(read_published(path))
    records = read_jsonl(path)
    if records and "scene" in records[0]:
        return GroundTruth([truth_of_sample(record) for record in records], {r["file"]: r for r in records})
    return GroundTruth([of_record(record, f"{path}, line {number}") for number, record in enumerate(records, 1)])


def read_published(path: Path) -> list[Truth]:
    """The events of the published test set, whose kinds are not known."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise KokaneeError(f"{path} is not JSON ({error}). Mend it, or let JSON lines end in .jsonl.") from error
    try:
        found = [Truth(item["video"], tuple(AtomicEvent(text) for text in item["events"])) for item in items]
    except (TypeError, KeyError) as error:
        raise KokaneeError(
            f'{path} is not like the published test set: [{{"video": ..., "events": [...]}}, ...]. Give such a '
            "list, or JSON lines (.jsonl)."
        ) from error
    if not all(isinstance(event.text, str) for truth in found for event in truth.events):
        raise KokaneeError(f"{path} has events that are no texts. Each must be a sentence.")
    return found


def of_record(record: Any, where: str) -> Truth:
    """One record of Kokanee's own format. People edit them, so that a mistake is told with its line."""
    if not isinstance(record, dict) or record.get("version") != VERSION or not {"file", "events"} <= record.keys():
        form = f'{{"version": {VERSION}, "file": ..., "events": [...]}}'
        raise KokaneeError(f"{where} is no record of events in version {VERSION}, which is {form}. Mend the line.")
    file, start_s, end_s, events = (record.get(name) for name in ("file", "start_s", "end_s", "events"))
    if not isinstance(file, str) or not is_interval(start_s, end_s):
        raise KokaneeError(f"{where}: no file's name, or no interval of seconds. Mend the line.")
    if not isinstance(events, list) or not all(map(is_event, events)):
        raise KokaneeError(f'{where}: events must be a list like [{{"text": "A dog runs", "kind": "seen"}}]. Mend it.')
    made = tuple(AtomicEvent(event["text"], event.get("kind", "")) for event in events)
    return Truth(file, made, start_s, end_s, caption_sha256=record.get("caption_sha256"))


def is_event(event: Any) -> bool:
    """Whether a value of a record is an event: a text that is not empty, of any kind or none."""
    texts = isinstance(event, dict) and isinstance(event.get("text"), str) and isinstance(event.get("kind", ""), str)
    return texts and bool(event["text"].strip())


def record_of(truth: Truth, **more: Any) -> dict[str, Any]:
    """The record that `of_record` reads; `more` is kept in it and read by nobody."""
    events = [{"text": event.text, "kind": event.kind} for event in truth.events]
    known = {"version": VERSION, "file": truth.file, "start_s": truth.start_s, "end_s": truth.end_s}
    return known | more | {"caption_sha256": truth.caption_sha256, "events": events}
