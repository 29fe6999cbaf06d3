"""Laws of the reproduction: the recipes of the house with one seed, steps that continue, settings that hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kokanee import reproduce as module
from kokanee.errors import KokaneeError
from kokanee.formats import read_json, read_jsonl
from kokanee.recipes import read_yaml
from kokanee.reproduce import (
    CONTROLS,
    MINUTES,
    PRETRAINING,
    Settings,
    check_recipes,
    checked_settings,
    device_name,
    left,
    recipes_of,
    reproduce,
    shipped_recipes,
    sized_for,
    steps_of,
)
from kokanee.results import COMPARED

NANO = Path(__file__).parent.parent / "recipes" / "nano"


def without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what says where things are."""
    data = {k: v for k, v in recipe.get("data", {}).items() if k not in ("train", "validation", "seed")}
    return {k: v for k, v in recipe.items() if k not in ("model", "teacher", "data", "seed")} | {"data": data}


def test_with_seed_0_the_steps_are_the_shipped_recipes():
    found = recipes_of(Settings())
    for path in NANO.glob("*.yaml"):
        shipped = read_yaml(path)
        assert without_places(found[path.stem]) == without_places(shipped)
        assert found[path.stem]["seed"] == shipped.get("seed", 0)
    assert shipped_recipes() == NANO
    assert {**found["6-mrdpo"], "loss": "dpo", "rounds": 1} == found["dpo"]
    assert {**found["6-mrdpo"], "loss": "ce"} == found["ce"]
    assert {**found["7-rebirth"], "teacher": None} == found["continued"]


def test_every_seed_has_numbers_of_its_own_and_all_else_in_common():
    zero, one, two = (recipes_of(Settings(seed=seed)) for seed in range(3))
    numbers = [{recipe["seed"] for recipe in found.values()} for found in (zero, one, two)]
    assert numbers[0].isdisjoint(numbers[1]) and numbers[1].isdisjoint(numbers[2])
    for name, recipe in one.items():
        assert without_places(recipe) == without_places(two[name]) and recipe["seed"] + 100 == two[name]["seed"]
        if name in ("6-mrdpo", "dpo", "ce", "7-rebirth", "continued"):
            assert recipe["data"]["train"]["seed"] == 1


@pytest.mark.parametrize("settings", [Settings(), Settings(quick=True), Settings(start="nano-sft", device="cuda")])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_recipe_is_valid_and_has_as_many_clips_in_a_step_whatever_shares_them(settings, processes):
    recipes = recipes_of(settings)
    check_recipes(replace(settings, processes=processes), recipes)
    for name, recipe in recipes.items():
        if name != "model":
            sized = sized_for(replace(settings, processes=processes), recipe)
            clips = sized["batch_size"] * sized["processes"] * sized["accumulate"]
            assert clips == (8 if settings.quick else recipe["batch_size"] * recipe["processes"])
            if not settings.quick and processes <= recipe["processes"]:
                assert sized["batch_size"] == recipe["batch_size"], "the same batches, one after the other"
            if not settings.quick:
                held_out = recipe["evaluate_batches"] * recipe["batch_size"]
                assert sized["evaluate_batches"] * sized["batch_size"] == held_out


