"""Rebirth tuning: what one model tells, the teacher, is what another is tuned on, the student (arXiv 2506.15220).

mrDPO makes captions better and wears other skills. So the model that it left captions the training videos, and the
model from before it is tuned on these captions, with the questions that it had learnt to answer: captions stay good,
answers come back. Any captioner can be the teacher, and any model the student, also one of another size.

A run is a folder that can be killed and continued: `state.json` (the recipe), `captions.jsonl` (the teacher's),
`verdicts.jsonl`, `kept.jsonl` (which captions are learnt, and why others are not), train/, adapter/, before/ and
after/ (captions of validation clips), metrics.json and model/, written last.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator

from kokanee.adapters import load_adapter, merge
from kokanee.adapting import adapted, evaluated, fit, keep_adapter
from kokanee.caption_run import Task as Asking
from kokanee.caption_run import run as caption_files
from kokanee.captioner import Captioner
from kokanee.captions import Decoding, FileCaptioner
from kokanee.checkpoints import save
from kokanee.clips import Clips, FileData, Task, WorldClips
from kokanee.defaults import Defaults, origin
from kokanee.drafts import Team, Writer, candidates, device_of, figures, verdicts
from kokanee.endpoint import Endpoint
from kokanee.errors import KokaneeError, memory_said
from kokanee.events import Counts, repetition_rate
from kokanee.files import find
from kokanee.formats import alone_in, read_json, remove_unfinished, write_json, write_jsonl
from kokanee.launch import is_main
from kokanee.outputs import read_records
from kokanee.preferences import Lesson, Preferences, Weights
from kokanee.remote import TIMEOUT_S, RemoteCaptioner
from kokanee.runs import (
    MEDIA,
    REPLIES,
    Part,
    Progress,
    Run,
    check_adapted,
    check_exact,
    check_files,
    check_server,
    clips_of,
    model_of,
    start_of,
    tasks_for,
    team_of,
    told,
)
from kokanee.train import CHECKPOINT, LESS, STATE, claim
from kokanee.tuning import FORBID, FREE, Source, Tuning
from kokanee.weights import cast, fingerprint

VERSION = 1
CAPTIONS, SHARDS, VERDICTS, KEPT = "captions.jsonl", "captions", "verdicts.jsonl", "kept.jsonl"
TRAIN, TRAINING, ADAPTER, BEFORE, AFTER = "train", "training.json", "adapter", "before", "after"
FIGURES, MODEL = "metrics.json", "model"
OPENAI = "openai:"


class Keep(BaseModel):
    """Which captions are learnt. Shares are between 0 and 1; None: any."""

    model_config = FORBID

    cut_off: bool = Field(default=False, description="whether captions that did not come to their end are learnt")
    min_words: int = Field(default=1, ge=0)
    max_words: int | None = Field(default=None, ge=1)
    max_repetition: float | None = Field(default=None, ge=0, le=1, description="share of a caption that repeats itself")
    max_error: float | None = Field(
        default=None, ge=0, description="missed, incorrect and invented, of the clip's events"
    )
    max_hall: float | None = Field(default=None, ge=0, description="incorrect and invented, of the clip's events")

    @property
    def judged(self) -> bool:
        """Whether captions have to be judged."""
        return self.max_error is not None or self.max_hall is not None

    def reason(self, caption: str, finished: bool, known: bool, counts: Counts | None) -> str:
        """Why a caption is not learnt, "" where it is. known: the clip has events; counts: what is wrong with it."""
        words, most = len(caption.split()), float("inf")
        if not finished and not self.cut_off:
            return "cut off"
        if words < self.min_words:
            return "too short"
        if words > (self.max_words or most):
            return "too long"
        if self.max_repetition is not None and repetition_rate(caption) > self.max_repetition:
            return "repeats itself"
        if not self.judged or not known:
            return ""
        if counts is None:
            return "not judged"
        wrong, events = counts.incorrect + counts.hallucinated, max(1, counts.n_events)
        if wrong / events > (most if self.max_hall is None else self.max_hall):
            return "too much wrong"
        error = (counts.missed + wrong) / events
        return "too much missed or wrong" if error > (most if self.max_error is None else self.max_error) else ""


class Data(BaseModel):
    """The clips that are captioned and learnt, and those that the student is measured by before and after, if any."""

    model_config = FORBID

    train: Source
    validation: Source | None = None


class RebirthRecipe(Tuning):
    """A run of rebirth tuning; `model` is the student. Without a `teacher` the captions are those that the data has:
    supervised fine-tuning that goes on, the control, or captions that somebody made elsewhere."""

    stage: Literal["rebirth"]
    teacher: str | None = Field(None, description="whose captions are learnt: folder or hub name, or openai:MODEL")
    teacher_base_url: str | None = Field(None, description="the server of an openai:MODEL")
    question: str | None = Field(
        None, description="what the teacher is asked about files; its own question if left out"
    )
    temperature: float = Field(0.0, ge=0, description="that the teacher captions at")
    top_p: float = Field(0.9, gt=0, le=1)
    clips: int | None = Field(None, ge=1, description="how many, the first in a random order; all if left out")
    keep: Keep = Keep()
    qa_weight: float = Field(1.0, ge=0, description="of the answers' mean cross-entropy, where a caption's has 1")
    data: Data

    @model_validator(mode="after")
    def _captions(self) -> RebirthRecipe:
        train, validation = self.data.train, self.data.validation
        if self.teacher is None and isinstance(train, FileData) and train.captions is None:
            raise ValueError("give a teacher, or data.train.captions")
        if isinstance(validation, FileData) and None in (validation.captions, validation.events):
            raise ValueError("data.validation needs captions and events of its videos")
        return self


def run_rebirth(recipe: RebirthRecipe, folder: Path, report: Progress) -> dict[str, Any]:
    """Tune the student on the teacher's captions in `folder`, and leave it in `folder/model`; the figures of the run.

    `report(what, done, total, figures)` tells how far each piece of work is. Raises `KokaneeError` where the folder
    holds a run with other settings, where teacher, clips, judge or captions do not suffice, and where a loss is not
    finite.
    """
    with alone_in(folder) if is_main() else contextlib.nullcontext(), memory_said(LESS):
        run, drafts, tasks = opened(recipe, folder, report)
        validation = recipe.data.validation
        made: dict[str, Any] = {"version": VERSION}
        if validation is not None:
            made["before"] = measured(run, validation, folder / BEFORE, "before, ")
        lessons, made["captions"] = kept(run, tasks, drafts)
        made["training"] = learnt(run, lessons)
        if validation is not None:
            made["after"] = measured(run, validation, folder / AFTER, "after, ")
        there = (folder / MODEL).is_dir() and (folder / FIGURES).is_file()
        if run.team.is_main and not there:
            assert run.adapted is not None
            model = merge(run.adapted)
            Defaults.of(origin(recipe.model)).save(save(model.eval(), run.processor, folder / MODEL))
            write_json(folder / FIGURES, made)
        run.team.wait()
        return made


def opened(
    recipe: RebirthRecipe, folder: Path, report: Progress
) -> tuple[Run[RebirthRecipe], list[dict[str, Any]], list[Task]]:
    """The run with its student and clips, the captions that are there to be learnt, and what they are of; the folder is
    the recipe's from now on."""
    begun = (folder / STATE).is_file()
    if recipe.keep.judged or recipe.data.validation is not None:
        check_server(recipe, begun)
    team = team_of(recipe)
    train, validation = recipe.data.train, recipe.data.validation
    model, processor = model_of(recipe, recipe.model, (train, validation), team)
    check_adapted(recipe, model)

    def clips_here(data: Source, part: Part) -> Clips:
        return clips_of(recipe, folder, model, processor, data, part, judged=part == "validation")

    clips = None if isinstance(train, FileData) else clips_here(train, "train")
    checked = None if validation is None else clips_here(validation, "validation")
    check_exact(recipe, (checked,))
    by_features = recipe.teacher is not None and not isinstance(train, FileData)
    teacher = model_of(recipe, str(recipe.teacher), (train,), team) if by_features else None
    start = start_of(model, processor, {"train": clips, "validation": checked})
    start |= {} if teacher is None else {"teacher": fingerprint(teacher[0])}
    claim(folder, recipe, start, begun=(SHARDS, CAPTIONS, TRAIN, MEDIA, BEFORE), free=FREE, brought=(REPLIES,))
    if team.is_main:
        remove_unfinished(folder)  # only now: the folder is the run's
    team.wait()  # before anybody writes
    if isinstance(train, FileData) and recipe.teacher is not None:
        train = train.model_copy(update={"captions": str(said_of_files(recipe, folder, train, team, report))})
    clips = clips or clips_here(train, "train")
    if not begun:
        check_files(recipe, train, "train", clips)
    run = Run(recipe, folder, model.eval(), processor, clips, checked, team, report)
    numbers = list(range(len(clips)))
    random.Random(f"{recipe.seed}/clips").shuffle(numbers)
    tasks = tasks_for(run, train, "train", numbers[: recipe.clips], f"{recipe.seed}/rebirth")
    drafts = [draft_of(task) for task in tasks] if teacher is None else said_of_world(run, teacher, tasks)
    cast(model, getattr(torch, recipe.dtype))
    return run, drafts, tasks


