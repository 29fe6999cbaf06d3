"""Laws of the shared prompt: its samples compute what each would alone, and the prompt is kept once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kokanee.prompt_cache import GROWTH, SHARED_PROMPT_ATTENTION, PromptCache, attention_in, shared_prompt_attention
from tiny import tiny_model

PROMPTS, SAMPLES, TOKENS, HEADS, GROUPS, WIDTH = 2, 3, 7, 2, 2, 8


def prompt_states(seed: int = 0) -> Any:
    """Keys and values of two prompts in one layer."""
    torch.manual_seed(seed)
    return SimpleNamespace(
        layers=[
            SimpleNamespace(
                keys=torch.randn(PROMPTS, HEADS, TOKENS, WIDTH), values=torch.randn(PROMPTS, HEADS, TOKENS, WIDTH)
            )
        ]
    )


def expected(query_RHD, prompts, mask_BP, said, row: int):
    """Attention of one row, plainly: all keys that it may see, one after the other."""
    layer, seen = prompts.layers[0], mask_BP[row // SAMPLES].bool()
    out = []
    for head in range(HEADS * GROUPS):
        of = head // GROUPS
        keys = torch.cat([layer.keys[row // SAMPLES, of][seen], torch.stack([key[row, of] for key, _ in said])])
        values = torch.cat([layer.values[row // SAMPLES, of][seen], torch.stack([value[row, of] for _, value in said])])
        out.append(torch.softmax(keys @ query_RHD[row, head] / WIDTH**0.5, 0) @ values)
    return torch.stack(out)


@pytest.mark.parametrize("padded", [False, True])
def test_every_sample_sees_its_prompt_and_what_it_said_itself(padded):
    prompts, mask_BP = prompt_states(), torch.ones(PROMPTS, TOKENS, dtype=torch.int64)
    if padded:
        mask_BP[1, :3] = 0
    cache, module, said = PromptCache(prompts, mask_BP, SAMPLES), SimpleNamespace(layer_idx=0), []
    for _ in range(3):
        query = torch.randn(PROMPTS * SAMPLES, HEADS * GROUPS, 1, WIDTH)
        key, value = (torch.randn(PROMPTS * SAMPLES, HEADS, 1, WIDTH) for _ in range(2))
        said.append((key[:, :, 0], value[:, :, 0]))
        found, _ = shared_prompt_attention(module, query, key, value, prompt_cache=cache, scaling=WIDTH**-0.5)
        for row in range(PROMPTS * SAMPLES):
            wanted = expected(query[:, :, 0], prompts, mask_BP, said, row)
            assert torch.allclose(found[row, 0], wanted, atol=1e-6)


def test_what_was_said_is_kept_when_the_room_grows():
    cache = PromptCache(prompt_states(), torch.ones(PROMPTS, TOKENS), SAMPLES)
    keys = [torch.full((PROMPTS * SAMPLES, HEADS, 1, WIDTH), float(step)) for step in range(2 * GROWTH + 3)]
    for step, key in enumerate(keys):
        held, values = cache.add(0, key, -key)
        assert held.shape[2] == values.shape[2] == step + 1
    assert torch.equal(held, torch.cat(keys, 2)) and torch.equal(values, -held)


def test_the_prompt_is_not_repeated_for_its_samples():
    prompts = prompt_states()
    cache = PromptCache(prompts, torch.ones(PROMPTS, TOKENS), 100)
    assert cache.prompts[0][0].data_ptr() == prompts.layers[0].keys.data_ptr()


@pytest.mark.parametrize("given", ["nothing", "a mask"])
def test_without_a_cache_or_with_a_mask_it_refuses(given):
    cache = PromptCache(prompt_states(), torch.ones(PROMPTS, TOKENS), SAMPLES) if given == "a mask" else None
    states = torch.randn(PROMPTS * SAMPLES, HEADS, 1, WIDTH)
    mask = torch.zeros(1) if given == "a mask" else None
    with pytest.raises(ValueError, match="no mask"):
        shared_prompt_attention(
            SimpleNamespace(layer_idx=0), states, states, states, mask, prompt_cache=cache, scaling=1.0
        )


def test_the_models_attention_is_its_own_again_afterwards():
    model = tiny_model()
    before = model.language_model.config._attn_implementation
    with pytest.raises(RuntimeError), attention_in(model, SHARED_PROMPT_ATTENTION):
        assert model.language_model.config._attn_implementation != before
        raise RuntimeError
    assert model.language_model.config._attn_implementation == before


@torch.no_grad()
def test_in_bfloat16_scores_are_not_rounded():
    """Keys with entries as large as those of the Qwen2 family, which all keys have alike: scores differ in their last
    places only."""
    torch.manual_seed(0)
    tokens, width = 512, 64
    large = torch.zeros(width).index_fill(0, torch.arange(0, width, 8), 90.0)
    key = (torch.randn(1, HEADS, tokens, width) * 2 + large).bfloat16()
    value = torch.randn(1, HEADS, tokens, width).bfloat16()
    query = (torch.randn(1, HEADS * GROUPS, 1, width) * 3.5).bfloat16()
    prompts: Any = SimpleNamespace(layers=[SimpleNamespace(keys=key[:, :, :-1], values=value[:, :, :-1])])
    cache, scaling = PromptCache(prompts, torch.ones(1, tokens - 1), 1), width**-0.5
    found, _ = shared_prompt_attention(
        SimpleNamespace(layer_idx=0), query, key[:, :, -1:], value[:, :, -1:], prompt_cache=cache, scaling=scaling
    )
    keys, values = (states.double().repeat_interleave(GROUPS, 1) for states in (key, value))
    wanted = (query.double() @ keys.transpose(2, 3) * scaling).softmax(-1) @ values
    error = (found[0, 0].double() - wanted[0, :, 0]).norm(dim=-1) / wanted[0, :, 0].norm(dim=-1)
    assert found.dtype == torch.bfloat16 and error.max() < 0.01
