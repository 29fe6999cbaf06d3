"""Laws of segment attention: the numbers of one segment at a time, whatever the lengths."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from kokanee.attention import SEGMENT_ATTENTION, segment_attention

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
