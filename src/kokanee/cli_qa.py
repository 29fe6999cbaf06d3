"""`kokanee qa`: questions about videos, open or with options: right answers by kind of question, as a table."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kokanee.cli_caption import (
    NAMED,
    OPENAI,
    Base,
    BaseUrl,
    Device,
    Dtype,
    Set,
    check_model,
    local_captioner,
    remote_captioner,
)
from kokanee.console import bar, counted, key_value, said_when_stopped, say
from kokanee.errors import KokaneeError
from kokanee.formats import check_writable, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kokanee.captions import FileCaptioner
    from kokanee.qa import Accuracy, Answered, Examinee, Lead, Share, Way
    from kokanee.questions import Question, Video

HEAD = "| kind | questions | right % | 95 % interval | chance % |"
NONE = "–"
NEVER_BY_LETTER = ("nano", "nano-sft")
ENOUGH = 10  # videos, to tell how sure a share is


class By(StrEnum):
    auto = "auto"
    answer = "answer"
    text = "text"
    letter = "letter"


def qa(
    questions: Annotated[
        Path,
        typer.Argument(help="Questions in JSON or JSON lines, or a folder of `kokanee world make`."),
    ],
    videos: Annotated[
        Path | None, typer.Option(help="Folder that the videos' names start from; by default that of QUESTIONS.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A folder, a name on the hub, or nano, which knows its own world only; openai:NAME asks a server.",
        ),
    ] = "nano",
    by: Annotated[
        By,
        typer.Option(
            help="answer: what is said is right; text, letter: the right option is the likeliest, its text or its "
            "letter (by letter openai:NAME says it). auto: letter if all questions have options and are not the "
            "world's, else answer."
        ),
    ] = By.auto,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for every answer and scores.json; a stopped run goes on.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that another model's answers to these questions are in: by how much they differ."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions computed together; of openai:NAME under way at a time.")
    ] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many videos.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    base: Base = None,
    base_url: BaseUrl = None,
    set_: Set = None,
) -> None:
    """How many questions about videos a model answers rightly, overall and by kind of question.

    In per cent, with 95 % confidence intervals over videos, of ten or more. Videos that cannot be read are left out
    and counted.
    """
    check_model(model, base_url, device, dtype, base)
    replaced = dict(key_value(item) for item in set_ or [])
    if out is not None:
        check_writable(out / "scores.json")
    from kokanee.questions import LETTERS, by_video, number_of, number_with_times, of_world, read_questions

    asked = read_questions(questions)
    if letters := sum(not question.options and question.answer in set(LETTERS) for question in asked):
        have = "open question has" if letters == 1 else "open questions have"
        say(f'{letters} {have} a single letter for an answer. If there are options, call them "options".')
    folder = videos or (questions if questions.is_dir() else questions.parent)
    chosen = by_video(asked, folder)[:limit]
    from kokanee.qa import askable, default_way
    from kokanee.qa_run import STATE, answered_in

    way = default_way(questions, asked) if by is By.auto else by.value
    kept = askable(chosen, way)
    others = {run.as_posix(): answered_in(run, kept) for run in beside or []}
    for run in beside or []:
        if (way_there := read_json(run / STATE)["way"]) != way:
            say(f"{run} was asked by {way_there}, which is not compared like with like")
    if with_times := number_with_times(questions):
        say(f"{counted(with_times, 'question')} with times (start, end) that are not used: all are about whole videos")
    if model.startswith(OPENAI):
        captioner = remote_captioner(model, base_url, batch_size, replaced)
    else:
        captioner = local_captioner(model, device, dtype, base, replaced)
    if captioner.defaults.note and not of_world(questions):
        say(f"{model}: {captioner.defaults.note}")
    if way == "letter" and model in NEVER_BY_LETTER:
        say(f"{model} has never read a list of options and is at chance by letter; --by text compares the options")
    examinee = examinee_of(captioner, way, batch_size, asked)
    say(f"{model}: {counted(number_of(kept), 'question')} about {counted(len(kept), 'video')}, by {way}")
    if again := asked_again(kept):
        say(f"{counted(again, 'question')} asked more than once about the same video; each counts as often")
    found = marked(captioner.name, examinee, kept, asked, folder, out, others)
    tell(found, number_of(chosen) - number_of(kept), others)


def asked_again(videos: Sequence[Video]) -> int:
    """How many questions, with their options, are there more than once about a video."""
    times = [Counter((one.question, one.options) for one in video.questions) for video in videos]
    return sum(number > 1 for asked in times for number in asked.values())


def examinee_of(captioner: FileCaptioner, way: Way, batch_size: int, asked: Sequence[Question]) -> Examinee:
    """Whoever computes the answers, here or at a server."""
    from kokanee.captioner import Captioner
    from kokanee.qa import ModelExaminee, ServedExaminee, answer_tokens

    if not isinstance(captioner, Captioner):
        return ServedExaminee(captioner, way, batch_size)
    longest = answer_tokens(captioner.processor, asked)
    return ModelExaminee(captioner.model, captioner.processor, way, batch_size, longest)


def marked(
    name: str,
    examinee: Examinee,
    videos: Sequence[Video],
    asked: Sequence[Question],
    folder: Path,
    out: Path | None,
    others: Mapping[str, Sequence[Answered]],
) -> list[Answered]:
    """The videos with their marked questions, kept in `out` with the model's name, and a bar for them."""
    from kokanee.qa_run import run, settings_of

    found: list[Answered] = []
    with bar() as progress:
        task = progress.add_task("videos", total=len(videos))
        if out is not None:
            settings = settings_of(examinee, asked, folder) | {"name": name}
            with said_when_stopped(f"What is done is in {out}; the same command again goes on."):
                return run(out, examinee, videos, settings, lambda done: progress.update(task, completed=done), others)
        for answered in examinee.each(videos):
            found.append(answered)
            progress.update(task, completed=len(found))
    return found


