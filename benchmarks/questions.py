"""Time of the log-probabilities of options, for three questions about one prompt: Kokanee's packing and other ways.

    python benchmarks/questions.py [--repeats 5] [--prompts 1024 4096]
    python benchmarks/questions.py --device cuda --size 7b --prompts 8192 30000

Same model, same prompts, of text (the encoders run once in any way). Each question is as long as one with four options
by letter. Kokanee packs the options of all questions behind the prompt (of a short prompt behind each question), `one
pass a question` those of one, and `one pass an option` packs nothing. Before anything is timed all must give the same
log-probabilities.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence

import torch

from kokanee.conversations import shared_length
from kokanee.model import Kokanee
from kokanee.prefix import Sample, branch_attention_in, collate_packed, lengths_of, pack, packed_log_probs
from kokanee.prompt import IGNORED
from kokanee.qa import packs
from measuring import gigaflops, interleaved, machine, product, spread
from random_model import SIZES, Size, config_of, conversation, decoder_macs, make_model

OURS, BY_QUESTION, BY_OPTION = "Kokanee, one pass", "one pass a question", "one pass an option"
WAYS, PRODUCT = (OURS, BY_QUESTION, BY_OPTION), "plain product"
OPTIONS = 4


def samples_of(size: Size, prompt: int, questions: int, length: int) -> list[list[Sample]]:
    """Of each question its options: the prompt, the question's own tokens, and one token, which has the label."""
    found = []
    for number in range(questions):
        sample = conversation(size, prompt, length + 1, media=False, number=number)
        sample["labels"][:-1] = IGNORED
        found.append([])
        for option in range(OPTIONS):
            ids_L, labels_L = sample["input_ids"].clone(), sample["labels"].clone()
            ids_L[-1] = labels_L[-1] = option
            found[-1].append({**sample, "input_ids": ids_L, "labels": labels_L})
    return found


def passes_of(samples: Sequence[Sequence[Sample]], way: str) -> list[list[Sample]]:
    """The packed options of each pass."""
    if way == OURS:
        return [packs(samples)]
    passes = samples if way == BY_QUESTION else [[one] for some in samples for one in some]
    return [[pack(some, shared_length(some))] for some in passes]


@torch.no_grad()
def log_probs(model: Kokanee, packed: Sequence[Sample]) -> torch.Tensor:
    """Of each of these options, which have one label token each, the log-probability."""
    batch = {name: value.to(model.device) for name, value in collate_packed(packed, 0).items()}
    with branch_attention_in(model):
        return packed_log_probs(model, batch)[0]


def work(model: Kokanee, samples: Sequence[Sequence[Sample]], way: str) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([log_probs(model, some) for some in passes_of(samples, way)])


def macs(size: Size, passes: Sequence[Sequence[Sample]]) -> int:
    """Multiply-adds that these passes cannot do without."""
    lengths = [lengths_of(sample["segments"][None])[0] for packed in passes for sample in packed]
    config = config_of(size)
    return sum(decoder_macs(config, prompt, told, len(told), False, spared=True) for prompt, *told in lengths)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096], help="tokens")
    options.add_argument("--questions", type=int, default=3, help="about each prompt")
    options.add_argument("--length", type=int, default=80, help="tokens of a question with its options")
    options.add_argument("--repeats", type=int, default=5)
    chosen = options.parse_args()
    size = SIZES[chosen.size]
    model, text = make_model(size, chosen.device).eval(), config_of(size).text_config
    asked = f"{chosen.questions} questions of {chosen.length} tokens, {OPTIONS} options, {chosen.repeats} rounds"
    print(f"{machine(chosen.device)}; size {chosen.size}, {asked}\n")
    print("| prompt | way | s, median (least to most) | times ours | 10^9 multiply-adds | floor, s |")
    print("|---|---|---|---|---|---|")
    for prompt in chosen.prompts:
        samples = samples_of(size, prompt, chosen.questions, chosen.length)
        works = {way: work(model, samples, way) for way in WAYS}
        told = [way().float() for way in works.values()]
        if size.dtype is torch.float32 and not all(torch.allclose(told[0], one, atol=1e-3) for one in told):
            raise SystemExit("The ways do not give the same log-probabilities.")
        shape = (prompt, text.hidden_size, text.intermediate_size)
        seconds = interleaved(
            {**works, PRODUCT: product(shape, size.dtype, chosen.device)}, chosen.repeats, chosen.device
        )
        speed = gigaflops(math.prod(shape), seconds[PRODUCT])
        for way in WAYS:
            needed = macs(size, passes_of(samples, way))
            ratio = statistics.median(seconds[way]) / statistics.median(seconds[OURS])
            row = f"{spread(seconds[way])} | {ratio:.2f} | {needed / 1e9:.1f} | {2e-9 * needed / speed:.3f}"
            print(f"| {prompt} | {way} | {row} |", flush=True)


if __name__ == "__main__":
    main()
