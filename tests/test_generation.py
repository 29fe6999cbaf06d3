"""Laws of the decode loop: it agrees with transformers' own, samples follow from their seed alone, text never tears."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import masking_utils

from kokanee import generation
from kokanee.captions import Decoding, stream_seed
from kokanee.errors import KokaneeError
from kokanee.generation import NO_TOKEN, TextStream, answers, choose, end_ids, prefill, steps, text_of
from tiny import tiny_model, tiny_processor, tiny_sample

KINDS = ("av", "video", "audio", "image", "text")
VOCABULARY, END = 6, 5


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def open_batch(*samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    batch = tiny_processor().collate(samples, padding_side="left")
    batch.pop("labels")
    return batch


def generated(model: Any, batch: dict[str, torch.Tensor], n_tokens: int, **more: Any) -> list[list[int]]:
    """What transformers' own loop makes greedily, up to the end token."""
    ends = sorted(end_ids(model))
    out = model.generate(**batch, max_new_tokens=n_tokens, do_sample=False, eos_token_id=ends, **more)
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    ends = [next((at for at, token in enumerate(row) if token in end_ids(model)), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_generate_makes(model, kind):
    batch = open_batch(tiny_sample(kind))
    (found,) = answers(model, batch, Decoding(max_new_tokens=16))
    assert [found.ids] == generated(model, batch, 16)


def test_greedy_batch_of_all_kinds_is_what_generate_makes(model):
    batch = open_batch(*(tiny_sample(kind, seed=number % 2) for number, kind in enumerate(KINDS)))
    found = answers(model, batch, Decoding(max_new_tokens=12))
    assert [answer.ids for answer in found] == generated(model, batch, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_of_repetitions_is_that_of_generate(model, kind):
    batch, decoding = open_batch(tiny_sample(kind)), Decoding(max_new_tokens=16, repetition_penalty=1.3)
    (found,) = answers(model, batch, decoding)
    wanted = generated(model, batch, 16, repetition_penalty=1.3)
    assert [found.ids] == wanted != generated(model, batch, 16)


def test_a_penalty_is_of_each_rows_own_tokens(model):
    """In a batch as alone, whatever others hold, also when some have ended; padding is no token that was said."""
    decoding = Decoding(temperature=1.0, top_p=1.0, max_new_tokens=12, repetition_penalty=1.3)
    samples = [tiny_sample(kind, seed=number % 2) for number, kind in enumerate(KINDS)]
    ended = tiny_model()
    ended.generation_config.eos_token_id = list(range(0, 400, 7))
    alone = [answers(ended, open_batch(s), decoding, 2, [kind]) for s, kind in zip(samples, KINDS, strict=True)]
    assert answers(ended, open_batch(*samples), decoding, 2, KINDS) == [answer for two in alone for answer in two]
    assert len({len(answer.ids) for two in alone for answer in two}) > 2


def test_long_prompts_are_computed_without_a_mask_and_as_with_one(model, monkeypatch):
    batch = open_batch(*(tiny_sample(kind, seed=number % 2) for number, kind in enumerate(KINDS)))
    logits, cache = prefill(model, batch, 1)
    monkeypatch.setattr(generation, "LONG", 8)
    with monkeypatch.context() as patch:
        patch.setattr(masking_utils, "create_causal_mask", None)
        same, its = prefill(model, batch, 1)
    assert torch.allclose(logits, same, atol=1e-5)
    seen = batch["attention_mask"].bool()
    for ours, theirs in zip(cache.prompts, its.prompts, strict=True):
        for states, others in zip(ours, theirs, strict=True):
            assert torch.allclose(states.transpose(1, 2)[seen], others.transpose(1, 2)[seen], atol=1e-5)
    found = answers(model, batch, Decoding(max_new_tokens=12))
    assert [answer.ids for answer in found] == generated(model, batch, 12)


def test_answers_stop_where_generate_stops(model):
    batch = open_batch(tiny_sample("av"), tiny_sample("video"))
    free = answers(model, batch, Decoding(max_new_tokens=12))
    end = free[0].ids[5]
    other = tiny_model()
    other.generation_config.eos_token_id = [end]
    found = answers(other, batch, Decoding(max_new_tokens=12))
    assert [answer.ids for answer in found] == generated(other, batch, 12)
    assert found[0].finished and len(found[0].ids) <= 5
    assert all(answer.finished == (len(answer.ids) < 12) for answer in found)


def test_samples_do_not_depend_on_their_number_or_their_batch(model):
    decoding = Decoding(temperature=1.0, top_p=0.9, seed=7, max_new_tokens=12)
    first, second = tiny_sample("av"), tiny_sample("video", seed=1)
    four = [answer.ids for answer in answers(model, open_batch(first), decoding, 4)]
    two = [answer.ids for answer in answers(model, open_batch(first), decoding, 2)]
    both = [answer.ids for answer in answers(model, open_batch(second, first), decoding, 2)]
    assert four[:2] == two == both[2:]
    assert len({tuple(ids) for ids in four}) == 4


def test_a_prompt_that_outlives_the_others_says_what_it_says_alone(model):
    """Those that ended are dropped from the batch, again and again."""
    open_one, free = tiny_sample("av"), Decoding(1.0, 1.0, 3, 40)
    lengths = [len(answer.ids) for answer in answers(model, open_batch(open_one), free, 8)]
    assert max(lengths) > 4
    samples = [tiny_sample(kind, seed=seed) for seed in (0, 1) for kind in ("av", "video", "audio", "text")]
    keys = [str(number) for number in range(8)]
    together = answers(model, open_batch(*samples), free, 2, keys)
    for number, sample in enumerate(samples):
        alone = answers(model, open_batch(sample), free, 2, keys[number : number + 1])
        assert [answer.ids for answer in together[2 * number : 2 * number + 2]] == [answer.ids for answer in alone]
        ends = [answer.finished for answer in together[2 * number : 2 * number + 2]]
        assert ends == [answer.finished for answer in alone]


def test_the_seed_decides_samples_and_only_samples(model):
    batch = open_batch(tiny_sample("av"))
    sampled = [answers(model, batch, Decoding(1.0, 0.9, seed, 12))[0].ids for seed in (3, 3, 4)]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = [answers(model, batch, Decoding(0.0, 0.9, seed, 12))[0].ids for seed in (3, 4)]
    assert greedy[0] == greedy[1]


def test_media_are_encoded_once_for_all_samples(model, monkeypatch):
    seen = []
    encode = model.encode_media
    monkeypatch.setattr(model, "encode_media", lambda **media: seen.append(media) or encode(**media))
    answers(model, open_batch(tiny_sample("av")), Decoding(1.0, max_new_tokens=5), n_samples=3)
    assert [media["pixel_values_videos"] is not None for media in seen] == [True]


def test_streams_of_samples_have_nothing_in_common():
    found = {stream_seed(seed, key, sample) for seed in range(10) for key in "abcdefghi" for sample in range(10)}
    assert len(found) == 900


def test_equal_prompts_of_different_keys_draw_different_numbers(model):
    sample, decoding = tiny_sample("av"), Decoding(1.0, 1.0, 5, 12)
    found = answers(model, open_batch(sample, sample, sample), decoding, keys=["a", "b", "a"])
    assert found[0].ids == found[2].ids != found[1].ids


def draws(*numbers: float):
    return lambda: torch.tensor(numbers)


def test_a_token_is_drawn_where_the_number_falls_in_the_cumulated_probabilities():
    logits_RV = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 4))
    chosen = choose(logits_RV, Decoding(1.0, 1.0), draws(0.0, 0.49, 0.51, 0.99))
    assert chosen.tolist() == [1, 1, 2, 0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits_RV = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 3))
    # 0.5 + 0.3 reach 0.6, so tokens 1 and 2 share the draw as 5 : 3.
    assert choose(logits_RV, Decoding(1.0, 0.6), draws(0.62, 0.63, 0.9999)).tolist() == [1, 2, 2]
    assert choose(logits_RV, Decoding(1.0, 1e-9), draws(0.0, 0.5, 0.9999)).tolist() == [1, 1, 1]


