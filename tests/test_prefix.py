"""Laws of packing: branches behind one prompt give the numbers of separate conversations, and only the mask does it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kokanee.layout import Block
from kokanee.prefix import PADDING, branch_attention_in, branch_mask, collate_packed, pack, packed_log_probs, short_mask
from kokanee.processor import Turn
from kokanee.prompt import IGNORED

SAID = (
    ("Describe the video.", "A red circle jumps. Then a bell rings twice."),
    ("Is there a bell?", "yes"),
    ("What colour is the circle at first?", "red"),
)
BLOCK = Block("video", (4, 6, 6), 0.5, 8)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def conversations(tiny_processor):
    return [tiny_processor.prepare_ids([Turn("user", q), Turn("assistant", a)], [BLOCK]) for q, a in SAID]


@pytest.fixture(scope="module")
def shared(tiny, conversations):
    return int((conversations[0]["input_ids"] == tiny[0].config.vision_end_token_id).nonzero()[0]) + 1


@pytest.fixture(scope="module")
def media():
    """Visual and audio tokens of the one clip."""
    noise = torch.Generator().manual_seed(0)
    return {
        "video_embeds": torch.randn(36, 32, generator=noise),
        "audio_embeds": torch.randn(8, 32, generator=noise),
    }


def hidden(model, batch, media, mask):
    """Hidden states (B, L, D) of a batch of packed sequences."""
    outputs = model.language_model(
        inputs_embeds=model.embed(batch["input_ids"], **media),
        attention_mask=mask,
        position_ids=batch["position_ids"],
        use_cache=False,
    )
    return outputs.last_hidden_state


def label_losses(model, hidden_BLD, labels_BL):
    counted_BL = labels_BL[:, 1:] != IGNORED
    logits_NV = model.lm_head(hidden_BLD[:, :-1][counted_BL])
    return functional.cross_entropy(logits_NV, labels_BL[:, 1:][counted_BL], reduction="sum")


def packed_branches(model, conversations, shared, media, mask=branch_mask, **changed):
    """Logits of each branch of the packed conversations, as they are with this mask."""
    batch = collate_packed([pack(conversations, shared)], 0) | changed
    with torch.no_grad():
        logits_LV = model.lm_head(hidden(model, batch, media, mask(batch["segments"])))[0]
    segments_L = batch["segments"][0]
    return [logits_LV[segments_L == number] for number in range(1, len(conversations) + 1)]


def separate_branches(model, conversations, shared, media):
    found = []
    for sample in conversations:
        batch = {"input_ids": sample["input_ids"][None], "position_ids": sample["position_ids"][:, None]}
        with torch.no_grad():
            found.append(model(**batch, **media).logits[0, shared:])
    return found


def close(ones, others) -> bool:
    return all(torch.allclose(one, other, **TOLERANCE) for one, other in zip(ones, others, strict=True))


def test_the_logits_of_packed_branches_are_those_of_separate_conversations(tiny, conversations, shared, media):
    model = tiny[0]
    apart = separate_branches(model, conversations, shared, media)
    assert close(packed_branches(model, conversations, shared, media), apart)


def test_a_branch_that_could_see_another_would_differ(tiny, conversations, shared, media):
    model = tiny[0]
    apart = separate_branches(model, conversations, shared, media)

    def causal(segments_BL):
        length = segments_BL.shape[1]
        return torch.ones(1, 1, length, length, dtype=torch.bool).tril()

    seen = packed_branches(model, conversations, shared, media, causal)
    assert close(seen[:1], apart[:1])
    assert not close(seen[1:2], apart[1:2]) and not close(seen[2:], apart[2:])


def test_positions_that_restart_are_no_mask(tiny, conversations, shared, media):
    model = tiny[0]
    seen = packed_branches(model, conversations, shared, media, lambda segments_BL: None)
    assert not close(seen[1:], separate_branches(model, conversations, shared, media)[1:])


def test_a_mask_without_the_positions_of_a_branch_is_not_enough(tiny, conversations, shared, media):
    model = tiny[0]
    length = len(pack(conversations, shared)["input_ids"])
    counted = torch.arange(length).expand(3, 1, length)
    seen = packed_branches(model, conversations, shared, media, position_ids=counted)
    assert not close(seen[1:], separate_branches(model, conversations, shared, media)[1:])


def test_loss_and_gradients_of_packed_branches_are_those_of_separate_conversations(
    tiny_model, conversations, shared, media
):
    model = tiny_model
    batch = collate_packed([pack(conversations, shared)], 0)
    packed = label_losses(model, hidden(model, batch, media, branch_mask(batch["segments"])), batch["labels"])
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for sample in conversations:
        apart = {"input_ids": sample["input_ids"][None], "position_ids": sample["position_ids"][:, None]}
        total = total + label_losses(model, hidden(model, apart, media, None), sample["labels"][None])
    total.backward()
    assert torch.allclose(packed, total, **TOLERANCE)
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == set(gradients) and "lm_head.weight" in names
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name in names:
        assert torch.allclose(gradients[name], model.get_parameter(name).grad, rtol=1e-4, atol=1e-5 * scale), name


def test_padding_beside_a_longer_sequence_changes_nothing(tiny, conversations, shared, media):
    model = tiny[0]
    long, short = pack(conversations, shared), pack(conversations[1:2], shared)
    batch = collate_packed([long, short], 0)
    both = {name: torch.cat([embeds, embeds]) for name, embeds in media.items()}
    with torch.no_grad():
        logits_BLV = model.lm_head(hidden(model, batch, both, branch_mask(batch["segments"])))
    assert torch.isfinite(logits_BLV).all()
    alone = separate_branches(model, conversations[1:2], shared, media)
    assert close([logits_BLV[1, shared : len(short["input_ids"])]], alone)
    assert (batch["labels"][1, len(short["input_ids"]) :] == IGNORED).all()
    assert (batch["segments"][1, len(short["input_ids"]) :] == PADDING).all()


def test_a_packed_sequence_holds_the_prompt_once_and_every_branch_whole(conversations, shared):
    packed = pack(conversations, shared)
    lengths = [len(sample["input_ids"]) - shared for sample in conversations]
    assert torch.bincount(packed["segments"]).tolist() == [shared, *lengths]
    for number, sample in enumerate(conversations, 1):
        place_L = (packed["segments"] == 0) | (packed["segments"] == number)
        assert torch.equal(packed["input_ids"][place_L], sample["input_ids"])
        assert torch.equal(packed["labels"][place_L], sample["labels"])
        assert torch.equal(packed["position_ids"][:, place_L], sample["position_ids"])


def test_a_query_sees_the_prompt_and_its_own_branch_up_to_itself():
    mask = branch_mask(torch.tensor([[0, 0, 1, 1, 2, PADDING]]))[0, 0]
    seen = [[key for key in range(6) if mask[query, key]] for query in range(6)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 5]]


def test_prompts_that_differ_or_a_branch_that_begins_with_a_label_are_refused(conversations, shared):
    first_label = int((conversations[1]["labels"] != IGNORED).nonzero()[0])
    with pytest.raises(AssertionError, match="begins with a label"):
        pack(conversations[1:2], first_label)
    with pytest.raises(AssertionError, match="prompts differ"):
        pack(conversations, first_label)


def apart_log_probs(model, samples, media):
    """Of each conversation alone, the log-probabilities of its label tokens."""
    found = []
    for sample in samples:
        batch = {"input_ids": sample["input_ids"][None], "position_ids": sample["position_ids"][:, None]}
        states = hidden(model, batch, media, None)
        counted = sample["labels"][1:] != IGNORED
        logits = model.lm_head(states[0, :-1][counted])
        found.append(logits.log_softmax(-1).gather(-1, sample["labels"][1:][counted][:, None])[:, 0])
    return found


@pytest.fixture(scope="module")
def prompts(tiny_processor, conversations, shared):
    """Two packed prompts of different lengths, with three answers and with two."""
    said = [("Describe the video, please, in every detail.", text) for text in ("A red circle.", "A bell rings twice.")]
    others = [tiny_processor.prepare_ids([Turn("user", q), Turn("assistant", a)], [BLOCK]) for q, a in said]
    length = int((others[0]["labels"] != IGNORED).nonzero()[0]) - 1
    return [(conversations, shared), (others, length)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_one_packed_pass_gives_the_log_probabilities_and_gradients_of_separate_ones(
    tiny_model, prompts, media, checkpointing
):
    model = tiny_model
    batch = collate_packed([pack(*prompt) for prompt in prompts], 0)
    both = {name: torch.cat([embeds, embeds]) for name, embeds in media.items()}
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable()
    with branch_attention_in(model):
        log_probs, rows, branches = packed_log_probs(model, batch, **both)
        weights = torch.linspace(-1, 1, len(log_probs))
        (log_probs * weights).sum().backward()
    model.gradient_checkpointing_disable()
    model.eval()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apart = [found for samples, _ in prompts for found in apart_log_probs(model, samples, media)]
    assert torch.allclose(log_probs, torch.cat(apart), rtol=1e-5, atol=1e-5)
    assert [int(((rows == r) & (branches == b)).sum()) for r, b in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2))] == [
        len(found) for found in apart
    ]
    (torch.cat(apart) * weights).sum().backward()
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    assert set(ours) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in ours.items():
        assert torch.allclose(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5 * scale), name


def test_the_last_layer_computes_no_more_of_prompts_than_is_seen_of_them(tiny, prompts, media):
    model, widths = tiny[0], []
    batch = collate_packed([pack(*prompt) for prompt in prompts], 0)
    both = {name: torch.cat([embeds, embeds]) for name, embeds in media.items()}
    layers = model.language_model.layers
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1])) for layer in layers]
    with branch_attention_in(model):
        packed_log_probs(model, batch, **both)
    for hook in hooks:
        hook.remove()
    length = batch["input_ids"].shape[1]
    assert widths == [length] * (len(layers) - 1) + [length - min(prompt for _, prompt in prompts)]
    assert not layers[-1]._forward_hooks and not layers[-1]._forward_pre_hooks


def test_a_label_in_a_prompt_is_refused(tiny, prompts, media):
    batch = collate_packed([pack(*prompts[0])], 0)
    batch["labels"][0, prompts[0][1] - 1] = batch["input_ids"][0, prompts[0][1] - 1]
    with branch_attention_in(tiny[0]), pytest.raises(ValueError, match="none in a prompt"):
        packed_log_probs(tiny[0], batch, **media)


def test_the_attention_of_branches_is_there_only_while_it_is_wanted(tiny, conversations, shared, media):
    model = tiny[0]
    before = model.language_model.config._attn_implementation
    with branch_attention_in(model), pytest.raises(ValueError, match="need their lengths"):
        separate_branches(model, conversations, shared, media)
    assert model.language_model.config._attn_implementation == before
    separate_branches(model, conversations, shared, media)


def test_an_accelerator_gets_one_masked_call_for_short_sequences_alone():
    segments = torch.tensor([[0, 0, 1, 1, 2, PADDING]])
    assert short_mask(segments, 2) is None, "a CPU computes no pairs in vain"
    there = segments.to("meta")
    mask = short_mask(there, 2)
    assert mask is not None and mask.shape == (1, 1, 6, 6)
    assert short_mask(torch.zeros(1, 2**13, dtype=torch.int64, device="meta"), 1) is not None
    assert short_mask(torch.zeros(1, 2**13 + 1, dtype=torch.int64, device="meta"), 1) is None
