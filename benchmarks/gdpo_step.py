"""Time and peak memory of one gDPO step (forward and backward, LoRA r 16 on q, k, v), packed and in other ways.

    python benchmarks/gdpo_step.py [--repeats 5] [--prompts 1024 2048 4096] [--answers 128 256]
    python benchmarks/gdpo_step.py --device cuda --size 7b [--prompts 8192 16384 30000]

Same weights, same data, three answers of equal length (no way has to pad), no optimizer; all ways in turns. Before
that they are held against each other: the losses and all gradients must be the same. Everything is measured on a
prompt of text, that is, the decoder alone, and on one of video and sound, whose encoders each way runs as often as
it does. Memory: each way in a process of its own. A place in the table is empty where a way takes no such prompt,
or the device has too little memory for it.

The ways of the published code are written anew, after what it does. For video-SALMONN 2+: five passes over prompt
and answer (policy: chosen, rejected, ground truth; reference: chosen, rejected), two visual and two audio encodings
(policy, reference). It makes the ground truth's logits at all positions, in a fused kernel for GPUs; here they are
made at the answer alone, in its favour. For the first model: five passes, five visual and five audio encodings, and
logits at all positions. TRL (optional): see trl_dpo.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import trl_dpo
from kokanee.conversations import shared_length
from kokanee.losses import answer_log_probs, dpo, gdpo, token_log_probs
from kokanee.model import Kokanee
from kokanee.prefix import branch_attention_in, collate_packed, lengths_of, pack, packed_log_probs
from kokanee.processor import Sample
from kokanee.prompt import IGNORED
from measuring import (
    Seconds,
    Work,
    gigaflops,
    in_own_process,
    interleaved,
    machine,
    peak_mb,
    product,
    table_head,
    table_rows,
)
from random_model import KINDS, SIZES, Size, conversation, decoder_macs, make_model, media_of

GT_WEIGHT = 0.1
ADAPTED = r"(language_)?model\.layers\..*\.(q_proj|k_proj|v_proj)"
LORA = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=ADAPTED)
WARM_UP = (512, 16)
PRODUCT = "plain product"
LIMITS = {torch.float32: (5e-4, 1e-3), torch.bfloat16: (0.1, 0.3)}
"""How much losses may differ (sums of hundreds of log-probabilities), and gradients, relative to their length."""
Cell = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One prompt with three answers: `samples`, each a batch of one (chosen, rejected, ground truth); the same
    packed, all three and the pair; the prompt's raw media; the reference's log-probabilities of the pair."""

    samples: list[Sample]
    packed: Sample
    pair: Sample
    media: Sample
    reference_12: torch.Tensor


@dataclass(frozen=True)
class Apart:
    """Separate passes. Media are encoded once for the policy's and once for the reference's, or in each pass;
    logits are made at answers, or everywhere."""

    reference: Literal["stored", "pass"]
    encode_each: bool = False
    all_logits: bool = False


@dataclass(frozen=True)
class Step:
    """`run` does one step and returns the loss; `trained` are the adapter's weights, by the ends of their names."""

    run: Callable[[], torch.Tensor]
    trained: dict[str, torch.nn.Parameter]


