"""Clips of the world on disk: real MP4 files with everything that is true of them in `samples.jsonl`.

The folder can be killed at any time and continued: a clip's record is added after its file is whole, and `state.json`
holds the settings, so that one folder never mixes two of them. Equal settings give equal records.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl, differences, read_jsonl, refuse_foreign, write_json
from kokanee.media import write_clip
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import exact
from kokanee.world.language import write
from kokanee.world.questions import ask
from kokanee.world.render import frames
from kokanee.world.scene import SPLITS, Action, Ambient, Figure, Scene, Sound, Split, sample_scene
from kokanee.world.scene import VERSION as WORLD
from kokanee.world.sound import waveform

VERSION = 1
RATE_HZ = 16000


@dataclass(frozen=True)
class MakeSettings:
    """What the clips of a folder have in common.

    seed, split: which scenes are drawn; clip number i is scene i of the split.
    size_px: side of the square picture, in pixels, even. fps: frames a second.
    annotators: annotated captions a clip. questions: most questions a clip. bias: how the annotators fall short.
    """

    seed: int = 0
    split: Split = "train"
    size_px: int = 224
    fps: float = 12.0
    annotators: int = 3
    questions: int = 6
    bias: Bias = field(default_factory=Bias)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise KokaneeError(f"There is no split {self.split!r}. Give one of {', '.join(SPLITS)}.")
        if self.size_px < 2 or self.size_px % 2 or self.fps <= 0 or min(self.annotators, self.questions) < 0:
            raise KokaneeError(
                f"size_px {self.size_px}, fps {self.fps}, annotators {self.annotators}, questions {self.questions}: "
                "give an even size_px, an fps above 0 and no negative number."
            )


def make(
    out: str | Path,
    n_clips: int,
    seed: int = 0,
    split: Split = "train",
    *,
    on_clip: Callable[[int], None] | None = None,
    **more: Any,
) -> Path:
    """Write clips 0 to `n_clips` - 1 into the folder `out`: NNNNN.mp4, and a record of each in samples.jsonl.

    `more` are further fields of `MakeSettings`. Clips that are there already are left alone, so a second call goes on,
    and one with more clips adds to them. `on_clip` is told the number of clips done after each. Returns the path of
    samples.jsonl. Raises KokaneeError for settings that cannot be, and for a folder made with others, saying which.
    """
    out, settings = Path(out), MakeSettings(seed, split, **more)
    if n_clips < 0:
        raise KokaneeError(f"Cannot make {n_clips} clips. Give 0 or more.")
    done = _start(out, settings)
    samples = out / "samples.jsonl"
    for index in range(done, n_clips):
        scene = sample_scene(settings.split, index, settings.seed)
        times_s = np.arange(round(scene.duration_s * settings.fps)) / settings.fps
        pictures_THWC = frames(scene, times_s, settings.size_px)
        file = f"{index:05d}.mp4"
        write_clip(out / file, iter(pictures_THWC), settings.fps, waveform(scene, RATE_HZ), RATE_HZ)
        append_jsonl(samples, [record(scene, index, settings, file)])
        if on_clip:
            on_clip(index + 1)
    return samples


def record(scene: Scene, index: int, settings: MakeSettings, file: str) -> dict[str, Any]:
    """All that is known of a clip, ready for JSON: its scene, events, captions and questions."""
    rng = random.Random(f"kokanee-clips-{VERSION}/{settings.seed}/{settings.split}/{index}")
    events = exact(scene)
    return {
        "version": VERSION,
        "file": file,
        "split": settings.split,
        "index": index,
        "seed": settings.seed,
        "duration_s": scene.duration_s,
        "scene": asdict(scene),
        "events": [asdict(event) | {"kind": event.fact.kind} for event in events],
        "caption_exact": write(events, rng),
        "captions_annotated": [write(annotate(events, settings.bias, rng), rng) for _ in range(settings.annotators)],
        "questions": [
            {"question": question.text, "answer": question.answer, "kind": question.kind, "options": question.options}
            for question in ask(scene, rng, settings.questions)
        ],
    }


def scene_of(sample: dict[str, Any]) -> Scene:
    """The scene of a record: equal to the one it was made from."""
    scene = sample["scene"]
    return Scene(
        scene["duration_s"],
        scene["background"],
        tuple(Figure(**figure) for figure in scene["figures"]),
        tuple(Action(**action) for action in scene["actions"]),
        tuple(Sound(**sound) for sound in scene["sounds"]),
        Ambient(**scene["ambient"]) if scene["ambient"] else None,
        scene["texture_seed"],
    )


def _start(out: Path, settings: MakeSettings) -> int:
    """The number of clips that the folder holds; its settings are noted at the first start and compared later."""
    state, wanted = out / "state.json", {"version": VERSION, "world": WORLD, **asdict(settings)}
    if state.is_file():
        differing = differences(json.loads(state.read_text(encoding="utf-8")), wanted)
        if differing:
            raise KokaneeError(
                f"{out} was made with other settings ({'; '.join(differing)}). Use the same, or another folder."
            )
    else:
        refuse_foreign(out, state.name)
        write_json(state, wanted)
    samples = out / "samples.jsonl"
    return len(read_jsonl(samples)) if samples.is_file() else 0
