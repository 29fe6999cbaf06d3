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
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel

from kokanee.adapters import load_adapter, merge, wrapped
from kokanee.captions import Decoding
from kokanee.checkpoints import load, save
from kokanee.clips import Task
from kokanee.defaults import Defaults, origin
from kokanee.drafts import candidates, device_of, figures, verdicts
from kokanee.errors import KokaneeError, memory_said
from kokanee.formats import UNFINISHED, alone_in, read_json, write_json, write_jsonl, write_text
from kokanee.launch import is_main
from kokanee.model import Kokanee
from kokanee.mrdpo_recipe import FREE, Lora, MrdpoRecipe
from kokanee.mrdpo_report import run_page
from kokanee.mrdpo_run import Progress, Run, check_enough, opened, tasks_for, told
from kokanee.pairs import Pair, dropped, picked
from kokanee.preferences import WITH_PAIRS, Lesson, Preferences, Weights
from kokanee.prefix import branch_attention_in
from kokanee.train import CHECKPOINT, LESS, train

VERSION = 1
SAMPLES, VERDICTS, PAIRS, REFERENCE = "samples.jsonl", "verdicts.jsonl", "pairs.jsonl", "reference.jsonl"
GREEDY, SAMPLED = "validation", "validation-sampled"
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


def rounds(run: Run) -> list[dict[str, Any]]:
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
        Defaults.of(origin(recipe.model)).save(save(model.eval(), run.processor, folder / MODEL))
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
        numbers = " | ".join("" if value is None else f"{value:.1f}" for value in shown)
        lines.append(f"| {row['round']} | {numbers} |")
    return lines


def total_of(found: dict[str, Any]) -> float:
    """The error by which rounds are compared: of greedy captions of the validation clips."""
    return found["greedy"]["total"]


def best(found: Sequence[dict[str, Any]]) -> int:
    """The round with the lowest validation error, the first of equals."""
    return min(range(len(found)), key=lambda number: (total_of(found[number]), number))


