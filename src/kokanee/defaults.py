"""What a checkpoint is asked when the user does not say, and what users should know of it: a file in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kokanee.errors import KokaneeError
from kokanee.formats import read_json, write_json

DEFAULTS_FILE = "captioner.json"


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint is asked when the user does not say, and what users should know (`captioner.json`).

    The question is by default the one that most clips of the published test set are asked
    (tsinghua-ee/video-SALMONN_2_testset, 84 of 483). max_new_tokens: 1024, as the published scripts generate. note:
    what whoever captions with it should know, if anything. repetition_penalty: see `captions.Decoding`; where the file
    does not say, that of generation_config.json, by which transformers, and so the published scripts, generate.
    """

    question: str = (
        "Please provide a thorough description of all the content in the video, including every detail. "
        "As you describe, ensure that you also cover as much information from the audio as possible, "
        "and be mindful of the synchronization between the audio and video as you do so."
    )
    max_new_tokens: int = 1024
    note: str = ""
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, folder: Path) -> Defaults:
        """The defaults of a checkpoint's folder. Raises `KokaneeError` for a file that does not hold such settings."""
        path, generation = folder / DEFAULTS_FILE, folder / "generation_config.json"
        stored = read_json(generation) if generation.is_file() else {}
        penalty: dict[str, Any] = {"repetition_penalty": stored.get("repetition_penalty") or 1.0}
        if not path.is_file():
            return cls(**penalty)
        try:
            return cls(**{**penalty, **json.loads(path.read_text(encoding="utf-8"))})
        except (ValueError, TypeError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise KokaneeError(f"{path} does not hold settings ({error}). It may set {known}.") from error

    def save(self, folder: Path) -> None:
        """Write them to a checkpoint's folder."""
        write_json(folder / DEFAULTS_FILE, asdict(self))


def origin(source: str | Path, base: str | Path | None = None) -> Path:
    """The folder whose defaults count for a checkpoint: its own, or its base's for an adapter without any."""
    from kokanee.checkpoints import base_of, locate  # with torch, which whoever asks a server needs not

    folder = locate(source)
    below = None if (folder / DEFAULTS_FILE).is_file() else base_of(folder, base)
    return folder if below is None else origin(below)
