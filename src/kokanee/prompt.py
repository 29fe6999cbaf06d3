"""A conversation and the sizes of its media -> token ids, labels and positions.

Each turn becomes `<|im_start|>`, role, newline, text, `<|im_end|>`, newline; a medium stands in a user's text as
`<|vision_start|>`, its placeholders, `<|vision_end|>`. The loss is on the assistant's texts and the end of their turns.
The header of an assistant's turn is encoded apart from its text, so that the ids of an open prompt are a prefix of the
ids of the prompt with any answer. (The published code would merge the header's newline with one that the answer begins
with, into a token that the model never sees when it generates.)

Tensor axes: L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kokanee.errors import KokaneeError
from kokanee.layout import Block, Rules, block_ids, position_ids

IGNORED = -100


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    `slots` are the places of media inside a user's `text`, as (character offset, kind) in order. Where no turn has any,
    the media stand before the text of the first turn, each followed by a newline, as in training. An empty tuple in the
    first turn says that it holds no media.
    """

    role: Literal["user", "assistant"]
    text: str
    slots: tuple[tuple[int, str], ...] | None = None


def published_turns(conversations: Sequence[dict[str, str]], answer: str = "gpt") -> list[Turn]:
    """The authors' format (`from`, `value`; `<video>`, `<image>`, `<audio>` in the questions) -> turns.

    `answer` names the answers to take: "gpt", "chosen" or "reject". As in the published code, a leading turn that is
    not from the human is dropped, and so is every turn that is neither from the human nor the named answer.
    """
    spoken = [
        (turn.get("from", turn.get("role")), turn.get("value", turn.get("content", ""))) for turn in conversations
    ]
    if spoken and spoken[0][0] != "human":
        spoken = spoken[1:]
    turns = []
    for speaker, value in spoken:
        if speaker == "human":
            parts = re.split("<(video|image|audio)>", value)
            ends = np.cumsum([len(part) for part in parts[::2]]).tolist()
            turns.append(Turn("user", "".join(parts[::2]), tuple(zip(ends[:-1], parts[1::2], strict=True))))
        elif speaker == answer:
            turns.append(Turn("assistant", value))
    return turns


@dataclass(frozen=True)
class Prompt:
    """A prompt as int64 arrays (labels: -100 = no loss), and its blocks in the order in which they stand in it."""

    ids_L: np.ndarray
    labels_L: np.ndarray
    positions_3L: np.ndarray
    placed: list[Block]


@dataclass
class Draft:
    """A prompt in the making: pieces of ids, which of them carry loss, and where each block's placeholders start."""

    pieces: list[np.ndarray] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    placed: list[tuple[int, Block]] = field(default_factory=list)
    length: int = 0

    def add(self, *pieces: np.ndarray, trained: bool = False) -> None:
        for piece in pieces:
            self.pieces.append(piece)
            self.trained.append(trained)
            self.length += len(piece)


class PromptWriter:
    """Writes prompts. `encode` turns plain text into ids; the four ids are of the tokens around turns and media
    (None: media have none around them).
    """

    def __init__(
        self,
        encode: Callable[[str], np.ndarray],
        rules: Rules,
        system_prompt: str,
        *,
        turn_start_id: int,
        turn_end_id: int,
        media_start_id: int | None = None,
        media_end_id: int | None = None,
    ):
        self.encode = encode
        self.rules = rules
        self.turn_start = np.array([turn_start_id])
        self.turn_end = np.concatenate([[turn_end_id], encode("\n")])
        self.media_start, self.media_end = (
            np.empty(0, dtype=np.int64) if number is None else np.array([number])
            for number in (media_start_id, media_end_id)
        )
        self.answer_start = np.concatenate([self.turn_start, encode("assistant\n")])
        system = [self.turn_start, encode(f"system\n{system_prompt}"), self.turn_end]
        self.system = np.concatenate(system) if system_prompt else np.empty(0, dtype=np.int64)

    def write(self, turns: Sequence[Turn], blocks: Sequence[Block] = ()) -> Prompt:
        """The prompt of a conversation; it ends with the header of an answer if the last turn is the user's.

        Raises `KokaneeError` unless the conversation begins with the user and has one place for every block.
        """
        if not turns or turns[0].role != "user":
            raise KokaneeError("A conversation must begin with the user. Put the question first.")
        draft, waiting = Draft(), list(blocks)
        draft.add(self.system)
        for turn in _with_slots(turns, blocks):
            if turn.role == "user":
                self._add_question(draft, turn, waiting)
            elif turn.role == "assistant":
                draft.add(self.answer_start)
                draft.add(self.encode(turn.text), self.turn_end, trained=True)
            else:
                raise KokaneeError(f"There is no role {turn.role!r}. Use 'user' or 'assistant'.")
        if waiting:
            kinds = ", ".join(block.kind for block in waiting)
            raise KokaneeError(
                f"The conversation has no place for some of its media ({kinds}). Leave the turns' slots at None, "
                "which puts media before the first question, or add the places that are missing."
            )
        if turns[-1].role == "user":
            draft.add(self.answer_start)
        return self._finish(draft)

    def answer_ids(self, text: str) -> np.ndarray:
        """Ids (L,) of an answer's text, the end of its turn and the newline after it."""
        return np.concatenate([self.encode(text), self.turn_end])

    def _add_question(self, draft: Draft, turn: Turn, waiting: list[Block]) -> None:
        header = "user\n"
        text, start = header + turn.text, 0
        draft.add(self.turn_start)
        for offset, kind in turn.slots or ():
            place = next((i for i, block in enumerate(waiting) if block.kind == kind), None)
            if place is None:
                raise KokaneeError(
                    f"The conversation has a place for one more medium of kind {kind!r} than it was given. "
                    "Give that medium, or take the place away."
                )
            block = waiting.pop(place)
            draft.add(self.encode(text[start : len(header) + offset]), self.media_start)
            draft.placed.append((draft.length, block))
            draft.add(block_ids(block, self.rules), self.media_end)
            start = len(header) + offset
        draft.add(self.encode(text[start:]), self.turn_end)

    def _finish(self, draft: Draft) -> Prompt:
        ids_L = np.concatenate(draft.pieces)
        labels_L = np.full_like(ids_L, IGNORED)
        end = 0
        for piece, trained in zip(draft.pieces, draft.trained, strict=True):
            start, end = end, end + len(piece)
            if trained:
                labels_L[start:end] = piece
        positions_3L = self._positions(ids_L, draft.placed)
        return Prompt(ids_L, labels_L, positions_3L, [block for _, block in draft.placed])

    def _positions(self, ids_L: np.ndarray, placed: Sequence[tuple[int, Block]]) -> np.ndarray:
        """Positions (3, L) of a whole prompt."""
        return position_ids(ids_L, placed, self.rules)


def _with_slots(turns: Sequence[Turn], blocks: Sequence[Block]) -> Sequence[Turn]:
    """The turns, with the blocks placed before the first question if no turn says where they stand."""
    first = turns[0]
    if not blocks or first.slots is not None or any(turn.slots for turn in turns):
        return turns
    slots = tuple((number, block.kind) for number, block in enumerate(blocks))
    return [Turn("user", "\n" * len(blocks) + first.text, slots), *turns[1:]]
