"""One cache of the prompts, shared by all samples: the decode loop's attention.

What a prompt's tokens are looked up by (keys, values) is kept once, whatever the number of samples; each sample adds
what it says itself. A step reads the prompt's cache once for all samples of it, and copies none of it.

Axes: B prompts of P tokens, S samples of each (R = B x S rows, the samples of a prompt next to each other), T tokens
said so far, K heads of keys and G heads of queries for each of them (H = K x G), D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from kokanee.model import Kokanee

SHARED_PROMPT_ATTENTION = "kokanee_shared_prompt"
GROWTH = 64


class PromptCache:
    """Keys and values of B prompts, and of what S samples of each have said. `mask_BP`: 0 where a prompt is padding."""

    def __init__(self, prompts: Any, mask_BP: torch.Tensor, n_samples: int) -> None:
        self.prompts = [(layer.keys, layer.values) for layer in prompts.layers]
        self.n_samples = n_samples
        self.bias_B11P: torch.Tensor | None = None
        if not bool(mask_BP.all()):
            bias_BP = torch.zeros(mask_BP.shape, device=mask_BP.device).masked_fill(mask_BP == 0, -torch.inf)
            self.bias_B11P = bias_BP[:, None, None]
        self.said: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.length = 0

    def add(self, layer: int, key_RK1D: torch.Tensor, value_RK1D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep one more token of every row; all that the rows have said in this layer, (R, K, T, D)."""
        if layer == 0:
            self.length += 1
        if len(self.said) == layer:
            self.said.append((grown(key_RK1D[:, :, :0]), grown(value_RK1D[:, :, :0])))
        keys, values = self.said[layer]
        if keys.shape[2] < self.length:
            keys, values = self.said[layer] = grown(keys), grown(values)
        keys[:, :, self.length - 1 : self.length] = key_RK1D
        values[:, :, self.length - 1 : self.length] = value_RK1D
        return keys[:, :, : self.length], values[:, :, : self.length]

    def keep(self, prompts: Sequence[int]) -> None:
        """Go on with these prompts only, all samples of each."""
        rows = [prompt * self.n_samples + sample for prompt in prompts for sample in range(self.n_samples)]
        self.prompts = [(keys[list(prompts)], values[list(prompts)]) for keys, values in self.prompts]
        self.said = [(keys[rows], values[rows]) for keys, values in self.said]
        if self.bias_B11P is not None:
            self.bias_B11P = self.bias_B11P[list(prompts)]


def grown(states_RKTD: torch.Tensor) -> torch.Tensor:
    """The same with room for `GROWTH` more tokens, and for as many more as there are."""
    rows, heads, length, width = states_RKTD.shape
    larger = states_RKTD.new_empty(rows, heads, 2 * length + GROWTH, width)
    larger[:, :, :length] = states_RKTD
    return larger


def shared_prompt_attention(
    module: torch.nn.Module,
    query_RH1D: torch.Tensor,
    key_RK1D: torch.Tensor,
    value_RK1D: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    scaling: float,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token of every row to its prompt and to what the row has said: (R, 1, H, D).

    The cache must be given, and no mask. Scores and their softmax are computed in float32: keys of the Qwen2 family
    have entries beyond 100, and of scores rounded to bfloat16 little is left.
    """
    if prompt_cache is None or attention_mask is not None:
        raise ValueError("Samples of one prompt need its cache (`prompt_cache`) and no mask.")
    layer: Any = module.layer_idx
    key_RKTD, value_RKTD = prompt_cache.add(layer, key_RK1D, value_RK1D)
    key_BKPD, value_BKPD = prompt_cache.prompts[layer]
    n_prompts, n_heads, n_tokens, _ = key_BKPD.shape
    query_RKGD = query_RH1D.squeeze(2).unflatten(1, (n_heads, -1)).float() * scaling
    rows = (n_prompts, prompt_cache.n_samples)

    def by_prompt(states_RKGX: torch.Tensor) -> torch.Tensor:
        """(R, K, G, X) -> (B, K, S x G, X)."""
        return states_RKGX.unflatten(0, rows).transpose(1, 2).flatten(2, 3)

    def by_row(states_BKNX: torch.Tensor) -> torch.Tensor:
        """(B, K, S x G, X) -> (R, K, G, X)."""
        return states_BKNX.unflatten(2, (rows[1], -1)).transpose(1, 2).flatten(0, 1)

    of_prompt_BKNP = by_prompt(query_RKGD) @ key_BKPD.float().transpose(2, 3)
    if prompt_cache.bias_B11P is not None:
        of_prompt_BKNP = of_prompt_BKNP + prompt_cache.bias_B11P
    of_said_BKNT = by_prompt(query_RKGD @ key_RKTD.float().transpose(2, 3))
    weights = torch.cat([of_prompt_BKNP, of_said_BKNT], -1).softmax(-1).to(value_BKPD.dtype)
    seen_RKGD = by_row(weights[..., :n_tokens] @ value_BKPD) + by_row(weights[..., n_tokens:]) @ value_RKTD
    return seen_RKGD.flatten(1, 2)[:, None], None


@contextlib.contextmanager
def attention_in(model: Kokanee, attention: str) -> Iterator[None]:
    """The model's decoder has this attention, of which the arguments are given to the model."""
    config = model.language_model.config
    before = config._attn_implementation
    assert set(config.layer_types or ()) <= {"full_attention"}, "samples see the whole prompt"
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(SHARED_PROMPT_ATTENTION, shared_prompt_attention)
