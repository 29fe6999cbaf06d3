"""Clips as the language model is shown them, encoded, and what is true of them: what rounds of mrDPO sample and judge.

Encoders and aligners are frozen there, so that what they make of a clip is computed once. Clips of the world come from
a store of features, all others from files, with the captions of people who saw them and their events.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import safe_open

from kokanee.captions import ahead
from kokanee.conversations import block_of, digest
from kokanee.errors import KokaneeError, TooLittleMemory
from kokanee.events import AtomicEvent
from kokanee.features import Features, read_store
from kokanee.files import by_names, file_key
from kokanee.formats import append_jsonl, read_jsonl, write_jsonl
from kokanee.ground_truth import Truth, place, read_ground_truth
from kokanee.model import Kokanee
from kokanee.predictions import read_predictions
from kokanee.processor import Processor
from kokanee.questions import Question, in_folder, in_words, read_questions
from kokanee.views import Shown, View, keep_view, kept_version, read_view, seen, shown_of, version_of
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import exact, facts_of
from kokanee.world.language import write
from kokanee.world.questions import CAPTION_PROMPTS, ask
from kokanee.world.scene import Split, sample_scene

logger = logging.getLogger("kokanee")
HEARD_TOGETHER = 64  # clips of the world
UNREADABLE, UNUSUAL = "unreadable-{}.jsonl", "unusual-{}.jsonl"
GroundTruthCaption = Literal["annotated", "exact"]


@dataclass(frozen=True)
class Task:
    """A request for a caption of clip number `number`, with a caption of somebody who saw it and all that is true.

    questions: other questions about the clip, with their answers. finished: the caption was not cut off.
    """

    number: int
    name: str
    prompt: str
    ground_truth: str
    truth: Truth
    questions: tuple[tuple[str, str], ...] = ()
    finished: bool = True

    def asking(self, question: str) -> Task:
        """The same clip, asked something else."""
        return replace(self, prompt=question)


class Clips(Protocol):
    """A collection of clips, by number. `n_tokens`: how long a clip is in a prompt, to batch like with like."""

    def __len__(self) -> int: ...

    def identity(self) -> str:
        """Which clips these are, and what is known of them."""
        ...

    def files(self) -> list[Path]:
        """The files that they are in; none where their features are kept."""
        ...

    def origin(self, number: int) -> str:
        """What a clip is of, which other clips may be of as well: a file, or a scene of the world."""
        ...

    def readable(self, numbers: Sequence[int], report: Callable[[int, int], None], share: tuple[int, int]) -> None:
        """Encode those that are not yet; `share` (k, n): every n-th of them, from the k-th on."""
        ...

    def failed(self) -> dict[int, str]:
        """Clips that could not be read, and why."""
        ...

    def try_again(self, memory: bool = False) -> None:
        """Forget which clips could not be read, so that they are tried when they are wanted again; `memory`: those
        alone for which the device had too little of it."""
        ...

    def forget(self, numbers: Sequence[int]) -> None:
        """Give back the room that encoded clips take; they are encoded again when they are wanted again."""
        ...

    def n_tokens(self, number: int) -> int: ...
    def view(self, number: int) -> View: ...

    def task(self, number: int, n_questions: int, key: str) -> Task:
        """`key`: what the random choices (of a prompt, an annotator, questions) follow from."""
        ...


class WorldData(BaseModel):
    """Clips of the world: a folder of their features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: str = Field(description="folder that `kokanee world features` wrote")
    seed: int = Field(0, description="the world's seed, as in the store")
    ground_truth: GroundTruthCaption = Field("annotated", description="whose caption the cross-entropy is of")
    bias: dict[str, float] = Field(default_factory=dict, description="of the annotators, see world/annotators.py")

    @field_validator("bias")
    @classmethod
    def _known(cls, bias: dict[str, float]) -> dict[str, float]:
        unknown = set(bias) - {field.name for field in fields(Bias)}
        if unknown:
            raise ValueError(f"bias has no {', '.join(sorted(unknown))}")
        return bias


