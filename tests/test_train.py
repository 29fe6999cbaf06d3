"""Laws of training: a run that was killed goes on as if nothing had happened, and nothing bad reaches the weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from safetensors import safe_open
from torch import nn

from kokanee.errors import KokaneeError
from kokanee.formats import read_jsonl
from kokanee.recipes import Recipe
from kokanee.train import (
    CHECKPOINT,
    METRICS,
    Batch,
    Batches,
    Objective,
    Report,
    choose,
    claim,
    learning_rate,
    means,
)
from kokanee.train import train as train_chosen
from together import run_together

SMALL = {
    "stage": "conversations",
    "model": "none",
    "train": ("first", "second"),
    "steps": 6,
    "batch_size": 3,
    "workers": 0,
    "learning_rate": 0.05,
    "warmup": 2,
    "evaluate_every": 3,
    "evaluate_batches": 5,
    "save_every": 2,
    "log_every": 1,
    "device": "cpu",
}


def recipe(**replaced) -> Recipe:
    return Recipe(**{**SMALL, **replaced})


class Toy(Objective):
    """A regression in two layers with dropout and a head. A batch's inputs follow from its split and number."""

    def __init__(self, dropout: float = 0.3, spoil: tuple[str, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.model = nn.ModuleDict(
            {"first": nn.Linear(4, 6), "firstborn": nn.Linear(6, 6), "second": nn.ModuleDict({"deep": nn.Linear(6, 5)})}
        )
        self.head = nn.Linear(5, 1)
        self.dropout, self.spoil = nn.Dropout(dropout), spoil

    def batch(self, split: str, number: int, size: int) -> Batch:
        noise = torch.Generator().manual_seed(1000 * len(split) + number)
        inputs = torch.randn(size, 4, generator=noise)
        return {"inputs": inputs, "sample": torch.arange(size) + 100 * number, "number": torch.tensor(number)}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = torch.tanh(self.model["firstborn"](torch.tanh(self.model["first"](batch["inputs"]))))
        hidden = self.dropout(self.model["second"]["deep"](hidden))
        loss = (self.head(hidden)[:, 0] - batch["inputs"].sum(1)).square().mean()
        number = int(batch["number"])
        if self.training and self.spoil == ("loss", number):
            loss = loss * math.nan
        if self.training and self.spoil == ("gradient", number):
            loss = loss + torch.sqrt(self.head.bias * 0.0).sum()
        stats = {"even": batch["inputs"].mean().detach()} if number % 2 == 0 else {}
        return loss, {"mean": batch["inputs"].mean().detach(), **stats}


def train(
    objective: Objective,
    settings: Recipe,
    folder: Path,
    report: Report | None = None,
    start: dict[str, str] | None = None,
) -> dict[str, float]:
    """Train the parts that the recipe names."""
    return train_chosen(objective, settings, folder, choose(objective, settings.train), report, start)


class Killed(Exception):
    pass


def killed_at(last: int):
    def report(step: int, figures: dict[str, float]) -> None:
        if step == last:
            raise Killed

    return report


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / CHECKPOINT, "pt") as file:
        names = list(file.keys())
        return {"": torch.tensor(int(file.metadata()["step"])), **{name: file.get_tensor(name) for name in names}}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (3, 0), (1, 1), (2, 1)])
def test_killed_and_continued_equals_uninterrupted_bit_for_bit(tmp_path, accumulate, workers):
    settings = recipe(accumulate=accumulate, workers=workers)
    whole = train(Toy(), settings, tmp_path / "whole")
    for last in (1, 3, 5):
        with pytest.raises(Killed):
            train(Toy(), settings, tmp_path / "parts", killed_at(last))
    parts = train(Toy(), settings, tmp_path / "parts")
    assert_equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert {**whole, "steps_per_s": 0} == {**parts, "steps_per_s": 0}
    names = set(checkpoint(tmp_path / "whole"))
    assert {"weight/head.bias", "exp_avg/head.bias", "exp_avg_sq/head.bias", "step/head.bias"} <= names


