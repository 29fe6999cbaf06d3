"""A server on loopback that speaks OpenAI's chat protocol, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]
Behaviour = Callable[["Server", Request], tuple[int, bytes, dict[str, str]]]


def completion(text: str | None, tokens: int = 10) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens},
        }
    ).encode()


class Server:
    """`answer` makes the text of a good reply; `trouble` are behaviours that come first, one for each request."""

    def __init__(self, answer: Callable[[Request], str | None]) -> None:
        self.answer = answer
        self.trouble: list[Behaviour] = []
        self.requests: list[Request] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.delay_s = 0.0
        self.lock = threading.Lock()

    def reply(self, request: Request) -> tuple[int, bytes, dict[str, str]]:
        with self.lock:
            self.requests.append(request)
            behaviour = self.trouble.pop(0) if self.trouble else None
        return behaviour(self, request) if behaviour else (200, completion(self.answer(request)), {})


def status(code: int, message: str = "trouble", **headers: str) -> Behaviour:
    body = json.dumps({"error": {"message": f"{message} {code}"}}).encode()
    return lambda server, request: (code, body, {name.replace("_", "-"): value for name, value in headers.items()})


def half(server: Server, request: Request) -> tuple[int, bytes, dict[str, str]]:
    body = completion(server.answer(request))
    return 200, body[: len(body) // 2], {"x-length": str(len(body))}


def garbage(server: Server, request: Request) -> tuple[int, bytes, dict[str, str]]:
    return 200, b'{"nothing": "of use"}', {}


def silence(server: Server, request: Request) -> tuple[int, bytes, dict[str, str]]:
    return 0, b"", {}


def late(seconds: float) -> Behaviour:
    def wait(server: Server, request: Request) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(seconds)
        return 200, completion(server.answer(request)), {}

    return wait


@contextmanager
def serving(answer: Callable[[Request], str | None], port: int = 0) -> Iterator[tuple[Server, str]]:
    """The server and its base URL; it is gone when the block ends. port 0: any that is free."""
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with server.lock:
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.under_way += 1
                server.most_under_way = max(server.most_under_way, server.under_way)
            time.sleep(server.delay_s)
            code, reply, headers = server.reply(json.loads(body))
            with server.lock:
                server.under_way -= 1
            if code == 0:
                self.close_connection = True
                return
            announced = headers.pop("x-length", str(len(reply)))
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", announced)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)
            self.close_connection = self.close_connection or announced != str(len(reply))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    http = Listener(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