def test_a_wrong_setting_is_told_before_anything_is_begun(tmp_path):
    with pytest.raises(KokaneeError, match=r"6-mrdpo: unknown setting 'stepz' \(did you mean 'steps'"):
        reproduce(Settings(changed=(("6-mrdpo", "stepz", 1),)), tmp_path / "out", print)
    with pytest.raises(KokaneeError, match=r"5-sft, data: unknown setting 'question'"):
        reproduce(Settings(changed=(("5-sft", "data.question", 1),)), tmp_path / "out", print)
    with pytest.raises(KokaneeError, match="no name of a model"):
        reproduce(Settings(start=str(tmp_path / "sft")), tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_what_is_left_is_told_for_the_device(tmp_path):
    cpu, cuda = (left(Settings(device=device), tmp_path) for device in ("cpu", "cuda"))
    assert cuda < 60 < 180 < cpu < 300
    without = Settings(device="cuda", without=tuple(CONTROLS))
    assert left(without, tmp_path) == pytest.approx(cuda - sum(MINUTES[name][1] for name in CONTROLS))


def test_a_control_has_what_it_controls_in_common_whatever_is_changed():
    """SFT continued takes as many steps of the same kind as rebirth, cross-entropy as many as mrDPO."""
    changed = (("7-rebirth", "steps", 9), ("7-rebirth", "questions", 1), ("6-mrdpo", "steps", 5))
    found = recipes_of(Settings(changed=changed))
    assert found["continued"] == {**found["7-rebirth"], "teacher": None} and found["continued"]["steps"] == 9
    assert found["ce"] == {**found["6-mrdpo"], "loss": "ce"} and found["ce"]["steps"] == 5
    assert recipes_of(Settings(changed=(*changed, ("ce", "steps", 3))))["ce"]["steps"] == 3


def test_clips_that_cannot_be_shared_evenly_are_told():
    with pytest.raises(KokaneeError, match="32 clips cannot be shared by 3 processes"):
        sized_for(Settings(processes=3), recipes_of(Settings())["5-sft"])


def test_settings_of_single_steps_can_be_replaced():
    found = recipes_of(Settings(changed=(("5-sft", "steps", 7), ("6-mrdpo", "pairs.min_gap", 0.3))))
    assert found["5-sft"]["steps"] == 7 and found["6-mrdpo"]["pairs"]["min_gap"] == 0.3
    with pytest.raises(KokaneeError, match="no step '9-x' with a recipe"):
        recipes_of(Settings(changed=(("9-x", "steps", 7),)))
    with pytest.raises(KokaneeError, match="'steps' is a single value"):
        recipes_of(Settings(changed=(("5-sft", "steps.more", 7),)))
    with pytest.raises(KokaneeError, match="no reproduction of 'giga'"):
        recipes_of(Settings(model="giga"))


def test_what_is_begun_with_or_left_out_has_no_step():
    names = {step.name for step in steps_of(Settings())}
    assert {*PRETRAINING, "features", "6-mrdpo", "7-rebirth", "controls", "exam", "marks"} <= names
    some = Settings(start="nano-sft", without=("dpo", "ce"))
    left = steps_of(some)
    assert names - {step.name for step in left} == set(PRETRAINING)
    assert [step.made for step in left if step.name == "controls"] == [("continued/metrics.json",)]
    assert "controls" not in [step.name for step in steps_of(Settings(without=tuple(CONTROLS)))]
    marked = [Path(command[command.index("--out") + 1]).stem for command in left[-1].commands]
    assert sorted(marked) == ["continued", "gdpo", "mrdpo", "rebirth", "sft"]
    assert set(recipes_of(some)) == {"6-mrdpo", "7-rebirth", "continued"}


@pytest.fixture
def idle(monkeypatch):
    """Steps that do nothing, and results that say nothing."""
    monkeypatch.setattr(module, "run_steps", lambda steps, folder, threads, device, report: 0)
    monkeypatch.setattr(module, "is_done", lambda step, folder: True)
    monkeypatch.setattr(module, "results", lambda settings, out, steps: dict(settings))
    monkeypatch.setattr(module, "page", lambda found: f"{len(found)} seeds")


def test_a_folder_goes_on_with_the_same_settings_alone(idle, tmp_path):
    out = tmp_path / "out"
    assert reproduce(Settings(), out, print) and not reproduce(Settings(), out, print)
    (out / "5-sft").mkdir()
    for other, said in (
        (Settings(seed=3), r"\(seed: 0 before, 3 now\)"),
        (Settings(quick=True), r"\(quick: False before, True now\)"),
        (Settings(changed=(("5-sft", "data.questions", 1),)), r"\(5-sft\.data\.questions: 8 before, 1 now\)"),
    ):
        with pytest.raises(KokaneeError, match=f"other settings {said}"):
            reproduce(other, out, print)


def test_results_are_made_again_whatever_stops_a_call_that_has_more_to_do(idle, tmp_path, monkeypatch):
    """Killed after the last step: the next call finds all steps done, and no results of fewer."""
    reproduce(Settings(without=("dpo",)), tmp_path, print)
    with monkeypatch.context() as killed:
        killed.setattr(module, "is_done", lambda step, folder: step.name != "controls")
        killed.setattr(module, "run_steps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reproduce(Settings(), tmp_path, print)
    assert reproduce(Settings(), tmp_path, print) and read_json(tmp_path / "results.json")["without"] == []


def test_what_has_not_begun_may_change_and_what_has_stays_as_it_is(idle, tmp_path):
    """Also how it is shared: a step that two processes began, two go on with."""
    reproduce(Settings(), tmp_path, print)
    (tmp_path / "5-sft").mkdir()
    reproduce(Settings(processes=4, changed=(("6-mrdpo", "steps", 7),), without=("ce",)), tmp_path, print)
    recipes = {path.stem: read_yaml(path) for path in (tmp_path / "recipes").iterdir()}
    assert recipes["5-sft"]["processes"] == 2 and recipes["6-mrdpo"]["processes"] == 4
    assert recipes["6-mrdpo"]["steps"] == 7 and read_json(tmp_path / "state.json")["recipes"]["dpo"]["steps"] == 7
    reproduce(Settings(changed=(("6-mrdpo", "steps", 7),)), tmp_path, print)
    (tmp_path / "6-mrdpo").mkdir()
    with pytest.raises(KokaneeError, match=r"6-mrdpo\.steps: 7 before, 160 now"):
        reproduce(Settings(), tmp_path, print)


def test_a_control_that_is_done_cannot_be_left_out_any_more(idle, tmp_path):
    reproduce(Settings(without=("dpo",)), tmp_path, print)
    (tmp_path / "ce").mkdir()
    reproduce(Settings(without=("ce",)), tmp_path, print)
    (tmp_path / "ce" / "metrics.json").write_text("{}")
    reproduce(Settings(without=("dpo",)), tmp_path, print)
    with pytest.raises(KokaneeError, match=r"has the control ce already.*Leave --without ce away"):
        reproduce(Settings(without=("ce",)), tmp_path, print)


def test_where_nothing_is_done_yet_settings_are_checked_against_the_folder_too(idle, tmp_path):
    """As a call that only shows the commands does."""
    reproduce(Settings(start="nano-sft"), tmp_path / "out", print)
    before = (tmp_path / "out" / "state.json").read_text()
    for other, said in ((Settings(), "from: 'nano-sft' before, None now"), (Settings(seed=1), "seed: 0 before, 1 now")):
        with pytest.raises(KokaneeError, match=said):
            checked_settings(other, tmp_path / "out")
    checked_settings(Settings(start="nano-sft", processes=1), tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KokaneeError, match=r"is a file\. Give a folder"):
        checked_settings(Settings(), tmp_path / "file")
    assert (tmp_path / "out" / "state.json").read_text() == before and not (tmp_path / "new").exists()


def test_a_step_is_noted_with_the_device_that_it_ran_on(idle, tmp_path, monkeypatch):
    """Features, files and merged weights are made on the processor; a recipe that was begun there stays there."""
    reproduce(Settings(), tmp_path, print)
    (tmp_path / "5-sft").mkdir()
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    settings = Settings(device="cuda", processes=1)
    reproduce(settings, tmp_path, print)
    on_gpu = [step.name for step in steps_of(settings) if device_name(settings, tmp_path, step) == "a GPU"]
    assert on_gpu == ["1-see", "2-hear", "3-base", "4-align", "6-mrdpo", "7-rebirth", "controls", "marks"]
    assert {device_name(Settings(), tmp_path, step) for step in steps_of(Settings())} == {
        device_name(settings, tmp_path, steps_of(settings)[2])
    }


def test_a_folder_can_be_moved(idle, tmp_path):
    """Nothing in it says where it is, so that a step under way goes on too."""
    reproduce(Settings(), tmp_path / "one", print)
    texts = [path.read_text() for path in (tmp_path / "one").rglob("*") if path.suffix in (".yaml", ".json")]
    commands = [word for step in steps_of(Settings()) for command in step.commands for word in command]
    assert len(texts) > 10 and not any(str(tmp_path) in text for text in [*texts, *commands])
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert not reproduce(Settings(), tmp_path / "two", print)


def test_the_report_is_about_seeds_beside_too(idle, tmp_path):
    reproduce(Settings(), tmp_path / "one", print)
    reproduce(Settings(seed=1), tmp_path / "two", print, [tmp_path / "one"])
    assert (tmp_path / "two" / "report.html").read_text() == "2 seeds"
    with pytest.raises(KokaneeError, match="has the same seed or other settings"):
        reproduce(Settings(seed=1), tmp_path / "three", print, [tmp_path / "two"])
    with pytest.raises(KokaneeError, match="has the same seed or other settings"):
        reproduce(Settings(seed=2, changed=(("dpo", "steps", 3),)), tmp_path / "three", print, [tmp_path / "two"])
    with pytest.raises(KokaneeError, match="no finished reproduction"):
        reproduce(Settings(seed=2), tmp_path / "three", print, [tmp_path / "four"])
    assert not (tmp_path / "three").exists()


def test_a_foreign_folder_is_left_alone(idle, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(KokaneeError, match="holds other files"):
        reproduce(Settings(), tmp_path, print)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["thesis.txt"]


@pytest.mark.slow
def test_the_quick_path_is_killed_goes_on_ends_and_is_finished_then(tmp_path):
    """The whole method through the command line, as a user would."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kokanee", "reproduce", "nano", "--quick", "--out", str(out), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (out / "logs" / "features.txt").is_file():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.kill()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [record["name"] for record in read_jsonl(out / "steps.jsonl") if record["ended"]]
    assert steps == [step.name for step in steps_of(Settings(quick=True, processes=1))]
    assert "1-see" not in done.stderr and "step 3 of 12, features" in done.stderr
    found = read_json(out / "results.json")
    assert len(done.stdout.splitlines()) == 2 + len(found["stages"]) + 1
    assert "whose numbers mean nothing" in done.stderr
    names = ["base", "sft", "dpo", "gdpo", "mrdpo", "rebirth", "ce", "continued"]
    assert [stage["name"] for stage in found["stages"]] == names and found["quick"]
    assert all(stage[group]["total"] > 0 for stage in found["stages"] for group in ("greedy", "sampled", "local"))
    assert all(stage["qa"]["questions"] > 0 for stage in found["stages"])
    assert [row["round"] for row in found["rounds"]] == [row["round"] for row in found["ce_rounds"]] == [0, 1, 2]
    assert {one["name"] for one in found["times"]} == set(steps)
    assert [goal["reached"] for goal in found["goals"]] == [None] * 5, "a quick run shows nothing"
    assert [(pair["stage"], pair["beside"]) for pair in found["compared"]] == list(COMPARED)
    written = (out / "report.html").read_text()
    assert "A quick run" in written and f"{found['stages'][4]['greedy']['total']:.1f}" in written
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == done.stdout and "nothing was left to do" in again.stderr
    changed = subprocess.run([*command, "--set", "5-sft.steps=41"], capture_output=True, text=True)
    assert changed.returncode == 1 and "5-sft.steps: 40 before, 41 now" in changed.stderr
    shown = subprocess.run([*command, "--seed", "1", "--dry-run"], capture_output=True, text=True)
    assert shown.returncode == 1 and "seed: 0 before, 1 now" in shown.stderr
    assert yaml.safe_load((out / "recipes" / "5-sft.yaml").read_text())["steps"] == 40
