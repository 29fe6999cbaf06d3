"""Where media tokens stand in a prompt, and the 3-D position of every token (2506.15220, synchronous interleaving).

A medium is a `Block` of tokens between `<|vision_start|>` and `<|vision_end|>`. In a video with sound each time step is
its visual tokens followed by its share of the audio tokens. Positions are (time, height, width), in `units_per_s` a
second along time.

Tensor axes: L tokens, N tokens of one block, T time steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kokanee.errors import KokaneeError

Kind = Literal["video", "image", "audio"]
Positions = Literal["trained", "as_published"]


@dataclass(frozen=True)
class Block:
    """The sizes of one medium in a prompt.

    `grid_thw`: time steps, rows and columns in patches, before merging (None for sound alone). `step_s`: seconds from
    one time step to the next (None: unknown; then a step counts as 1 s and audio tokens are spread evenly).
    `n_audio_tokens`: 0 without sound.
    """

    kind: Kind
    grid_thw: tuple[int, int, int] | None = None
    step_s: float | None = None
    n_audio_tokens: int = 0

    def __post_init__(self):
        if (self.kind == "audio") != (self.grid_thw is None):
            raise KokaneeError(f"A block of kind {self.kind!r} with grid_thw={self.grid_thw}: sound alone has no grid.")
        if self.kind == "audio" and self.n_audio_tokens < 1:
            raise KokaneeError("A block of sound needs at least one audio token; this one has none.")
        if self.kind == "image" and self.n_audio_tokens:
            raise KokaneeError("An image cannot hold audio tokens. Put the sound into a block of its own.")


@dataclass(frozen=True)
class Rules:
    """What a layout depends on: ids of placeholders, merge size, audio tokens a second, position units a second."""

    image_id: int
    video_id: int
    audio_id: int
    merge_size: int = 2
    audio_tokens_per_s: float = 2.0
    units_per_s: float = 2.0
    positions: Positions = "trained"


def audio_shares(n_tokens: int, n_steps: int, step_s: float | None, tokens_per_s: float = 2.0) -> np.ndarray:
    """How many of `n_tokens` audio tokens follow each of `n_steps` time steps: (n_steps,) int64, in all `n_tokens`.

    With `step_s`, step k takes the tokens whose time lies inside it (times truncated in float32, as in training), and
    the last step takes all that remain, also the silence that fills the last chunk. When the sound is shorter than the
    video, the steps after its end get none (the published code fails there). Without `step_s` the shares are equal and
    the remainder is spread evenly.
    """
    if step_s is None:
        share, n_left = divmod(n_tokens, n_steps)
        shares_T = np.full(n_steps, share, dtype=np.int64)
        if n_left:
            places = np.floor(np.arange(1, n_left + 1) * (n_steps / n_left)).astype(np.int64) - 1
            shares_T[np.minimum(places, n_steps - 1)] += 1
        return shares_T
    bounds = np.empty(n_steps + 1, dtype=np.int64)
    bounds[:-1] = np.minimum(step_times(n_steps, step_s, tokens_per_s), n_tokens)
    bounds[-1] = n_tokens
    return np.diff(bounds)


def step_times(n_steps: int, step_s: float, units_per_s: float = 2.0) -> np.ndarray:
    """trunc(units_per_s * step_s * k) for k < n_steps, in float32 like the published code: (n_steps,) int64."""
    times_T = np.arange(n_steps, dtype=np.float32) * np.float32(step_s) * np.float32(units_per_s)
    return times_T.astype(np.int64)


def block_ids(block: Block, rules: Rules) -> np.ndarray:
    """The placeholder ids (N,) int64 of a block, without its start and end tokens."""
    if block.grid_thw is None:
        return np.full(block.n_audio_tokens, rules.audio_id, dtype=np.int64)
    n_steps, n_rows, n_columns = _merged(block.grid_thw, rules.merge_size)
    n_per_step = n_rows * n_columns
    pad_id = rules.image_id if block.kind == "image" else rules.video_id
    if not block.n_audio_tokens:
        return np.full(n_steps * n_per_step, pad_id, dtype=np.int64)
    shares_T = audio_shares(block.n_audio_tokens, n_steps, block.step_s, rules.audio_tokens_per_s)
    counts = np.empty((n_steps, 2), dtype=np.int64)
    counts[:, 0] = n_per_step
    counts[:, 1] = shares_T
    return np.repeat(np.tile(np.array([pad_id, rules.audio_id]), n_steps), counts.ravel())


def position_ids(ids_L: np.ndarray, blocks: Sequence[tuple[int, Block]], rules: Rules) -> np.ndarray:
    """Positions (3, L) int64 of a whole prompt; `blocks` pairs each block with the index of its first placeholder.

    Text counts on by one in all three rows. It goes on after an interleaved block from the block's largest *time*, and
    after any other block from its largest position in any row.
    """
    positions_3L = np.empty((3, len(ids_L)), dtype=np.int64)
    with_image = any(block.kind == "image" for _, block in blocks)
    with_video = any(block.kind == "video" for _, block in blocks)
    end, following = 0, 0
    for start, block in blocks:
        sound_is_text = rules.positions == "as_published" or (with_image and not with_video)
        if block.kind == "audio" and sound_is_text:
            continue
        following = _count_on(positions_3L, end, start, following)
        positions_3N, n_units = _block_positions(ids_L, start, block, rules)
        end = start + positions_3N.shape[1]
        positions_3L[:, start:end] = positions_3N + following
        following += n_units
    _count_on(positions_3L, end, len(ids_L), following)
    return positions_3L


def _count_on(positions_3L: np.ndarray, start: int, end: int, following: int) -> int:
    """Number the text from `start` to `end`, beginning with `following`; returns the next free number."""
    positions_3L[:, start:end] = np.arange(following, following + end - start)
    return following + end - start


def _block_positions(ids_L: np.ndarray, start: int, block: Block, rules: Rules) -> tuple[np.ndarray, int]:
    """Positions (3, N) of a block relative to its start, and how many units the text after it is moved on."""
    if block.grid_thw is None:
        times_N = _audio_times(block.n_audio_tokens, rules)
        return np.stack([times_N, times_N, np.zeros_like(times_N)]), int(times_N[-1]) + 1
    trained = rules.positions == "trained"
    step_s = block.step_s if trained and block.step_s is not None else 1.0
    if block.kind == "image":
        step_s = 0.0
    visual_3N = _grid_positions(_merged(block.grid_thw, rules.merge_size), step_s, rules.units_per_s)
    if not (block.n_audio_tokens and trained):
        return visual_3N, int(visual_3N.max()) + 1
    times_N = _audio_times(block.n_audio_tokens, rules)
    n_tokens = visual_3N.shape[1] + len(times_N)
    is_audio_N = ids_L[start : start + n_tokens] == rules.audio_id
    positions_3N = np.empty((3, n_tokens), dtype=np.int64)
    positions_3N[:, ~is_audio_N] = visual_3N
    positions_3N[:, is_audio_N] = np.stack([times_N, np.zeros_like(times_N), times_N])
    return positions_3N, int(positions_3N[0].max()) + 1


def _audio_times(n_tokens: int, rules: Rules) -> np.ndarray:
    return step_times(n_tokens, 1.0 / rules.audio_tokens_per_s, rules.units_per_s)


def _grid_positions(merged_thw: tuple[int, int, int], step_s: float, units_per_s: float) -> np.ndarray:
    """Positions (3, T * rows * columns) of a merged grid, time slowest."""
    n_steps, n_rows, n_columns = merged_thw
    grid_3THW = np.empty((3, n_steps, n_rows, n_columns), dtype=np.int64)
    grid_3THW[0] = step_times(n_steps, step_s, units_per_s)[:, None, None]
    grid_3THW[1] = np.arange(n_rows)[:, None]
    grid_3THW[2] = np.arange(n_columns)
    return grid_3THW.reshape(3, -1)


def _merged(grid_thw: tuple[int, int, int], merge_size: int) -> tuple[int, int, int]:
    n_steps, n_rows, n_columns = grid_thw
    if min(grid_thw) < 1 or n_rows % merge_size or n_columns % merge_size:
        raise KokaneeError(
            f"A grid of {grid_thw} patches cannot be merged {merge_size} x {merge_size}. "
            "Resize the frames with Processor.fit first."
        )
    return n_steps, n_rows // merge_size, n_columns // merge_size
