"""mrDPO: rounds in which a captioner learns from its own captions (arXiv 2506.15220, section on mrDPO).

A round takes the model that the last one left as sampler and reference, puts a new adapter (the LoRA proxy) onto it,
samples captions of clips, has them judged, picks pairs, trains the adapter with gDPO, captions validation clips, and
merges the adapter into the model.

A run is a folder that can be killed and continued at any point, and then ends with the same weights, bit for bit on a
CPU: `state.json` (the recipe) and for each round `round-NN/` with samples.jsonl, verdicts.jsonl, pairs.jsonl,
reference.jsonl, train/, training.json, adapter/, validation*.jsonl and, written last, metrics.json. Merged weights are
not kept: they are made again from the base and the adapters.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from kokanee.adapters import load_adapter, merge
from kokanee.adapting import OF_HELD_OUT, adapted, apart, evaluated, fit, keep_adapter
from kokanee.checkpoints import load, save
from kokanee.clips import Task
from kokanee.drafts import candidates, device_of, figures, verdicts
from kokanee.errors import KokaneeError, memory_said
from kokanee.events import word_count
from kokanee.formats import alone_in, read_json, remove_unfinished, write_json, write_jsonl, write_text
from kokanee.launch import is_main
from kokanee.model import Kokanee
from kokanee.mrdpo_recipe import FREE_IN_ROUNDS, MrdpoRecipe
from kokanee.mrdpo_report import best, is_over, run_page
from kokanee.pairs import Pair, dropped, picked
from kokanee.preferences import WITH_PAIRS, Lesson, Preferences, Weights
from kokanee.runs import (
    MEDIA,
    REPLIES,
    Progress,
    Run,
    check_adapted,
    check_apart,
    check_exact,
    check_files,
    check_server,
    clips_of,
    defaults_of,
    model_of,
    start_of,
    tasks_for,
    team_of,
    told,
)
from kokanee.train import CHECKPOINT, LESS, claim, is_begun
from kokanee.weights import cast

VERSION = 1
SAMPLES, VERDICTS, PAIRS, REFERENCE = "samples.jsonl", "verdicts.jsonl", "pairs.jsonl", "reference.jsonl"
TRAIN, TRAINING, ADAPTER, FIGURES = "train", "training.json", "adapter", "metrics.json"
MODEL, REPORT = "model", "report.html"


def run_mrdpo(recipe: MrdpoRecipe, folder: Path, report: Progress) -> list[dict[str, Any]]:
    """All rounds in `folder`, and the model that they leave in `folder/model`; the figures of each round, the first
    being those of the model that it starts from.

    `report(what, done, total, figures)` tells how far each piece of work is. Raises `KokaneeError` where the folder
    holds a run with other settings, where clips, judge or pairs do not suffice, and where a loss is not finite.
    """
    with alone_in(folder) if is_main() else contextlib.nullcontext(), memory_said(LESS):
        return rounds(opened(recipe, folder, report))


@dataclass
class Rounds(Run[MrdpoRecipe]):
    """A run of mrDPO under way; `model` is merged up to the last round."""

    def place(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}"


def opened(recipe: MrdpoRecipe, folder: Path, report: Progress) -> Rounds:
    """The run with its model and clips; the folder is the recipe's from now on."""
    begins = ("round-00", MEDIA)
    begun = is_begun(folder, begins)
    check_server(recipe, begun)
    team = team_of(recipe)
    if recipe.loss in WITH_PAIRS and recipe.samples * len(recipe.temperatures) < 2:
        raise KokaneeError("samples: 1 at one temperature gives no pairs. Give 2 or more samples.")
    sources = (recipe.data.train, recipe.data.validation)
    model, processor = model_of(recipe, recipe.model, sources, device_of(team.state))
    clips = clips_of(recipe, folder, model, processor, sources[0], "train")
    validation = clips_of(recipe, folder, model, processor, sources[1], "validation")
    cast(model, getattr(torch, recipe.dtype))
    run = Rounds(recipe, folder, model.eval(), processor, clips, validation, team, report)
    if recipe.clips > len(clips):
        raise KokaneeError(
            f"clips: {recipe.clips} in a round, but there are {len(clips)}. Lower it, or give more clips."
        )
    check_enough(recipe.clips, recipe)
    check_done(recipe, folder)
    if not begun:
        check_files(recipe, sources[0], "train", clips)
        check_files(recipe, sources[1], "validation", validation)
        check_apart(clips, validation)
    check_exact(recipe, (clips, validation))
    check_adapted(recipe, model)
    start = start_of(model, processor, {"train": clips, "validation": validation})
    claim(folder, recipe, start, begun=begins, free=FREE_IN_ROUNDS, brought=(REPLIES,))
    team.wait()  # nobody is writing the state any more
    if team.is_main:
        remove_unfinished(folder)  # only now: the folder is the run's
    team.wait()  # before anybody writes
    return run


