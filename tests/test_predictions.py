"""Laws of predictions: both formats say the same, nothing that failed is left out, names mean one file."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl
from kokanee.outputs import caption_record, error_record
from kokanee.predictions import Cut, FileNames, Prediction, read_predictions


def caption(text: str, start_s: float = 0.0, end_s: float = 5.0, sample: int = 0, finished: bool = True):
    made = {"text": text, "start_s": start_s, "end_s": end_s, "sample": sample, "seed": None, "finished": finished}
    return type("Made", (), {**made, "notes": ()})()


def record(name: str, *captions, **settings):
    return caption_record(
        Path(name), "nano", "What?", {"start_s": None, "end_s": None, "every_s": None, **settings}, captions
    )


def test_half_a_plain_line_at_the_end_is_named(tmp_path):
    """It may be a caption; of a run's own records it is one that was killed."""
    line = '{"file": "0.mp4", "caption": "A dog."}'
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line[:-1]}", encoding="utf-8-sig")
    with pytest.raises(KokaneeError, match=r"a\.jsonl, line 2 is not JSON"):
        read_predictions(tmp_path / "a.jsonl")


def test_records_and_the_published_format_say_the_same(tmp_path):
    append_jsonl(tmp_path / "a.jsonl", [record("0.mp4", caption("A dog.")), record("1.mp4", caption("A cat."))])
    published = [{"id": ["0.mp4"], "pred": "A dog."}, {"id": "1.mp4", "pred": "A cat."}]
    (tmp_path / "b.json").write_text(json.dumps(published))
    assert read_predictions(tmp_path / "a.jsonl") == read_predictions(tmp_path / "b.json")
    assert read_predictions(tmp_path / "b.json") == [Prediction("0.mp4", "A dog."), Prediction("1.mp4", "A cat.")]


def test_intervals_and_samples_are_told_apart_and_what_was_cut_off_is_known(tmp_path):
    made = [caption("a", 0, 2, 0), caption("b", 0, 2, 1, finished=False), caption("c", 2, 4, 0)]
    append_jsonl(tmp_path / "a.jsonl", [record("0.mp4", *made, every_s=2.0)])
    found = read_predictions(tmp_path / "a.jsonl")
    assert [(p.start_s, p.end_s, p.sample, p.finished) for p in found] == [
        (0, 2, 0, True),
        (0, 2, 1, False),
        (2, 4, 0, True),
    ]


def test_a_file_or_an_interval_that_failed_is_an_empty_caption_with_its_reason(tmp_path):
    failed = [{"start_s": 2, "end_s": 4, "error": "damaged"}]
    half = record("0.mp4", caption("a", 0, 2), every_s=2.0) | {"error": "1 interval", "failed": failed}
    append_jsonl(tmp_path / "a.jsonl", [half, error_record(Path("1.mp4"), "no video")])
    found = read_predictions(tmp_path / "a.jsonl")
    cut = Cut(every_s=2.0)
    assert found[1:] == [
        Prediction("0.mp4", "", 2, 4, reason="damaged", cut=cut),
        Prediction("1.mp4", "", reason="no video", cut=cut),
    ]


def test_captions_that_people_wrote_are_read_from_plain_items_and_from_the_published_test_set(tmp_path):
    turns = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": "A dog."}]
    items = [
        {"file": "0.mp4", "caption": "A dog."},
        {"video": "0.mp4", "conversations": turns, "events": ["A dog"]},
        {"id": ["0.mp4"], "pred": "A dog."},
    ]
    for item in items:
        (tmp_path / "a.json").write_text(json.dumps([item]))
        (tmp_path / "a.jsonl").write_text(json.dumps(item) + "\n")
        assert read_predictions(tmp_path / "a.json") == [Prediction("0.mp4", "A dog.")]
        assert read_predictions(tmp_path / "a.jsonl") == [Prediction("0.mp4", "A dog.")]
    (tmp_path / "a.jsonl").write_text('{"file": "0.mp4", "caption": "A dog.", "start_s": 0, "end_s": 2.5}')
    assert read_predictions(tmp_path / "a.jsonl") == [Prediction("0.mp4", "A dog.", 0, 2.5)]


@pytest.mark.parametrize(
    "item",
    [
        {"caption": "x"},
        {"file": "a", "caption": None},
        {"file": "a", "caption": "x", "start_s": 1},
        {"file": "a", "caption": "x", "start_s": 2, "end_s": 1},
        {"file": "a", "caption": "x", "start_s": "0", "end_s": "1"},
        {"video": "a", "conversations": "x"},
        {"video": "a", "conversations": [{"from": "human", "value": "x"}]},
        {"video": "a", "conversations": [{"from": "gpt", "value": "x"}] * 2},
        {"video": "a", "conversations": [{"from": "gpt", "value": 3}]},
    ],
)
def test_an_item_that_is_no_caption_is_told_with_its_place(tmp_path, item):
    (tmp_path / "a.jsonl").write_text('{"file": "b", "caption": "x"}\n' + json.dumps(item))
    with pytest.raises(KokaneeError, match="line 2 is no caption"):
        read_predictions(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "text", ["{", "3", "{}", '[{"id": ["a", "b"], "pred": "x"}]', '[{"pred": "x"}]', "[3]", '[{"id": "a"}]']
)
def test_anything_else_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(KokaneeError):
        read_predictions(tmp_path / "a.json")
    with pytest.raises(KokaneeError, match="is not there"):
        read_predictions(tmp_path / "b.json")


def test_a_name_means_the_file_whose_path_ends_alike():
    same = FileNames(["video/0.mp4", "video/1.mp4", "old/1.mp4"]).same
    assert same("0.mp4") == same("/data/video/0.mp4") == "video/0.mp4"
    assert same("/x/old/1.mp4") == "old/1.mp4"
    assert same("2.mp4") is None and same("10.mp4") is None
    with pytest.raises(KokaneeError, match=r"1\.mp4 may be video/1\.mp4 or old/1\.mp4"):
        same("1.mp4")
    assert same("0") == same("/data/video/0") == "video/0.mp4" and same("old/1") == "old/1.mp4" and same("2") is None
    with pytest.raises(KokaneeError, match=r"1 may be video/1\.mp4 or old/1\.mp4"):
        same("1")
    assert FileNames([unicodedata.normalize("NFD", "café.mp4")]).same("café.mp4") is not None
    both = FileNames(["0", "0.mp4", "notes.txt"]).same
    assert (both("0"), both("0.mp4"), both("notes")) == ("0", "0.mp4", None)
