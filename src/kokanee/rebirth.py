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
from accelerate.utils import gather_object
from pydantic import BaseModel, Field, model_validator

from kokanee.adapters import load_adapter, merge
from kokanee.adapting import OF_HELD_OUT, adapted, apart, evaluated, fit, keep_adapter
from kokanee.caption_run import Task as Asking
from kokanee.captions import Decoding, FileCaptioner
from kokanee.checkpoints import save
from kokanee.clips import Clips, FileData, Task, WorldClips, questions_of
from kokanee.conversations import digest
from kokanee.drafts import Team, Writer, candidates, device_of, figures, verdicts
from kokanee.errors import KokaneeError, memory_said
from kokanee.events import Counts, repetition_rate, word_count
from kokanee.formats import alone_in, read_json, remove_unfinished, write_json, write_jsonl
from kokanee.ground_truth import read_ground_truth
from kokanee.launch import is_main
from kokanee.preferences import Lesson, Preferences, Weights
from kokanee.questions import read_questions
from kokanee.runs import (
    MEDIA,
    REPLIES,
    Part,
    Progress,
    Run,
    check_adapted,
    check_apart,
    check_exact,
    check_files,
    check_server,
    clips_of,
    defaults_of,
    folder_of,
    model_of,
    start_of,
    tasks_for,
    team_of,
    told,
)
from kokanee.teaching import (
    CAPTIONS,
    SHARDS,
    Teaching,
    enough,
    is_remote,
    keep_captions,
    said_of_files,
    server_of,
    teacher_of,
    videos_in,
)
from kokanee.train import CHECKPOINT, LESS, claim, is_begun
from kokanee.tuning import FORBID, FREE, Source, Tuning
from kokanee.weights import cast, fingerprint

VERSION = 1
VERDICTS, KEPT = "verdicts.jsonl", "kept.jsonl"
TRAIN, TRAINING, ADAPTER, BEFORE, AFTER = "train", "training.json", "adapter", "before", "after"
FIGURES, MODEL = "metrics.json", "model"


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
        n_words, most = word_count(caption), float("inf")
        if not finished and not self.cut_off:
            return "cut off"
        if n_words < self.min_words:
            return "too short"
        if n_words > (self.max_words or most):
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
    teaching: Teaching = Teaching()
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
    def _fitting(self) -> RebirthRecipe:
        train, validation = self.data.train, self.data.validation
        if isinstance(validation, FileData) and None in (validation.captions, validation.events):
            raise ValueError("data.validation needs captions and events of its videos")
        if not isinstance(train, FileData):
            if self.question is not None or self.teaching != Teaching() or is_remote(self.teacher or ""):
                raise ValueError(
                    "question, teaching and a teacher openai:MODEL are for files, not for the world's clips"
                )
            return self
        if (self.teacher is None) == (train.captions is None):
            raise ValueError("give either a teacher, or data.train.captions")
        if self.keep.judged and (train.events is None or self.judge == "exact"):
            raise ValueError(
                "keep.max_error and keep.max_hall need data.train.events and a judge openai:MODEL for files"
            )
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
            defaults_of(recipe, recipe.data.train).save(save(model.eval(), run.processor, folder / MODEL))
            write_json(folder / FIGURES, made)
        run.team.wait()
        return made


