from __future__ import annotations

import pytest

from kokanee.config import KokaneeConfig
from kokanee.errors import KokaneeError
from tiny import tiny_config


def test_the_defaults_are_the_published_seven_billion():
    config = KokaneeConfig()
    assert (config.text_config.hidden_size, config.vision_config.depth, config.audio_config.d_model) == (3584, 32, 1280)
    assert config.qformer_config.hidden_size == 3072 and config.audio_tokens_per_chunk == 60


def test_a_key_left_out_of_a_part_has_its_default():
    config = tiny_config()
    assert config.vision_config.window_size == 112
    assert config.qformer_config.cross_attention_frequency == 1
    assert config.text_config.rms_norm_eps == 1e-6


def test_a_saved_config_loads_the_same(tmp_path):
    config = tiny_config(stride_s=0.25, n_queries=2, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    loaded = KokaneeConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.audio_tokens_per_chunk == config.audio_tokens_per_chunk == 14


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_config": {"out_hidden_size": 32}}, "out_hidden_size is 32"),
        ({"qformer_config": {"encoder_hidden_size": 48}}, "d_model"),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": 300}}, "out_hidden_size|mrope"),
        ({"window_s": 5.0}, "window_s"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, reason):
    with pytest.raises(KokaneeError, match=reason):
        tiny_config(**changes)


def test_sections_that_do_not_fill_a_head_are_refused():
    text = tiny_config().text_config.to_dict() | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4]}
    }
    with pytest.raises(KokaneeError, match="must add up to 16"):
        tiny_config(text_config=text)


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"windows_s": 0.5}, "window_s"),
        ({"audio_configs": {}}, "audio_config"),
        ({"vision_config": {"depths": 2}}, "depth"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(changes, near):
    with pytest.raises(KokaneeError, match=f"Did you mean '{near}'"):
        tiny_config(**changes)
