"""Several answers behind one prompt, packed into one sequence: the prompt is computed once, and no answer sees another.

A packed sequence is `[prompt | branch 1 | branch 2 | ...]`. Every branch goes on from the prompt's end in its
positions, and its queries see the prompt and itself, each up to their own place.

Axes: B sequences, L tokens; S segment numbers (0 the prompt, 1, 2, ... the branches, -1 padding); N label tokens of all
sequences, D width of a state; H heads of keys, W their width, P tokens before the answers, R the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from kokanee.attention import BRANCH_ATTENTION
from kokanee.losses import token_log_probs
from kokanee.model import Kokanee
from kokanee.prompt import IGNORED

PADDING = -1
MASKED_PAIRS = 2**26  # of queries and keys, of all heads, up to which an accelerator gets one call with a mask
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


def short_mask(segments_BL: torch.Tensor, heads: int) -> torch.Tensor | None:
    """The mask of sequences that are short enough for it, where they are on an accelerator."""
    pairs = heads * len(segments_BL) * segments_BL.shape[1] ** 2
    return branch_mask(segments_BL) if segments_BL.device.type != "cpu" and pairs <= MASKED_PAIRS else None


def lengths_of(segments_BL: torch.Tensor) -> list[list[int]]:
    """Of each sequence the lengths of its prompt and of each branch, as `attention.branch_attention` wants them."""
    return [torch.bincount(row_L[row_L != PADDING]).tolist() for row_L in segments_BL.cpu()]  # waits once for a GPU


@contextlib.contextmanager
def branch_attention_in(model: Kokanee) -> Iterator[None]:
    """The model's decoder computes packed sequences without a mask, and its last layer no more of the prompts than
    answers see of them there: keys and values. The backward pass belongs inside too.

    (Where activations are computed again in it, attention is chosen anew.)
    """
    config = model.language_model.config
    before, kinds = config._attn_implementation, set(config.layer_types or ())
    assert kinds == {"full_attention"}, "branches see the whole prompt"
    config._attn_implementation = BRANCH_ATTENTION
    last: Any = model.language_model.layers[-1]
    hooks = [
        last.register_forward_pre_hook(without_prompts, with_kwargs=True),
        last.register_forward_hook(with_prompts, with_kwargs=True),
    ]
    try:
        yield
    finally:
        config._attn_implementation = before
        for hook in hooks:
            hook.remove()


def without_prompts(layer: Any, states: tuple[torch.Tensor], more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a layer is given in place of whole sequences (B, L, D), if nobody reads the states that it gives to prompts:
    what comes after the shortest prompt, and the keys and values of what stands before."""
    if more.get("branches") is None:
        return states, more
    attention, start = layer.self_attn, shortest_prompt(more)
    prompts_BPD = layer.input_layernorm(states[0][:, :start])
    key_BHPW, value_BHPW = (
        product(prompts_BPD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for product in (attention.k_proj, attention.v_proj)
    )
    cos_BLW, sin_BLW = (part.to(key_BHPW.device) for part in more["position_embeddings"])  # of another layer's GPU
    _, key_BHPW = apply_rotary_pos_emb(key_BHPW, key_BHPW, cos_BLW[:, :start], sin_BLW[:, :start])
    after = {"position_embeddings": (cos_BLW[:, start:], sin_BLW[:, start:]), "before": (key_BHPW, value_BHPW)}
    return (states[0][:, start:],), more | after


def with_prompts(layer: Any, states: tuple[torch.Tensor], more: dict[str, Any], made_BRD: torch.Tensor) -> torch.Tensor:
    """A layer's states at their places in whole sequences; 0 for what was left out."""
    return made_BRD if more.get("branches") is None else pad(made_BRD, (0, 0, shortest_prompt(more), 0))


def shortest_prompt(more: dict[str, Any]) -> int:
    """The length of the shortest prompt of packed sequences, as a layer is told of them."""
    return min(prompt for prompt, *_ in more["branches"])


def packed_log_probs(
    model: Kokanee, batch: Sample, **media: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (N,) in float32 of all label tokens of packed sequences, from one pass; for each its sequence
    (N,) and its branch (N,), from 1 on.

    `batch` is from `collate_packed`; `media` are the arguments of `Kokanee.encode_media`. Logits are made at label
    tokens only. Call it, and `backward`, inside `branch_attention_in`. Raises `ValueError` for a label in a prompt,
    which the last layer leaves out.
    """
    branches = lengths_of(batch["segments"])
    targets_BL = batch["labels"][:, 1:]
    rows_N, places_N = (targets_BL != IGNORED).nonzero(as_tuple=True)
    if (batch["segments"][rows_N, places_N] <= 0).any():
        raise ValueError("Packed answers have labels of their own only, none in a prompt.")
    hidden_BLD = model.language_model(
        inputs_embeds=model.embed(batch["input_ids"], **media),
        attention_mask={"full_attention": None},  # none is to be made
        position_ids=batch["position_ids"],
        use_cache=False,
        branches=branches,
        short_mask=short_mask(batch["segments"], model.config.text_config.num_attention_heads),
    ).last_hidden_state.to(targets_BL.device)  # where a model is spread over several, it is of the last one's
    logits_NV = model.lm_head(hidden_BLD[rows_N, places_N])
    log_probs_N = token_log_probs(logits_NV.to(targets_BL.device), targets_BL[rows_N, places_N])
    return log_probs_N, rows_N, batch["segments"][rows_N, places_N + 1]