def tell(answered: Sequence[Answered], without_options: int, others: Mapping[str, Sequence[Answered]]) -> None:
    """Print the tables. Raises `KokaneeError` where videos have no answers, so that the exit code says it too."""
    from kokanee.qa import accuracy, beside

    found = accuracy(answered)
    if found.overall.asked:
        lines = table(found, without_options)
        for name, other in others.items():
            lines += ["", *leads(name, beside(answered, other))]
        typer.echo("\n".join(lines))
    unusual = [one for one in answered if one.notes]
    if unusual:
        such = f"such as {unusual[0].video.file}: {'; '.join(unusual[0].notes)}"
        say(f"{counted(len(unusual), 'video')} with something unusual ({such})")
    if found.unread:
        reasons = list(found.unread.values())
        more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
        lost = f"{counted(found.lost, 'question')} left out"
        head = f"{len(reasons)} of {counted(len(answered), 'video')} without answers, and {lost}:"
        raise KokaneeError("\n  ".join([head, *reasons[:NAMED], *more]))


def table(found: Accuracy, without_options: int) -> list[str]:
    """The lines of the table: a kind each, all together, and what is left out."""
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    lines += [row(kind, share) for kind, share in {**found.kinds, "overall": found.overall}.items()]
    left_out = {
        "left out: no options": without_options,
        f"left out: videos without answers ({len(found.unread)})": found.lost,
    }
    return lines + [f"| {why} | {count} | {NONE} | {NONE} | {NONE} |" for why, count in left_out.items() if count]


def row(name: str, share: Share) -> str:
    """One line of the table."""
    low, high = share.interval
    interval = f"{low:.1f} to {high:.1f}" if share.files >= ENOUGH else NONE
    chance = NONE if share.chance is None else f"{share.chance:.1f}"
    return f"| {name} | {share.asked} | {share.percent:.1f} | {interval} | {chance} |"


def leads(name: str, found: Mapping[str, Lead]) -> list[str]:
    """The lines of the table beside another run: how many points more are right, of the questions of both."""
    head = f"| points more than {name} | questions | right | 95 % interval |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for kind, lead in found.items():
        low, high = lead.interval
        interval = f"{low:+.1f} to {high:+.1f}" if lead.files >= ENOUGH else NONE
        lines.append(f"| {kind} | {lead.asked} | {lead.more:+.1f} | {interval} |")
    return lines
