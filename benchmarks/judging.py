"""Judgements a second by a language model, against a server that answers each question after a fixed delay.

The work is that of the published evaluation: 483 videos of 34 events, 7 runs. The ideal is the concurrency divided by
the delay. The server is a process of its own, and has a core of its own where there are two.

python benchmarks/judging.py [--delay-ms 50] [--videos 483] [--runs 7]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from kokanee.endpoint import Asker, Endpoint
from kokanee.events import AtomicEvent
from kokanee.ground_truth import Truth
from kokanee.judges import LanguageModelJudge
from kokanee.predictions import Prediction
from kokanee.scoring import Item, ModelJudge, judge_all, scores

N_EVENTS = 34
EVENT = "A person in a red coat walks along the quay and waves at boat number {video}.{number}."
CAPTION = "A person in a red coat walks along a quay. Gulls cry, and a horn is heard. " * 12


class Answering(asyncio.Protocol):
    """HTTP/1.1, as little of it as the client needs: a reply of `body` for every request, `delay_s` after it came."""

    def __init__(self, delay_s: float, body: bytes) -> None:
        self.delay_s, self.waiting = delay_s, b""
        self.reply = (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        while (end := self.waiting.find(b"\r\n\r\n")) >= 0:
            head = self.waiting[:end].lower()
            at = head.index(b"content-length:") + len(b"content-length:")
            length = end + 4 + int(head[at:].split(b"\r\n", 1)[0])
            if len(self.waiting) < length:
                return
            self.waiting = self.waiting[length:]
            asyncio.get_running_loop().call_later(self.delay_s, self.answer)

    def answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.reply)


def serve(port: Any, delay_s: float, body: bytes) -> None:
    """Serve until the process is ended; the port goes to the queue `port`."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Answering(delay_s, body), "127.0.0.1", 0, backlog=512)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def completion() -> bytes:
    """A reply that names one event of each kind, in a server's wrapping."""
    verdict = {"Missed": 1, "Incorrect": 1, "Hallucination": 1}
    events = {f"{name} Event": [EVENT.format(video=0, number=place)] for place, name in enumerate(verdict)}
    message = {"role": "assistant", "content": json.dumps(verdict | events)}
    usage = {"prompt_tokens": 1400, "completion_tokens": 90, "total_tokens": 1490}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "fixed"}
    return json.dumps(head | {"choices": choices, "usage": usage}).encode()


def items(videos: int) -> list[Item]:
    made = []
    for video in range(videos):
        events = tuple(AtomicEvent(EVENT.format(video=video, number=number)) for number in range(N_EVENTS))
        made.append(Item(Prediction(f"{video}.mp4", CAPTION), Truth(f"{video}.mp4", events)))
    return made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--delay-ms", type=float, default=50.0)
    options.add_argument("--videos", type=int, default=483)
    options.add_argument("--runs", type=int, default=7)
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 100])
    chosen = options.parse_args()
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=serve, args=(port, chosen.delay_ms / 1000, completion()), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.get(timeout=30)}/v1"
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {chosen.delay_ms:g} ms")
    print("| concurrency | judgements | seconds | a second | of the ideal | CPU ms each |")
    print("|---|---|---|---|---|---|")
    try:
        for concurrency in chosen.concurrency:
            with tempfile.TemporaryDirectory() as folder:
                endpoint = Endpoint("fixed", url, concurrency=concurrency)
                judge = ModelJudge(LanguageModelJudge(Asker(endpoint, Path(folder) / "replies.jsonl")))
                wall, cpu = time.perf_counter(), time.process_time()
                judged = judge_all(items(chosen.videos), judge, chosen.runs)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                count = chosen.videos * chosen.runs
                assert judge.model.asker.asked == count and abs(scores(judged).rates.total - 300 / N_EVENTS) < 1e-9
                share = count / wall / (concurrency / (chosen.delay_ms / 1000))
                print(
                    f"| {concurrency} | {count} | {wall:.2f} | {count / wall:.0f} | {share:.0%} | "
                    f"{1000 * cpu / count:.2f} |",
                    flush=True,
                )
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
