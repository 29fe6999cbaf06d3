"""Laws of `kokanee events`: `kokanee score` reads what it writes, and a second call does only what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from kokanee.cli import app
from kokanee.formats import alone_at, append_jsonl, read_jsonl, write_json
from model_server import garbage, half, serving, status

EVENTS = [{"text": "A dog runs", "kind": "seen"}, {"text": "It barks twice", "kind": "heard"}]
GOOD = json.dumps({"events": EVENTS})


def kk(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "1000", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def words_of(folder, url, name="captions.jsonl"):
    return "events", folder / name, "--out", folder / "events.jsonl", "--model", "openai:m", "--base-url", url


@pytest.fixture
def folder(tmp_path):
    append_jsonl(tmp_path / "captions.jsonl", [{"file": f"{n}.mp4", "caption": f"Dog {n} runs."} for n in range(6)])
    return tmp_path


def test_what_is_written_is_read_by_score(folder):
    part = {"file": "0.mp4", "caption": "A dog runs.", "start_s": 1, "end_s": 3}
    append_jsonl(folder / "captions.jsonl", [part])
    with serving(lambda request: GOOD) as (server, url):
        found = kk(*words_of(folder, url))
    assert found.stdout == "" and "events of 7 captions, 2 to 2 each" in found.stderr and len(server.requests) == 7
    verdict = {"Missed": 1, "Incorrect": 0, "Hallucination": 0}
    lists = {"Missed Event": ["A dog runs"], "Incorrect Event": [], "Hallucination Event": []}
    with serving(lambda request: json.dumps(verdict | lists)) as (_, url):
        judged = "--judge", "openai:j", "--base-url", url, "--runs", 1
        kk("score", folder / "captions.jsonl", "-e", folder / "events.jsonl", "-o", folder / "s", *judged)
    (system,) = json.loads((folder / "s" / "scores.json").read_text())["systems"]
    assert system["global"]["rates"]["missed"] == system["local"]["rates"]["missed"] == 50.0
    assert system["global"]["kinds"]["seen"]["missed"] == 6 and system["local"]["captions"] == 1


def test_every_form_of_captions_gives_the_same_events(folder):
    caption, turn = "A dog runs and barks.", {"from": "gpt", "value": "A dog runs and barks."}
    settings = {"start_s": None, "end_s": None, "every_s": None}
    entry = {"start_s": 0.0, "end_s": 5.0, "sample": 0, "seed": None, "text": caption, "finished": True}
    record = {"version": 1, "file": "0.mp4", "path": "/0.mp4", "settings": settings, "captions": [entry]}
    append_jsonl(folder / "made.jsonl", [record])
    append_jsonl(folder / "plain.jsonl", [{"file": "0.mp4", "caption": caption}])
    write_json(folder / "result.json", [{"id": ["0.mp4"], "pred": caption}])
    write_json(folder / "test.json", [{"video": "0.mp4", "conversations": [{"from": "human", "value": "?"}, turn]}])
    with serving(lambda request: GOOD) as (server, url):
        written = set()
        for name in ("made.jsonl", "plain.jsonl", "result.json", "test.json"):
            kk(*words_of(folder, url, name))
            written.add((folder / "events.jsonl").read_text())
    assert len(written) == 1 and len(server.requests) == 1
    (line,) = read_jsonl(folder / "events.jsonl")
    assert list(line) == ["version", "file", "start_s", "end_s", "model", "caption_sha256", "events"]
    assert (line["version"], line["file"], line["start_s"], line["events"]) == (1, "0.mp4", None, EVENTS)


def test_edited_lines_stay_and_a_changed_caption_is_told_with_the_remedy(folder):
    events = folder / "events.jsonl"
    with serving(lambda request: GOOD) as (server, url):
        kk(*words_of(folder, url))
        edited = events.read_text().replace("A dog runs", "A brown dog runs")
        events.write_text(edited)
        captions = (folder / "captions.jsonl").read_text().replace("Dog 3 runs.", "Cat 3 sits.")
        (folder / "captions.jsonl").write_text(captions)
        found = kk(*words_of(folder, url))
        assert "their events are kept: 3.mp4." in found.stderr and "delete their lines" in found.stderr
        assert events.read_text() == edited and len(server.requests) == 6
        kept = [line for line in edited.splitlines(keepends=True) if '"3.mp4"' not in line]
        events.write_text("".join(kept))
        assert "changed" not in kk(*words_of(folder, url)).stderr
    assert events.read_text().startswith("".join(kept)) and len(read_jsonl(events)) == 6
    assert len(server.requests) == 7 and "Cat 3 sits." in server.requests[-1]["messages"][1]["content"]


def test_what_has_no_events_is_told_at_the_end_and_the_others_are_done(folder):
    append_jsonl(folder / "captions.jsonl", [{"file": "6.mp4", "caption": ""}])

    def answer(request):
        return "I cannot." if "Dog 2" in request["messages"][1]["content"] else GOOD

    with serving(answer) as (server, url):
        server.trouble = [status(429, retry_after="0"), status(500), half, garbage]
        found = kk(*words_of(folder, url), code=1)
    assert "1 of 7 captions left out, as they are empty (such as 6.mp4)" in found.stderr
    assert "2.mp4: m gave 4 replies that cannot be used" in found.stderr
    assert "1 of 6 captions got no events" in found.stderr and len(read_jsonl(folder / "events.jsonl")) == 5


def test_a_budget_stops_it_with_one_message_and_a_larger_one_goes_on(folder):
    with serving(lambda request: GOOD) as (server, url):
        one_by_one = (*words_of(folder, url), "--concurrency", 1)
        found = kk(*one_by_one, "--budget-tokens", 20, code=1)
        assert "The budget of 20 tokens is used up" in found.stderr and "events of 2 captions" in found.stderr
        kk(*one_by_one, "--budget-tokens", 1000)
    assert len(server.requests) == 6 and len(read_jsonl(folder / "events.jsonl")) == 6


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by a signal")
def test_a_run_that_was_killed_goes_on_and_asks_nothing_twice_that_was_answered(folder):
    with serving(lambda request: GOOD) as (server, url):
        server.delay_s = 0.2
        command = [sys.executable, "-m", "kokanee", *map(str, words_of(folder, url)), "--concurrency", "1"]
        process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
        late = time.monotonic() + 60
        while len(server.requests) < 3 and time.monotonic() < late:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.delay_s = 0.0
        done = (folder / "events.jsonl").read_bytes()
        n_answered = len(read_jsonl(folder / "events.replies.jsonl"))
        before = len(server.requests)
        kk(*words_of(folder, url))
    assert 2 <= n_answered < 6 and len(server.requests) - before == 6 - n_answered
    assert (folder / "events.jsonl").read_bytes().startswith(done) and len(read_jsonl(folder / "events.jsonl")) == 6


def test_two_runs_do_not_add_to_one_file_at_once(folder, monkeypatch):
    monkeypatch.setattr("kokanee.formats.LOCK_WAIT_S", 0.1)
    with serving(lambda request: GOOD) as (server, url), alone_at(folder / "events.jsonl"):
        assert "Another process works in" in kk(*words_of(folder, url), code=1).stderr
    assert not server.requests and [path.name for path in folder.iterdir()] == ["captions.jsonl"]


def test_half_a_line_is_moved_aside_not_thrown_away(folder):
    with serving(lambda request: GOOD) as (_, url):
        kk(*words_of(folder, url))
        text = (folder / "events.jsonl").read_text()
        (folder / "events.jsonl").write_text(text[:-20])
        assert "events.half.txt now" in kk(*words_of(folder, url)).stderr
    assert (folder / "events.jsonl").read_text() == text
    assert (folder / "events.half.txt").read_text().strip() == text.splitlines()[-1][:-19]


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"--out": "{f}/events.json"}, 2, "end in .jsonl"),
        ({"--model": "gpt"}, 2, "is no model; give openai:MODEL"),
        ({"--out": "{f}/captions.jsonl"}, 1, "no record of events"),
        ({"--out": "{f}/twice.jsonl"}, 1, "events of 0.mp4 twice"),
        ({"--out": "{f}/broken.jsonl"}, 1, "broken.jsonl, line 2: events must be a list"),
        ({"--out": "{f}/prose.jsonl"}, 1, "line 1 is not JSON"),
        ({"captions": "{f}/samples.jsonl"}, 1, "several captions of 0.mp4"),
        ({"captions": "{f}/no.jsonl"}, 1, "no.jsonl is not there"),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_asked(folder, change, code, reason):
    known = {"version": 1, "file": "0.mp4", "events": []}
    append_jsonl(folder / "twice.jsonl", [known, known])
    append_jsonl(folder / "broken.jsonl", [known, {**known, "events": ["A dog runs"]}])
    (folder / "prose.jsonl").write_text("Notes of mine,\nwithout an end")
    append_jsonl(folder / "samples.jsonl", [{"file": "0.mp4", "caption": text} for text in ("A dog.", "A cat.")])
    with serving(lambda request: GOOD) as (server, url):
        given = {"captions": "{f}/captions.jsonl", "--out": "{f}/events.jsonl", "--model": "openai:m"} | change
        captions, *options = ((name, value.format(f=folder)) for name, value in given.items())
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        words = [word for pair in options for word in pair]
        found = kk("events", captions[1], *words, "--base-url", url, code=code)
    assert reason in found.stderr and server.requests == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
