"""Parity with the published video-SALMONN 2+: every golden quantity, our largest difference, and what is tolerated.

    python benchmarks/parity.py --golden FOLDER [--attention eager] [--out docs/parity.md]

FOLDER holds numbers that the published code produced (see tests/golden/salmonn2plus/README.md). The full set has more
than the part that is kept with the tests; quantities that FOLDER lacks are left out of the table.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from golden import CASES, Golden, Tensors
from kokanee import checkpoints
from kokanee.layout import audio_shares
from kokanee.losses import answer_log_probs, dpo, gdpo
from kokanee.model import Kokanee
from kokanee.prefix import branch_attention_in, collate_packed, pack, packed_log_probs
from kokanee.published import our_key
from kokanee.sampling import Sampling, length_s, sample_indices, step_seconds

MODES = {"as_published": "as_published", "training_positions": "trained"}
FLOOR = 1e-6


@dataclass(frozen=True)
class Measured:
    """One row: the largest difference, absolute or relative to the largest entry, and its limit (0: equality)."""

    group: str
    quantity: str
    difference: float
    limit: float
    how: str = "absolute"

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit


def largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of one shape."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return (ours.detach().double() - theirs.double()).abs().max().item()


def input_rows(golden: Golden) -> Iterator[Measured]:
    """Frames, sizes, pixels, mel features."""
    group = "frames, pixels, sound"
    cases = golden.read("frames.json").get("frame_sampling", [])
    if cases:
        yield Measured(
            group, f"frame indices, seconds per step ({len(cases)} clips)", sum(map(frames_differ, cases)), 0, "cases"
        )
    for name in ("av", "video", "image"):
        case = golden.case(name)
        pixels, grid = golden.pixels(name)
        stored = case.get("pixel_values_videos", case.get("pixel_values"))
        if stored is not None:
            yield Measured(group, f"pixel patches, {name}", largest(pixels, stored), 1e-6)
        expected = case.get("video_grid_thw", case.get("image_grid_thw"))
        assert expected is not None
        yield Measured(group, f"grid, {name}", float(grid != expected[0].tolist()), 0, "cases")
    for wave in ("mid", "long"):
        stored, ours = golden.audio.get(f"features.{wave}"), golden.features(wave)
        if stored is not None and ours is not None and stored.shape[-1] == ours.shape[-1]:
            yield Measured(group, f"log-mel features, {wave} (stored in float16)", largest(ours[-1:], stored), 5e-4)


def frames_differ(case: dict) -> bool:
    """Whether our frames, or their seconds per time step, differ from the published."""
    sampling = Sampling("salmonn2plus", case["base_interval"], case["video_min_frames"], case["video_max_frames"])
    indices = sample_indices(case["num_frames"], case["avg_fps"], sampling)
    seconds = length_s(case["num_frames"], case["avg_fps"], sampling)
    theirs = case["torchcodec"]
    step = step_seconds(len(indices), seconds, sampling)
    return indices != theirs["frame_indices"] or step != theirs["second_per_grid_t"]


def prompt_rows(golden: Golden) -> Iterator[Measured]:
    """Shares of audio tokens. Whole prompts are compared token by token in tests/test_prompt.py."""
    splits = golden.read("prompt_assembly.json").get("audio_split", [])
    splits = [split for split in splits if min(split["result"]) >= 0]
    differ = [
        audio_shares(split["count"], split["groups"], split["seconds"]).tolist() != split["result"] for split in splits
    ]
    yield Measured("prompt", f"audio tokens per time step ({len(splits)} splits)", sum(differ), 0, "cases")


@torch.no_grad()
def encoder_rows(golden: Golden) -> Iterator[Measured]:
    """Audio and visual tokens."""
    for wave in ("short", "mid", "exact30", "long"):
        features = golden.features(wave)
        if features is not None:
            tokens = golden.model.audio(features)
            yield Measured("encoders", f"audio tokens, {wave}", largest(tokens, golden.audio[f"tokens.{wave}"]), 1e-4)
    for wave in ("mid", "long"):
        stored = golden.audio.get(f"tokens_from_fp16_features.{wave}")
        if stored is not None:
            tokens = golden.model.audio(golden.audio[f"features.{wave}"].float())
            yield Measured("encoders", f"audio tokens from stored features, {wave}", largest(tokens, stored), 1e-4)
    states = golden.model.audio.encoder(golden.features("mid")).last_hidden_state
    picked = golden.audio.get("encoder_out.mid_positions", torch.arange(states.shape[1]))
    yield Measured(
        "encoders", "Whisper encoder states, mid", largest(states[:, picked], golden.audio["encoder_out.mid"]), 1e-4
    )
    for name in ("av", "video", "image"):
        tokens = golden.model.encode_media(**golden.media(name))["image_embeds" if name == "image" else "video_embeds"]
        yield Measured("encoders", f"visual tokens, {name}", largest(tokens, golden.case(name)["visual_tokens"]), 1e-4)


@torch.no_grad()
def forward_rows(golden: Golden) -> Iterator[Measured]:
    """Logits and losses, case by case and in a padded batch."""
    known = golden.read("forward.json")
    for name in CASES:
        case = golden.case(name)
        output = golden.model(**golden.text(name), **golden.media(name), labels=case["labels"], logits_to_keep=0)
        picked = case.get("logit_positions", torch.arange(output.logits.shape[1]))
        yield Measured("forward", f"logits, {name}", largest(output.logits[:, picked], case["logits"]), 2e-4)
        yield Measured("forward", f"loss, {name}", abs(output.loss.item() - known["cases"][name]["sft_loss"]), 5e-4)
    both = [golden.model.encode_media(**golden.media(name)) for name in ("av", "audio")]
    sound = torch.cat([media["audio_embeds"] for media in both])
    labels = golden.case("batch_av_audio")["labels"]
    batch = golden.model(
        **golden.text("batch_av_audio"), video_embeds=both[0]["video_embeds"], audio_embeds=sound, labels=labels
    )
    yield Measured(
        "forward", "loss, batch of av and audio", abs(batch.loss.item() - known["batch_av_audio"]["sft_loss"]), 5e-4
    )


@torch.no_grad()
def generation_rows(golden: Golden) -> Iterator[Measured]:
    """Greedy tokens in both position modes."""
    for name, known in golden.read("generate.json").items():
        ids = torch.tensor(known["prompt_ids"]).reshape(1, -1)
        for theirs, ours in MODES.items():
            positions = torch.tensor(known[theirs]["prefill_position_ids"]).reshape(3, 1, -1)
            made = golden.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                **golden.media(name),
                max_new_tokens=len(known[theirs]["new_ids"]),
                do_sample=False,
            )
            differ = sum(
                a != b for a, b in zip(made[0, ids.shape[1] :].tolist(), known[theirs]["new_ids"], strict=True)
            )
            yield Measured("generation", f"greedy tokens, {name}, positions {ours}", differ, 0, "tokens")


def gradient_rows(group: str, grads: Tensors, stored: Tensors) -> Iterator[Measured]:
    """Two rows: gradients relative to each tensor's largest entry, and those that are zero but for rounding."""
    relative, absolute = 0.0, 0.0
    for name, theirs in stored.items():
        ours = grads[name][: len(theirs)]
        size = theirs.abs().max().item()
        if size > FLOOR:
            relative = max(relative, largest(ours, theirs) / size)
        else:
            absolute = max(absolute, largest(ours, theirs))
    yield Measured(group, f"gradients ({len(stored)} tensors)", relative, 1e-3, "relative")
    yield Measured(group, "gradients that are zero in exact arithmetic", absolute, FLOOR)


