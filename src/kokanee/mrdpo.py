"""mrDPO: rounds in which a captioner learns from its own captions (arXiv 2506.15220, section on mrDPO).

A round merges the last adapter, takes the merged model as sampler and reference, starts a new adapter (the LoRA proxy),
samples captions of clips, judges them, picks pairs, trains with gDPO, and captions validation clips.

A run is a folder that can be killed and continued at any point, and then ends with the same weights, bit for bit on a
CPU: `state.json` (the recipe), and for each round `round-NN/` with samples.jsonl, verdicts.jsonl, pairs.jsonl,
reference.jsonl, train/, adapter/, validation.jsonl and, last, metrics.json. Captions are made in groups that follow
from the recipe alone, so that a group which is made again comes out the same.
"""

from __future__ import annotations

import datetime
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from kokanee.adapters import load_adapter, merge
from kokanee.captions import Decoding
from kokanee.checkpoints import load, save
from kokanee.clips import Clips, GroundTruthCaption, Task, WorldClips, open_prompt
from kokanee.defaults import Defaults, origin
from kokanee.errors import KokaneeError
from kokanee.events import Counts, rates, repetition_rate
from kokanee.formats import append_jsonl, read_json, read_jsonl, write_json
from kokanee.generation import answers, text_of
from kokanee.model import Kokanee
from kokanee.pairs import Candidate, Pair, PairRules, dropped, picked
from kokanee.prefix import branch_attention_in
from kokanee.preferences import Lesson, Loss, Preferences, Weights
from kokanee.processor import Processor
from kokanee.recipes import Training
from kokanee.scoring import ExactJudge, Judge, judge_all
from kokanee.scoring import Item as Judged
from kokanee.predictions import Prediction
from kokanee.stages import fingerprint_of
from kokanee.train import claim, train
from kokanee.weights import fingerprint
from kokanee.world.annotators import Bias

ROUND = "round-{:02d}"
SAMPLES, VERDICTS, PAIRS, REFERENCE = "samples.jsonl", "verdicts.jsonl", "pairs.jsonl", "reference.jsonl"
VALIDATION, ROUND_METRICS, ADAPTER, TRAIN = "validation.jsonl", "metrics.json", "adapter", "train"
JUDGED_TOGETHER = 256
VERSION = 1


class Lora(BaseModel):
    """The adapter of a round; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(128, ge=1)
    alpha: float = Field(256, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


class WorldData(BaseModel):
    """Clips of the world, as folders of features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str
    validation: str
    seed: int = 0
    bias: dict[str, float] = Field(default_factory=dict)


class MrdpoRecipe(Training):
    """A run of mrDPO. `steps` are those of one round."""

    stage: Literal["mrdpo"]
    model: str
    rounds: int = Field(6, ge=1)
    steps: int = Field(1000, ge=1, description="of each round; 1,000 in the paper")
    clips: int = Field(ge=1, description="clips that are captioned in each round")
    samples: int = Field(4, ge=2, description="captions of each clip")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.9, gt=0, le=1, description="0.9 in the paper")
    max_new_tokens: int = Field(1024, ge=1)
    caption_batch: int = Field(32, ge=1, description="clips captioned together")
    judge: str = "exact"
    pairs: PairRules = PairRules()
    loss: Loss = "gdpo"
    beta: float = Field(0.1, gt=0)
    gt_weight: float = Field(0.1, ge=0)
    ground_truth: GroundTruthCaption = "annotated"
    proxy: bool = True
    lora: Lora = Lora()
    qa_from_round: int = Field(6, ge=1)
    questions: int = Field(4, ge=0)
    qa_weight: float = Field(0.1, ge=0)
    validation_clips: int = Field(200, ge=1)
    data: WorldData

    @property
    def n_held_out(self) -> int:
        return self.evaluate_batches * self.batch_size


Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass
class Rounds:
    """A run under way: the model (merged so far), its processor, and the clips."""

    recipe: MrdpoRecipe
    folder: Path
    model: Kokanee
    processor: Processor
    clips: Clips
    validation: Clips
    state: PartialState
    report: Progress
    adapted: PeftModel | None = None

    @property
    def is_main(self) -> bool:
        return self.state.is_main_process


