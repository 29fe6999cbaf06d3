"""Laws of the language stages: what is asked can be answered from what is shown, and packing changes no number."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from kokanee.conversations import ANSWER, CAPTION, MEDIA, Conversations, Mix, by_length, way_of
from kokanee.errors import KokaneeError
from kokanee.features import Features, Stretch, read_store
from kokanee.prompt import IGNORED
from kokanee.recipes import checked
from kokanee.world.facts import exact, only
from kokanee.world.language import parse
from kokanee.world.scene import SHAPES, sample_scene

EVERYTHING = {"both": 1.0, "seen": 1.0, "heard": 1.0, "text": 1.0}


@pytest.fixture
def make(tiny, tiny_stores):
    def build(seed: int = 0, model=None, **mix) -> Conversations:
        return Conversations(model or tiny[0], tiny[1], Mix(**{**tiny_stores, **mix}), seed)

    return build


def equal(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def texts(objective: Conversations, sample, role: int, roles) -> list[str]:
    """The texts with this role, one for each branch that has any."""
    segments = sample["segments"]
    found = []
    for number in range(1, int(segments.max()) + 1):
        ids = sample["input_ids"][(segments == number) & (roles == role)]
        if len(ids):
            found.append(objective.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


def test_equal_arguments_give_equal_batches_and_others_give_others(make):
    objective = make(**EVERYTHING)
    batch = objective.batch("train", 3, 4)
    assert equal(batch, objective.batch("train", 3, 4)) and equal(batch, make(**EVERYTHING).batch("train", 3, 4))
    assert not equal(batch, objective.batch("train", 4, 4)) and not equal(
        batch, make(1, **EVERYTHING).batch("train", 3, 4)
    )


def test_training_batches_come_from_training_clips_and_validation_batches_from_validation_clips(make, tiny_stores):
    objective = make(both=1.0)
    for split, store in tiny_stores.items():
        stored = {clip.stretch.index: clip for clip in read_store(Path(store), objective.model, split, 0)}
        batch = objective.batch(split, 0, 2)
        visual = torch.cat([stored[index].video_ND for index in batch["sample"].tolist()])
        assert torch.equal(batch["video_embeds"], visual)


@pytest.mark.parametrize("media", MEDIA)
def test_the_places_for_media_are_as_many_as_their_tokens(make, media):
    objective = make(**{media: 1.0})
    batch, config = objective.batch("train", 0, 3), objective.model.config
    visual = len(batch["video_embeds"]) if "video_embeds" in batch else 0
    heard = len(batch["audio_states"]) * config.audio_tokens_per_chunk if "audio_states" in batch else 0
    assert int((batch["input_ids"] == config.video_token_id).sum()) == visual
    assert int((batch["input_ids"] == config.audio_token_id).sum()) == heard
    assert (visual > 0) == (media in ("both", "seen")) and (heard > 0) == (media in ("both", "heard"))


@pytest.mark.parametrize("media", MEDIA)
def test_the_loss_is_that_of_separate_conversations(make, media):
    """The mean over captions' label tokens plus that over answers', as if each conversation were alone."""
    objective = make(**{media: 1.0}).eval()
    model = objective.model
    batch = objective.batch("train", 1, 2)
    with torch.no_grad():
        loss, stats = objective(batch)
        media_tokens = {"video_embeds": batch.get("video_embeds"), "audio_embeds": None}
        if "audio_states" in batch:
            media_tokens["audio_embeds"] = model.audio.align(batch["audio_states"].float()).flatten(0, 1)
        total, count = Counter(), Counter()
        for row in range(2):
            segments_L = batch["segments"][row]
            own = {}
            for medium in ("video", "audio"):
                places = (batch["input_ids"] == model.placeholder_id(medium)).sum(1).tolist()
                if media_tokens[f"{medium}_embeds"] is not None:
                    own[f"{medium}_embeds"] = media_tokens[f"{medium}_embeds"].float().split(places)[row]
            for number in range(1, int(segments_L.max()) + 1):
                place_L = (segments_L == 0) | (segments_L == number)
                labels = batch["labels"][row, place_L][None]
                apart = model(
                    input_ids=batch["input_ids"][row, place_L][None],
                    position_ids=batch["position_ids"][:, row, place_L][:, None],
                    labels=labels,
                    **own,
                )
                role, tokens = min(number, ANSWER), int((labels != IGNORED).sum())
                total[role] += float(apart.loss) * tokens
                count[role] += tokens
    assert float(loss) == pytest.approx(sum(total[role] / count[role] for role in count), abs=1e-5)
    assert set(stats) == {"caption", "answer", "answers", f"answers_{media}"}


def test_validation_shows_clips_in_all_ways_in_turn_and_training_by_weight(make):
    objective = make(both=0.9, heard=0.1)
    ways = [way_of(objective.batch("validation", number, 1)) for number in range(4)]
    assert ways == ["both", "heard", "both", "heard"]
    drawn = Counter(way_of(objective.batch("train", number, 1)) for number in range(60))
    assert drawn["both"] > 3 * drawn["heard"] > 0


def test_other_clips_are_other_samples(make):
    everything = make(seen=1.0).samples()
    assert set(everything) == {"train", "validation"} and everything == make(both=1.0).samples()
    shorter = make(seen=1.0, longest_s=4.0).samples()
    assert shorter["train"] != everything["train"] and shorter["validation"] == everything["validation"]


def test_every_label_is_of_the_caption_or_of_an_answer_and_each_clip_has_one_caption(make):
    objective, rng = make(**EVERYTHING), random.Random(0)
    for clip in sum(objective.clips["train"], []):
        scene = sample_scene("train", clip.stretch.index)
        for media in MEDIA:
            sample, roles = objective.sample(scene, clip, media, rng)
            assert torch.equal(roles > 0, sample["labels"] != IGNORED)
            assert len(texts(objective, sample, CAPTION, roles)) == 1
            n_answers = len(texts(objective, sample, ANSWER, roles))
            assert n_answers == int(sample["segments"].max()) - 1
            assert n_answers <= objective.mix.questions and (n_answers > 0 or media == "heard")


def test_an_exact_caption_tells_all_that_the_shown_sense_can_tell(make):
    objective = make(both=1.0, exact=1.0, partial=0.0)
    rng = random.Random(1)
    for clip in sum(objective.clips["train"], []):
        scene = sample_scene("train", clip.stretch.index)
        events = exact(scene, clip.stretch.start_s, clip.stretch.end_s)
        for media, sense in (("both", "both"), ("seen", "seen"), ("heard", "heard"), ("text", "both")):
            _, said = objective.caption(scene, clip, media, rng)
            assert set(parse(said).facts) == {event.fact for event in only(events, sense)}


def test_a_story_in_place_of_a_clip_tells_all_of_it_and_is_what_every_question_shares(make):
    objective, rng = make(text=1.0), random.Random(5)
    for clip in sum(objective.clips["train"], []):
        scene = sample_scene("train", clip.stretch.index)
        sample, _ = objective.sample(scene, clip, "text", rng)
        shared = objective.processor.tokenizer.decode(sample["input_ids"][sample["segments"] == 0].tolist())
        events = exact(scene, clip.stretch.start_s, clip.stretch.end_s)
        assert set(parse(shared.split("user\n")[1].split("\n")[0]).facts) == {event.fact for event in events}


def test_annotators_who_are_asked_for_sounds_listen_and_tell_nothing_else(make):
    objective, rng = make(heard=1.0), random.Random(4)
    empty = told = 0
    for index in range(120):
        scene = sample_scene("train", index)
        if not scene.sounds:
            continue
        clip = Features(Stretch(index, 0.0, scene.duration_s), torch.empty(0), (0, 0, 0), 0.5, torch.empty(0))
        facts = parse(objective.caption(scene, clip, "heard", rng)[1]).facts
        assert {fact.kind for fact in facts} <= {"sound", "pitch", "count"}
        empty, told = empty + (not facts), told + bool(facts)
    assert empty < 0.35 * (empty + told)


def test_what_is_only_seen_is_never_asked_about_its_sound(make):
    objective, rng = make(seen=1.0, questions=8), random.Random(2)
    for clip in sum(objective.clips["train"], []):
        asked = objective.questions(sample_scene("train", clip.stretch.index), clip, "seen", rng)
        assert asked and not any(word in question.text for question in asked for word in ("heard", "sound"))
        assert not any(question.kind in ("sound", "sound count", "pitch", "sync") for question in asked)


def test_what_is_only_heard_is_asked_about_its_sound_alone(make):
    objective, rng = make(heard=1.0, questions=8), random.Random(3)
    kinds = set()
    for index in range(40):
        scene = sample_scene("train", index)
        clip = Features(Stretch(index, 0.0, scene.duration_s), torch.empty(0), (0, 0, 0), 0.5, torch.empty(0))
        for question in objective.questions(scene, clip, "heard", rng):
            assert any(word in question.text for word in ("heard", "sounds", "pitch", "low or high"))
            assert not any(shape in question.text for shape in SHAPES)
            kinds.add(question.kind)
    assert kinds == {"sound", "sound count", "pitch", "count", "exists"}


def test_clips_of_one_batch_have_equal_numbers_of_visual_tokens(make):
    objective = make(seen=1.0)
    groups = objective.clips["train"]
    assert len(groups) > 1 and sum(map(len, groups)) == 6
    assert all(len({len(clip.video_ND) for clip in group}) == 1 for group in groups)
    assert by_length(sum(groups, [])) == groups


def test_clips_longer_than_the_longest_are_not_shown(make):
    def lengths(objective: Conversations) -> list[float]:
        return [clip.stretch.end_s - clip.stretch.start_s for clip in sum(objective.clips["train"], [])]

    everything = lengths(make(seen=1.0))
    middle = sorted(everything)[2]
    assert sorted(lengths(make(seen=1.0, longest_s=middle))) == sorted(s for s in everything if s <= middle)
    with pytest.raises(KokaneeError, match=r"None of the 6 training clips.*at most 0\.5 s"):
        make(seen=1.0, longest_s=0.5)


def test_answers_are_right_where_all_their_tokens_are_the_most_likely_ones(make, tiny_model):
    objective = make(model=tiny_model, both=1.0).eval()
    batch = objective.batch("train", 0, 1)
    labels_L = batch["labels"][0, 1:]
    targets = labels_L[labels_L != IGNORED].tolist()
    tiny_model.lm_head = type("Says", (torch.nn.Module,), {"forward": lambda self, x: torch.eye(400)[targets] * 50})()
    loss, stats = objective(batch)
    assert float(loss) < 1e-3 and float(stats["answers"]) == 100.0
    targets[-1], targets[0] = 0, 0  # one token of the last answer and one of the caption
    _, stats = objective(batch)
    assert float(stats["answers"]) == pytest.approx(100.0 * (1 - 1 / int(batch["segments"].max() - 1)))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"booth": 1.0}, "unknown setting 'booth' .*'both'"),
        ({"seen": 0.0}, "leaves no samples"),
        ({"seen": 1.0, "bias": {"sond": 0.1}}, "bias has no sond"),
        ({"seen": 1.0, "exact": 1.5}, "exact: "),
    ],
)
def test_a_mix_that_cannot_be_is_refused(tiny_stores, mix, message):
    with pytest.raises(KokaneeError, match=message):
        checked(Mix, {**tiny_stores, **mix}, "data")


def test_parts_may_be_idle_only_where_some_samples_have_no_sound(make):
    assert make(both=1.0, seen=0.1).idle_parts and make(heard=1.0, text=1.0).idle_parts
    assert not make(both=1.0, heard=1.0).idle_parts and not make(seen=1.0, text=1.0).idle_parts
