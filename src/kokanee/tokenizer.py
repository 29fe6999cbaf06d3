"""Text to ids: building a small byte-level BPE, loading a folder's tokenizer, and encoding that keeps text text.

A caption or a question may contain the string of a special token, such as "<|video_pad|>". `TextEncoder` encodes it as
the ordinary characters that it is, so that no text can pose as media or end a turn. (The published code reads such
strings as the special tokens; on every other text the ids are the same.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from kokanee.errors import KokaneeError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
AUDIO_TOKEN = "<|audio_pad|>"
"""An ordinary added token, as in the published checkpoints: decoding with special tokens skipped keeps it."""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's splitting of text into words."""

N_BYTES = 256
ROLES = ("system\n", "user\n", "assistant\n")


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen2's word splitting; the same texts give the same tokenizer.

    `vocab_size` counts everything: the 256 bytes, the merges, the 7 special tokens and `<|audio_pad|>`, which have the
    highest ids. The vocabulary is smaller than asked where the texts have no more pairs to merge. Raises `KokaneeError`
    if `vocab_size` leaves no room for the bytes.
    """
    n_reserved = len(SPECIAL_TOKENS) + 1
    if vocab_size < N_BYTES + n_reserved:
        raise KokaneeError(
            f"A vocabulary of {vocab_size} cannot hold the {N_BYTES} bytes and {n_reserved} special tokens. "
            f"Ask for at least {N_BYTES + n_reserved}."
        )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - n_reserved,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = list(texts)
    backend.train_from_iterator([*texts, *ROLES * max(len(texts), 1000)], trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(AUDIO_TOKEN, normalized=True, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `folder`: from `tokenizer.json`, or else from `vocab.json` and `merges.txt`. Never a download.

    Raises `KokaneeError` if the folder has neither.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise KokaneeError(
        f"{folder} has no tokenizer (found: {found or 'nothing'}). "
        "Give a folder with tokenizer.json, or with vocab.json and merges.txt."
    )


class TextEncoder:
    """Plain text -> ids (L,) int64, with a tokenizer's vocabulary and merges but without its special and added tokens.

    Arrays are shared between equal calls, and read-only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.__setstate__(Tokenizer.from_str(json.dumps(state)))

    def __getstate__(self) -> Tokenizer:
        return self._backend

    def __setstate__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._cached = lru_cache(maxsize=4096)(self._encode)

    def __call__(self, text: str) -> np.ndarray:
        return self._cached(text)

    def _encode(self, text: str) -> np.ndarray:
        ids_L = np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        ids_L.setflags(write=False)
        return ids_L