def run_mrdpo(recipe: MrdpoRecipe, folder: Path, report: Progress) -> list[dict[str, Any]]:
    """All rounds in `folder`; the figures of each, the first being those of the model that it starts from."""
    state = PartialState(cpu=recipe.device == "cpu", timeout=datetime.timedelta(days=7))
    model, processor = load(recipe.model, dtype="float32")
    claim(folder, recipe, {"weights": fingerprint(model), "processor": fingerprint_of(processor)})
    bias = Bias(**recipe.data.bias)
    seed = recipe.data.seed
    clips = WorldClips(model, processor, Path(recipe.data.train), "train", seed, bias)
    validation = WorldClips(model, processor, Path(recipe.data.validation), "validation", seed, bias)
    run = Rounds(recipe, folder, model.eval(), processor, clips, validation, state, report)
    figures = [round_zero(run)]
    for number in range(1, recipe.rounds + 1):
        figures.append(one_round(run, number))
    if run.adapted is not None:
        run.model = merge(run.adapted)
    if run.is_main:
        save(run.model.eval(), processor, folder / "model")
        Defaults.of(origin(recipe.model)).save(folder / "model")
    return figures


def round_zero(run: Rounds) -> dict[str, Any]:
    """The figures of the model that the run starts from."""
    place = run.folder / ROUND.format(0)
    if not (place / ROUND_METRICS).is_file():
        finish(run, place, {"round": 0, **evaluate(run, place)})
    return read_json(place / ROUND_METRICS)


def one_round(run: Rounds, number: int) -> dict[str, Any]:
    """Round `number`, or what is left of it; its figures. `run.model` is then the next round's."""
    recipe, place = run.recipe, run.folder / ROUND.format(number)
    started = time.monotonic()
    seconds: dict[str, float] = {}

    def timed(name: str) -> None:
        nonlocal started
        seconds[name], started = round(time.monotonic() - started, 1), time.monotonic()

    done = (place / ROUND_METRICS).is_file()
    figures: dict[str, Any] = {"round": number}
    if not (place / ADAPTER).is_dir():
        tasks = tasks_of(run, number)
        lessons = [lesson_of(task) for task in tasks]
        if recipe.loss != "ce":
            records = caption(run, place / SAMPLES, run.clips, tasks, sampling(recipe, number), recipe.samples, "sample")
            timed("sample")
            verdicts = judge(run, place / VERDICTS, tasks, records)
            timed("judge")
            lessons, picking = pick(run, place / PAIRS, tasks, records, verdicts)
            figures["pairs"] = picking
        if number < recipe.qa_from_round:
            lessons = [replace(lesson, questions=()) for lesson in lessons]
        need(lessons, recipe)
        new_adapter(run, number)
        figures["training"] = learn(run, place, number, lessons)
        timed("train")
        keep_adapter(run, place)
        if run.is_main:
            write_json(place / "training.json", {**figures, "seconds": seconds})
    else:
        run.adapted = load_adapter(run.model, place / ADAPTER)
        if run.is_main and not done:
            known = read_json(place / "training.json") if (place / "training.json").is_file() else {}
            figures, seconds = {**figures, **known}, known.get("seconds", {})
    if recipe.proxy:
        assert run.adapted is not None
        run.model, run.adapted = merge(run.adapted), None
    if not done:
        started = time.monotonic()
        figures |= evaluate(run, place)
        timed("evaluate")
        finish(run, place, {**figures, "seconds": seconds})
    return read_json(place / ROUND_METRICS)


def finish(run: Rounds, place: Path, figures: dict[str, Any]) -> None:
    if run.is_main:
        write_json(place / ROUND_METRICS, {"version": VERSION, **figures})
    run.state.wait_for_everyone()


def tasks_of(run: Rounds, number: int) -> list[Task]:
    """The clips of a round, in groups of like length. Rounds go through all clips before any comes again."""
    recipe = run.recipe
    order = list(range(len(run.clips)))
    random.Random(f"{recipe.seed}/clips").shuffle(order)
    first = (number - 1) * recipe.clips
    chosen = [order[(first + place) % len(order)] for place in range(min(recipe.clips, len(order)))]
    chosen.sort(key=run.clips.n_tokens)
    key = f"{recipe.seed}/{number}"
    return [run.clips.task(clip, recipe.ground_truth, recipe.questions, key) for clip in chosen]


