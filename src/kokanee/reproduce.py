"""`kokanee reproduce nano`: the whole method from a seed, as steps that can be stopped and continued.

The steps are the recipes of `recipes/nano/` with this seed and these folders, and controls; what is run stands in
`OUT/recipes/`, so that each step can be repeated by hand, in `OUT`. `OUT/results.json` and `OUT/report.html` come last.
"""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

import kokanee
from kokanee.checkpoints import identify, locate
from kokanee.conversations import Mix
from kokanee.errors import KokaneeError
from kokanee.formats import alone_in, differences, read_json, refuse_foreign, write_json, write_text
from kokanee.mrdpo_recipe import MrdpoRecipe
from kokanee.rebirth import RebirthRecipe
from kokanee.recipes import Recipe, checked, read_yaml
from kokanee.reproduce_report import page
from kokanee.results import MARKED, results
from kokanee.stages import Sizes
from kokanee.steps import Report, Step, is_done, minutes_left, run_steps

VERSION = 1
FREE = ("device", "processes", "without", "changed")
"""Settings that may change meanwhile, or that stand in the recipes."""
CONTROLS = {
    "continued": "supervised fine-tuning continued",
    "dpo": "one round of plain DPO",
    "ce": "rounds of cross-entropy alone",
}
MINUTES: dict[str, tuple[float, float]] = {
    "1-see": (22, 15),
    "2-hear": (3, 0.4),
    "features": (5, 1.4),
    "3-base": (11, 1.8),
    "4-align": (1, 0.3),
    "5-sft": (77, 4.3),
    "6-mrdpo": (45, 4.4),
    "gdpo": (0.2, 0.4),
    "7-rebirth": (20, 9.5),
    "continued": (18, 7.7),
    "dpo": (8, 1.0),
    "ce": (22, 2.0),
    "exam": (1, 0.2),
    "marks": (13, 2.3),
}
"""About what each step and control takes on two cores, and on an H100 (projected; `benchmarks/README.md`)."""
STATE, RESULTS, PAGE, RECIPES = "state.json", "results.json", "report.html", "recipes"
FIGURES = "metrics.json"  # of a control that is done
SFT = "5-sft/model"
PRETRAINING = ("1-see", "2-hear", "3-base", "4-align", "5-sft")
CLIPS, VALIDATION_CLIPS, EXAM_CLIPS, EXAM_SEED = 14_000, 500, 500, 7
SHARE_CUT, VALIDATION_SHARE_CUT = 0.4, 0.3
THREADS = 1  # of each process: nano's matrices are too small to share
SEEDS_APART = 100  # from one seed's stages to the next one's
GPU_WORKERS, GPU_CAPTION_BATCH, GPU_FEATURE_PROCESSES, GPU_EXAMS = 6, 256, 8, 4

QUICK: dict[str, dict[str, Any]] = {
    "1-see": {"steps": 12, "evaluate_batches": 1, "warmup": 2},
    "2-hear": {"steps": 6, "evaluate_batches": 1, "warmup": 2},
    "3-base": {"steps": 8, "evaluate_batches": 1, "warmup": 2},
    "4-align": {"steps": 3, "evaluate_batches": 1, "warmup": 1},
    "5-sft": {"steps": 40, "evaluate_batches": 1, "warmup": 5, "learning_rate": 0.004, "data.questions": 0},
    "6-mrdpo": {
        "rounds": 2,
        "steps": 3,
        "clips": 48,
        "samples": 2,
        "max_new_tokens": 24,
        "evaluate_batches": 1,
        "validation_clips": 8,
        "warmup": 1,
        "qa_from_round": 2,
        "pairs": {"min_gap": 0.0, "max_pairs": 1},
    },
    "7-rebirth": {
        "steps": 3,
        "max_new_tokens": 24,
        "evaluate_batches": 1,
        "validation_clips": 8,
        "warmup": 1,
        "keep": {"cut_off": True},
    },
}
"""What is smaller in a quick run, in which everything is done and hardly anything is learnt."""
QUICK_BATCH, QUICK_CLIPS, QUICK_EXAM_CLIPS, QUICK_TOGETHER, QUICK_MINUTES = 8, 64, 2, 2, 0.25


@dataclass(frozen=True)
class Settings:
    """What is reproduced. start: the supervised model to begin with, in place of pretraining. processes: that share the
    training of each step. device: "cpu" or "cuda". changed: settings of single recipes, by step. without: controls that
    are left out."""

    model: str = "nano"
    seed: int = 0
    quick: bool = False
    start: str | None = None
    device: str = "cpu"
    processes: int = 2
    changed: tuple[tuple[str, str, Any], ...] = ()
    without: tuple[str, ...] = ()


