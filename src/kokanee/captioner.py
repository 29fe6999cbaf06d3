"""Files -> captions: of a whole clip or of every interval, one or several samples, as text that grows or as records.

captioner = Captioner.from_pretrained("nano")
print(captioner.caption("clip.mp4").text)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch

from kokanee.checkpoints import Type, base_of, load, locate, save
from kokanee.defaults import Defaults, origin
from kokanee.errors import KokaneeError
from kokanee.files import is_image
from kokanee.generation import Answer, Decoding, TextStream, answers, end_ids, steps, text_of
from kokanee.media import file_length_s, read_image
from kokanee.model import Kokanee
from kokanee.processor import Processor, Sample
from kokanee.prompt import Turn
from kokanee.weights import Device

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kokanee.caption_run import Summary

Source = str | os.PathLike[str]
BOTH = ("video", "audio")
SHORTEST_REST = 0.25
ROUNDING_S = 0.1  # less than this is a matter of where a last frame or packet ends


@dataclass(frozen=True)
class Request:
    """One question about a file, or about its part from `start_s` to `end_s` (seconds; None: to either end).

    question None: the checkpoint's own. use: "video", "audio" or both.
    """

    path: Source
    question: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    use: Sequence[str] = BOTH


@dataclass(frozen=True)
class Caption:
    """A caption of the part of a file from `start_s` to `end_s` (0 and 0 of a still image).

    sample, seed: which of several, and the random numbers' seed (None where greedy). n_tokens: without the end token.
    finished: the model came to its end; otherwise it was cut off. notes: what was unusual about the file.
    """

    text: str
    start_s: float
    end_s: float
    sample: int = 0
    seed: int | None = None
    n_tokens: int = 0
    finished: bool = True
    notes: tuple[str, ...] = ()


class How(TypedDict, total=False):
    """Keywords that every method takes: the fields of `Decoding`."""

    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class Prepared:
    """A request that was read: the model's input, of which file and part of it, and notes about it."""

    sample: Sample
    name: str
    start_s: float
    end_s: float
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        """What its random numbers follow from, beside the seed: the file's name and the part's start."""
        return f"{self.name}/{self.start_s:.3f}"


