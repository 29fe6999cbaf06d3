"""`kokanee train` and `kokanee world`: recipes, and the synthetic world that nano learns from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from kokanee.console import bar, key_value, said_when_stopped, say
from kokanee.errors import KokaneeError
from kokanee.launch import as_worker, check_devices, is_main, is_worker, launch

world = typer.Typer(help="The synthetic audio-visual world.", no_args_is_help=True)
SHOWN = 3
EXAM_EVERY_S = 4.0
MRDPO, REBIRTH = "mrdpo", "rebirth"
SFT = "sft"  # what rebirth is without a teacher
FIGURES = ("loss", "margin", "accuracy")
Out = Annotated[Path, typer.Option(help="Folder of the run; a stopped run goes on there.")]


class Split(StrEnum):
    train = "train"
    validation = "validation"
    test = "test"


def train(
    recipe: Annotated[
        list[Path],
        typer.Argument(help="YAML file of a stage, as under recipes/; before it may stand its stage's name, or sft."),
    ],
    out: Out,
    rounds: Annotated[int | None, typer.Option(min=1, help="mrdpo: rounds, 6 in the paper.")] = None,
    steps_per_round: Annotated[
        int | None, typer.Option(min=1, help="mrdpo: steps of each, 1,000 in the paper.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting, such as steps=100 or data.exact=0.5."),
    ] = None,
) -> None:
    """Train one stage of a recipe, such as `kokanee train mrdpo recipe.yaml`; the model is left in OUT/model.

    `sft`, supervised fine-tuning on captions that are there, is the stage rebirth without a teacher.
    """
    path, sets = recipe[-1], list(set_ or [])
    if str(path) in (MRDPO, REBIRTH, SFT) and not path.exists():
        raise typer.BadParameter(f"which recipe of the stage {str(path)!r}?", param_hint="[STAGE] RECIPE")
    settings = read_settings(path, sets)
    stage = stage_of(settings, path)
    named = [str(word) for word in recipe[:-1]]
    if named == [SFT] and stage == REBIRTH:
        if settings.get("teacher") is not None:
            raise typer.BadParameter(
                f"{path} has a teacher, whose captions {REBIRTH} learns; {SFT} learns those of the data. "
                f"Add --set teacher=null, or call it {REBIRTH}",
                param_hint="[STAGE] RECIPE",
            )
    elif named not in ([], [stage]):
        unknown = "" if len(named) == 1 and named[0] in (MRDPO, SFT, *stages()) else f"{' '.join(named)} is no stage; "
        raise typer.BadParameter(f"{unknown}{path} is a recipe of the stage {stage!r}", param_hint="[STAGE] RECIPE")
    for name, value in (("rounds", rounds), ("steps", steps_per_round)):
        if value is not None and stage != MRDPO:
            raise typer.BadParameter(f"only {MRDPO} has rounds, and {path} is a recipe of the stage {stage!r}")
        if value is not None:
            settings[name] = value
            sets.append(f"{name}={value}")
    works = {MRDPO: train_rounds, REBIRTH: train_rebirth}
    with said_when_stopped(f"{out}: the same command again goes on from the last checkpoint (save_every)."):
        works.get(stage, train_stage)(
            settings,
            f"{path} with {', '.join(sets)}" if sets else str(path),
            out,
            ["train", str(path), "--out", str(out), *(word for item in sets for word in ("--set", item))],
        )


def pairs(
    source: Annotated[Path, typer.Argument(help="Pairs of a run (pairs.jsonl), or a published example_dpo.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON lines to write.")],
    trl: Annotated[bool, typer.Option("--trl", help="As preference data of TRL: prompt, chosen, rejected.")] = False,
) -> None:
    """Preference pairs in one form, whatever form they come in."""
    from kokanee.formats import check_writable, write_jsonl
    from kokanee.pairs import read_pairs

    check_writable(out)
    if out.exists():
        raise KokaneeError(f"{out} is there already. Choose another name for the pairs.")
    found = read_pairs(source)
    write_jsonl(out, [pair.as_trl() if trl else pair.as_record() for pair in found])
    say(f"{len(found)} pairs: {out}")


def stage_of(settings: dict[str, Any], path: Path) -> str:
    """The stage that a recipe is of. Raises `KokaneeError` where there is none of this name."""
    stage = settings.get("stage")
    if stage not in stages():
        there = f"there is no stage {stage!r}" if "stage" in settings else "it names no stage"
        raise KokaneeError(f"{path}: {there}. Give one of {', '.join(stages())}.")
    return str(stage)


def stages() -> tuple[str, ...]:
    """All stages, as recipes name them."""
    from kokanee.recipes import Stage

    return (*get_args(Stage), MRDPO, REBIRTH)


def shared(processes: int, settings: dict[str, Any], command: Sequence[str]) -> int:
    """Run a recipe's command as several processes; the exit code."""
    if settings.get("device") != "cpu":
        check_devices(processes)
    return launch(processes, command)


