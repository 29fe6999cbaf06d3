"""A run that tunes a model on judged captions: its recipe, folder, model and clips, and what is checked before anything
is paid for."""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from accelerate import PartialState
from peft import PeftModel

from kokanee.checkpoints import load, locate
from kokanee.clips import Clips, FileClips, FileData, Task, WorldClips, WorldData
from kokanee.defaults import Defaults, origin
from kokanee.drafts import Team, Writer
from kokanee.endpoint import Asker, Endpoint
from kokanee.errors import KokaneeError
from kokanee.formats import read_json, write_json
from kokanee.judges import LanguageModelJudge
from kokanee.launch import check_gpu, is_main
from kokanee.model import Kokanee
from kokanee.processor import Processor
from kokanee.scoring import ExactJudge, Judge, ModelJudge
from kokanee.stages import fingerprint_of
from kokanee.tuning import Source, Tuning
from kokanee.weights import fingerprint

logger = logging.getLogger("kokanee")
VERSION = 1
REPLIES, MEDIA = "replies.jsonl", "media"
BEGUN_WITH = "{}-clips.json"  # which clips in files are learnt from or measured by
SHARED_OUT = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
Progress = Callable[[str, int, int, dict[str, float]], None]
Part = Literal["train", "validation"]
Settings = TypeVar("Settings", bound=Tuning)


@dataclass
class Run(Generic[Settings]):
    """A run under way. `adapted` is `model` with an adapter that is not merged yet."""

    recipe: Settings
    folder: Path
    model: Kokanee
    processor: Processor
    clips: Clips
    validation: Clips | None
    team: Team
    report: Progress
    adapted: PeftModel | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def writer(self) -> Writer:
        return Writer(self.model, self.processor, self.recipe.caption_batch, self.team)

    def judge(self) -> Judge:
        return judge_of(self.recipe, self.folder / REPLIES)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        made = work()
        self.seconds[name] = round(time.monotonic() - started, 1)
        return made


def team_of(recipe: Tuning) -> Team:
    """The processes of a run, each of which holds the whole model.

    Raises `KokaneeError` where they are more or fewer than the recipe says, and where accelerate is to share the model
    out.
    """
    if any(os.environ.get(name) == "true" for name in SHARED_OUT):
        raise KokaneeError("Training shares clips among processes, not the model. Start it without FSDP and DeepSpeed.")
    check_gpu(recipe.device)
    state = PartialState(cpu=recipe.device == "cpu", timeout=datetime.timedelta(days=7))
    state.wait_for_everyone()  # until all are connected: one that stopped before would be another's error
    if state.num_processes != recipe.processes:
        raise KokaneeError(
            f"The recipe is for processes: {recipe.processes}, but {state.num_processes} run. Start it with "
            f"torchrun --nproc-per-node {recipe.processes}, or change the recipe."
        )
    return Team(state)


def model_of(
    recipe: Tuning, name: str, sources: Sequence[Source | None], device: torch.device
) -> tuple[Kokanee, Processor]:
    """A model of the run, to read clips of these kinds. Raises `KokaneeError` where the recipe replaces settings of the
    processor and clips are features, which were made with others."""
    # Features of the world are known by the weights that made them, which are those in float32.
    precise = any(isinstance(data, WorldData) for data in sources)
    if precise and recipe.processor:
        raise KokaneeError(
            "processor: features of the world's clips were made with the model's own settings. Leave processor out."
        )
    here = folder_of("model" if name == recipe.model else "teacher", name)
    return load(here, dtype="float32" if precise else recipe.dtype, device=device, **recipe.processor)


def folder_of(setting: str, name: str) -> Path:
    """The folder of the model that a setting names. Raises `KokaneeError` that names the setting as well."""
    try:
        return locate(name)
    except KokaneeError as error:
        raise KokaneeError(f"{setting}: {error}") from error


def defaults_of(recipe: Tuning, train: Source) -> Defaults:
    """The defaults of the trained model: those it began with, but for a note, which says nothing of whoever has learnt
    from files."""
    found = Defaults.of(origin(recipe.model))
    return replace(found, note="") if isinstance(train, FileData) else found


def clips_of(
    recipe: Tuning,
    folder: Path,
    model: Kokanee,
    processor: Processor,
    data: Source,
    part: Part,
    judged: bool = True,
) -> Clips:
    """The clips that settings are of, as the recipe's model sees them; `judged`: files without events are an error."""
    if isinstance(data, WorldData):
        return WorldClips(model, processor, data, part)
    question = Defaults.of(origin(recipe.model)).question
    clips = FileClips(model, processor, data, folder / MEDIA / part, question, judged)
    others = clips.asked_of_others
    if others and is_main():
        logger.warning(
            "data.%s: %d questions of %s are about no clip of it, such as one about %s, and are left out",
            part,
            len(others),
            data.questions,
            others[0].file,
        )
    return clips


def start_of(model: Kokanee, processor: Processor, clips: dict[Part, Clips | None]) -> dict[str, str]:
    """What a run starts from, as fingerprints; of clips, of those that are known."""
    start = {"weights": fingerprint(model), "processor": fingerprint_of(processor)}
    return start | {f"{part} clips": found.identity() for part, found in clips.items() if found is not None}


def check_server(recipe: Tuning, begun: bool) -> None:
    """Raise `KokaneeError` where the judge cannot be reached, before anything is sampled or paid for."""
    endpoint = endpoint_of(recipe)
    if endpoint is not None and not begun:
        endpoint.check_reachable()


