"""What runs do with an adapter: put it onto a model, train it on lessons, keep it, and measure the model by validation
clips."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from kokanee.adapters import wrapped
from kokanee.captions import Decoding
from kokanee.clips import Task
from kokanee.drafts import candidates, figures, verdicts
from kokanee.errors import KokaneeError
from kokanee.formats import UNFINISHED, write_text
from kokanee.model import Kokanee
from kokanee.preferences import Lesson, Preferences, Weights
from kokanee.prefix import branch_attention_in
from kokanee.runs import Run, defaults_of, tasks_for, told
from kokanee.train import train
from kokanee.tuning import Lora, Source, Tuning

logger = logging.getLogger("kokanee")
GREEDY, SAMPLED = "validation", "validation-sampled"
OF_HELD_OUT = "of a file that is held out"


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


def apart(run: Run[Any], lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons, in front as many as are held out, of the first files; none of the others is of one of these files.

    Of the last of them what is too much is left out. Where each lesson is of another file, all stay as they are.
    """
    wanted = run.recipe.n_held_out
    of_file: dict[str, list[Lesson]] = {}
    for lesson in lessons:
        of_file.setdefault(run.clips.origin(lesson.number), []).append(lesson)
    checked: list[Lesson] = []
    files: set[str] = set()
    for file, some in of_file.items():
        if len(checked) < wanted:
            checked += some
            files.add(file)
    rest = [lesson for lesson in lessons if run.clips.origin(lesson.number) not in files]
    found = checked[:wanted] + rest
    if len(found) < len(lessons) and run.team.is_main:
        lost, total = len(lessons) - len(found), len(lessons)
        logger.warning("%d of %d clips are not learnt: their files are held out, to check by", lost, total)
    return found


def fit(
    run: Run[Any],
    objective: Preferences,
    settings: Tuning,
    folder: Path,
    what: str,
    free: Sequence[str],
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train the adapter of the objective's model in `folder`; the last figures. `before` is called with the model as it
    is trained."""
    model = objective.model
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    weights = {}
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            weights[name] = parameter
    with branch_attention_in(model):
        before()
        found = train(
            objective,
            settings,
            folder,
            weights,
            lambda step, said: run.report(what, step, settings.steps, said),
            free=free,
        )
    model.eval()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_disable()
    return found


def keep_adapter(run: Run[Any], folder: Path, base: str, made_by: str) -> None:
    """Write the run's adapter into `folder`, whole or not at all, with the base that it belongs to."""
    assert run.adapted is not None
    unfinished = folder.parent / f".{folder.name}{UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)
    run.adapted.peft_config["default"].base_model_name_or_path = base
    run.adapted.save_pretrained(str(unfinished), save_embedding_layers=False)  # "auto" would ask the hub for the base
    defaults_of(run.recipe, run.recipe.data.train).save(unfinished)
    write_text(unfinished / "README.md", f"Adapter of {made_by} (Kokanee). Its base is {base}.\n")
    unfinished.rename(folder)


def evaluated(run: Run[Any], data: Source, place: Path, label: str, moved: bool) -> dict[str, Any]:
    """How good the model is: validation clips captioned greedily and at temperature 1, judged; questions answered; and
    where it has `moved` how far, in nats a caption: KL from the model without the adapter. Captions and verdicts are
    kept in `place`; `data`: the settings that the clips are of."""
    recipe, clips, made = run.recipe, run.validation, {}
    assert clips is not None
    numbers = range(min(recipe.validation_clips, len(clips)))
    tasks = tasks_for(run, data, "validation", numbers, "validation", place)
    made["clips"] = len(tasks)
    limits = {"seed": recipe.seed, "max_new_tokens": recipe.max_new_tokens}
    greedy = Decoding(repetition_penalty=defaults_of(recipe, data).repetition_penalty, **limits)  # as it is used
    sampled = Decoding(temperature=1.0, top_p=1.0, **limits)  # as it is
    for name, file, decoding in (("greedy", GREEDY, greedy), ("sampled", SAMPLED, sampled)):
        written = told(run, f"{label}check, {name}")
        drafts = run.writer.captions(place / f"{file}.jsonl", clips, tasks, [decoding], 1, written)
        path, read = place / f"{file}-verdicts.jsonl", told(run, f"{label}judge, {name}")
        judged = verdicts(path, run.judge, tasks, drafts, run.team, read, recipe.unjudged)
        rows = [candidates(*row) for row in zip(drafts, judged, strict=True)]
        judged_ones = [one for row in rows for one in row]
        if not judged_ones:
            raise KokaneeError(
                f"None of {len(drafts)} captions of the validation clips has a verdict, so nothing can be measured. "
                "Begin in another folder, with more validation clips or another judge."
            )
        made[name] = {**figures(judged_ones), "unjudged": len(drafts) - len(judged_ones)}
        if name == "sampled" and run.adapted is not None and moved:
            made["kl"] = divergence(run, tasks, drafts)
    made["qa"] = run.writer.right_answers(clips, tasks)
    return made


def divergence(run: Run[Any], tasks: Sequence[Task], drafts: Sequence[dict[str, Any]]) -> float:
    """The mean log-probability of the model's own captions, less that under the model without the adapter."""
    lessons = []
    for task, draft in zip(tasks, drafts, strict=True):
        (text,), (finished,) = draft["captions"], draft["finished"]
        lessons.append(Lesson(task.number, task.name, task.prompt, text, cut_off=() if finished else (text,)))
    assert run.adapted is not None and run.validation is not None
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