def train_stage(settings: dict[str, Any], source: str, out: Path, command: Sequence[str]) -> None:
    """One stage with one loop. source: where the settings are from; command: what another process is started with."""
    from kokanee.recipes import Recipe, checked

    recipe = checked(Recipe, settings, source)
    if recipe.processes > 1 and not is_worker():
        raise typer.Exit(shared(recipe.processes, settings, command))
    from kokanee.stages import run_stage

    with as_worker():
        with stage_progress(recipe.steps) as report:
            figures = run_stage(recipe, out, report)
        if is_main():
            typer.echo(json.dumps({"model": (out / "model").as_posix(), "steps": recipe.steps, "figures": figures}))


def train_rounds(settings: dict[str, Any], source: str, out: Path, command: Sequence[str]) -> None:
    """Rounds of mrDPO; a table of them, and their report in OUT/report.html."""
    from kokanee.recipes import checked

    processes = settings.get("processes", 1)
    if isinstance(processes, int) and processes > 1 and not is_worker():
        raise typer.Exit(shared(processes, settings, command))
    from kokanee.mrdpo import run_mrdpo, table
    from kokanee.mrdpo_recipe import MrdpoRecipe
    from kokanee.mrdpo_report import best

    with as_worker():
        recipe = checked(MrdpoRecipe, settings, source)
        with rounds_progress() as report:
            found = run_mrdpo(recipe, out, report)
        if is_main():
            say(f"{found[-1]['clips']} validation clips, per cent of their events")
            typer.echo("\n".join(table(found)))
            kept = best(found) if recipe.keep == "best" else len(found) - 1
            say(f"model (of round {kept}): {out / 'model'}; what happened: {out / 'report.html'}")


def train_rebirth(settings: dict[str, Any], source: str, out: Path, command: Sequence[str]) -> None:
    """Rebirth tuning; a table of the student before and after, where the recipe says by which clips."""
    from kokanee.recipes import checked

    processes = settings.get("processes", 1)
    if isinstance(processes, int) and processes > 1 and not is_worker():
        raise typer.Exit(shared(processes, settings, command))
    from kokanee.rebirth import RebirthRecipe, kept_line, run_rebirth, table

    with as_worker():
        recipe = checked(RebirthRecipe, settings, source)
        with rounds_progress() as report:
            made = run_rebirth(recipe, out, report)
        if is_main():
            say(kept_line(made))
            if "after" in made:
                say(f"{made['after']['clips']} validation clips, per cent of their events")
                typer.echo("\n".join(table(made)))
            say(f"model: {out / 'model'}")


def read_settings(recipe: Path, replaced: Sequence[str]) -> dict[str, Any]:
    """What the recipe says, with settings `KEY=VALUE` replaced; values are YAML, KEY may be a path like data.exact."""
    from kokanee.recipes import read_yaml

    settings = read_yaml(recipe)
    for item in replaced:
        name, value = key_value(item)
        *path, key = name.split(".")
        place = settings
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise KokaneeError(f"--set {item}: '{part}' is a single value in {recipe}, and has no '{key}' inside.")
        place[key] = value
    return settings


@contextmanager
def rounds_progress() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """A bar on standard error for each piece of a round's work, from when there is any; evaluations are lines."""
    with ExitStack() as stack:
        progress = bar("{task.fields[figures]}", hidden=not is_main())
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            if not tasks:
                stack.enter_context(progress)
            if what not in tasks:
                for task in tasks.values():
                    progress.stop_task(task)
                tasks[what] = progress.add_task(what, total=total, figures="")
            shown = " ".join(f"{name} {figures[name]:.3g}" for name in FIGURES if name in figures)
            progress.update(tasks[what], completed=done, total=total, figures=shown)
            tell_evaluation(progress, f"{what}, step {done}", figures)

        yield report


