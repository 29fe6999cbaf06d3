from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kokanee import weights
from kokanee.errors import KokaneeError
from kokanee.weights import (
    check_keys,
    empty_model,
    fill,
    fingerprint,
    finish,
    listed,
    place_of,
    placed,
    read_tensors,
    stored_shapes,
    stored_type,
    usable,
    weight_files,
)
from tiny import tiny_config, tiny_model

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64), "c": torch.zeros(())}


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_shards_are_read_like_one_file(sharded, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    save_file(TENSORS, whole / "model.safetensors")
    for folder, n_files in ((sharded, 2), (whole, 1)):
        files = weight_files(folder)
        assert len(files) == n_files
        assert stored_shapes(files) == {"a": (2, 3), "b": (4,), "c": ()}
        assert stored_type(files) == torch.float32
        found = read_tensors(files, {"a", "b", "not there"})
        assert found.keys() == {"a", "b"} and torch.equal(found["a"], TENSORS["a"])


def test_a_missing_shard_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(KokaneeError, match=r"two\.safetensors"):
        weight_files(sharded)


def test_pickles_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(KokaneeError, match=r"pytorch_model\.bin.*safetensors only.*save_pretrained"):
        weight_files(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(KokaneeError, match=r"no model\.safetensors \(found: notes\.txt\)"):
        weight_files(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0123456789")
    with pytest.raises(KokaneeError, match="no complete safetensors"):
        stored_shapes(weight_files(tmp_path))


def check(expected, stored, dropped=()):
    return check_keys(expected, stored, lambda key: key.lower(), lambda key: key in dropped, "this folder")


def test_keys_pair_off_exactly():
    assert check({"a": (1,), "b": (2,)}, {"A": (1,), "B": (2,), "Z": (9,)}, dropped=["Z"]) == {"A": "a", "B": "b"}


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"A": (1,)}, r"lacks 1 weights \(b\)"),
        ({"A": (1,), "B": (2,), "C": (1,)}, r"no place for \(C\)"),
        ({"A": (1,), "B": (3,)}, r"B is \(3,\), not \(2,\)"),
        ({"A": (1,), "a": (1,), "B": (2,)}, r"2 weights claim the same places \(A, a\)"),
        ({"C": (1,)}, r"lacks 2 weights \(a, b\); it has 1 weights"),
    ],
)
def test_a_weight_missing_left_over_or_misshapen_is_named(stored, reason):
    with pytest.raises(KokaneeError, match=reason):
        check({"a": (1,), "b": (2,)}, stored)


def test_long_lists_are_cut():
    assert listed([str(i) for i in range(8)]) == "0, 1, 2, 3, 4 and 3 more"
    assert listed([]) == "nothing"


def test_an_empty_model_takes_no_memory_and_knows_its_frequencies():
    empty, real = empty_model(tiny_config()), tiny_model()
    assert all(weight.is_meta for weight in empty.parameters())
    buffers = dict(real.named_buffers())
    assert buffers and all(torch.equal(value, buffers[name]) for name, value in empty.named_buffers())


def test_a_filled_model_is_the_model_that_was_stored(tmp_path):
    real = tiny_model()
    names = {name: name for name in real.state_dict()}
    save_file(real.state_dict(), tmp_path / "model.safetensors")
    filled = empty_model(tiny_config())
    fill(filled, weight_files(tmp_path), names, torch.float32)
    finish(filled)
    assert all(torch.equal(value, filled.state_dict()[name]) for name, value in real.state_dict().items())
    trained = {name: weight.requires_grad for name, weight in real.named_parameters()}
    assert {name: weight.requires_grad for name, weight in filled.named_parameters()} == trained


def test_a_weight_goes_where_the_longest_beginning_of_its_name_says():
    places = {"": "cpu", "visual": 0, "language_model.layers": 1, "language_model.layers.1": 2}
    assert place_of("visual.merger.ln_q.weight", places) == 0
    assert place_of("visually", places) == "cpu"
    assert place_of("language_model.layers.10.mlp", places) == 1
    assert place_of("language_model.layers.1.mlp", places) == 2
    with pytest.raises(KokaneeError, match="no place for audio"):
        place_of("audio.queries", {"visual": 0})


def test_auto_finds_a_place_for_every_weight():
    model = empty_model(tiny_config())
    places = placed(model, "auto", torch.float32)
    assert all(place_of(name, places) is not None for name, _ in model.named_parameters())
    assert placed(model, "cpu", torch.float32) == {"": torch.device("cpu")}


def test_auto_says_what_is_needed_where_the_memory_does_not_suffice(monkeypatch):
    monkeypatch.setattr(weights, "get_max_memory", lambda: {"cpu": 1000})
    with pytest.raises(KokaneeError, match=r"needs \d\.\d+ GiB in float32, .*0\.00 GiB on cpu.*bfloat16"):
        placed(empty_model(tiny_config()), "auto", torch.float32)


def test_auto_leaves_room_beside_the_weights_on_an_accelerator(monkeypatch):
    model = empty_model(tiny_config())
    size = sum(weight.numel() * 4 for weight in model.parameters())
    monkeypatch.setattr(weights, "get_max_memory", lambda: {0: int(1.05 * size), "cpu": 10 * size})
    assert "cpu" in placed(model, "auto", torch.float32).values()
    monkeypatch.setattr(weights, "get_max_memory", lambda: {0: 2 * size, "cpu": 10 * size})
    assert set(placed(model, "auto", torch.float32).values()) == {0}


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(KokaneeError, match=rf"device {device} cannot be used here \(.+\)\. Give 'auto', 'cpu'"):
        usable(device)


def test_a_fingerprint_is_that_of_the_weights():
    model = tiny_model()
    before = fingerprint(model)
    assert before == fingerprint(tiny_model()) != fingerprint(tiny_model(1))
    with torch.no_grad():
        for layer in model.language_model.layers:
            layer.self_attn.q_proj.weight += 1e-3
    assert fingerprint(model) != before
