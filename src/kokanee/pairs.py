"""Captions with verdicts -> preference pairs: of each clip's samples the better against the worse.

A caption's score is its total error, lower being better (arXiv 2506.15220, mrDPO; 2410.06682 also counts repetition):

    score = (missed + hallucination_weight x (incorrect + hallucinated)) / events + repetition_weight x repetition

Pairs that differ too little are dropped: their order may be the judge's noise. Pairs are JSON lines, read back
here; `as_trl` gives them as preference data of other trainers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kokanee.errors import KokaneeError
from kokanee.events import Counts
from kokanee.formats import read_jsonl

VERSION = 1
ROUNDING = 1e-9  # 0.5 - 0.4 is less than 0.1
MEDIA_TAGS = ("<video>", "<image>", "<audio>")
FEWER, SAME, ALIKE = "fewer than two captions", "all captions the same", "scores too close"
SILENT = "the better says nothing"


class PairRules(BaseModel):
    """How pairs are picked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hallucination_weight: float = Field(
        default=1.0, ge=0, description="of incorrect and hallucinated events; 1 in the paper"
    )
    repetition_weight: float = Field(
        default=1.0, ge=0, description="of the share of repeated words; not given in the paper"
    )
    min_gap: float = Field(
        default=0.1, ge=0, description="smallest difference of scores, in shares of events; not given there"
    )
    max_pairs: int = Field(
        default=1, ge=1, description="pairs of a clip at most; 1 in the paper: the best against the worst"
    )


@dataclass(frozen=True)
class Candidate:
    """One sampled caption of a clip: its text, verdict in numbers, and repetition (a share, 0 to 1). finished: it came
    to its end."""

    text: str
    counts: Counts
    repetition: float = 0.0
    finished: bool = True

    def score(self, rules: PairRules) -> float:
        """The error to be compared; lower is better."""
        counts = self.counts
        wrong = counts.missed + rules.hallucination_weight * (counts.incorrect + counts.hallucinated)
        return wrong / max(1, counts.n_events) + rules.repetition_weight * self.repetition


@dataclass(frozen=True)
class Pair:
    """A preference about a clip, or its part from `start_s` to `end_s`, and the ground-truth caption ("" if unknown).

    Scores are those of `Candidate.score`, None in pairs that come from elsewhere.
    """

    file: str
    prompt: str
    chosen: str
    rejected: str
    ground_truth: str = ""
    start_s: float | None = None
    end_s: float | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None

    def as_record(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    def as_trl(self) -> dict[str, Any]:
        """Preference data of TRL, conversational; all that a pair has besides (file, interval, scores) beside it."""
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        said = {name: [{"role": role, "content": getattr(self, name)}] for name, role in roles.items()}
        return asdict(self) | said


def picked(candidates: Sequence[Candidate], rules: PairRules) -> tuple[list[tuple[Candidate, Candidate]], Counter[str]]:
    """(chosen, rejected) of one clip, the widest gap first, and why pairs that might have been are none.

    The best is set against the worst, the second best against the second worst and so on, so that no caption is in
    two pairs. Equal texts are one caption. Ties are never pairs, whatever `min_gap`. Silence is never chosen: beside a
    caption that is mostly wrong it has few errors, but nobody wants it learnt.
    """
    finished_last = sorted(candidates, key=lambda candidate: candidate.finished)
    different = list({candidate.text: candidate for candidate in finished_last}.values())
    if len(different) < 2:
        return [], Counter({FEWER if len(candidates) < 2 else SAME: 1})
    order = sorted(different, key=lambda candidate: (candidate.score(rules), candidate.text))
    tried = [(order[place], order[-1 - place]) for place in range(min(rules.max_pairs, len(order) // 2))]
    gaps = [rejected.score(rules) - chosen.score(rules) for chosen, rejected in tried]
    apart = [pair for pair, gap in zip(tried, gaps, strict=True) if gap > ROUNDING and gap >= rules.min_gap - ROUNDING]
    found = [(chosen, rejected) for chosen, rejected in apart if chosen.text.strip()]
    return found, +Counter({ALIKE: len(tried) - len(apart), SILENT: len(apart) - len(found)})


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from JSON lines of our own or in TRL's form, or from a list in either published form. Raises
    `KokaneeError` for others.

    In the first model's form "gpt" is the chosen answer beside "reject_gpt" and "gt"; in video-SALMONN 2+'s it is the
    ground truth beside "chosen" and "reject".
    """
    path = Path(path)
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Give a file of preference pairs.")
    if not path.stat().st_size:
        raise KokaneeError(f"{path} is empty. Give a file of preference pairs.")
    if path.suffix != ".json":
        return [of_record(record, f"{path}, line {number}") for number, record in enumerate(read_jsonl(path), 1)]
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise KokaneeError(f"{path} is not JSON ({error}). Give a file of preference pairs.") from error
    if not isinstance(found, list):
        raise KokaneeError(f"{path} holds no list. Give a list of conversations with chosen and rejected answers.")
    return [of_published(item, f"{path}, item {number}") for number, item in enumerate(found)]


def of_record(record: Any, where: str) -> Pair:
    """A pair as `Pair.as_record` or `Pair.as_trl` gives it."""
    names = ("file", "prompt", "chosen", "rejected")
    known = isinstance(record, dict) and record.get("version", VERSION) == VERSION
    texts: dict[str, Any] = {name: content(record.get(name)) for name in names} if known else {}
    if not texts or None in texts.values():
        raise KokaneeError(
            f"{where} is no preference pair in version {VERSION}. Give a file of pairs, each with {', '.join(names)}."
        )
    return Pair(**{name: record[name] for name in Pair.__dataclass_fields__ if name in record} | texts)


def content(said: Any) -> str | None:
    """A text, alone or as the one turn of a conversation; None for anything else."""
    match said:
        case str(text) | [{"content": str(text)}]:
            return text
    return None


def of_published(item: Any, where: str) -> Pair:
    """One item of a published preference file."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    said: dict[str, list[str]] = {}
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and isinstance(turn.get("value"), str):
            said.setdefault(str(turn.get("from")), []).append(turn["value"])
    first, second = {"human", "gpt", "reject_gpt"}, {"human", "chosen", "reject"}
    if any(len(texts) > 1 for texts in said.values()):
        raise KokaneeError(f"{where} has several turns of one side, which is not read. Give one question for each.")
    if first <= said.keys() and not {"chosen", "reject"} & said.keys():
        chosen, rejected, truth = said["gpt"][0], said["reject_gpt"][0], said.get("gt", [""])[0]
    elif second <= said.keys() and "reject_gpt" not in said:
        chosen, rejected, truth = said["chosen"][0], said["reject"][0], said.get("gpt", [""])[0]
    else:
        raise KokaneeError(
            f"{where} is no preference: it needs human, gpt and reject_gpt (gt), or human, chosen and reject (gpt)."
        )
    file = item.get("video") or item.get("audio") or item.get("image")
    if not isinstance(file, str):
        raise KokaneeError(f"{where} names no video, audio or image. Say of which file it is.")
    return Pair(file, without_tags(said["human"][0]), chosen, rejected, truth)


def without_tags(prompt: str) -> str:
    """A prompt without the tags that hold the places of media, which the processor puts before it itself."""
    for tag in MEDIA_TAGS:
        prompt = prompt.replace(tag, "")
    return prompt.strip()


def dropped(counts: Iterable[Counter[str]]) -> dict[str, int]:
    """Why there are no pairs, over many clips."""
    return dict(sum(counts, Counter[str]()).most_common())