def opened(
    recipe: RebirthRecipe, folder: Path, report: Progress
) -> tuple[Run[RebirthRecipe], list[dict[str, Any]], list[Task]]:
    """The run with its student and clips, the captions that are there to be learnt, and what they are of; the folder is
    the recipe's from now on."""
    begins = (SHARDS, CAPTIONS, VERDICTS, KEPT, TRAIN, MEDIA, BEFORE)
    begun = is_begun(folder, begins)
    if recipe.keep.judged or recipe.data.validation is not None:
        check_server(recipe, begun)
    team = team_of(recipe)
    train, validation = recipe.data.train, recipe.data.validation
    by_files = isinstance(train, FileData) and recipe.teacher is not None
    device = torch.device("cpu") if by_files else device_of(team.state)  # the teacher needs the room
    model, processor = model_of(recipe, recipe.model, (train, validation), device)
    check_adapted(recipe, model)

    def clips_here(data: Source, part: Part) -> Clips:
        return clips_of(recipe, folder, model, processor, data, part, judged=part == "validation")

    checked = None if validation is None else clips_here(validation, "validation")
    check_exact(recipe, (checked,))
    clips = None if by_files else clips_here(train, "train")
    files = videos_of(recipe, train, checked) if isinstance(train, FileData) and by_files else []
    if clips is not None:
        check_clips(len(clips), recipe)
        if checked is not None and not begun:
            check_apart(clips, checked)
    seen = recipe.teacher is not None and not by_files
    teacher = model_of(recipe, str(recipe.teacher), (train,), device) if seen else None
    start = start_of(model, processor, {"train": clips, "validation": checked})
    start |= {} if teacher is None else {"teacher": fingerprint(teacher[0])}
    start |= known_of_files(train, files) if isinstance(train, FileData) and by_files else {}
    claim(folder, recipe, start, begun=begins, free=FREE, brought=(REPLIES,))
    team.wait()  # nobody is writing the state any more
    if team.is_main:
        remove_unfinished(folder)  # only now: the folder is the run's
    team.wait()  # before anybody writes
    if isinstance(train, FileData) and by_files:
        train = taught(recipe, train, files, folder, team, report)
        moved: Any = model
        moved.to(device_of(team.state))
    clips = clips_here(train, "train") if clips is None else clips
    if not begun:
        check_files(recipe, train, "train", clips)
    cast(model, getattr(torch, recipe.dtype))
    run = Run(recipe, folder, model.eval(), processor, clips, checked, team, report)
    numbers = list(range(len(clips)))
    random.Random(f"{recipe.seed}/clips").shuffle(numbers)
    trained = (folder / ADAPTER).is_dir()
    tasks = tasks_for(run, train, "train", numbers[: recipe.clips], f"{recipe.seed}/rebirth", folder, trained)
    drafts = [draft_of(task) for task in tasks] if teacher is None else said_of_world(run, teacher, tasks)
    return run, drafts, tasks


def videos_of(recipe: RebirthRecipe, data: FileData, checked: Clips | None) -> list[Path]:
    """The files that the teacher captions: all below the folder that the student is not measured by, or so many of
    them. Raises `KokaneeError` where they, their events or questions will not do, before anything is paid for."""
    files = videos_in(Path(data.videos), [] if checked is None else checked.files())
    random.Random(f"{recipe.seed}/files").shuffle(files)
    check_clips(len(files), recipe)
    files = sorted(files[: recipe.clips])
    if data.events:
        read_ground_truth(Path(data.events))
    if data.questions:
        questions_of(Path(data.questions), Path(data.videos), {path.as_posix(): path for path in files})
    if is_remote(str(recipe.teacher)):
        server_of(str(recipe.teacher), recipe.teaching).check_reachable()
    else:
        folder_of("teacher", str(recipe.teacher))
    return files


def known_of_files(data: FileData, files: Sequence[Path]) -> dict[str, str]:
    """Which files a teacher captions, and what is known of them, as fingerprints."""
    found = {"videos": digest([path.as_posix() for path in files])}
    found |= {"events": digest(read_ground_truth(Path(data.events)).truths)} if data.events else {}
    return found | ({"questions": digest(read_questions(Path(data.questions)))} if data.questions else {})


