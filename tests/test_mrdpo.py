"""Laws of mrDPO: rounds build on each other, the reference stands still, a killed run ends as if it had not been."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from pydantic import ValidationError

from kill_mrdpo import kill_often
from kokanee import adapting, formats, mrdpo
from kokanee.adapters import load_adapter, merge
from kokanee.checkpoints import base_of, load
from kokanee.clips import WorldClips, WorldData
from kokanee.defaults import Defaults
from kokanee.drafts import Team, Writer
from kokanee.errors import KokaneeError
from kokanee.formats import alone_in, read_json, read_jsonl, write_json
from kokanee.mrdpo import check_enough, opened, run_mrdpo
from kokanee.mrdpo_recipe import MrdpoRecipe
from kokanee.mrdpo_report import best, is_over
from kokanee.pairs import read_pairs
from mrdpo_runs import quiet, run, small_recipe, weights
from together import run_together


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, tiny_stores, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("mrdpo") / "whole"
    run(small_recipe(tiny_checkpoint, tiny_stores), folder)
    return folder


@pytest.fixture
def recipe(tiny_checkpoint, tiny_stores):
    return lambda **replaced: small_recipe(tiny_checkpoint, tiny_stores, **replaced)


def test_a_run_leaves_a_model_figures_of_every_round_and_a_report(whole):
    assert [path.name for path in sorted(whole.glob("round-*"))] == ["round-00", "round-01", "round-02"]
    found = read_json(whole / "metrics.json")["rounds"]
    assert [row["round"] for row in found] == [0, 1, 2] and read_json(whole / "metrics.json")["kept"] == 2
    assert all({"greedy", "sampled", "qa"} <= row.keys() for row in found)
    assert "pairs" not in found[0] and found[1]["pairs"]["pairs"] == len(read_pairs(whole / "round-01" / "pairs.jsonl"))
    assert "<svg" in (whole / "report.html").read_text()
    load(whole / "model")


def test_the_first_step_of_every_round_has_the_loss_of_no_preference(whole):
    """log 2 + weight x cross-entropy: the new adapter changes nothing, and the stored reference is exact."""
    for number in (1, 2):
        first = read_jsonl(whole / f"round-{number:02d}" / "train" / "metrics.jsonl")[0]
        rest = 0.1 * first["ground_truth"] + 0.1 * first.get("qa", 0.0)
        assert first["dpo"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["loss"] == pytest.approx(math.log(2) + rest, abs=1e-6)
        assert abs(first["margin"]) < 1e-5


def test_questions_are_answered_from_their_round_on(whole):
    said = [read_jsonl(whole / f"round-{number:02d}" / "train" / "metrics.jsonl")[-1] for number in (1, 2)]
    assert "qa" not in said[0] and said[1]["qa"] > 0


def test_the_model_is_the_base_with_every_adapter_merged_in_order(whole, tiny_checkpoint):
    model, _ = load(tiny_checkpoint, dtype="float32")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for number in (1, 2):
        model = merge(load_adapter(model, whole / f"round-{number:02d}" / "adapter"))
    kept, _ = load(whole / "model", dtype="float32")
    changed = set()
    for (name, made), (_, left) in zip(model.named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(made, left), name
        if not torch.equal(made, before[name]):
            changed.add(name.split(".")[-2])
    assert changed == {"q_proj", "k_proj", "v_proj"}


def test_captions_of_a_round_are_the_merged_models(whole, tiny_checkpoint, tiny_stores, tmp_path):
    """Round 2 samples from what round 1 left: other captions, though clips and numbers were the same."""
    run(small_recipe(tiny_checkpoint, tiny_stores, rounds=1), tmp_path / "one")
    same = [(folder / "round-01" / "samples.jsonl").read_bytes() for folder in (whole, tmp_path / "one")]
    assert same[0] == same[1]
    model, processor = load(tiny_checkpoint, dtype="float32")
    model = merge(load_adapter(model, whole / "round-01" / "adapter"))
    clips = WorldClips(model, processor, WorldData(features=tiny_stores["train"]), "train")
    asked = small_recipe(tiny_checkpoint, tiny_stores)
    tasks = {task.name: task for task in (clips.task(number, 0, "") for number in range(len(clips)))}
    for draft in read_jsonl(whole / "round-02" / "samples.jsonl"):
        task = tasks[draft["clip"]].asking(draft["prompt"])
        found = [
            Writer(model, processor, 2, Team(PartialState())).said(clips, [task], way, 4) for way in asked.decodings(2)
        ]
        assert [text for ((*said,),) in found for text, _ in said] == draft["captions"]
    seeds = [read_jsonl(whole / f"round-{number:02d}" / "samples.jsonl")[0]["seeds"] for number in (1, 2)]
    assert seeds[0] != seeds[1] and len(set(seeds[0])) == 2


def test_a_finished_run_does_nothing_again(whole, recipe):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("round-*/**/*") if path.is_file()}
    reports: list[str] = []
    run_mrdpo(recipe(), whole, lambda what, done, total, figures: reports.append(what))
    assert not reports
    assert before == {path: path.stat().st_mtime_ns for path in whole.glob("round-*/**/*") if path.is_file()}


def test_a_run_that_is_stopped_at_every_report_ends_with_the_same_weights(whole, recipe, tmp_path):
    """Stopped after the first report, started again, stopped after its second, and so on."""
    for allowed in range(1, 200):
        left = [allowed]

        def report(what: str, done: int, total: int, figures: dict[str, float], left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed

        try:
            run_mrdpo(recipe(), tmp_path / "parts", report)
            break
        except Killed:
            continue
    assert 5 < allowed < 100
    assert weights(tmp_path / "parts") == weights(whole)
    for name in ("samples.jsonl", "verdicts.jsonl", "pairs.jsonl", "reference.jsonl", "validation.jsonl"):
        parts, once = (folder / "round-02" / name for folder in (tmp_path / "parts", whole))
        assert parts.read_bytes() == once.read_bytes(), name


def test_other_settings_are_refused_and_named(whole, recipe):
    with pytest.raises(KokaneeError, match=r"beta: 0.1 before, 0.2 now"):
        run(recipe(beta=0.2), whole)


def test_a_run_goes_on_with_more_rounds_and_another_budget(recipe, whole, tmp_path):
    run(recipe(rounds=1), tmp_path / "longer")
    run(recipe(judging={"budget_tokens": 5}), tmp_path / "longer")
    assert weights(tmp_path / "longer") == weights(whole)


def test_rounds_that_are_done_are_not_taken_back(recipe, whole, monkeypatch):
    before = weights(whole)
    for fewer in ({"rounds": 1}, {"patience": 1}):
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(mrdpo, "is_over", lambda found, patience: patience == 1 and len(found) == 2)
            with pytest.raises(KokaneeError, match=r"has 2 rounds already.*Give rounds: 2 or more"):
                run(recipe(**fewer), whole)
    assert weights(whole) == before and read_json(whole / "state.json")["recipe"]["rounds"] == 2


def test_a_run_stopped_in_training_goes_on_with_other_settings_that_are_free(recipe, whole, tmp_path):
    def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        if (what, done) == ("round 1, train", 2):
            raise Killed

    with pytest.raises(Killed):
        run_mrdpo(recipe(rounds=1, save_every=2), tmp_path / "run", stop)
    assert (tmp_path / "run" / "round-01" / "train" / "checkpoint.safetensors").is_file()
    run(recipe(caption_batch=3, log_every=2, keep="last", judging={"concurrency": 2}, unjudged=0.1), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(whole)


def test_a_new_run_may_have_replies_of_an_old_one_beside_it_and_nothing_else(recipe, tmp_path):
    (tmp_path / "replies.jsonl").touch()
    run(recipe(rounds=1), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pairs.jsonl").touch()
    with pytest.raises(KokaneeError, match="holds other files"):
        run(recipe(rounds=1), tmp_path / "other")


def test_what_a_killed_writer_left_is_removed(recipe, whole):
    left = [whole / ".model.abc.tmp", whole / "round-02" / ".adapter.tmp", whole / "round-01" / ".pairs.jsonl.7.tmp"]
    for path in left[:2]:
        (path / "new").mkdir(parents=True)
    left[2].touch()
    run(recipe(), whole)
    assert not any(path.exists() for path in left) and (whole / "model").is_dir()


def test_a_folder_that_is_no_runs_is_refused_with_all_that_is_in_it(recipe, tmp_path):
    theirs = [tmp_path / "letters" / ".draft.tmp", tmp_path / ".cache.tmp"]
    for path in theirs:
        path.mkdir(parents=True)
    with pytest.raises(KokaneeError, match="holds other files"):
        run(recipe(), tmp_path)
    assert all(path.is_dir() for path in theirs)


def test_a_run_begun_before_there_was_a_setting_had_its_default(whole, recipe):
    state = read_json(whole / "state.json")
    del state["recipe"]["unjudged"], state["recipe"]["qa_weight"]
    write_json(whole / "state.json", state)
    run(recipe(), whole)
    with pytest.raises(KokaneeError, match=r"qa_weight: 0.1 before, 0.3 now"):
        run(recipe(qa_weight=0.3), whole)


def test_two_do_not_work_in_one_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LOCK_WAIT_S", 0.1)
    with alone_in(tmp_path / "run"), pytest.raises(KokaneeError, match="Another process works in"):
        run(recipe(), tmp_path / "run")


def test_cross_entropy_alone_samples_nothing(recipe, tmp_path):
    found = run(recipe(loss="ce", rounds=1), tmp_path / "ce")
    assert not (tmp_path / "ce" / "round-01" / "samples.jsonl").exists()
    assert "pairs" not in found[1] and {"dpo", "margin"}.isdisjoint(found[1]["training"])
    assert "kl" in found[1] and "<svg" in (tmp_path / "ce" / "report.html").read_text()


def test_plain_dpo_knows_no_ground_truth(recipe, tmp_path):
    found = run(recipe(loss="dpo", rounds=1), tmp_path / "dpo")
    assert "ground_truth" not in found[1]["training"] and found[1]["training"]["dpo"] > 0


def test_without_a_proxy_one_adapter_is_trained_on(recipe, tiny_checkpoint, tmp_path):
    run(recipe(proxy=False), tmp_path / "one")
    adapters = [load_adapter(load(tiny_checkpoint)[0], tmp_path / "one" / f"round-0{n}" / "adapter") for n in (1, 2)]
    rows = [{name: weight for name, weight in adapted.named_parameters() if "lora_" in name} for adapted in adapters]
    assert rows[0].keys() == rows[1].keys()
    moved = [float((rows[1][name] - rows[0][name]).abs().max()) for name in rows[0]]
    assert 0 < max(moved) < 0.2  # three more steps of at most about 0.01 from where round 1 left it
    kept, _ = load(tmp_path / "one" / "model", dtype="float32")
    last = merge(adapters[1])
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), kept.parameters(), strict=True))
    first = read_jsonl(tmp_path / "one" / "round-02" / "train" / "metrics.jsonl")[0]
    assert first["dpo"] == pytest.approx(math.log(2), abs=1e-3)  # dropout of an adapter that does something


def test_the_best_round_is_kept_where_that_is_asked_for(recipe, tiny_checkpoint, tmp_path):
    run(recipe(keep="best"), tmp_path / "run")
    made = read_json(tmp_path / "run" / "metrics.json")
    assert made["kept"] == best(made["rounds"])
    model, _ = load(tiny_checkpoint, dtype="float32")
    for number in range(1, made["kept"] + 1):
        model = merge(load_adapter(model, tmp_path / "run" / f"round-{number:02d}" / "adapter"))
    kept, _ = load(tmp_path / "run" / "model", dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))


def test_every_round_has_its_share_of_the_learning_rate(recipe):
    shares = recipe(rates=[1.0, 0.5], learning_rate=0.01)
    assert [shares.rate_of(number) for number in (1, 2, 3, 9)] == [0.01, 0.005, 0.005, 0.005]


def test_a_run_in_bfloat16_that_recomputes_activations_learns_without_complaints(recipe, tmp_path, recwarn):
    found = run(recipe(dtype="bfloat16", gradient_checkpointing=True), tmp_path / "run")
    assert math.isfinite(found[1]["greedy"]["total"]) and found[1]["kl"] is not None
    first = read_jsonl(tmp_path / "run" / "round-01" / "train" / "metrics.jsonl")[0]
    assert first["dpo"] == pytest.approx(math.log(2), abs=1e-3)
    told = [str(warning.message) for warning in recwarn]
    assert not [text for text in told if "checkpoint" in text or "config file" in text]
    model, _ = load(tmp_path / "run" / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_run_in_bfloat16_turns_positions_as_the_saved_model_does(recipe, tiny_checkpoint, tmp_path):
    model = opened(recipe(dtype="bfloat16"), tmp_path / "run", quiet).model
    saved, _ = load(tiny_checkpoint, dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    speeds = dict(model.named_buffers())
    assert speeds and all(torch.equal(speeds[name], value) for name, value in saved.named_buffers())


def test_two_processes_do_what_one_does_with_twice_the_batches(recipe, tmp_path):
    alike: dict[str, Any] = {"rounds": 1, "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    one = run(recipe(**alike, accumulate=2), tmp_path / "one")
    settings = recipe(**alike, accumulate=1, processes=2)
    (tmp_path / "recipe.json").write_text(settings.model_dump_json())
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom kokanee.mrdpo_recipe import MrdpoRecipe\n"
        "from kokanee.launch import as_worker\nfrom mrdpo_runs import run\n"
        "recipe = MrdpoRecipe.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "with as_worker():\n    run(recipe, Path(sys.argv[2]))\n"
    )
    run_together(script, str(tmp_path / "recipe.json"), str(tmp_path / "two"))
    for name in ("samples.jsonl", "verdicts.jsonl", "pairs.jsonl"):
        first, second = (read_jsonl(tmp_path / folder / "round-01" / name) for folder in ("one", "two"))
        assert first == second
    made = [load(tmp_path / folder / "model", dtype="float32")[0] for folder in ("one", "two")]
    for a, b in zip(*(model.parameters() for model in made), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert one[0]["greedy"] == read_json(tmp_path / "two" / "metrics.json")["rounds"][0]["greedy"]


def test_a_run_ends_when_patience_does(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(mrdpo, "is_over", lambda found, patience: patience == 1 and len(found) == 2)
    assert len(run(recipe(patience=1), tmp_path / "run")) == 2


def errors(*totals: float) -> list[dict[str, Any]]:
    return [{"greedy": {"total": total}} for total in totals]


def test_patience_counts_rounds_since_the_best():
    assert best(errors(50, 40, 40, 45)) == 1
    assert not is_over(errors(50, 40, 41), 2) and is_over(errors(50, 40, 41, 42), 2)
    assert not is_over(errors(50, 60, 70), None) and is_over(errors(50, 60), 1)


def test_too_few_pairs_are_told_with_what_helps(recipe, tmp_path):
    with pytest.raises(
        KokaneeError, match=r"6 clips here, but takes 18: 12 for one step and 6 to check by.*smaller batches"
    ):
        run(recipe(batch_size=6), tmp_path / "run")
    assert not (tmp_path / "run" / "round-00").exists()


def test_a_late_round_that_lacks_pairs_may_be_the_end(recipe):
    with pytest.raises(
        KokaneeError, match=r"\(3: all captions the same\).*Let the run end here with --rounds 3, or begin"
    ):
        check_enough(2, recipe(batch_size=2), 4, {"all captions the same": 3})
    with pytest.raises(KokaneeError, match=r"Give more clips or smaller batches\."):
        check_enough(2, recipe(batch_size=2))


def test_an_adapter_names_what_it_is_on(whole, tiny_checkpoint):
    first, second = (whole / f"round-{number:02d}" / "adapter" for number in (1, 2))
    assert base_of(first) == tiny_checkpoint
    assert f"Its base is {tiny_checkpoint} with round 1 merged." in (second / "README.md").read_text()
    with pytest.raises(KokaneeError, match=r"its base \(.* with round 1 merged\) is not here"):
        base_of(second)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_model_that_is_to_be_shared_out_is_refused(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(KokaneeError, match=r"not the model\. Start it without FSDP and DeepSpeed"):
        run_mrdpo(recipe(), tmp_path, lambda *_: None)


def test_a_start_without_any_verdict_is_no_error_of_0(recipe, tmp_path, monkeypatch):
    def none(path, judge, tasks, drafts, *_):
        return [{"counts": [None], "repetition": [0.0]} for _ in drafts]

    monkeypatch.setattr(adapting, "verdicts", none)
    with pytest.raises(KokaneeError, match="None of 3 captions of the validation clips has a verdict"):
        run(recipe(unjudged=1.0), tmp_path / "run")


def test_greedy_captions_are_measured_as_the_model_makes_them(recipe, tiny_checkpoint, tmp_path):
    """With the checkpoint's penalty of repetitions; what is drawn, and the KL of it, without any."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    Defaults("Describe the video.", 12, repetition_penalty=1.5).save(folder)
    for name, model in (("plain", tiny_checkpoint), ("penalty", folder)):
        mrdpo.first_figures(opened(recipe(model=str(model)), tmp_path / name, quiet))
    said = {}
    for file in ("validation", "validation-sampled"):
        one, two = (read_jsonl(tmp_path / name / "round-00" / f"{file}.jsonl") for name in ("plain", "penalty"))
        said[file] = [[row["captions"] for row in rows] for rows in (one, two)]
    assert said["validation"][0] != said["validation"][1]
    assert said["validation-sampled"][0] == said["validation-sampled"][1]


