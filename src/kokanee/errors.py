"""The one exception that users are meant to see, and what it says of wrong settings."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class KokaneeError(ValueError):
    """A mistake in the input: its text says the problem, the reason and the remedy."""


def reasons(error: ValidationError, model: type[BaseModel]) -> str:
    """What pydantic found wrong in the settings of `model`; unknown ones with the nearest known one."""
    phrases = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.0)
            phrases.append(f"unknown setting '{key}' (the nearest known one is '{near[0]}')")
        else:
            phrases.append(f"{key}: {item['msg']}" if key else item["msg"])
    return "; ".join(phrases)


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
        raise KokaneeError(f"The device has too little memory ({problem}). {remedy}") from error
