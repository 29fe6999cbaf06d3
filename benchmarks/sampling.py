"""Time and peak memory of four samples of 128 tokens from one prompt: Kokanee's decode loop and other ways.

    python benchmarks/sampling.py [--repeats 5] [--prompts 2048 4096]
    python benchmarks/sampling.py --device cuda --size 7b [--prompts 8192 30000]

Same model, same prompts (of text; of video and sound, encoders included), temperature 1 and top-p 0.9, all ways in
turns. Kokanee computes the prompt once and keeps it once: all samples read the same cache. transformers' `generate`
computes and keeps the prompt of every sample. Between them, a plain loop computes the prompt once and copies its
cache for every sample. The end token is put outside the vocabulary, so that every sample has all its tokens.

Before anything is timed all ways must say the same greedily (in float32; in bfloat16 rounding alone changes what is
said). Memory: each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kokanee.captions import Decoding
from kokanee.generation import answers, choose, uniform_numbers
from kokanee.model import Kokanee
from kokanee.processor import Sample
from measuring import (
    Seconds,
    gigaflops,
    in_own_process,
    interleaved,
    machine,
    peak_mb,
    product,
    reading,
    spread,
    table_head,
    table_rows,
)
from random_model import KINDS, SIZES, Size, conversation, decoder_macs, make_model, media_of

WARM_UP = 128
OURS, LOOP, GENERATE = "Kokanee", "prompt once, cache copied", "generate(num_return_sequences)"
PRODUCT, READING = "plain product", "plain reading"
READ_BYTES = 2**28
Tokens = list[list[int]]
Way = Callable[[Kokanee, Sample, Decoding, int], Tokens]


def kokanee(model: Kokanee, batch: Sample, decoding: Decoding, n_samples: int) -> Tokens:
    """One prompt, one cache."""
    return [answer.ids for answer in answers(model, batch, decoding, n_samples)]


def generate(model: Kokanee, batch: Sample, decoding: Decoding, n_samples: int) -> Tokens:
    """transformers' own; greedily it takes one sample only."""
    how = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    if not decoding.temperature:
        how, n_samples = {"do_sample": False}, 1
    said_RL = model.generate(
        **batch, **how, num_return_sequences=n_samples, max_new_tokens=decoding.max_new_tokens, use_cache=True
    )
    return said_RL[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def loop(model: Kokanee, batch: Sample, decoding: Decoding, n_samples: int) -> Tokens:
    """One prompt, then a cache of transformers for every sample."""
    draw, said = uniform_numbers(decoding, [""], n_samples), []
    out: Any = model(**batch, use_cache=True, logits_to_keep=1)
    cache, logits_RV = out.past_key_values, out.logits[:, -1].repeat_interleave(n_samples, 0)
    cache.batch_repeat_interleave(n_samples)
    position_3R1 = batch["position_ids"][:, :, -1:].repeat_interleave(n_samples, 1)
    while True:
        tokens_R = choose(logits_RV, decoding, partial(draw, range(n_samples)))
        said.append(tokens_R.tolist())
        if len(said) == decoding.max_new_tokens:
            return [list(tokens) for tokens in zip(*said, strict=True)]
        position_3R1 = position_3R1 + 1
        out = model(
            tokens_R[:, None], position_ids=position_3R1, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits_RV = out.logits[:, -1]


WAYS: dict[str, Way] = {OURS: kokanee, LOOP: loop, GENERATE: generate}


class Bench:
    """The model, whose samples never end, and what is asked of it."""

    def __init__(self, size: Size, device: str, n_samples: int, n_tokens: int) -> None:
        self.size, self.device, self.n_samples, self.n_tokens = size, device, n_samples, n_tokens
        self.model = make_model(size, device).eval()
        self.model.generation_config.eos_token_id = self.model.config.text_config.vocab_size

    def batch(self, prompt: int, kind: str) -> Sample:
        sample = conversation(self.size, prompt, 0, media=kind == "media")
        batch = {name: sample[name].unsqueeze(-2).to(self.device) for name in ("input_ids", "position_ids")}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch | (media_of(self.size, prompt, self.device) if kind == "media" else {})

    def work(self, way: str, batch: Sample) -> Callable[[], Tokens]:
        decoding = Decoding(temperature=1.0, max_new_tokens=self.n_tokens)

        def whole() -> Tokens:
            said = WAYS[way](self.model, batch, decoding, self.n_samples)
            assert [len(tokens) for tokens in said] == [self.n_tokens] * self.n_samples
            return said

        return whole

    def check(self, batch: Sample) -> None:
        """Ends the script where the ways do not say the same greedily."""
        greedy = Decoding(max_new_tokens=self.n_tokens)
        said = {tuple(tokens) for way in WAYS.values() for tokens in way(self.model, batch, greedy, self.n_samples)}
        if len(said) > 1 and self.size.dtype is torch.float32:
            raise SystemExit("The ways do not say the same.")

    def needed(self, prompt: int) -> dict[str, tuple[int, float]]:
        """Of each way the multiply-adds it cannot do without, and the MB of cache that the middle step reads."""
        config, many, new = self.model.config, self.n_samples, self.n_tokens
        text = config.text_config
        width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        a_token = 2 * text.num_hidden_layers * width * self.size.dtype.itemsize / 1e6
        once = decoder_macs(config, prompt, [new] * many, many * new, False)
        each = many * decoder_macs(config, prompt + new, (), new, False)
        shared, copied = a_token * (prompt + many * new / 2), a_token * many * (prompt + new / 2)
        return {OURS: (once, shared), LOOP: (once, copied), GENERATE: (each, copied)}

    def product_shape(self, prompt: int) -> tuple[int, int, int]:
        """The decoder's largest product."""
        text = self.model.config.text_config
        return prompt, text.hidden_size, text.intermediate_size

    def weights_mb(self) -> float:
        """What a step reads beside the cache: the decoder's weights without embeddings, and the head's."""
        parts = (self.model.language_model.layers, self.model.lm_head)
        n_weights = sum(weight.numel() for part in parts for weight in part.parameters())
        return n_weights * self.size.dtype.itemsize / 1e6


def peaks(bench: Bench, way: str, prompts: list[int]) -> list[dict[str, float]]:
    """The peak memory of a way in MB: of each prompt, by kind."""
    found = [
        {kind: peak_mb(bench.work(way, bench.batch(prompt, kind)), bench.device) for kind in KINDS}
        for prompt in (WARM_UP, *prompts)
    ]
    return found[1:]


def timed(bench: Bench, prompt: int, kind: str, repeats: int) -> Seconds:
    """Seconds of every way, of a plain product and of plain reading."""
    batch = bench.batch(prompt, kind)
    bench.check(batch)
    works: dict[str, Callable[[], Any]] = {way: bench.work(way, batch) for way in WAYS}
    works[PRODUCT] = product(bench.product_shape(prompt), bench.size.dtype, bench.device)
    works[READING] = reading(READ_BYTES, bench.device)
    return interleaved(works, repeats, bench.device)


def floor_rows(bench: Bench, prompt: int, seconds: Seconds) -> str:
    """What each way cannot do without, and its seconds at the speed of a plain product and of plain reading."""
    speed = gigaflops(math.prod(bench.product_shape(prompt)), seconds[PRODUCT])
    mb_per_s = READ_BYTES / 1e6 / statistics.median(seconds[READING])
    weights_mb, rows = bench.weights_mb(), []
    for way, (macs, cache_mb) in bench.needed(prompt).items():
        floor = 2e-9 * macs / speed + bench.n_tokens * (cache_mb + weights_mb) / mb_per_s
        needed = f"{macs / 1e9:.1f} | {cache_mb:.1f} | {weights_mb:.1f} | {floor:.3f}"
        rows.append(f"| {prompt} | {way} | {needed} | {spread(seconds[way])} |")
    return "\n".join(rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--prompts", type=int, nargs="+", default=[2048, 4096], help="tokens")
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--tokens", type=int, default=128, help="of each sample")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--memory-of", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    new_bench = partial(Bench, SIZES[chosen.size], chosen.device, chosen.samples, chosen.tokens)
    if chosen.memory_of:
        print(json.dumps(peaks(new_bench(), chosen.memory_of, chosen.prompts)))
        return
    memory = {way: in_own_process("--memory-of", way) for way in WAYS}
    bench = new_bench()
    asked = f"{chosen.samples} samples of {chosen.tokens} tokens, {chosen.repeats} rounds"
    print(f"{machine(chosen.device)}; size {chosen.size}, {asked}\n\n{table_head('prompt')}")
    floors = []
    for number, prompt in enumerate(chosen.prompts):
        seconds = {kind: timed(bench, prompt, kind, chosen.repeats) for kind in KINDS}
        peak = {way: found[number] for way, found in memory.items()}
        print(table_rows(str(prompt), list(WAYS), seconds, peak), flush=True)
        floors.append(floor_rows(bench, prompt, seconds["text"]))
    print("\nWhat the decoder cannot do without (text), and its seconds at a plain product's and reading's speed\n")
    print("| prompt | way | 10^9 multiply-adds | cache read a step, MB | weights, MB | floor, s | measured, s |")
    print("|---|---|---|---|---|---|---|\n" + "\n".join(floors))


if __name__ == "__main__":
    main()
