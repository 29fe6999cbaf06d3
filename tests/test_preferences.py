"""Laws of a round's objective: packed pairs are as separate passes, each lesson comes once, references hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kokanee import prefix
from kokanee.adapting import adapted
from kokanee.clips import WorldClips, WorldData
from kokanee.errors import KokaneeError
from kokanee.preferences import Lesson, Preferences, Weights
from kokanee.prefix import branch_attention_in, branch_mask
from kokanee.prompt import IGNORED, Turn
from kokanee.recipes import Training
from kokanee.train import train
from kokanee.tuning import Lora

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
GOOD, BAD, TRUE = "A red circle jumps.", "A blue star is here. It is loud.", "A red circle is there and jumps."


@pytest.fixture
def clips(tiny, tiny_stores):
    return WorldClips(*tiny, WorldData(features=tiny_stores["train"]), "train")


def lessons(clips: WorldClips) -> list[Lesson]:
    """Lessons of all clips, with one or two pairs and now and then questions."""
    found = []
    for number in range(len(clips)):
        task = clips.task(number, 2, "key")
        pairs = ((GOOD, BAD), (TRUE, GOOD)) if number % 2 else ((GOOD, BAD),)
        asked = task.questions if number % 3 == 0 else ()
        found.append(Lesson(number, task.name, task.prompt, TRUE, pairs, asked))
    return found


@pytest.fixture
def make(tiny_model, tiny_processor, clips):
    def build(weights: Weights = Weights(), held_out: int = 1, model=tiny_model, **more) -> Preferences:  # noqa: B008
        return Preferences(model, tiny_processor, clips, lessons(clips), weights, held_out=held_out, seed=3, **more)

    return build


def separate(objective: Preferences, lesson: Lesson, prompt: str, answer: str) -> torch.Tensor:
    """The log-probabilities of one answer's tokens, from a pass of its own."""
    view = objective.clips.view(lesson.number)
    sample = objective.processor.prepare_ids([Turn("user", prompt), Turn("assistant", answer)], [view.block])
    batch = {"input_ids": sample["input_ids"][None], "position_ids": sample["position_ids"][:, None]}
    log_p = objective.model(**batch, **view.media).logits[0, :-1].log_softmax(-1)
    targets = sample["labels"][1:]
    told = targets != IGNORED
    return log_p[told].gather(1, targets[told][:, None])[:, 0]


def by_hand(objective: Preferences, numbers: list[int]) -> torch.Tensor:
    """The loss of some lessons from one pass for each answer."""
    weights, references = objective.weights, objective.reference
    losses, truths, answers = [], [], []
    for number in numbers:
        lesson = objective.lessons[number]
        for pair, texts in enumerate(lesson.pairs if references is not None else ()):
            now = [separate(objective, lesson, lesson.prompt, text).sum() for text in texts]
            gain = [value - before for value, before in zip(now, references[number][pair], strict=True)]
            losses.append(-torch.nn.functional.logsigmoid(weights.beta * (gain[0] - gain[1])))
        truths.append(separate(objective, lesson, lesson.prompt, lesson.ground_truth))
        answers += [separate(objective, lesson, *question) for question in lesson.questions]
    loss = torch.stack(losses).mean() if losses and weights.loss != "ce" else torch.tensor(0.0)
    if weights.loss != "dpo":
        loss = loss - weights.gt_weight * torch.cat(truths).mean()
    return loss - weights.qa_weight * torch.cat(answers).mean() if answers else loss


