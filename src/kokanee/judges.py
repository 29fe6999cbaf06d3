"""Judges: the events of a clip and a caption -> what the caption misses, tells wrongly, and invents.

`exact` is the world's own parser, for clips of the world. A language model judges anything else, by the published
protocol (`protocol.py`): it is asked for numbers and lists, again where its reply cannot be read, at last for numbers
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kokanee.endpoint import Asker, Unanswered
from kokanee.events import AtomicEvent, Counts, Verdict
from kokanee.protocol import (
    COUNT_RETRIES,
    COUNTS,
    LISTS,
    RETRIES,
    Reply,
    count_messages,
    cut_repetition,
    list_messages,
    listed,
    read_counts,
    read_lists,
    verdict_of,
)

LARGER = "Choose a larger model, or one that holds to JSON."
NUMBER: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXTS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}


@dataclass(frozen=True)
class Judgement:
    """Numbers of events, and which they are; `verdict` is None where the judge gave numbers alone.

    As published the two may disagree; the numbers count.
    """

    counts: Counts
    verdict: Verdict | None


def schema(**properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object that has exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


LIST_SCHEMA = schema(**dict.fromkeys(LISTS, NUMBER), **dict.fromkeys(LISTS.values(), TEXTS))
COUNT_SCHEMA = schema(**dict.fromkeys(COUNTS, NUMBER))


class LanguageModelJudge:
    """A language model behind an endpoint, asked as the published evaluator asks.

    A reply counts by its lists, which must agree with its numbers and name no more events than there are; otherwise it
    is asked for again. `as_published`: numbers count as they are said, whatever the lists hold.
    """

    def __init__(self, asker: Asker, as_published: bool = False) -> None:
        self.asker, self.as_published = asker, as_published
        self.name = f"openai:{asker.endpoint.model}"

    async def judge(
        self, events: Sequence[AtomicEvent], caption: str, run: int = 0, finished: bool = True
    ) -> Judgement:
        """The judgement of one caption in run `run`, whose number is the seed.

        `finished`: whether the caption came to its end; repeated strings are cut from one that did not. An empty
        caption misses everything, which nobody is asked. Raises `Unanswered` where no reply could be read.
        """
        texts = [event.text for event in events]
        said = caption if finished else cut_repetition(caption)
        if not said.strip() and not self.as_published:
            return judged(Verdict(tuple(texts), (), (), len(texts)))
        asked = list_messages(texts, said)
        whole = True
        for attempt in range(1 + RETRIES):
            answer = await self.asker.reply(asked, run, attempt, LIST_SCHEMA)
            reply, whole = read_lists(answer.text), whole and answer.finished
            found = None if reply is None else self.taken(reply, texts)
            if found is not None:
                return found
        asked = count_messages(texts, said)
        for attempt in range(COUNT_RETRIES):
            reply = read_counts(await self.asker.ask(asked, run, attempt, COUNT_SCHEMA), len(texts))
            if reply is not None:
                return Judgement(Counts(reply.missed, reply.incorrect, reply.hallucinated, len(texts)), None)
        raise Unanswered(
            f"{self.name} gave {1 + RETRIES + COUNT_RETRIES} replies that cannot be read. "
            + (LARGER if whole else "Some were cut off: raise --max-tokens.")
        )

    def taken(self, reply: Reply, events: Sequence[str]) -> Judgement | None:
        """What counts of a reply, None where it contradicts itself."""
        verdict = verdict_of(reply, events)
        if verdict is not None:
            return judged(verdict)
        if not self.as_published:
            return None
        counts = Counts(reply.missed, reply.incorrect, reply.hallucinated, len(events))
        return Judgement(counts, listed(reply, events))


def judged(verdict: Verdict) -> Judgement:
    return Judgement(verdict.counts, verdict)
