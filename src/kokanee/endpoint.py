"""Questions to a language model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama and the like).

Every reply is kept in a file by the content of its question, so that a second run asks nothing and a killed run asks
only what is missing. At most `concurrency` questions are under way; what is busy, late or broken is asked again after
growing waits; a budget of tokens or of money stops the asking cleanly. The key comes from the environment and is
written nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from kokanee.errors import KokaneeError
from kokanee.formats import UTF8, mend_end, read_jsonl

LONGEST_WAIT_S = 60.0
SYNCED_EVERY_S = 1.0
BUSY = frozenset((408, 409, 425, 429))
NOT_THIS = frozenset((400, 413, 422))
OPENAI = "https://api.openai.com/v1"
Message = dict[str, Any]
Job = TypeVar("Job")
Result = TypeVar("Result")


class Unanswered(KokaneeError):
    """A question that got no usable answer, and why."""


class BudgetSpent(KokaneeError):
    """No question is asked any more: the budget is used up."""


class Refused(Exception):
    """A reply with a status other than 200: what the server said, and after how many seconds it wants to be asked."""

    def __init__(self, status: int, text: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"status {status}: {text}")
        self.status, self.text, self.retry_after_s = status, text, retry_after_s


@dataclass(frozen=True)
class Endpoint:
    """Where questions go and how they are asked.

    base_url None: OpenAI's. key_name: the environment variable that holds the key; without it none is sent, as local
    servers want none. attempts: how often a question is asked that gets no reply, waiting `wait_s` seconds after the
    first time, then twice as long each time. per_minute: requests at most (None: as many as there are). Of all runs
    that share a file of replies: budget_tokens, of questions and replies together, and budget_money, in the currency
    of `prices`, which are those of a million tokens of questions and of replies.
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
    per_minute: float | None = None
    budget_tokens: int | None = None
    budget_money: float | None = None
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise KokaneeError(f"{name} is {getattr(self, name)}. Give at least 1.")
        if self.per_minute is not None and self.per_minute <= 0:
            raise KokaneeError(f"{self.per_minute} requests a minute cannot be. Give a number above 0.")
        if self.budget_money is not None and self.prices is None:
            raise KokaneeError("A budget of money needs prices. Give those of a million tokens in and out.")
        if self.base_url is None and not os.environ.get(self.key_name):
            raise KokaneeError(f"{self.key_name} is not set. Set it to your key, or name another server by --base-url.")

    @property
    def address(self) -> str:
        return (self.base_url or OPENAI).rstrip("/")