def test_temperature_flattens_and_0_is_the_likeliest():
    logits_RV = torch.tensor([[2.0, 0.0]])
    p = torch.softmax(logits_RV[0] / 4, -1)[0].item()
    assert choose(logits_RV, Decoding(4.0, 1.0), draws(p - 0.01)).tolist() == [0]
    assert choose(logits_RV, Decoding(4.0, 1.0), draws(p + 0.01)).tolist() == [1]
    assert choose(logits_RV, Decoding(0.0, 1.0), draws()).tolist() == [0]


class Scripted:
    """A model that says the tokens of a script, row by row, whatever it is given."""

    def __init__(self, *scripts: list[int], value: float = 9.0) -> None:
        self.scripts, self.step, self.value = scripts, 0, value
        self.config = SimpleNamespace(eos_token_id=END)
        self.generation_config = None
        self.language_model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa", layer_types=[]))
        self.positions: list[torch.Tensor] = []

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding(VOCABULARY, 1)

    def __call__(self, position_ids: torch.Tensor, **inputs: Any) -> Any:
        n_rows = position_ids.shape[1]
        logits_RV = torch.zeros(n_rows, VOCABULARY)
        for row, script in enumerate(self.scripts[-n_rows:]):  # those that are left are the last
            logits_RV[row, script[self.step]] = self.value
        self.step += 1
        self.positions.append(position_ids)
        return SimpleNamespace(logits=logits_RV[:, None], past_key_values=SimpleNamespace(layers=[]))


