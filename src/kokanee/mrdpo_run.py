"""A run of mrDPO under way: its recipe, folder, model and clips, and what is checked before anything is paid for."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftModel

from kokanee.checkpoints import load
from kokanee.clips import Clips, FileClips, FileData, Task, WorldClips, WorldData
from kokanee.defaults import Defaults, origin
from kokanee.drafts import Team, Writer, device_of
from kokanee.endpoint import Asker, Endpoint
from kokanee.errors import KokaneeError
from kokanee.formats import remove_unfinished
from kokanee.judges import LanguageModelJudge
from kokanee.model import Kokanee
from kokanee.mrdpo_recipe import FREE, MrdpoRecipe
from kokanee.preferences import WITH_PAIRS
from kokanee.processor import Processor
from kokanee.scoring import ExactJudge, Judge, ModelJudge
from kokanee.stages import fingerprint_of
from kokanee.train import STATE, claim
from kokanee.weights import cast, fingerprint

REPLIES, MEDIA = "replies.jsonl", "media"
Progress = Callable[[str, int, int, dict[str, float]], None]
Part = Literal["train", "validation"]


@dataclass
class Run:
    """A run under way. `model` is merged up to the last round; `adapted` is the same with an adapter not merged yet."""

    recipe: MrdpoRecipe
    folder: Path
    model: Kokanee
    processor: Processor
    clips: Clips
    validation: Clips
    team: Team
    report: Progress
    adapted: PeftModel | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def writer(self) -> Writer:
        return Writer(self.model, self.processor, self.recipe.caption_batch, self.team)

    def place(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}"

    def judge(self) -> Judge:
        return judge_of(self.recipe, self.folder / REPLIES)

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        made = work()
        self.seconds[name] = round(time.monotonic() - started, 1)
        return made


def opened(recipe: MrdpoRecipe, folder: Path, report: Progress) -> Run:
    """The run with its model and clips; the folder is the recipe's from now on."""
    state = PartialState(cpu=recipe.device == "cpu", timeout=datetime.timedelta(days=7))
    begun = (folder / STATE).is_file()
    check_recipe(recipe, state.num_processes, begun)
    sources = (recipe.data.train, recipe.data.validation)
    # Features of the world are known by the weights that made them, which are those in float32.
    precise = any(isinstance(data, WorldData) for data in sources)
    model, processor = load(recipe.model, dtype="float32" if precise else recipe.dtype, device=device_of(state))
    question = Defaults.of(origin(recipe.model)).question

    def clips_of(data: WorldData | FileData, part: Part) -> Clips:
        if isinstance(data, WorldData):
            return WorldClips(model, processor, data, part)
        return FileClips(model, processor, data, folder / MEDIA / part, question)

    clips, validation = clips_of(sources[0], "train"), clips_of(sources[1], "validation")
    cast(model, getattr(torch, recipe.dtype))
    run = Run(recipe, folder, model.eval(), processor, clips, validation, Team(state), report)
    start = {
        "weights": fingerprint(model),
        "processor": fingerprint_of(processor),
        "train clips": clips.identity(),
        "validation clips": validation.identity(),
    }
    check_clips(run, begun)
    claim(folder, recipe, start, begun=(run.place(0).name, MEDIA), free=FREE, brought=(REPLIES,))
    if run.team.is_main:
        remove_unfinished(folder)  # only now: the folder is the run's
    run.team.wait()  # before anybody writes
    return run


def check_recipe(recipe: MrdpoRecipe, processes: int, begun: bool) -> None:
    """Raise `KokaneeError` for what cannot work, before anything is sampled or paid for."""
    endpoint = endpoint_of(recipe)
    if endpoint is not None and not begun:
        endpoint.check_reachable()
    if processes != recipe.processes:
        raise KokaneeError(
            f"The recipe is for processes: {recipe.processes}, but {processes} run. Start it with "
            f"torchrun --nproc-per-node {recipe.processes}, or change the recipe."
        )
    if recipe.loss in WITH_PAIRS and recipe.samples * len(recipe.temperatures) < 2:
        raise KokaneeError("samples: 1 at one temperature gives no pairs. Give 2 or more samples.")


