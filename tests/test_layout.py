"""Golden data: numbers made once with the published code of video-SALMONN 2+ (commit 61faec0)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kokanee.errors import KokaneeError
from kokanee.layout import Block, Rules, audio_shares, block_ids, position_ids, step_times

GOLDEN = Path(__file__).parent / "golden" / "salmonn2plus"
SPLITS = json.loads((GOLDEN / "prompt_assembly.json").read_text())["audio_split"]
IMAGE, VIDEO, AUDIO, TEXT = 5, 6, 7, 1


def rules(**changes) -> Rules:
    return Rules(**{"image_id": IMAGE, "video_id": VIDEO, "audio_id": AUDIO, **changes})


def positions(block: Block, n_before: int = 2, n_after: int = 3, **changes) -> np.ndarray:
    """Positions of a block between some tokens of text."""
    ids = [TEXT] * n_before + block_ids(block, rules(**changes)).tolist() + [TEXT] * n_after
    return position_ids(np.array(ids), [(n_before, block)], rules(**changes))


@pytest.mark.parametrize("case", SPLITS, ids=lambda case: f"{case['count']}-{case['groups']}-{case['seconds']}")
def test_audio_shares_are_the_published_ones_until_the_sound_ends(case):
    shares = audio_shares(case["count"], case["groups"], case["seconds"])
    published = np.array(case["result"])
    if published.min() < 0:
        bounds = np.minimum(np.cumsum([0, *published[:-1]]), case["count"])
        published = np.diff([*bounds, case["count"]])
    assert shares.tolist() == published.tolist()


def test_audio_shares_use_up_all_tokens_and_are_never_negative():
    generator = np.random.default_rng(0)
    for _ in range(300):
        n_tokens, n_steps = (int(generator.integers(1, high)) for high in (400, 200))
        step_s = None if generator.random() < 0.3 else float(generator.uniform(0.01, 30))
        shares = audio_shares(n_tokens, n_steps, step_s)
        assert shares.sum() == n_tokens and shares.min() >= 0 and len(shares) == n_steps


def test_when_the_sound_ends_first_the_later_steps_get_none():
    assert audio_shares(60, 6, 8.0).tolist() == [16, 16, 16, 12, 0, 0]


def test_times_are_truncated_in_float32():
    step_s = 1.0999999999999999
    assert step_times(6, step_s)[5] == 11
    assert int(2 * step_s * 5) == 10


def test_steps_of_an_interleaved_block_are_visual_tokens_then_their_audio_tokens():
    block = Block("video", (2, 4, 4), 1.0, 5)
    assert block_ids(block, rules()).tolist() == [VIDEO] * 4 + [AUDIO] * 2 + [VIDEO] * 4 + [AUDIO] * 3


def test_merging_by_four_gives_a_quarter_of_the_rows_and_columns():
    block = Block("video", (2, 8, 12), 1.0)
    assert len(block_ids(block, rules(merge_size=4))) == 2 * 2 * 3
    assert positions(block, merge_size=4)[1:, 2:-3].max(axis=1).tolist() == [2 + 1, 2 + 2]


def test_audio_tokens_lie_at_their_own_times_in_an_interleaved_block():
    found = positions(Block("video", (2, 4, 4), 1.0, 5), n_before=10)[:, 10:-3]
    assert found[0].tolist() == [10, 10, 10, 10, 10, 11, 12, 12, 12, 12, 12, 13, 14]
    assert found[1].tolist() == [10, 10, 11, 11, 10, 10, 10, 10, 11, 11, 10, 10, 10]
    assert found[2].tolist() == [10, 11, 10, 11, 10, 11, 10, 11, 10, 11, 12, 13, 14]


def test_sound_alone_counts_time_and_height_and_keeps_width():
    assert positions(Block("audio", n_audio_tokens=3)).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 2, 2, 5, 6, 7],
    ]


def test_text_goes_on_after_the_largest_time_of_an_interleaved_block_and_else_after_the_largest_position():
    wide = (1, 2, 40)
    assert positions(Block("video", wide, 1.0, 4))[0, -3] == 2 + 4
    assert positions(Block("video", wide, 1.0))[0, -3] == 2 + 20
    assert positions(Block("image", wide))[0, -3] == 2 + 20


def test_as_published_sound_counts_on_like_text_after_the_video():
    found = positions(Block("video", (3, 4, 4), 0.3, 5), positions="as_published")
    assert found[0, 2:-3].tolist() == [2] * 4 + [4] * 4 + [6] * 4 + [7, 8, 9, 10, 11]
    alone = positions(Block("audio", n_audio_tokens=3), positions="as_published")
    assert alone.tolist() == [list(range(8))] * 3


def test_audio_windows_of_other_lengths_keep_their_seconds():
    block = Block("video", (2, 4, 4), 1.0, 9)
    assert audio_shares(9, 2, 1.0, tokens_per_s=4.0).tolist() == [4, 5]
    times = positions(block, audio_tokens_per_s=4.0)[0, 2:-3] - 2
    assert times.tolist() == [0] * 4 + [0, 0, 1, 1] + [2] * 4 + [2, 2, 3, 3, 4]


def test_two_blocks_follow_each_other_with_the_text_between():
    first, second = Block("video", (1, 4, 4), 1.0, 4), Block("audio", n_audio_tokens=2)
    ids = [TEXT, *block_ids(first, rules()), TEXT, *block_ids(second, rules()), TEXT]
    found = position_ids(np.array(ids), [(1, first), (10, second)], rules())
    assert found[0].tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda: Block("audio", (1, 2, 2)), "sound alone has no grid"),
        (lambda: Block("video"), "'video' with grid_thw=None"),
        (lambda: Block("audio"), "at least one audio token"),
        (lambda: Block("image", (1, 2, 2), n_audio_tokens=3), "image cannot hold audio"),
        (lambda: block_ids(Block("video", (1, 3, 4)), rules()), r"\(1, 3, 4\) patches cannot be merged"),
        (lambda: block_ids(Block("video", (0, 4, 4)), rules()), r"\(0, 4, 4\) patches cannot be merged"),
    ],
)
def test_impossible_blocks_are_refused(wrong, reason):
    with pytest.raises(KokaneeError, match=reason):
        wrong()