def packed_scores(model: Kokanee, batch: Sample, media: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers' log-probabilities (A,), and those of the third one's tokens."""
    log_probs_N, _, branches_N = packed_log_probs(model, batch, **media)
    sums_A = answer_log_probs(log_probs_N, branches_N - 1, int(batch["segments"].max()))
    return sums_A, log_probs_N[branches_N == 3]


def packed_step(adapted: PeftModel, case: Case, reference: Literal["stored", "pass"]) -> torch.Tensor:
    """Kokanee's step: encoders once, one packed pass; one more without gradient if the reference is not stored."""
    model: Any = adapted.get_base_model()
    with branch_attention_in(model):
        media, reference_12 = model.encode_media(**case.media), case.reference_12
        if reference == "pass":
            with torch.no_grad(), adapted.disable_adapter():
                reference_12 = packed_scores(model, case.pair, media)[0][None]
        sums_A, truth_N = packed_scores(model, case.packed, media)
        loss = gdpo(dpo(sums_A[None, :2], reference_12), truth_N, GT_WEIGHT)
        loss.backward()
    return loss.detach()


def token_scores(model: Kokanee, sample: Sample, media: Sample, all_logits: bool) -> torch.Tensor:
    """Log-probabilities of one answer's tokens, from a pass over prompt and answer."""
    embeds_1LD = model.embed(sample["input_ids"], **media)
    outputs = model.language_model(inputs_embeds=embeds_1LD, position_ids=sample["position_ids"], use_cache=False)
    hidden_LD = outputs.last_hidden_state[0, :-1]
    targets_L = sample["labels"][0, 1:]
    counted_L = targets_L != IGNORED
    if all_logits:
        return token_log_probs(model.lm_head(hidden_LD), targets_L.clamp(min=0))[counted_L]
    return token_log_probs(model.lm_head(hidden_LD[counted_L]), targets_L[counted_L])


def apart_step(adapted: PeftModel, case: Case, how: Apart) -> torch.Tensor:
    """The step in separate passes."""
    model: Any = adapted.get_base_model()

    def scores(samples: list[Sample]) -> Iterator[torch.Tensor]:
        media = None
        for sample in samples:
            if media is None or how.encode_each:
                media = model.encode_media(**case.media)
            yield token_scores(model, sample, media, how.all_logits)

    chosen_N, rejected_N, truth_N = scores(case.samples)
    reference_12 = case.reference_12
    if how.reference == "pass":
        with torch.no_grad(), adapted.disable_adapter():
            reference_12 = torch.stack([score_N.sum() for score_N in scores(case.samples[:2])])[None]
    policy_12 = torch.stack([chosen_N.sum(), rejected_N.sum()])[None]
    loss = gdpo(dpo(policy_12, reference_12), truth_N, GT_WEIGHT)
    loss.backward()
    return loss.detach()


OURS = "packed, stored reference (ours)"
WAYS: dict[str, Callable[[PeftModel, Case], torch.Tensor]] = {
    OURS: partial(packed_step, reference="stored"),
    "packed, reference pass (ours)": partial(packed_step, reference="pass"),
    "three passes, stored reference": partial(apart_step, how=Apart("stored")),
    "five passes as published, 2+": partial(apart_step, how=Apart("pass")),
    "five passes as published, first model": partial(apart_step, how=Apart("pass", True, True)),
}


class Bench:
    """The model with an adapter that changes something, and the steps of every way on a case."""

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device
        self.adapted = get_peft_model(make_model(size, device), LORA)  # pyright: ignore[reportArgumentType]
        self.model: Any = self.adapted.get_base_model()
        for name, weight in self.adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)

    def case(self, cell: Cell, kind: str) -> Case:
        samples = [conversation(self.size, *cell, media=kind == "media", number=number) for number in range(3)]
        together = [collate_packed([pack(some, shared_length(samples))], 0) for some in (samples, samples[:2])]
        alone = [{name: value.unsqueeze(-2) for name, value in sample.items()} for sample in samples]
        packed, pair, *apart = (
            {name: value.to(self.device) for name, value in batch.items()} for batch in (*together, *alone)
        )
        media = media_of(self.size, cell[0], self.device) if kind == "media" else {}
        with torch.no_grad(), self.adapted.disable_adapter(), branch_attention_in(self.model):
            reference_12 = packed_scores(self.model, pair, self.model.encode_media(**media))[0][None]
        return Case(apart, packed, pair, media, reference_12)

    def step(self, way: str, case: Case) -> Step:
        if way == trl_dpo.NAME:
            run, model = trl_dpo.trl_step(self.model, LORA, trained(self.adapted), case.samples, GT_WEIGHT)
        else:
            run, model = partial(WAYS[way], self.adapted, case), self.adapted
        weights = trained(model)

        def from_zero() -> torch.Tensor:
            for weight in weights.values():
                weight.grad = None
            return run()

        return Step(from_zero, weights)

    def ways(self, kind: str) -> list[str]:
        """TRL takes text only."""
        return [*WAYS, *([trl_dpo.NAME] if kind == "text" and trl_dpo.missing() is None else [])]

    def product_shape(self, case: Case) -> tuple[int, int, int]:
        """The packed pass's largest product."""
        text = self.model.config.text_config
        return case.packed["input_ids"].shape[1], text.hidden_size, text.intermediate_size

    def floor(self, case: Case, seconds: Seconds) -> str:
        """The row of multiply-adds that each way cannot do without, and of how near ours is to them."""
        config, (prompt, *branches) = self.model.config, lengths_of(case.packed["segments"])[0]
        n_labels = [int((sample["labels"] != IGNORED).sum()) for sample in case.samples]
        packed = decoder_macs(config, prompt, branches, sum(n_labels), True, spared=True)
        policy, reference = (
            decoder_macs(config, prompt + branches[0], (), n_labels[0], backward) for backward in (True, False)
        )
        three, five = 3 * policy, 3 * policy + 2 * reference
        plain = gigaflops(math.prod(self.product_shape(case)), seconds[PRODUCT])
        ours = gigaflops(packed, seconds[OURS])
        needed = " | ".join(f"{macs / 1e9:.0f}" for macs in (packed, three, five))
        bounds = f"{three / packed:.2f} | {five / packed:.2f}"
        return f"{needed} | {bounds} | {ours:.0f} | {plain:.0f} | {ours / plain:.0%}"


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's weights, by the ends of their names."""
    return {name[name.index("layers.") :]: weight for name, weight in model.named_parameters() if "lora_" in name}