def scripted_batch(n_rows: int) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[0, 1, 1]] * n_rows)
    return {"input_ids": mask, "attention_mask": mask, "position_ids": torch.tensor([1, 0, 7]).expand(3, n_rows, 3)}


def test_a_row_that_ended_says_nothing_more_and_all_ended_rows_stop_the_loop():
    model: Any = Scripted([1, END, 3, 3], [2, 2, END, 3])
    assert list(steps(model, scripted_batch(2), Decoding())) == [[1, 2], [END, 2], [NO_TOKEN, END]]
    assert model.step == 3


def test_max_new_tokens_cuts_off_without_a_step_too_many():
    model: Any = Scripted([1, 2, 3])
    (found,) = answers(model, scripted_batch(1), Decoding(max_new_tokens=2))
    assert (found.ids, found.finished, model.step) == ([1, 2], False, 2)


def test_positions_count_on_from_the_last():
    model: Any = Scripted([1, 2, END])
    list(steps(model, scripted_batch(1), Decoding()))
    assert [position[:, 0, -1].tolist() for position in model.positions] == [[7] * 3, [8] * 3, [9] * 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_stop_the_loop(value):
    model: Any = Scripted([1], value=value)
    with pytest.raises(KokaneeError, match=r"token 1 are not finite"):
        list(steps(model, scripted_batch(1), Decoding()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_that_cannot_be_are_refused(name, value):
    with pytest.raises(KokaneeError, match=name):
        Decoding(**{name: value})


TEXTS = (
    "a dog barks",
    "der Hund bellt: wau, wäu!",
    "狗叫了两声。🐕‍🦺 bark",
    "tabs\tand\n\nlines",
    "e\u0301 é",
    "\u00a0x\u00a0",
    "  spaces around  ",
)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(text):
    tokenizer = tiny_processor().tokenizer
    ids = tiny_processor().writer.encode(text).tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join([*pieces, stream.end()]) == tokenizer.decode(ids).strip() == text_of(tokenizer, ids)


def test_streaming_gives_characters_as_soon_as_they_are_whole():
    stream = TextStream(tiny_processor().tokenizer)
    pieces = [stream.add(token) for token in tiny_processor().writer.encode("é🐕").tolist()]
    assert pieces == ["", "é", "", "", "", "🐕"]


def test_any_tokens_stream_to_the_text_that_they_decode_to():
    tokenizer = tiny_processor().tokenizer
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(0, len(tokenizer), 30).tolist()
        assert text_of(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_special_tokens_are_no_text():
    tokenizer = tiny_processor().tokenizer
    ids = [*tiny_processor().writer.encode("a dog").tolist(), *sorted(tokenizer.all_special_ids)]
    assert text_of(tokenizer, ids) == "a dog"