def check_done(recipe: MrdpoRecipe, folder: Path) -> None:
    """Raise `KokaneeError` where a run has ended with more rounds than are wanted: their model would be lost."""
    found = read_json(folder / FIGURES)["rounds"] if (folder / FIGURES).is_file() else []
    done = len(found) - 1
    if done > recipe.rounds or any(is_over(found[:number], recipe.patience) for number in range(1, done + 1)):
        raise KokaneeError(
            f"{folder} has {done} rounds already, and its model is of them. Give rounds: {done} or more and as much "
            "patience as they took; kokanee convert makes the model of an earlier round of the adapters up to it."
        )


def check_enough(n_lessons: int, recipe: MrdpoRecipe, number: int = 0, lost: dict[str, int] | None = None) -> None:
    """Raise `KokaneeError` where round `number` (0: any, before the first) has too few lessons for one step and for its
    check; lost: why clips gave no pair."""
    wanted = recipe.n_held_out + recipe.batch_size * recipe.processes * recipe.accumulate
    if n_lessons >= wanted:
        return
    why = f" ({', '.join(f'{count}: {reason}' for reason, count in lost.items())})" if lost else ""
    another = "in another folder with more clips, more samples, a lower pairs.min_gap or smaller batches"
    first = {0: "Give more clips or smaller batches", 1: f"Begin {another}"}
    remedy = first.get(number, f"Let the run end here with --rounds {number - 1}, or begin {another}")
    raise KokaneeError(
        f"A round learns from {n_lessons} clips here{why}, but takes {wanted}: {wanted - recipe.n_held_out} for one "
        f"step and {recipe.n_held_out} to check by (evaluate_batches x batch_size). {remedy}."
    )


def rounds(run: Rounds) -> list[dict[str, Any]]:
    """What `run_mrdpo` does in its folder."""
    recipe, folder = run.recipe, run.folder
    found = [first_figures(run)]
    while len(found) <= recipe.rounds and not is_over(found, recipe.patience):
        found.append(one_round(run, len(found)))
    kept = best(found) if recipe.keep == "best" else len(found) - 1
    made = {"version": VERSION, "kept": kept, "rounds": found}
    there = (folder / MODEL).is_dir() and (folder / FIGURES).is_file() and read_json(folder / FIGURES) == made
    if gather_object([there])[0]:  # the main process decides: it may be writing them already when others look
        return found
    model = merge(run.adapted) if run.adapted is not None else run.model
    if kept < len(found) - 1:
        model = remade(run, kept)
    if run.team.is_main:
        defaults_of(recipe, recipe.data.train).save(save(model.eval(), run.processor, folder / MODEL))
        write_json(folder / FIGURES, made)
        write_text(folder / REPORT, run_page(folder))
    run.team.wait()
    return found


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The rounds as lines of a table: per cent of the validation clips' events, answers and words."""
    lines = [
        "| round | Miss | Incorrect | Hallucinated | Total | repetition | words | Total at temperature 1 | QA | KL |",
        "|---" * 10 + "|",
    ]
    for row in found:
        greedy = row["greedy"]
        cells = [greedy[name] for name in ("missed", "incorrect", "hallucinated", "total", "repetition", "words")]
        shown = [*cells, row["sampled"]["total"], row["qa"], row.get("kl")]
        numbers = " | ".join("" if value is None else f"{round(value, 1) + 0.0:.1f}" for value in shown)  # never -0.0
        lines.append(f"| {row['round']} | {numbers} |")
    return lines


def remade(run: Rounds, rounds: int) -> Kokanee:
    """The model after so many rounds, from the base and the adapters on disk."""
    recipe = run.recipe
    model, _ = load(recipe.model, dtype=recipe.dtype, device=device_of(run.team.state))
    for number in range(1, rounds + 1):
        if recipe.proxy or number == rounds:
            model = merge(load_adapter(model, run.place(number) / ADAPTER))
    return model


