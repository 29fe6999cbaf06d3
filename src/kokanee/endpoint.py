"""Questions to a language model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama and the like).

Every reply is kept, in a file where one is given, by the content of its question: a second run asks nothing then, and a
killed run only what is missing. At most `concurrency` questions are under way; what is busy, late or broken is asked
again after growing waits; a budget of tokens or of money stops the asking cleanly. The key comes from the environment
and is written nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from kokanee.errors import KokaneeError
from kokanee.formats import whole_text
from kokanee.replies import Replies, Reply

logger = logging.getLogger("kokanee")
LONGEST_WAIT_S = 60.0
TOLD_EVERY_S = 30.0
TOLD_AFTER = 2  # failures of one question; one alone is everyday
CONNECT_S = 10.0
FEWEST_FAILURES = 8
NOT_SPOKEN = 3  # replies without JSON, where there was none with it, that show that the server is another kind
LETTERS_A_TOKEN = 4  # about, in English
BUSY = frozenset((408, 409, 425, 429))
NOT_THIS = frozenset((400, 413, 422))
NO_CREDIT = "insufficient_quota"
OPENAI = "https://api.openai.com/v1"
Message = dict[str, Any]
Job = TypeVar("Job")
Result = TypeVar("Result")


class Unanswered(KokaneeError):
    """A question that got no usable answer, and why."""


class Unreachable(Unanswered):
    """Nobody listens at the server's address, whatever is asked."""


class Stop(KokaneeError):
    """No question is asked any more: none would be answered."""


class BudgetSpent(Stop):
    """No question is asked any more: the budget is used up."""


class NoJson(ValueError):
    """A reply that is no JSON, as from something that is no such server."""


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
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise KokaneeError(
                f"{self.base_url} is no address of a server (base_url). Let it begin with http:// or https://."
            )
        if self.base_url is None and not self.key:
            raise KokaneeError(
                f"{self.key_name} is not set. Set it to your key, or name another server (--base-url; in a recipe "
                "base_url)."
            )

    @property
    def address(self) -> str:
        return (self.base_url or OPENAI).rstrip("/")

    @property
    def server(self) -> str:
        """The server as it may be shown and kept: its address without a name and password."""
        parts = urlsplit(self.address)
        return f"{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def key(self) -> str:
        """The key, "" where there is none. It is shown nowhere."""
        return os.environ.get(self.key_name, "").strip()

    def check_reachable(self) -> None:
        """Raise `KokaneeError` where nobody listens at the server's address. Behind a proxy that is not known."""
        parts = urlsplit(self.address)
        if proxy_of(self.address) is not None:
            return
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise KokaneeError(unreached(self.server, str(error))) from error