@pytest.mark.parametrize("masked", [False, True], ids=["branches", "masked"])
@pytest.mark.parametrize("loss", ["gdpo", "dpo", "ce"])
def test_one_packed_pass_has_the_loss_and_gradients_of_separate_passes(make, loss, masked, monkeypatch):
    """Also where it is one masked call a layer, as on an accelerator."""
    if masked:
        monkeypatch.setattr(prefix, "short_mask", lambda segments, heads: branch_mask(segments))
    objective = make(Weights(loss, 0.3, 0.2, 0.4)).eval()
    rows = [len(lesson.pairs) for lesson in objective.lessons]
    objective.reference = [torch.linspace(-90, -80, 2 * count).view(-1, 2) for count in rows]
    numbers = [0, 1, 3]
    with branch_attention_in(objective.model):
        packed, _ = objective(objective.collate(numbers))
        packed.backward()
    grads = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    apart = by_hand(objective, numbers)
    apart.backward()
    assert torch.allclose(packed, apart, **CLOSE)
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            assert torch.allclose(grads[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale + 1e-9), name


def test_nothing_is_learnt_of_the_end_of_a_text_that_was_cut_off(make, clips):
    """The labels are those of its own tokens, whichever of the lesson's texts it is."""
    whole = make()
    for cut_off in ((BAD,), (TRUE,), (GOOD, BAD)):
        lesson = replace(whole.lessons[1], cut_off=cut_off)
        objective = Preferences(whole.model, whole.processor, clips, [lesson], whole.weights, held_out=0, seed=3)
        packed, told = objective.pack(0), []
        for segment in range(1, 6):
            labels = packed["labels"][packed["segments"] == segment]
            told.append(whole.processor.tokenizer.decode(labels[labels != IGNORED]))
        end = whole.processor.tokenizer.decode(whole.processor.writer.turn_end)
        assert told == [text + end * (text not in cut_off) for text in (GOOD, BAD, TRUE, GOOD, TRUE)]


def test_a_new_adapter_begins_at_no_preference(make, tiny_model):
    """log 2 + weight x cross-entropy, with live dropout: B is 0."""
    model = adapted(tiny_model, Lora(r=4, alpha=8, dropout=0.5)).get_base_model()
    objective = make(Weights("gdpo", 0.1, 0.1, 0.0), model=model)
    with branch_attention_in(objective.model):
        objective.reference = objective.references(range(len(objective.lessons)))
        objective.train()
        loss, stats = objective(objective.batch("train", 0, 3))
    assert float(stats["dpo"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(loss.detach()) == pytest.approx(math.log(2) + 0.1 * float(stats["ground_truth"]), abs=1e-6)


def test_references_are_those_of_every_batch_and_of_no_dropout(make, tiny_model):
    model = adapted(tiny_model, Lora(r=4, alpha=8, dropout=0.5)).get_base_model()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    objective = make(model=model).train()
    with branch_attention_in(objective.model):
        together = objective.references([0, 1, 2, 3])
        alone = [objective.references([number])[0] for number in range(4)]
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(together, alone, strict=True))
    assert [len(row) for row in together] == [1, 2, 1, 2]


def test_every_lesson_comes_once_an_epoch_and_those_held_out_never(make):
    objective = make(held_out=2)
    found = [objective.batch("train", number, 1)["sample"].tolist() for number in range(8)]
    assert sorted(sum(found[:4], [])) == sorted(sum(found[4:], [])) == [2, 3, 4, 5]
    assert found[:4] != found[4:]
    held = [objective.batch("validation", number, 1)["sample"].tolist() for number in range(2)]
    assert held == [[0], [1]]


def test_equal_numbers_give_equal_batches(make):
    one, other = make().batch("train", 2, 2), make().batch("train", 2, 2)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_messages_name_the_clip(make):
    objective = make()
    assert objective.name_of(3) == objective.lessons[3].name and "train-" in objective.name_of(3)


def test_of_a_batch_whose_loss_is_not_finite_the_clip_is_named_that_makes_it_so(make, tmp_path):
    objective = make()
    objective.reference = [torch.zeros(len(lesson.pairs), 2) for lesson in objective.lessons]
    objective.reference[3][1, 0] = torch.nan
    settings = Training(steps=1, batch_size=5, workers=0, learning_rate=0.1, device="cpu")
    weights = dict(objective.named_parameters())
    before = {name: weight.clone() for name, weight in weights.items()}
    named = objective.name_of(3)
    with branch_attention_in(objective.model), pytest.raises(KokaneeError, match=rf"nan.*with samples {named}\."):
        train(objective, settings, tmp_path, weights)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_what_hears_and_sees_has_no_dropout_in_training(make):
    objective = make().train()
    assert objective.model.language_model.training
    assert not any(part.training for part in (*objective.model.audio.modules(), *objective.model.visual.modules()))


def test_a_batch_larger_than_the_lessons_repeats_them(make):
    objective = make(held_out=4)
    assert sorted(objective.batch("train", 0, 4)["sample"].tolist()) == [4, 4, 5, 5]


def test_stores_of_media_follow_the_lessons(make, clips, tiny_stores):
    objective = make()
    batch = objective.collate([4, 2])
    wanted = torch.cat([clips.view(number).media["video_embeds"] for number in (4, 2)])
    assert Path(tiny_stores["train"]).is_dir() and torch.equal(batch["video_embeds"], wanted)


def test_pairs_of_one_clip_cost_its_prompt_once(make):
    objective = make(Weights("dpo"))
    one, two = objective.lessons[1], replace(objective.lessons[1], pairs=objective.lessons[1].pairs[:1])
    objective.lessons = [one, two]
    packed = [objective.pack(number) for number in (0, 1)]
    prompts = [int((sample["segments"] == 0).sum()) for sample in packed]
    assert prompts[0] == prompts[1] and int(packed[0]["segments"].max()) == 4