class Captioner:
    """A model with its processor that captions files. `from_pretrained` loads one.

    All methods take a file (video, sound or still image) and optionally a question; `use=("video",)` or `("audio",)`
    ignores the other sense. They raise `KokaneeError` for what cannot be read, and for an interval outside the file.
    Decoding is greedy unless a `temperature` is given; the seed, the file's name and the interval then decide, in
    whatever batch a clip is.
    """

    def __init__(
        self,
        model: Kokanee,
        processor: Processor,
        defaults: Defaults | None = None,
        name: str = "",
        base: str | None = None,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.defaults = defaults or Defaults()
        self.name, self.base = name, base

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = "nano",
        *,
        device: Device = "auto",
        dtype: Type = None,
        attention: str = "sdpa",
        base: str | Path | None = None,
        **processor_settings: Any,
    ) -> Captioner:
        """Load "nano", a checkpoint's folder, or a model of the hub; see `checkpoints.load`.

        `device` "auto": all accelerators, or the CPU if there is none. `dtype` None: as stored, but float32 on a CPU.
        """
        folder = locate(name_or_folder)
        if device == "auto" and not torch.accelerator.is_available():
            device = "cpu"
        if dtype is None and str(device) == "cpu":
            dtype = torch.float32
        model, processor = load(
            folder, dtype=dtype, device=device, base=base, attention=attention, **processor_settings
        )
        below = base_of(folder, base)
        defaults = Defaults.of(origin(folder, below))
        return cls(model, processor, defaults, str(name_or_folder), None if below is None else str(below))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Kokanee folder with the checkpoint's own question; see `checkpoints.save`."""
        self.defaults.save(save(self.model, self.processor, folder))

    def caption(
        self,
        path: Source,
        question: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        *,
        use: Sequence[str] = BOTH,
        **how: Unpack[How],
    ) -> Caption:
        """The caption of a file, or the answer to a question about it."""
        return self.batch([Request(path, question, start_s, end_s, use)], **how)[0]

    def stream(
        self,
        path: Source,
        question: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        *,
        use: Sequence[str] = BOTH,
        **how: Unpack[How],
    ) -> CaptionStream:
        """The same piece by piece, as it is made: an iterator over text, whose `caption` holds the whole at its end."""
        return self.begin(Request(path, question, start_s, end_s, use), self.decoding(how))

    def begin(self, request: Request, decoding: Decoding) -> CaptionStream:
        """Read a file and give its caption as a stream."""
        return CaptionStream(self, self.prepare(request), decoding)

    def samples(
        self,
        path: Source,
        n: int,
        temperature: float = 1.0,
        top_p: float = 0.9,
        seed: int = 0,
        *,
        question: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        use: Sequence[str] = BOTH,
        max_new_tokens: int | None = None,
    ) -> list[Caption]:
        """`n` captions of one file from one reading and one prefill. Sample k does not depend on `n`."""
        how = How(temperature=temperature, top_p=top_p, seed=seed)
        if max_new_tokens is not None:
            how["max_new_tokens"] = max_new_tokens
        check_samples(n, temperature)
        prepared = self.prepare(Request(path, question, start_s, end_s, use))
        return self.answer([prepared], self.decoding(how), n)[0]

    def batch(
        self, requests: Iterable[Request | Source], question: str | None = None, **how: Unpack[How]
    ) -> list[Caption]:
        """One caption for each file or `Request`, all computed together; `question` is for requests without one."""
        decoding = self.decoding(how)
        asked = [request if isinstance(request, Request) else Request(request) for request in requests]
        prepared = [self.prepare(request, question) for request in asked]
        return [captions[0] for captions in self.answer(prepared, decoding)]

    def every(
        self,
        path: Source,
        every_s: float,
        question: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        *,
        use: Sequence[str] = BOTH,
        n_samples: int = 1,
        batch_size: int = 1,
        **how: Unpack[How],
    ) -> Iterator[Caption]:
        """Captions of one interval of `every_s` seconds after the other, as they are made; see `intervals`.

        `batch_size` intervals are computed together. Only an interval's own frames are kept. Where sound goes on after
        the picture, the intervals go on too, by sound alone.
        """
        decoding = self.decoding(how)
        check_samples(n_samples, decoding.temperature)
        for group in groups(self.parts(path, every_s, start_s, end_s, use), batch_size):
            prepared = [self.prepare(Request(path, question, *part, use)) for part in group]
            for captions in self.answer(prepared, decoding, n_samples):
                yield from captions

    def parts(
        self,
        path: Source,
        every_s: float,
        start_s: float | None = None,
        end_s: float | None = None,
        use: Sequence[str] = BOTH,
    ) -> list[tuple[float, float]]:
        """The intervals of `every`: start and end in seconds."""
        if is_image(path):
            raise KokaneeError(f"{path} is a still image and has no intervals. Caption it as a whole.")
        return intervals(start_s or 0.0, file_length_s(path, use), every_s, end_s)

    def caption_files(
        self,
        paths: Sequence[Source],
        out: Source | None,
        question: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        *,
        every_s: float | None = None,
        n_samples: int = 1,
        use: Sequence[str] = BOTH,
        batch_size: int = 1,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        **how: Unpack[How],
    ) -> Summary:
        """Caption many files into the JSON lines of `out`; goes on where an earlier run stopped. See caption_run.py."""
        from kokanee.caption_run import Task, run

        task = Task(question, start_s, end_s, every_s, n_samples, tuple(use), self.decoding(how))
        return run(
            self, [Path(path) for path in paths], None if out is None else Path(out), task, batch_size, on_record
        )

    def decoding(self, how: How) -> Decoding:
        """The settings of the decode loop: what the caller gave, else the checkpoint's defaults."""
        return Decoding(**{"max_new_tokens": self.defaults.max_new_tokens, **how})

    def prepare(self, request: Request, question: str | None = None) -> Prepared:
        """Read a file and prepare it for the model; the question is the request's, the given one or the default."""
        turns = [Turn("user", request.question or question or self.defaults.question)]
        name = Path(request.path).name
        if is_image(request.path):
            if request.start_s is not None or request.end_s is not None:
                raise KokaneeError(f"{request.path} is a still image and has no intervals. Leave start and end out.")
            if "video" not in request.use:
                raise KokaneeError(
                    f"{request.path} is a still image: there is nothing to hear. Leave --audio-only out."
                )
            notes: list[str] = []
            image = read_image(request.path, notes)
            return Prepared(self.processor.prepare(image, turns), name, 0.0, 0.0, tuple(notes))
        clip = self.processor.read(Path(request.path), request.start_s, request.end_s, request.use)
        sample = self.processor.prepare(clip, turns)
        notes = [*clip.notes, *self.length_notes(sample)]
        if request.end_s is not None and clip.end_s < request.end_s - ROUNDING_S:
            notes.append(f"the file ends at {clip.end_s:.2f} s, before the end that was asked for")
        return Prepared(sample, name, clip.start_s, clip.end_s, tuple(notes))

    def length_notes(self, sample: Sample) -> list[str]:
        """A note where a clip is longer than the positions that the model knows."""
        longest, known = int(sample["position_ids"].max()) + 1, self.model.config.text_config.max_position_embeddings
        if longest <= known:
            return []
        return [f"too long for this model ({longest} positions, it knows {known}); caption shorter parts (--every)"]

    def answer(self, prepared: Sequence[Prepared], decoding: Decoding, n_samples: int = 1) -> list[list[Caption]]:
        """`n_samples` captions for each of several prepared requests, from one prefill."""
        if not prepared:
            return []
        batch = self.processor.collate([part.sample for part in prepared], padding_side="left")
        found = answers(self.model, batch, decoding, n_samples, [part.key for part in prepared])
        rows = groups(found, n_samples)
        return [
            [self.made(part, answer, decoding, sample) for sample, answer in enumerate(row)]
            for part, row in zip(prepared, rows, strict=True)
        ]

    def made(self, part: Prepared, answer: Answer, decoding: Decoding, sample: int = 0) -> Caption:
        """The caption that an answer is."""
        return Caption(
            text=text_of(self.processor.tokenizer, answer.ids),
            start_s=part.start_s,
            end_s=part.end_s,
            sample=sample,
            seed=decoding.seed if decoding.temperature else None,
            n_tokens=len(answer.ids),
            finished=answer.finished,
            notes=part.notes,
        )