@dataclass(frozen=True)
class Reply:
    """What a model said. Tokens as the server counts them: of the question, of the reply. finished: not cut off."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    finished: bool = True


class Replies:
    """Replies by the content of their questions, in a file of JSON lines that only grows (None: in memory).

    Each reply is handed to the operating system at once, so that a killed process loses none. It is seen onto the disk
    once a second: waiting for the disk at every reply would take longer than asking.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        records = read_jsonl(path) if path is not None and path.is_file() else []
        self.known = {record["key"]: reply_of(record) for record in records}
        self._file: TextIO | None = None
        self._synced_s = 0.0

    def put(self, key: str, reply: Reply) -> None:
        self.known[key] = reply
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mend_end(self.path)
            self._file = self.path.open("a", **UTF8)
        record = {"key": key, "reply": reply.text, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
        line = json.dumps(record if reply.finished else record | {"finished": False}, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()
        if time.monotonic() - self._synced_s > SYNCED_EVERY_S:
            self._sync(self._file)

    def _sync(self, file: TextIO) -> None:
        if self.path is not None and self.path.is_file():
            os.fsync(file.fileno())
        self._synced_s = time.monotonic()

    def close(self) -> None:
        """See all replies onto the disk. Another `put` opens the file again."""
        if self._file is not None:
            with self._file as file:
                self._sync(file)
            self._file = None


def reply_of(record: dict[str, Any]) -> Reply:
    """A reply as the file keeps it."""
    return Reply(record["reply"], record.get("tokens_in", 0), record.get("tokens_out", 0), record.get("finished", True))


class Asker:
    """Asks an endpoint, within one event loop at a time. As an async context manager it closes its connections."""

    def __init__(self, endpoint: Endpoint, replies: Path | None = None) -> None:
        self.endpoint, self.replies = endpoint, Replies(replies)
        self.asked = 0
        self.schemas, self.limit = True, "max_tokens"
        self._tokens_in = sum(reply.tokens_in for reply in self.replies.known.values())
        self._tokens_out = sum(reply.tokens_out for reply in self.replies.known.values())
        self._next_s = 0.0
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, which belong to the running event loop, and the file. Asking again opens others."""
        self.replies.close()
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to the server; as many as there are questions under way."""
        if self._session is None:
            key = os.environ.get(self.endpoint.key_name)
            # aiohttp's own look at the environment (`trust_env`) costs 0.4 ms a request.
            self._session = aiohttp.ClientSession(
                headers={"authorization": f"Bearer {key}"} if key else {},
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout_s),
                proxy=proxy_of(self.endpoint.address),
            )
        return self._session

    async def ask(
        self, messages: list[Message], seed: int = 0, attempt: int = 0, schema: dict[str, Any] | None = None
    ) -> str:
        """The text of the reply to a conversation; see `reply`."""
        return (await self.reply(messages, seed, attempt, schema)).text

    async def reply(
        self, messages: list[Message], seed: int = 0, attempt: int = 0, schema: dict[str, Any] | None = None
    ) -> Reply:
        """The reply to a conversation. `attempt` tells apart replies to the same question that were no use before.

        `schema`: a JSON schema for the reply, where the server can hold to one. Equal questions under way at the same
        time are asked once. Raises `Unanswered`, `BudgetSpent`, and `KokaneeError` where the server refuses for good.
        """
        key = self.key(messages, seed, attempt)
        if key in self.replies.known:
            return self.replies.known[key]
        if key not in self._waiting:
            self._waiting[key] = asyncio.ensure_future(self._ask(key, messages, seed, schema))
            self._waiting[key].add_done_callback(lambda _: self._waiting.pop(key))
        return await asyncio.shield(self._waiting[key])

    def key(self, messages: list[Message], seed: int, attempt: int) -> str:
        """What a reply is kept by: all that it can depend on, but neither the server's address nor the key."""
        end = self.endpoint
        content = [end.model, end.temperature, end.top_p, end.max_tokens, seed, attempt, messages]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    async def _ask(self, key: str, messages: list[Message], seed: int, schema: dict[str, Any] | None) -> Reply:
        end, wait_s, reason = self.endpoint, self.endpoint.wait_s, ""
        for number in range(end.attempts):
            if number:
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            self.check_budget()
            await self.turn()
            form = self.schemas, self.limit
            try:
                reply = await self._once(messages, seed, schema)
            except Refused as error:
                reason = said(error)
                if self.adapted(error, schema) or form != (self.schemas, self.limit):
                    continue  # also where another question has learnt meanwhile what the server wants
                if error.status in NOT_THIS:
                    raise Unanswered(f"{end.model} refuses a question: {reason}.") from error
                if error.status < 500 and error.status not in BUSY:
                    raise self._refused(error) from error
                wait_s = max(wait_s, error.retry_after_s)
            except asyncio.TimeoutError:
                reason = f"nothing for {end.timeout_s:g} s"
            except (aiohttp.ClientError, ValueError) as error:
                reason = said(error)
            else:
                self._tokens_in += reply.tokens_in
                self._tokens_out += reply.tokens_out
                if reply.text:
                    self.replies.put(key, reply)
                    return reply
                reason = "an empty reply"
        raise Unanswered(f"{end.model} gave no answer in {end.attempts} attempts (last: {reason}).")

    def check_budget(self) -> None:
        """Raise `BudgetSpent` where a budget is used up."""
        end, tokens = self.endpoint, self._tokens_in + self._tokens_out
        if end.budget_tokens is not None and tokens >= end.budget_tokens:
            raise BudgetSpent(f"The budget of {end.budget_tokens} tokens is used up ({tokens}). Raise it to go on.")
        if end.budget_money is not None and self.money >= end.budget_money:
            cost = f"{self.money:.4g} for {tokens} tokens"
            raise BudgetSpent(f"The budget of {end.budget_money:g} is used up ({cost}). Raise it to go on.")

    @property
    def money(self) -> float:
        """What all questions and replies have cost, in the currency of the prices; 0 where there are none."""
        per_in, per_out = self.endpoint.prices or (0.0, 0.0)
        return (per_in * self._tokens_in + per_out * self._tokens_out) / 1e6

    async def turn(self) -> None:
        """Wait until a request may be sent: `per_minute` of them are, at equal distances."""
        if self.endpoint.per_minute is None:
            return
        now_s = time.monotonic()
        at_s = max(now_s, self._next_s)
        self._next_s = at_s + 60.0 / self.endpoint.per_minute
        await asyncio.sleep(at_s - now_s)

    async def _once(self, messages: list[Message], seed: int, schema: dict[str, Any] | None) -> Reply:
        """One request and its reply."""
        end, more = self.endpoint, {}
        if schema is not None and self.schemas:
            more["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": schema},
            }
        self.asked += 1
        asked = {
            "model": end.model,
            "messages": messages,
            "temperature": end.temperature,
            "top_p": end.top_p,
            self.limit: end.max_tokens,
            "seed": seed,
            **more,
        }
        async with self.session.post(f"{end.address}/chat/completions", json=asked) as reply:
            if reply.status != 200:
                raise Refused(reply.status, error_text(await reply.text()), retry_after_s(reply.headers))
            return read_completion(json.loads(await reply.read()))

    def adapted(self, error: Refused, schema: dict[str, Any] | None) -> bool:
        """Whether the next question will be put in another form that means the same, as the server wants it.

        Servers may know no schemas (what is asked says the form in words too), and newer models of OpenAI want the
        limit of a reply's length under another name.
        """
        about_schema = any(word in error.text for word in ("response_format", "json_schema"))
        if "max_completion_tokens" in error.text and self.limit == "max_tokens":
            self.limit = "max_completion_tokens"
            return True
        if schema is not None and self.schemas and (about_schema or error.status in (400, 422)):
            self.schemas = False
            return True
        return False

    def _refused(self, error: Refused) -> KokaneeError:
        where = self.endpoint.base_url or "OpenAI"
        return KokaneeError(
            f"{where} refuses {self.endpoint.model}: {said(error)}. Check the model's name, the address and the key."
        )