def held_together(steps: dict[str, Step], limits: tuple[float, float]) -> tuple[float, float]:
    """The largest differences of losses, and of gradients relative to their length, from ours. Ends the script
    where they are above the limits. A way for which memory does not suffice is taken out of `steps`."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for way, step in list(steps.items()):
        try:
            loss = step.run()
        except torch.OutOfMemoryError:
            del steps[way]
            torch.cuda.empty_cache()
            continue
        weights = [step.trained[name] for name in sorted(step.trained)]
        gradients = [weight.grad.flatten().cpu() for weight in weights if weight.grad is not None]
        found[way] = loss.cpu(), torch.cat(gradients)
    loss, gradient = found[OURS]
    assert gradient.isfinite().all() and gradient.norm() > 0
    losses = {way: abs(float(other - loss)) for way, (other, _) in found.items()}
    gradients = {way: float((other - gradient).norm() / gradient.norm()) for way, (_, other) in found.items()}
    worst = max(losses.values()), max(gradients.values())
    if worst[0] > limits[0] or worst[1] > limits[1]:
        raise SystemExit(f"The ways do not agree. Losses differ by {losses}, gradients by {gradients}.")
    return worst


def peaks(bench: Bench, way: str, cells: list[Cell]) -> list[dict[str, float | None]]:
    """The peak memory of a way in MB: of each cell, by kind of prompt; None where it cannot be had."""
    found: list[dict[str, float | None]] = []
    for cell in (WARM_UP, *cells):
        found.append(dict.fromkeys(KINDS))
        for kind in KINDS:
            if way in bench.ways(kind):
                step = bench.step(way, bench.case(cell, kind))
                with contextlib.suppress(torch.OutOfMemoryError):
                    found[-1][kind] = peak_mb(step.run, bench.device)
    return found[1:]


def timed(bench: Bench, case: Case, kind: str, repeats: int) -> tuple[Seconds, str]:
    """Seconds of every way and of a plain product, and how well the ways agree."""
    steps = {way: bench.step(way, case) for way in bench.ways(kind)}
    loss, gradient = held_together(steps, LIMITS[bench.size.dtype])
    works: dict[str, Work] = {way: step.run for way, step in steps.items()}
    works[PRODUCT] = product(bench.product_shape(case), bench.size.dtype, bench.device)
    agreed = f"losses within {loss:.1e}, gradients within {gradient:.1e} of their length"
    return interleaved(works, repeats, bench.device), agreed


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--prompts", type=int, nargs="+", help="tokens")
    options.add_argument("--answers", type=int, nargs="+", help="tokens of each answer")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--memory-of", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    size = SIZES[chosen.size]
    cells = list(itertools.product(chosen.prompts or size.prompts, chosen.answers or size.answers))
    if chosen.memory_of:
        print(json.dumps(peaks(Bench(size, chosen.device), chosen.memory_of, cells)))
        return
    without_trl = trl_dpo.missing()
    ways = [*WAYS, *([] if without_trl else [trl_dpo.NAME])]
    if chosen.device == "cpu":
        memory = {way: in_own_process("--memory-of", way) for way in ways}
        bench = Bench(size, chosen.device)
    else:  # whose memory is counted exactly, whatever was there before
        bench = Bench(size, chosen.device)
        memory = {way: peaks(bench, way, cells) for way in ways}
    print(f"{machine(chosen.device)}; size {chosen.size}, {chosen.repeats} rounds", end="\n\n")
    print(table_head("prompt / answer"))
    floors, agreements = [], []
    for number, cell in enumerate(cells):
        name, seconds = f"{cell[0]} / {cell[1]}", {}
        for kind in KINDS:
            case = bench.case(cell, kind)
            seconds[kind], agreed = timed(bench, case, kind, chosen.repeats)
            agreements.append(f"{name}, {kind}: {agreed}")
        floors.append(f"| {name} | {bench.floor(case, seconds['text'])} |")
        peak = {way: found[number] for way, found in memory.items()}
        print(table_rows(name, ways, seconds, peak), flush=True)
    columns = ("prompt / answer", "packed", "three passes", "five passes", "three / packed", "five / packed")
    columns = (*columns, "packed, GFLOP/s", "plain product, GFLOP/s", "share")
    print("\nMultiply-adds (10^9) that the decoder cannot do without (text), and how fast ours does them\n")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n" + "\n".join(floors))
    print("\nEvery way gives the loss and gradients of ours:\n" + "\n".join(agreements))
    print(without_trl or trl_dpo.PATCHED)


if __name__ == "__main__":
    main()
