from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from kokanee import checkpoints
from kokanee.adapters import load_adapter, merge
from kokanee.errors import KokaneeError
from kokanee.model import Kokanee
from kokanee.published import kokanee_config
from tiny import tiny_model

GOLDEN = Path(__file__).parent / "golden" / "salmonn2plus"
FILE = "adapter_model.safetensors"


def published() -> Kokanee:
    torch.manual_seed(0)
    return Kokanee(kokanee_config(json.loads((GOLDEN / "checkpoint" / "config.json").read_text()))).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """The authors' adapter, to be changed."""
    copied = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "gdpo" / "adapter", copied)
    return copied


def rewrite(folder: Path, change) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE)


def configure(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_whole_modules(folder: Path, model: Kokanee) -> dict[str, torch.Tensor]:
    """Add merger, Q-Former and projection to the adapter as the published recipe stores them; gives their weights."""
    stored = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    parts = ("visual.merger.", "audio.qformer.", "audio.audio_proj.")
    new = {key: torch.randn(tensor.shape) for key, tensor in stored.items() if key.startswith(parts)}
    new |= {key: stored[key] for key in stored if key.endswith("position_ids")}  # a buffer: peft keeps these too
    rewrite(folder, lambda tensors: tensors | {f"base_model.model.{key}": tensor for key, tensor in new.items()})
    return new


def test_an_adapter_changes_only_what_it_adapts_and_can_be_switched_off(folder):
    model = published()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = merge(load_adapter(model, folder)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {
        f"language_model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qkv"
    }


def test_the_merged_weight_is_the_weight_plus_the_scaled_product(folder):
    model, tensors = published(), load_file(folder / FILE)
    weight = model.language_model.layers[1].self_attn.v_proj.weight.detach().clone()
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    expected = weight + 2.0 * tensors[name.format("B")] @ tensors[name.format("A")]
    merged = merge(load_adapter(model, folder))
    assert torch.allclose(merged.language_model.layers[1].self_attn.v_proj.weight, expected, atol=1e-6)


def test_modules_that_were_trained_whole_come_with_the_adapter(folder):
    model = published()
    new = with_whole_modules(folder, model)
    merged = merge(load_adapter(model, folder))
    assert torch.equal(merged.audio.projection.weight, new["audio.audio_proj.weight"])
    assert torch.equal(merged.visual.merger.mlp[2].bias, new["visual.merger.mlp.2.bias"])
    key = "audio.qformer.bert.encoder.layer.1.crossattention.self.key.weight"
    assert torch.equal(merged.audio.qformer.encoder.layer[1].crossattention.attention.key.weight, new[key])
    assert torch.equal(merged.audio.qformer.layernorm.weight, new["audio.qformer.bert.embeddings.LayerNorm.weight"])


def test_an_adapter_saved_from_kokanee_loads_the_same(tmp_path):
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["visual.merger"]
    )
    adapted = get_peft_model(tiny_model(), config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data.normal_()
    adapted.save_pretrained(tmp_path)
    loaded = merge(load_adapter(tiny_model(), tmp_path)).state_dict()
    expected = merge(adapted).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_is_trained_further_only_if_asked(folder, trained):
    with_whole_modules(folder, published())
    adapted = load_adapter(published(), folder, trained=trained)
    found = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert bool(found) == trained
    assert all("lora_" in name or "modules_to_save" in name for name in found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), "lacks"),
        (lambda tensors: tensors | {"base_model.model.model.norm.weight": torch.ones(64)}, "no place for"),
        (lambda tensors: {key: tensor[:, :-1].clone() for key, tensor in tensors.items()}, "of another shape"),
        (lambda tensors: {key.replace("layers.1", "layers.7"): tensor for key, tensor in tensors.items()}, "has not"),
        (lambda tensors: {key.replace("q_proj", "audio"): tensor for key, tensor in tensors.items()}, "has not"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_model_alone(folder, change, reason):
    model = published()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rewrite(folder, change)
    with pytest.raises(KokaneeError, match=reason):
        load_adapter(model, folder)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_of_another_kind_is_refused(folder):
    configure(folder, peft_type="IA3")
    with pytest.raises(KokaneeError, match="IA3"):
        load_adapter(published(), folder)


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_16", "olora", "corda", "loftq"])
def test_an_adapter_of_a_changed_base_is_refused(folder, way):
    configure(folder, init_lora_weights=way)
    with pytest.raises(KokaneeError, match=f"begun with '{way}', which changes the base"):
        load_adapter(published(), folder)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj", "^model.layers.1.self_attn.v_proj", "v_proj"])
def test_values_of_single_modules_go_to_the_modules_of_these_names(folder, name):
    configure(folder, alpha_pattern={name: 16})
    model, tensors = published(), load_file(folder / FILE)
    weight = model.language_model.layers[1].self_attn.v_proj.weight.detach().clone()
    lora = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    expected = weight + 16 / 4 * tensors[lora.format("B")] @ tensors[lora.format("A")]
    merged = merge(load_adapter(model, folder))
    assert torch.allclose(merged.language_model.layers[1].self_attn.v_proj.weight, expected, atol=1e-6)


def test_a_module_may_have_a_rank_of_its_own(folder):
    name = "model.layers.1.self_attn.v_proj"
    parts = {f"base_model.model.{name}.lora_A.weight": slice(2), f"base_model.model.{name}.lora_B.weight": slice(None)}
    rewrite(folder, lambda tensors: tensors | {key: tensors[key][rows].clone() for key, rows in parts.items()})
    rewrite(folder, lambda tensors: tensors | {key: tensors[key][:, :2].clone() for key in parts if "lora_B" in key})
    configure(folder, rank_pattern={name: 2})
    adapted = load_adapter(published(), folder)
    attention = adapted.get_submodule("base_model.model.language_model.layers.1.self_attn")
    assert attention.v_proj.r == {"default": 2} and attention.q_proj.r == {"default": 4}


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_a_value_for_a_module_that_is_not_adapted_is_refused(folder, field):
    configure(folder, **{field: {"model.layers.7.self_attn.v_proj": 16}})
    with pytest.raises(KokaneeError, match=rf"{field} names modules that are not adapted \(language_model\.layers\.7"):
        load_adapter(published(), folder)


def test_a_pickled_adapter_is_refused(folder):
    (folder / FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(KokaneeError, match="pickle"):
        load_adapter(published(), folder)


def test_a_broken_adapter_is_not_merged(folder):
    rewrite(folder, lambda tensors: {key: tensor * float("nan") for key, tensor in tensors.items()})
    with pytest.raises(KokaneeError, match="cannot be merged"):
        merge(load_adapter(published(), folder))


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(KokaneeError, match=r"adapter_config\.json is missing"):
        checkpoints.load_adapter(published(), tmp_path)
