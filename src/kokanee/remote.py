"""Files -> captions by a server that speaks OpenAI's chat protocol, of frames with their times and of the sound.

captioner = RemoteCaptioner(Endpoint("gpt-4o"))
print(captioner.caption("clip.mp4", use=("video",)).text)

A message holds, in this order: each frame after its time ("0:03.5"), the sound after its stretch, the question.
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import wave
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kokanee.captions import Caption, Decoding, FileCaptioner, Medium, Prepared, Request, stream_seed
from kokanee.defaults import Defaults
from kokanee.endpoint import Asker, Endpoint, Message, Stop, Unanswered, Unreachable, each, running
from kokanee.errors import KokaneeError, reasons
from kokanee.media import Clip, read_clip
from kokanee.sampling import RATE_HZ, Sampling

DEFAULTS = Defaults(
    "Describe this video in full detail, from its beginning to its end: the place, the people and things in it and how "
    "they look, and all that happens, in the order in which it happens. Tell also what is heard: who speaks and what "
    "is said, word for word where you can, the music, and every other sound, together with what is seen at that "
    "moment. Read out any text that appears. Tell only what is there to see and hear. Write flowing text without "
    "headings, and do not tell the times of the frames."
)
TIMEOUT_S = 600.0  # a server on a small machine looks at many frames for minutes
JPEG_QUALITY = 90
CLIPS_KEPT = 2
SEED_RANGE = 2**31  # some servers take seeds of 32 bits only
Item = TypeVar("Item")
Job = TypeVar("Job")


class FrameSettings(BaseModel):
    """What a server is shown of a file. Wrong settings raise `KokaneeError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval_s: float = Field(1.0, gt=0, allow_inf_nan=False, description="seconds between frames")
    max_frames: int = Field(32, ge=1, description="frames at most; of longer files they lie further apart")
    max_side: int = Field(512, ge=1, description="pixels of a frame's longer side at most")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise KokaneeError(f"Wrong settings of frames: {reasons(error, FrameSettings)}. Mend them.") from error


@dataclass
class Place:
    """A clip that several questions may want; the first of them reads it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    clip: Clip | None = None


class RemoteCaptioner(FileCaptioner):
    """A model behind an endpoint; see `FileCaptioner`. At most `endpoint.concurrency` questions are under way.

    Each sample is a question of its own. Above temperature 0 its seed of 31 bits follows from the given one, the
    file's name, the part's start and the sample's number; whether the server heeds it is the server's business.
    """

    def __init__(self, endpoint: Endpoint, frames: FrameSettings | None = None) -> None:
        self.endpoint, self.frames = endpoint, frames or FrameSettings()
        self.name, self.defaults = f"openai:{endpoint.model}", DEFAULTS
        self._places: dict[tuple[Any, ...], Place] = {}
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        return {"model": self.name, "server": self.endpoint.server, "processor": self.frames.model_dump(mode="json")}

    def read(self, request: Request) -> Clip:
        """As the frame says; of several questions about a part that come together the first reads it for all."""
        path = Path(request.path)
        version = path.stat().st_mtime_ns if path.is_file() else None
        key = (path, version, request.start_s, request.end_s, tuple(request.use))
        with self._lock:
            place = self._places.setdefault(key, Place())
            for other in list(self._places)[:-CLIPS_KEPT]:
                del self._places[other]
        with place.lock:
            if place.clip is None:
                place.clip = self.read_alone(request)
            return place.clip

    def read_alone(self, request: Request) -> Clip:
        """The part that is asked about, from its file."""
        sampling = Sampling("salmonn2plus", self.frames.interval_s, 1, self.frames.max_frames)
        return read_clip(
            Path(request.path),
            sampling,
            start_s=request.start_s,
            end_s=request.end_s,
            transform=self.shrink,
            want=tuple(request.use),
        )

    def shrink(self, frame: np.ndarray, n_frames: int = 1) -> np.ndarray:
        """The frame (H,W,3) with sides of at most `max_side` pixels."""
        image = Image.fromarray(frame)
        image.thumbnail((self.frames.max_side, self.frames.max_side))
        return np.asarray(image)

    def sample(self, medium: Medium, question: str, notes: list[str]) -> list[Message]:
        content: list[dict[str, Any]] = []
        if isinstance(medium, np.ndarray):
            content.append(picture_part(self.shrink(medium)))
        else:
            for time_s, frame in zip(medium.times_s, medium.frames or (), strict=True):
                content += [text_part(moment(time_s)), picture_part(frame)]
            if medium.waveform is not None:
                stretch = f"sound from {moment(medium.start_s)} to {moment(medium.end_s)}"
                content += [text_part(stretch), sound_part(medium.waveform)]
        return [{"role": "user", "content": [*content, text_part(question)]}]

    def answer(self, prepared: Sequence[Prepared], decoding: Decoding, n_samples: int = 1) -> list[list[Caption]]:
        numbers, limit = range(len(prepared)), self.endpoint.concurrency
        found = dict(driven(self._answers(numbers, prepared.__getitem__, decoding, n_samples, limit)))
        return [raised(found[number]) for number in numbers]

    def each(
        self, requests: Iterable[Request], decoding: Decoding, n_samples: int = 1, batch_size: int = 1
    ) -> Iterator[tuple[Request, list[Caption] | KokaneeError]]:
        """As the frame says, but `batch_size` questions are under way at any time; one that waits holds up none.

        Raises `KokaneeError` where the server refuses the first questions, twice `batch_size` and at least 8, for good
        (a wrong key, an unknown model), and where nobody listens at its address, at the first question or, later, at so
        many in a row.
        """
        return driven(self._answers(requests, self.prepare, decoding, n_samples, batch_size))

    async def _answers(
        self,
        jobs: Iterable[Job],
        prepare: Callable[[Job], Prepared],
        decoding: Decoding,
        n_samples: int,
        concurrency: int,
    ) -> AsyncGenerator[tuple[Job, list[Caption] | KokaneeError], None]:
        """Each job with its captions as they are done, or with why it has none."""
        if decoding.repetition_penalty != 1:
            raise KokaneeError("Servers are not asked for a repetition_penalty. Leave it out, or set it there.")
        how = {"temperature": decoding.temperature, "top_p": decoding.top_p, "max_tokens": decoding.max_new_tokens}
        free = asyncio.Semaphore(concurrency)

        async def captions(job: Job) -> list[Caption]:
            part = await asyncio.to_thread(prepare, job)

            async def one(number: int) -> Caption:
                async with free:
                    return await self._ask(asker, part, decoding, number)

            # All are waited for even if one fails: a question that nobody waits for would be paid for in vain.
            made = await asyncio.gather(*map(one, range(n_samples)), return_exceptions=True)
            return [raised(caption) for caption in made]

        jobs = iter(jobs)
        first = next(jobs, None)
        if first is None:
            return
        await asyncio.to_thread(self.endpoint.check_reachable)
        async with Asker(replace(self.endpoint, **how, concurrency=concurrency)) as asker:
            async for found in each(chain([first], jobs), captions, concurrency):
                yield found

    async def _ask(self, asker: Asker, part: Prepared, decoding: Decoding, number: int) -> Caption:
        greedy = decoding.temperature == 0
        seed = 0 if greedy else stream_seed(decoding.seed, part.key, number) % SEED_RANGE
        try:
            reply = await asker.reply(part.sample, seed)
        except KokaneeError as error:
            told = self._explained(str(error), part.sample)
            if isinstance(error, Unreachable):
                raise Unreachable(told) from error
            kind = Unanswered if isinstance(error, Stop) else KokaneeError  # else another file may have an answer
            raise kind(told) from error
        text = reply.text.rpartition("</think>")[2].strip()  # what a model thinks aloud is no caption
        if text.startswith("<think>"):
            raise KokaneeError(f"{self.name} was cut off while it thought. Give it more tokens (max_new_tokens).")
        return Caption(
            text=text,
            start_s=part.start_s,
            end_s=part.end_s,
            sample=number,
            seed=None if greedy else decoding.seed,
            n_tokens=reply.tokens_out,
            finished=reply.finished,
            notes=part.notes,
        )

    def _explained(self, error: str, sample: list[Message]) -> str:
        """Why there was no answer, and what helps where a medium is refused."""
        _, _, said = error.lower().partition(" status ")  # what stands before may name a model or a server
        sent = {part["type"] for part in sample[0]["content"]}
        both = {"input_audio", "image_url"} <= sent
        if both and "audio" in said:
            return f"{self.name} does not take the sound. Leave it out with --video-only. (It said: {error})"
        if "image_url" in sent and "image" in said:
            remedy = "Send fewer or smaller ones (--set max_frames=8, --set max_side=256)"
            remedy += ", or leave them out with --audio-only" if both else ""
            return f"{self.name} does not take the pictures. {remedy}. (It said: {error})"
        return error


def raised(found: Item | BaseException) -> Item:
    """What was found, unless it is an error, which is raised."""
    if isinstance(found, BaseException):
        raise found
    return found


def driven(found: AsyncGenerator[Item, None]) -> Iterator[Item]:
    """The items of an asynchronous generator, from an event loop of its own that stands still between them.

    What is under way when no more items are wanted, or at Ctrl-C, is cancelled. Where an event loop runs already, as
    in a notebook, this one runs in a thread.
    """
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1) as pool:
        run = partial(in_thread, pool, loop) if running() else loop.run_until_complete
        try:
            while True:
                try:
                    item = run(anext(found))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            run(cancelled())
            run(found.aclose())  # the loop knows only generators that were begun while it ran
            run(loop.shutdown_asyncgens())
            run(loop.shutdown_default_executor())
            loop.close()


def in_thread(pool: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop, work: Awaitable[Item]) -> Item:
    """The result of asynchronous work in an event loop that runs in a pool's thread."""
    return pool.submit(loop.run_until_complete, work).result()


async def cancelled() -> None:
    """Cancel what is under way in this event loop, and wait for its end."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def moment(time_s: float) -> str:
    """Minutes, seconds and tenths, 0:03.5, and hours where there are any: 1:02:03.5."""
    minutes, tenths = divmod(round(10 * time_s), 600)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}:{minutes:02d}' if hours else minutes}:{tenths // 10:02d}.{tenths % 10}"


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def picture_part(frame: np.ndarray) -> dict[str, Any]:
    """A frame (H,W,3) uint8 as JPEG."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY)
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64_text(file)}"}}


def sound_part(waveform: np.ndarray) -> dict[str, Any]:
    """A waveform (samples,) as WAV: mono, 16 kHz, 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, RATE_HZ, len(waveform), "NONE", ""))
        sound.writeframes((np.clip(waveform, -1.0, 1.0) * 32767).round().astype("<i2").tobytes())
    return {"type": "input_audio", "input_audio": {"data": base64_text(file), "format": "wav"}}


def base64_text(file: io.BytesIO) -> str:
    return base64.b64encode(file.getvalue()).decode()
