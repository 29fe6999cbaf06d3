"""Laws of what captions look like on disk: records keep everything, subtitles stay valid whatever a caption says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kokanee.errors import KokaneeError
from kokanee.files import file_key
from kokanee.formats import append_jsonl
from kokanee.outputs import (
    FORMATS,
    as_srt,
    as_txt,
    as_vtt,
    caption_record,
    clock,
    error_record,
    read_records,
)


def made(text: str = "A dog barks.", start_s: float = 0.0, end_s: float = 2.5, sample: int = 0, **more: Any) -> Any:
    settings = {"seed": None, "finished": True, "notes": (), **more}
    return SimpleNamespace(text=text, start_s=start_s, end_s=end_s, sample=sample, **settings)


def record(*captions: Any, **settings: Any) -> dict[str, Any]:
    return caption_record(Path("clip.mp4"), "nano", "What?", {"temperature": 0.0, **settings}, captions)


def test_a_record_has_the_agreed_keys_and_each_note_once():
    found = record(made(notes=("no sound track",)), made(start_s=2.5, end_s=4, notes=("no sound track", "damaged")))
    assert found == {
        "version": 1,
        "file": "clip.mp4",
        "path": file_key("clip.mp4"),
        "model": "nano",
        "question": "What?",
        "settings": {"temperature": 0.0},
        "captions": [
            {"start_s": 0, "end_s": 2.5, "sample": 0, "seed": None, "text": "A dog barks.", "finished": True},
            {"start_s": 2.5, "end_s": 4, "sample": 0, "seed": None, "text": "A dog barks.", "finished": True},
        ],
        "notes": ["no sound track", "damaged"],
    }


def test_json_and_jsonl_say_the_same_on_many_lines_and_on_one():
    found = record(made("two\nlines, \u2028 狗"))
    assert json.loads(FORMATS["json"](found)) == json.loads(FORMATS["jsonl"](found)) == found
    assert FORMATS["jsonl"](found).count("\n") == 1


def test_the_last_record_of_a_file_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    other = error_record(Path("other.mp4"), "empty")
    append_jsonl(path, [error_record(Path("clip.mp4"), "cut off"), other, record(made())])
    assert read_records(path) == {file_key("clip.mp4"): record(made()), file_key("other.mp4"): other}


def test_a_file_is_the_same_however_its_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    names = ("clip.mp4", "sub/../clip.mp4", str(tmp_path / "clip.mp4"))
    append_jsonl(tmp_path / "a.jsonl", [error_record(Path(name), "cut off") for name in names])
    (last,) = read_records(tmp_path / "a.jsonl").values()
    assert last["file"] == names[-1]


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "a.mp4"}',
        '{"version": 2, "file": "a.mp4"}',
        "[1]",
        '{"version": 1}',
        '{"version": 1, "file": "a.mp4"}',
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(KokaneeError, match="line 1 is no record"):
        read_records(path)


def test_a_single_caption_is_text_alone():
    assert as_txt(record(made())) == "A dog barks.\n"


def test_captions_of_intervals_and_samples_say_which_they_are():
    parts = record(made("one"), made("two", 2.5, 5.0), every_s=2.5)
    assert as_txt(parts) == "[00:00:00.000 - 00:00:02.500]\none\n\n[00:00:02.500 - 00:00:05.000]\ntwo\n"
    assert as_txt(record(made("one"), every_s=10.0)) == "[00:00:00.000 - 00:00:02.500]\none\n"
    assert as_txt(record(made("one"), made("two", sample=1), samples=2)) == "[sample 1]\none\n\n[sample 2]\ntwo\n"


def test_subtitles_are_those_of_the_formats():
    parts = record(made("one"), made("two", 2.5, 3725.0004))
    assert as_srt(parts) == "1\n00:00:00,000 --> 00:00:02,500\none\n\n2\n00:00:02,500 --> 01:02:05,000\ntwo\n"
    assert as_vtt(parts) == ("WEBVTT\n\n00:00:00.000 --> 00:00:02.500\none\n\n00:00:02.500 --> 01:02:05.000\ntwo\n")


def test_a_caption_cannot_break_its_cue():
    nasty = record(made("one\n\n2\n00:00:01,000 --> 00:00:02,000\n<i>&amp;</i>\n\n\n"), made("", 2.5, 3.0))
    srt, vtt = as_srt(nasty), as_vtt(nasty)
    assert srt.count("-->") == vtt.count("-->") == 2
    assert [cue.split("\n")[0] for cue in srt.split("\n\n")] == ["1", "2"]
    assert "&lt;i&gt;&amp;amp;&lt;/i&gt;" in vtt
    assert len(vtt.split("\n\n")) == 3


def test_subtitles_need_one_caption_at_a_time_and_a_length():
    with pytest.raises(KokaneeError, match="several samples"):
        as_srt(record(made(), made(sample=1)))
    with pytest.raises(KokaneeError, match=r"clip.mp4 has no length"):
        as_vtt(record(made(end_s=0.0)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00,000"), (59.9996, "00:01:00,000"), (3599.999, "00:59:59,999"), (90000, "25:00:00,000")],
)
def test_clock_carries_over(seconds, text):
    assert clock(seconds, ",") == text