def test_references_and_policy_are_computed_alike(recipe):
    with pytest.raises(ValidationError, match="dtype: bfloat16"):
        recipe(autocast_bf16=True)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"judge": "gpt-4o"}, "no judge 'gpt-4o'"),
        ({"lora": {"modules": ["q_proj", "kproj"]}}, "kproj cannot be adapted. Give some of q_proj"),
        ({"lora": {"modules": ["mlp"]}}, "mlp cannot be adapted"),
        ({"samples": 1, "temperatures": [1.0]}, "gives no pairs"),
        ({"clips": 7}, "clips: 7 in a round, but there are 6"),
        ({"processes": 2}, "processes: 2, but 1 run"),
        ({"data": {"train": {"features": "nowhere"}, "validation": {"features": "nowhere"}}}, "nowhere holds no"),
    ],
)
def test_what_cannot_be_is_told(recipe, tmp_path, replaced, message):
    with pytest.raises(KokaneeError, match=message):
        run(recipe(**replaced), tmp_path / "run")


def test_the_defaults_are_the_papers():
    fields = MrdpoRecipe.model_fields
    defaults = {name: fields[name].default for name in ("rounds", "steps", "top_p", "beta", "gt_weight")}
    assert defaults == {"rounds": 6, "steps": 1000, "top_p": 0.9, "beta": 0.1, "gt_weight": 0.1}
    lora = fields["lora"].default
    assert (lora.r, lora.alpha, lora.dropout, lora.modules) == (128, 256, 0.05, ("q_proj", "k_proj", "v_proj"))


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_with_the_same_weights(tiny_checkpoint, tiny_stores, tmp_path):
    moments = kill_often(tiny_checkpoint, tiny_stores, tmp_path, kills=10, seed=time.time_ns() % 10**6)
    assert len(moments) == 10
