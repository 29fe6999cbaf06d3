"""Questions to a language model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama and the like).

Every reply is kept in a file by the content of its question, so that a second run asks nothing and a killed run asks
only what is missing. At most `concurrency` questions are under way; what is busy, late or broken is asked again after
growing waits; a budget of tokens stops the asking cleanly. The key comes from the environment and is written nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openai import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
)

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl, read_jsonl

LONGEST_WAIT_S = 60.0
BUSY = frozenset((408, 409, 425, 429))
Message = dict[str, Any]
Job = TypeVar("Job")
Result = TypeVar("Result")


class Unanswered(KokaneeError):
    """A question that got no usable answer, and why."""


class BudgetSpent(KokaneeError):
    """No question is asked any more: the budget is used up."""


@dataclass(frozen=True)
class Endpoint:
    """Where questions go and how they are asked.

    base_url None: OpenAI's. key_name: the environment variable that holds the key; without it none is sent, as local
    servers want none. attempts: how often a question is asked that gets no reply, waiting `wait_s` seconds after the
    first time, then twice as long each time. budget_tokens: of questions and replies together, of all runs that share
    a file of replies.
    """

    model: str
    base_url: str | None = None
    key_name: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    top_p: float = 0.1
    max_tokens: int = 4096
    concurrency: int = 16
    timeout_s: float = 120.0
    attempts: int = 8
    wait_s: float = 1.0
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise KokaneeError(f"{name} is {getattr(self, name)}. Give at least 1.")
        if self.base_url is None and not os.environ.get(self.key_name):
            raise KokaneeError(f"{self.key_name} is not set. Set it to your key, or name another server by --base-url.")


class Replies:
    """Replies by the content of their questions, in a file of JSON lines that only grows (None: in memory)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        records = read_jsonl(path) if path is not None and path.is_file() else []
        self.known = {record["key"]: record for record in records}

    def get(self, key: str) -> str | None:
        record = self.known.get(key)
        return None if record is None else record["reply"]

    def put(self, key: str, reply: str, tokens: int, finished: bool = True) -> None:
        self.known[key] = record = {"key": key, "reply": reply, "tokens": tokens}
        if not finished:
            record["finished"] = False
        if self.path is not None:
            append_jsonl(self.path, [record])

    @property
    def tokens(self) -> int:
        """Tokens of all questions and replies, as the server counted them."""
        return sum(record["tokens"] for record in self.known.values())


