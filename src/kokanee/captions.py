"""What is asked of files and what comes back, and what every captioner does with it, whatever computes. No torch here.

`FileCaptioner` is the frame: files, intervals, samples and batches. captioner.py fills it with a model, remote.py with
a server.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import numpy as np

from kokanee.defaults import Defaults
from kokanee.errors import KokaneeError, TooLittleMemory
from kokanee.files import is_image
from kokanee.media import Clip, file_length_s, named, read_image

if TYPE_CHECKING:
    from typing import Unpack

    from kokanee.caption_run import Summary

Source = str | os.PathLike[str]
BOTH = ("video", "audio")
SHORTEST_REST = 0.25
ROUNDING_S = 0.1  # less than this is a matter of where a last frame or packet ends
SEED_BITS = 63
Medium = Clip | np.ndarray
Item = TypeVar("Item")
Given = TypeVar("Given")


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
    repetition_penalty: float


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. Raises `KokaneeError` for values that cannot be.

    temperature: 0 takes the likeliest token always (greedy; the seed has no effect). top_p: only the likeliest tokens
    that together have this probability are drawn from; the published scripts sample with 0.9. seed: of the random
    numbers. max_new_tokens: where an answer is cut off that has not come to its end, 1024 as published.
    repetition_penalty: what the scores of tokens that the prompt or the answer holds already are divided by (multiplied
    by, below 0), as transformers does (CTRL, arXiv 1909.05858, section 4.1); 1 changes nothing. With video-SALMONN 2
    only the answer counts, as published.
    """

    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0
    max_new_tokens: int = 1024
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise KokaneeError(f"temperature is {self.temperature}. Give 0 (greedy) or more, such as 1.")
        if not 0 < self.top_p <= 1:
            raise KokaneeError(f"top_p is {self.top_p}, but it is a probability. Give more than 0 and at most 1.")
        if self.max_new_tokens < 1:
            raise KokaneeError(f"max_new_tokens is {self.max_new_tokens}. Give at least 1.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise KokaneeError(f"repetition_penalty is {self.repetition_penalty}. Give 1 (none) or more, such as 1.05.")


@dataclass(frozen=True)
class Prepared:
    """A request that was read: what the model takes of it, of which file and part it is, and notes about it."""

    sample: Any
    name: str
    start_s: float
    end_s: float
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        """What its random numbers follow from, beside the seed: the file's name and the part's start."""
        return f"{self.name}/{self.start_s:.3f}"


class CaptionStream:
    """Pieces of a caption as they are made. `caption` is None until the last has been taken."""

    def __init__(self, pieces: Generator[str, None, Caption]) -> None:
        self.caption: Caption | None = None
        self._pieces = self._to_the_end(pieces)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _to_the_end(self, pieces: Generator[str, None, Caption]) -> Iterator[str]:
        self.caption = yield from pieces


class FileCaptioner(ABC):
    """What captions files. Whoever fills the frame says what a model takes of a file, and what it answers.

    All methods take a file (video, sound or still image) and optionally a question; `use=("video",)` or `("audio",)`
    ignores the other sense. They raise `KokaneeError` for what cannot be read, and for an interval outside the file.
    Decoding is greedy unless a `temperature` is given; the seed, the file's name and the interval then decide, in
    whatever batch a clip is.
    """

    name: str
    defaults: Defaults

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a caption depends on beside its question and decoding, as records keep it: model and `processor`."""

    @abstractmethod
    def read(self, request: Request) -> Clip:
        """The part of a video or sound file that is asked about, sampled for the model."""

    @abstractmethod
    def sample(self, medium: Medium, question: str, notes: list[str]) -> Any:
        """What the model takes of a clip or image; `notes` is told what is unusual about it."""

    @abstractmethod
    def answer(self, prepared: Sequence[Prepared], decoding: Decoding, n_samples: int = 1) -> list[list[Caption]]:
        """`n_samples` captions for each of several prepared requests."""

    def growing(self, part: Prepared, decoding: Decoding) -> Generator[str, None, Caption]:
        """The pieces of a caption as they are made, here in one; returns the caption."""
        caption = self.answer([part], decoding)[0][0]
        yield caption.text
        return caption

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
        return CaptionStream(self.growing(self.prepare(request), decoding))

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
        """One caption for each file or `Request`, all computed together; `question` is for requests without one.

        The first file that cannot be read ends it without any caption: `each` gives errors in the captions' place.
        """
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
        own = {name: getattr(self.defaults, name) for name in ("max_new_tokens", "repetition_penalty")}
        return Decoding(**{**own, **how})

    def prepare(self, request: Request, question: str | None = None) -> Prepared:
        """Read a file and prepare it for the model; the question is the request's, the given one or the default."""
        asked = request.question or question or self.defaults.question
        name, notes = Path(request.path).name, list[str]()
        if is_image(request.path):
            if request.start_s is not None or request.end_s is not None:
                raise KokaneeError(f"{request.path} is a still image and has no intervals. Leave start and end out.")
            if "video" not in request.use:
                raise KokaneeError(
                    f"{request.path} is a still image: there is nothing to hear. Leave --audio-only out."
                )
            with named(Path(request.path)):
                sample = self.sample(read_image(request.path, notes), asked, notes)
            return Prepared(sample, name, 0.0, 0.0, tuple(notes))
        clip = self.read(request)
        notes += clip.notes
        sample = self.sample(clip, asked, notes)
        notes += ended_before(clip.end_s, request.end_s)
        return Prepared(sample, name, clip.start_s, clip.end_s, tuple(notes))

    def each(
        self, requests: Iterable[Request], decoding: Decoding, n_samples: int = 1, batch_size: int = 1
    ) -> Iterator[tuple[Request, list[Caption] | KokaneeError]]:
        """Each request with its captions or with why it has none, as they are done; none stops the others.

        `batch_size` are computed together; where that fails, one by one. Meanwhile the next are read.
        """

        def read_all(group: list[Request]) -> list[tuple[Request, Prepared | KokaneeError]]:
            return [(request, attempt(partial(self.prepare, request))) for request in group]

        for read in ahead(groups(requests, batch_size), read_all):
            parts = [part for _, part in read if isinstance(part, Prepared)]
            made = attempt(partial(self.answer, parts, decoding, n_samples))
            if isinstance(made, KokaneeError):
                alone = [partial(self.answer, [part], decoding, n_samples) for part in parts]
                again = [made] if len(parts) == 1 else [attempt(work) for work in alone]
                made = [found if isinstance(found, KokaneeError) else found[0] for found in again]
            answered = iter(made)
            for request, part in read:
                yield request, part if isinstance(part, KokaneeError) else next(answered)


def ahead(items: Iterable[Given], work: Callable[[Given], Item]) -> Iterator[Item]:
    """What `work` makes of each item, in order; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        made: Future[Item] | None = None
        for item in items:
            coming = thread.submit(work, item)
            if made is not None:
                yield made.result()
            made = coming
        if made is not None:
            yield made.result()


def ended_before(end_s: float, wanted_s: float | None) -> list[str]:
    """A note where a file's end comes before the end of the interval that was asked about."""
    early = wanted_s is not None and end_s < wanted_s - ROUNDING_S
    return [f"the file ends at {end_s:.2f} s, before the end that was asked for"] if early else []


def attempt(work: Callable[[], Item]) -> Item | KokaneeError:
    """What `work` gives, or a `KokaneeError` like the one that it raises, without what that keeps in memory."""
    try:
        return work()
    except TooLittleMemory as error:
        return TooLittleMemory(str(error))
    except KokaneeError as error:
        return KokaneeError(str(error))


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


def groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`; the last may be shorter."""
    if size < 1:
        raise KokaneeError(f"A batch of {size} cannot be. Give a batch_size of at least 1.")
    waiting = iter(items)
    while group := list(islice(waiting, size)):
        yield group


def stream_seed(seed: int, key: str, sample: int) -> int:
    """The seed of one sample's random numbers; neighbouring seeds, prompts and samples have nothing in common."""
    digest = hashlib.sha256(f"kokanee/{seed}/{sample}/{key}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
