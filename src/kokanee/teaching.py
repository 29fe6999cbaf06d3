"""A teacher's captions of video files: by any captioner, in records that grow, shared by the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, field_validator

from kokanee.caption_run import Task, run
from kokanee.captioner import Captioner
from kokanee.captions import BOTH, FileCaptioner
from kokanee.drafts import Team
from kokanee.endpoint import Endpoint
from kokanee.errors import KokaneeError
from kokanee.files import file_key, find, is_image
from kokanee.formats import drop_half_start, read_jsonl, write_jsonl
from kokanee.outputs import read_records
from kokanee.remote import TIMEOUT_S, FrameSettings, RemoteCaptioner
from kokanee.tuning import FORBID

CAPTIONS, SHARDS = "captions.jsonl", "captions"
OPENAI = "openai:"


class Teaching(BaseModel):
    """How a teacher is asked about files: all but `use` is of a server alone."""

    model_config = FORBID

    use: tuple[Literal["video", "audio"], ...] = Field(default=BOTH, min_length=1)
    base_url: str | None = None
    concurrency: int = Field(default=8, ge=1)
    per_minute: float | None = Field(default=None, gt=0)
    frames: dict[str, Any] = Field(default_factory=dict, description="see remote.FrameSettings")

    @field_validator("frames")
    @classmethod
    def _known(cls, frames: dict[str, Any]) -> dict[str, Any]:
        try:
            FrameSettings(**frames)
        except KokaneeError as error:
            raise ValueError(str(error)) from error
        return frames


def is_remote(teacher: str) -> bool:
    """Whether a server is the teacher."""
    return teacher.startswith(OPENAI)


def server_of(teacher: str, teaching: Teaching) -> Endpoint:
    """Where a teacher of this name is asked."""
    name = teacher.removeprefix(OPENAI)
    if not name:
        raise KokaneeError(f"teacher: {teacher} names no model. Give {OPENAI}NAME.")
    return Endpoint(
        name,
        teaching.base_url,
        concurrency=teaching.concurrency,
        per_minute=teaching.per_minute,
        timeout_s=TIMEOUT_S,
    )


def teacher_of(teacher: str, teaching: Teaching, device: torch.device, dtype: torch.dtype) -> FileCaptioner:
    """The teacher, as something that captions files."""
    if is_remote(teacher):
        return RemoteCaptioner(server_of(teacher, teaching), FrameSettings(**teaching.frames))
    return Captioner.from_pretrained(teacher, device=device, dtype=dtype)


def videos_in(folder: Path, without: Collection[Path]) -> list[Path]:
    """All videos and sounds below a folder, by name, but those that are to be kept apart; no still images.

    Raises `KokaneeError` where there are none.
    """
    if not folder.is_dir():
        raise KokaneeError(f"{folder} is no folder here. Give one of videos (data.train.videos).")
    apart = {path.resolve() for path in without}
    found = [hit.path for hit in find([str(folder)], recursive=True)[0]]
    kept = [path for path in found if not is_image(path) and path.resolve() not in apart]
    if not kept:
        raise KokaneeError(f"{folder} holds no videos to learn from but those to measure by. Give a folder that does.")
    return kept


def said_of_files(
    teacher: Callable[[], FileCaptioner],
    task: Callable[[FileCaptioner], Task],
    files: Sequence[Path],
    folder: Path,
    team: Team,
    alone: bool,
    batch_size: int,
    report: Callable[[int, int], None],
) -> None:
    """Caption the files, the processes sharing them (`alone`: the main one does all); records go to `folder/SHARDS`."""
    first, step = (0, 1) if alone else (team.state.process_index, team.state.num_processes)
    mine, path = files[first::step], folder / SHARDS / f"{first}.jsonl"
    if mine and (team.is_main or not alone):
        captioner, done = teacher(), 0

        def on_record(_: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            report(done, len(mine))

        drop_half_start(path)
        run(captioner, mine, path, task(captioner), batch_size, on_record)
    team.wait()


def keep_captions(folder: Path, files: Sequence[Path], videos: Path, unreadable: float) -> None:
    """Write the captions of these files, from all shards, as one file, by the names that files have below `videos`.

    Raises `KokaneeError` where more files than `unreadable` have no caption, when the others are written.
    """
    shards = sorted((folder / SHARDS).glob("*.jsonl"))
    by_file = {key: record for shard in shards for key, record in read_records(shard).items()}
    records = [(path, by_file[file_key(path)]) for path in files if file_key(path) in by_file]
    made = [
        {
            "file": path.relative_to(videos).as_posix(),
            "caption": record["captions"][0]["text"],
            "finished": record["captions"][0]["finished"],
        }
        for path, record in records
        if "error" not in record
    ]
    write_jsonl(folder / CAPTIONS, made)
    if not enough(folder, files, unreadable):
        lost = [record["error"] for _, record in records if "error" in record]
        raise KokaneeError(
            f"{len(lost)} of {len(files)} files have no caption, such as: {lost[0]} Mend these files, or allow for "
            "more with a higher data.train.unreadable, and start again."
        )


def enough(folder: Path, files: Sequence[Path], unreadable: float) -> bool:
    """Whether captions are kept, and of no more of the files than `unreadable` there is none."""
    kept = folder / CAPTIONS
    return kept.is_file() and len(files) - len(read_jsonl(kept)) <= unreadable * len(files)
