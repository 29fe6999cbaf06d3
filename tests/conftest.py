"""A model small enough for tests: two layers, 32 wide, 48-pixel frames, 4-second chunks of sound."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml

TINY = {
    "model": {
        "text_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0, 1],
            "window_size": 48,
        },
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 32,
            "max_source_positions": 200,
        },
        "qformer_config": {
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        },
    },
    "processor": {
        "rule": "salmonn2plus",
        "interval_s": 0.25,
        "min_frames": 4,
        "max_frames": 240,
        "patch_size": 8,
        "merge_size": 2,
        "min_pixels": 2304,
        "max_pixels": 2304,
        "min_frame_pixels": 2304,
        "max_frame_pixels": 2304,
        "spread_pixels": False,
        "n_mels": 32,
        "chunk_s": 4,
        "system_prompt": "",
    },
    "tokenizer": {"vocab_size": 320, "captions": 30},
    "seed": 0,
}


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums on one thread are the same every time, and small models are no faster on more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory) -> Path:
    """A file with the sizes of the tiny model."""
    path = tmp_path_factory.mktemp("tiny") / "model.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def tiny(tiny_yaml):
    """The tiny model and its processor, shared by all tests: not to be changed."""
    from kokanee.stages import fresh_model

    model, processor = fresh_model(tiny_yaml)
    return model.eval(), processor


@pytest.fixture
def tiny_model(tiny):
    """A copy of the tiny model that a test may change."""
    return copy.deepcopy(tiny[0])


@pytest.fixture(scope="session")
def tiny_processor(tiny):
    return tiny[1]


@pytest.fixture(scope="session")
def tiny_stores(tiny, tmp_path_factory) -> dict[str, str]:
    """Folders with the tiny model's features of six training clips, half of them cut, and three validation clips."""
    from kokanee.features import fill_store

    folder = tmp_path_factory.mktemp("features")
    fill_store(*tiny, folder / "train", "train", 6, seed=0, share_cut=0.5)
    fill_store(*tiny, folder / "validation", "validation", 3, seed=0, share_cut=0.0)
    return {"train": str(folder / "train"), "validation": str(folder / "validation")}


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny, tmp_path_factory) -> Path:
    """The tiny model as a folder, with a question and a length of its own."""
    from kokanee.checkpoints import save
    from kokanee.defaults import Defaults

    folder = save(*tiny, tmp_path_factory.mktemp("checkpoint") / "tiny")
    Defaults("Describe the video.", 12).save(folder)
    return folder


@pytest.fixture(scope="session")
def salmonn2_checkpoint(tmp_path_factory) -> Path:
    """A tiny video-SALMONN 2 of the first paper as a folder."""
    from kokanee.checkpoints import save
    from tiny import salmonn2_model, salmonn2_processor

    return save(salmonn2_model(), salmonn2_processor(), tmp_path_factory.mktemp("checkpoint") / "first")


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """A folder with first.mp4 (5 s), second.mp4 (3 s), silent.mp4 (2 s), sound.wav (2.5 s) and still.png."""
    from PIL import Image

    from media_files import encode, moving_frames, tones

    folder = tmp_path_factory.mktemp("media")
    encode(folder / "first.mp4", moving_frames(60), fps=12, sound=tones(5.0))
    encode(folder / "second.mp4", moving_frames(36, seed=1), fps=12, sound=tones(3.0))
    encode(folder / "silent.mp4", moving_frames(24, seed=2), fps=12)
    encode(folder / "sound.wav", sound=tones(2.5), sound_codec="pcm_s16le")
    Image.fromarray(moving_frames(1, seed=3)[0]).save(folder / "still.png")
    return folder
