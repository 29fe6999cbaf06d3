"""Laws of `kokanee train` and `kokanee world`: recipes with replaced settings, runs that go on, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from kokanee.checkpoints import load
from kokanee.cli_train import read_settings
from kokanee.defaults import Defaults
from kokanee.errors import KokaneeError
from kokanee.features import SHARD, read_store
from kokanee.formats import append_jsonl, read_jsonl
from mrdpo_runs import SMALL
from test_cli import kk

RECIPE: dict[str, Any] = {
    "stage": "sound encoder",
    "train": ["audio.encoder"],
    "steps": 2,
    "batch_size": 2,
    "workers": 0,
    "learning_rate": 0.001,
    "evaluate_every": 2,
    "evaluate_batches": 1,
    "device": "cpu",
}


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model": str(tiny_checkpoint)}))
    return path


def test_a_stage_leaves_a_model_that_loads_and_inherits_its_question(recipe, tmp_path):
    found = kk("train", recipe, "--out", tmp_path / "run")
    told = json.loads(found.stdout)
    assert told["model"] == (tmp_path / "run" / "model").as_posix() and told["steps"] == 2
    assert "validation/loss" in told["figures"] and "step 2: held out, loss" in found.stderr
    load(tmp_path / "run" / "model")
    assert Defaults.of(tmp_path / "run" / "model") == Defaults("Describe the video.", 12)


def test_a_run_with_other_settings_is_refused(recipe, tmp_path):
    kk("train", recipe, "--out", tmp_path / "run")
    found = kk("train", recipe, "--out", tmp_path / "run", "--set", "seed=5", code=1)
    assert "seed: 0 before, 5 now" in found.stderr


def test_settings_are_replaced_by_their_path(recipe):
    found = read_settings(recipe, ["steps=7", "data.exact=0.5", "train=[visual]", "data.train=a=b"])
    assert (found["steps"], found["data"], found["train"]) == (7, {"exact": 0.5, "train": "a=b"}, ["visual"])


def test_wrong_settings_are_named(recipe, tmp_path):
    for item in ("steps", "=3", "steps=[1"):
        with pytest.raises(typer.BadParameter):
            read_settings(recipe, [item])
    with pytest.raises(KokaneeError, match="'steps' is a single value"):
        read_settings(recipe, ["steps.first=3"])
    for item, message in (("step=3", "unknown setting 'step'"), ("batch_size=0", "batch_size")):
        assert message in kk("train", recipe, "--out", tmp_path / "run", "--set", item, code=1).stderr


@pytest.mark.slow
def test_two_processes_leave_one_model_and_a_mistake_in_them_is_one_message(recipe, tmp_path):
    command = [sys.executable, "-m", "kokanee", "train", recipe, "--out", tmp_path / "run", "--set", "processes=2"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    load(tmp_path / "run" / "model")
    done = subprocess.run([*command, "--set", "seed=5"], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("seed: 0 before, 5 now") == 1 and "Traceback" not in done.stderr


def test_world_clips_are_made_and_made_once(tmp_path):
    found = kk("world", "make", tmp_path / "clips", "--clips", 1, "--seed", 3, "--split", "test")
    assert found.stdout == f"{tmp_path / 'clips' / 'samples.jsonl'}\n"
    before = (tmp_path / "clips" / "samples.jsonl").read_bytes()
    kk("world", "make", tmp_path / "clips", "--clips", 1, "--seed", 3, "--split", "test")
    assert (tmp_path / "clips" / "samples.jsonl").read_bytes() == before
    assert read_jsonl(tmp_path / "clips" / "samples.jsonl")[0]["split"] == "test"
    assert (
        "seed: 3 before, 4 now"
        in kk("world", "make", tmp_path / "clips", "--clips", 1, "--seed", 4, "--split", "test", code=1).stderr
    )


def test_world_features_are_those_of_the_model(tiny_checkpoint, tmp_path):
    words = ("world", "features", tiny_checkpoint, tmp_path / "store", "--clips", 2, "--split", "validation")
    assert kk(*words).stdout == f"{tmp_path / 'store'}\n"
    assert len(read_store(tmp_path / "store", load(tiny_checkpoint, dtype="float32")[0], "validation", 0)) == 2


@pytest.mark.slow
def test_several_processes_make_the_features_that_one_makes(tiny_checkpoint, tmp_path):
    def words(store: str, *more: object) -> tuple[object, ...]:
        return ("world", "features", tiny_checkpoint, tmp_path / store, "--clips", SHARD + 1, "--split", "train", *more)

    kk(*words("two", "--processes", 2))
    kk(*words("one"))
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def test_rounds_of_mrdpo_leave_a_table_a_report_and_a_model(tiny_checkpoint, tiny_stores, tmp_path):
    data = {split: {"features": folder} for split, folder in tiny_stores.items()}
    path = tmp_path / "mrdpo.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": str(tiny_checkpoint), "data": data}))
    words = ("train", "mrdpo", path, "--out", tmp_path / "run", "--rounds", 1, "--steps-per-round", 2)
    found = kk(*words)
    lines = found.stdout.splitlines()
    assert lines[0].startswith("| round | Miss") and [line.split("|")[1].strip() for line in lines[2:]] == ["0", "1"]
    assert (tmp_path / "run" / "report.html").is_file() and "report.html" in found.stderr
    assert "3 validation clips" in found.stderr and "data.validation is" not in found.stderr
    load(tmp_path / "run" / "model")
    assert "steps: 2 before, 3 now" in kk("train", path, "--out", tmp_path / "run", code=1).stderr
    pairs = tmp_path / "run" / "round-01" / "pairs.jsonl"
    kk("pairs", pairs, "--trl", "--out", tmp_path / "trl.jsonl")
    trl = read_jsonl(tmp_path / "trl.jsonl")
    assert len(trl) == len(read_jsonl(pairs)) and trl[0]["chosen"][0]["role"] == "assistant"
    assert "is there already" in kk("pairs", pairs, "--out", tmp_path / "trl.jsonl", code=1).stderr


def test_rounds_are_only_of_mrdpo_and_a_stage_is_called_by_its_name(recipe, tmp_path):
    for words, message in (
        (("--rounds", 2), "only mrdpo has rounds"),
        (("--steps-per-round", 2), "only mrdpo has rounds"),
    ):
        assert message in kk("train", recipe, "--out", tmp_path / "run", *words, code=2).stderr
    assert "which recipe of the stage 'rebirth'" in kk("train", "rebirth", "--out", tmp_path / "run", code=2).stderr
    assert "own temperatures" in kk("world", "exam", tmp_path, "--full", "--temperature", 0, code=2).stderr
    assert "stage 'sound encoder'" in kk("train", "mrdpo", recipe, "--out", tmp_path / "run", code=2).stderr
    misspelt = kk("train", "rebirt", recipe, "--out", tmp_path / "run", code=2).stderr
    assert "rebirt is no stage; " in " ".join(misspelt.replace("│", " ").split())
    wrong = kk("train", recipe, "--out", tmp_path / "run", "--set", "stage=mrdop", code=1).stderr
    assert "no stage 'mrdop'" in wrong and "mrdpo" in wrong


def test_rebirth_is_a_stage_that_tells_what_it_kept_and_how_the_student_is_now(tiny_checkpoint, tiny_stores, tmp_path):
    path = tmp_path / "rebirth.yaml"
    data = {split: {"features": folder} for split, folder in tiny_stores.items()}
    small = {name: value for name, value in SMALL.items() if name in ("max_new_tokens", "lora", "workers", "device")}
    settings = {"stage": "rebirth", "steps": 2, "batch_size": 1, "evaluate_batches": 1, "learning_rate": 0.01}
    settings |= {"model": str(tiny_checkpoint), "teacher": str(tiny_checkpoint), "validation_clips": 2}
    path.write_text(yaml.safe_dump({**small, **settings, "keep": {"cut_off": True, "min_words": 0}, "data": data}))
    found = kk("train", "rebirth", path, "--out", tmp_path / "run")
    assert found.stdout.count("\n| ") == 2 and "| after |" in found.stdout
    assert "6 of 6 captions kept" in found.stderr and "validation clips" in found.stderr
    load(tmp_path / "run" / "model")
    again = kk("train", path, "--out", tmp_path / "run", "--set", "keep.max_words=1", code=1)
    assert "(keep.max_words: None before, 1 now)" in again.stderr
    rounds = kk("train", path, "--out", tmp_path / "run", "--rounds", "2", code=2)
    assert "only mrdpo has rounds" in rounds.stderr


def test_sft_is_rebirth_without_a_teacher(recipe, tiny_checkpoint, media, tmp_path):
    names = ("first.mp4", "second.mp4", "silent.mp4")
    said = [{"file": name, "caption": f"Something moves in {name}."} for name in names]
    append_jsonl(tmp_path / "captions.jsonl", said)
    small = {name: value for name, value in SMALL.items() if name in ("lora", "workers", "device")}
    settings = {"stage": "rebirth", "steps": 1, "batch_size": 1, "evaluate_batches": 1, "learning_rate": 0.01}
    data = {"train": {"videos": str(media), "captions": str(tmp_path / "captions.jsonl")}}
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({**small, **settings, "model": str(tiny_checkpoint), "data": data}))
    told = kk("train", "sft", path, "--out", tmp_path / "run").stderr
    assert "train, step 1: held out, loss " in told and "3 of 3 captions kept" in told
    learnt = [record["caption"] for record in read_jsonl(tmp_path / "run" / "kept.jsonl")]
    assert sorted(learnt) == sorted(record["caption"] for record in said)
    again = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    kk("train", "rebirth", path, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == again
    for words, reason in (
        (("sft", path, "--set", "teacher=nano"), "sft learns those of the data"),
        (("sft", recipe), "is a recipe of the stage 'sound encoder'"),
        (("sft",), "which recipe of the stage 'sft'"),
    ):
        assert reason in kk("train", *words, "--out", tmp_path / "other", code=2).stderr
    assert not (tmp_path / "other").exists()
