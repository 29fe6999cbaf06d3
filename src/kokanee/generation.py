"""The decode loop: a batch of prompts -> tokens, one step at a time, from one prefill; and tokens -> text as it grows.

The prompts with their media are computed once and kept once (`prompt_cache.py`), whatever the number of samples. Every
sample draws from a random stream of its own that follows from the seed, the prompt's key and the sample's number alone:
the same seed gives the same caption in any batch, up to the rounding of sums (which depends on the batch's shape, and
matters in bfloat16 more than in float32).

Axes: B prompts, R rows (samples of a prompt stand next to each other), L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast

from kokanee.attention import PADDED_ATTENTION
from kokanee.captions import Decoding, stream_seed
from kokanee.errors import KokaneeError, memory_said
from kokanee.model import Kokanee
from kokanee.prompt_cache import SHARED_PROMPT_ATTENTION, PromptCache, attention_in

LESS = (
    "Caption shorter parts (--end, --every) or fewer files at once (--batch-size 1; in a recipe caption_batch), or "
    "load the model in bfloat16 (--dtype bfloat16; in a recipe dtype)."
)
NO_TOKEN = -1
UNMASKED = {"full_attention": None}  # no mask is to be made
LONG = 2048  # tokens of prompts from which on a mask over all pairs costs more than a call for each prompt
DRAWN = 64
UNFINISHED_CHARACTER = "\ufffd"


@dataclass
class Answer:
    """One answer: its tokens without the end token, and whether it came to its end."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False


def answers(
    model: Kokanee,
    batch: dict[str, torch.Tensor],
    decoding: Decoding,
    n_samples: int = 1,
    keys: Sequence[str] | None = None,
) -> list[Answer]:
    """All answers to a batch, prompt by prompt, `n_samples` of each; see `steps`."""
    found = [Answer() for _ in range(batch["input_ids"].shape[0] * n_samples)]
    ends = end_ids(model)
    for tokens_R in steps(model, batch, decoding, n_samples, keys):
        for answer, token in zip(found, tokens_R, strict=True):
            if token in ends:
                answer.finished = True
            elif token != NO_TOKEN:
                answer.ids.append(token)
    return found


