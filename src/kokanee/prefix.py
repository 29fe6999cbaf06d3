"""Several answers behind one prompt, packed into one sequence: the prompt is computed once, and no answer sees another.

A packed sequence is `[prompt | branch 1 | branch 2 | ...]`. Every branch goes on from the prompt's end in its
positions, and its queries see the prompt and itself, each up to their own place.

Axes: B sequences, L tokens; S segment numbers (0 the prompt, 1, 2, ... the branches, -1 padding).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from kokanee.prompt import IGNORED

PADDING = -1
Sample = dict[str, torch.Tensor]


def pack(samples: Sequence[Sample], prompt_length: int) -> Sample:
    """Conversations that share their first `prompt_length` tokens -> one sample: `input_ids`, `labels`, `segments` (L,)
    and `position_ids` (3, L). Labels of the shared part are those of the first.

    No branch may begin with a label: the state before it in the packed sequence is another branch's.
    """
    first = samples[0]
    shared = first["input_ids"][:prompt_length]
    assert all(torch.equal(sample["input_ids"][:prompt_length], shared) for sample in samples), "prompts differ"
    assert all(sample["labels"][prompt_length] == IGNORED for sample in samples), "a branch begins with a label"
    branches = [
        {
            "input_ids": sample["input_ids"][prompt_length:],
            "labels": sample["labels"][prompt_length:],
            "position_ids": sample["position_ids"][:, prompt_length:],
        }
        for sample in samples
    ]
    lengths = [prompt_length, *(len(branch["input_ids"]) for branch in branches)]
    return {
        "input_ids": torch.cat([shared, *(branch["input_ids"] for branch in branches)]),
        "labels": torch.cat([first["labels"][:prompt_length], *(branch["labels"] for branch in branches)]),
        "position_ids": torch.cat(
            [first["position_ids"][:, :prompt_length], *(branch["position_ids"] for branch in branches)], dim=1
        ),
        "segments": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
    }


def collate_packed(samples: Sequence[Sample], pad_id: int) -> Sample:
    """Packed samples, padded on the right: (B, L), positions (3, B, L)."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    fills = {"input_ids": pad_id, "labels": IGNORED, "segments": PADDING, "position_ids": 1}
    padded = {
        name: [pad(sample[name], (0, longest - sample[name].shape[-1]), value=fill) for sample in samples]
        for name, fill in fills.items()
    }
    return {name: torch.stack(rows, dim=1 if name == "position_ids" else 0) for name, rows in padded.items()}


def branch_mask(segments_BL: torch.Tensor) -> torch.Tensor:
    """Which key each query sees, (B, 1, L, L) bool: the prompt and its own branch, up to itself."""
    length = segments_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    query_BL1, key_B1L = segments_BL[:, :, None], segments_BL[:, None, :]
    return ((query_BL1 == key_B1L) | (key_B1L == 0))[:, None] & causal_LL
