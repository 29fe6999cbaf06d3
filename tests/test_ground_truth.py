"""Laws of ground truth: three kinds of files, and each prediction is held against its own file and interval."""

from __future__ import annotations

import json

import pytest

from kokanee.errors import KokaneeError
from kokanee.events import AtomicEvent
from kokanee.formats import append_jsonl, write_json
from kokanee.ground_truth import GroundTruth, Truth, of_record, read_ground_truth, record_of
from kokanee.predictions import Cut, Prediction
from kokanee.world.facts import exact
from kokanee.world.make import MakeSettings, record
from kokanee.world.scene import sample_scene


@pytest.fixture
def world(tmp_path):
    settings = MakeSettings(0, "test")
    append_jsonl(
        tmp_path / "samples.jsonl",
        [record(sample_scene("test", index), index, settings, f"{index:05d}.mp4") for index in range(4)],
    )
    return read_ground_truth(tmp_path / "samples.jsonl")


def test_a_world_clips_events_are_exact_and_so_are_those_of_any_interval(world):
    for index in range(4):
        scene = sample_scene("test", index)
        whole = world.of(Prediction(f"clips/{index:05d}.mp4", ""))
        assert whole.facts == tuple(event.fact for event in exact(scene))
        assert [event.text for event in whole.events] == [event.text for event in exact(scene)]
        part = world.of(Prediction(f"{index:05d}.mp4", "", 1.0, 3.0))
        assert part.facts == tuple(event.fact for event in exact(scene, 1.0, 3.0))
        late = world.of(Prediction(f"{index:05d}.mp4", "", 1.0, scene.duration_s + 0.3))
        assert late.facts == tuple(event.fact for event in exact(scene, 1.0, scene.duration_s))


def test_kinds_are_the_senses_that_tell_them(world):
    kinds = {event.kind for truth in world.truths for event in truth.events}
    assert kinds <= {"seen", "heard", "both"} and "heard" in kinds


def test_the_published_test_set_is_read_as_it_is(tmp_path):
    items = [{"video": "video/0.mp4", "conversations": [], "events": ["A dog runs", "It barks"]}]
    write_json(tmp_path / "test.json", items)
    truth = read_ground_truth(tmp_path / "test.json").of(Prediction("0.mp4", "x"))
    assert truth == Truth("video/0.mp4", (AtomicEvent("A dog runs"), AtomicEvent("It barks")))


def test_own_records_hold_whole_files_and_intervals(tmp_path):
    events = [{"text": "A dog runs", "kind": "seen"}]
    records = [
        {"version": 1, "file": "a.mp4", "start_s": None, "end_s": None, "events": events},
        {"version": 1, "file": "a.mp4", "start_s": 0, "end_s": 10, "events": []},
    ]
    append_jsonl(tmp_path / "events.jsonl", records)
    found = read_ground_truth(tmp_path / "events.jsonl")
    assert {truth.file for truth in found.truths} == {"a.mp4"}
    assert found.of(Prediction("a.mp4", "")).events == (AtomicEvent("A dog runs", "seen"),)
    assert found.of(Prediction("a.mp4", "", 0.0, 10.04)).events == ()
    assert found.of(Prediction("a.mp4", "", 0.0, 9.0)) is None and found.of(Prediction("b.mp4", "")) is None


def test_a_last_interval_may_end_after_the_file(tmp_path):
    """Truths are of round times, and a run's last interval ends with its file: at 29.7 s here, or at 24."""
    found = GroundTruth([Truth("a.mp4", (), start_s, start_s + 10.0) for start_s in (0.0, 10.0, 20.0)])
    cut = Cut(every_s=10.0)
    for start_s, end_s, end in ((20.0, 29.7, 30.0), (10.0, 20.0, 20.0), (20.0, 24.0, None), (10.0, 19.7, None)):
        told = found.of(Prediction("a.mp4", "", start_s, end_s, cut=cut))
        assert (told.end_s if told else None) == end
    assert found.of(Prediction("a.mp4", "", 20.0, 29.7)) is None


def test_two_truths_of_the_same_interval_are_a_mistake_and_neither_counts_in_silence():
    whole, part = Truth("a.mp4", ()), Truth("a.mp4", (), 0.0, 10.0)
    assert GroundTruth([whole, part, Truth("b.mp4", ()), Truth("a.mp4", (), 10.0, 20.0)]).truths[:2] == [whole, part]
    with pytest.raises(KokaneeError, match=r"events of a\.mp4 twice"):
        GroundTruth([whole, part, Truth("a.mp4", (AtomicEvent("A dog runs"),))])
    with pytest.raises(KokaneeError, match=r"events of a\.mp4 from 0 to 10\.04 s twice"):
        GroundTruth([whole, part, Truth("a.mp4", (), 0.0, 10.04)])


def test_a_record_says_all_that_is_read_from_it():
    truth = Truth("a.mp4", (AtomicEvent("A dog runs", "seen"), AtomicEvent("It barks")), 0.5, 3.0, None, "0f")
    assert of_record(record_of(truth, model="m"), "") == truth


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.json", "[1]"),
        ("a.json", '[{"video": "a"}]'),
        ("a.json", '[{"video": "a", "events": [1]}]'),
        ("a.jsonl", '{"version": 1, "file": "a"}\n'),
        ("a.jsonl", '{"version": 2, "file": "a", "events": []}\n'),
        ("a.jsonl", '{"version": 1, "file": "a", "events": ["x"]}\n'),
        ("a.jsonl", '{"version": 1, "file": "a", "events": null}\n'),
        ("a.jsonl", '{"version": 1, "file": "a", "events": [{"text": " "}]}\n'),
        ("a.jsonl", '{"version": 1, "file": "a", "events": [{"text": "x", "kind": 3}]}\n'),
        ("a.jsonl", '{"version": 1, "file": 3, "events": []}\n'),
        ("a.jsonl", '{"version": 1, "file": "a", "start_s": 0, "events": []}\n'),
        ("a.jsonl", '{"version": 1, "file": "a", "start_s": 2, "end_s": 1, "events": []}\n'),
    ],
)
def test_anything_else_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(KokaneeError):
        read_ground_truth(tmp_path / name)
    with pytest.raises(KokaneeError, match="is not there"):
        read_ground_truth(tmp_path / "other.json")


def test_the_published_format_is_json_whatever_it_holds_beside(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([]))
    assert read_ground_truth(tmp_path / "a.json").truths == [] and GroundTruth([]).of(Prediction("a", "")) is None


def test_a_folder_of_the_world_is_its_clips_and_what_is_no_json_is_told_as_that(tmp_path, world):
    assert read_ground_truth(tmp_path).truths == world.truths
    (tmp_path / "broken.json").write_text('[{"video": "0.mp4", "events": [}]')
    with pytest.raises(KokaneeError, match=r"broken\.json is not JSON \(Expecting value.*Mend it"):
        read_ground_truth(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('[{"video": "0.mp4"}]')
    with pytest.raises(KokaneeError, match=r"is not like the published test set.*Give such a list"):
        read_ground_truth(tmp_path / "other.json")