@contextmanager
def stage_progress(steps: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A bar on standard error for the steps of a stage, with the latest figures; evaluations are lines that stay."""
    with bar("{task.fields[figures]}", hidden=not is_main()) as progress:
        task = progress.add_task("train", total=steps, figures="")

        def report(step: int, figures: dict[str, float]) -> None:
            told = {name: value for name, value in figures.items() if "/" not in name}
            shown = " ".join(f"{name} {value:.4g}" for name, value in list(told.items())[:SHOWN])
            progress.update(task, completed=step, figures=shown)
            tell_evaluation(progress, f"step {step}", figures)

        yield report


def tell_evaluation(progress: Any, where: str, figures: dict[str, float]) -> None:
    """A line with a step's figures on held-out samples, if it has any."""
    checked = {name: value for name, value in figures.items() if "/" in name}
    if checked:
        line = ", ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in checked.items())
        progress.console.print(f"{where}: held out, {line}", highlight=False, markup=False)


@world.command("make")
def make_clips(
    out: Annotated[Path, typer.Argument(help="Folder to write; clips that are there already are kept.")],
    clips: Annotated[int, typer.Option(min=1, help="Number of clips.")],
    seed: Annotated[int, typer.Option(help="Which world.")] = 0,
    split: Annotated[Split, typer.Option(help="Which part of it.")] = Split.train,
) -> None:
    """Write clips of the world as MP4 files, with everything that is true of them in samples.jsonl."""
    from kokanee.world.make import make

    with bar() as progress:
        task = progress.add_task("clips", total=clips)
        samples = make(out, clips, seed, split.value, on_clip=lambda done: progress.update(task, completed=done))
        progress.update(task, completed=clips)
    typer.echo(samples.as_posix())


@world.command("features")
def make_features(
    model: Annotated[str, typer.Argument(help="The model whose encoders look and listen.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; what is there already is kept.")],
    clips: Annotated[int, typer.Option(min=1, help="Number of clips.")],
    split: Annotated[Split, typer.Option(help="Which part of the world.")] = Split.train,
    seed: Annotated[int, typer.Option(help="Which world.")] = 0,
    share_cut: Annotated[float, typer.Option(min=0, max=1, help="Share of clips that are cut to an interval.")] = 0.0,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the work, of one thread each.")] = 1,
) -> None:
    """Compute what the encoders make of clips of the world, for the training of the other parts."""
    if processes > 1 and not is_worker():
        words = (model, out, "--clips", clips, "--split", split.value, "--seed", seed, "--share-cut", share_cut)
        raise typer.Exit(launch(processes, ["world", "features", *map(str, words)]))
    share = (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    from kokanee.checkpoints import load
    from kokanee.features import fill_store

    with as_worker():
        loaded, processor = load(model, dtype="float32")
        with bar(hidden=not is_main()) as progress:
            task = progress.add_task("clips", total=clips)

            def report(done: int, _: int) -> None:
                progress.update(task, completed=done)

            fill_store(loaded, processor, out, split.value, clips, seed, share_cut, share, report)
        if is_main():
            typer.echo(out.as_posix())


@world.command("gates")
def pass_gates(
    run: Annotated[Path, typer.Argument(help="Folder of an encoder's finished run, as `kokanee train --out` left it.")],
    samples: Annotated[int, typer.Option(min=1, help="Pictures or clips of the test split.")] = 2000,
) -> None:
    """How much of what there is an encoder alone names rightly, in per cent of test pictures or sounds."""
    from kokanee.stages import gates

    with bar() as progress:
        task = progress.add_task("samples", total=samples)
        figures = gates(run, samples, report=lambda done, _: progress.update(task, completed=done))
    typer.echo(json.dumps({"run": run.as_posix(), "samples": samples, "figures": figures}))


@world.command("exam")
def take_exam(
    folder: Annotated[Path, typer.Argument(help="Clips that `kokanee world make --split test` wrote.")],
    model: Annotated[str, typer.Option(help="nano, a folder, or a hub name.")] = "nano",
    clips: Annotated[int | None, typer.Option(min=1, help="How many of the clips, by default all.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the captions, by default 0; answers are always greedy.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers, where the temperature is above 0.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Greedy, at temperature 1, and greedy every 4 seconds, in one go.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for all marks and captions.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
) -> None:
    """Caption and question clips whose truth is known, and mark what came out beside what annotators wrote."""
    from kokanee.formats import check_writable, write_json

    if full and temperature is not None:
        raise typer.BadParameter("--full has its own temperatures; leave it out", param_hint="--temperature")
    if out is not None:
        check_writable(out)
        if out.exists():
            raise KokaneeError(f"{out} is there already. Choose another name for the marks.")
    from kokanee.checkpoints import load
    from kokanee.exam import CAPTION_TOKENS, exam
    from kokanee.weights import fingerprint

    loaded, processor = load(model, dtype="float32", device=device)
    with bar() as progress:
        task = progress.add_task("clips", total=clips)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        temperatures = (0.0, 1.0) if full else (temperature or 0.0,)
        every_s = EXAM_EVERY_S if full else None
        marks, captions = exam(
            loaded, processor, folder, clips, temperatures=temperatures, every_s=every_s, seed=seed, report=report
        )
    if out is not None:
        settings = {
            "model": model,
            "weights": fingerprint(loaded),
            "folder": folder.as_posix(),
            "clips": len(captions[0]),
            "temperatures": temperatures,
            "every_s": every_s,
            "top_p": 1.0,
            "seed": seed,
            "max_new_tokens": CAPTION_TOKENS,
        }
        write_json(out, {"settings": settings, "marks": [mark.as_dict() for mark in marks], "captions": captions[1:]})
    typer.echo(f"{len(captions[0])} clips, per cent of their true facts; right answers by kind of question", err=True)
    typer.echo("| | Miss | Incorrect | Hallucinated | Total | sounds told | repetition | words | QA |")
    typer.echo("|---|---|---|---|---|---|---|---|---|")
    for mark in marks:
        rates = mark.rates
        row = (rates.missed, rates.incorrect, rates.hallucinated, rates.total, mark.sounds_told, mark.repetition)
        answers = "" if mark.answers is None else f"{mark.answers:.1f}"
        name = mark.name if mark.name == "annotators" else f"{model}, {mark.name}"
        cells = " | ".join("–" if value is None else f"{value:.1f}" for value in (*row, mark.words))
        typer.echo(f"| {name} | {cells} | {answers} |")
    for kind, value in marks[1].answers_by_kind.items():
        typer.echo(f"{kind}: {value:.1f}", err=True)