def taught(
    recipe: RebirthRecipe, data: FileData, files: Sequence[Path], folder: Path, team: Team, report: Progress
) -> FileData:
    """The same data with the teacher's captions of these files, which are made where they are not there yet."""
    learning = (folder / MEDIA / "train").is_dir()  # from then on clips are known by their places in the captions
    there = learning or enough(folder, files, data.unreadable)
    if not gather_object([there])[0]:  # the main process decides
        dtype, alone = getattr(torch, recipe.dtype), is_remote(str(recipe.teacher))

        def asking(teacher: FileCaptioner) -> Asking:
            how = {"temperature": recipe.temperature, "top_p": recipe.top_p, "seed": recipe.seed}
            decoding = teacher.decoding({**how, "max_new_tokens": recipe.max_new_tokens})  # pyright: ignore[reportArgumentType]
            return Asking(recipe.question, use=recipe.teaching.use, decoding=decoding)

        said_of_files(
            lambda: teacher_of(str(recipe.teacher), recipe.teaching, device_of(team.state), dtype),
            asking,
            files,
            folder,
            team,
            alone,
            recipe.teaching.concurrency if alone else recipe.caption_batch,
            lambda done, total: report("caption", done, total, {}),
        )
        if team.is_main:
            keep_captions(folder, files, Path(data.videos), data.unreadable)
        team.wait()
    return data.model_copy(update={"captions": str(folder / CAPTIONS)})


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


def kept(
    run: Run[RebirthRecipe], tasks: Sequence[Task], drafts: Sequence[dict[str, Any]]
) -> tuple[list[Lesson], dict[str, Any]]:
    """What is learnt: captions that the recipe's rules keep, with questions; a clip whose caption is not kept is there
    with its questions alone. And figures of the captions."""
    recipe, folder = run.recipe, run.folder
    known = [bool(task.truth.events) for task in tasks]
    if recipe.keep.judged and not any(known):
        raise KokaneeError("None of the clips has events to judge captions by. Give data.train.events of these files.")
    exact = recipe.judge == "exact" and all(task.truth.facts is not None for task in tasks)
    places = [place for place, events in enumerate(known) if events] if exact or recipe.keep.judged else []
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
            cut_off = () if finished or said is None else (said,)
            lessons.append(Lesson(task.number, task.name, task.prompt, said, (), task.questions, cut_off))
    dropped = Counter(record["dropped"] for record in records if record["dropped"])
    if run.team.is_main:
        write_jsonl(folder / KEPT, records)
    check_enough(len(records) - dropped.total(), recipe, dropped)
    random.Random(f"{recipe.seed}/lessons").shuffle(lessons)
    left = apart(run, lessons)
    if len(left) < len(lessons):
        check_enough(len(left), recipe, dropped | Counter({OF_HELD_OUT: len(lessons) - len(left)}))
    shares = {"captions": len(records), "kept": len(records) - dropped.total(), "dropped": dict(dropped)}
    return left, {**shares, "questions": sum(len(lesson.questions) for lesson in left), **made}


def check_clips(there: int, recipe: RebirthRecipe) -> None:
    """Raise `KokaneeError` where there are fewer clips than the recipe says, or than one step takes."""
    if recipe.clips is not None and recipe.clips > there:
        raise KokaneeError(f"clips: {recipe.clips}, but there are {there}. Lower it, or give more clips.")
    check_enough(recipe.clips or there, recipe)


def check_enough(count: int, recipe: RebirthRecipe, dropped: Counter[str] | None = None) -> None:
    """Raise `KokaneeError` where too few captions are kept for one step and the check of it; dropped: why others were
    not, None before there are any."""
    wanted = recipe.n_held_out + recipe.batch_size * recipe.processes * recipe.accumulate
    if count >= wanted:
        return
    why = ", ".join(f"{number}: {reason}" for reason, number in (dropped or {}).items())
    head = f"{count} captions are kept ({why})" if dropped else f"There are {count} clips"
    remedy = "Give more clips or smaller batches."
    if dropped is not None:
        remedy = "Begin in another folder with more clips, smaller batches or other rules (keep)."
    raise KokaneeError(
        f"{head}, but it takes {wanted}: {wanted - recipe.n_held_out} for one step and {recipe.n_held_out} to check by "
        f"(evaluate_batches x batch_size). {remedy}"
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
    if not gather_object([path.is_file()])[0]:
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
