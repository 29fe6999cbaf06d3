"""Attention of packed and of padded sequences, registered with transformers: of segments, of branches behind one
prompt, and of prompts of several lengths.

Segments (the visual tower): every segment sees only itself. transformers runs such segments one by one in Python
unless flash-attn is there. All of one length are one batch for `scaled_dot_product_attention`: the same numbers, far
fewer calls (windows at the edges of a frame are smaller: three or four lengths in all, in thousands of segments).

Branches (the decoder): a sequence `[prompt | answer 1 | answer 2 | ...]`, in which the prompt sees itself and each
answer the prompt and itself. No mask over all pairs is made: each answer is one call on `[prompt | answer]`. Short
sequences on an accelerator, where so many calls take longer than what they compute, are one call with a mask.

Padded prompts (the decoder, on many long ones): each is one causal call of its own, without a mask over all pairs.

Axes: S tokens of all segments, N segments of L tokens each, H heads, D width of a head, B sequences, P prompt tokens,
R answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

# transformers hands segment bounds only to implementations with "flash" in their name.
SEGMENT_ATTENTION = "kokanee_segments_not_flash"
BRANCH_ATTENTION = "kokanee_branches"
PADDED_ATTENTION = "kokanee_padded"


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
    how: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    lengths_N = torch.diff(cu_seq_lens_q)
    distinct = sorted(set(lengths_N.tolist()))
    if len(distinct) == 1:
        query_NHLD, key_NHLD, value_NHLD = (
            states_1HSD[0].unflatten(1, (-1, distinct[0])).transpose(0, 1)
            for states_1HSD in (query_1HSD, key_1HSD, value_1HSD)
        )
        seen_NHLD = functional.scaled_dot_product_attention(query_NHLD, key_NHLD, value_NHLD, **how)
        return seen_NHLD.transpose(1, 2).flatten(0, 1)[None], None
    seen_1SHD = torch.empty_like(query_1HSD.transpose(1, 2))
    for length in distinct:
        starts_N = cu_seq_lens_q[:-1][lengths_N == length]
        places_NL = (starts_N[:, None] + torch.arange(length, device=starts_N.device)).to(query_1HSD.device)
        query_NHLD, key_NHLD, value_NHLD = (
            states_1HSD[0, :, places_NL].transpose(0, 1) for states_1HSD in (query_1HSD, key_1HSD, value_1HSD)
        )
        seen_NHLD = functional.scaled_dot_product_attention(query_NHLD, key_NHLD, value_NHLD, **how)
        seen_1SHD[0, places_NL] = seen_NHLD.transpose(1, 2)
    return seen_1SHD, None


def branch_attention(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    branches: Sequence[Sequence[int]] | None = None,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
    short_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of packed answers: (B, S, H, D); keys and values may have fewer heads than queries.

    `branches`: of each sequence the lengths of its prompt and of each answer; what comes after is padding, whose states
    are 0. They must be given, and no mask: without them answers would see each other, which nobody would notice.
    `before`: keys and values of the first tokens, all of prompts, where the others are given without them.
    `short_mask` (B, 1, L, L): which key each query of the whole sequences sees, where this is to be one call; states of
    padding are any then.
    """
    if branches is None or attention_mask is not None:
        raise ValueError("Packed answers need their lengths (`branches`) and no mask.")
    left_out = 0 if before is None else before[0].shape[2]
    if before is not None:
        key_BHSD, value_BHSD = (torch.cat(parts, dim=2) for parts in zip(before, (key_BHSD, value_BHSD), strict=True))
    how: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if key_BHSD.shape[1] != query_BHSD.shape[1]:
        how["enable_gqa"] = True  # only here: not every kernel that takes a mask can do this
    if short_mask is not None:
        seen_BHSD = functional.scaled_dot_product_attention(
            query_BHSD, key_BHSD, value_BHSD, short_mask[:, :, left_out:], **how
        )
        return seen_BHSD.transpose(1, 2), None
    seen_BSHD = query_BHSD.new_zeros(query_BHSD.transpose(1, 2).shape)
    for row, (prompt, *answers) in enumerate(branches):
        query_HSD, key_HSD, value_HSD = query_BHSD[row], key_BHSD[row], value_BHSD[row]
        parts = []
        if prompt > left_out:
            parts.append(attend(query_HSD[:, : prompt - left_out], key_HSD[:, :prompt], value_HSD[:, :prompt], how))
        start = prompt
        for length in answers:
            stop = start + length
            key_HLD, value_HLD = (
                torch.cat([states_HSD[:, :prompt], states_HSD[:, start:stop]], dim=1)
                for states_HSD in (key_HSD, value_HSD)
            )
            parts.append(attend(query_HSD[:, start - left_out : stop - left_out], key_HLD, value_HLD, how))
            start = stop
        seen_BSHD[row, : start - left_out] = torch.cat(parts, dim=1).transpose(0, 1)
    return seen_BSHD, None


def attend(
    query_HRD: torch.Tensor, key_HLD: torch.Tensor, value_HLD: torch.Tensor, how: dict[str, Any]
) -> torch.Tensor:
    """Causal attention in which the last query stands at the last key: (H, R, D)."""
    bias: Any = causal_lower_right(query_HRD.shape[1], key_HLD.shape[1])
    return functional.scaled_dot_product_attention(query_HRD[None], key_HLD[None], value_HLD[None], bias, **how)[0]


def padded_attention(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    starts: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of sequences that are padded on the left: (B, S, H, D), 0 where there is padding.

    `starts`: where each begins. They must be given, and no mask.
    """
    if starts is None or attention_mask is not None:
        raise ValueError("Padded prompts need their beginnings (`starts`) and no mask.")
    how: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if key_BHSD.shape[1] != query_BHSD.shape[1]:
        how["enable_gqa"] = True
    seen_BSHD = query_BHSD.new_zeros(query_BHSD.transpose(1, 2).shape)
    for row, start in enumerate(starts):
        query_HLD, key_HLD, value_HLD = (states[row, :, start:] for states in (query_BHSD, key_BHSD, value_BHSD))
        seen_BSHD[row, start:] = attend(query_HLD, key_HLD, value_HLD, how).transpose(0, 1)
    return seen_BSHD, None


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionInterface.register(BRANCH_ATTENTION, branch_attention)
AttentionInterface.register(PADDED_ATTENTION, padded_attention)
