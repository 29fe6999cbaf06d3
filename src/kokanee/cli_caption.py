"""`kokanee caption`: one file as text that grows, many files as records that can be continued."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kokanee.console import bar, key_value, say
from kokanee.errors import KokaneeError
from kokanee.files import Found, file_key, find, is_image, output_names
from kokanee.formats import check_writable, write_text
from kokanee.outputs import FORMATS, SUBTITLES, Record, caption_entry, key_of, read_records, txt_entry

if TYPE_CHECKING:
    from kokanee.caption_run import Summary, Task
    from kokanee.captions import Caption, FileCaptioner

OPENAI = "openai:"
RECORDS = "captions.jsonl"
STANDARD_OUTPUT = ("-", "/dev/stdout")
SUBTITLES_EVERY_S = 10.0
NAMED = 20


class Format(StrEnum):
    txt = "txt"
    json = "json"
    jsonl = "jsonl"
    srt = "srt"
    vtt = "vtt"


@dataclass(frozen=True)
class Plan:
    """Which files are captioned, and where to and in which format the captions go (`out` None: standard output)."""

    found: list[Found]
    several: bool
    format: str
    out: Path | None

    @property
    def is_run(self) -> bool:
        """Whether records are collected: for several files, and for one whose record is added to a file."""
        return self.several or (self.format == "jsonl" and self.out is not None)

    @property
    def records(self) -> Path | None:
        """The file of records of a run."""
        if self.out is None:
            return None
        is_file = (self.out.suffix or self.out.exists()) and not self.out.is_dir()
        return self.out if self.format == "jsonl" and is_file else self.out / RECORDS

    @property
    def files(self) -> dict[str, Path]:
        """`file_key` of each input -> the file of its captions; none where records are all that is written."""
        if self.out is None or (self.is_run and self.format == "jsonl"):
            return {}
        if not self.several and not self.out.is_dir():
            return {file_key(self.found[0].path): self.out}
        return {file_key(path): self.out / name for path, name in output_names(self.found, self.format).items()}


Inputs = Annotated[list[str], typer.Argument(help="Files, folders, or glob patterns in quotes.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A folder, a name on the hub, or nano, which knows its synthetic world only; openai:NAME asks a server.",
    ),
]
BaseUrl = Annotated[str | None, typer.Option(help="Of openai:NAME: an OpenAI-compatible server, else OpenAI itself.")]
Question = Annotated[str | None, typer.Option("--question", "-q", help="Ask this instead of for a caption.")]
Start = Annotated[float | None, typer.Option(min=0, help="Begin here (seconds).")]
End = Annotated[float | None, typer.Option(min=0, help="Stop here (seconds).")]
Every = Annotated[
    float | None, typer.Option(min=0.001, help="A caption for every so many seconds; of subtitles 10 by default.")
]
FormatName = Annotated[
    Format | None,
    typer.Option("--format", "-f", help="By default as --out ends; else txt for one file, jsonl for several."),
]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="A file, or a folder (with / at its end if it is new); - prints."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace files in --out's place that are not from this run.")]
Samples = Annotated[int, typer.Option(min=1, help="Captions of each file or interval.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="0 is greedy, the default for one sample; for several it is 1.")
]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this probability.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers, where temperature is not 0.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest caption, by default the model's own.")]
Penalty = Annotated[
    float | None,
    typer.Option(min=0, help="Lower the scores of tokens that were said; 1 does not, by default the model's own."),
]
AudioOnly = Annotated[bool, typer.Option("--audio-only", help="Only listen.")]
VideoOnly = Annotated[bool, typer.Option("--video-only", help="Only look.")]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Search sub-folders too.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Files or intervals computed together; of openai:NAME questions at a time.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16, float32; by default as stored, on a CPU float32.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the processor, such as max_frames=64."),
]
Base = Annotated[str | None, typer.Option(help="Where MODEL is an adapter: the model it belongs to.")]


def caption(
    inputs: Inputs,
    model: Model = "nano",
    question: Question = None,
    start: Start = None,
    end: End = None,
    every: Every = None,
    format_: FormatName = None,
    out: Out = None,
    overwrite: Overwrite = False,
    samples: Samples = 1,
    temperature: Temperature = None,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    repetition_penalty: Penalty = None,
    audio_only: AudioOnly = False,
    video_only: VideoOnly = False,
    recursive: Recursive = False,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = None,
    base: Base = None,
    base_url: BaseUrl = None,
    set_: Set = None,
) -> None:
    """Tell what happens in videos, sound files and images.

    A single file's caption appears as it is made. Several files get a record each in --out, as they are done; the same
    command again goes on where it stopped, and does failed and changed files again.
    """
    if audio_only and video_only:
        raise typer.BadParameter("cannot be used together", param_hint="--audio-only, --video-only")
    if end is not None and end <= (start or 0):
        raise typer.BadParameter(f"{end:g} is not after the start at {start or 0:g}", param_hint="--end")
    if question is not None and not question.strip():
        raise typer.BadParameter("is empty; leave it out to ask for a caption", param_hint="--question")
    check_model(model, base_url, device, dtype, base, repetition_penalty)
    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    plan = make_plan(inputs, recursive, format_, out, samples, overwrite)
    replaced = dict(key_value(item) for item in set_ or [])
    if every is None and plan.format in SUBTITLES:
        every = SUBTITLES_EVERY_S
    use = ("audio",) if audio_only else ("video",) if video_only else ("video", "audio")
    how: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    given = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    how |= {name: value for name, value in given.items() if value is not None}

    from kokanee.caption_run import Task
    from kokanee.captions import Decoding, check_samples

    Decoding(**how)
    try:
        check_samples(samples, temperature)
    except KokaneeError as error:
        raise typer.BadParameter(str(error), param_hint="--temperature") from None
    if model.startswith(OPENAI):
        captioner = remote_captioner(model, base_url, batch_size, replaced)
    else:
        captioner = local_captioner(model, device, dtype, base, replaced)
    if captioner.defaults.note:
        say(f"{model}: {captioner.defaults.note}")
    task = Task(question, start, end, every, samples, use, captioner.decoding(how))  # pyright: ignore[reportArgumentType]
    if every is not None and plan.several:
        plan = without_stills(plan)
    if plan.is_run:
        caption_several(captioner, plan, task, batch_size)
    else:
        caption_single(captioner, plan, task, batch_size)


def check_model(
    model: str,
    base_url: str | None,
    device: str,
    dtype: str | None,
    base: str | None,
    repetition_penalty: float | None = None,
) -> None:
    """Raise a usage error for options that say nothing about such a model."""
    if not model.startswith(OPENAI):
        if base_url is not None:
            raise typer.BadParameter(f"{model} is no model of a server; give {OPENAI}NAME", param_hint="--base-url")
        return
    if model == OPENAI:
        raise typer.BadParameter(f"{model} names no model; give {OPENAI}NAME", param_hint="--model")
    of_ours = {
        "--device": device != "auto",
        "--dtype": dtype,
        "--base": base,
        "--repetition-penalty": repetition_penalty is not None,
    }
    for option, given in of_ours.items():
        if given:
            raise typer.BadParameter(f"says nothing about a server's model ({model}); leave it out", param_hint=option)


def local_captioner(
    model: str, device: str, dtype: str | None, base: str | None, settings: dict[str, Any]
) -> FileCaptioner:
    """A model that is computed here. Wrong settings are told before it is loaded."""
    from kokanee.captioner import Captioner
    from kokanee.processor import ProcessorConfig
    from kokanee.salmonn2_prompt import Salmonn2ProcessorConfig

    known = {**ProcessorConfig.model_fields, **Salmonn2ProcessorConfig.model_fields}
    Salmonn2ProcessorConfig(**{key: value for key, value in settings.items() if key not in known})
    return Captioner.from_pretrained(model, device=device, dtype=dtype, base=base, **settings)  # pyright: ignore[reportArgumentType]


def remote_captioner(model: str, base_url: str | None, concurrency: int, settings: dict[str, Any]) -> FileCaptioner:
    """A model that a server computes."""
    from kokanee.endpoint import Endpoint
    from kokanee.remote import TIMEOUT_S, FrameSettings, RemoteCaptioner

    name = model.removeprefix(OPENAI)
    endpoint = Endpoint(name, base_url, concurrency=concurrency, timeout_s=TIMEOUT_S)
    return RemoteCaptioner(endpoint, FrameSettings(**settings))


def place_of(out: str | None) -> Path | None:
    """Where the captions go, None for standard output. A name with a slash at its end becomes a folder."""
    if out is None or out in STANDARD_OUTPUT:
        return None
    if out.endswith(("/", os.sep)):
        Path(out).mkdir(parents=True, exist_ok=True)
    return Path(out)


def make_plan(
    inputs: list[str], recursive: bool, wanted: Format | None, place: str | None, samples: int, overwrite: bool
) -> Plan:
    """What to do with which files. Raises `KokaneeError` or a usage error for what cannot be done."""
    found, several = find(inputs, recursive)
    if not several and not found[0].path.exists():
        remedy = "Download it first, Kokanee reads files" if "://" in inputs[0] else "Check the path"
        raise KokaneeError(f"{inputs[0]} is not there. {remedy}.")
    out = place_of(place)
    ending = out.suffix[1:] if out is not None and not out.is_dir() else ""
    if wanted is None and ending and ending not in FORMATS:
        raise typer.BadParameter(
            f"{out} ends in none of {', '.join(FORMATS)}; say which with --format", param_hint="--out"
        )
    format_ = wanted.value if wanted else ending or ("jsonl" if several else "txt")
    if format_ in SUBTITLES and samples > 1:
        raise typer.BadParameter("subtitles show one caption at a time, so leave it out", param_hint="--samples")
    if format_ in SUBTITLES and not several and is_image(found[0].path):
        raise typer.BadParameter(
            f"{inputs[0]} is a still image, which has no length to subtitle", param_hint="--format"
        )
    plan = Plan(found, several, format_, out)
    if several and out is None and format_ not in ("txt", "jsonl"):
        raise typer.BadParameter(f"several files in {format_} need a folder to be written to", param_hint="--out")
    if several and out is not None and format_ != "jsonl" and (out.is_file() or ending in FORMATS):
        raise typer.BadParameter(f"{out} is one file; several in {format_} need a folder", param_hint="--out")
    check_targets(plan, overwrite)
    return plan


def without_stills(plan: Plan) -> Plan:
    """The plan without still images, which have no intervals; says how many there were."""
    kept = [hit for hit in plan.found if not is_image(hit.path)]
    if not kept:
        raise KokaneeError("All of these are still images, which have no intervals. Leave --every out.")
    if len(kept) < len(plan.found):
        say(f"still images have no intervals and are left out: {len(plan.found) - len(kept)}")
    return replace(plan, found=kept)


def check_targets(plan: Plan, overwrite: bool) -> None:
    """Raise where a file that is to be written cannot be, is to be captioned, or is there and not from this run."""
    files, records = plan.files, plan.records if plan.is_run else None
    read = {hit.path.resolve() for hit in plan.found}
    tried: set[Path] = set()
    for target in [*files.values(), *([] if records is None else [records])]:
        if target.resolve() in read:
            raise typer.BadParameter(f"{target} is to be captioned and would be overwritten", param_hint="--out")
        if target.parent not in tried or target.exists():
            check_writable(target)
        tried.add(target.parent)
    known = read_records(records) if records is not None and records.is_file() else {}
    foreign = [target for key, target in files.items() if target.is_file() and "captions" not in known.get(key, {})]
    if foreign and not overwrite:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        unknown = "" if records is None else f", and {records} has no captions of it"
        raise KokaneeError(
            f"{foreign[0]} is there{more}{unknown}. Choose another place, or replace what is there with --overwrite."
        )


def caption_single(captioner: FileCaptioner, plan: Plan, task: Task, batch_size: int) -> None:
    """One file, to standard output or to a file of its own. Ctrl-C leaves the captions that were made until then."""
    from kokanee.caption_run import Stopped

    path, target = plan.found[0].path, next(iter(plan.files.values()), None)
    as_made, stopped = plan.format == "txt" and target is None, False
    try:
        record = (write_as_made if as_made else caption_whole)(captioner, path, task, batch_size)
    except Stopped as stop:
        record, stopped = stop.record, True
    if "captions" in record and not as_made:
        text = FORMATS[plan.format](record)
        typer.echo(text, nl=False) if target is None else write_text(target, text)
    for note in record.get("notes", ()):
        say(f"{path}: {note}")
    captions = record.get("captions", ())
    cut = sum(not caption["finished"] for caption in captions)
    if cut:
        say(f"{path}: {cut} of {len(captions)} captions cut off at {task.decoding.max_new_tokens} tokens")
    if captions and "error" in record and target is not None:
        say(f"{target} holds the {len(captions)} captions that were made. (--out {path.stem}.jsonl can be continued.)")
    if stopped:
        raise KeyboardInterrupt
    if "error" in record:
        raise KokaneeError(record["error"])


def caption_whole(captioner: FileCaptioner, path: Path, task: Task, batch_size: int) -> Record:
    """The record of one file, with a bar for its intervals."""
    from kokanee.caption_run import caption_one

    with bar(hidden=task.every_s is None) as progress:
        shown = progress.add_task("intervals", total=captions_wanted(captioner, path, task))
        return caption_one(captioner, path, task, batch_size, on_caption=lambda _: progress.advance(shown))


def captions_wanted(captioner: FileCaptioner, path: Path, task: Task) -> int | None:
    """How many captions the intervals of a file will have; None where there are none, or it is not known."""
    if task.every_s is None:
        return None
    try:
        return task.n_samples * len(captioner.parts(path, task.every_s, task.start_s, task.end_s, task.use))
    except KokaneeError:
        return None


def write_as_made(captioner: FileCaptioner, path: Path, task: Task, batch_size: int) -> Record:
    """One file's captions to standard output, a single one piece by piece; its record."""
    from kokanee.caption_run import caption_one, version_of

    version = version_of(path)
    if task.every_s is None and task.n_samples == 1:
        stream = captioner.begin(task.request(path), task.decoding)
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        assert stream.caption is not None
        return task.record(captioner, path, [stream.caption], version)

    settings, written = task.settings(captioner), []

    def write(made: Caption) -> None:
        typer.echo(("\n" if written else "") + txt_entry(caption_entry(made), settings), nl=False)
        written.append(made)

    return caption_one(captioner, path, task, batch_size, on_caption=write, in_turn=True)