def lesson_of(task: Task, chosen: str = "", rejected: str = "") -> Lesson:
    return Lesson(task.number, task.name, task.prompt, task.ground_truth, chosen, rejected, task.questions)


def sampling(recipe: MrdpoRecipe, number: int) -> Decoding:
    return Decoding(recipe.temperature, recipe.top_p, recipe.seed * 1000 + number, recipe.max_new_tokens)


def caption(
    run: Rounds, path: Path, clips: Clips, tasks: Sequence[Task], decoding: Decoding, n_samples: int, what: str
) -> list[dict[str, Any]]:
    """Captions of all tasks, a record a clip, in order; goes on where the file ends. The processes share the groups."""
    size, team = run.recipe.caption_batch, run.state
    done = len(read_jsonl(path)) if path.is_file() else 0
    groups = [tasks[at : at + size] for at in range(0, len(tasks), size)]
    run.state.wait_for_everyone()
    for first in range(done // size, len(groups), team.num_processes):
        mine = groups[first + team.process_index] if first + team.process_index < len(groups) else []
        found = gathered(caption_group(run, clips, mine, decoding, n_samples))
        fresh = found[max(0, done - first * size) :]
        if run.is_main:
            append_jsonl(path, fresh)
        done = max(done, first * size + len(found))
        run.report(what, done, len(tasks), {})
    run.state.wait_for_everyone()
    return read_jsonl(path)


def caption_group(
    run: Rounds, clips: Clips, tasks: Sequence[Task], decoding: Decoding, n_samples: int
) -> list[dict[str, Any]]:
    if not tasks:
        return []
    prompts = [open_prompt(run.processor, clips.view(task.number), task.prompt) for task in tasks]
    batch = run.processor.collate(prompts, padding_side="left")
    found = answers(run.model, batch, decoding, n_samples, [task.name for task in tasks])
    tokenizer = run.processor.tokenizer
    return [
        {
            "version": VERSION,
            "clip": task.name,
            "prompt": task.prompt,
            "seed": decoding.seed,
            "captions": [text_of(tokenizer, answer.ids) for answer in row],
            "finished": [answer.finished for answer in row],
        }
        for task, row in zip(tasks, rows_of(found, n_samples), strict=True)
    ]


def rows_of(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def gathered(found: list[Any]) -> list[Any]:
    """What all processes found, in their order."""
    return gather_object(found)


def make_judge(run: Rounds) -> Judge:
    return ExactJudge()


def judge(run: Rounds, path: Path, tasks: Sequence[Task], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdict on every caption, a record a clip."""
    if run.is_main:
        done = len(read_jsonl(path)) if path.is_file() else 0
        for at in range(done, len(tasks), JUDGED_TOGETHER):
            part = slice(at, at + JUDGED_TOGETHER)
            append_jsonl(path, verdicts_of(run, tasks[part], records[part]))
            run.report("judge", min(at + JUDGED_TOGETHER, len(tasks)), len(tasks), {})
    run.state.wait_for_everyone()
    return read_jsonl(path)


def verdicts_of(run: Rounds, tasks: Sequence[Task], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    items = [
        Judged(Prediction(task.name, text, sample=sample, finished=finished), task.truth)
        for task, record in zip(tasks, records, strict=True)
        for sample, (text, finished) in enumerate(zip(record["captions"], record["finished"], strict=True))
    ]
    judged = iter(judge_all(items, make_judge(run)))
    made = []
    for record in records:
        found = [next(judged) for _ in record["captions"]]
        counts = [None if item.judgements[0] is None else asdict(item.judgements[0].counts) for item in found]
        repeated = [repetition_rate(text) for text in record["captions"]]
        made.append({"version": VERSION, "clip": record["clip"], "counts": counts, "repetition": repeated})
    return made


def pick(
    run: Rounds,
    path: Path,
    tasks: Sequence[Task],
    records: Sequence[dict[str, Any]],
    verdicts: Sequence[dict[str, Any]],
) -> tuple[list[Lesson], dict[str, Any]]:
    """Lessons from the better and the worse captions of each clip, in random order, and what was dropped."""
    rules = run.recipe.pairs
    lessons, pairs, lost, all_counts = [], [], [], []
    repeated = 0.0
    for task, record, verdict in zip(tasks, records, verdicts, strict=True):
        candidates = [
            Candidate(text, Counts(**counts), repetition)
            for text, counts, repetition in zip(
                record["captions"], verdict["counts"], verdict["repetition"], strict=True
            )
            if counts is not None
        ]
        all_counts += [candidate.counts for candidate in candidates]
        repeated += sum(candidate.repetition for candidate in candidates)
        found, why = picked(candidates, rules)
        lost.append(why)
        for better, worse in found:
            lessons.append(lesson_of(task, better.text, worse.text))
            pairs.append(
                Pair(
                    task.name,
                    task.prompt,
                    better.text,
                    worse.text,
                    task.ground_truth,
                    task.truth.start_s,
                    task.truth.end_s,
                    better.score(rules),
                    worse.score(rules),
                )
            )
    if run.is_main and not path.is_file():
        append_jsonl(path, [pair.as_record() for pair in pairs])
    run.state.wait_for_everyone()
    random.Random(f"{run.recipe.seed}/{path.parent.name}/pairs").shuffle(lessons)
    sampled = rates(all_counts)
    figures = {
        "pairs": len(pairs),
        "dropped": dropped(lost),
        "chosen_score": mean([pair.chosen_score or 0.0 for pair in pairs]),
        "rejected_score": mean([pair.rejected_score or 0.0 for pair in pairs]),
        "chosen_words": mean([len(pair.chosen.split()) for pair in pairs]),
        "rejected_words": mean([len(pair.rejected.split()) for pair in pairs]),
        "sampled_total": sampled.total,
        "sampled_hall": sampled.hall,
        "sampled_repetition": 100.0 * repeated / max(1, len(all_counts)),
    }
    return lessons, figures


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def need(lessons: Sequence[Lesson], recipe: MrdpoRecipe) -> None:
    wanted = recipe.n_held_out + recipe.batch_size * recipe.processes
    if len(lessons) < wanted:
        raise KokaneeError(
            f"This round has {len(lessons)} pairs, but {wanted} are needed ({recipe.n_held_out} of them to check by). "
            "Sample more clips (clips), more captions (samples), lower pairs.min_gap, or make batches smaller."
        )


def new_adapter(run: Rounds, number: int) -> None:
    """Put a fresh adapter onto the model (B = 0: it changes nothing yet), or go on with the last round's."""
    recipe = run.recipe
    if run.adapted is None:
        torch.manual_seed(recipe.seed * 1000 + number)
        config = LoraConfig(
            r=recipe.lora.r,
            lora_alpha=recipe.lora.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=recipe.lora.dropout,
            target_modules=rf"language_model\..*\.({'|'.join(recipe.lora.modules)})",
        )
        run.adapted = get_peft_model(run.model, config)  # pyright: ignore


def learn(run: Rounds, place: Path, number: int, lessons: Sequence[Lesson]) -> dict[str, float]:
    """Train the adapter on a round's lessons."""
    recipe = run.recipe
    assert run.adapted is not None
    model: Any = run.adapted.get_base_model()
    objective = Preferences(
        model,
        run.processor,
        run.clips,
        lessons,
        Weights(recipe.loss, recipe.beta, recipe.gt_weight, recipe.qa_weight),
        held_out=recipe.n_held_out,
        seed=recipe.seed * 1000 + number,
    )
    trained = {}
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            trained[name] = parameter
    with branch_attention_in(model):
        if recipe.loss != "ce":
            objective.reference_P2 = references(run, place / REFERENCE, objective)

        def report(step: int, figures: dict[str, float]) -> None:
            run.report("train", step, recipe.steps, figures)

        settings = recipe.model_copy(update={"seed": recipe.seed * 1000 + number})
        figures = train(objective, settings, place / TRAIN, trained, report)
    model.eval()
    return figures


def references(run: Rounds, path: Path, objective: Preferences) -> torch.Tensor:
    """The log-probabilities of all pairs under the reference, (P, 2); computed once and kept."""
    total, size, team = len(objective.lessons), run.recipe.batch_size, run.state
    done = len(read_jsonl(path)) if path.is_file() else 0
    order = sorted(range(total), key=objective.length)
    groups = [order[at : at + size] for at in range(0, total, size)]
    run.state.wait_for_everyone()
    for first in range(done // size, len(groups), team.num_processes):
        mine = groups[first + team.process_index] if first + team.process_index < len(groups) else []
        values = objective.references(mine) if mine else []
        found = gathered(
            [{"pair": pair, "chosen": c, "rejected": r} for pair, (c, r) in zip(mine, values, strict=True)]
        )
        if run.is_main:
            append_jsonl(path, found[max(0, done - first * size) :])
        done = max(done, first * size + len(found))
        run.report("reference", done, total, {})
    run.state.wait_for_everyone()
    table = torch.zeros(total, 2)
    for record in read_jsonl(path):
        table[record["pair"]] = torch.tensor([record["chosen"], record["rejected"]])
    return table


def keep_adapter(run: Rounds, place: Path) -> None:
    """Write the round's adapter, whole or not at all; the checkpoint of its training is no longer needed."""
    if run.is_main:
        assert run.adapted is not None
        unfinished = place / f".{ADAPTER}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        run.adapted.save_pretrained(str(unfinished))
        unfinished.rename(place / ADAPTER)
        (place / TRAIN / "checkpoint.safetensors").unlink(missing_ok=True)
    run.state.wait_for_everyone()


def evaluate(run: Rounds, place: Path) -> dict[str, Any]:
    """Greedy captions of validation clips, judged; answers to their questions."""
    recipe = run.recipe
    n_clips = min(recipe.validation_clips, len(run.validation))
    found = [run.validation.task(clip, "annotated", 2, "validation") for clip in range(n_clips)]
    tasks = sorted(found, key=lambda task: run.validation.n_tokens(task.number))
    made: dict[str, Any] = {}
    for name, decoding in (
        ("greedy", Decoding(0.0, 1.0, 0, recipe.max_new_tokens)),
        ("sampled", Decoding(1.0, 1.0, 1, recipe.max_new_tokens)),
    ):
        path = place / (VALIDATION if name == "greedy" else "validation-sampled.jsonl")
        records = caption(run, path, run.validation, tasks, decoding, 1, f"evaluate, {name}")
        if run.is_main:
            verdicts = verdicts_of(run, tasks, records)
            made[name] = measured(records, verdicts)
    made["qa"] = answered(run, tasks)
    return made


def measured(records: Sequence[dict[str, Any]], verdicts: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = rates(Counts(**counts) for verdict in verdicts for counts in verdict["counts"])
    texts = [text for record in records for text in record["captions"]]
    return {
        "missed": found.missed,
        "incorrect": found.incorrect,
        "hallucinated": found.hallucinated,
        "hall": found.hall,
        "total": found.total,
        "repetition": 100.0 * mean([repetition_rate(text) for text in texts]),
        "words": mean([len(text.split()) for text in texts]),
    }


def answered(run: Rounds, tasks: Sequence[Task]) -> float:
    """Right answers to questions about the clips, in per cent."""
    asked = [replace(task, prompt=text, name=answer) for task in tasks for text, answer in task.questions]
    size, team = 2 * run.recipe.caption_batch, run.state
    right = []
    decoding = Decoding(0.0, 1.0, 0, 16)
    for at in range(team.process_index * size, len(asked), team.num_processes * size):
        part = asked[at : at + size]
        prompts = [open_prompt(run.processor, run.validation.view(task.number), task.prompt) for task in part]
        batch = run.processor.collate(prompts, padding_side="left")
        for task, answer in zip(part, answers(run.model, batch, decoding), strict=True):
            text = text_of(run.processor.tokenizer, answer.ids).strip()
            right.append(text.lower() == task.name.lower())
    everyone = gathered(right)
    return 100.0 * sum(everyone) / max(1, len(everyone))