def reproduce(settings: Settings, out: Path, report: Report, beside: Sequence[Path] = ()) -> bool:
    """All steps that are not done yet, then `results.json` and `report.html`; whether anything was left to do.

    `beside`: folders of finished reproductions with other seeds, which the report is about as well. Raises
    `KokaneeError` where the folder holds a reproduction with other settings, saying which, where a recipe is wrong, and
    where a step fails.
    """
    recipes, changed, others = checked_settings(settings, out, beside)
    with alone_in(out):
        claim(out, settings, recipes)
        for name, recipe in recipes.items():
            if not begun(out, name) or not (out / RECIPES / f"{name}.yaml").is_file():
                text = yaml.safe_dump(sized_for(settings, recipe), sort_keys=False)
                write_text(out / RECIPES / f"{name}.yaml", text)
        steps = steps_of(settings)
        if not all(is_done(step, out) for step in steps):
            (out / RESULTS).unlink(missing_ok=True)  # whatever stops this call, the next one makes them of all steps
        done = run_steps(steps, out, THREADS, partial(device_name, settings, out), report)
        there = (out / RESULTS).is_file()
        if done or not there:
            made = {"changed": changed, "without": list(settings.without)}
            write_json(out / RESULTS, results(asdict(settings), out, steps) | made)
        if done or not there or others or not (out / PAGE).is_file():
            write_text(out / PAGE, page([*others, read_json(out / RESULTS)]))
        return done > 0 or not there


def checked_settings(
    settings: Settings, out: Path, beside: Sequence[Path] = ()
) -> tuple[dict[str, dict[str, Any]], list[str], list[dict[str, Any]]]:
    """The recipes, what they change in the shipped ones, and the results that the report is about as well. Raises
    `KokaneeError` for what is wrong with them, before anything is begun."""
    recipes = recipes_of(settings)
    changed = differences(recipes_of(replace(settings, changed=())), recipes)
    others = [comparable(read_results(folder), settings, changed, folder) for folder in beside]
    check_recipes(settings, recipes)
    check_claim(out, settings, recipes)
    if settings.start is not None:
        identify(locate(settings.start))
    return recipes, changed, others


def begun(out: Path, step: str) -> bool:
    """Whether a step has begun, so that its recipe stays as it is."""
    return (out / step).exists() or (step == "model" and (out / "1-see").exists())


def check_recipes(settings: Settings, recipes: dict[str, dict[str, Any]]) -> None:
    """Raise `KokaneeError` that names each wrong setting, before anything is begun."""
    kinds = {"model": Sizes, "6-mrdpo": MrdpoRecipe, "7-rebirth": RebirthRecipe}
    kinds |= {"dpo": MrdpoRecipe, "ce": MrdpoRecipe, "continued": RebirthRecipe}
    for name, recipe in recipes.items():
        made = checked(kinds.get(name, Recipe), sized_for(settings, recipe), name)
        if isinstance(made, Recipe) and made.stage == "conversations":
            checked(Mix, made.data, f"{name}, data")


def device_name(settings: Settings, out: Path, step: Step) -> str:
    """What a step is computed on: training as its recipe says, which may have been begun on another device."""

    def on_gpu(words: Sequence[str]) -> bool:
        return read_yaml(out / words[1]).get("device") != "cpu" if words[0] == "train" else "cuda" in words

    if settings.device != "cuda" or not any(map(on_gpu, step.commands)):
        return f"{os.cpu_count()} cores, {platform.machine()}"
    import torch

    return torch.cuda.get_device_name()


def comparable(found: dict[str, Any], settings: Settings, changed: list[str], folder: Path) -> dict[str, Any]:
    """Results that can be in one report with those of these settings. Raises `KokaneeError` where they cannot."""
    if found["seed"] == settings.seed or found["quick"] != settings.quick or found["changed"] != changed:
        raise KokaneeError(
            f"{folder} has the same seed or other settings than this reproduction. Give folders with other seeds alone."
        )
    return found


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a finished reproduction."""
    if not (folder / RESULTS).is_file():
        raise KokaneeError(f"{folder} holds no finished reproduction. Give folders of finished ones.")
    return read_json(folder / RESULTS)


def claim(out: Path, settings: Settings, recipes: dict[str, dict[str, Any]]) -> None:
    """Make the folder this reproduction's; see `check_claim`. Steps that have begun keep their recipes."""
    before = check_claim(out, settings, recipes)
    kept = before["recipes"] | recipes if before else recipes
    write_json(out / STATE, {"version": VERSION, "settings": chosen(settings), "recipes": kept})


def chosen(settings: Settings) -> dict[str, Any]:
    """What may not change meanwhile, by the names of the options."""
    found = {name: value for name, value in to_jsonable_python(settings).items() if name not in FREE}
    return {"from" if name == "start" else name: value for name, value in found.items()}