def steps(
    model: Kokanee,
    batch: dict[str, torch.Tensor],
    decoding: Decoding,
    n_samples: int = 1,
    keys: Sequence[str] | None = None,
) -> Iterator[list[int]]:
    """The next token of every row, step by step; `NO_TOKEN` for rows that came to their end before.

    `batch` is a collated batch of open prompts, padded on the left; `keys` say what each prompt is, so that those of
    different keys draw different random numbers. Stops when all rows have ended or are `max_new_tokens` long; prompts
    whose samples have all ended are no longer computed, once they are the half. Raises `KokaneeError` when the model's
    output is not finite, or the device has too little memory.
    """
    device = cast(torch.Tensor, model.get_input_embeddings().weight).device
    with memory_said(LESS):
        batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    logits_RV, cache = prefill(model, batch, n_samples)
    held_RV = None
    if decoding.repetition_penalty != 1:
        held_RV = tokens_held(batch, logits_RV.shape[-1], model.penalizes_prompts).repeat_interleave(n_samples, 0)
    last_3R1 = batch["position_ids"][:, :, -1:].repeat_interleave(n_samples, 1)
    draw = uniform_numbers(decoding, keys or [""] * len(batch["input_ids"]), n_samples)
    ends, n_rows = end_ids(model), len(logits_RV)
    ended = [False] * n_rows
    rows = list(range(n_rows))  # those that are still computed; all of a prompt, or none
    for step in range(decoding.max_new_tokens):
        check_finite(logits_RV, step)
        if held_RV is not None:
            logits_RV = penalized(logits_RV, held_RV, decoding.repetition_penalty)
        chosen_R = choose(logits_RV, decoding, partial(draw, rows))
        tokens = [NO_TOKEN] * n_rows
        for row, token in zip(rows, chosen_R.tolist(), strict=True):
            tokens[row] = NO_TOKEN if ended[row] else token
            ended[row] = ended[row] or token in ends
        yield tokens
        if all(ended) or step + 1 == decoding.max_new_tokens:
            return
        if held_RV is not None:
            held_RV.scatter_(1, chosen_R[:, None], True)
        left = [at for at in range(0, len(rows), n_samples) if not all(ended[row] for row in rows[at : at + n_samples])]
        if 2 * n_samples * len(left) <= len(rows):
            kept = [at + sample for at in left for sample in range(n_samples)]
            cache.keep([at // n_samples for at in left])
            rows, chosen_R, last_3R1 = [rows[at] for at in kept], chosen_R[kept], last_3R1[:, kept]
            held_RV = None if held_RV is None else held_RV[kept]
        last_3R1 = last_3R1 + 1
        logits_RV = one_more(model, chosen_R, last_3R1, cache)


@memory_said(LESS)
@torch.no_grad()
def prefill(model: Kokanee, batch: dict[str, torch.Tensor], n_samples: int) -> tuple[torch.Tensor, PromptCache]:
    """Scores (R, V) of each sample's first token, and the cache of the prompts, which the samples share."""
    starts = (batch["attention_mask"] == 0).sum(1).tolist()
    if any(starts) and batch["input_ids"].shape[1] >= LONG:
        with attention_in(model, PADDED_ATTENTION):
            shown: dict[str, Any] = {**batch, "attention_mask": UNMASKED}
            out = model(**shown, use_cache=True, logits_to_keep=1, starts=starts)
    else:
        out = model(**batch, use_cache=True, logits_to_keep=1)
    assert out.logits is not None and out.past_key_values is not None
    cache = PromptCache(out.past_key_values, batch["attention_mask"], n_samples)
    return out.logits[:, -1].repeat_interleave(n_samples, 0), cache


@memory_said(LESS)
@torch.no_grad()
def one_more(model: Kokanee, tokens_R: torch.Tensor, position_3R1: torch.Tensor, cache: PromptCache) -> torch.Tensor:
    """Scores (R, V) of the token after `tokens_R`; the cache grows by one."""
    with attention_in(model, SHARED_PROMPT_ATTENTION):
        # A token that was generated is never a placeholder, whatever its id, so it is embedded as text.
        out = model(
            inputs_embeds=model.get_input_embeddings()(tokens_R.to(position_3R1.device)[:, None]),
            attention_mask=UNMASKED,
            position_ids=position_3R1,
            use_cache=False,
            logits_to_keep=1,
            prompt_cache=cache,
        )
    assert out.logits is not None
    return out.logits[:, -1]


def tokens_held(batch: dict[str, torch.Tensor], n_tokens: int, with_prompt: bool = True) -> torch.Tensor:
    """Which tokens each prompt holds, without its padding: (B, V) of booleans; all False if prompts do not count."""
    ids_BL, mask_BL = batch["input_ids"], batch["attention_mask"]
    if not with_prompt:
        return torch.zeros(len(ids_BL), n_tokens, dtype=torch.bool, device=ids_BL.device)
    return torch.zeros(len(ids_BL), n_tokens, device=ids_BL.device).scatter_add_(1, ids_BL, mask_BL.float()) > 0


def penalized(logits_RV: torch.Tensor, held_RV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores of which those of tokens that were said are lower; see `Decoding`."""
    logits_RV = logits_RV.float()
    lower_RV = torch.where(logits_RV < 0, logits_RV * penalty, logits_RV / penalty)
    return torch.where(held_RV, lower_RV, logits_RV)


@memory_said(LESS)
def choose(logits_RV: torch.Tensor, decoding: Decoding, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A token for each row (R,): the likeliest at temperature 0, else the one at which a uniform number falls."""
    if decoding.temperature == 0:
        return logits_RV.argmax(-1)
    scores_RV = logits_RV.float() / decoding.temperature
    p_RV, order_RV = scores_RV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    below_RV = p_RV.cumsum(-1)
    # A token belongs to the nucleus when those before it do not reach top_p; the likeliest always does.
    size_R1 = (below_RV - p_RV < decoding.top_p).sum(-1, keepdim=True)
    mass_R1 = below_RV.gather(1, size_R1 - 1)
    place_R1 = (below_RV <= draw().to(below_RV)[:, None] * mass_R1).sum(-1, keepdim=True)
    return order_RV.gather(1, place_R1.minimum(size_R1 - 1))[:, 0]


def uniform_numbers(decoding: Decoding, keys: Sequence[str], n_samples: int) -> Callable[[Sequence[int]], torch.Tensor]:
    """A function that draws a number in [0, 1) for some rows, each from the stream of its prompt and its sample."""
    streams = [
        torch.Generator().manual_seed(stream_seed(decoding.seed, key, sample))
        for key in (keys if decoding.temperature else ())
        for sample in range(n_samples)
    ]
    ahead: list[list[float]] = [[] for _ in streams]  # drawn some at a time: a call for each costs more than the number

    def draw(rows: Sequence[int]) -> torch.Tensor:
        for row in rows:
            ahead[row] = ahead[row] or torch.rand(DRAWN, generator=streams[row]).tolist()[::-1]
        return torch.tensor([ahead[row].pop() for row in rows])

    return draw


def check_finite(logits_RV: torch.Tensor, step: int) -> None:
    """Raise `KokaneeError` where a row's scores are not numbers."""
    bad = (~torch.isfinite(logits_RV).all(-1)).nonzero().flatten().tolist()
    if bad:
        raise KokaneeError(
            f"The model's scores for token {step + 1} are not finite (rows {bad} of the batch). "
            "Load it with dtype bfloat16 or float32; if they stay so, the checkpoint is damaged."
        )


def end_ids(model: Kokanee) -> set[int]:
    """The tokens that end an answer."""
    found: Any = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = model.config.eos_token_id
    return set(found) if isinstance(found, (list, tuple)) else {found}


class TextStream:
    """Tokens one by one -> pieces of text, which joined are the text of all tokens without white space around it.

    A piece never ends inside a character: a byte-level token can be part of one, and is held back until the rest comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.held_ids: list[int] = []
        self.held_space: str | None = None

    def add(self, token: int) -> str:
        """What is new and whole after one more token; often "", when it is not yet sure."""
        self.held_ids.append(token)
        text = self._decode()
        if text.endswith(UNFINISHED_CHARACTER):
            return ""
        self.held_ids.clear()
        return self._trimmed(text)

    def end(self) -> str:
        """What was held back: bytes that never became a character are replaced by U+FFFD."""
        text = self._decode()
        self.held_ids.clear()
        return self._trimmed(text)

    def _decode(self) -> str:
        text = self.tokenizer.decode(self.held_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _trimmed(self, text: str) -> str:
        """`text` after the white space that was held, its own last white space held in turn."""
        text = text.lstrip() if self.held_space is None else self.held_space + text
        body = text.rstrip()
        if body or self.held_space is not None:
            self.held_space = text[len(body) :]
        return body


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of an answer's tokens, without special tokens and white space around it."""
    stream = TextStream(tokenizer)
    return "".join([*(stream.add(token) for token in ids), stream.end()])
