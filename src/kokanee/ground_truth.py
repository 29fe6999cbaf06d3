"""What is true of clips: atomic events of whole files and of their intervals, read from three kinds of files.

- Kokanee's own, JSON lines: {"version": 1, "file", "start_s", "end_s", "events": [{"text", "kind"}, ...]}, where
  `start_s` and `end_s` (seconds) are null for a whole file;
- `samples.jsonl` of `kokanee world make`, whose scenes also say what is true of any interval;
- the published test set's JSON: [{"video", "events": ["...", ...]}, ...].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kokanee.errors import KokaneeError
from kokanee.events import AtomicEvent
from kokanee.formats import read_jsonl
from kokanee.predictions import FileNames, Prediction
from kokanee.world.facts import Fact, exact
from kokanee.world.make import scene_of

VERSION = 1
SAME_S = 0.1  # an interval's ends may differ by this: players and readers round times


@dataclass(frozen=True)
class Truth:
    """The events of a file or an interval (None and None: the whole); of the world also as facts."""

    file: str
    events: tuple[AtomicEvent, ...]
    start_s: float | None = None
    end_s: float | None = None
    facts: tuple[Fact, ...] | None = None


class GroundTruth:
    """All that is true of some files. `of` finds what a prediction is to be held against."""

    def __init__(self, truths: Sequence[Truth], samples: dict[str, dict[str, Any]] | None = None) -> None:
        self.truths, self.samples = list(truths), samples or {}
        self.names = FileNames(truth.file for truth in self.truths)
        self._by_file: dict[str, list[Truth]] = {truth.file: [] for truth in self.truths}
        for truth in self.truths:
            self._by_file[truth.file].append(truth)

    def of(self, prediction: Prediction) -> Truth | None:
        """What is true of the prediction's file or interval, None where it is not known."""
        file = self.names.same(prediction.file)
        if file is None:
            return None
        found = [truth for truth in self._by_file[file] if alike(truth, prediction)]
        if found or prediction.start_s is None or file not in self.samples:
            return found[0] if found else None
        return truth_of_sample(self.samples[file], prediction.start_s, prediction.end_s)


def alike(truth: Truth, prediction: Prediction) -> bool:
    """Whether both are about the same interval."""
    pairs = ((truth.start_s, prediction.start_s), (truth.end_s, prediction.end_s))
    return all(one is two if one is None or two is None else abs(one - two) <= SAME_S for one, two in pairs)


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


def read_ground_truth(path: Path) -> GroundTruth:
    """The ground truth in a file of any of the three kinds. Raises `KokaneeError` for anything else."""
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Give a file of events.")
    if path.suffix == ".json":
        return GroundTruth(read_published(path))
    records = read_jsonl(path)
    if records and "scene" in records[0]:
        return GroundTruth([truth_of_sample(record) for record in records], {r["file"]: r for r in records})
    return GroundTruth([of_record(record, f"{path}, line {number}") for number, record in enumerate(records, 1)])


def read_published(path: Path) -> list[Truth]:
    """The events of the published test set, whose kinds are not known."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        found = [Truth(item["video"], tuple(AtomicEvent(text) for text in item["events"])) for item in items]
    except (ValueError, TypeError, KeyError) as error:
        raise KokaneeError(
            f'{path} is not like the published test set ([{{"video": ..., "events": [...]}}, ...]): {error!r}.'
        ) from error
    if not all(isinstance(event.text, str) for truth in found for event in truth.events):
        raise KokaneeError(f"{path} has events that are no texts. Each must be a sentence.")
    return found


def of_record(record: Any, where: str) -> Truth:
    """One record of Kokanee's own format."""
    known = isinstance(record, dict) and record.get("version") == VERSION and {"file", "events"} <= record.keys()
    if not known or not all(isinstance(event, dict) and "text" in event for event in record["events"]):
        raise KokaneeError(f"{where} is no record of events in version {VERSION}. Give a file of events.")
    events = tuple(AtomicEvent(event["text"], event.get("kind", "")) for event in record["events"])
    return Truth(record["file"], events, record.get("start_s"), record.get("end_s"))