def first_figures(run: Rounds) -> dict[str, Any]:
    """The figures of the model that the run starts from."""
    if not (run.place(0) / FIGURES).is_file():
        finish(run, 0, run.timed("evaluate", lambda: measured(run, 0)))
    return read_json(run.place(0) / FIGURES)


def one_round(run: Rounds, number: int) -> dict[str, Any]:
    """Round `number`, or what is left of it; its figures. Afterwards the run holds the next round's model."""
    place, recipe = run.place(number), run.recipe
    if (place / ADAPTER).is_dir():
        run.adapted = load_adapter(bare(run), place / ADAPTER)
    else:
        made = learnt(run, number)
        if run.team.is_main:
            write_json(place / TRAINING, {**made, "seconds": run.seconds})
            keep_round(run, number)
        run.team.wait()
    if not (place / FIGURES).is_file():
        if not recipe.keep_media:
            run.clips.forget(numbers_of(run, number))
        made = read_json(place / TRAINING)
        run.seconds = made.pop("seconds")
        finish(run, number, {**made, **run.timed("evaluate", lambda: measured(run, number))})
    if recipe.proxy and run.adapted is not None:
        run.model, run.adapted = merge(run.adapted), None
    return read_json(place / FIGURES)


def measured(run: Rounds, number: int) -> dict[str, Any]:
    """How good the model is after a round, and how far it has moved."""
    # Without a proxy the model without its adapter is that of the first round, whatever the round.
    moved = run.recipe.proxy or number == 1
    return evaluated(run, run.recipe.data.validation, run.place(number), f"round {number}, ", moved)


def bare(run: Rounds) -> Kokanee:
    """The model without the adapter of an earlier round, if one is on it that was not merged."""
    if run.adapted is not None:
        model: Any = run.adapted.unload()
        run.adapted = None
        return model
    return run.model


def finish(run: Rounds, number: int, made: dict[str, Any]) -> None:
    """Note that a round is done, and bring the report up to date."""
    if run.team.is_main:
        write_json(run.place(number) / FIGURES, {"version": VERSION, "round": number, **made, "seconds": run.seconds})
        write_text(run.folder / REPORT, run_page(run.folder))
    run.seconds = {}
    run.team.wait()


def learnt(run: Rounds, number: int) -> dict[str, Any]:
    """Sample, judge, pick and train; what came out, in figures."""
    recipe, place, made = run.recipe, run.place(number), {}
    tasks = tasks_of(run, number)
    if recipe.loss == "ce":
        lessons = [lesson_of(task) for task in tasks]
    else:
        drafts = run.timed(
            "sample",
            lambda: run.writer.captions(
                place / SAMPLES,
                run.clips,
                tasks,
                recipe.decodings(number),
                recipe.samples,
                told(run, f"round {number}, sample"),
            ),
        )
        judged = run.timed(
            "judge",
            lambda: verdicts(
                place / VERDICTS,
                run.judge,
                tasks,
                drafts,
                run.team,
                told(run, f"round {number}, judge"),
                recipe.unjudged,
            ),
        )
        lessons, made["pairs"] = pick(run, place / PAIRS, tasks, drafts, judged)
    if number < recipe.qa_from_round:
        lessons = [replace(lesson, questions=()) for lesson in lessons]
    random.Random(f"{recipe.seed}/{number}/lessons").shuffle(lessons)
    dropped_by = dict(made.get("pairs", {}).get("dropped", {}))
    left = apart(run, lessons)
    if len(left) < len(lessons):
        dropped_by[OF_HELD_OUT] = len(lessons) - len(left)
    check_enough(len(left), recipe, number, dropped_by)
    made["training"] = run.timed("train", lambda: trained(run, number, left))
    return made


def numbers_of(run: Rounds, number: int) -> list[int]:
    """The clips of a round. All clips come before any comes again."""
    recipe, order = run.recipe, list(range(len(run.clips)))
    random.Random(f"{recipe.seed}/clips").shuffle(order)
    first = (number - 1) * recipe.clips
    return [order[(first + place) % len(order)] for place in range(recipe.clips)]


def tasks_of(run: Rounds, number: int) -> list[Task]:
    """The clips of a round that can be read, in groups of like length."""
    key = f"{run.recipe.seed}/{number}"
    return tasks_for(run, run.recipe.data.train, "train", numbers_of(run, number), key, run.place(number))