def caption_several(captioner: FileCaptioner, plan: Plan, task: Task, batch_size: int) -> None:
    """Many files: a record each as they are done, and files in the wanted format. Exits with 1 if any failed."""
    from kokanee.caption_run import run

    files, records = plan.files, plan.records
    before = read_records(records) if records is not None and records.is_file() else {}
    stopped = False
    with bar("{task.fields[file]}", hidden=plan.out is None and sys.stdout.isatty()) as progress:
        shown = progress.add_task("files", total=len(plan.found), file="")
        inside = progress.add_task("intervals", total=None, file="", visible=False)
        begun: set[Path] = set()

        def on_record(record: Record) -> None:
            progress.update(shown, advance=1, file=record["file"])
            if plan.out is None:
                write_record(record, plan.format)
            elif files and "error" not in record:
                key = key_of(record)
                if record != before.get(key) or not files[key].exists():
                    write_text(files[key], FORMATS[plan.format](record))

        def on_caption(path: Path, caption: Caption) -> None:
            if path not in begun:
                begun.add(path)
                total = captions_wanted(captioner, path, task)
                progress.reset(inside, total=total, visible=True, file=path.as_posix())
            progress.advance(inside)

        try:
            paths = [hit.path for hit in plan.found]
            summary = run(captioner, paths, records, task, batch_size, on_record, on_caption)
        except KeyboardInterrupt:
            stopped, summary = True, None
    if stopped:
        if records is not None and records.is_file():
            say(f"What is done is in {records}; the same command again goes on.")
        raise KeyboardInterrupt
    assert summary is not None
    tell(summary)


def write_record(record: Record, format_: str) -> None:
    """One of several records to standard output; errors are no text."""
    if format_ == "jsonl":
        typer.echo(FORMATS[format_](record), nl=False)
    elif "error" not in record:
        typer.echo(f"{record['file']}\n{FORMATS[format_](record)}")


def tell(summary: Summary) -> None:
    """What came of a run. Raises `KokaneeError` if a file failed, so that the exit code says it too."""
    before = f" ({summary.skipped} of them before)" if summary.skipped else ""
    say(f"{summary.captioned} captioned{before}, {len(summary.failed)} failed")
    if summary.failed:
        reasons = list(summary.failed.values())
        more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
        head = "1 file has no caption:" if len(reasons) == 1 else f"{len(reasons)} files have no caption:"
        raise KokaneeError("\n  ".join([head, *reasons[:NAMED], *more]))