class FileData(BaseModel):
    """Videos of your own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    videos: str = Field(description="folder that the files' names start from")
    captions: str | None = Field(None, description="of people who saw them, in any form that `kokanee score` reads")
    events: str | None = Field(None, description="their events, as from `kokanee events`")
    questions: str | None = Field(None, description="about them, in any form that `kokanee qa` reads")
    prompts: tuple[str, ...] = Field((), description="requests for a caption; the checkpoint's own, if left out")
    unreadable: float = Field(0.02, ge=0, le=1, description="largest share of files that may be left out as unreadable")

    @field_validator("videos", "captions", "events", "questions")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser())


class WorldClips:
    """Clips of the world, from the features of a store (`features.py`). The audio aligner runs here, once a clip."""

    def __init__(self, model: Kokanee, processor: Processor, data: WorldData, split: Split) -> None:
        self.model, self.processor, self.data, self.split = model, processor, data, split
        self.bias = Bias(**data.bias)
        self.features = read_store(Path(data.features), model, split, data.seed)
        self.heard: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    def identity(self) -> str:
        return digest([clip.stretch for clip in self.features])

    def files(self) -> list[Path]:
        return []

    def origin(self, number: int) -> str:
        return str(self.features[number].stretch.index)

    def readable(self, numbers: Sequence[int], report: Callable[[int, int], None], share: tuple[int, int]) -> None:
        missing = [number for number in numbers if number not in self.heard]
        for at in range(0, len(missing), HEARD_TOGETHER):  # here, as processes that make batches may have no device
            self.hear(missing[at : at + HEARD_TOGETHER])

    def failed(self) -> dict[int, str]:
        return {}

    def try_again(self, memory: bool = False) -> None:
        pass

    def forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.heard.pop(number, None)

    def n_tokens(self, number: int) -> int:
        clip = self.features[number]
        return len(clip.video_ND) + self.n_audio_tokens(clip)

    def n_audio_tokens(self, clip: Features) -> int:
        return len(clip.audio_CSD) * self.model.config.audio_tokens_per_chunk

    @torch.no_grad()
    def hear(self, numbers: Sequence[int]) -> None:
        """Make the audio tokens of some clips, and keep them."""
        states = [self.features[number].audio_CSD for number in numbers]
        aligned_CTH = self.model.audio.align(torch.cat(states).to(self.model.device, self.model.dtype)).cpu()
        for number, tokens_CTH in zip(numbers, aligned_CTH.split([len(one) for one in states]), strict=True):
            self.heard[number] = tokens_CTH.flatten(0, 1).clone()  # its own, so that it can be given up alone

    def view(self, number: int) -> View:
        clip = self.features[number]
        if number not in self.heard:
            self.hear([number])
        media = {"video_embeds": clip.video_ND.to(self.model.dtype), "audio_embeds": self.heard[number]}
        block = block_of(clip, "both", self.n_audio_tokens(clip))
        assert block is not None
        return View(block, media)

    def task(self, number: int, n_questions: int, key: str) -> Task:
        stretch = self.features[number].stretch
        scene = sample_scene(self.split, stretch.index, self.data.seed)
        rng = random.Random(f"{key}/{self.split}/{stretch.index}")
        ends = (stretch.start_s, stretch.end_s)
        events = exact(scene, *ends)
        told = facts_of(events) if self.data.ground_truth == "exact" else annotate(events, self.bias, rng)
        found = tuple(AtomicEvent(event.text, event.sense) for event in events)
        name = f"{self.split}-{stretch.index:05d}"
        return Task(
            number,
            name,
            rng.choice(CAPTION_PROMPTS["both"]),
            write(told, rng),
            Truth(name, found, *ends, tuple(event.fact for event in events)),
            tuple((asked.text, asked.answer) for asked in ask(scene, rng, n_questions, *ends)),
        )


@dataclass(frozen=True)
class Known:
    """A file, or an interval of it, with somebody's caption and its events. `file`: its name as the caption has it."""

    file: str
    path: Path
    caption: str
    truth: Truth
    finished: bool = True


