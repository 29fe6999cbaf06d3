"""Laws of the stores: what they hold is what the encoders make of a file, whoever wrote which part and when."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kokanee import features as features_module
from kokanee.errors import KokaneeError
from kokanee.features import FPS, Stretch, encode, fill_store, read_store, shard_path, stretch_of
from kokanee.processor import RATE_HZ, Turn
from kokanee.world.render import frames
from kokanee.world.scene import sample_scene
from kokanee.world.sound import waveform


@pytest.fixture
def two_a_shard(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 2)


def fill(tiny, folder, clips=5, **changed):
    settings = {"split": "train", "clips": clips, "seed": 0, "share_cut": 0.5, **changed}
    fill_store(*tiny, folder, **settings)


def same(one, other) -> bool:
    tensors = torch.equal(one.video_ND, other.video_ND) and torch.equal(one.audio_CSD, other.audio_CSD)
    return tensors and (one.stretch, one.grid_thw, one.step_s) == (other.stretch, other.grid_thw, other.step_s)


@pytest.mark.parametrize("cut", [0.0, 1.0])
def test_features_are_those_of_a_clip_with_the_same_frames_prepared_for_the_model(tiny, cut):
    model, processor = tiny
    for index in (0, 1):
        scene, stretch = stretch_of("train", index, 0, cut)
        found = encode(model, processor, scene, stretch)
        times_s = stretch.start_s + np.arange(round((stretch.end_s - stretch.start_s) * FPS)) / FPS
        sound = waveform(scene)[round(stretch.start_s * RATE_HZ) : round(stretch.end_s * RATE_HZ)]
        clip = processor.make_clip(frames(scene, times_s, 48), FPS, sound)
        sample = processor.prepare(clip, [Turn("user", "Describe the video.")])
        with torch.no_grad():
            video_ND = model.encode_video(sample["pixel_values_videos"], sample["video_grid_thw"])
            audio_CSD = model.audio.encode(sample["input_features"])
        assert found.step_s == clip.step_s and [list(found.grid_thw)] == sample["video_grid_thw"].tolist()
        assert torch.equal(found.video_ND, video_ND.half()) and torch.equal(found.audio_CSD, audio_CSD.half())


def test_stretches_are_whole_scenes_or_pieces_of_two_seconds_and_more_on_the_grid():
    for index in range(60):
        scene, whole = stretch_of("train", index, 0, 0.0)
        assert scene == sample_scene("train", index) and whole == Stretch(index, 0.0, scene.duration_s)
        _, piece = stretch_of("train", index, 0, 1.0)
        assert 0.0 <= piece.start_s < piece.end_s <= scene.duration_s
        assert piece == whole or 2.0 <= piece.end_s - piece.start_s < scene.duration_s
        for part in (*scene.actions, *scene.sounds):
            assert (
                part.end_s <= piece.start_s
                or part.start_s >= piece.end_s
                or (piece.start_s <= part.start_s and part.end_s <= piece.end_s)
            )
        assert (2 * piece.start_s).is_integer() and (2 * piece.end_s).is_integer()
        assert stretch_of("train", index, 0, 1.0)[1] == piece
    cut = sum(
        stretch_of("train", index, 0, 0.3)[1].end_s < sample_scene("train", index).duration_s for index in range(60)
    )
    assert 6 < cut < 32


def test_what_is_read_is_what_was_encoded(tiny, tmp_path, two_a_shard):
    model, processor = tiny
    fill(tiny, tmp_path, clips=3)
    found = read_store(tmp_path, tiny[0], "train", 0)
    assert [clip.stretch.index for clip in found] == [0, 1, 2]
    for clip in found:
        assert same(clip, encode(model, processor, *stretch_of("train", clip.stretch.index, 0, 0.5)))


def test_a_store_goes_on_where_it_stopped(tiny, tmp_path, two_a_shard):
    fill(tiny, tmp_path / "whole")

    def stop(done: int, clips: int) -> None:
        assert (done, clips) == (2, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tiny, tmp_path / "parts", report=stop)
    written = shard_path(tmp_path / "parts", 0).stat().st_mtime_ns
    reports = []
    fill(tiny, tmp_path / "parts", report=lambda done, clips: reports.append(done))
    assert reports == [2, 4, 5] and shard_path(tmp_path / "parts", 0).stat().st_mtime_ns == written
    for name in ("shard-00000", "shard-00001", "shard-00002"):
        files = [(tmp_path / folder / f"{name}.safetensors").read_bytes() for folder in ("whole", "parts")]
        assert files[0] == files[1]


def test_parts_cover_everything_once(tiny, tmp_path, two_a_shard):
    fill(tiny, tmp_path / "whole")
    fill(tiny, tmp_path / "parts", part=(1, 2))
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"shard-00001.safetensors", "state.json"}
    fill(tiny, tmp_path / "parts", part=(0, 2))
    whole, parts = (read_store(tmp_path / name, tiny[0], "train", 0) for name in ("whole", "parts"))
    assert len(whole) == len(parts) == 5 and all(map(same, whole, parts))


def test_a_store_of_other_encoders_or_settings_is_refused(tiny, tiny_model, tmp_path, two_a_shard):
    fill(tiny, tmp_path, clips=1)
    with pytest.raises(KokaneeError, match=r"other features.*seed: 0 before, 1 now"):
        fill(tiny, tmp_path, clips=1, seed=1)
    with torch.no_grad():
        tiny_model.audio.encoder.conv1.bias[0] += 1e-3
    with pytest.raises(KokaneeError, match="encoders: "):
        fill((tiny_model, tiny[1]), tmp_path, clips=1)


def test_features_of_other_encoders_or_clips_are_not_read(tiny, tiny_model, tmp_path, two_a_shard):
    fill(tiny, tmp_path, clips=1)
    with pytest.raises(KokaneeError, match="split: 'train' before, 'validation' now"):
        read_store(tmp_path, tiny[0], "validation", 0)
    with pytest.raises(KokaneeError, match="seed: 0 before, 1 now"):
        read_store(tmp_path, tiny[0], "train", 1)
    with torch.no_grad():
        tiny_model.visual.merger.mlp[-1].bias[0] += 1e-3
    with pytest.raises(KokaneeError, match="encoders: "):
        read_store(tmp_path, tiny_model, "train", 0)


def test_a_folder_with_other_files_is_left_alone(tiny, tmp_path, two_a_shard):
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(KokaneeError, match=r"holds other files.*holiday"):
        fill(tiny, tmp_path, clips=1)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]


def test_weights_behind_the_encoders_do_not_matter(tiny, tiny_model, tmp_path, two_a_shard):
    fill(tiny, tmp_path, clips=1)
    with torch.no_grad():
        tiny_model.lm_head.weight += 1.0
        tiny_model.audio.projection.weight += 1.0
    fill((tiny_model, tiny[1]), tmp_path, clips=1)


def test_a_store_that_is_missing_or_unfinished_is_not_read(tiny, tmp_path, two_a_shard):
    with pytest.raises(KokaneeError, match="holds no features"):
        read_store(tmp_path / "nowhere", tiny[0], "train", 0)
    fill(tiny, tmp_path, part=(0, 2))
    with pytest.raises(KokaneeError, match=r"unfinished: 1 of 3 shards.*shard-00001"):
        read_store(tmp_path, tiny[0], "train", 0)
    assert json.loads((tmp_path / "state.json").read_text())["clips"] == 5


def test_a_store_grows_and_is_the_one_that_was_made_at_once(tiny, tmp_path, two_a_shard):
    fill(tiny, tmp_path / "grown", clips=3)
    fill(tiny, tmp_path / "grown", clips=6, part=(0, 2))
    with pytest.raises(KokaneeError, match=r"unfinished: 1 of 3 shards.*shard-00001"):
        read_store(tmp_path / "grown", tiny[0], "train", 0)
    fill(tiny, tmp_path / "grown", clips=6, part=(1, 2))
    fill(tiny, tmp_path / "whole", clips=6)
    grown, whole = (read_store(tmp_path / name, tiny[0], "train", 0) for name in ("grown", "whole"))
    assert len(grown) == len(whole) == 6 and all(map(same, grown, whole))
    with pytest.raises(KokaneeError, match="clips: 6 before, 3 now"):
        fill(tiny, tmp_path / "grown", clips=3)