def draft_of(task: Task) -> dict[str, Any]:
    """The caption that a clip comes with, as one that was made."""
    return {"clip": task.name, "captions": [task.ground_truth], "finished": [task.finished]}


def said_of_world(run: Run[RebirthRecipe], teacher: tuple[Any, Any], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The teacher's captions of clips of the world, which it sees with encoders like the student's."""
    recipe = run.recipe
    clips = WorldClips(*teacher, recipe.data.train, "train")  # pyright: ignore[reportArgumentType]
    writer = Writer(teacher[0].eval(), teacher[1], recipe.caption_batch, run.team)
    decoding = Decoding(recipe.temperature, recipe.top_p, recipe.seed, recipe.max_new_tokens)
    return writer.captions(run.folder / CAPTIONS, clips, tasks, [decoding], 1, told(run, "caption"))


def said_of_files(recipe: RebirthRecipe, folder: Path, data: FileData, team: Team, report: Progress) -> Path:
    """The file of the teacher's captions of all files below `data.videos`. Processes share the files, and each keeps
    records of its own, that grow.

    Raises `KokaneeError` where more files than `data.unreadable` have no caption.
    """
    path = folder / CAPTIONS
    there = team.share([[None]], 0, lambda _: [path.is_file()])[0]  # the main process decides
    if there:
        return path
    files = [hit.path for hit in find([data.videos], recursive=True)[0]]
    here = not (recipe.teacher or "").startswith(OPENAI)
    first, step = (team.state.process_index, team.state.num_processes) if here else (0, 1)
    if here or team.is_main:
        teacher = teacher_of(recipe, device_of(team.state))
        how = {"temperature": recipe.temperature, "top_p": recipe.top_p, "seed": recipe.seed}
        asked = Asking(
            recipe.question,
            decoding=teacher.decoding({**how, "max_new_tokens": recipe.max_new_tokens}),  # pyright: ignore[reportArgumentType]
        )
        mine, done = files[first::step], 0

        def on_record(_: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            report("caption", done, len(mine), {})

        caption_files(teacher, mine, folder / SHARDS / f"{first}.jsonl", asked, recipe.caption_batch, on_record)
    team.wait()
    if team.is_main:
        keep_captions(path, Path(data.videos), sorted((folder / SHARDS).glob("*.jsonl")), data.unreadable)
    team.wait()
    return path


def teacher_of(recipe: RebirthRecipe, device: torch.device) -> FileCaptioner:
    """The teacher, as something that captions files."""
    assert recipe.teacher is not None
    if not recipe.teacher.startswith(OPENAI):
        dtype = None if recipe.dtype == "float32" else torch.bfloat16
        return Captioner.from_pretrained(recipe.teacher, device=device, dtype=dtype)
    name = recipe.teacher.removeprefix(OPENAI)
    if not name:
        raise KokaneeError(f"teacher: {recipe.teacher} names no model. Give {OPENAI}NAME.")
    server = Endpoint(name, recipe.teacher_base_url, concurrency=recipe.caption_batch, timeout_s=TIMEOUT_S)
    return RemoteCaptioner(server)


def keep_captions(path: Path, videos: Path, shards: Sequence[Path], unreadable: float) -> None:
    """Write the captions of several files of records as one, by the names that files have below `videos`."""
    records = [record for shard in shards for record in read_records(shard).values()]
    lost = [record["error"] for record in records if "error" in record]
    if len(lost) > unreadable * len(records):
        raise KokaneeError(
            f"{len(lost)} of {len(records)} files have no caption, such as: {lost[0]} Mend these files and start "
            "again, or begin in another folder, without them or with a higher data.train.unreadable."
        )
    made = [
        {
            "file": Path(record["file"]).relative_to(videos).as_posix(),
            "caption": record["captions"][0]["text"],
            "finished": record["captions"][0]["finished"],
        }
        for record in records
        if "error" not in record
    ]
    write_jsonl(path, sorted(made, key=lambda record: record["file"]))


def kept(
    run: Run[RebirthRecipe], tasks: Sequence[Task], drafts: Sequence[dict[str, Any]]
) -> tuple[list[Lesson], dict[str, Any]]:
    """What is learnt: captions that the recipe's rules keep, with questions; a clip whose caption is not kept is there
    with its questions alone. And figures of the captions."""
    recipe, folder = run.recipe, run.folder
    known = [bool(task.truth.events) for task in tasks]
    world = all(task.truth.facts is not None for task in tasks)
    places = [place for place, events in enumerate(known) if events] if world or recipe.keep.judged else []
    counts: list[Counts | None] = [None] * len(tasks)
    made: dict[str, Any] = {}
    if places:
        some, said = [tasks[place] for place in places], [drafts[place] for place in places]
        judged = verdicts(folder / VERDICTS, run.judge, some, said, run.team, told(run, "judge"), recipe.unjudged)
        for place, verdict in zip(places, judged, strict=True):
            found = verdict["counts"][0]
            counts[place] = None if found is None else Counts(**found)
        made = figures([one for row in zip(said, judged, strict=True) for one in candidates(*row)])
    records, lessons = [], []
    for task, draft, events, count in zip(tasks, drafts, known, counts, strict=True):
        caption, finished = draft["captions"][0], draft["finished"][0]
        why = recipe.keep.reason(caption, finished, events, count)
        records.append({"clip": task.name, "caption": caption, "dropped": why})
        if not why or task.questions:
            said = None if why else caption
            lessons.append(Lesson(task.number, task.name, task.prompt, said, questions=task.questions))
    dropped = Counter(record["dropped"] for record in records if record["dropped"])
    if run.team.is_main:
        write_jsonl(folder / KEPT, records)
    check_enough(len(records) - dropped.total(), recipe, dropped)
    random.Random(f"{recipe.seed}/lessons").shuffle(lessons)
    shares = {"captions": len(records), "kept": len(records) - dropped.total(), "dropped": dict(dropped)}
    return lessons, {**shares, "questions": sum(len(lesson.questions) for lesson in lessons), **made}


def check_enough(n_kept: int, recipe: RebirthRecipe, dropped: Counter[str]) -> None:
    """Raise `KokaneeError` where too few captions are kept for one step and the check of it."""
    wanted = recipe.n_held_out + recipe.batch_size * recipe.processes * recipe.accumulate
    if n_kept >= wanted:
        return
    why = f" ({', '.join(f'{count}: {reason}' for reason, count in dropped.items())})" if dropped else ""
    raise KokaneeError(
        f"{n_kept} captions are kept{why}, but it takes {wanted}: {wanted - recipe.n_held_out} for one step and "
        f"{recipe.n_held_out} to check by (evaluate_batches x batch_size). Begin in another folder with more clips, "
        "smaller batches or other rules (keep)."
    )


def learnt(run: Run[RebirthRecipe], lessons: Sequence[Lesson]) -> dict[str, float]:
    """Train an adapter on the lessons; the last figures. Afterwards the run holds the adapted student."""
    recipe, folder = run.recipe, run.folder
    if (folder / ADAPTER).is_dir():
        run.adapted = load_adapter(run.model, folder / ADAPTER)
        return read_json(folder / TRAINING)
    torch.manual_seed(recipe.seed)
    run.adapted = adapted(run.model, recipe.lora)
    objective = Preferences(
        run.adapted.get_base_model(),  # pyright: ignore[reportArgumentType]
        run.processor,
        run.clips,
        lessons,
        Weights("ce", gt_weight=1.0, qa_weight=recipe.qa_weight),
        held_out=recipe.n_held_out,
        seed=recipe.seed,
    )
    found = run.timed("train", lambda: fit(run, objective, recipe, folder / TRAIN, "train", FREE))
    if run.team.is_main:
        write_json(folder / TRAINING, {**found, "seconds": run.seconds["train"]})
        keep_adapter(run, folder / ADAPTER, recipe.model, "rebirth tuning")
        (folder / TRAIN / CHECKPOINT).unlink(missing_ok=True)
    run.team.wait()
    return read_json(folder / TRAINING)


def measured(run: Run[RebirthRecipe], data: Source, place: Path, label: str) -> dict[str, Any]:
    """How good the student is now, by the validation clips; measured once."""
    path = place / FIGURES
    if not run.team.share([[None]], 0, lambda _: [path.is_file()])[0]:
        found = evaluated(run, data, place, label, run.adapted is not None)
        if run.team.is_main:
            write_json(path, found)
        run.team.wait()
    return read_json(path)


def table(made: dict[str, Any]) -> list[str]:
    """The student before and after as lines of a table: per cent of the validation clips' events, answers and words."""
    lines = [
        "| student | Miss | Incorrect | Hallucinated | Total | repetition | words | Total at temperature 1 | QA |",
        "|---" * 9 + "|",
    ]
    for name in (BEFORE, AFTER):
        if name in made:
            greedy = made[name]["greedy"]
            cells = [greedy[key] for key in ("missed", "incorrect", "hallucinated", "total", "repetition", "words")]
            shown = [*cells, made[name]["sampled"]["total"], made[name]["qa"]]
            lines.append(f"| {name} | {' | '.join('' if value is None else f'{value:.1f}' for value in shown)} |")
    return lines


def kept_line(made: dict[str, Any]) -> str:
    """How many captions were learnt, and why others were not."""
    of = made["captions"]
    why = f" ({', '.join(f'{reason}: {count}' for reason, count in of['dropped'].items())})" if of["dropped"] else ""
    return f"{of['kept']} of {of['captions']} captions kept{why}; {of['questions']} questions"
