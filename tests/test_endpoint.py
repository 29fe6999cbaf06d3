"""Laws of asking: whatever the server does, nothing is lost, nothing is asked twice, and what is spent is counted."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest

from kokanee.endpoint import Asker, BudgetSpent, Endpoint, Stop, Unanswered, Unreachable, each, proxy_of, retry_after_s
from kokanee.errors import KokaneeError
from kokanee.replies import Replies
from model_server import completion, garbage, half, late, serving, silence, status

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def echo(request):
    return "you said: " + request["messages"][-1]["content"]


@pytest.fixture
def served():
    with serving(echo) as found:
        yield found


def endpoint(url: str, **more) -> Endpoint:
    return Endpoint("m", url, **{"wait_s": 0.01, "timeout_s": 5.0, "attempts": 4, **more})


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(end: Endpoint, texts, path=None, **more):
    """Replies in the order of the texts, the errors among them, and the asker."""

    async def run():
        async with Asker(end, path) as asker:
            found = {}
            async for text, result in each(texts, lambda t: asker.ask(said(t), **more), end.concurrency):
                found[text] = result
            return [found.get(text) for text in texts], asker

    return asyncio.run(run())


def test_replies_come_back_and_a_second_run_asks_nothing(served, tmp_path):
    server, url = served
    texts = [f"text {number}" for number in range(20)]
    found, asker = ask(endpoint(url), texts, tmp_path / "replies.jsonl")
    assert found == [f"you said: {text}" for text in texts]
    assert len(server.requests) == asker.asked == 20
    again, asker = ask(endpoint(url), texts, tmp_path / "replies.jsonl")
    assert again == found and asker.asked == 0 and len(server.requests) == 20


def test_what_is_asked_is_what_the_endpoint_says(served):
    server, url = served
    ask(endpoint(url, temperature=0.0, top_p=0.1, max_tokens=77), ["a"], seed=6)
    (request,) = server.requests
    assert {name: request[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")} == {
        "model": "m",
        "temperature": 0.0,
        "top_p": 0.1,
        "max_tokens": 77,
        "seed": 6,
    }


@pytest.mark.parametrize(
    "trouble",
    [status(429), status(429, retry_after="0.05"), status(500), status(503), half, garbage, silence, late(2.2)],
    ids=["429", "429 with a time", "500", "503", "half", "garbage", "silence", "late"],
)
def test_trouble_is_got_over(served, trouble, tmp_path):
    server, url = served
    server.trouble = [trouble, trouble]
    found, asker = ask(endpoint(url, concurrency=1, timeout_s=1.5), ["a", "b"], tmp_path / "replies.jsonl")
    assert found == ["you said: a", "you said: b"]
    assert asker.asked == 4 and len(Replies(tmp_path / "replies.jsonl").known) == 2


def test_trouble_without_end_is_told_and_stops_nothing_else(served):
    server, url = served
    server.answer = lambda request: "" if "bad" in request["messages"][-1]["content"] else "good"
    found, _ = ask(endpoint(url, attempts=3), ["a", "bad", "b"])
    assert found[0] == found[2] == "good"
    assert isinstance(found[1], Unanswered) and "in 3 attempts (last: an empty reply)" in str(found[1])


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refusal_is_not_asked_again(served, code):
    server, url = served
    server.trouble = [status(code)] * 9
    (error,), asker = ask(endpoint(url), ["a"])
    assert isinstance(error, KokaneeError) and f"status {code}" in str(error) and asker.asked == 1


def test_a_server_that_is_not_there_is_told():
    """At once where it never was, and after all attempts where it was."""
    (error,), asker = ask(endpoint("http://127.0.0.1:9/v1"), ["a"])
    assert isinstance(error, Stop) and asker.asked == 0
    assert "127.0.0.1:9/v1 cannot be reached ([Errno 111]" in str(error) and "Start the server" in str(error)

    async def run() -> None:
        with serving(echo) as (_, url):
            asker = Asker(endpoint(url, attempts=2))
            await asker.ask(said("a"))
            await asker.close()
        with pytest.raises(Unreachable, match=r"cannot be reached .*Start the server"):
            await asker.ask(said("b"))
        assert asker.asked == 3
        await asker.close()

    asyncio.run(run())


def test_what_is_no_such_server_is_told_soon(served):
    server, url = served
    page = lambda server, request: (200, b"<html>It works!</html>", {})  # noqa: E731
    server.trouble = [page] * 20
    (error,), asker = ask(endpoint(url), ["a"])
    assert isinstance(error, Stop) and "does not speak OpenAI's protocol (no JSON, but '<html>It" in str(error)
    assert asker.asked == 3 and "ends in /v1" in str(error)
    server.trouble = [page] * 2
    assert ask(endpoint(url), ["a"])[0] == ["you said: a"]


def test_questions_that_reach_nobody_end_the_asking_and_only_many_in_a_row():
    def outcomes(*kinds: type[KokaneeError] | None) -> list[object]:
        """What comes of jobs that end so, until no more are asked."""
        found = []

        async def work(kind: type[KokaneeError] | None) -> str:
            if kind is not None:
                raise kind("nobody")
            return "good"

        async def all_of_them() -> None:
            async for _, result in each(kinds, work, 1):
                found.append(result)

        asyncio.run(all_of_them())
        return found

    assert len(outcomes(*[None, *[Unreachable] * 7] * 3)) == 24
    with pytest.raises(Stop, match="8 questions in a row reached nobody"):
        outcomes(None, *[Unreachable] * 8, None)
    assert len(outcomes(None, *[Unanswered] * 20)) == 21


def test_an_answer_that_never_began_is_not_asked_for_again(served):
    """A model that thinks used up all its tokens; the same question would end the same way."""
    server, url = served
    server.answer = lambda request: ""
    server.trouble = [lambda s, r: (200, completion("").replace(b'"stop"', b'"length"'), {})]
    (error,), asker = ask(endpoint(url, max_tokens=9), ["a"])
    assert isinstance(error, Unanswered) and "used up its 9 tokens" in str(error) and asker.asked == 1


def test_a_server_that_dies_in_the_middle_loses_nothing_that_was_said(tmp_path):
    texts, path = [f"text {number}" for number in range(12)], tmp_path / "replies.jsonl"
    with serving(echo) as (server, url):
        server.trouble = [lambda s, r: (200, completion(echo(r)), {})] * 5 + [silence] * 500
        found, _ = ask(endpoint(url, attempts=1, concurrency=2), texts, path)
    assert sum(isinstance(reply, str) for reply in found) == 5 == len(Replies(path).known)
    with path.open("a") as file:
        file.write('{"key": "half a li')
    with serving(echo, int(url.split(":")[2].removesuffix("/v1"))) as (server, url):
        found, asker = ask(endpoint(url), texts, path)
    assert found == [f"you said: {text}" for text in texts] and asker.asked == 7 == len(server.requests)


def test_the_budget_stops_the_asking_and_a_larger_one_goes_on(served, tmp_path):
    server, url = served
    texts, path = [f"text {number}" for number in range(30)], tmp_path / "replies.jsonl"
    found, _ = ask(endpoint(url, budget_tokens=100, concurrency=1), texts, path)
    assert [isinstance(reply, str) for reply in found[:12]] == [True] * 10 + [False] * 2
    assert isinstance(found[10], BudgetSpent) and found[11:] == [None] * 19
    assert len(server.requests) == 10 and Replies(path).tokens_in + Replies(path).tokens_out == 100
    found, asker = ask(endpoint(url, budget_tokens=1000), texts, path)
    assert asker.asked == 20 and all(isinstance(reply, str) for reply in found)


def test_a_budget_is_kept_however_many_questions_are_under_way(served, tmp_path):
    server, url = served
    server.delay_s = 0.02
    end = endpoint(url, budget_tokens=100, concurrency=8)
    found, _ = ask(end, ["text"] + [f"text {number}" for number in range(40)], tmp_path / "replies.jsonl")
    assert 8 <= len(server.requests) <= 12 and any(isinstance(reply, BudgetSpent) for reply in found)


def test_a_budget_needs_a_server_that_counts(tmp_path):
    def uncounted(server, request):
        return 200, json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode(), {}

    with serving(echo) as (server, url):
        server.trouble = [uncounted] * 9
        (error, none), _ = ask(endpoint(url, budget_tokens=100, concurrency=1), ["a", "b"])
    assert isinstance(error, Stop) and "does not count tokens" in str(error) and none is None


def test_empty_replies_are_paid_for_once_and_for_all(served, tmp_path):
    server, url = served
    path = tmp_path / "replies.jsonl"
    server.trouble = [lambda server, request: (200, completion(""), {})] * 2
    (found,), _ = ask(endpoint(url), ["a"], path)
    assert found == "you said: a" and Replies(path).tokens_in + Replies(path).tokens_out == 30
    assert len(Replies(path).known) == 1


def test_no_credit_ends_the_asking(served):
    server, url = served
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}).encode()
    server.trouble = [lambda server, request: (429, body, {})] * 9
    (error, none), asker = ask(endpoint(url, concurrency=1), ["a", "b"])
    assert isinstance(error, Stop) and "insufficient_quota" in str(error) and none is None and asker.asked == 1


def test_a_key_that_the_server_repeats_is_masked_wherever_the_message_is_cut(served, monkeypatch):
    server, url = served
    monkeypatch.setenv("OPENAI_API_KEY", "sk-" + "secret" * 20 + "\n")
    server.trouble = [status(401, message="x" * 170 + "sk-" + "secret" * 20)]
    (error,), _ = ask(endpoint(url), ["a"])
    assert "***" in str(error) and "sec" not in str(error)
    assert server.headers[0]["authorization"] == "Bearer sk-" + "secret" * 20


def test_half_characters_are_no_harm(served, tmp_path):
    server, url = served
    server.trouble = [lambda server, request: (200, completion("a \\ud83d b").replace(b"\\\\", b"\\"), {})]
    (found,), _ = ask(endpoint(url), ["a"], tmp_path / "replies.jsonl")
    assert found == "a \ufffd b"


def test_an_address_without_a_scheme_is_told_at_once():
    with pytest.raises(KokaneeError, match=r"localhost:8000/v1 is no address.*http://"):
        endpoint("localhost:8000/v1")


def test_a_budget_of_money_counts_both_prices(served):
    server, url = served
    with pytest.raises(KokaneeError, match="needs prices"):
        endpoint(url, budget_money=1.0)
    end = endpoint(url, budget_money=0.0023, prices=(100.0, 200.0), concurrency=1)  # 9 and 1 tokens: 0.0011 a question
    found, asker = ask(end, [f"text {number}" for number in range(9)])
    assert len(server.requests) == 3 and asker.money == pytest.approx(0.0033)
    assert isinstance(found[3], BudgetSpent) and "0.0033 for 30 tokens" in str(found[3])


def test_requests_keep_their_distance_where_a_server_wants_it(served):
    _, url = served
    began = time.monotonic()
    found, _ = ask(endpoint(url, per_minute=1200), [f"text {number}" for number in range(7)])
    assert time.monotonic() - began >= 6 * 0.05 and len(found) == 7


def test_a_reply_that_was_cut_off_says_so(tmp_path):
    path, cut = tmp_path / "replies.jsonl", completion("so far").replace(b'"stop"', b'"length"')
    with serving(lambda request: "no") as (server, url):
        server.trouble = [lambda server, request: (200, cut, {})]

        async def run():
            async with Asker(endpoint(url), path) as asker:
                return await asker.reply(said("a"))

        found = asyncio.run(run())
    assert (found.text, found.finished) == ("so far", False)
    assert list(Replies(path).known.values()) == [found]


def test_no_more_questions_are_under_way_than_allowed(served):
    server, url = served
    server.delay_s = 0.02
    ask(endpoint(url, concurrency=5), [f"text {number}" for number in range(40)])
    assert 3 <= server.most_under_way <= 5


def test_equal_questions_under_way_are_asked_once(served):
    server, url = served
    server.delay_s = 0.05

    async def run():
        async with Asker(endpoint(url)) as asker:
            return await asyncio.gather(*(asker.ask(said("same")) for _ in range(5)))

    assert asyncio.run(run()) == ["you said: same"] * 5 and len(server.requests) == 1


def test_another_seed_attempt_or_model_is_another_question(served):
    _, url = served

    async def run():
        async with Asker(endpoint(url)) as asker:
            for more in ({}, {"seed": 1}, {"attempt": 1}, {"seed": 1}):
                await asker.ask(said("same"), **more)
            keys = {Asker(Endpoint(model, url)).key(said("a"), 0, 0) for model in ("m", "n")}
            return asker.asked, len(keys)

    assert asyncio.run(run()) == (3, 2)


def test_a_schema_is_sent_and_left_out_where_the_server_knows_none(served):
    server, url = served
    ask(endpoint(url), ["a"], schema=SCHEMA)
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    server.requests.clear()
    server.trouble = [status(400)]
    found, _ = ask(endpoint(url, concurrency=1), ["b", "c"], schema=SCHEMA)
    assert found == ["you said: b", "you said: c"]
    assert ["response_format" in request for request in server.requests] == [True, False, False]


def test_the_limit_of_length_goes_by_the_name_that_the_server_wants(served):
    server, url = served
    server.trouble = [status(400, message="use 'max_completion_tokens' instead")]
    (found,), _ = ask(endpoint(url, max_tokens=77), ["a"])
    assert found == "you said: a" and server.requests[-1]["max_completion_tokens"] == 77
    assert "max_tokens" not in server.requests[-1]


def test_a_proxy_of_the_environment_is_used(served, monkeypatch):
    _, url = served
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", url.removesuffix("/v1"))
    (found,), _ = ask(endpoint("http://judge.example/v1"), ["a"])
    assert found == "you said: a"
    monkeypatch.setenv("no_proxy", "judge.example")
    assert proxy_of("http://judge.example/v1") is None


def test_questions_under_way_learn_together_that_a_server_knows_no_schemas(served):
    server, url = served
    under_way = threading.Barrier(8)

    def refused(server, request):
        under_way.wait(60)  # until all eight are asked
        return status(400)(server, request)

    server.trouble = [refused] * 8
    texts = [f"text {number}" for number in range(12)]
    found, asker = ask(endpoint(url, concurrency=8), texts, schema=SCHEMA)
    assert found == [f"you said: {text}" for text in texts] and asker.asked == 20


def test_a_server_that_gives_no_answers_is_told_while_it_is_waited_for(served, caplog):
    server, url = served
    server.trouble = [status(503, message="overloaded")]
    ask(endpoint(url), ["a"])
    assert not caplog.messages
    server.trouble = [status(503, message="overloaded")] * 20
    ask(endpoint(url, concurrency=4), ["b", "c", "d", "e"])
    (told,) = caplog.messages
    assert "gives no answer (status 503: overloaded 503); it is asked again" in told


def test_one_question_that_a_server_does_not_take_stops_no_other(served):
    server, url = served
    server.trouble = [status(400, message="too long")]
    (error, found), asker = ask(endpoint(url, concurrency=1), ["a", "b"])
    assert isinstance(error, Unanswered) and "m refuses a question: status 400: too long" in str(error)
    assert found == "you said: b" and asker.asked == 2


def test_the_key_is_sent_and_written_nowhere(served, tmp_path, monkeypatch):
    server, url = served
    monkeypatch.setenv("MY_KEY", "sesame-1234")
    ask(endpoint(url, key_name="MY_KEY"), ["a"], tmp_path / "replies.jsonl")
    assert server.headers[0]["authorization"] == "Bearer sesame-1234"
    assert "sesame" not in (tmp_path / "replies.jsonl").read_text() + repr(endpoint(url, key_name="MY_KEY"))


def test_openai_itself_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(KokaneeError, match="OPENAI_API_KEY is not set"):
        Endpoint("gpt-4o")


@pytest.mark.parametrize(("text", "seconds"), [("3", 3.0), ("soon", 0.0), ("1e9", 60.0), (None, 0.0)])
def test_the_time_to_wait_is_read_where_it_is_a_number(text, seconds):
    headers = {} if text is None else {"retry-after": text}
    assert retry_after_s(headers) == seconds


def test_replies_are_one_line_of_json_each(served, tmp_path):
    _, url = served
    ask(endpoint(url), ["two\nlines \u2028 狗"], tmp_path / "replies.jsonl")
    (line,) = (tmp_path / "replies.jsonl").read_bytes().splitlines()
    assert json.loads(line)["reply"] == "you said: two\nlines \u2028 狗" and json.loads(line)["tokens_in"] == 9
