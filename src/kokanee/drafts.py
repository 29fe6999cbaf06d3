"""Drafts: captions that a model makes of clips, and the verdict on each, in files that a killed run goes on with.

Captions are made in groups that follow from the tasks alone, so that a group which is made again comes out the same.
Several processes share the groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from kokanee.captions import Decoding
from kokanee.clips import Clips, Task
from kokanee.errors import KokaneeError
from kokanee.events import Counts, Verdict, rates, repetition_rate, word_count
from kokanee.formats import append_jsonl, drop_half_start, read_jsonl, write_jsonl
from kokanee.generation import answers, text_of
from kokanee.model import Kokanee
from kokanee.pairs import Candidate
from kokanee.predictions import Prediction
from kokanee.processor import Processor
from kokanee.questions import same
from kokanee.scoring import Item, Judge, judge_all
from kokanee.views import open_prompt

VERSION = 1
ANSWER_TOKENS = 16
Done = Callable[[int, int], None]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Team:
    """The processes that share a piece of work."""

    state: PartialState

    @property
    def is_main(self) -> bool:
        return self.state.is_main_process

    def wait(self) -> None:
        self.state.wait_for_everyone()

    def share(
        self, groups: Sequence[Sequence[Any]], first: int, work: Callable[[Sequence[Any]], list[Found]]
    ) -> list[Found]:
        """What the processes make of the groups from `first` on, one group each, in the groups' order."""
        mine = first + self.state.process_index
        return gather_object(work(groups[mine]) if mine < len(groups) else [])

    def share_into(
        self,
        path: Path,
        items: Sequence[Any],
        size: int,
        work: Callable[[Sequence[Any]], list[dict[str, Any]]],
        report: Done,
    ) -> list[dict[str, Any]]:
        """A record of each item, in groups of `size`, added to the JSON lines of `path` as they are made; all of them.

        Goes on where the file ends. A group of which only a part was written is made again, and what is missing added.
        """
        groups = [items[at : at + size] for at in range(0, len(items), size)]
        if self.is_main:
            drop_half_start(path)
        self.wait()
        done = len(read_jsonl(path)) if path.is_file() else 0
        self.wait()
        for first in range(done // size, len(groups), self.state.num_processes):
            made = self.share(groups, first, work)
            if self.is_main:
                append_jsonl(path, made[max(0, done - first * size) :])
            done = max(done, first * size + len(made))
            report(done, len(items))
        self.wait()
        return read_jsonl(path)


@dataclass(frozen=True)
class Writer:
    """A model that captions clips. `batch_size`: clips captioned together."""

    model: Kokanee
    processor: Processor
    batch_size: int
    team: Team

    def captions(
        self,
        path: Path,
        clips: Clips,
        tasks: Sequence[Task],
        decodings: Sequence[Decoding],
        n_samples: int,
        report: Done,
    ) -> list[dict[str, Any]]:
        """A record of each task with `n_samples` captions in each way of decoding, in the order of the tasks; also in
        `path`."""

        def work(group: Sequence[Task]) -> list[dict[str, Any]]:
            found = [self.said(clips, group, decoding, n_samples) for decoding in decodings]
            rows = [[said for ways in rows for said in ways] for rows in zip(*found, strict=True)]
            return [
                {
                    "version": VERSION,
                    "clip": task.name,
                    "prompt": task.prompt,
                    "temperatures": [decoding.temperature for decoding in decodings for _ in range(n_samples)],
                    "seeds": [decoding.seed for decoding in decodings for _ in range(n_samples)],
                    "captions": [text for text, _ in row],
                    "finished": [finished for _, finished in row],
                }
                for task, row in zip(group, rows, strict=True)
            ]

        return self.team.share_into(path, tasks, self.batch_size, work, report)

    def said(
        self, clips: Clips, tasks: Sequence[Task], decoding: Decoding, n_samples: int = 1
    ) -> list[list[tuple[str, bool]]]:
        """Of each task `n_samples` answers, and whether they came to their end."""
        prompts = [open_prompt(self.processor, clips.view(task.number), task.prompt) for task in tasks]
        batch = self.processor.collate(prompts, padding_side="left")
        found = answers(self.model, batch, decoding, n_samples, [task.name for task in tasks])
        texts = [(text_of(self.processor.tokenizer, answer.ids), answer.finished) for answer in found]
        return [texts[at : at + n_samples] for at in range(0, len(texts), n_samples)]

    def right_answers(self, clips: Clips, tasks: Sequence[Task]) -> float | None:
        """The share of questions about the clips that are answered rightly, in per cent; None where none is known."""
        asked = [(task.asking(question), answer.strip()) for task in tasks for question, answer in task.questions]
        longest = max((len(self.processor.tokenizer(answer)["input_ids"]) for _, answer in asked), default=0)
        decoding = Decoding(max_new_tokens=max(ANSWER_TOKENS, longest + 1))
        groups = [asked[at : at + self.batch_size] for at in range(0, len(asked), self.batch_size)]

        def work(group: Sequence[tuple[Task, str]]) -> list[bool]:
            said = self.said(clips, [task for task, _ in group], decoding)
            return [same(text, answer) for ((text, _),), (_, answer) in zip(said, group, strict=True)]

        right: list[bool] = []
        for first in range(0, len(groups), self.team.state.num_processes):
            right += self.team.share(groups, first, work)
        return 100.0 * sum(right) / len(right) if right else None


def verdicts(
    path: Path,
    judge: Callable[[], Judge],
    tasks: Sequence[Task],
    drafts: Sequence[dict[str, Any]],
    team: Team,
    report: Done,
    unjudged: float = 0.0,
) -> list[dict[str, Any]]:
    """A record of each task: what the judge counts in its captions (null where it could not be had), which events
    these are, and the repetition of each caption (a share); also in `path`, written whole.

    Raises `KokaneeError` where a larger share than `unjudged` has no verdict, and where drafts are of other tasks.
    """
    if [task.name for task in tasks] != [draft["clip"] for draft in drafts]:
        raise KokaneeError(
            f"{path.parent} holds captions of other clips: files, captions or events were changed meanwhile. "
            "Put back what was there, or begin in another folder."
        )
    if team.is_main and not path.is_file():
        items = [
            Item(Prediction(task.name, text, sample=sample, finished=finished), task.truth)
            for task, draft in zip(tasks, drafts, strict=True)
            for sample, (text, finished) in enumerate(zip(draft["captions"], draft["finished"], strict=True))
        ]
        found = judge_all(items, judge(), on_judged=lambda done: report(done, len(items)))
        check_judged(found, unjudged)
        judged = iter(found)
        records = []
        for task, draft in zip(tasks, drafts, strict=True):
            found = [next(judged).judgements[0] for _ in draft["captions"]]
            records.append(
                {
                    "version": VERSION,
                    "clip": task.name,
                    "ground_truth": task.ground_truth,
                    "counts": [None if one is None else asdict(one.counts) for one in found],
                    "repetition": [repetition_rate(text) for text in draft["captions"]],
                    "verdicts": [None if one is None or one.verdict is None else listed(one.verdict) for one in found],
                }
            )
        write_jsonl(path, records)
    team.wait()
    return read_jsonl(path)


def check_judged(items: Sequence[Item], unjudged: float) -> None:
    """Raise `KokaneeError` where a larger share than `unjudged` of the captions has no verdict."""
    failures = Counter(failure for item in items for failure in item.failures if failure)
    lost = failures.total()
    if lost > unjudged * len(items):
        raise KokaneeError(
            f"{lost} of {len(items)} captions could not be judged. Most often: {failures.most_common(1)[0][0]} "
            "Where the server gave no reply, starting again asks for these alone; replies that cannot be read are "
            "kept: allow for more with unjudged, or choose another judge in another folder."
        )


def listed(verdict: Verdict) -> dict[str, Any]:
    """The events that a caption gets wrong."""
    return {
        "missed": list(verdict.missed),
        "incorrect": [asdict(wrong) for wrong in verdict.incorrect],
        "hallucinated": list(verdict.hallucinated),
    }


def candidates(draft: dict[str, Any], verdict: dict[str, Any]) -> list[Candidate]:
    """The captions of a clip that were judged."""
    rows = zip(draft["captions"], verdict["counts"], verdict["repetition"], draft["finished"], strict=True)
    return [Candidate(text, Counts(**counts), *more) for text, counts, *more in rows if counts is not None]


def figures(made: Sequence[Candidate]) -> dict[str, float]:
    """What is wrong with captions, in per cent of events; repetition in per cent of their words; words a caption."""
    found, count = rates(candidate.counts for candidate in made), max(1, len(made))
    return {
        "missed": found.missed,
        "incorrect": found.incorrect,
        "hallucinated": found.hallucinated,
        "hall": found.hall,
        "total": found.total,
        "repetition": 100.0 * sum(candidate.repetition for candidate in made) / count,
        "words": sum(word_count(candidate.text) for candidate in made) / count,
    }


def device_of(state: PartialState) -> torch.device:
    """The device of this process."""
    assert state.device is not None
    return state.device
