"""Laws of the shared prompt: its samples compute what each would alone, and the prompt is kept once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kokanee.prompt_cache import GROWTH, PromptCache, shared_prompt_attention, shared_prompt_in
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
    with pytest.raises(RuntimeError), shared_prompt_in(model):
        assert model.language_model.config._attn_implementation != before
        raise RuntimeError
    assert model.language_model.config._attn_implementation == before
