from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from kokanee import checkpoints
from kokanee.errors import KokaneeError
from tiny import tiny_model, tiny_processor, tiny_sample

GOLDEN = Path(__file__).parent / "golden" / "salmonn2plus"
WEIGHTS = "model.safetensors"
ADAPTER = GOLDEN / "gdpo" / "adapter"


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A checkpoint in the authors' layout."""
    folder = tmp_path / "theirs"
    shutil.copytree(GOLDEN / "checkpoint", folder)
    shutil.copytree(GOLDEN / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def own(tmp_path) -> Path:
    return checkpoints.save(tiny_model(), tiny_processor(), tmp_path / "own")


def rewrite(folder: Path, change) -> None:
    """Change the stored weights (a dict of tensors) in place."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


def configure(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(left, right) -> None:
    ours, others = left.state_dict(), right.state_dict()
    assert ours.keys() == others.keys() and all(torch.equal(ours[key], others[key]) for key in ours)


def test_what_is_saved_loads_the_same(own):
    model, processor = checkpoints.load(own)
    assert_same(model, tiny_model())
    assert processor.config == tiny_processor().config and not model.training
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    assert {path.name for path in own.iterdir()} >= {"config.json", WEIGHTS, "processor.json", "tokenizer.json"}


def test_a_converted_checkpoint_is_the_published_one(theirs, tmp_path):
    published, _ = checkpoints.load(theirs)
    converted, processor = checkpoints.load(checkpoints.convert(theirs, tmp_path / "converted"))
    assert_same(published, converted)
    assert published.dtype == converted.dtype == torch.bfloat16
    assert converted.generation_config.eos_token_id == [402, 400] and processor.config.merge_size == 2


def test_the_type_is_the_stored_one_unless_another_is_asked_for(own):
    stored, _ = checkpoints.load(own)
    small, _ = checkpoints.load(own, dtype="bfloat16")
    assert (stored.dtype, small.dtype, small.config.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in small.parameters())
    assert small.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert_same(small, tiny_model().to(torch.bfloat16))
    with pytest.raises(KokaneeError, match="float17"):
        checkpoints.load(own, dtype="float17")


@pytest.mark.parametrize("device", ["cpu", "auto", {"": "cpu", "visual": "cpu"}], ids=str)
def test_the_model_is_the_same_wherever_its_parts_are_placed(own, device):
    model, processor = checkpoints.load(own, device=device)
    assert_same(model, tiny_model())
    batch = processor.collate([tiny_sample("av")])
    batch.pop("labels")
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert model.generate(**batch, **settings).tolist() == tiny_model().generate(**batch, **settings).tolist()


def test_settings_of_the_processor_can_be_replaced(own):
    assert checkpoints.load(own, max_frames=4)[1].config.max_frames == 4


def test_shards_load_like_one_file(own):
    tensors = load_file(own / WEIGHTS)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, own / f"part-{number}.safetensors")
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (own / WEIGHTS).unlink()
    assert_same(checkpoints.load(own)[0], tiny_model())


@pytest.mark.parametrize("layout", ["own", "theirs"])
def test_a_missing_weight_is_an_error_that_names_it(layout, request):
    folder = request.getfixturevalue(layout)
    rewrite(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith("conv1.bias")})
    with pytest.raises(KokaneeError, match=r"lacks 1 weights \(audio\.encoder\.conv1\.bias\)"):
        checkpoints.load(folder)


@pytest.mark.parametrize("layout", ["own", "theirs"])
def test_a_weight_without_a_place_is_an_error_that_names_it(layout, request):
    folder = request.getfixturevalue(layout)
    rewrite(folder, lambda tensors: tensors | {"visual.new.weight": torch.zeros(2)})
    with pytest.raises(KokaneeError, match=r"no place for \(visual\.new\.weight\)"):
        checkpoints.load(folder)


def test_a_weight_of_another_shape_is_an_error_that_names_it(theirs):
    configure(theirs, intermediate_size=96)
    with pytest.raises(KokaneeError, match=r"weights have another shape .*mlp"):
        checkpoints.load(theirs)


def test_a_tied_checkpoint_needs_no_lm_head(theirs):
    configure(theirs, tie_word_embeddings=True)
    rewrite(theirs, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"})
    model, _ = checkpoints.load(theirs)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    configure(theirs, tie_word_embeddings=False)
    with pytest.raises(KokaneeError, match=r"lm_head\.weight"):
        checkpoints.load(theirs)


def test_a_tied_checkpoint_may_store_its_lm_head_if_it_is_the_same(theirs):
    configure(theirs, tie_word_embeddings=True)
    with pytest.raises(KokaneeError, match=r"differs from model\.embed_tokens\.weight"):
        checkpoints.load(theirs)
    rewrite(theirs, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert checkpoints.load(theirs)[0].lm_head.weight.shape == (600, 64)


def test_the_authors_leftover_is_dropped_by_name(theirs, caplog):
    with caplog.at_level("INFO", logger="kokanee"):
        checkpoints.load(theirs)
    assert "audio.qformer.bert.embeddings.position_ids" in caplog.text


def test_a_processor_of_another_model_is_refused(own):
    with pytest.raises(KokaneeError, match="n_mels is 80, the model has 16"):
        checkpoints.load(own, n_mels=80)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"], "mm_vision_tower": "siglip"},
            "LLaVA that cannot hear",
        ),
        (
            {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            "cannot hear.*--whisper",
        ),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "'bert', architectures .*BertModel.*weights a, b"),
        ({}, "type None"),
    ],
)
def test_a_folder_of_another_model_says_what_was_found(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(KokaneeError, match=reason):
        checkpoints.load(tmp_path)


def test_a_folder_without_a_model_says_what_it_holds_and_where_the_model_may_be(own, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    with pytest.raises(
        KokaneeError, match=r"run holds no model: .*\(found: metrics\.jsonl\)\. Give the folder of a check"
    ):
        checkpoints.load(run)
    own.rename(run / "model")
    with pytest.raises(KokaneeError, match=r"\(found: metrics\.jsonl, model\)\. Give .*run/model\."):
        checkpoints.load(run)
    checkpoints.load(run / "model")


def test_a_kokanee_folder_without_its_processor_is_refused(own):
    (own / "processor.json").unlink()
    with pytest.raises(KokaneeError, match=r"without its processor\.json.*Copy the file"):
        checkpoints.load(own)


@pytest.mark.parametrize("name", ["not here", "/no/such/folder", __file__])
def test_a_name_that_is_nothing_is_refused(name):
    with pytest.raises(KokaneeError, match="no name of a model"):
        checkpoints.load(name)


def test_a_hub_name_is_downloaded_without_pickles_and_loads(own, monkeypatch):
    asked = {}

    def download(name, **wanted):
        asked.update(wanted, name=name)
        return str(own)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    assert_same(checkpoints.load("someone/some-model")[0], tiny_model())
    assert asked["name"] == "someone/some-model"
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def offline(name, **_):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(checkpoints, "snapshot_download", offline)
    with pytest.raises(KokaneeError, match=r"no folder someone/some-model.*cannot reach.*connection"):
        checkpoints.load("someone/some-model")


def test_saving_replaces_a_checkpoint_and_nothing_else(own, tmp_path):
    (own / "old.txt").write_text("")
    checkpoints.save(tiny_model(1), tiny_processor(), own)
    assert not (own / "old.txt").exists()
    assert_same(checkpoints.load(own)[0], tiny_model(1))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("")
    with pytest.raises(KokaneeError, match="is no Kokanee folder"):
        checkpoints.save(tiny_model(), tiny_processor(), tmp_path / "photos")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_something_else_that_has_a_config_is_never_replaced(own, theirs, tmp_path):
    application = tmp_path / "application"
    (application / "src").mkdir(parents=True)
    (application / "src" / "thesis.txt").write_text("years of work")
    for config in ('{"model_type": "kokanee"}', '{"port": 80}', "[]", "{"):
        (application / "config.json").write_text(config)
        with pytest.raises(KokaneeError, match="is no Kokanee folder"):
            checkpoints.save(tiny_model(), tiny_processor(), application)
        assert (application / "src" / "thesis.txt").read_text() == "years of work"
    before = contents(theirs)
    with pytest.raises(KokaneeError, match="is no Kokanee folder"):
        checkpoints.convert(own, theirs)
    assert contents(theirs) == before


def test_a_checkpoint_is_not_converted_into_its_own_place(own, theirs, tmp_path):
    (tmp_path / "link").symlink_to(own)
    before = contents(own)
    for out in (own, own / ".." / own.name, tmp_path / "link"):
        with pytest.raises(KokaneeError, match="is to be converted"):
            checkpoints.convert(own, out)
    whole = checkpoints.convert(theirs, tmp_path / "whole")
    shutil.copytree(ADAPTER, whole / "adapter")
    for adapter in (ADAPTER, whole / "adapter"):
        with pytest.raises(KokaneeError, match="is to be converted"):
            checkpoints.convert(adapter, whole, base=whole)
    assert contents(own) == before and (whole / "adapter").is_dir()


def test_a_linked_folder_is_replaced_where_it_is(own, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(own)
    checkpoints.save(tiny_model(1), tiny_processor(), link)
    assert link.is_symlink() and not own.is_symlink()
    assert_same(checkpoints.load(own)[0], tiny_model(1))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_save_that_is_stopped_while_folders_change_places_leaves_the_old_one(own, monkeypatch, stop):
    before, rename = contents(own), Path.rename

    def stopped(path, target):
        if path.name == "new":
            raise stop
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(stop):
        checkpoints.save(tiny_model(1), tiny_processor(), own)
    assert contents(own) == before
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_a_save_that_fails_leaves_what_was_there(own, monkeypatch):
    processor = tiny_processor()
    before = {path.name: path.read_bytes() for path in own.iterdir()}

    def full(folder):
        raise OSError("no space left")

    monkeypatch.setattr(processor, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(tiny_model(1), processor, own)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_an_adapter_is_merged_into_the_base_that_is_given(theirs):
    base, _ = checkpoints.load(theirs, dtype="float32")
    whole, _ = checkpoints.load(ADAPTER, base=theirs, dtype="float32")
    merged = load_file(GOLDEN / "gdpo" / "merged.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(whole.language_model.layers[0].self_attn.q_proj.weight, merged)
    assert torch.equal(whole.language_model.embed_tokens.weight, base.language_model.embed_tokens.weight)


def test_an_adapter_without_its_base_is_refused():
    with pytest.raises(KokaneeError, match=r"base \(checkpoint\) is not here.*audioAlign"):
        checkpoints.load(ADAPTER)


def test_an_adapter_whose_base_is_a_folder_of_somebody_else_says_what_to_give(tmp_path, monkeypatch):
    """Published ones name such folders; with one stroke in it, it may be a name on the hub."""
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    named = json.loads(path.read_text()) | {"base_model_name_or_path": "model/Qwen2.5-VL-7B-Instruct-Audio"}
    path.write_text(json.dumps(named))

    def no_hub(*_, **__):
        raise OSError("no such repository")

    monkeypatch.setattr(checkpoints, "snapshot_download", no_hub)
    with pytest.raises(KokaneeError, match=r"\(model/Qwen.*\) is not here\. Give `base`.*audioAlign.*no such"):
        checkpoints.load(tmp_path / "adapter")


def test_the_penalty_of_repetitions_goes_along(theirs, tmp_path):
    path = theirs / "generation_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"repetition_penalty": 1.05, "temperature": 1e-6, "do_sample": True}))
    checkpoints.convert(theirs, tmp_path / "ours")
    kept = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert kept["repetition_penalty"] == 1.05 and kept["eos_token_id"] == stored["eos_token_id"]
    assert "temperature" not in kept and not kept.get("do_sample")


def test_a_whole_model_needs_no_base(own):
    with pytest.raises(KokaneeError, match="needs no base"):
        checkpoints.load(own, base=own)


def test_an_unmerged_adapter_is_not_saved(theirs, tmp_path):
    model, processor = checkpoints.load(theirs)
    checkpoints.load_adapter(model, ADAPTER)
    with pytest.raises(KokaneeError, match="not merged"):
        checkpoints.save(model, processor, tmp_path / "out")
