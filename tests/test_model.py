from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import TextIteratorStreamer

from kokanee.errors import KokaneeError
from kokanee.model import EMBED_INPUTS, IGNORED, PIXEL_INPUTS, Kokanee, PatchProjection, repeat_samples
from tiny import tiny_model, tiny_processor, tiny_sample

KINDS = ("av", "video", "audio", "image", "text")
NEW_TOKENS = 6
ANSWER = "a dog barks twice ."


@pytest.fixture(scope="module")
def model() -> Kokanee:
    return tiny_model()


def collate(*samples, side: str = "right"):
    return tiny_processor().collate(samples, padding_side=side)


def prompt_of(sample):
    return {key: value for key, value in sample.items() if key != "labels"}


def greedy(model, batch, **settings) -> torch.Tensor:
    batch = {key: value for key, value in batch.items() if key != "labels"}
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **settings}
    return model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_embeddings_give_what_the_encoders_give(model, kind):
    batch = collate(tiny_sample(kind, ANSWER))
    media = {name: batch.pop(name) for name in (*PIXEL_INPUTS, *EMBED_INPUTS) if name in batch}
    with torch.no_grad():
        inline = model(**batch, **media, logits_to_keep=0)
        stored = model(**batch, **model.encode_media(**media), logits_to_keep=0)
    assert torch.equal(inline.logits, stored.logits) and torch.equal(inline.loss, stored.loss)


@torch.no_grad()
def test_a_mixed_batch_gives_what_its_samples_give_alone(model):
    samples = [
        tiny_sample(kind, ANSWER, seed)
        for kind, seed in [("audio", 1), ("image", 0), ("av", 1), ("text", 0), ("video", 0), ("av", 0)]
    ]
    together = model(**collate(*samples), logits_to_keep=0)
    losses, counts = [], []
    for row, sample in enumerate(samples):
        alone = model(**collate(sample), logits_to_keep=0)
        n_tokens = len(sample["input_ids"])
        assert torch.allclose(together.logits[row, :n_tokens], alone.logits[0], atol=2e-4)
        losses.append(alone.loss)
        counts.append((sample["labels"] != IGNORED).sum())
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert torch.allclose(together.loss, mean, atol=1e-5)


def test_left_padded_generation_is_generation_one_by_one(model):
    samples = [
        tiny_sample(kind, seed=seed)
        for kind, seed in [("text", 0), ("av", 1), ("audio", 0), ("image", 0), ("video", 1)]
    ]
    together = greedy(model, collate(*samples, side="left"))
    for row, sample in enumerate(samples):
        assert together[row].tolist() == greedy(model, collate(sample))[0].tolist()


def test_generation_without_a_cache_is_the_same(model):
    batch = collate(tiny_sample("av"))
    assert greedy(model, batch, use_cache=False).tolist() == greedy(model, batch).tolist()


def test_several_answers_share_one_look_at_their_prompt(model):
    samples = [tiny_sample("av", seed=1), tiny_sample("video"), tiny_sample("text")]
    calls = []
    hook = model.visual.register_forward_hook(lambda *_: calls.append(1))
    several = greedy(model, collate(*samples, side="left"), do_sample=True, top_k=1, num_return_sequences=3)
    hook.remove()
    assert len(calls) == 1
    once = greedy(model, collate(*samples, side="left"))
    assert several.tolist() == once.repeat_interleave(3, dim=0).tolist()


def test_later_tokens_have_the_positions_of_training(model):
    sample, seen = tiny_sample("av"), []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments["position_ids"]), with_kwargs=True
    )
    greedy(model, collate(sample, tiny_sample("text"), side="left"), max_new_tokens=4)
    hook.remove()
    whole = tiny_processor().with_answer(sample, "a dog barks")["position_ids"]
    n_tokens = len(sample["input_ids"])
    assert torch.equal(seen[0][:, 0], sample["position_ids"])
    assert torch.equal(torch.cat([step[:, 0] for step in seen[1:]], dim=1), whole[:, n_tokens : n_tokens + 3])


def test_a_generated_placeholder_is_an_ordinary_token(model):
    audio = model.config.audio_token_id

    def only_audio(_, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([audio]), 0.0)

    made = greedy(model, collate(tiny_sample("av")), logits_processor=[only_audio])
    assert made.tolist() == [[audio] * NEW_TOKENS]