class Asker:
    """Asks an endpoint, within one event loop at a time. As an async context manager it closes its connections."""

    def __init__(self, endpoint: Endpoint, replies: Path | None = None) -> None:
        self.endpoint, self.replies = endpoint, Replies(replies)
        self.asked = self._under_way = 0
        self.schemas, self.limit = True, "max_tokens"
        self._reached = self._spoken = False  # the server, and it, in JSON
        self._next_s = self._told_s = 0.0
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way, and close connections, which belong to the running event loop, and the file.

        Asking again opens others.
        """
        waiting = list(self._waiting.values())
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        self.replies.close()
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to the server; as many as there are questions under way."""
        if self._session is None:
            key = self.endpoint.key
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
        """What a reply is kept by: all that it can depend on, without the key of the server."""
        end = self.endpoint
        content = [end.server, end.model, end.temperature, end.top_p, end.max_tokens, seed, attempt, messages]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    async def _ask(self, key: str, messages: list[Message], seed: int, schema: dict[str, Any] | None) -> Reply:
        end, wait_s, pause_s, reason = self.endpoint, self.endpoint.wait_s, 0.0, ""
        await self.reach()
        without, nobody, failures = False, False, 0  # without: a schema, for this question
        while failures < end.attempts:
            if failures:
                self._tell(failures, reason)
                await asyncio.sleep(max(pause_s, wait_s * random.uniform(0.5, 1.0)))
                wait_s, pause_s = min(2 * wait_s, LONGEST_WAIT_S), 0.0
            await self.turn()
            self.check_budget(messages)
            limit, sent = self.limit, schema if self.schemas and not without else None
            nobody = False
            self._under_way += 1
            try:
                reply = await self._once(messages, seed, sent)
            except Refused as error:
                if "max_completion_tokens" in error.text and limit == "max_tokens":
                    self.limit = "max_completion_tokens"  # what newer models of OpenAI call it
                    continue
                if sent is not None and (error.status in NOT_THIS or "response_format" in error.text):
                    without = True  # what is asked says the form in words too
                    continue
                reason, pause_s = self.said(error), error.retry_after_s
                if error.status in NOT_THIS:
                    raise Unanswered(f"{end.model} refuses a question: {reason}.") from error
                if error.status < 500 and (error.status not in BUSY or NO_CREDIT in error.text):
                    raise self._refused(error) from error
            except TimeoutError:
                reason = f"nothing for {end.timeout_s:g} s"
            except aiohttp.ClientConnectorError as error:
                reason, nobody = self.said(error.os_error), True
            except NoJson as error:
                reason = self.said(error)
                if not self._spoken and failures + 1 >= min(NOT_SPOKEN, end.attempts):
                    raise Stop(
                        f"{end.server} does not speak OpenAI's protocol ({reason}). Check its address, which often "
                        "ends in /v1."
                    ) from error
            except (aiohttp.ClientError, ValueError) as error:
                reason = self.said(error)
            else:
                self._spoken = True
                self.schemas = self.schemas and not without
                self.check_counted(reply)
                self.replies.put(key, reply)
                if reply.text:
                    return reply
                if not reply.finished:
                    raise Unanswered(
                        f"{end.model} used up its {end.max_tokens} tokens without a word of an answer. Allow it more, "
                        "or have it think less."
                    )
                reason = "an empty reply"
            finally:
                self._under_way -= 1
            failures += 1
        if nobody:
            raise Unreachable(unreached(end.server, reason))
        raise Unanswered(f"{end.model} at {end.server} gave no answer in {end.attempts} attempts (last: {reason}).")

    def _tell(self, failures: int, reason: str) -> None:
        """Say, now and then, that answers fail to come, while they are waited for."""
        if failures >= TOLD_AFTER and time.monotonic() >= self._told_s:
            self._told_s = time.monotonic() + TOLD_EVERY_S
            logger.warning("%s gives no answer (%s); it is asked again", self.endpoint.server, reason)

    async def reach(self) -> None:
        """Raise `Stop` where nobody listens at the server's address, before anything is asked."""
        if not self._reached:
            try:
                await asyncio.to_thread(self.endpoint.check_reachable)
            except KokaneeError as error:
                raise Stop(str(error)) from error
            self._reached = True

    def check_budget(self, messages: list[Message]) -> None:
        """Raise `BudgetSpent` where a budget is used up, or would be by what is under way.

        What is under way is taken to cost as much as questions did so far.
        """
        end, replies = self.endpoint, self.replies
        if end.budget_tokens is None and end.budget_money is None:
            return
        tokens, more = replies.tokens_in + replies.tokens_out, " and what is under way" if self._under_way else ""
        letters = sum(len(str(message["content"])) for message in messages)
        share = self._under_way / max(1, replies.n_paid)
        coming = share * tokens if replies.n_paid else self._under_way * letters / LETTERS_A_TOKEN
        if end.budget_tokens is not None and tokens + coming >= end.budget_tokens:
            spent = f"is used up ({tokens}{more})" if tokens else f"does not suffice ({coming:.0f} are under way)"
            raise BudgetSpent(f"The budget of {end.budget_tokens} tokens {spent}. Raise it to go on.")
        if end.budget_money is None or end.prices is None:
            return
        money_coming = share * self.money if replies.n_paid else coming * end.prices[0] / 1e6
        if self.money + money_coming >= end.budget_money:
            cost = f"{self.money:.4g} for {tokens} tokens{more}"
            raise BudgetSpent(f"The budget of {end.budget_money:g} is used up ({cost}). Raise it to go on.")

    def check_counted(self, reply: Reply) -> None:
        """Raise `Stop` where there is a budget and the server does not say what a reply cost."""
        end = self.endpoint
        if (end.budget_tokens or end.budget_money) and not reply.tokens_in + reply.tokens_out:
            raise Stop(f"{end.server} does not count tokens, so that no budget can be kept. Leave the budget out.")

    @property
    def money(self) -> float:
        """What all questions and replies have cost, in the currency of the prices; 0 where there are none."""
        per_in, per_out = self.endpoint.prices or (0.0, 0.0)
        return (per_in * self.replies.tokens_in + per_out * self.replies.tokens_out) / 1e6

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
        if schema is not None:
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
            body = await reply.read()
            try:
                found = json.loads(body)
            except ValueError:
                raise NoJson(f"no JSON, but {body[:60].decode(errors='replace')!r}") from None
            return read_completion(found)

    def _refused(self, error: Refused) -> Stop:
        return Stop(
            f"{self.endpoint.server} refuses {self.endpoint.model}: {self.said(error)}. "
            "Check the model's name, the address, the key and its credit."
        )

    def said(self, error: Exception) -> str:
        """What went wrong, in one short line, without the key, which servers may repeat."""
        text = " ".join(str(error).split()) or type(error).__name__
        if self.endpoint.key:
            text = text.replace(self.endpoint.key, "***")
        return text if len(text) < 200 else f"{text[:200]}..."


