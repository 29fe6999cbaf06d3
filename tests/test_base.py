from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

from kokanee import checkpoints
from kokanee.errors import KokaneeError
from kokanee.prompt import Turn
from kokanee.tokenizer import SPECIAL_TOKENS, build_tokenizer
from tiny import WIDTH, tiny_config, tiny_processor

WEIGHTS = "model.safetensors"
QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def save_tokenizer(folder: Path) -> int:
    """A tokenizer as Qwen2.5-VL has it, without the audio token; returns its size."""
    tokenizer = build_tokenizer(["a dog barks twice ."], 280)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<|audio_pad|>"]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    kept = {
        key: token
        for key, token in stored.pop("added_tokens_decoder", {}).items()
        if token["content"] in SPECIAL_TOKENS
    }
    path.write_text(json.dumps(stored | ({"added_tokens_decoder": kept} if kept else {})))
    return len(state["model"]["vocab"]) + len(state["added_tokens"])


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    n_tokens = save_tokenizer(folder)
    tiny = tiny_config()
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=tiny.text_config.to_dict() | {"vocab_size": n_tokens},
        vision_config=tiny.vision_config.to_dict(),
        tie_word_embeddings=True,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(1)
    audio = tiny_config().audio_config
    sizes = {
        key: getattr(audio, key) for key in ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    }
    sizes |= {"num_mel_bins": audio.num_mel_bins, "max_source_positions": audio.max_source_positions}
    special = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(vocab_size=99, decoder_layers=1, decoder_attention_heads=2, **special, **sizes)
    Whisper(config).save_pretrained(folder)
    return folder


def assembled(qwen, whisper, out, **changes):
    settings = {"qformer": QFORMER, "dtype": "float32", **changes}
    return checkpoints.load(checkpoints.assemble(qwen, whisper, out, **settings))


@pytest.fixture(scope="module")
def base(qwen_folder, whisper_folder, tmp_path_factory):
    return assembled(qwen_folder, whisper_folder, tmp_path_factory.mktemp("base") / "out")


@torch.no_grad()
def test_a_base_reads_and_sees_like_its_qwen(base, qwen_folder):
    model, _ = base
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_folder).eval()
    ids = torch.arange(20)[None]
    n_tokens = qwen.config.text_config.vocab_size
    assert torch.allclose(model(input_ids=ids).logits[..., :n_tokens], qwen(input_ids=ids).logits, atol=1e-5)
    patches, grid = torch.randn(2 * 4 * 8, 1176), torch.tensor([[2, 4, 8]])
    assert torch.allclose(
        model.encode_video(patches, grid), qwen.model.visual(patches, grid_thw=grid).pooler_output, atol=1e-5
    )


@torch.no_grad()
def test_a_base_hears_like_its_whisper(base, whisper_folder):
    model, _ = base
    whisper = Whisper.from_pretrained(whisper_folder).eval()
    features = torch.randn(1, 16, 200)
    expected = whisper.model.encoder(features).last_hidden_state
    assert torch.allclose(model.audio.encoder(features).last_hidden_state, expected, atol=1e-6)


def test_the_embeddings_grow_for_the_audio_token_and_stay_tied(base, qwen_folder):
    model, processor = base
    old = load_file(qwen_folder / WEIGHTS)
    embeddings = old[next(key for key in old if key.endswith("embed_tokens.weight"))]
    weight = model.language_model.embed_tokens.weight
    assert model.config.audio_token_id == processor.rules.audio_id == len(embeddings)
    assert weight.shape == (len(embeddings) + 1, WIDTH) and model.config.text_config.vocab_size == len(weight)
    assert torch.equal(weight[:-1], embeddings) and torch.allclose(weight[-1], embeddings.mean(0), atol=1e-6)
    assert model.lm_head.weight is weight


def test_a_base_takes_sound_and_pictures_and_generates(base):
    model, processor = base
    pictures = list(torch.randint(0, 256, (4, 56, 56, 3), dtype=torch.uint8).numpy())
    clip = processor.make_clip(pictures, 2.0, torch.randn(20000).numpy())
    sample = processor.prepare(clip, [Turn("user", "what ?")])
    batch = processor.collate([sample])
    batch.pop("labels")
    assert (sample["input_ids"] == processor.rules.audio_id).sum() == 4
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert made.shape[1] == batch["input_ids"].shape[1] + 3


def test_the_fresh_part_follows_the_seed(base, qwen_folder, whisper_folder, tmp_path):
    again, _ = assembled(qwen_folder, whisper_folder, tmp_path / "again")
    other, _ = assembled(qwen_folder, whisper_folder, tmp_path / "other", seed=1)
    ours = base[0].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in again.state_dict().items())
    differ = {name for name, value in other.state_dict().items() if not torch.equal(ours[name], value)}
    assert differ and all(name.startswith(("audio.queries", "audio.qformer", "audio.projection")) for name in differ)
    assert "audio.queries" in differ and torch.equal(ours["audio.qformer.layernorm.weight"], torch.ones(32))
    assert torch.equal(ours["audio.projection.bias"], torch.zeros(WIDTH))


def test_old_and_new_layouts_of_qwen_give_the_same_base(base, qwen_folder, whisper_folder, tmp_path):
    folder = tmp_path / "other-layout"
    folder.mkdir()
    for file in qwen_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / WEIGHTS)
    pairs = [("model.visual.", "visual."), ("model.language_model.", "model.")]
    if not any(key.startswith("model.visual.") for key in tensors):
        pairs = [(old, new) for new, old in pairs]

    def other_name(key: str) -> str:
        return next((new + key.removeprefix(old) for old, new in pairs if key.startswith(old)), key)

    save_file({other_name(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    assert load_file(folder / WEIGHTS).keys().isdisjoint(key for key in tensors if "visual" in key)
    other, _ = assembled(folder, whisper_folder, tmp_path / "out")
    assert all(torch.equal(base[0].state_dict()[name], value) for name, value in other.state_dict().items())


def test_a_missing_weight_is_an_error_that_names_it(qwen_folder, whisper_folder, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in whisper_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {key: tensor for key, tensor in tensors.items() if not key.endswith("encoder.layer_norm.bias")},
        folder / WEIGHTS,
    )
    with pytest.raises(KokaneeError, match=r"audio\.encoder\.layer_norm\.bias"):
        assembled(qwen_folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_other_models_are_refused(qwen_folder, whisper_folder, tmp_path):
    with pytest.raises(KokaneeError, match="Give a plain Qwen"):
        assembled(whisper_folder, whisper_folder, tmp_path / "out")
    with pytest.raises(KokaneeError, match="Give a Whisper"):
        assembled(qwen_folder, qwen_folder, tmp_path / "out")


def test_an_audio_token_that_is_there_is_kept(qwen_folder, whisper_folder, tmp_path):
    folder = tmp_path / "hearing-tokenizer"
    folder.mkdir()
    for file in qwen_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = tiny_processor().tokenizer
    tokenizer.save_pretrained(folder)
    model, processor = assembled(folder, whisper_folder, tmp_path / "out")
    assert model.config.audio_token_id == tokenizer.get_added_vocab()["<|audio_pad|>"] == processor.rules.audio_id