def test_text_streams_as_it_is_generated(model):
    processor = tiny_processor()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    batch = collate(tiny_sample("av"))
    made = greedy(model, batch, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(made[0])


def test_the_loss_is_the_mean_over_labels_and_needs_no_other_logits(model):
    batch = collate(tiny_sample("av", ANSWER), tiny_sample("text", "twice"))
    with torch.no_grad():
        lean, full = model(**batch), model(**batch, logits_to_keep=0)
    expected = functional.cross_entropy(full.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert lean.logits is None
    assert torch.allclose(full.loss, expected, atol=1e-6) and torch.allclose(lean.loss, full.loss, atol=1e-6)


def test_only_the_logits_that_are_kept_are_made(model):
    batch = prompt_of(collate(tiny_sample("av")))
    with torch.no_grad():
        full = model(**batch).logits
        for asked, kept in ((2, full[:, -2:]), (torch.tensor([3, 5]), full[:, [3, 5]])):
            made = model(**batch, logits_to_keep=asked).logits
            assert made.shape == kept.shape and torch.allclose(made, kept, atol=1e-5)


def test_checkpointed_layers_give_the_same_gradients():
    batch = collate(tiny_sample("av", ANSWER))
    gradients = []
    for checkpointed in (False, True):
        trained = tiny_model()
        for module in trained.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        for layer in trained.audio.qformer.encoder.layer:
            layer.attention.attention.attention_dropout = layer.crossattention.attention.attention_dropout = 0.0
        if checkpointed:
            trained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        trained.train()
        trained(**batch, use_cache=False).loss.backward()
        gradients.append({name: weight.grad for name, weight in trained.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_every_part_learns():
    trained = tiny_model()
    trained(**collate(tiny_sample("av", ANSWER), tiny_sample("image", ANSWER))).loss.backward()
    silent = [name for name, weight in trained.named_parameters() if weight.requires_grad and weight.grad is None]
    assert silent == []


def test_a_saved_model_loads_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Kokanee.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.config.text_config.to_dict() | {"dtype": None} == model.config.text_config.to_dict() | {"dtype": None}


def test_tied_embeddings_are_one_weight_and_stored_once(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = Kokanee.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.language_model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_bfloat16_sees_hears_and_writes(model):
    small = tiny_model().to(torch.bfloat16)
    batch = collate(tiny_sample("av", ANSWER), tiny_sample("image", ANSWER))
    with torch.no_grad():
        assert abs(small(**batch).loss.item() - model(**batch).loss.item()) < 0.2
    assert greedy(small, collate(tiny_sample("av"))).shape == (1, NEW_TOKENS)


def test_one_seed_gives_one_model():
    first, second = tiny_model(3).state_dict(), tiny_model(3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merging_by_four_gives_a_sixteenth_of_the_patches(model):
    sample = tiny_sample("video")
    n_patches = sample["pixel_values_videos"].shape[0]
    with torch.no_grad():
        tokens = model.encode_video(sample["pixel_values_videos"], sample["video_grid_thw"])
    assert tokens.shape == (n_patches // 16, model.config.text_config.hidden_size)


def test_the_patch_projection_is_the_convolution():
    convolution = torch.nn.Conv3d(3, 8, (2, 14, 14), (2, 14, 14), bias=False)
    projection = PatchProjection.like(convolution)
    projection.load_state_dict(convolution.state_dict())
    patches = torch.randn(5, 3, 2, 14, 14)
    assert projection(patches).shape == convolution(patches).shape
    assert torch.allclose(projection(patches), convolution(patches), atol=1e-5)


@pytest.mark.parametrize("medium", ["video", "audio"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_prompt_with_too_many_or_too_few_places_is_refused(model, medium, change):
    batch = collate(tiny_sample("av"))
    embeds = model.encode_media(**{name: batch.pop(name) for name in PIXEL_INPUTS if name in batch})
    tokens = embeds[f"{medium}_embeds"]
    embeds[f"{medium}_embeds"] = tokens[:-1] if change < 0 else torch.cat([tokens, tokens[:1]])
    with pytest.raises(KokaneeError, match=f"{len(tokens)} {medium} placeholders .* {len(tokens) + change} {medium}"):
        model(**batch, **embeds)


def test_a_prompt_whose_media_are_missing_is_refused(model):
    batch = {key: value for key, value in collate(tiny_sample("av")).items() if key not in PIXEL_INPUTS}
    with pytest.raises(KokaneeError, match="0 video tokens"):
        model(**batch)


def test_incomplete_arguments_are_refused(model):
    batch = collate(tiny_sample("av"))
    embeds = torch.zeros(4, 64)
    with pytest.raises(KokaneeError, match="Both raw video input and video_embeds"):
        model(**batch, video_embeds=embeds)
    with pytest.raises(KokaneeError, match="position_ids"):
        model(**{key: value for key, value in batch.items() if key != "position_ids"})
    with pytest.raises(KokaneeError, match="video_grid_thw"):
        model(**{key: value for key, value in batch.items() if key != "video_grid_thw"})
    with pytest.raises(KokaneeError, match="Neither input_ids nor inputs_embeds"):
        model()
    with pytest.raises(KokaneeError, match="places for 3 tokens"):
        repeat_samples(embeds, [1, 2], 2)
