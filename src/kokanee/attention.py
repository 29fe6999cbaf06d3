"""Attention of a packed sequence in which every segment sees only itself, for the visual tower.

transformers runs such segments one by one in Python unless flash-attn is there. Neighbours of equal length are one
batch for `scaled_dot_product_attention`: the same numbers, far fewer calls.

Axes: S tokens of all segments, N segments of L tokens each, H heads, D width of a head.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

# transformers hands segment bounds only to implementations with "flash" in their name.
SEGMENT_ATTENTION = "kokanee_segments_not_flash"


def segment_attention(
    module: torch.nn.Module,
    query_1HSD: torch.Tensor,
    key_1HSD: torch.Tensor,
    value_1HSD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Bidirectional attention inside each segment: (1, S, H, D); `cu_seq_lens_q` (segments + 1,) are the bounds.

    The signature is transformers'; its other arguments (bounds of the keys, longest segments) follow from these.
    """
    assert attention_mask is None, "segments take the place of a mask"
    pieces, start = [], 0
    for length, run in groupby(torch.diff(cu_seq_lens_q).tolist()):
        count = len(list(run))
        stop = start + count * length
        query_NHLD, key_NHLD, value_NHLD = (
            states_1HSD[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1)
            for states_1HSD in (query_1HSD, key_1HSD, value_1HSD)
        )
        seen_NHLD = functional.scaled_dot_product_attention(
            query_NHLD, key_NHLD, value_NHLD, dropout_p=dropout, scale=scaling
        )
        pieces.append(seen_NHLD.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(pieces)[None], None


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
