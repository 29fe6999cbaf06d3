"""Laws of the clips on disk: equal settings give equal records, a killed run is continued, splits share nothing."""

from __future__ import annotations

import json

import av
import pytest

from kokanee.errors import KokaneeError
from kokanee.formats import read_jsonl
from kokanee.world import make as make_module
from kokanee.world.annotators import Bias
from kokanee.world.facts import Fact, exact
from kokanee.world.language import parse
from kokanee.world.make import MakeSettings, make, record, scene_of
from kokanee.world.scene import SPLITS, sample_scene

SMALL = {"size_px": 32, "fps": 4.0, "questions": 3}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_a_clip_is_written_with_a_record_of_all_that_is_true_of_it(tmp_path):
    samples = read_jsonl(make(tmp_path / "clips", 2, seed=3, split="validation", **SMALL))
    assert names_in(tmp_path / "clips") == {"00000.mp4", "00001.mp4", "samples.jsonl", "state.json"}
    for index, sample in enumerate(samples):
        scene = sample_scene("validation", index, 3)
        events = exact(scene)
        assert scene_of(sample) == scene
        assert (sample["file"], sample["split"], sample["index"], sample["seed"], sample["version"]) == (
            f"{index:05d}.mp4",
            "validation",
            index,
            3,
            1,
        )
        assert sample["duration_s"] == scene.duration_s
        assert [event["text"] for event in sample["events"]] == [event.text for event in events]
        assert set(sample["events"][0]) == {"text", "kind", "sense", "start_s", "end_s", "fact"}
        assert set(parse(sample["caption_exact"]).facts) == {event.fact for event in events}
        assert len(sample["captions_annotated"]) == 3 and len(sample["questions"]) == 3
        assert set(sample["questions"][0]) == {"question", "answer", "kind", "options"}
        with av.open(str(tmp_path / "clips" / sample["file"])) as container:
            assert container.streams.video[0].width == 32 and len(container.streams.audio) == 1
            assert container.duration / av.time_base == pytest.approx(scene.duration_s, abs=0.1)


def test_facts_survive_json(tmp_path):
    sample = json.loads(json.dumps(record(sample_scene("train", 0), 0, MakeSettings(), "00000.mp4")))
    facts = [Fact(f["kind"], tuple(f["subject"]), f["value"]) for f in (event["fact"] for event in sample["events"])]
    assert facts == [event.fact for event in exact(sample_scene("train", 0))]


def test_equal_settings_give_equal_files_and_more_clips_only_add(tmp_path):
    once = make(tmp_path / "once", 3, seed=1, **SMALL)
    twice = make(tmp_path / "twice", 1, seed=1, **SMALL)
    first = (tmp_path / "twice" / "00000.mp4").stat().st_mtime_ns
    counted = []
    assert make(tmp_path / "twice", 3, seed=1, on_clip=counted.append, **SMALL) == twice
    assert counted == [2, 3]
    assert (tmp_path / "twice" / "00000.mp4").stat().st_mtime_ns == first
    for name in names_in(tmp_path / "once"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert make(tmp_path / "once", 1, seed=1, **SMALL) == once and len(read_jsonl(once)) == 3


def test_a_run_killed_between_a_clip_and_its_record_is_continued(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole", 3, **SMALL)
    append = make_module.append_jsonl

    def killed(path, records):
        if records[0]["index"] == 1:
            with path.open("a") as file:
                file.write(json.dumps(records[0])[:100])
            raise KeyboardInterrupt
        append(path, records)

    monkeypatch.setattr(make_module, "append_jsonl", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", 3, **SMALL)
    monkeypatch.undo()
    assert make(tmp_path / "killed", 3, **SMALL).read_bytes() == whole.read_bytes()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "00000.mp4").write_text("mine")
    with pytest.raises(KokaneeError, match=r"holds other files \(such as 00000.mp4\)"):
        make(tmp_path, 1, **SMALL)
    assert names_in(tmp_path) == {"00000.mp4"} and (tmp_path / "00000.mp4").read_text() == "mine"


def test_other_settings_are_refused_and_named(tmp_path):
    make(tmp_path, 0, seed=1, **SMALL)
    with pytest.raises(KokaneeError, match="seed: 1 before, 2 now"):
        make(tmp_path, 1, seed=2, **SMALL)
    with pytest.raises(KokaneeError, match=r"bias.swapped: 0.08 before"):
        make(tmp_path, 1, seed=1, bias=Bias(swapped=0.5), **SMALL)
    assert names_in(tmp_path) == {"state.json"}


def test_a_folder_with_records_of_unknown_settings_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(KokaneeError, match=r"no state\.json"):
        make(tmp_path, 1, **SMALL)


@pytest.mark.parametrize("wrong", [{"split": "dev"}, {"size_px": 33}, {"fps": 0.0}, {"questions": -1}, {"n_clips": -1}])
def test_settings_that_cannot_be_are_refused(tmp_path, wrong):
    with pytest.raises(KokaneeError, match=r"Give|give"):
        make(tmp_path, **{"n_clips": 1, **wrong})


def test_splits_never_share_a_scene():
    sizes = {"train": 2000, "validation": 150, "test": 150}
    scenes = {split: {sample_scene(split, index).key() for index in range(sizes[split])} for split in SPLITS}
    assert all(len(scenes[split]) > 0.99 * sizes[split] for split in SPLITS)
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not scenes[a] & scenes[b]