def named_grads(model: Kokanee) -> Tensors:
    """Gradients by our names, and zeros where there are none."""
    return {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in model.named_parameters()}


def training_rows(golden: Golden) -> Iterator[Measured]:
    """Gradients of the cross-entropy of case av."""
    stored = {our_key(key): value for key, value in golden.tensors("sft_grads.safetensors").items()}
    golden.model.zero_grad()
    golden.model(**golden.text("av"), **golden.media("av"), labels=golden.case("av")["labels"]).loss.backward()
    yield from gradient_rows("SFT", named_grads(golden.model), stored)
    golden.model.zero_grad()


def log_probs(model: Any, golden: Golden, sample: Tensors, form: str) -> torch.Tensor:
    """Log-probabilities (K,) of the label tokens of one form of the preference sample: "", "chosen_" or "reject_"."""
    labels = sample[f"{form or ''}labels"]
    logits = model(
        input_ids=sample[f"{form}ids" if form else "input_ids"],
        attention_mask=sample[f"{form}attention_mask"],
        position_ids=sample[f"{form}position_ids"],
        **golden.media("av"),
    ).logits
    counted = labels[:, 1:] != -100
    return logits[:, :-1].log_softmax(-1)[counted].gather(-1, labels[:, 1:][counted][:, None])[:, 0]