def is_over(found: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` rounds brought no lower error."""
    return patience is not None and len(found) - 1 - best(found) >= patience


def remade(run: Run, rounds: int) -> Kokanee:
    """The model after so many rounds, from the base and the adapters on disk."""
    recipe = run.recipe
    model, _ = load(recipe.model, dtype=recipe.dtype, device=device_of(run.team.state))
    for number in range(1, rounds + 1):
        if recipe.proxy or number == rounds:
            model = merge(load_adapter(model, run.place(number) / ADAPTER))
    return model


def first_figures(run: Run) -> dict[str, Any]:
    """The figures of the model that the run starts from."""
    if not (run.place(0) / FIGURES).is_file():
        finish(run, 0, run.timed("evaluate", lambda: evaluated(run, 0)))
    return read_json(run.place(0) / FIGURES)


def one_round(run: Run, number: int) -> dict[str, Any]:
    """Round `number`, or what is left of it; its figures. Afterwards the run holds the next round's model."""
    place, recipe = run.place(number), run.recipe
    if (place / ADAPTER).is_dir():
        run.adapted = load_adapter(bare(run), place / ADAPTER)
    else:
        made = learnt(run, number)
        if run.team.is_main:
            write_json(place / TRAINING, {**made, "seconds": run.seconds})
            keep_adapter(run, number)
        run.team.wait()
    if not (place / FIGURES).is_file():
        if not recipe.keep_media:
            run.clips.forget(numbers_of(run, number))
        made = read_json(place / TRAINING)
        run.seconds = made.pop("seconds")
        finish(run, number, {**made, **run.timed("evaluate", lambda: evaluated(run, number))})
    if recipe.proxy and run.adapted is not None:
        run.model, run.adapted = merge(run.adapted), None
    return read_json(place / FIGURES)


def bare(run: Run) -> Kokanee:
    """The model without the adapter of an earlier round, if one is on it that was not merged."""
    if run.adapted is not None:
        model: Any = run.adapted.unload()
        run.adapted = None
        return model
    return run.model


def finish(run: Run, number: int, made: dict[str, Any]) -> None:
    """Note that a round is done, and bring the report up to date."""
    if run.team.is_main:
        write_json(run.place(number) / FIGURES, {"version": VERSION, "round": number, **made, "seconds": run.seconds})
        write_text(run.folder / REPORT, run_page(run.folder))
    run.seconds = {}
    run.team.wait()


def learnt(run: Run, number: int) -> dict[str, Any]:
    """Sample, judge, pick and train; what came out, in figures."""
    recipe, place, made = run.recipe, run.place(number), {}
    tasks = tasks_of(run, number)
    if recipe.loss == "ce":
        lessons = [lesson_of(task) for task in tasks]
    else:
        drafts = run.timed(
            "sample",
            lambda: run.writer.captions(
                place / SAMPLES, run.clips, tasks, recipe.decodings(number), recipe.samples, told(run, "sample", number)
            ),
        )
        judged = run.timed(
            "judge",
            lambda: verdicts(
                place / VERDICTS, run.judge, tasks, drafts, run.team, told(run, "judge", number), recipe.unjudged
            ),
        )
        lessons, made["pairs"] = pick(run, place / PAIRS, tasks, drafts, judged)
    if number < recipe.qa_from_round:
        lessons = [replace(lesson, questions=()) for lesson in lessons]
    random.Random(f"{recipe.seed}/{number}/lessons").shuffle(lessons)
    check_enough(len(lessons), recipe, number, made.get("pairs", {}).get("dropped", {}))
    made["training"] = run.timed("train", lambda: trained(run, number, lessons))
    return made


def numbers_of(run: Run, number: int) -> list[int]:
    """The clips of a round. All clips come before any comes again."""
    recipe, order = run.recipe, list(range(len(run.clips)))
    random.Random(f"{recipe.seed}/clips").shuffle(order)
    first = (number - 1) * recipe.clips
    return [order[(first + place) % len(order)] for place in range(recipe.clips)]


def tasks_of(run: Run, number: int) -> list[Task]:
    """The clips of a round that can be read, in groups of like length."""
    return tasks_for(run, "train", numbers_of(run, number), f"{run.recipe.seed}/{number}")


def lesson_of(task: Task, pairs: Sequence[tuple[str, str]] = ()) -> Lesson:
    """What is learnt from a clip."""
    return Lesson(task.number, task.name, task.prompt, task.ground_truth, tuple(pairs), task.questions)


def pick(
    run: Run, path: Path, tasks: Sequence[Task], drafts: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]
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
            lessons.append(lesson_of(task, [(better.text, worse.text) for better, worse in found]))
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
        "chosen_words": sum(len(pair.chosen.split()) for pair in pairs) / count,
        "rejected_words": sum(len(pair.rejected.split()) for pair in pairs) / count,
        **{f"sampled_{name}": sampled[name] for name in ("total", "hall", "repetition", "words")},
    }


def trained(run: Run, number: int, lessons: Sequence[Lesson]) -> dict[str, float]:
    """Train an adapter on the lessons: a new one, whose B is 0, or the last round's further. The last figures."""
    recipe, place = run.recipe, run.place(number)
    if run.adapted is None:
        torch.manual_seed(recipe.seed_of(number))
        run.adapted = adapted(run.model, recipe.lora)
    model: Any = run.adapted.get_base_model()
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = Preferences(
        model,
        run.processor,
        run.clips,
        lessons,
        Weights(recipe.loss, recipe.beta, recipe.gt_weight, recipe.qa_weight),
        held_out=recipe.n_held_out,
        seed=recipe.seed_of(number),
    )
    weights = {}
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            weights[name] = parameter
    with branch_attention_in(model):
        if recipe.loss in WITH_PAIRS:
            objective.reference = references(run, place / REFERENCE, objective, number)
        settings = recipe.model_copy(update={"seed": recipe.seed_of(number), "learning_rate": recipe.rate_of(number)})
        found = train(
            objective,
            settings,
            place / TRAIN,
            weights,
            lambda step, said: run.report(f"round {number}, train", step, recipe.steps, said),
            free=FREE,
        )
    model.eval()
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_disable()
    return found


def adapted(model: Kokanee, lora: Lora) -> PeftModel:
    """The model with a new adapter on its decoder, which changes nothing yet."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"language_model\..*\.({'|'.join(lora.modules)})",
    )
    try:
        return wrapped(model, config)
    except ValueError as error:
        raise KokaneeError(f"lora.modules: {error}. Name parts of the decoder's layers, such as q_proj.") from error


def references(run: Run, path: Path, objective: Preferences, number: int) -> list[torch.Tensor]:
    """The log-probabilities of all pairs under the round's first model, of each lesson (pairs, 2); computed once and
    kept in `path`."""
    total = len(objective.lessons)

    def work(lessons: Sequence[int]) -> list[dict[str, Any]]:
        found = objective.references(lessons)
        return [{"lesson": lesson, "log_probs": row.tolist()} for lesson, row in zip(lessons, found, strict=True)]

    order = sorted(range(total), key=objective.lengths.__getitem__)
    records = run.team.share_into(path, order, run.recipe.batch_size, work, told(run, "reference", number))
    table = {record["lesson"]: torch.tensor(record["log_probs"]) for record in records}
    return [table[lesson] for lesson in range(total)]


def keep_adapter(run: Run, number: int) -> None:
    """Write the round's adapter, whole or not at all, with what it belongs to; the checkpoint of its training is no
    longer needed then."""
    assert run.adapted is not None
    place = run.place(number)
    unfinished = place / f".{ADAPTER}{UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)
    base = run.recipe.model
    if run.recipe.proxy and number > 1:
        base += f" with the adapters of rounds 1 to {number - 1} merged" if number > 2 else " with round 1 merged"
    run.adapted.peft_config["default"].base_model_name_or_path = base
    run.adapted.save_pretrained(str(unfinished), save_embedding_layers=False)  # "auto" would ask the hub for the base
    write_text(unfinished / "README.md", f"Adapter of round {number} of mrDPO (Kokanee). Its base is {base}.\n")
    unfinished.rename(place / ADAPTER)
    (place / TRAIN / CHECKPOINT).unlink(missing_ok=True)


def evaluated(run: Run, number: int) -> dict[str, Any]:
    """How good the model is: validation clips captioned greedily and at temperature 1, judged; questions answered; and
    of a round how far the model has moved, in nats a caption: KL from the model without the adapter."""
    recipe, place, made = run.recipe, run.place(number), {}
    numbers = range(min(recipe.validation_clips, len(run.validation)))
    tasks = tasks_for(run, "validation", numbers, "validation")
    made["clips"] = len(tasks)
    for name, file, temperature in (("greedy", GREEDY, 0.0), ("sampled", SAMPLED, 1.0)):
        decoding = Decoding(temperature, 1.0, recipe.seed, recipe.max_new_tokens)
        written = told(run, f"check, {name}", number)
        drafts = run.writer.captions(place / f"{file}.jsonl", run.validation, tasks, [decoding], 1, written)
        path, read = place / f"{file}-verdicts.jsonl", told(run, f"judge, {name}", number)
        judged = verdicts(path, run.judge, tasks, drafts, run.team, read, recipe.unjudged)
        rows = [candidates(*row) for row in zip(drafts, judged, strict=True)]
        judged_ones = [one for row in rows for one in row]
        if not judged_ones:
            raise KokaneeError(
                f"None of {len(drafts)} captions of the validation clips has a verdict, so nothing can be measured. "
                "Begin in another folder, with more validation clips or another judge."
            )
        made[name] = {**figures(judged_ones), "unjudged": len(drafts) - len(judged_ones)}
        # Without a proxy the model without its adapter is that of the first round, whatever the round.
        if name == "sampled" and run.adapted is not None and (recipe.proxy or number == 1):
            made["kl"] = divergence(run, tasks, [draft["captions"][0] for draft in drafts])
    made["qa"] = run.writer.right_answers(run.validation, tasks)
    return made


def divergence(run: Run, tasks: Sequence[Task], captions: Sequence[str]) -> float:
    """The mean log-probability of the model's own captions, less that under the model without the adapter."""
    lessons = [Lesson(task.number, task.name, task.prompt, text) for task, text in zip(tasks, captions, strict=True)]
    assert run.adapted is not None
    model: Any = run.adapted.get_base_model()
    objective = Preferences(model, run.processor, run.validation, lessons, Weights("ce"), held_out=0, seed=0)
    size = run.recipe.batch_size
    groups = [range(at, min(at + size, len(lessons))) for at in range(0, len(lessons), size)]
    adapter = run.adapted

    def work(numbers: Sequence[int]) -> list[float]:
        now = objective.answer_sums(numbers)
        with adapter.disable_adapter():
            before = objective.answer_sums(numbers)
        return (now - before)[:, 0].tolist()

    found: list[float] = []
    with branch_attention_in(model):
        for first in range(0, len(groups), run.team.state.num_processes):
            found += run.team.share(groups, first, work)
    return sum(found) / max(1, len(found))