class CaptionStream:
    """Pieces of a caption as they are made. `caption` is None until the last has been taken."""

    def __init__(self, captioner: Captioner, part: Prepared, decoding: Decoding) -> None:
        self.captioner, self.part, self.decoding = captioner, part, decoding
        self.caption: Caption | None = None
        self._pieces = self._make()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _make(self) -> Iterator[str]:
        processor, model = self.captioner.processor, self.captioner.model
        batch = processor.collate([self.part.sample], padding_side="left")
        text, answer, ends = TextStream(processor.tokenizer), Answer(), end_ids(model)
        for (token,) in steps(model, batch, self.decoding, keys=[self.part.key]):
            if token in ends:
                answer.finished = True
            else:
                answer.ids.append(token)
                if piece := text.add(token):
                    yield piece
        if piece := text.end():
            yield piece
        self.caption = self.captioner.made(self.part, answer, self.decoding)


def check_samples(n_samples: int, temperature: float) -> None:
    """Raise `KokaneeError` for a number of samples that cannot be, or that would all be the same."""
    if n_samples < 1:
        raise KokaneeError(f"{n_samples} samples were asked for. Give at least 1.")
    if n_samples > 1 and temperature == 0:
        raise KokaneeError(f"At temperature 0 all {n_samples} samples are the same. Give a temperature, such as 1.")


def intervals(start_s: float, length_s: float, every_s: float, end_s: float | None = None) -> list[tuple[float, float]]:
    """From `start_s` on, stretches of `every_s` seconds up to `end_s` or the file's end, whichever comes first.

    What is left at the end is a stretch of its own, unless it is shorter than a quarter of `every_s`: then the stretch
    before it is longer by as much. Raises `KokaneeError` where there is nothing to divide.
    """
    if not (math.isfinite(every_s) and every_s > 0):
        raise KokaneeError(f"Intervals of {every_s} s cannot be. Give a time above 0.")
    stop_s = length_s if end_s is None else min(end_s, length_s)
    if not 0 <= start_s < stop_s:
        raise KokaneeError(
            f"There is nothing from {start_s:g} s to {stop_s:g} s; the file lasts {length_s:.2f} s. "
            "Choose a part inside it."
        )
    count = max(1, math.ceil((stop_s - start_s) / every_s - SHORTEST_REST))
    edges_s = [start_s + number * every_s for number in range(count)] + [stop_s]
    return list(pairwise(edges_s))


Item = TypeVar("Item")


def groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`; the last may be shorter."""
    if size < 1:
        raise KokaneeError(f"A batch of {size} cannot be. Give a batch_size of at least 1.")
    waiting = iter(items)
    while group := list(islice(waiting, size)):
        yield group