def gdpo_rows(golden: Golden) -> Iterator[Measured]:
    """Adapter, log-probabilities, the gDPO loss with its gradients, and the merged weights."""
    known, stored = golden.read("gdpo/golden.json"), golden.tensors("gdpo/golden.safetensors")
    sample = golden.tensors("gdpo/sample.safetensors")
    adapted = checkpoints.load_adapter(golden.model, golden.folder / "gdpo" / "adapter", trained=True)
    modules = golden.tensors("gdpo/modules_grads.safetensors")
    whole = {our_key(key.removeprefix("grad.")): value for key, value in modules.items()}
    for name, weight in golden.model.named_parameters():
        weight.requires_grad_("lora_" in name or name in whole)
    forms = {"chosen": "chosen_", "rejected": "reject_"}
    policy = {name: log_probs(adapted, golden, sample, form) for name, form in forms.items()}
    with torch.no_grad(), adapted.disable_adapter():
        reference = {name: log_probs(adapted, golden, sample, form) for name, form in forms.items()}
    for who, found in (("policy", policy), ("reference", reference)):
        for name in forms:
            theirs = stored[f"{who}_{name}_token_logps"]
            yield Measured("gDPO", f"log-probabilities per token, {who}, {name}", largest(found[name], theirs), 2e-4)
            total = abs(found[name].sum().item() - known[f"{who}_{name}_logp"])
            yield Measured("gDPO", f"log-probability of the answer, {who}, {name}", total, 2e-3)
    rewards = {name: known["dpo_beta"] * (policy[name].sum() - reference[name].sum()) for name in forms}
    dpo = -torch.nn.functional.logsigmoid(rewards["chosen"] - rewards["rejected"])
    cross_entropy = -log_probs(adapted, golden, sample, "").mean()
    total = dpo + known["ce_weight"] * cross_entropy
    found = {"dpo_loss": dpo, "ce_loss": cross_entropy, "total_loss": total}
    found |= {f"{name}_reward": reward for name, reward in rewards.items()}
    for name, value in found.items():
        yield Measured("gDPO", name.replace("_", " "), abs(value.item() - known[name]), 5e-4)
    total.backward()
    grads = named_grads(adapted)  # pyright: ignore[reportArgumentType]
    lora = {key.removeprefix("grad."): value for key, value in stored.items() if key.startswith("grad.")}
    lora = {key.replace("model.model.layers", "model.language_model.layers"): value for key, value in lora.items()}
    ours = {key.replace(".default", ""): value for key, value in grads.items()}
    yield from gradient_rows("gDPO, adapter", ours, lora)
    if whole:
        bare = {key.removeprefix("base_model.model."): value for key, value in grads.items()}
        yield from gradient_rows("gDPO, merger, Q-Former, projection", bare, whole)
    yield from packed_rows(golden, adapted, sample, known, lora)
    yield from merged_rows(golden, checkpoints.merge(adapted))


def packed_rows(golden: Golden, adapted: Any, sample: Tensors, known: dict, lora: Tensors) -> Iterator[Measured]:
    """The gDPO step as Kokanee computes it: `[prompt | chosen | rejected | ground truth]` in one pass."""
    forms = {"chosen_ids": "chosen_", "reject_ids": "reject_", "input_ids": ""}
    answers = [
        {
            "input_ids": sample[ids][0],
            "labels": sample[f"{form}labels"][0],
            "position_ids": sample[f"{form}position_ids"][:, 0],
        }
        for ids, form in forms.items()
    ]
    # One token less: a branch begins with a token that is no label.
    batch = collate_packed([pack(answers, known["sample"]["prompt_length"] - 1)], 0)
    model = adapted.base_model.model
    adapted.zero_grad()
    with branch_attention_in(model):
        log_probs, _, branches = packed_log_probs(model, batch, **golden.media("av"))
        with torch.no_grad(), adapted.disable_adapter():
            reference, _, _ = packed_log_probs(model, batch, **golden.media("av"))
        both = [answer_log_probs(found, branches - 1, 3)[None, :2] for found in (log_probs, reference)]
        preference = dpo(*both, beta=known["dpo_beta"])
        loss = gdpo(preference, log_probs[branches == 3], known["ce_weight"])
        loss.backward()
    for name, found in (("policy", both[0]), ("reference", both[1])):
        theirs = torch.tensor([[known[f"{name}_{answer}_logp"] for answer in ("chosen", "rejected")]])
        yield Measured("gDPO, packed", f"log-probabilities of the answers, {name}", largest(found, theirs), 2e-3)
    theirs = torch.tensor([[known["chosen_reward"], known["rejected_reward"]]])
    yield Measured("gDPO, packed", "rewards", largest(preference.rewards_P2, theirs), 5e-4)
    yield Measured("gDPO, packed", "total loss", abs(loss.item() - known["total_loss"]), 5e-4)
    grads = {key.replace(".default", ""): value for key, value in named_grads(adapted).items()}
    yield from gradient_rows("gDPO, packed", grads, lora)