class Asker:
    """Asks an endpoint, within one event loop at a time. As an async context manager it closes its connections."""

    def __init__(self, endpoint: Endpoint, replies: Path | None = None) -> None:
        self.endpoint, self.replies = endpoint, Replies(replies)
        self.asked = 0
        self.schemas = True
        self._spent = self.replies.tokens
        self._waiting: dict[str, asyncio.Future[str]] = {}
        self._client: AsyncOpenAI | None = None

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, which belong to the running event loop. Asking again opens others."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    @property
    def client(self) -> AsyncOpenAI:
        """The connections to the server."""
        if self._client is None:
            key, end = os.environ.get(self.endpoint.key_name) or "none", self.endpoint
            self._client = AsyncOpenAI(api_key=key, base_url=end.base_url, timeout=end.timeout_s, max_retries=0)
        return self._client

    async def ask(
        self, messages: list[Message], seed: int = 0, attempt: int = 0, schema: dict[str, Any] | None = None
    ) -> str:
        """The reply to a conversation. `attempt` tells apart replies to the same question that were no use before.

        `schema`: a JSON schema for the reply, where the server can hold to one. Equal questions under way at the same
        time are asked once. Raises `Unanswered`, `BudgetSpent`, and `KokaneeError` where the server refuses for good.
        """
        key = self.key(messages, seed, attempt)
        known = self.replies.get(key)
        if known is not None:
            return known
        if key not in self._waiting:
            self._waiting[key] = asyncio.ensure_future(self._ask(key, messages, seed, schema))
            self._waiting[key].add_done_callback(lambda _: self._waiting.pop(key))
        return await asyncio.shield(self._waiting[key])

    def finished(self, messages: list[Message], seed: int = 0, attempt: int = 0) -> bool:
        """Whether the reply that a question got came to its end, and was not cut off at `max_tokens`."""
        return self.replies.known[self.key(messages, seed, attempt)].get("finished", True)

    def key(self, messages: list[Message], seed: int, attempt: int) -> str:
        """What a reply is kept by: all that it can depend on, but neither the server's address nor the key."""
        end = self.endpoint
        content = [end.model, end.temperature, end.top_p, end.max_tokens, seed, attempt, messages]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    async def _ask(self, key: str, messages: list[Message], seed: int, schema: dict[str, Any] | None) -> str:
        wait_s, reason = self.endpoint.wait_s, ""
        for number in range(self.endpoint.attempts):
            if number:
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            budget = self.endpoint.budget_tokens
            if budget is not None and self._spent >= budget:
                raise BudgetSpent(f"The budget of {budget} tokens is used up ({self._spent}). Raise it to go on.")
            try:
                reply, tokens, finished = await self._once(messages, seed, schema)
            except BadRequestError as error:
                if schema is None or not self.schemas:
                    raise self._refused(error) from error
                self.schemas = False  # a server that knows no schemas; what is asked says the form in words too
                reason = said(error)
            except APIStatusError as error:
                if error.status_code < 500 and error.status_code not in BUSY:
                    raise self._refused(error) from error
                wait_s, reason = max(wait_s, retry_after_s(error)), said(error)
            except (APIConnectionError, APIResponseValidationError, APIError, ValueError) as error:
                reason = said(error)
            else:
                if reply:
                    self._spent += tokens
                    self.replies.put(key, reply, tokens, finished)
                    return reply
                reason = "an empty reply"
        raise Unanswered(f"{self.endpoint.model} gave no answer in {self.endpoint.attempts} attempts (last: {reason}).")

    async def _once(self, messages: list[Message], seed: int, schema: dict[str, Any] | None) -> tuple[str, int, bool]:
        """One request: the reply's text, the tokens that it cost, and whether it came to its end."""
        end, more = self.endpoint, {}
        if schema is not None and self.schemas:
            more["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": schema},
            }
        self.asked += 1
        create: Any = self.client.chat.completions.create
        done = await create(
            model=end.model,
            messages=messages,
            temperature=end.temperature,
            top_p=end.top_p,
            max_tokens=end.max_tokens,
            seed=seed,
            **more,
        )
        if not getattr(done, "choices", None) or done.choices[0].message is None:
            raise ValueError("a reply without a message")
        tokens = done.usage.total_tokens if done.usage is not None else 0
        finished = done.choices[0].finish_reason != "length"
        return done.choices[0].message.content or "", tokens or 0, finished

    def _refused(self, error: APIStatusError) -> KokaneeError:
        where = self.endpoint.base_url or "OpenAI"
        return KokaneeError(
            f"{where} refuses {self.endpoint.model}: {said(error)}. Check the model's name, the address and the key."
        )


def said(error: Exception) -> str:
    """What went wrong, in one short line."""
    status = f"status {error.status_code}: " if isinstance(error, APIStatusError) else ""
    text = " ".join(str(error).split()) or type(error).__name__
    return status + (text if len(text) < 200 else f"{text[:200]}...")


def retry_after_s(error: APIStatusError) -> float:
    """How long the server asks to wait, in seconds; 0 where it does not say."""
    try:
        return min(float(error.response.headers.get("retry-after", 0)), LONGEST_WAIT_S)
    except ValueError:
        return 0.0


async def each(
    jobs: Iterable[Job], work: Callable[[Job], Awaitable[Result]], concurrency: int
) -> AsyncIterator[tuple[Job, Result | KokaneeError]]:
    """Each job with its result as it is done, or the `KokaneeError` that it raised; `concurrency` jobs at a time.

    After `BudgetSpent` no job is begun any more; those under way are finished.
    """
    waiting, under_way = iter(jobs), set()

    async def one(job: Job) -> tuple[Job, Result | KokaneeError]:
        try:
            return job, await work(job)
        except KokaneeError as error:
            return job, error

    spent = False
    try:
        while True:
            while not spent and len(under_way) < concurrency and (job := next(waiting, under_way)) is not under_way:
                under_way.add(asyncio.ensure_future(one(job)))  # pyright: ignore[reportArgumentType]
            if not under_way:
                return
            done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                job, result = task.result()
                spent = spent or isinstance(result, BudgetSpent)
                yield job, result
    finally:
        for task in under_way:
            task.cancel()
