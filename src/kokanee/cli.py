"""The command `kokanee`. Nothing heavy is imported before a command runs.

Data goes to standard output, all else to standard error. Exit codes: 0 done, 1 something failed, 2 wrong usage, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

import kokanee
from kokanee.cli_caption import caption
from kokanee.cli_events import events
from kokanee.cli_qa import qa
from kokanee.cli_reproduce import reproduce
from kokanee.cli_score import agree, score
from kokanee.cli_train import pairs, train, world
from kokanee.errors import KokaneeError
from kokanee.launch import follow, is_worker

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "av",
    "numpy",
    "pillow",
    "pydantic",
    "typer",
    "rich",
)
STOPPED = 130
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Commands(TyperGroup):
    """Commands whose mistakes by the user are one message without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except KokaneeError as error:
            message, code = f"Error: {error}", 1
        except KeyboardInterrupt:
            if is_worker():  # the launcher says it
                raise typer.Exit(STOPPED) from None
            message, code = "Stopped.", STOPPED
        except OSError as error:
            if error.filename is not None:
                message = f"Error: {error.filename}: {error.strerror}. Check the path and its permissions."
            elif error.errno in NO_PLACE:
                message = no_place(error.strerror)
                discard_output()
            else:
                raise
            code = 1
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None or int(number[1]) not in NO_PLACE:
                raise
            message, code = no_place(os.strerror(int(number[1]))), 1
        typer.echo(message, err=True)
        raise typer.Exit(code)


def no_place(why: str | None) -> str:
    return f"Error: The output cannot be written: {why}. Make room, or choose another place."


def discard_output() -> None:
    """Let nothing more be written to standard output: what waits there could not be written when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="kokanee",
    cls=Commands,
    help="Captions of what a video shows and what it sounds like.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(caption)
app.command()(score)
app.command()(agree)
app.command()(qa)
app.command()(events)
app.command()(train)
app.command()(pairs)
app.command()(reproduce)
app.add_typer(world, name="world")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kokanee {kokanee.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Captions of what a video shows and what it sounds like."""


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: folder, adapter, or name on the Hugging Face hub.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; as stored, if left out.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that an adapter belongs to.")] = None,
    whisper: Annotated[
        str | None, typer.Option(help="A Whisper, folder or name on the hub: SOURCE is a Qwen2.5-VL that is to hear.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --whisper: of the fresh Q-Former's random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that OUT holds.")] = False,
) -> None:
    """Write any checkpoint that can be loaded as a Kokanee folder; an adapter is merged into its base.

    With --whisper, join a Qwen2.5-VL and a Whisper into a base that is ready to learn to hear.
    """
    from kokanee.checkpoints import assemble, is_own
    from kokanee.checkpoints import convert as convert_checkpoint
    from kokanee.defaults import Defaults, origin

    if is_own(out) and not overwrite:
        raise KokaneeError(f"{out} holds a model. Choose another folder, or give --overwrite to replace it.")
    if whisper is not None:
        if base is not None:
            raise typer.BadParameter(
                "an adapter cannot be joined with a Whisper; convert it first", param_hint="--base"
            )
        typer.echo(assemble(source, whisper, out, dtype=dtype, seed=seed))
        return
    folder = convert_checkpoint(source, out, dtype=dtype, base=base)
    Defaults.of(origin(source, base)).save(folder)
    typer.echo(folder)


@app.command()
def env() -> None:
    """Versions and devices, for bug reports."""
    for name, value in environment():
        typer.echo(f"{name}: {value}")


def environment() -> Iterator[tuple[str, str]]:
    """What a bug report has to say about the machine; works whatever is missing."""
    from importlib.metadata import PackageNotFoundError, version

    yield "kokanee", kokanee.__version__
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "devices", devices()
    yield "ffmpeg", ffmpeg_libraries()


def devices() -> str:
    """What torch computes on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({error})"
    threads = f"cpu ({torch.get_num_threads()} threads)"
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    other = ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join([threads, *cuda, *other])


def ffmpeg_libraries() -> str:
    """The versions of FFmpeg's libraries inside PyAV."""
    try:
        import av
    except (ImportError, OSError) as error:
        return f"av cannot be imported ({error})"
    return ", ".join(f"{name} {'.'.join(map(str, numbers))}" for name, numbers in av.library_versions.items())


def main() -> None:
    """Run the command."""
    follow()
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a caption may hold what the terminal cannot show
    app(prog_name="kokanee")
