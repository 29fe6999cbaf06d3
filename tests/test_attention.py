"""Laws of segment attention: the numbers of one segment at a time, whatever the lengths."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from kokanee.attention import SEGMENT_ATTENTION, branch_attention, segment_attention
from kokanee.prefix import branch_mask

HEADS, WIDTH = 3, 8


def one_by_one(query, key, value, bounds, scale):
    """What `segment_attention` should give, segment after segment: (1, S, H, D)."""
    pieces = [
        functional.scaled_dot_product_attention(*(part[:, :, a:b] for part in (query, key, value)), scale=scale)
        for a, b in pairwise(bounds)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 1, 7, 7, 2, 7], [3, 5, 3, 5], [9, 1]])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_every_segment_sees_itself_alone(lengths, scale):
    noise = torch.Generator().manual_seed(sum(lengths))
    query, key, value = (torch.randn(1, HEADS, sum(lengths), WIDTH, generator=noise) for _ in range(3))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    seen, weights = segment_attention(
        torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=torch.tensor(bounds), scaling=scale
    )
    assert weights is None
    assert torch.allclose(seen, one_by_one(query, key, value, bounds, scale), atol=1e-6)


@pytest.mark.parametrize("window_px", [16, 32, 48])
def test_the_visual_tower_gives_the_same_numbers_with_it(tiny, window_px):
    """Two clips of different sizes; windows of 32 pixels cut 48-pixel frames unequally."""
    noise = torch.Generator().manual_seed(1)
    grids = torch.tensor([[3, 6, 6], [2, 4, 8]])
    patches = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 8 * 8, generator=noise)
    found = []
    for attention in (SEGMENT_ATTENTION, "sdpa", "eager"):
        model = copy.deepcopy(tiny[0])
        model.visual.config._attn_implementation = attention
        model.visual.window_size, model.visual.fullatt_block_indexes = window_px, [1]
        with torch.no_grad():
            found.append(model.encode_video(patches, grids))
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


BRANCHES = [[7, 4, 5], [6, 3, 2, 5], [5], [4, 1]]


def packed_states(branches, kv_heads=2, heads=4, length=20):
    noise = torch.Generator().manual_seed(3)
    shapes = [(len(branches), n, length, WIDTH) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=noise, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense(states, branches, length=20):
    """The same by a mask over all pairs; and which queries are no padding."""
    segments = torch.full((len(branches), length), -1)
    for row, lengths in enumerate(branches):
        segments[row, : sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = functional.scaled_dot_product_attention(*states, branch_mask(segments), enable_gqa=True)
    return seen.transpose(1, 2), (segments >= 0)[..., None, None]


def test_branches_are_what_a_dense_mask_gives_and_so_are_their_gradients():
    states = packed_states(BRANCHES)
    seen, _ = branch_attention(torch.nn.Identity(), *states, branches=BRANCHES)
    wanted, real = dense(states, BRANCHES)
    assert torch.allclose(seen, wanted * real, atol=1e-12)
    weights = torch.randn(seen.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * real
    ours, theirs = (torch.autograd.grad((found * weights).sum(), states) for found in (seen, wanted))
    assert all(torch.allclose(one, two, atol=1e-12) for one, two in zip(ours, theirs, strict=True))


def test_the_first_tokens_of_prompts_may_give_keys_and_values_alone():
    states, shortest = packed_states(BRANCHES), min(prompt for prompt, *_ in BRANCHES)
    wanted, real = dense(states, BRANCHES)
    for start in range(1, shortest + 1):
        before = (states[1][:, :, :start], states[2][:, :, :start])
        left = [one[:, :, start:] for one in states]
        seen, _ = branch_attention(torch.nn.Identity(), *left, branches=BRANCHES, before=before)
        assert torch.allclose(seen, (wanted * real)[:, start:], atol=1e-12)


def test_one_call_with_a_mask_gives_the_same():
    states, shortest = packed_states(BRANCHES), min(prompt for prompt, *_ in BRANCHES)
    wanted, real = dense(states, BRANCHES)
    segments = torch.full((len(BRANCHES), 20), -1)
    for row, lengths in enumerate(BRANCHES):
        segments[row, : sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = branch_mask(segments)
    for start in (0, shortest):
        before = (states[1][:, :, :start], states[2][:, :, :start]) if start else None
        left = [one[:, :, start:] for one in states]
        how = {"branches": BRANCHES, "before": before, "short_mask": mask}
        seen, _ = branch_attention(torch.nn.Identity(), *left, **how)
        assert torch.allclose(seen * real[:, start:], (wanted * real)[:, start:], atol=1e-12)


def test_without_their_lengths_or_with_a_mask_branches_are_refused():
    states = packed_states(BRANCHES)
    with pytest.raises(ValueError, match="need their lengths"):
        branch_attention(torch.nn.Identity(), *states)
    with pytest.raises(ValueError, match="no mask"):
        branch_attention(torch.nn.Identity(), *states, torch.ones(1), branches=BRANCHES)