def lesson_of(task: Task, pairs: Sequence[tuple[str, str]] = (), cut_off: Sequence[str] = ()) -> Lesson:
    """What is learnt from a clip, of whose pairs (chosen, rejected) those in `cut_off` did not come to their end."""
    cut_off = (*cut_off, *(() if task.finished else (task.ground_truth,)))
    return Lesson(task.number, task.name, task.prompt, task.ground_truth, tuple(pairs), task.questions, cut_off)


def pick(
    run: Rounds, path: Path, tasks: Sequence[Task], drafts: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]
) -> tuple[list[Lesson], dict[str, Any]]:
    """Lessons from better and worse captions of each clip, which are also written as pairs; and figures of them."""
    rules = run.recipe.pairs
    lessons, pairs, lost, everything = [], [], [], []
    for task, draft, verdict in zip(tasks, drafts, judged, strict=True):
        made = candidates(draft, verdict)
        everything += made
        found, why = picked(made, rules)
        lost.append(why)
        if found:
            cut_off = [one.text for pair in found for one in pair if not one.finished]
            lessons.append(lesson_of(task, [(better.text, worse.text) for better, worse in found], cut_off))
        for better, worse in found:
            ends, scores = (task.truth.start_s, task.truth.end_s), (better.score(rules), worse.score(rules))
            pairs.append(Pair(task.truth.file, task.prompt, better.text, worse.text, task.ground_truth, *ends, *scores))
    if run.team.is_main:
        write_jsonl(path, [pair.as_record() for pair in pairs])
    sampled, count = figures(everything), max(1, len(pairs))
    return lessons, {
        "pairs": len(pairs),
        "dropped": dropped(lost),
        "unjudged": sum(len(draft["captions"]) for draft in drafts) - len(everything),
        "chosen_score": sum(pair.chosen_score or 0.0 for pair in pairs) / count,
        "rejected_score": sum(pair.rejected_score or 0.0 for pair in pairs) / count,
        "chosen_words": sum(word_count(pair.chosen) for pair in pairs) / count,
        "rejected_words": sum(word_count(pair.rejected) for pair in pairs) / count,
        **{f"sampled_{name}": sampled[name] for name in ("total", "hall", "repetition", "words")},
    }


def trained(run: Rounds, number: int, lessons: Sequence[Lesson]) -> dict[str, float]:
    """Train an adapter on the lessons: a new one, whose B is 0, or the last round's further. The last figures."""
    recipe, place = run.recipe, run.place(number)
    if run.adapted is None:
        torch.manual_seed(recipe.seed_of(number))
        run.adapted = adapted(run.model, recipe.lora)
    model: Any = run.adapted.get_base_model()
    objective = Preferences(
        model,
        run.processor,
        run.clips,
        lessons,
        Weights(recipe.loss, recipe.beta, recipe.gt_weight, recipe.qa_weight),
        held_out=recipe.n_held_out,
        seed=recipe.seed_of(number),
    )
    settings = recipe.model_copy(update={"seed": recipe.seed_of(number), "learning_rate": recipe.rate_of(number)})

    def before() -> None:
        if recipe.loss in WITH_PAIRS:
            objective.reference = references(run, place / REFERENCE, objective, number)

    return fit(run, objective, settings, place / TRAIN, f"round {number}, train", FREE_IN_ROUNDS, before)


def references(run: Rounds, path: Path, objective: Preferences, number: int) -> list[torch.Tensor]:
    """The log-probabilities of all pairs under the round's first model, of each lesson (pairs, 2); computed once and
    kept in `path`."""
    total = len(objective.lessons)

    def work(lessons: Sequence[int]) -> list[dict[str, Any]]:
        found = objective.references(lessons)
        return [{"lesson": lesson, "log_probs": row.tolist()} for lesson, row in zip(lessons, found, strict=True)]

    order = sorted(range(total), key=objective.lengths.__getitem__)
    records = run.team.share_into(path, order, run.recipe.batch_size, work, told(run, f"round {number}, reference"))
    table = {record["lesson"]: torch.tensor(record["log_probs"]) for record in records}
    return [table[lesson] for lesson in range(total)]


def keep_round(run: Rounds, number: int) -> None:
    """Write the round's adapter, with what it belongs to; the checkpoint of its training is no longer needed then."""
    base = run.recipe.model
    if run.recipe.proxy and number > 1:
        base += f" with the adapters of rounds 1 to {number - 1} merged" if number > 2 else " with round 1 merged"
    keep_adapter(run, run.place(number) / ADAPTER, base, f"round {number} of mrDPO")
    (run.place(number) / TRAIN / CHECKPOINT).unlink(missing_ok=True)