def check_clips(run: Run, begun: bool) -> None:
    """Raise `KokaneeError` where clips, judge or adapter do not fit together."""
    recipe = run.recipe
    if recipe.clips > len(run.clips):
        raise KokaneeError(
            f"clips: {recipe.clips} in a round, but there are {len(run.clips)}. Lower it, or give more clips."
        )
    check_enough(recipe.clips, recipe)
    if not begun:
        check_files(recipe, "train", run.clips)
        check_files(recipe, "validation", run.validation)
    if recipe.judge == "exact":
        some = [clips.task(0, 0, "").truth for clips in (run.clips, run.validation)]
        if any(truth.facts is None for truth in some):
            raise KokaneeError("The exact judge knows clips of the world only. Give judge: openai:MODEL.")
    modules = run.model.language_model.named_modules()
    products = {name.rpartition(".")[2]: None for name, module in modules if isinstance(module, torch.nn.Linear)}
    unknown = [module for module in recipe.lora.modules if module not in products]
    if unknown:
        raise KokaneeError(f"lora.modules: {', '.join(unknown)} cannot be adapted. Give some of {', '.join(products)}.")


def check_files(recipe: MrdpoRecipe, part: Part, clips: Clips) -> None:
    """Raise `KokaneeError` where more files are not there than may be unreadable."""
    files = clips.files()
    gone = [path for path in files if not path.is_file()]
    if len(gone) > allowed(recipe, part) * len(files):
        raise KokaneeError(
            f"data.{part}: {len(gone)} of {len(files)} files are not there, such as {gone[0]}. "
            f"Check data.{part}.videos, the folder that their names start from."
        )


def judge_of(recipe: MrdpoRecipe, replies: Path) -> Judge:
    """The judge that the recipe names; its replies are kept in `replies`."""
    endpoint = endpoint_of(recipe)
    return ExactJudge() if endpoint is None else ModelJudge(LanguageModelJudge(Asker(endpoint, replies)))


def endpoint_of(recipe: MrdpoRecipe) -> Endpoint | None:
    """Where the language model that judges is asked, None for the exact judge. Raises `KokaneeError` for no judge."""
    kind, _, name = recipe.judge.partition(":")
    if recipe.judge == "exact":
        return None
    if kind != "openai" or not name:
        raise KokaneeError(f"There is no judge {recipe.judge!r}. Give exact or openai:MODEL.")
    return Endpoint(name, **recipe.judging.model_dump())


def told(run: Run, what: str, number: int) -> Callable[[int, int], None]:
    """Reports of a piece of a round's work."""
    return lambda done, total: run.report(f"round {number}, {what}", done, total, {})


def tasks_for(run: Run, part: Part, numbers: Sequence[int], key: str) -> list[Task]:
    """Tasks of the clips of these numbers that can be read, by length.

    Raises `KokaneeError` where more of them cannot be read than the recipe allows.
    """
    state, clips = run.team.state, run.clips if part == "train" else run.validation
    clips.readable(
        numbers, lambda done, total: run.report("read", done, total, {}), (state.process_index, state.num_processes)
    )
    run.team.wait()
    failed = clips.failed()
    lost = [number for number in numbers if number in failed]
    if len(lost) > allowed(run.recipe, part) * len(numbers):
        run.team.wait()
        clips.try_again()
        raise KokaneeError(
            f"{len(lost)} of {len(numbers)} files cannot be read, such as: {failed[lost[0]]} Mend these files and "
            f"start again, or begin in another folder, without them or with a higher data.{part}.unreadable."
        )
    left = sorted((number for number in numbers if number not in failed), key=lambda n: (clips.n_tokens(n), n))
    return [clips.task(number, run.recipe.questions, key) for number in left]


def allowed(recipe: MrdpoRecipe, part: Part) -> float:
    """The largest share of clips that may be left out as unreadable."""
    data = recipe.data.train if part == "train" else recipe.data.validation
    return data.unreadable if isinstance(data, FileData) else 0.0


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
