"""Golden data: sizes, mel features and token counts made once by the published code of video-SALMONN 2+ (61faec0)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kokanee.errors import KokaneeError
from kokanee.layout import Block
from kokanee.media import Clip, write_clip
from kokanee.processor import CONFIG_FILE, Processor, ProcessorConfig
from kokanee.prompt import IGNORED, Turn
from kokanee.tokenizer import build_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "salmonn2plus"
SIZING = json.loads((GOLDEN / "sizing.json").read_text())
MEL = load_file(GOLDEN / "pixels_and_mel.safetensors")
NANO = {
    "interval_s": 0.25,
    "min_frames": 2,
    "max_frames": 32,
    "merge_size": 4,
    "min_frame_pixels": 56 * 56,
    "max_frame_pixels": 112 * 112,
    "spread_pixels": False,
    "n_mels": 64,
    "chunk_s": 8,
}
QUESTION = [Turn("user", "what happens ?")]
LEARNT = [*QUESTION, Turn("assistant", "a dog barks twice .")]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def nano() -> Processor:
    return Processor(build_tokenizer(["a dog barks twice .", "what happens ?"], 300), ProcessorConfig(**NANO))


def frames(n_frames: int, height: int = 112, width: int = 112, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n_frames, height, width, 3), dtype=np.uint8))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


def clip(pictures: list[np.ndarray] | None = None, waveform: np.ndarray | None = None, step_s: float = 0.5) -> Clip:
    times_s = np.arange(len(pictures or [])) * step_s / 2
    return Clip(pictures, times_s, step_s if pictures else None, waveform, duration_s=4.0, start_s=0.0, source="made")


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("case", SIZING["video_sizing"])
def test_video_sizes_are_the_published_ones_or_keep_to_the_limits_where_that_code_fails(processor, case):
    config = ProcessorConfig(
        min_frames=1,
        max_frames=case["video_max_frames"],
        min_frame_pixels=case["video_min_frame_pixels"],
        max_frame_pixels=case["video_max_frame_pixels"],
    )
    sizer = Processor(processor.tokenizer, config)
    if case["width"] > 200 * case["height"]:
        with pytest.raises(KokaneeError, match="200"):
            sizer.frame_size(case["height"], case["width"], case["n_frames"])
        return
    height, width = sizer.frame_size(case["height"], case["width"], case["n_frames"])
    if "raises" in case:
        assert height == 28 and width % 28 == 0 and height * width <= 95 * case["video_max_frame_pixels"]
    else:
        assert [-(-case["n_frames"] // 2), height // 14, width // 14] == case["grid_thw"]


def test_without_spreading_every_clip_has_the_same_limit(nano):
    assert nano.frame_size(224, 448, 2) == nano.frame_size(224, 448, 32) == (56, 112)


@pytest.mark.parametrize("case", SIZING["audio_token_counts"])
def test_audio_token_counts_are_the_published_ones(processor, case):
    assert processor.n_audio_tokens(case["samples"]) == case["audio_tokens"]


def test_mel_features_are_the_published_ones(processor):
    features = processor.features(MEL["wave.mid"].numpy().astype(np.float32) / 32768)
    assert features.shape == (1, 128, 3000) and features.dtype == torch.float32
    difference = features[:, :, ::25] - MEL["features.mid"].float()
    assert difference.abs().max() <= 5e-4  # the golden features are stored in float16


def test_every_chunk_of_sound_is_padded_and_normalised_on_its_own(nano):
    waveform = np.concatenate([noise(8), noise(3, seed=1) / 100])
    features = nano.features(waveform)
    assert features.shape == (2, 64, 800)
    assert torch.equal(features[1:], nano.features(waveform[8 * 16000 :]))
    assert nano.n_audio_tokens(len(waveform)) == 2 * 16


def test_sound_shorter_than_a_second_and_none_at_all_fill_one_chunk(nano):
    short = noise(0.4)
    assert torch.equal(nano.features(short), nano.features(np.pad(short, (0, 9600))))
    assert nano.features(np.zeros(0, dtype=np.float32)).shape == (1, 64, 800)


def test_a_video_with_sound_holds_pixels_mel_and_as_many_placeholders(nano):
    sample = nano.prepare(clip(frames(7), noise(9)), LEARNT)
    assert {key: tuple(value.shape) for key, value in sample.items() if "ids" not in key and key != "labels"} == {
        "pixel_values_videos": (4 * 8 * 8, 3 * 2 * 14 * 14),
        "video_grid_thw": (1, 3),
        "input_features": (2, 64, 800),
    }
    ids = sample["input_ids"].tolist()
    assert (ids.count(nano.rules.video_id), ids.count(nano.rules.audio_id)) == (4 * 2 * 2, 32)
    assert sample["position_ids"].shape == (3, len(ids)) and len(sample["labels"]) == len(ids)


def test_sizes_alone_give_the_ids_of_the_whole_sample(nano):
    whole = nano.prepare(clip(frames(7), noise(9)), LEARNT)
    ids = nano.prepare_ids(LEARNT, [Block("video", (4, 8, 8), 0.5, 32)])
    assert_equal(ids, {key: whole[key] for key in ids})


@pytest.mark.parametrize(
    ("medium", "keys", "counts"),
    [
        (clip(frames(4)), {"pixel_values_videos", "video_grid_thw"}, {"video": 8, "audio": 0, "image": 0}),
        (clip(None, noise(2)), {"input_features"}, {"video": 0, "audio": 16, "image": 0}),
        (frames(1)[0], {"pixel_values", "image_grid_thw"}, {"video": 0, "audio": 0, "image": 4}),
        (None, set(), {"video": 0, "audio": 0, "image": 0}),
    ],
    ids=["video only", "sound only", "image", "text only"],
)
def test_each_medium_works_alone(nano, medium, keys, counts):
    sample = nano.prepare(medium, LEARNT)
    assert set(sample) == {"input_ids", "labels", "position_ids"} | keys
    ids = sample["input_ids"].tolist()
    assert {kind: ids.count(getattr(nano.rules, f"{kind}_id")) for kind in counts} == counts


def test_no_media_is_text_alone(nano):
    assert_equal(nano.prepare([], LEARNT), nano.prepare(None, LEARNT))


def test_media_tensors_are_in_the_order_of_their_places(nano):
    picture, sound = clip(frames(4), noise(3, seed=1)), clip(None, noise(9))
    turns = [Turn("user", "first or second ?", slots=((0, "video"), (5, "audio")))]
    sample = nano.prepare([sound, picture], turns)
    expected = torch.cat([nano.features(picture.waveform), nano.features(sound.waveform)])
    assert torch.equal(sample["input_features"], expected)


def test_a_clip_made_of_frames_is_the_clip_read_from_their_file(nano, tmp_path):
    pictures, sound = frames(24, 160, 240), noise(2)
    read = nano.read(write_clip(tmp_path / "clip.mp4", pictures, 12, sound))
    made = nano.make_clip(pictures, 12, sound)
    assert [frame.shape for frame in made.frames] == [frame.shape for frame in read.frames]
    assert made.times_s.tolist() == read.times_s.tolist() and made.step_s == read.step_s


def test_a_file_is_read_with_its_frames_resized(nano, tmp_path):
    written = write_clip(tmp_path / "clip.mp4", frames(24, 160, 240), 12, noise(2))
    read = nano.read(written)
    assert len(read.frames) == 8 and {frame.shape for frame in read.frames} == {(56, 112, 3)}
    sample = nano.prepare(read, QUESTION)
    assert sample["video_grid_thw"].tolist() == [[4, 4, 8]] and sample["input_features"].shape == (1, 64, 800)
    assert "input_features" not in nano.prepare(nano.read(written, use=("video",)), QUESTION)
    assert "pixel_values_videos" not in nano.prepare(nano.read(written, use=("audio",)), QUESTION)
    assert len(nano.read(written, start_s=0.5, end_s=1.5).frames) == 4


def test_right_padding_keeps_every_sample_and_marks_the_rest(nano):
    samples = [nano.prepare(clip(frames(4), noise(3)), LEARNT), nano.prepare(None, LEARNT)]
    batch = nano.collate(samples)
    for row, sample in enumerate(samples):
        n_tokens = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][row, :n_tokens], sample["input_ids"])
        assert torch.equal(batch["position_ids"][:, row, :n_tokens], sample["position_ids"])
        assert torch.equal(batch["labels"][row, :n_tokens], sample["labels"])
        assert batch["attention_mask"][row].tolist() == [1] * n_tokens + [0] * (batch["labels"].shape[1] - n_tokens)
        assert set(batch["input_ids"][row, n_tokens:].tolist()) <= {nano.pad_id}
        assert set(batch["labels"][row, n_tokens:].tolist()) <= {IGNORED}
        assert set(batch["position_ids"][:, row, n_tokens:].flatten().tolist()) <= {1}


def test_left_padding_is_right_padding_moved_over(nano):
    samples = [nano.prepare(None, QUESTION), nano.prepare(clip(frames(4)), QUESTION)]
    right, left = nano.collate(samples), nano.collate(samples, padding_side="left")
    for row, sample in enumerate(samples):
        shift = right["input_ids"].shape[1] - len(sample["input_ids"])
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(left[key][row], right[key][row].roll(shift))
        assert torch.equal(left["position_ids"][:, row], right["position_ids"][:, row].roll(shift, dims=-1))


def test_batches_of_mixed_media_hold_them_in_the_order_of_the_samples(nano):
    media = [clip(None, noise(9)), frames(1)[0], clip(frames(4), noise(1)), None, clip(frames(6)), frames(1, seed=2)[0]]
    samples = [nano.prepare(medium, LEARNT) for medium in media]
    batch = nano.collate(samples)
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "input_features"):
        assert torch.equal(batch[key], torch.cat([sample[key] for sample in samples if key in sample]))
    for kind, per_grid in (("video", batch["video_grid_thw"]), ("image", batch["image_grid_thw"])):
        n_tokens = (batch["input_ids"] == getattr(nano.rules, f"{kind}_id")).sum()
        assert n_tokens == (per_grid.prod(dim=1) // 16).sum()
    assert (batch["input_ids"] == nano.rules.audio_id).sum() == 16 * len(batch["input_features"])


def test_stored_encoder_outputs_are_batched_like_other_media(nano):
    samples = [nano.prepare(None, LEARNT) | {"video_embeds": torch.full((2, 3), float(i))} for i in range(2)]
    assert nano.collate(samples)["video_embeds"][:, 0].tolist() == [0, 0, 1, 1]


def test_a_saved_processor_loads_the_same(nano, tmp_path):
    nano.save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    assert loaded.config == nano.config
    assert_equal(loaded.prepare_ids(LEARNT), nano.prepare_ids(LEARNT))
    assert Processor.from_pretrained(tmp_path, max_frames=5).config.max_frames == 5


def test_the_authors_folder_gets_the_published_settings(tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(GOLDEN / "tokenizer", folder)
    theirs = {
        "patch_size": 7,
        "merge_size": 4,
        "image_mean": [0.1, 0.2, 0.3],
        "max_pixels": 12845056,
        "do_resize": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(theirs))
    config = Processor.from_pretrained(folder).config
    expected = {"patch_size": 7, "merge_size": 4, "pixel_mean": (0.1, 0.2, 0.3)}
    assert config == ProcessorConfig(**expected)
    sampling = config.sampling
    assert (sampling.rule, sampling.interval_s, sampling.max_frames) == ("salmonn2plus", 0.1, 768)
    assert config.max_frame_pixels == 61250


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_frame": 3}, "did you mean 'max_frames'"),
        ({"min_frames": 900}, "more than max_frames"),
        ({"min_frame_pixels": 100000}, "more than max_frame_pixels"),
        ({"window_s": 0.7}, "no multiple"),
        ({"interval_s": 0}, "interval_s"),
        ({"positions": "other"}, "positions"),
    ],
)
def test_wrong_settings_are_refused_with_their_reason(settings, reason):
    with pytest.raises(KokaneeError, match=reason):
        ProcessorConfig(**settings)


def test_folders_that_hold_no_processor_are_refused(tmp_path):
    with pytest.raises(KokaneeError, match="no folder"):
        Processor.from_pretrained(tmp_path / "missing")
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "broken")
    (tmp_path / "broken" / CONFIG_FILE).write_text("{")
    with pytest.raises(KokaneeError, match="not readable JSON"):
        Processor.from_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / CONFIG_FILE).write_text("[]")
    with pytest.raises(KokaneeError, match="a list"):
        Processor.from_pretrained(tmp_path / "broken")


def test_a_tokenizer_without_the_audio_token_is_refused(processor):
    with pytest.raises(KokaneeError, match="sound_pad"):
        Processor(processor.tokenizer, ProcessorConfig(audio_token="<|sound_pad|>"))


@pytest.mark.parametrize(
    ("medium", "reason"),
    [
        (clip(), "neither frames nor sound"),
        ("clip.mp4", "str is no medium"),
        (np.zeros((3, 10, 10), dtype=np.uint8), r"shape \(3, 10, 10\) and type uint8 is not an RGB picture"),
        (np.zeros((10, 10, 3), dtype=np.float32), "type float32 is not an RGB picture"),
        (clip(None, np.zeros((2, 16000), dtype=np.float32)), r"shape \(2, 16000\) is not mono"),
        (clip([*frames(2), *frames(1, 56, 112)]), "all must have one size"),
        (clip(frames(2, 100, 112)), "112 x 100 pixels do not divide into patches"),
    ],
    ids=["empty clip", "path", "channels first", "float", "stereo", "several sizes", "not resized"],
)
def test_media_that_cannot_be_prepared_are_refused(nano, medium, reason):
    with pytest.raises(KokaneeError, match=reason):
        nano.prepare(medium, QUESTION)


def test_an_empty_batch_is_refused(nano):
    with pytest.raises(KokaneeError, match="at least one sample"):
        nano.collate([])