def check_exact(recipe: Tuning, clips: Sequence[Clips | None]) -> None:
    """Raise `KokaneeError` where the exact judge is to judge clips that it knows nothing of."""
    if recipe.judge == "exact" and any(found and found.task(0, 0, "").truth.facts is None for found in clips):
        raise KokaneeError("The exact judge knows clips of the world only. Give judge: openai:MODEL.")


def check_adapted(recipe: Tuning, model: Kokanee) -> None:
    """Raise `KokaneeError` where the recipe's adapter is on parts that the model has not."""
    modules = model.language_model.named_modules()
    products = {name.rpartition(".")[2]: None for name, module in modules if isinstance(module, torch.nn.Linear)}
    unknown = [module for module in recipe.lora.modules if module not in products]
    if unknown:
        raise KokaneeError(f"lora.modules: {', '.join(unknown)} cannot be adapted. Give some of {', '.join(products)}.")


def check_files(recipe: Tuning, data: Source, part: Part, clips: Clips) -> None:
    """Raise `KokaneeError` where more files are not there than may be unreadable."""
    files = clips.files()
    gone = [path for path in files if not path.is_file()]
    if len(gone) > recipe.unreadable(data) * len(files):
        raise KokaneeError(
            f"data.{part}: {len(gone)} of {len(files)} files are not there, such as {gone[0]}. "
            f"Check data.{part}.videos, the folder that their names start from."
        )


def check_apart(clips: Clips, validation: Clips) -> None:
    """Raise `KokaneeError` where files that are learnt from are among those to be measured by."""
    measured = {path.resolve() for path in validation.files()}
    both = [path for path in clips.files() if path.resolve() in measured]
    if both:
        raise KokaneeError(
            f"{len(both)} of {len(clips.files())} files of data.train are in data.validation too, such as {both[0]}: "
            "the model would be measured by what it has learnt. Take their captions out of one of the two."
        )


def judge_of(recipe: Tuning, replies: Path) -> Judge:
    """The judge that the recipe names; its replies are kept in `replies`."""
    endpoint = endpoint_of(recipe)
    return ExactJudge() if endpoint is None else ModelJudge(LanguageModelJudge(Asker(endpoint, replies)))


def endpoint_of(recipe: Tuning) -> Endpoint | None:
    """Where the language model that judges is asked, None for the exact judge. Raises `KokaneeError` for no judge."""
    kind, _, name = recipe.judge.partition(":")
    if recipe.judge == "exact":
        return None
    if kind != "openai" or not name:
        raise KokaneeError(f"There is no judge {recipe.judge!r}. Give exact or openai:MODEL.")
    return Endpoint(name, **recipe.judging.model_dump())


def told(run: Run[Any], what: str) -> Callable[[int, int], None]:
    """Reports of a piece of work."""
    return lambda done, total: run.report(what, done, total, {})


def tasks_for(
    run: Run[Any], data: Source, part: Part, numbers: Sequence[int], key: str, place: Path, learnt: bool = False
) -> list[Task]:
    """Tasks of the clips of these numbers that can be read, by length; `data`: the settings that the clips are of.

    Those in files stay the same in `place`, in their order, whatever is mended or replaced meanwhile; they are not read
    again where they are `learnt`. Raises `KokaneeError` where more of them cannot be read than the recipe allows, or
    one of those that were there.
    """
    state, clips = run.team.state, run.clips if part == "train" else run.validation
    assert clips is not None
    path = place / BEGUN_WITH.format(part)
    begun = path.is_file()
    numbers = read_json(path)["clips"] if begun else numbers
    if begun and learnt:
        return [clips.task(number, run.recipe.questions, key) for number in numbers]
    run.team.wait()  # all have looked
    if run.team.is_main:
        clips.try_again(memory=True)
    run.team.wait()
    clips.readable(numbers, told(run, "read"), (state.process_index, state.num_processes))
    run.team.wait()
    failed = clips.failed()
    lost = [failed[number] for number in numbers if number in failed]
    allowed = 0.0 if begun else run.recipe.unreadable(data) * len(numbers)
    if len(lost) > allowed:
        run.team.wait()
        clips.try_again()
        raise unreadable(lost, len(numbers), part, begun)
    if lost and run.team.is_main:
        counts = (len(lost), len(numbers))
        where = run.folder / MEDIA / part
        logger.warning("%d of %d files cannot be read and are left out, such as: %s (all: %s)", *counts, lost[0], where)
    if not begun:
        numbers = sorted((number for number in numbers if number not in failed), key=lambda n: (clips.n_tokens(n), n))
        if run.team.is_main and isinstance(clips, FileClips):
            write_json(path, {"version": VERSION, "clips": numbers})
    return [clips.task(number, run.recipe.questions, key) for number in numbers]


def unreadable(reasons: Sequence[str], total: int, part: Part, begun: bool) -> KokaneeError:
    """What is wrong where so many of the files cannot be read, or any of those that were there when it had begun."""
    head = f"{len(reasons)} of {total} files cannot be read, such as: {reasons[0]}"
    if begun:
        return KokaneeError(f"{head} This part of the run has begun with them. Put back what was there.")
    return KokaneeError(
        f"{head} Mend these files, or allow for more with a higher data.{part}.unreadable, and start again."
    )
