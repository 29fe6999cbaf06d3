from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kokanee.errors import KokaneeError
from kokanee.model import Kokanee
from kokanee.published import DROPPED, kokanee_config, our_key, rope_parameters

CHECKPOINT = Path(__file__).parent / "golden" / "salmonn2plus" / "checkpoint"
CONFIG = json.loads((CHECKPOINT / "config.json").read_text())


def test_every_published_weight_has_one_place_and_every_place_one_weight():
    shapes = {key: tuple(value.shape) for key, value in load_file(CHECKPOINT / "model.safetensors").items()}
    places = {our_key(key): shape for key, shape in shapes.items() if key not in DROPPED}
    assert len(places) == len(shapes) - len(DROPPED)
    assert places == {key: tuple(value.shape) for key, value in Kokanee(kokanee_config(CONFIG)).state_dict().items()}


@pytest.mark.parametrize(
    "key", ["model.layers", "audio.decoder.conv1.weight", "xlm_head.weight", "speech.q_tokens", ""]
)
def test_a_foreign_key_has_no_place(key):
    assert our_key(key) == ""


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_both_layouts_of_qwen_have_the_same_places(new, old):
    assert our_key(new) == our_key(old) != ""


def test_what_a_published_config_leaves_out_has_its_class_default():
    config = kokanee_config({"model_type": "qwen2_5_vl", "architectures": ["video_SALMONN2_plus"]})
    assert (config.text_config.hidden_size, config.vision_config.hidden_size, config.audio_config.d_model) == (
        3584,
        1280,
        1280,
    )
    assert (config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size) == (3072, 1280)
    assert (config.audio_token_id, config.tie_word_embeddings) == (151665, False)


@pytest.mark.parametrize(
    "kind", [{"type": "mrope"}, {"type": "default", "rope_type": "default"}, {"rope_type": "mrope"}, {}]
)
def test_every_spelling_of_the_rotary_sections_is_read(kind):
    config = {"rope_theta": 5.0, "rope_scaling": {**kind, "mrope_section": [2, 3, 3]}}
    assert rope_parameters(config) == {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"cross_attention_freq": 2}, "cross_attention_freq"), ({"encoder_width": 7}, "encoder_width")],
)
def test_an_audio_branch_that_cannot_be_built_is_refused(changes, named):
    audio = CONFIG["audio_config"]
    changed = {**CONFIG, "audio_config": {**audio, "qformer_config": {**audio["qformer_config"], **changes}}}
    with pytest.raises(KokaneeError, match=named):
        kokanee_config(changed)
