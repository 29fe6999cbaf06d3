"""Laws of encoder pretraining: batches follow from their numbers, labels lie where the tokens lie."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from kokanee.encoders import N_SCENES, SCALES, SoundLabels, VisualLabels, shares
from kokanee.world.labels import window_labels
from kokanee.world.scene import sample_scene, split_of

STAGES = [VisualLabels, SoundLabels]


def equal(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", STAGES)
def test_equal_arguments_give_equal_batches_and_others_give_others(stage, tiny):
    objective, again = stage(*tiny, seed=4), stage(*tiny, seed=4)
    batch = objective.batch("train", 5, 3)
    assert equal(batch, objective.batch("train", 5, 3)) and equal(batch, again.batch("train", 5, 3))
    others = [objective.batch("train", 6, 3), objective.batch("validation", 5, 3), stage(*tiny, 5).batch("train", 5, 3)]
    assert not any(torch.equal(batch["sample"], other["sample"]) for other in others)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_does_not_touch_random_numbers_of_others(stage, tiny):
    objective = stage(*tiny, seed=0)
    random.seed(1), torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    objective.batch("train", 0, 2)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("stage", STAGES)
def test_batches_are_of_their_split(stage, tiny):
    objective = stage(*tiny, seed=2)
    for split in ("train", "validation"):
        indices = objective.batch(split, 0, 4)["sample"].tolist()
        assert all(0 <= index < N_SCENES and split_of(sample_scene(split, index, 2)) == split for index in indices)


def test_sound_labels_are_those_of_the_scenes(tiny):
    batch = SoundLabels(*tiny, seed=0).batch("train", 1, 4)
    for row, index in enumerate(batch["sample"].tolist()):
        kind, pitch, onset = window_labels(sample_scene("train", index), 8)
        assert batch["kind"][row].tolist() == kind.tolist() and batch["pitch"][row].tolist() == pitch.tolist()
        assert batch["onset"][row].tolist() == onset.tolist()
    assert batch["input_features"].shape == (4, 32, 400)


def test_visual_labels_have_a_cell_for_each_visual_token(tiny):
    objective = VisualLabels(*tiny, seed=0)
    batch = objective.batch("train", 1, 4)
    assert batch["grid"].tolist() == [[4, 6, 6]]
    assert batch["present"].shape == batch["colour"].shape == batch["does"].shape == (4, 9)
    assert batch["geometry"].shape == (4, 9, 7) and batch["background"].shape == batch["dark"].shape == (4,)
    assert objective.model.encode_video(batch["pixel_values"], batch["grid"]).shape == (4 * 9, 32)


def test_visual_tokens_come_in_the_order_of_the_cells(tiny):
    """In a tower whose windows are one token large, a change of one cell of one moment changes one token."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    objective = VisualLabels(model, processor, seed=0)
    model.visual.window_size, model.visual.fullatt_block_indexes = 16, []
    noise = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (8, 48, 48, 3), generator=noise, dtype=torch.uint8).numpy()
    with torch.no_grad():
        patches, grid = processor.pixels(list(frames))
        before = model.encode_video(patches, torch.tensor([grid])).unflatten(0, (4, objective.cells**2))
        for moment, row, column in ((0, 0, 0), (1, 0, 2), (2, 1, 0), (3, 2, 1)):
            changed = frames.copy()
            changed[2 * moment, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 0
            patches, grid = processor.pixels(list(changed))
            after = model.encode_video(patches, torch.tensor([grid])).unflatten(0, (4, objective.cells**2))
            moved = ((after - before).abs().amax(-1) > 1e-4).nonzero().tolist()
            assert moved == [[moment, row * 3 + column]]


def test_a_finished_tower_gives_tokens_of_length_1_and_the_same_answers(tiny_model, tiny_processor):
    objective = VisualLabels(tiny_model, tiny_processor, seed=0).eval()
    with torch.no_grad():
        tiny_model.visual.merger.mlp[-1].weight.mul_(40)
        batch = objective.batch("validation", 0, 32)
        before, shares_before = objective(batch)
        objective.finish()
        after, shares_after = objective(batch)
        lengths = tiny_model.encode_video(batch["pixel_values"], batch["grid"]).norm(dim=-1)
    assert float(lengths.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(after) == pytest.approx(float(before), rel=1e-3) and shares_after == shares_before


@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_shares_are_numbers_and_the_head_and_the_encoder_learn(stage, tiny_model, tiny_processor):
    objective = stage(tiny_model, tiny_processor, seed=0)
    batch = objective.batch("train", 0, 8)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, stats = objective(batch)
        assert all(0.0 <= float(value) <= 100.0 for value in stats.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_perfect_head_is_all_right(tiny):
    """Answers that say the labels themselves: every share is 100 %."""
    objective = VisualLabels(*tiny, seed=0)
    batch = objective.batch("train", 3, 12)
    said = []
    batch["cell"] = torch.arange(9).expand(12, 9)
    for name, size in objective.sizes.items():
        truth = batch[name] if name not in ("background", "dark") else batch[name][:, None].expand(-1, 9)
        if name == "geometry":
            said.append(truth / torch.tensor(SCALES))
        elif size == 1:
            said.append(20.0 * (2.0 * truth[..., None].float() - 1.0))
        else:
            said.append(20.0 * torch.nn.functional.one_hot(truth.clamp_min(0), size).float())
    objective.head = torch.nn.Identity()
    objective.model = type("Says", (torch.nn.Module,), {"encode_video": lambda *_: torch.cat(said, -1).flatten(0, 1)})()
    loss, stats = objective(batch)
    assert float(loss) < 1e-3 and {float(value) for value in stats.values()} == {100.0}
    assert {"present", "colour", "shape", "action", "rests", "background", "dark"} <= set(stats)


def test_pictures_without_any_figure_have_a_loss_and_leave_out_what_is_not_defined(tiny):
    objective = VisualLabels(*tiny, seed=0)
    batch = objective.batch("train", 0, 2)
    nothing = {"present": torch.zeros_like(batch["present"]), "does": torch.full_like(batch["does"], -1)}
    loss, stats = objective({**batch, **nothing})
    assert torch.isfinite(loss) and set(stats) == {"present", "cell", "background", "dark"}


def test_silence_has_a_loss_and_leaves_out_what_is_not_defined(tiny):
    objective = SoundLabels(*tiny, seed=0)
    batch = objective.batch("train", 0, 2)
    quiet = {"kind": torch.full_like(batch["kind"], 8), "pitch": torch.full_like(batch["pitch"], -1)}
    loss, stats = objective({**batch, **quiet})
    assert torch.isfinite(loss) and set(stats) == {"silence", "onset"}


def test_shares_are_per_cent_of_what_was_asked():
    assert shares({"all": torch.tensor([True, False, True, True]), "none": torch.tensor([]) > 0}) == {"all": 75.0}
