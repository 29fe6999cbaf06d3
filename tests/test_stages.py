"""Laws of the stages: from a file of sizes to a trained model in a folder, the same every time."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kokanee.checkpoints import load
from kokanee.errors import KokaneeError
from kokanee.formats import UNFINISHED, alone_in
from kokanee.recipes import Recipe
from kokanee.stages import fresh_model, gates, make_objective, run_stage, world_texts
from kokanee.train import CHECKPOINT, choose

COMMON = {"steps": 3, "batch_size": 2, "workers": 0, "learning_rate": 0.01, "evaluate_batches": 1, "device": "cpu"}
PARTS = {
    "visual encoder": ("visual",),
    "sound encoder": ("audio.encoder",),
    "conversations": ("language_model", "lm_head", "audio.qformer", "audio.queries", "audio.projection"),
}


@pytest.fixture
def recipe(tiny_yaml, tiny_stores):
    def build(stage: str, **replaced) -> Recipe:
        data = {**tiny_stores, "both": 1.0} if stage == "conversations" else {}
        settings = {"stage": stage, "model": str(tiny_yaml), "train": PARTS[stage], "data": data, **COMMON}
        return Recipe(**{**settings, **replaced})

    return build


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(one, other) -> set[str]:
    assert set(one) == set(other)
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_equal_files_give_equal_models_and_another_seed_another(tiny, tiny_yaml, tmp_path):
    model, processor = fresh_model(tiny_yaml)
    assert not differing(weights(model), weights(tiny[0]))
    assert processor.tokenizer.get_vocab() == tiny[1].tokenizer.get_vocab()
    assert processor.config == tiny[1].config
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**yaml.safe_load(tiny_yaml.read_text()), "seed": 1}))
    assert differing(weights(fresh_model(tmp_path / "other.yaml")[0]), weights(model))


def test_a_fresh_model_knows_every_token_and_ends_its_turns(tiny):
    model, processor = tiny
    assert model.config.text_config.vocab_size == len(processor.tokenizer) == 320
    ids = processor.tokenizer.get_added_vocab()
    assert model.generation_config.eos_token_id == ids["<|im_end|>"]
    assert (model.config.video_token_id, model.config.audio_token_id) == (ids["<|video_pad|>"], ids["<|audio_pad|>"])


def test_the_tokenizer_is_learnt_from_training_scenes_alone_and_always_the_same():
    assert world_texts(3) == world_texts(3) and world_texts(2) == world_texts(3)[: len(world_texts(2))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modell": {}}, "unknown setting 'modell' .*'model'"),
        ({"tokenizer": {"vocab_size": 300}}, r"tokenizer\.captions is missing"),
        ({"processor": {"patchsize": 8}}, "patch_size"),
        ({"model": {"text_config": {"hiden_size": 32}}}, "Did you mean 'hidden_size'"),
    ],
)
def test_a_wrong_setting_of_a_fresh_model_is_named(tiny_yaml, tmp_path, change, message):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**yaml.safe_load(tiny_yaml.read_text()), **change}))
    with pytest.raises(KokaneeError, match=message):
        fresh_model(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("stage", PARTS)
def test_a_killed_stage_goes_on_bit_for_bit_and_changes_only_its_parts(recipe, tiny, tmp_path, stage):
    settings = recipe(stage, save_every=1)
    figures = run_stage(settings, tmp_path / "whole")

    def stop(step: int, figures: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(settings, tmp_path / "parts", stop)
    assert not (tmp_path / "parts" / "model").exists()
    again = run_stage(settings, tmp_path / "parts")
    assert {**figures, "steps_per_s": 0} == {**again, "steps_per_s": 0}
    whole, parts = (load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert not differing(whole, parts)
    model, processor = load(tmp_path / "whole" / "model", dtype="float32")
    changed = differing(weights(model), weights(tiny[0]))
    assert changed and all(name.startswith(PARTS[stage]) for name in changed)
    assert processor.config == tiny[1].config


@pytest.mark.parametrize("stage", PARTS)
def test_every_trained_weight_gets_a_gradient(recipe, tiny, stage):
    """Otherwise processes that share the work would wait for it, or stop."""
    settings = recipe(stage)
    objective = make_objective(settings, copy.deepcopy(tiny[0]), tiny[1])
    trained = choose(objective, settings.train)
    objective(objective.batch("train", 0, 4))[0].backward()
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []


def test_a_stage_goes_on_from_the_model_of_the_one_before(recipe, tmp_path):
    run_stage(recipe("visual encoder", steps=1), tmp_path / "1")
    run_stage(recipe("sound encoder", steps=1, model=str(tmp_path / "1" / "model")), tmp_path / "2")
    first, second = (weights(load(tmp_path / name / "model", dtype="float32")[0]) for name in ("1", "2"))
    assert all(name.startswith("audio.encoder.") for name in differing(first, second))


def test_a_stage_whose_starting_model_has_changed_is_refused(recipe, tmp_path):
    run_stage(recipe("visual encoder", steps=1), tmp_path / "1")
    second = recipe("sound encoder", steps=1, model=str(tmp_path / "1" / "model"))
    run_stage(second, tmp_path / "2")
    before = run_stage(second, tmp_path / "2")
    assert before == run_stage(second, tmp_path / "2")
    shutil.rmtree(tmp_path / "1")
    run_stage(recipe("visual encoder", steps=1, seed=9), tmp_path / "1")
    with pytest.raises(KokaneeError, match=r"another start \(other weights than before"):
        run_stage(second, tmp_path / "2")


@pytest.mark.parametrize("stage", ["visual encoder", "sound encoder"])
def test_gates_are_the_shares_of_the_trained_encoder_on_the_test_split(recipe, tmp_path, stage):
    settings = recipe(stage, steps=2)
    run_stage(settings, tmp_path)
    done = []
    found = gates(tmp_path, 5, batch_size=3, report=lambda *counts: done.append(counts))
    assert done == [(3, 5), (5, 5)]
    objective = make_objective(settings, *fresh_model(settings.model)).eval()
    stored = load_file(tmp_path / CHECKPOINT)
    objective.load_state_dict({k.removeprefix("weight/"): v for k, v in stored.items() if "weight/" in k}, strict=False)
    with torch.no_grad():
        losses = [float(objective(objective.batch("test", number, size))[0]) for number, size in ((0, 3), (1, 2))]
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_gates_of_what_is_no_finished_run_of_an_encoder_are_refused(recipe, tmp_path):
    with pytest.raises(KokaneeError, match="holds no run"):
        gates(tmp_path, 1)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "state.json").write_text('{"version": 1, "split": "test"}')
    with pytest.raises(KokaneeError, match="holds no run"):
        gates(tmp_path / "clips", 1)
    run_stage(recipe("conversations", steps=1), tmp_path / "words")
    with pytest.raises(KokaneeError, match="world exam"):
        gates(tmp_path / "words", 1)

    def stop(step: int, figures: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(recipe("sound encoder", save_every=1), tmp_path / "begun", stop)
    with pytest.raises(KokaneeError, match="at step 1 of 3"):
        gates(tmp_path / "begun", 1)


def test_the_same_recipe_gives_the_same_run_whatever_ran_before(recipe, tmp_path):
    settings = recipe("sound encoder", steps=1)
    run_stage(settings, tmp_path / "one")
    torch.rand(3)
    run_stage(settings, tmp_path / "two")
    one, two = (load_file(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    assert not differing(one, two)


def test_settings_of_samples_that_a_stage_has_not_are_refused(recipe):
    with pytest.raises(KokaneeError, match=r"'sound encoder' makes its samples from scenes.*seen"):
        run_stage(recipe("sound encoder", data={"seen": 1.0}), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KokaneeError, match="unknown setting 'trainn'"):
        run_stage(recipe("conversations", data={"trainn": "x"}), None)  # pyright: ignore[reportArgumentType]


def test_two_runs_do_not_share_a_folder_and_what_killed_ones_left_is_removed(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("kokanee.formats.LOCK_WAIT_S", 0.1)
    (tmp_path / f".checkpoint.safetensors.1{UNFINISHED}").write_text("half")
    settings = recipe("sound encoder")
    with alone_in(tmp_path), pytest.raises(KokaneeError, match="Another process works in"):
        run_stage(settings, tmp_path)
    run_stage(settings, tmp_path)
    assert (tmp_path / "model").is_dir() and not list(tmp_path.glob(f".*{UNFINISHED}"))
