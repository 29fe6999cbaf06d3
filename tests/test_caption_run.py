"""Laws of long runs: a stopped run goes on, other settings are refused, a bad file is recorded and tried again."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import kokanee
from kokanee import caption_run
from kokanee.caption_run import Task
from kokanee.captioner import Captioner
from kokanee.errors import KokaneeError
from kokanee.files import file_key
from kokanee.formats import read_jsonl
from kokanee.outputs import read_records
from kokanee.weights import fingerprint

NAMES = ("first.mp4", "second.mp4", "silent.mp4", "sound.wav", "still.png")


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint) -> Captioner:
    return Captioner.from_pretrained(tiny_checkpoint)


@pytest.fixture
def files(media) -> list[Path]:
    return [media / name for name in NAMES]


def test_every_file_gets_the_record_of_its_caption(captioner, files, tmp_path):
    summary = captioner.caption_files(files, tmp_path / "out.jsonl", "What happens?")
    records = read_jsonl(tmp_path / "out.jsonl")
    assert (summary.captioned, summary.skipped, summary.failed) == (5, 0, {})
    assert [record["file"] for record in records] == [path.as_posix() for path in files]
    assert [record["captions"][0]["text"] for record in records] == [
        captioner.caption(path, "What happens?").text for path in files
    ]
    assert {record["question"] for record in records} == {"What happens?"}
    assert records[0]["settings"] == {
        "start_s": None,
        "end_s": None,
        "every_s": None,
        "samples": 1,
        "use": ["video", "audio"],
        "temperature": 0.0,
        "top_p": None,
        "seed": None,
        "max_new_tokens": 12,
        "repetition_penalty": None,
        "dtype": "float32",
        "base": None,
        "kokanee": kokanee.__version__,
        "weights": fingerprint(captioner.model),
        "processor": captioner.processor.config.model_dump(mode="json"),
    }
    assert records[0]["size_bytes"] == files[0].stat().st_size


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(captioner, files, tmp_path, batch_size):
    captioner.caption_files(files, tmp_path / "whole.jsonl")

    def stop(record):
        if record["file"] == files[2].as_posix():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captioner.caption_files(files, tmp_path / "out.jsonl", batch_size=batch_size, on_record=stop)
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"version": 1, "fi')  # killed while writing
    told = []
    summary = captioner.caption_files(files, tmp_path / "out.jsonl", batch_size=batch_size, on_record=told.append)
    assert summary.captioned == 5 and summary.skipped >= 3
    assert read_records(tmp_path / "out.jsonl") == read_records(tmp_path / "whole.jsonl")
    assert len(read_jsonl(tmp_path / "out.jsonl")) == len(told) == 5


def test_a_second_run_adds_nothing_and_takes_new_files(captioner, files, tmp_path):
    out = tmp_path / "out.jsonl"
    captioner.caption_files(files[:2], out)
    before = out.read_bytes()
    assert captioner.caption_files(files[:2], out).skipped == 2
    assert out.read_bytes() == before
    assert captioner.caption_files([*files[:3], files[0]], out).captioned == 3
    assert out.read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"question": "Why?"}, "question: 'Describe the video.' before, 'Why\\?' now"),
        ({"every_s": 2.0}, "every_s: None before, 2.0 now"),
        ({"temperature": 0.5}, "temperature: 0.0 before, 0.5 now"),
        ({"use": ("audio",)}, "use: "),
        ({"max_new_tokens": 3}, "max_new_tokens: 12 before, 3 now"),
    ],
)
def test_a_run_with_other_settings_is_refused_with_what_differs(captioner, files, tmp_path, other, named):
    out = tmp_path / "out.jsonl"
    captioner.caption_files(files[:1], out)
    before = out.read_bytes()
    with pytest.raises(KokaneeError, match=named):
        captioner.caption_files(files, out, **other)
    assert out.read_bytes() == before


def test_other_weights_under_the_same_name_are_refused(captioner, files, tmp_path):
    out = tmp_path / "out.jsonl"
    captioner.caption_files(files[:1], out)
    model = copy.deepcopy(captioner.model)
    other = Captioner(model, captioner.processor, captioner.defaults, captioner.name)
    assert other.caption_files(files[:1], out).skipped == 1
    with torch.no_grad():
        model.language_model.layers[0].self_attn.q_proj.weight += 1e-3
    with pytest.raises(KokaneeError, match=r"other settings \(weights: '\w+' before, '\w+' now\)"):
        other.caption_files(files[:1], out)


def test_other_settings_of_the_processor_are_refused_with_what_differs(captioner, tiny_checkpoint, files, tmp_path):
    out = tmp_path / "out.jsonl"
    captioner.caption_files(files[:1], out)
    other = Captioner.from_pretrained(tiny_checkpoint, max_frames=8, positions="as_published")
    reason = r"other settings \(max_frames: 240 before, 8 now; positions: 'trained' before, 'as_published' now\)"
    with pytest.raises(KokaneeError, match=reason):
        other.caption_files(files[:1], out)


def test_two_runs_do_not_add_to_one_file_at_once(captioner, files, tmp_path, monkeypatch):
    monkeypatch.setattr("kokanee.formats.LOCK_WAIT_S", 0.1)
    refused = []

    def again(_):
        with pytest.raises(KokaneeError, match=r"Another process works in .*out\.jsonl"):
            captioner.caption_files(files[:2], tmp_path / "out.jsonl")
        refused.append(len(read_jsonl(tmp_path / "out.jsonl")))

    captioner.caption_files(files[:2], tmp_path / "out.jsonl", on_record=again)
    assert refused == [1, 2] and [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_file_that_has_changed_is_captioned_again(captioner, media, tmp_path):
    clip, out = tmp_path / "clip.mp4", tmp_path / "out.jsonl"
    shutil.copy(media / "first.mp4", clip)
    captioner.caption_files([clip], out)
    shutil.copy(media / "second.mp4", clip)
    assert captioner.caption_files([clip], out).skipped == 0
    (record,) = read_records(out).values()
    assert record["captions"][0]["end_s"] == 3
    os.utime(clip, (1, 1))
    assert captioner.caption_files([clip], out).skipped == 0
    assert captioner.caption_files([clip], out).skipped == 1
    clip.unlink()
    assert captioner.caption_files([clip], out).skipped == 1


@pytest.mark.parametrize("every_s", [None, 5.0])
def test_a_file_that_changes_while_it_is_captioned_is_captioned_again(captioner, media, tmp_path, monkeypatch, every_s):
    clip, out, answer = tmp_path / "clip.mp4", tmp_path / "out.jsonl", captioner.answer
    shutil.copy(media / "first.mp4", clip)

    def meanwhile(*args):
        shutil.copy(media / "second.mp4", clip)
        return answer(*args)

    with monkeypatch.context() as patched:
        patched.setattr(captioner, "answer", meanwhile)
        captioner.caption_files([clip], out, every_s=every_s)
    assert captioner.caption_files([clip], out, every_s=every_s).skipped == 0
    assert captioner.caption_files([clip], out, every_s=every_s).skipped == 1


def test_a_file_has_one_record_however_its_path_is_written(captioner, media, tmp_path, monkeypatch):
    monkeypatch.chdir(media)
    out = tmp_path / "out.jsonl"
    assert captioner.caption_files(["second.mp4", Path("../") / media.name / "second.mp4"], out).captioned == 1
    assert captioner.caption_files([media / "second.mp4"], out).skipped == 1
    assert captioner.caption_files(["silent.mp4"], out).captioned == 1
    assert read_jsonl(out)[-1]["file"] == "silent.mp4"


def test_a_name_that_is_no_utf8_is_recorded_and_found_again(captioner, media, tmp_path):
    clip, out = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4")), tmp_path / "out.jsonl"
    shutil.copy(media / "silent.mp4", clip)
    assert captioner.caption_files([clip], out).captioned == 1
    assert captioner.caption_files([clip], out).skipped == 1
    assert b"caf\xe9.mp4" in out.read_bytes()


def test_settings_without_effect_may_differ(captioner, files, tmp_path):
    captioner.caption_files(files[:1], tmp_path / "out.jsonl", seed=1)
    assert captioner.caption_files(files[:1], tmp_path / "out.jsonl", seed=2, top_p=0.5).skipped == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_bad_file_is_recorded_once_and_tried_again(captioner, media, tmp_path, batch_size):
    bad, out = tmp_path / "bad.mp4", tmp_path / "out.jsonl"
    bad.write_text("no video")
    files = [media / "first.mp4", bad, media / "second.mp4"]
    summary = captioner.caption_files(files, out, batch_size=batch_size)
    assert summary.captioned == 2 and list(summary.failed) == [bad.as_posix()]
    assert read_records(out)[file_key(bad)] == {
        "version": 1,
        "file": bad.as_posix(),
        "path": file_key(bad),
        "error": summary.failed[bad.as_posix()],
    }
    assert captioner.caption_files(files, out, batch_size=batch_size).failed == summary.failed
    assert len(read_jsonl(out)) == 3
    bad.write_bytes((media / "second.mp4").read_bytes())
    assert captioner.caption_files(files, out, batch_size=batch_size).failed == {}
    records = read_records(out)
    assert records[file_key(bad)]["captions"] == records[file_key(files[2])]["captions"]


def test_one_file_that_fails_in_the_model_does_not_take_its_batch_along(captioner, files, tmp_path, monkeypatch):
    answer = captioner.answer

    def fussy(prepared, *more):
        if any(part.end_s == 0 for part in prepared):
            raise KokaneeError("no stills today")
        return answer(prepared, *more)

    monkeypatch.setattr(captioner, "answer", fussy)
    summary = captioner.caption_files(files, tmp_path / "out.jsonl", batch_size=5)
    assert summary.captioned == 4 and summary.failed == {files[4].as_posix(): "no stills today"}


def test_a_file_too_large_for_the_memory_fails_alone_and_is_told_what_helps(captioner, files, tmp_path, monkeypatch):
    one_more = captioner.model.forward

    def small(**batch):
        ids = batch.get("input_ids")
        if ids is not None and (len(ids) > 1 or ids.shape[1] > 60):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB")
        return one_more(**batch)

    monkeypatch.setattr(captioner.model, "forward", small)
    summary = captioner.caption_files(files, tmp_path / "out.jsonl", batch_size=5)
    assert summary.captioned and summary.failed
    for reason in summary.failed.values():
        assert reason.startswith("The device has too little memory (CUDA out of memory. Tried to allocate 2 GiB).")
        assert all(remedy in reason for remedy in ("--end", "--every", "--batch-size 1", "bfloat16"))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_interval_that_fails_does_not_stop_the_others_and_is_tried_again_alone(
    captioner, media, tmp_path, monkeypatch, batch_size
):
    out, answer, tried = tmp_path / "out.jsonl", captioner.answer, []

    def fussy(prepared, *more):
        if any(part.start_s == 1 for part in prepared):
            raise KokaneeError("damaged here")
        return answer(prepared, *more)

    with monkeypatch.context() as context:
        context.setattr(captioner, "answer", fussy)
        summary = captioner.caption_files([media / "first.mp4"], out, every_s=1, batch_size=batch_size)
    reason = "1 interval has no caption, the first from 1 s on: damaged here"
    assert summary.captioned == 0 and list(summary.failed.values()) == [reason]
    (record,) = read_jsonl(out)
    assert record["error"] == reason and [c["start_s"] for c in record["captions"]] == [0, 2, 3, 4]
    assert record["failed"] == [{"start_s": 1, "end_s": 2, "error": "damaged here"}]
    monkeypatch.setattr(captioner, "answer", lambda *given: tried.append(given) or answer(*given))
    assert captioner.caption_files([media / "first.mp4"], out, every_s=1).captioned == 1
    assert len(tried) == 1
    (record,) = read_records(out).values()
    assert "error" not in record and [c["start_s"] for c in record["captions"]] == [0, 1, 2, 3, 4]
    captioner.caption_files([media / "first.mp4"], tmp_path / "at_once.jsonl", every_s=1)
    assert read_jsonl(tmp_path / "at_once.jsonl") == [record]


def test_a_run_that_is_killed_has_kept_the_intervals_of_the_minutes_before(captioner, media, tmp_path, monkeypatch):
    monkeypatch.setattr(caption_run, "KEPT_EVERY_S", 0.0)
    out, answer, calls = tmp_path / "out.jsonl", captioner.answer, []

    def killed(*given):
        calls.append(given)
        if len(calls) == 4:
            raise SystemError
        return answer(*given)

    with monkeypatch.context() as context:
        context.setattr(captioner, "answer", killed)
        with pytest.raises(SystemError):
            captioner.caption_files([media / "first.mp4"], out, every_s=1)
    assert len(read_jsonl(out)[-1]["captions"]) == 3
    made, task = [], Task(every_s=1.0, decoding=captioner.decoding({}))
    summary = caption_run.run(captioner, [media / "first.mp4"], out, task, on_caption=lambda *m: made.append(m))
    assert summary.captioned == 1 and [caption.start_s for _, caption in made] == [3, 4]


def test_a_run_goes_on_from_another_folder(captioner, media, tmp_path, monkeypatch):
    monkeypatch.chdir(media)
    captioner.caption_files(["second.mp4"], tmp_path / "out.jsonl")
    monkeypatch.chdir(tmp_path)
    assert captioner.caption_files([media / "second.mp4"], tmp_path / "out.jsonl").skipped == 1


def test_a_file_of_other_records_is_refused(captioner, media, tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"version": 1, "file": "00000.mp4", "events": []}\n')
    with pytest.raises(KokaneeError, match="line 1 is no record of a caption"):
        captioner.caption_files([media / "second.mp4"], tmp_path / "samples.jsonl")


def test_intervals_and_samples_are_all_in_one_record(captioner, media, tmp_path):
    out = tmp_path / "out.jsonl"
    captioner.caption_files([media / "first.mp4"], out, every_s=2.5, n_samples=2, temperature=1.0, seed=3, batch_size=2)
    (record,) = read_jsonl(out)
    found = [(c["start_s"], c["end_s"], c["sample"], c["seed"]) for c in record["captions"]]
    assert found == [(0, 2.5, 0, 3), (0, 2.5, 1, 3), (2.5, 5, 0, 3), (2.5, 5, 1, 3)]


def test_records_can_go_without_a_file(captioner, files):
    told = []
    assert captioner.caption_files(files[:2], None, on_record=told.append).captioned == 2
    assert [json.loads(json.dumps(record)) for record in told] == told