def check_claim(out: Path, settings: Settings, recipes: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What stands in the folder's state, if there is one. Raises `KokaneeError` where it holds something else, or a
    reproduction with other settings, saying which. It may go on with other processes or on another device, without a
    control that is not done or with one, and steps that have not begun may have other recipes."""
    if out.exists() and not out.is_dir():
        raise KokaneeError(f"{out} is a file. Give a folder (--out).")
    refuse_foreign(out, STATE)
    if not (out / STATE).is_file():
        return None
    before = read_json(out / STATE)
    old = {name: recipe for name, recipe in before["recipes"].items() if begun(out, name)}
    now = {name: recipes.get(name, recipe) for name, recipe in old.items()}
    was = {"from" if name == "start" else name: value for name, value in before["settings"].items()}
    differing = differences(was, chosen(settings)) or differences(old, now)
    if differing:
        raise KokaneeError(
            f"{out} holds a reproduction with other settings ({'; '.join(differing)}). Continue with the old ones, "
            "or choose another folder."
        )
    done = [name for name in settings.without if (out / name / FIGURES).is_file()]
    if done:
        raise KokaneeError(
            f"{out} has the control {done[0]} already, and its report tells of it. Leave --without {done[0]} away, or "
            "choose another folder."
        )
    return before


def shipped_recipes() -> Path:
    """The folder of nano's recipes: inside the installed package, or beside the sources."""
    package = Path(kokanee.__file__).parent
    places = [package / "nano" / "recipes", package.parents[1] / "recipes" / "nano"]
    found = next((place for place in places if (place / "model.yaml").is_file()), None)
    if found is None:
        raise KokaneeError(f"The recipes are not in {places[0]}. Install the package again.")
    return found


def recipes_of(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings of each training step and control, and of the fresh model's sizes; what other steps leave is named
    by where it is in the folder of the reproduction."""
    if settings.model != "nano":
        raise KokaneeError(f"There is no reproduction of {settings.model!r}. Give nano.")
    found = {path.stem: read_yaml(path) for path in sorted(shipped_recipes().glob("*.yaml"))}
    models = dict(zip(("2-hear", "3-base", "4-align", "5-sft"), PRETRAINING, strict=False))
    for name, recipe in found.items():
        recipe["seed"] = recipe.get("seed", 0) + SEEDS_APART * settings.seed
        if name == "model":
            continue
        recipe["model"] = f"{models[name]}/model" if name in models else settings.start or SFT
        for part in ("train", "validation") if "data" in recipe else ():
            features = f"features/{part}"
            if isinstance(recipe["data"][part], dict):
                recipe["data"][part] = {"features": features, "seed": settings.seed}
            else:
                recipe["data"] |= {part: features, "seed": settings.seed}
        for key, value in QUICK[name].items() if settings.quick else ():
            change(found, name, key, copy.deepcopy(value))
    found["1-see"]["model"] = f"{RECIPES}/model.yaml"
    found["7-rebirth"]["teacher"] = "6-mrdpo/model"
    for step, key, value in settings.changed:
        if step not in CONTROLS:
            change(found, step, key, value)
    found["dpo"] = copy.deepcopy(found["6-mrdpo"]) | {"loss": "dpo", "rounds": 1}
    found["ce"] = copy.deepcopy(found["6-mrdpo"]) | {"loss": "ce"}
    found["continued"] = copy.deepcopy(found["7-rebirth"]) | {"teacher": None}
    for step, key, value in settings.changed:
        if step in CONTROLS:
            change(found, step, key, value)
    left_out = (*PRETRAINING, "model", *settings.without) if settings.start else settings.without
    return {name: recipe for name, recipe in found.items() if name not in left_out}


def sized_for(settings: Settings, recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe for this device and so many processes, with the same number of clips in a step, and held out. Fewer
    processes than the recipe has make its batches one after the other; more make smaller ones, which are other batches.
    """
    if "stage" not in recipe:
        return recipe
    all_at_once = QUICK_BATCH if settings.quick else recipe["batch_size"] * recipe["processes"]
    batches = settings.processes if settings.quick else max(settings.processes, recipe["processes"])
    if all_at_once % batches or batches % settings.processes:
        raise KokaneeError(f"{all_at_once} clips cannot be shared by {settings.processes} processes. Give 1, 2 or 4.")
    batch_size = all_at_once // batches
    held_out = recipe["evaluate_batches"] * (batch_size if settings.quick else recipe["batch_size"])
    sizes = {"processes": settings.processes, "batch_size": batch_size, "accumulate": batches // settings.processes}
    sizes["evaluate_batches"] = max(1, held_out // batch_size)
    if settings.device == "cuda":
        sizes |= {"device": "auto", "workers": min(GPU_WORKERS, max(0, (os.cpu_count() or 1) - 2))}
        sizes |= {"caption_batch": GPU_CAPTION_BATCH} if "caption_batch" in recipe else {}
    return recipe | sizes


def change(recipes: dict[str, dict[str, Any]], step: str, key: str, value: Any) -> None:
    """Replace a setting of a step's recipe; `key` may be a path such as pairs.min_gap."""
    if step not in recipes:
        raise KokaneeError(f"There is no step {step!r} with a recipe. Give one of {', '.join(recipes)}.")
    *path, last = key.split(".")
    place = recipes[step]
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise KokaneeError(f"{step}.{key}: {part!r} is a single value. Give a setting of the recipe {step}.yaml.")
    place[last] = value


def steps_of(settings: Settings) -> list[Step]:
    """The steps in order, with about how long each takes; paths are inside the reproduction's folder."""
    encoders, sft = settings.start or "2-hear/model", settings.start or SFT
    clips, validation, exam = CLIPS, VALIDATION_CLIPS, EXAM_CLIPS
    if settings.quick:
        clips, validation, exam = QUICK_CLIPS, QUICK_CLIPS // 4, QUICK_EXAM_CLIPS

    def command(name: str) -> tuple[str, ...]:
        return ("train", f"{RECIPES}/{name}.yaml", "--out", name)

    def minutes(*names: str) -> float:
        return sum(MINUTES[name][settings.device == "cuda"] for name in names)

    def training(name: str, title: str) -> Step:
        return Step(name, title, (command(name),), minutes(name))

    def store(part: str, count: int, share_cut: float) -> tuple[str, ...]:
        words = ["world", "features", encoders, f"features/{part}", "--split", part, "--clips", str(count)]
        return (*words, "--share-cut", str(share_cut), "--seed", str(settings.seed), "--processes", str(shares))

    shares = min(GPU_FEATURE_PROCESSES, os.cpu_count() or 1) if settings.device == "cuda" else settings.processes
    if settings.quick:
        shares = 1
    features = (store("train", clips, SHARE_CUT), store("validation", validation, VALIDATION_SHARE_CUT))
    first_round = ("convert", "6-mrdpo/round-01/adapter", "gdpo", "--base", sft, "--overwrite")
    made = ("world", "make", "exam", "--clips", str(exam), "--seed", str(EXAM_SEED), "--split", "test")
    marks = marks_of(settings, sft)
    together = GPU_EXAMS if settings.device == "cuda" else QUICK_TOGETHER if settings.quick else settings.processes
    controls = [name for name in CONTROLS if name not in settings.without]
    written = tuple(f"{name}/{FIGURES}" for name in controls)
    runs = tuple(map(command, controls)), minutes(*controls), QUICK_TOGETHER if settings.quick else 1, written
    steps = [
        training("1-see", "Encoder pretraining: sight"),
        training("2-hear", "Encoder pretraining: hearing"),
        Step("features", "Features of the world's clips", features, minutes("features")),
        training("3-base", "Visual language model"),
        training("4-align", "Audio alignment"),
        training("5-sft", "Audio-visual supervised fine-tuning"),
        training("6-mrdpo", "Rounds of mrDPO"),
        Step("gdpo", "The model of the first round", (first_round,), minutes("gdpo")),
        training("7-rebirth", "Rebirth tuning"),
        *([Step("controls", "Controls: " + ", ".join(CONTROLS[name] for name in controls), *runs)] if controls else []),
        Step("exam", "Clips to be measured by", (made,), minutes("exam")),
        Step("marks", "Marks of all stages", tuple(marks.values()), minutes("marks"), together, tuple(marks)),
    ]
    steps = [step for step in steps if not (settings.start and step.name in PRETRAINING)]
    return [replace(step, minutes=QUICK_MINUTES) for step in steps] if settings.quick else steps


def marks_of(settings: Settings, sft: str) -> dict[str, tuple[str, ...]]:
    """The commands that measure the model of each stage, by the files that they write."""
    places = {"base": "4-align/model", "sft": sft, "gdpo": "gdpo"}
    places |= {name: f"{step}/model" for name, step in MARKED.items()}
    left_out = (*(["base"] if settings.start else []), *settings.without)
    how = ("--full", "--seed", "1", "--device", settings.device)
    return {
        f"marks/{name}.json": ("world", "exam", "exam", "--model", model, *how, "--out", f"marks/{name}.json")
        for name, model in places.items()
        if name not in left_out
    }


def left(settings: Settings, out: Path) -> float:
    """About how many minutes a reproduction in `out` would take yet."""
    steps = steps_of(settings)
    return minutes_left(steps, out)