def merged_rows(golden: Golden, merged: Kokanee) -> Iterator[Measured]:
    """Every merged weight, by hash."""
    weights = dict(merged.named_parameters())
    known = golden.read("gdpo/merged_keys.json")
    hashes = {key: value["sha256"] for key, value in known.items() if our_key(key)}
    differ = [
        key
        for key, value in hashes.items()
        if hashlib.sha256(weights[our_key(key)].detach().numpy().tobytes()).hexdigest() != value
    ]
    yield Measured("gDPO, adapter", f"merged weights, bit for bit ({len(hashes)} tensors)", len(differ), 0, "tensors")


GROUPS: dict[str, Callable[[Golden], Iterator[Measured]]] = {
    "inputs": input_rows,
    "prompt": prompt_rows,
    "encoders": encoder_rows,
    "forward": forward_rows,
    "generation": generation_rows,
    "training": training_rows,
    "gdpo": gdpo_rows,
}


def measure(folder: Path, group: str, attention: str = "sdpa") -> list[Measured]:
    """The rows of one group of `GROUPS`, measured with a freshly loaded model."""
    return list(GROUPS[group](Golden(folder, attention)))


def table(rows: list[Measured]) -> str:
    """The rows as a Markdown table."""
    lines = ["| | quantity | largest difference | limit | |", "|---|---|---|---|---|"]
    for row in rows:
        exact = row.limit == 0
        found = f"{row.difference:g} {row.how}" if exact else f"{row.difference:.1e}"
        limit = (
            "none may differ" if exact else f"{row.limit:.0e}{' of the largest entry' if row.how == 'relative' else ''}"
        )
        lines.append(f"| {row.group} | {row.quantity} | {found} | {limit} | {'ok' if row.passed else '**off**'} |")
    return "\n".join(lines)


def page(rows: list[Measured], attention: str) -> str:
    """docs/parity.md."""
    passed = sum(row.passed for row in rows)
    return f"""# Parity with the published video-SALMONN 2+

{passed} of {len(rows)} quantities agree within their limits. The numbers on the other side were produced once with the
published code (commit 61faec0; transformers 4.51.3, float32, plain attention) and a tiny model of random weights; they
are described in `tests/golden/salmonn2plus/README.md`. A part of them is kept with the tests and checked by
`tests/test_parity.py`. Prompts are compared token by token in `tests/test_prompt.py`, frame and image sizes in
`tests/test_processor.py`.

Measured with torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__} on
{platform.machine()}, one thread, float32, attention `{attention}`, by

    python benchmarks/parity.py --golden FOLDER --attention {attention}

{table(rows)}

Notes

- The visual tower's patch embedding is computed as a matrix product instead of a 3-D convolution (the same numbers,
  added in another order); this is most of the difference in visual tokens.
- A gradient that is zero in exact arithmetic (keys of an attention over one query, biases of keys) is rounding noise on
  both sides; it is compared absolutely.
- Greedy tokens are equal in both position modes: `trained`, and `as_published`, which repeats what the published test
  script does (it forgets the lengths of sound and steps).
"""


def compare(
    description: str,
    model: str,
    docs: str,
    groups: Iterable[str],
    measure: Callable[[Path, str, str], list[Measured]],
    page: Callable[[list[Measured], str], str],
) -> None:
    """The command of a comparison: measure all groups, print the table, and write `docs` where that is asked for."""
    arguments = argparse.ArgumentParser(description=description)
    golden = Path(__file__).parents[1] / "tests" / "golden" / model
    arguments.add_argument("--golden", type=Path, default=golden)
    arguments.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    arguments.add_argument("--out", type=Path, help=f"write {docs} here; without it, print the table")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows = [row for group in groups for row in measure(given.golden, group, given.attention)]
    print(table(rows))
    if given.out:
        unfinished = given.out.with_suffix(".tmp")
        unfinished.write_text(page(rows, given.attention), encoding="utf-8")
        os.replace(unfinished, given.out)
    if not all(row.passed for row in rows):
        raise SystemExit("some quantities are off")


def main() -> None:
    compare((__doc__ or "").splitlines()[0], "salmonn2plus", "docs/parity.md", GROUPS, measure, page)


if __name__ == "__main__":
    main()