def test_a_step_done_twice_is_recorded_once_and_equal(tmp_path):
    with pytest.raises(Killed):
        train(Toy(), recipe(), tmp_path, killed_at(5))
    before = read_jsonl(tmp_path / METRICS)
    train(Toy(), recipe(), tmp_path)
    records = read_jsonl(tmp_path / METRICS)
    assert [record["step"] for record in before] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {**records[4], "steps_per_s": 0} == {**before[4], "steps_per_s": 0}


def test_a_finished_run_does_nothing_again_and_gives_its_last_figures(tmp_path):
    once = train(Toy(), recipe(), tmp_path)
    before = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    assert train(Toy(), recipe(), tmp_path) == once
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == before


def test_dropout_follows_from_the_step_and_not_from_what_ran_before(tmp_path):
    train(Toy(), recipe(), tmp_path / "one")
    torch.rand(17)
    train(Toy(), recipe(evaluate_every=1), tmp_path / "two")
    train(Toy(), recipe(seed=1), tmp_path / "other")
    assert_equal(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))
    other = checkpoint(tmp_path / "other")
    assert not torch.equal(checkpoint(tmp_path / "one")["weight/head.bias"], other["weight/head.bias"])


def test_a_folder_with_another_run_is_refused_with_what_differs(tmp_path):
    train(Toy(), recipe(), tmp_path)
    with pytest.raises(KokaneeError, match=r"learning_rate: 0\.05 before, 0\.1 now.*another folder"):
        train(Toy(), recipe(learning_rate=0.1), tmp_path)


def test_a_run_from_another_start_is_refused(tmp_path):
    train(Toy(), recipe(), tmp_path, start={"weights": "a"})
    train(Toy(), recipe(), tmp_path, start={"weights": "a"})
    with pytest.raises(KokaneeError, match=r"another start \(other weights than before\)"):
        train(Toy(), recipe(), tmp_path, start={"weights": "b"})


def test_a_folder_in_which_nothing_was_done_takes_other_settings(tmp_path):
    claim(tmp_path / "new", recipe())
    claim(tmp_path / "new", recipe(learning_rate=0.1))
    assert json.loads((tmp_path / "new" / "state.json").read_text())["recipe"]["learning_rate"] == 0.1


def test_a_gpu_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(KokaneeError, match="device: cuda, but there is no GPU"):
        train(Toy(), recipe(device="cuda"), tmp_path)


def test_names_that_are_no_text_are_settings_as_well(tmp_path):
    for _ in range(2):
        claim(tmp_path, recipe(model=os.fsdecode(b"caf\xe9")), {"weights": "a"}, begun=("state.json",))
    with pytest.raises(KokaneeError, match="model: "):
        claim(tmp_path, recipe(model="cafe"), {"weights": "a"}, begun=("state.json",))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(KokaneeError, match=r"holds other files.*holiday"):
        claim(tmp_path, recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    train(Toy(), recipe(), tmp_path)
    objective = Toy()
    objective.head = nn.Linear(5, 2)
    with pytest.raises(KokaneeError, match=r"other weights.*head\.bias, head\.weight"):
        train(objective, recipe(), tmp_path)


def test_only_named_parts_and_the_head_change(tmp_path):
    objective, before = Toy(), Toy().state_dict()
    train(objective, recipe(train=("first",)), tmp_path)
    changed = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.first.weight", "model.first.bias", "head.weight", "head.bias"}
    trained = {name.split("/")[1] for name in checkpoint(tmp_path) if name}
    assert trained == changed


def test_parts_are_whole_names_of_modules_or_parameters():
    assert set(choose(Toy(), ("second.deep.bias",))) == {"model.second.deep.bias", "head.weight", "head.bias"}
    for part in ("fir", "third", "second.shallow"):
        with pytest.raises(KokaneeError, match=f"no part '{part}'.*first, firstborn, second"):
            choose(Toy(), (part,))


def test_training_nothing_is_refused():
    objective = Toy()
    del objective.head
    with pytest.raises(KokaneeError, match="trains nothing"):
        choose(objective, ())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_number_that_is_not_finite_stops_before_the_weights_change(tmp_path, where, accumulate):
    objective, weights = Toy(spoil=(where, 3 * accumulate)), {}

    def report(step: int, figures: dict[str, float]) -> None:
        weights.update({name: value.clone() for name, value in objective.state_dict().items()})

    samples = [number * 100 + k for number in range(3 * accumulate, 4 * accumulate) for k in range(3)]
    with pytest.raises(KokaneeError) as error:
        train(objective, recipe(accumulate=accumulate), tmp_path, report)
    assert "Step 4:" in str(error.value) and f"samples {', '.join(map(str, samples))}." in str(error.value)
    assert_equal(objective.state_dict(), weights)
    assert int(checkpoint(tmp_path)[""]) == 2


def test_the_tracker_is_closed_when_a_run_is_stopped(tmp_path, monkeypatch):
    closed = []
    finish = TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: (closed.append(self), finish(self)))
    with pytest.raises(Killed):
        train(Toy(), recipe(), tmp_path, killed_at(2))
    assert len(closed) == 1
    assert b"learning_rate" in next((tmp_path / "tensorboard").iterdir()).read_bytes()