def unreached(server: str, reason: str) -> str:
    """That nobody listens at an address."""
    return f"{server} cannot be reached ({reason}). Start the server, or check its address and the network."


def proxy_of(address: str) -> str | None:
    """The proxy that the environment names for an address, None where there is none."""
    parts = urlsplit(address)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def read_completion(found: Any) -> Reply:
    """The reply that a chat completion is. Raises `ValueError` for what is none."""
    try:
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = whole_text(choice["message"].get("content") or "")
        tokens_in, tokens_out = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        finished = choice.get("finish_reason") != "length"
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError("a reply without a message") from None
    if not isinstance(tokens_in, int) or not isinstance(tokens_out, int):
        raise ValueError("a reply whose tokens are not counted in numbers")
    return Reply(text, tokens_in, tokens_out, finished)


def error_text(body: str) -> str:
    """What a server says in a reply that is an error: its message, where it has one."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        code = found.get("code")
        return f"{found.get('message', found)}{f' ({code})' if code else ''}"
    except (ValueError, AttributeError):
        return body


def retry_after_s(headers: Mapping[str, str]) -> float:
    """How long the server asks to wait, in seconds; 0 where it does not say."""
    try:
        return min(float(headers.get("retry-after", 0)), LONGEST_WAIT_S)
    except ValueError:
        return 0.0


async def each(
    jobs: Iterable[Job], work: Callable[[Job], Awaitable[Result]], concurrency: int
) -> AsyncGenerator[tuple[Job, Result | KokaneeError], None]:
    """Each job with its result as it is done, or the `KokaneeError` that it raised; `concurrency` jobs at a time.

    After `Stop` no job is begun any more; those under way are finished. Whoever takes no more cancels them. Raises
    `Stop` where none of the first results, twice `concurrency` and at least 8, is an answer, and where so many one
    after the other are `Unreachable`: there will be none.
    """
    waiting, stopped = iter(jobs), False
    done: asyncio.Queue[tuple[Job, Result | KokaneeError] | asyncio.Future[None]] = asyncio.Queue()

    async def worker() -> None:
        nonlocal stopped
        for job in waiting:
            try:
                result = await work(job)
            except KokaneeError as error:
                result, stopped = error, stopped or isinstance(error, Stop)
            done.put_nowait((job, result))
            if stopped:
                return

    workers = [asyncio.ensure_future(worker()) for _ in range(concurrency)]
    for task in workers:
        task.add_done_callback(done.put_nowait)
    try:
        at_work, failures, hopeless = len(workers), 0, max(FEWEST_FAILURES, 2 * concurrency)
        in_vain = 0
        while at_work:
            found = await done.get()
            if isinstance(found, asyncio.Future):
                found.result()  # raises what no job may raise
                at_work -= 1
                continue
            in_vain = in_vain + 1 if isinstance(found[1], Unreachable) else 0
            if in_vain == hopeless:
                raise Stop(f"{hopeless} questions in a row reached nobody: {found[1]}")
            if failures is not None:
                failures = failures + 1 if isinstance(found[1], Unanswered) else None
                if failures == hopeless:
                    raise Stop(f"None of the first {hopeless} questions got an answer of use: {found[1]}")
            yield found
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def running() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of asynchronous work; where an event loop runs already, as in a notebook, from another thread."""
    if not running():
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
