from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kokanee.errors import KokaneeError
from kokanee.published import DROPPED, kokanee_config, our_key, rope_parameters, salmonn2_config
from kokanee.weights import empty_model

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "salmonn2plus" / "checkpoint"
CONFIG = json.loads((CHECKPOINT / "config.json").read_text())
FIRST = GOLDEN / "salmonn2" / "checkpoint"
FIRST_CONFIG = json.loads((FIRST / "config.json").read_text())
ARGS = FIRST_CONFIG["model_args"]
PARTS = json.loads((FIRST / "submodule_configs.json").read_text())
IDS = {f"{kind}_token_id": 400 + number for number, kind in enumerate(("image", "video", "audio", "zero"))}


@pytest.mark.parametrize(
    ("folder", "config", "n_dropped"),
    [(CHECKPOINT, kokanee_config(CONFIG), 1), (FIRST, salmonn2_config(FIRST_CONFIG, ARGS, PARTS, IDS), 3)],
)
def test_every_published_weight_has_one_place_and_every_place_one_weight(folder, config, n_dropped):
    shapes = {key: tuple(value.shape) for key, value in load_file(folder / "model.safetensors").items()}
    places = {our_key(key): shape for key, shape in shapes.items() if key not in DROPPED}
    assert len(places) == len(shapes) - n_dropped
    assert places == {key: tuple(value.shape) for key, value in empty_model(config).state_dict().items()}


def test_what_the_first_papers_config_leaves_out_has_the_published_size():
    config = salmonn2_config({"mm_spatial_pool_mode": "bilinear"}, ARGS, {}, {})  # the top level is of its base
    siglip, qformer = config.vision_config, config.qformer_config
    assert (siglip.hidden_size, siglip.num_hidden_layers, siglip.image_size) == (1152, 26, 384)
    assert (config.text_config.hidden_size, config.audio_config.d_model) == (3584, 1280)
    assert (qformer.hidden_size, qformer.intermediate_size, qformer.encoder_hidden_size) == (768, 3072, 1280)


@pytest.mark.parametrize(
    "changed",
    [
        {"mm_spatial_pool_mode": "average"},
        {"mm_pooling_position": "before"},
        {"use_final_linear": False},
        {"mm_newline_position": "frame"},
    ],
)
def test_what_the_first_papers_model_is_not_built_with_is_refused(changed):
    with pytest.raises(KokaneeError, match=rf"{next(iter(changed))} = .*cannot build"):
        salmonn2_config(FIRST_CONFIG, ARGS | changed, PARTS, IDS)


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