def test_the_learning_rate_rises_in_a_line_and_falls_as_named():
    cosine = recipe(steps=14, warmup=4, learning_rate=1.0, final_share=0.2)
    assert [learning_rate(cosine, step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate(cosine, 9) == pytest.approx(0.6)
    assert learning_rate(cosine, 14) == pytest.approx(0.2)
    linear = cosine.model_copy(update={"schedule": "linear"})
    assert [learning_rate(linear, step) for step in (4, 9, 14)] == pytest.approx([1.0, 0.6, 0.2])
    constant = cosine.model_copy(update={"schedule": "constant", "warmup": 0})
    assert {learning_rate(constant, step) for step in range(15)} == {1.0}


def test_every_step_uses_its_own_learning_rate(tmp_path):
    train(Toy(), recipe(), tmp_path)
    rates = [record["learning_rate"] for record in read_jsonl(tmp_path / METRICS)]
    assert rates == [learning_rate(recipe(), step) for step in range(6)]


def test_processes_share_all_batches_and_a_run_continues_with_the_next():
    settings = recipe(accumulate=2, processes=3)

    def numbers(first_step: int, rank: int) -> list[int]:
        return [int(batch["number"]) for batch in Batches(Toy(), settings, first_step, rank, 3)]

    everything = [numbers(0, rank) for rank in range(3)]
    assert sorted(sum(everything, [])) == list(range(6 * 2 * 3))
    assert all(numbers(4, rank) == everything[rank][4 * 2 :] for rank in range(3))


def test_a_figure_is_averaged_over_the_batches_that_define_it(tmp_path):
    assert means([{"a": 1.0}, {"a": 3.0, "b": 5.0}, {}]) == {"a": 2.0, "b": 5.0}
    objective = Toy()
    figures = train(objective, recipe(), tmp_path)
    inputs = [objective.batch("validation", number, 3)["inputs"].mean() for number in range(5)]
    assert figures["validation/mean"] == pytest.approx(float(sum(inputs) / 5))
    assert figures["validation/even"] == pytest.approx(float((inputs[0] + inputs[2] + inputs[4]) / 3))


def test_another_number_of_processes_than_the_recipe_says_is_refused(tmp_path):
    with pytest.raises(KokaneeError, match=r"processes: 2, but 1 run.*nproc-per-node 2"):
        train(Toy(), recipe(processes=2), tmp_path)


def test_two_processes_do_what_one_does_with_twice_the_batches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom test_train import Toy, recipe, train\n"
        "from kokanee.launch import as_worker\n"
        "with as_worker():\n    train(Toy(dropout=0.0), recipe(processes=2), Path(sys.argv[1]))\n"
    )
    run_together(script, str(tmp_path / "two"))
    train(Toy(dropout=0.0), recipe(accumulate=2), tmp_path / "one")
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert set(one) == set(two)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    records = [read_jsonl(tmp_path / name / METRICS)[-1] for name in ("one", "two")]
    for name in ("validation/loss", "validation/mean", "validation/even", "gradient"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-4)
