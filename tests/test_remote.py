"""Laws of captions by a server: it is shown what is in the file, asked nothing twice, and its troubles are got over."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kokanee.captions import Decoding, Request
from kokanee.cli import app
from kokanee.endpoint import Endpoint
from kokanee.errors import KokaneeError
from kokanee.formats import read_jsonl
from kokanee.media import read_clip
from kokanee.outputs import read_records
from kokanee.remote import FrameSettings, RemoteCaptioner, moment
from kokanee.sampling import Sampling
from model_server import completion, half, serving, status


def told(request) -> str:
    """What the server says: how many frames and sounds it got, and its seed."""
    kinds = [part["type"] for part in request["messages"][0]["content"]]
    return f"{kinds.count('image_url')} frames, {kinds.count('input_audio')} sounds, seed {request['seed']}."


@pytest.fixture
def served():
    with serving(told) as found:
        yield found


def captioner(url: str, **frames) -> RemoteCaptioner:
    endpoint = Endpoint("m", url, wait_s=0.01, attempts=3, timeout_s=10.0, concurrency=4)
    return RemoteCaptioner(endpoint, FrameSettings(**{"interval_s": 0.5, **frames}))


def content(server) -> list[dict]:
    return server.requests[-1]["messages"][0]["content"]


def kk(*words, code: int = 0):
    found = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "1000", "NO_COLOR": "1"})
    assert found.exit_code == code, found.output
    return found


def test_frames_go_after_their_times_then_the_sound_then_the_question(served, media):
    server, url = served
    made = captioner(url, max_side=48).caption(media / "first.mp4", "What is it?")
    parts = content(server)
    assert made.text == told(server.requests[-1]) and made.finished and made.n_tokens == 1
    assert parts[-1] == {"type": "text", "text": "What is it?"}
    clip = read_clip(media / "first.mp4", Sampling("salmonn2plus", 0.5, 1, 32))
    assert [part["text"] for part in parts[: 2 * len(clip.times_s) : 2]] == [moment(t) for t in clip.times_s]
    for part, frame in zip(parts[1 : 2 * len(clip.times_s) : 2], clip.frames, strict=True):
        kind, data = part["image_url"]["url"].split(",")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        whole = Image.fromarray(frame)
        assert kind == "data:image/jpeg;base64" and max(picture.size) == 48
        assert picture.size == pytest.approx([side * 48 / max(whole.size) for side in whole.size], abs=1)
        whole.thumbnail((48, 48))
        assert np.abs(np.asarray(picture, int) - np.asarray(whole, int)).mean() < 12
    sound = parts[-2]["input_audio"]
    with wave.open(io.BytesIO(base64.b64decode(sound["data"]))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert sound["format"] == "wav" and clip.waveform is not None
    assert np.abs(samples - np.clip(clip.waveform, -1, 1)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "use", "kinds"),
    [
        ("first.mp4", ("video",), {"text", "image_url"}),
        ("first.mp4", ("audio",), {"text", "input_audio"}),
        ("silent.mp4", ("video", "audio"), {"text", "image_url"}),
        ("sound.wav", ("video", "audio"), {"text", "input_audio"}),
        ("still.png", ("video", "audio"), {"text", "image_url"}),
    ],
)
def test_only_what_is_there_and_wanted_is_sent(served, media, name, use, kinds):
    server, url = served
    captioner(url).caption(media / name, use=use)
    assert {part["type"] for part in content(server)} == kinds


def test_long_files_are_shown_with_fewer_frames(served, media):
    server, url = served
    captioner(url, interval_s=0.01, max_frames=3).caption(media / "first.mp4")
    assert sum(part["type"] == "image_url" for part in content(server)) == 3


def test_samples_are_questions_of_their_own_that_come_again_with_the_same_seeds(served, media):
    server, url = served
    one = captioner(url).samples(media / "first.mp4", 4, seed=7)
    seeds = [request["seed"] for request in server.requests]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    assert [caption.sample for caption in one] == [0, 1, 2, 3] and {caption.seed for caption in one} == {7}
    assert {request["temperature"] for request in server.requests} == {1.0}
    assert captioner(url).samples(media / "first.mp4", 2, seed=7) == one[:2]
    assert captioner(url).samples(media / "first.mp4", 4, seed=8) != one


def test_captions_are_made_inside_a_running_event_loop_too(served, media):
    _, url = served

    async def notebook():
        return captioner(url).batch([media / "first.mp4", media / "second.mp4"])

    assert asyncio.run(notebook()) == captioner(url).batch([media / "first.mp4", media / "second.mp4"])


def test_a_caption_that_was_cut_off_says_so(served, media):
    server, url = served
    server.trouble = [lambda server, request: (200, completion("It beg").replace(b'"stop"', b'"length"'), {})]
    made = captioner(url).caption(media / "first.mp4", max_new_tokens=5)
    assert (made.text, made.finished) == ("It beg", False) and server.requests[-1]["max_tokens"] == 5


def test_what_a_model_thinks_aloud_is_no_caption(media):
    with serving(lambda _: "<think>A cat?</think>\n\nA dog barks.") as (_, url):
        assert captioner(url).caption(media / "first.mp4").text == "A dog barks."
    with (
        serving(lambda _: "<think>A cat? Or") as (_, url),
        pytest.raises(KokaneeError, match="cut off while it thought"),
    ):
        captioner(url).caption(media / "first.mp4")


def test_troubles_of_the_server_change_no_caption(served, media):
    server, url = served
    files = [media / name for name in ("first.mp4", "second.mp4", "silent.mp4")]
    good = captioner(url).batch(files)
    server.trouble = [status(429), half, status(500)]
    assert captioner(url).batch(files) == good


def test_a_run_goes_on_and_asks_nothing_twice(served, media, tmp_path):
    server, url = served
    names = ("first.mp4", "second.mp4", "silent.mp4", "sound.wav", "still.png")
    files, out = [media / name for name in names], tmp_path / "out.jsonl"
    server.trouble = [status(403)]
    summary = captioner(url).caption_files(files, out)
    assert (summary.captioned, len(summary.failed), len(server.requests)) == (4, 1, 5)
    again = captioner(url).caption_files(files, out)
    assert (again.captioned, again.skipped, again.failed, len(server.requests)) == (5, 4, {}, 6)
    records = read_records(out).values()
    assert all(record["captions"][0]["text"].endswith("seed 0.") for record in records)


@pytest.fixture
def pictures(media, tmp_path) -> list[Path]:
    """Twelve files."""
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for file in files:
        shutil.copy(media / "still.png", file)
    return files


def test_a_server_that_refuses_all_ends_the_run(served, pictures, tmp_path):
    server, url = served
    server.trouble = [status(401)] * 12
    with pytest.raises(KokaneeError, match=r"None of the first 8 questions got an answer of use.*401"):
        captioner(url).caption_files(pictures, tmp_path / "out.jsonl")
    assert len(server.requests) < 12


def test_a_server_that_is_not_there_is_told_at_once_and_only_where_something_is_to_be_asked(pictures, tmp_path):
    with serving(told) as (_, url):
        made = captioner(url).caption_files(pictures, tmp_path / "out.jsonl")
    with pytest.raises(KokaneeError, match=r"cannot be reached.*Start the server"):
        captioner(url).caption_files(pictures, tmp_path / "other.jsonl")
    assert captioner(url).caption_files(pictures, tmp_path / "out.jsonl").captioned == made.captioned == 12


@pytest.mark.parametrize("trouble", [[status(400)] * 11, [status(500)] * 33, [status(401)] * 7])
def test_files_that_fail_do_not_end_the_run(served, pictures, tmp_path, trouble):
    """The server does not take them, fails at them, or refuses fewer than eight."""
    server, url = served
    server.trouble = list(trouble)
    found = captioner(url).caption_files(pictures, tmp_path / "out.jsonl")
    assert len(found.failed) + found.captioned == 12 and not server.trouble and found.captioned in (1, 5)


def test_what_was_never_tried_comes_before_what_failed(served, pictures, tmp_path):
    server, url = served
    out, records = tmp_path / "out.jsonl", []
    server.trouble = [status(400)] * 10
    captioner(url).caption_files(pictures[:10], out)
    captioner(url).caption_files(pictures, out, on_record=records.append)
    assert [Path(record["file"]) for record in records] == [*pictures[10:], *pictures[:10]]


def test_intervals_are_kept_when_a_run_is_stopped(served, media, tmp_path, monkeypatch):
    server, url = served
    out, seen = tmp_path / "out.jsonl", []

    whole = list(captioner(url).every(media / "first.mp4", 0.4))
    server.requests.clear()

    def third(self, *words, **more):
        seen.append(words)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(self, *words, **more)

    read = RemoteCaptioner.read
    with monkeypatch.context() as patch:
        patch.setattr(RemoteCaptioner, "read", third)
        with pytest.raises(KeyboardInterrupt):
            captioner(url).caption_files([media / "first.mp4"], out, every_s=0.4)
    (kept,) = [record["captions"] for record in read_records(out).values()]
    captioner(url).caption_files([media / "first.mp4"], out, every_s=0.4)
    (record,) = read_records(out).values()
    assert [entry["text"] for entry in record["captions"]] == [caption.text for caption in whole]
    # Two intervals were read; the second may still have been on its way when the third stopped all.
    assert 1 <= len(kept) < len(whole) and len(server.requests) - len(whole) in (0, 2 - len(kept))


def test_a_reader_who_stops_between_two_captions_leaves_nothing_open(served, media, recwarn):
    _, url = served
    files = [Request(media / name) for name in ("first.mp4", "second.mp4", "silent.mp4")]
    found = captioner(url).each(files, Decoding(), batch_size=2)
    next(found)
    found.close()
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.filterwarnings("error")
def test_intervals_are_printed_in_their_order_whatever_order_they_come_in(media):
    def late_first(request) -> str:
        text = request["messages"][0]["content"][0]["text"]
        time.sleep(0.3 if text == "0:00.0" else 0.0)
        return f"from {text}"

    with serving(late_first) as (_, url):
        words = ("--model", "openai:m", "--base-url", url, "--video-only", "--every", 1, "--batch-size", 5)
        told = kk("caption", media / "first.mp4", *words).stdout
    gc.collect()
    said = [line.removeprefix("from ") for line in told.splitlines() if line.startswith("from")]
    assert said == [f"0:0{number}.0" for number in range(5)]


def test_as_many_questions_are_under_way_as_the_batch_is_large(served, media):
    server, url = served
    server.delay_s = 0.05
    for n_samples, every_s in ((3, 0.5), (8, None)):
        server.most_under_way = 0
        how = {"n_samples": n_samples, "temperature": 1.0, "every_s": every_s, "batch_size": 3}
        assert captioner(url).caption_files([media / "first.mp4"], None, **how).failed == {}
        assert server.most_under_way == 3


def test_a_file_that_cannot_be_read_stops_no_other(served, media, tmp_path):
    server, url = served
    bad, out = tmp_path / "bad.mp4", tmp_path / "out.jsonl"
    bad.write_text("no video")
    found = captioner(url).caption_files([media / "first.mp4", bad, media / "second.mp4"], out, batch_size=2)
    assert found.captioned == 2 and list(found.failed) == [bad.as_posix()] and len(server.requests) == 2


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_command_that_is_killed_goes_on_and_asks_again_only_what_was_under_way(served, media, tmp_path, kind, code):
    server, url = served
    server.delay_s = 0.3
    for number in range(8):
        (tmp_path / f"{number}.mp4").write_bytes((media / "silent.mp4").read_bytes())
    out = tmp_path / "out.jsonl"
    words = ["caption", tmp_path, "--model", "openai:m", "--base-url", url, "--batch-size", 2, "--out", out]
    command = [sys.executable, "-c", "from kokanee.cli import main; main()", *map(str, words)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out.is_file() and out.read_bytes().count(b"\n") > 2) and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(kind)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == code and "Traceback" not in errors and "Unclosed" not in errors
    done = len(read_jsonl(out))
    assert 3 <= done < 8
    kk(*words)
    assert len(read_records(out)) == 8 and len(server.requests) <= 8 + 2


def test_records_of_another_model_or_with_other_frames_are_refused(served, media, tmp_path):
    _, url = served
    out = tmp_path / "out.jsonl"
    captioner(url).caption_files([media / "first.mp4"], out)
    with pytest.raises(KokaneeError, match="max_frames: 32 before, 8 now"):
        captioner(url, max_frames=8).caption_files([media / "second.mp4"], out)
    other = RemoteCaptioner(Endpoint("other", url), FrameSettings(interval_s=0.5))
    with pytest.raises(KokaneeError, match="model: 'openai:m' before, 'openai:other' now"):
        other.caption_files([media / "second.mp4"], out)


def test_a_server_that_cannot_hear_is_told_with_the_remedy(served, media):
    server, url = served
    server.trouble = [status(400, message="input_audio is not supported")]
    with pytest.raises(KokaneeError, match=r"does not take the sound. .*--video-only.*not supported 400"):
        captioner(url).caption(media / "first.mp4")
    assert len(server.requests) == 1


def test_a_server_that_takes_fewer_pictures_is_told_with_the_remedies(served, media):
    server, url = served
    server.trouble = [status(400, message="At most 4 images may be given")] * 2
    with pytest.raises(KokaneeError, match=r"does not take the pictures.*max_frames.*--audio-only.*At most 4"):
        captioner(url).caption(media / "first.mp4")
    with pytest.raises(KokaneeError, match=r"does not take the pictures.*max_frames") as told:
        captioner(url).caption(media / "silent.mp4")
    assert "--audio-only" not in str(told.value)


@pytest.mark.parametrize("word", ["audio", "image"])
def test_the_name_of_a_model_or_server_is_no_complaint(served, media, word):
    server, url = served
    server.trouble = [status(403)]
    end = Endpoint(f"m-{word}", url + f"/{word}", attempts=1)
    with pytest.raises(KokaneeError, match=f"refuses m-{word}") as told:
        RemoteCaptioner(end).caption(media / "first.mp4")
    assert "does not take" not in str(told.value)


def test_the_key_is_sent_and_written_nowhere(served, media, tmp_path, monkeypatch):
    server, url = served
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.trouble = [status(401, message="wrong key sk-secret")]
    captioner(url).caption_files([media / "first.mp4", media / "second.mp4"], tmp_path / "out.jsonl")
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    written = (tmp_path / "out.jsonl").read_text()
    assert "secret" not in written and "wrong key ***" in written


@pytest.mark.parametrize(
    ("time_s", "text"), [(0, "0:00.0"), (3.46, "0:03.5"), (59.97, "1:00.0"), (3723.5, "1:02:03.5")]
)
def test_moments(time_s, text):
    assert moment(time_s) == text


def test_wrong_frame_settings_name_the_nearest():
    with pytest.raises(KokaneeError, match=r"unknown setting 'max_frame' .*'max_frames'"):
        FrameSettings(max_frame=3)


def test_the_command_writes_what_it_writes_for_any_model(served, media, tmp_path):
    server, url = served
    words = ("caption", media / "first.mp4", "--model", "openai:m", "--base-url", url)
    assert kk(*words).stdout == told(server.requests[-1]) + "\n"
    kk(*words, "--every", 0.5, "--out", tmp_path / "a.srt", "--batch-size", 3)
    assert (tmp_path / "a.srt").read_text().count("-->") == len(read_times(media / "first.mp4", url))
    kk(
        "caption",
        media / "first.mp4",
        media / "second.mp4",
        *words[2:],
        "--out",
        tmp_path / "all.jsonl",
        "--samples",
        2,
    )
    assert [len(record["captions"]) for record in read_jsonl(tmp_path / "all.jsonl")] == [2, 2]
    kk(*words, "--set", "max_side=32")
    data = content(server)[1]["image_url"]["url"].split(",")[1]
    assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 32


def test_openai_itself_needs_a_key_before_anything_is_read(media, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(RemoteCaptioner, "read", None)
    assert "OPENAI_API_KEY is not set" in kk("caption", media / "first.mp4", "--model", "openai:m", code=1).stderr


def read_times(path: Path, url: str) -> list[tuple[float, float]]:
    return captioner(url).parts(path, 0.5)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--model", "openai:m", "--device", "cuda"), "--device"),
        (("--model", "openai:m", "--dtype", "bfloat16"), "--dtype"),
        (("--model", "openai:m", "--base", "b"), "--base"),
        (("--model", "openai:"), "names no model"),
        (("--model", "nano", "--base-url", "http://x"), "--base-url"),
    ],
)
def test_options_that_say_nothing_are_refused(media, more, reason):
    assert reason in kk("caption", media / "first.mp4", *more, code=2).stderr


def test_asking_a_server_loads_no_torch(served, media):
    _, url = served
    code = (
        "import sys; from kokanee.cli import app\n"
        f"try: app(['caption', {str(media / 'first.mp4')!r}, '--model', 'openai:m', '--base-url', {url!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "frames" in found.stdout, found.stderr
