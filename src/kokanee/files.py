"""Which files are meant by what the user names, and what their captions' files are called. No torch here."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kokanee.errors import KokaneeError

VIDEOS = frozenset(
    (
        ".3gp",
        ".asf",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    )
)
SOUNDS = frozenset((".aac", ".aif", ".aiff", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma"))
IMAGES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
MEDIA = VIDEOS | SOUNDS | IMAGES
SAMPLES = "samples.jsonl"  # what is known of a folder of the world's clips


@dataclass(frozen=True)
class Found:
    """A file to caption, and its path inside the folder that was named (its name, where it was named itself)."""

    path: Path
    inside: Path


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a still image, by its name."""
    return Path(path).suffix.lower() in IMAGES


def file_key(path: str | os.PathLike[str]) -> str:
    """What a file is known by, however its path is written; a link to a file is a file of its own."""
    path = Path(path)
    return str(path.parent.resolve() / path.name)


def by_names(folder: Path) -> Callable[[str], Path]:
    """Finds a folder's files by names that start from it, or from elsewhere, as those of captions made elsewhere do.

    A name means what the longest end of it is in the folder: a file, or where it has no ending the one media file so
    called. The name as it stands is returned where that is nothing. Raises `KokaneeError` where several are so called.
    """

    @cache
    def inside(place: Path) -> list[Path]:
        return sorted(path for path in place.iterdir() if path.suffix.lower() in MEDIA) if place.is_dir() else []

    @cache
    def path_of(name: str) -> Path:
        parts = Path(name).parts
        for path in (folder.joinpath(*parts[first:]) for first in range(len(parts))):
            named = [path] if path.is_file() else [other for other in inside(path.parent) if other.stem == path.name]
            if len(named) > 1:
                raise KokaneeError(f"{path} may be {named[0].name} or {named[1].name}. Name files with their endings.")
            if named:
                return named[0]
        return folder / name

    return path_of


def find(named: Sequence[str], recursive: bool = False) -> tuple[list[Found], bool]:
    """The files meant by files, folders and glob patterns, each once, and whether several were asked for.

    Of a folder the media files are taken, by their names' endings, with `recursive` those of its sub-folders too;
    hidden files are left out. A plain path is taken as it is, even if there is no such file: reading it will say so.
    Raises `KokaneeError` for a folder or pattern that holds nothing.
    """
    found: dict[str, Found] = {}
    several = len(named) > 1
    for name in named:
        path = Path(name).expanduser()
        if path.is_dir():
            several = True
            hits = in_folder(path, recursive)
        elif glob.has_magic(name) and not path.exists():
            several = True
            hits = matching(name)
        else:
            hits = [Found(path, Path(path.name))]
        for hit in hits:
            found.setdefault(file_key(hit.path), hit)
    return list(found.values()), several


def in_folder(folder: Path, recursive: bool) -> list[Found]:
    """The media files of a folder in the order of their names."""
    paths = sorted(folder.rglob("*") if recursive else folder.iterdir())
    insides = [path.relative_to(folder) for path in paths if path.is_file() and path.suffix.lower() in MEDIA]
    hits = [Found(folder / inside, inside) for inside in insides if not any(part[0] == "." for part in inside.parts)]
    if not hits:
        deeper = "" if recursive else " With --recursive its sub-folders are searched too."
        raise KokaneeError(f"{folder} holds no video, sound or image files. Give a folder that does.{deeper}")
    return hits


def matching(pattern: str) -> list[Found]:
    """The files that match a pattern, in the order of their names."""
    paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    hits = [Found(path, Path(path.name)) for path in paths if path.is_file()]
    if not hits:
        raise KokaneeError(f"No file matches {pattern}. Check the pattern.")
    return hits


def output_names(found: Sequence[Found], ending: str) -> dict[Path, Path]:
    """File -> the relative path of its captions: clip.mp4 -> clip.srt, or clip.mp4.srt where a clip.mov is there too.

    Raises `KokaneeError` where two files would still get the same.
    """
    plain = {hit.path: hit.inside.with_suffix(f".{ending}") for hit in found}
    times = Counter(plain.values())
    names = {
        hit.path: plain[hit.path]
        if times[plain[hit.path]] == 1
        else hit.inside.with_name(f"{hit.inside.name}.{ending}")
        for hit in found
    }
    owners: dict[Path, Path] = {}
    for path, name in names.items():
        if name in owners:
            raise KokaneeError(
                f"{owners[name]} and {path} would both be written to {name}. Give them in separate runs, each with its "
                "own --out, or write one file of records with --format jsonl."
            )
        owners[name] = path
    return names
