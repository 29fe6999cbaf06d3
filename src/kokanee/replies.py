"""What language models said, by the content of the question: in a file, so that nothing is asked and paid for twice."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kokanee.errors import KokaneeError
from kokanee.formats import UTF8, mend_end, read_jsonl

SYNCED_EVERY_S = 1.0


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
        self.known: dict[str, Reply] = {}
        self.tokens_in = self.tokens_out = self.n_paid = 0
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or not {"key", "reply"} <= record.keys():
                raise KokaneeError(f"{path}, line {number} is no reply. Choose another place, or remove the file.")
            self._count(record["key"], reply_of(record))
        self._file: TextIO | None = None
        self._synced_s = 0.0

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; of an empty one only what it cost."""
        self._count(key, reply)
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

    def _count(self, key: str, reply: Reply) -> None:
        if reply.text:
            self.known[key] = reply
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.n_paid += 1

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
