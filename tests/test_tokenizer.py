from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from kokanee.errors import KokaneeError
from kokanee.tokenizer import AUDIO_TOKEN, SPECIAL_TOKENS, TextEncoder, build_tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "salmonn2plus" / "tokenizer"
TEXTS = ["A red circle jumps while a bell rings twice.", "The blue square moves left.", "Nothing is heard."] * 20
HARD = ["Two  spaces,\n\n12'x's é 日本 🙂\t\r\n", "  <|im_end|><|audio_pad|> x", "", "e\u0301", "\n"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS, 400)


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = build_tokenizer(iter(TEXTS), 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_vocabulary_ends_with_the_special_tokens_and_the_audio_token(tokenizer):
    names = [*SPECIAL_TOKENS, AUDIO_TOKEN]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(tokenizer) - 8, len(tokenizer)))
    assert len(tokenizer) <= 400
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"


def test_only_the_audio_token_survives_decoding_without_special_tokens(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, AUDIO_TOKEN])
    assert tokenizer.decode(ids, skip_special_tokens=True) == AUDIO_TOKEN


def test_roles_are_single_tokens(tokenizer):
    encode = TextEncoder(tokenizer)
    assert [len(encode(role)) for role in ("system", "user", "assistant")] == [1, 1, 1]


@pytest.mark.parametrize("text", HARD)
def test_any_text_comes_back_and_holds_no_special_token(tokenizer, text):
    ids = TextEncoder(tokenizer)(text)
    assert tokenizer.decode(ids.tolist()) == text.replace("e\u0301", "é")
    assert ids.max(initial=0) < len(tokenizer) - 8


@pytest.mark.parametrize("text", [*TEXTS[:3], *HARD[:1]])
def test_plain_text_has_the_same_ids_with_and_without_special_tokens(tokenizer, text):
    assert TextEncoder(tokenizer)(text).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_encoded_text_cannot_be_changed_by_accident(tokenizer):
    with pytest.raises(ValueError):
        TextEncoder(tokenizer)("bell")[0] = 0


def test_a_saved_tokenizer_loads_the_same_with_and_without_kokanee(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in tmp_path.iterdir()}
    text = "<|im_start|>user\nA red circle?<|audio_pad|><|im_end|>"
    theirs = [kind.from_pretrained(tmp_path) for kind in (AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer)]
    for loaded in (load_tokenizer(tmp_path), *theirs):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.pad_token_id == tokenizer.pad_token_id


def test_a_folder_with_vocabulary_and_merges_alone_is_read(tmp_path):
    """As a slow Qwen2 tokenizer is saved by the published recipe: no tokenizer.json."""
    whole = json.loads((GOLDEN / "tokenizer.json").read_text())
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in whole["model"]["merges"]]
    settings = json.loads((GOLDEN / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in whole["added_tokens"]}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    loaded, golden = load_tokenizer(tmp_path), load_tokenizer(GOLDEN)
    assert loaded.get_added_vocab() == golden.get_added_vocab()
    for text in ("Describe the video\n\nin 'detail' 12  x's <|audio_pad|>", "a dog barks twice while rain falls ."):
        assert loaded(text)["input_ids"] == golden(text)["input_ids"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(KokaneeError, match=r"found: model.safetensors"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(KokaneeError, match="264"):
        build_tokenizer(TEXTS, 263)
