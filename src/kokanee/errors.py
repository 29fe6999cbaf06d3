"""The one exception that users are meant to see, and what it says of wrong settings."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class KokaneeError(ValueError):
    """A mistake in the input: its text says the problem, the reason and the remedy."""


class TooLittleMemory(KokaneeError):
    """A device's memory does not suffice; less at once may fit."""


def reasons(error: ValidationError, model: type[BaseModel]) -> str:
    """What pydantic found wrong in the settings of `model`: each setting by its whole name, unknown ones with the
    known one that is meant, or with all that there are."""
    phrases = []
    for item in error.errors():
        key, around = place_of(item["loc"], model)
        if item["type"] == "extra_forbidden":
            *path, last = key.split(".")
            names = list(around.model_fields) if around else []
            near = difflib.get_close_matches(last, names, n=1, cutoff=0.6)
            whole = [".".join([*path, name]) for name in near or names]
            known = f"did you mean '{whole[0]}'?" if near else f"known: {', '.join(whole)}"
            phrases.append(f"unknown setting '{key}' ({known})")
        elif item["type"] == "missing":
            phrases.append(f"{key} is missing")
        elif item["type"] == "model_type":
            phrases.append(f"{key}: must be settings (key: value)")
        else:
            said = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            phrases.append(f"{key}: {said}" if key else said)
    return "; ".join(phrases)


def place_of(loc: Sequence[int | str], model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The name of the setting at `loc`, from the settings of `model`, and the settings that it stands among. The names
    of classes, which pydantic puts between where several may stand, are left out."""
    from pydantic import BaseModel

    names: list[str] = []
    around: type[BaseModel] | None = model
    inside: list[type[BaseModel]] = [model]
    for part in loc:
        chosen = [one for one in inside if one.__name__ == part]
        if chosen:
            inside = chosen
            continue
        names.append(str(part))
        around = inside[0] if inside else None
        field = around.model_fields.get(str(part)) if around else None
        kinds = [unannotated(kind) for kind in (field.annotation, *get_args(field.annotation))] if field else []
        inside = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return ".".join(names), around


def unannotated(kind: Any) -> Any:
    """A type without what Annotated adds to it."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


@contextlib.contextmanager
def memory_said(remedy: str) -> Iterator[None]:
    """Says what helps where a device's memory does not suffice."""
    try:
        yield
    except RuntimeError as error:
        from torch import OutOfMemoryError  # here, as commands that need no model do not load torch

        if not isinstance(error, OutOfMemoryError):
            raise
        problem = str(error).partition(". GPU")[0]
        raise TooLittleMemory(f"The device has too little memory ({problem}). {remedy}") from error