def proxy_of(address: str) -> str | None:
    """The proxy that the environment names for an address, None where there is none."""
    parts = urlsplit(address)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def read_completion(found: Any) -> Reply:
    """The reply that a chat completion is. Raises `ValueError` for what is none."""
    try:
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = choice["message"].get("content") or ""
        tokens_in, tokens_out = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        finished = choice.get("finish_reason") != "length"
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError("a reply without a message") from None
    if not isinstance(text, str) or not isinstance(tokens_in, int) or not isinstance(tokens_out, int):
        raise ValueError("a reply without a text")
    return Reply(text, tokens_in, tokens_out, finished)


def error_text(body: str) -> str:
    """What a server says in a reply that is an error: its message, where it has one."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        return str(found.get("message", found))
    except (ValueError, AttributeError):
        return body


def said(error: Exception) -> str:
    """What went wrong, in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f"{text[:200]}..."


def retry_after_s(headers: Mapping[str, str]) -> float:
    """How long the server asks to wait, in seconds; 0 where it does not say."""
    try:
        return min(float(headers.get("retry-after", 0)), LONGEST_WAIT_S)
    except ValueError:
        return 0.0


async def each(
    jobs: Iterable[Job], work: Callable[[Job], Awaitable[Result]], concurrency: int
) -> AsyncIterator[tuple[Job, Result | KokaneeError]]:
    """Each job with its result as it is done, or the `KokaneeError` that it raised; `concurrency` jobs at a time.

    After `BudgetSpent` no job is begun any more; those under way are finished.
    """
    waiting, spent = iter(jobs), False
    done: asyncio.Queue[tuple[Job, Result | KokaneeError] | asyncio.Future[None]] = asyncio.Queue()

    async def worker() -> None:
        nonlocal spent
        for job in waiting:
            try:
                result = await work(job)
            except KokaneeError as error:
                result, spent = error, spent or isinstance(error, BudgetSpent)
            done.put_nowait((job, result))
            if spent:
                return

    workers = [asyncio.ensure_future(worker()) for _ in range(concurrency)]
    for task in workers:
        task.add_done_callback(done.put_nowait)
    try:
        at_work = len(workers)
        while at_work:
            found = await done.get()
            if isinstance(found, asyncio.Future):
                found.result()  # raises what no job may raise
                at_work -= 1
            else:
                yield found
    finally:
        for task in workers:
            task.cancel()