class FileClips:
    """Clips in files. What the encoders make of them is kept in `store`, with the reasons of those that they cannot
    read. `judged`: raise `KokaneeError` for a clip without events. `asked_of_others`: questions about no clip of these.
    """

    def __init__(
        self, model: Kokanee, processor: Processor, data: FileData, store: Path, question: str, judged: bool = True
    ) -> None:
        self.model, self.processor, self.data, self.store = model, processor, data, store
        self.prompts = data.prompts or (question,)
        self.known = known_of(data, judged)
        files = {one.file: one.path for one in self.known}
        asked = questions_of(Path(data.questions), Path(data.videos), files) if data.questions else ({}, [])
        self.asked, self.asked_of_others = asked

    def __len__(self) -> int:
        return len(self.known)

    def identity(self) -> str:
        folder = Path(self.data.videos)  # by names: where a name is found changes when its file goes
        known = [((folder / one.file).as_posix(), one.caption, one.truth) for one in self.known]
        return digest([*known, sorted(self.asked.items())])

    def files(self) -> list[Path]:
        return list({one.path: None for one in self.known})

    def origin(self, number: int) -> str:
        return str(self.known[number].path.resolve())

    def readable(self, numbers: Sequence[int], report: Callable[[int, int], None], share: tuple[int, int]) -> None:
        failed = self.failed()
        mine = list(numbers)[share[0] :: share[1]]  # first: what others have written must not change whose turn it is
        missing = [number for number in mine if number not in failed and not self.is_kept(number)]
        unusual: list[str] = []
        for done, (number, (version, shown)) in enumerate(zip(missing, ahead(missing, self.read), strict=True), 1):
            view = seen(self.model, shown)
            if isinstance(view, View):
                keep_view(self.place(number), view, version)
                if view.notes:
                    record = {"clip": number, "file": self.known[number].file, "notes": view.notes}
                    append_jsonl(self.store / UNUSUAL.format(share[0]), [record])
                    unusual.append(f"{record['file']}: {'; '.join(view.notes)}")
            else:
                record = {"clip": number, "file": place(self.known[number].truth), "reason": str(view)}
                record["version_of_file"] = version_of(self.known[number].path)
                record["memory"] = isinstance(view, TooLittleMemory)
                append_jsonl(self.store / UNREADABLE.format(share[0]), [record])
            report(done, len(missing))
        if unusual:
            counts = (len(unusual), len(missing))
            logger.warning("%d of %d files are unusual, such as %s (all: %s)", *counts, unusual[0], self.store)

    def failed(self) -> dict[int, str]:
        """Those that could not be read, as long as their files are the same."""
        files = sorted(self.store.glob(UNREADABLE.format("*")))
        records = [record for path in files for record in read_jsonl(path)]
        same = [
            record for record in records if record["version_of_file"] == version_of(self.known[record["clip"]].path)
        ]
        return {record["clip"]: record["reason"] for record in same}

    def try_again(self, memory: bool = False) -> None:
        for path in self.store.glob(UNREADABLE.format("*")):
            records = read_jsonl(path)
            left = [record for record in records if memory and not record.get("memory")]
            if left != records:
                write_jsonl(path, left)

    def forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.place(number).unlink(missing_ok=True)

    def is_kept(self, number: int) -> bool:
        """Whether a clip is kept as its file is now, or was when it was last there."""
        kept, version = self.place(number), version_of(self.known[number].path)
        return kept.is_file() and (version is None or kept_version(kept) in (version, None))

    def read(self, number: int) -> tuple[list[int] | None, Shown | KokaneeError]:
        """What a clip shows, or why it cannot be read, with the version of its file from before it was read: what comes
        meanwhile is another one."""
        one = self.known[number]
        return version_of(one.path), shown_of(self.processor, one.path, one.truth.start_s, one.truth.end_s)

    def place(self, number: int) -> Path:
        return self.store / f"clip-{number:06d}.safetensors"

    def n_tokens(self, number: int) -> int:
        with safe_open(self.place(number), "pt") as file:
            return sum(file.get_slice(name).get_shape()[0] for name in file.keys())  # noqa: SIM118

    def view(self, number: int) -> View:
        return read_view(self.place(number))

    def task(self, number: int, n_questions: int, key: str) -> Task:
        one = self.known[number]
        rng = random.Random(f"{key}/{number}")
        whole = one.truth.start_s is None and one.truth.end_s is None  # nobody knows which part a question is about
        asked = self.asked.get(one.file, []) if whole else []
        questions = tuple(rng.sample(asked, min(n_questions, len(asked))))
        prompt = rng.choice(self.prompts)
        return Task(number, place(one.truth), prompt, one.caption, one.truth, questions, one.finished)


def known_of(data: FileData, judged: bool) -> list[Known]:
    """The clips that have a caption, with their events; `judged`: all must have both, and no caption be empty."""
    if data.captions is None:
        raise KokaneeError(f"Nobody's captions of {data.videos} are given. Give data's captions: a file of them.")
    truths = read_ground_truth(Path(data.events)) if data.events else None
    everything = read_predictions(Path(data.captions))
    told = [said for said in everything if (said.text or not (judged or said.reason)) and not said.sample]
    if not told:
        raise KokaneeError(f"{data.captions} holds no captions. Give a file of captions.")
    paths = located([said.file for said in told], Path(data.videos))
    found = [(said, truths.of(said) if truths else None) for said in told]
    lacking = [place(said) for said, truth in found if truth is None or not truth.events]
    if lacking and judged:
        raise KokaneeError(
            f"{len(lacking)} of {len(found)} captions of {data.captions} are of something that has no events in "
            f"{data.events}{', such as ' * bool(lacking)}{', '.join(lacking[:3])}. Make events of all captions "
            "(kokanee events), or remove these captions."
        )
    return [
        Known(
            said.file,
            paths[said.file],
            said.text,
            replace(truth, file=said.file) if truth else Truth(said.file, (), said.start_s, said.end_s),
            said.finished,
        )
        for said, truth in found
    ]


def located(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """The file of a folder that each name means, see `files.by_names`. Raises `KokaneeError` for two of the same file:
    one of them may be of a file that was elsewhere."""
    path_of = by_names(folder)
    paths = {name: path_of(name) for name in names}
    owners: dict[str, str] = {}
    for name, path in paths.items():
        other = owners.setdefault(file_key(path), name)
        if other != name:
            raise KokaneeError(f"{other} and {name} both mean {path}. Name files by their paths below {folder}.")
    return paths


def questions_of(
    path: Path, folder: Path, files: Mapping[str, Path]
) -> tuple[dict[str, list[tuple[str, str]]], list[Question]]:
    """The questions about each of these files of a folder, with their answers, by the names that the files have, from
    any file that `kokanee qa` reads, found as there; and those that are about none of the files.

    Raises `KokaneeError` for a line that is no question, and where no question is about any of the files.
    """
    path_of, names = in_folder(folder), {file_key(there): name for name, there in files.items()}
    found: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    others = []
    for asked in read_questions(path):
        name = names.get(file_key(path_of(asked.file)))
        if name is None:
            others.append(asked)
        else:
            found[name].append(in_words(asked))
    if not found:
        raise KokaneeError(
            f"No question of {path} is about a file that has a caption (such as {others[0].file}). Check the names."
        )
    return dict(found), others
