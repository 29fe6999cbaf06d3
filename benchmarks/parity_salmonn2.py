"""Parity with the published video-SALMONN 2 of the first paper, as `parity.py` has it with video-SALMONN 2+.

    python benchmarks/parity_salmonn2.py --golden FOLDER [--attention eager] [--out docs/parity-salmonn2.md]

FOLDER holds numbers that the published code produced (see tests/golden/salmonn2/README.md). The full set has more than
the part that is kept with the tests; quantities that FOLDER lacks are left out of the table.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from golden import Golden as PlusGolden
from golden import Tensors
from kokanee import checkpoints
from kokanee.layout import Block
from kokanee.losses import answer_log_probs, dpo
from kokanee.prefix import branch_attention_in, collate_packed, pack, packed_log_probs
from kokanee.prompt import IGNORED, published_turns
from kokanee.published import our_key
from kokanee.salmonn2 import Salmonn2, segment_positions
from kokanee.salmonn2_prompt import FramePromptWriter, Salmonn2Processor, spread_sound
from kokanee.sampling import Sampling, length_s, sample_indices
from parity import Measured, compare, gradient_rows, largest, named_grads, table

PLACEHOLDER = -200
FORMS = {"chosen": "gpt", "reject_gpt": "reject_gpt", "gt": "gt"}
OTHER_PROMPTS = (
    "sft_second_tag_becomes_text",
    "sft_special_token_text_is_parsed",
    "test_prompt_with_prefix",
    "dpo_history_turn",
    "dpo_without_gt",
)
"""What Kokanee writes in another way on purpose, or does not know."""


class Golden(PlusGolden):
    """A folder of golden data, with the model and the processor made from its checkpoint."""

    model: Salmonn2
    processor: Salmonn2Processor

    def __init__(self, folder: Path, attention: str = "sdpa") -> None:
        super().__init__(folder, attention)
        assert isinstance(self.model, Salmonn2) and isinstance(self.processor, Salmonn2Processor)
        self.inputs, self.fusion = self.tensors("inputs.safetensors"), self.tensors("fusion.safetensors")

    def pixels(self, frames: list[int]) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Our pixels of some of the frames."""
        pictures = [self.inputs["frames_uint8"][number].numpy() for number in frames]
        return self.processor.pixels([self.processor.fit(picture, len(frames)) for picture in pictures])[0]

    def mel(self, name: str) -> torch.Tensor | None:
        """Mel features (C, M, F) of a waveform; kept without the constant that fills its last chunk."""
        stored = self.inputs.get(name)
        if stored is None:
            return None
        full = stored.new_full((*stored.shape[:2], 3000), stored[-1, 0, -1].item())
        full[:, :, : stored.shape[2]] = stored
        return full.float()

    def sample(self, case: dict[str, Any], turns: list[dict[str, str]]) -> tuple[Tensors, Tensors] | None:
        """Text and media of a case, of a conversation; None where the folder lacks its sound."""
        frames, heard = case["frames"], case["modality"] != "video" and bool(case["mel"])
        mel = self.mel(case["mel"]) if heard else None
        if heard and mel is None:
            return None
        chunks = 0 if mel is None else case.get("segments_used", case.get("segments", len(mel)))
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        block, media = Block("audio", n_audio_tokens=60 * chunks) if chunks else None, {}
        if frames:
            grid = (len(frames), side, side)
            block = Block("video", grid, case["real_time"] / len(frames), 60 * chunks)
            media = {"pixel_values_videos": self.pixels(frames), "video_grid_thw": torch.tensor([grid])}
        assert block is not None
        if mel is not None:
            media |= {"input_features": mel[:chunks]} | self.processor.placed_sound(block)
        writer = self.processor.writer
        assert isinstance(writer, FramePromptWriter)
        writer.time_tokens = case["add_time_token"]
        text = self.processor.prepare_ids(published_turns(turns), [block])
        return {name: value[:, None] if name == "position_ids" else value[None] for name, value in text.items()}, media


def input_rows(golden: Golden) -> Iterator[Measured]:
    """Frames, mel features and pixels."""
    cases = [case for case in golden.read("frames.json").get("cases", []) if not case["error"]]
    if cases:
        differ = sum(map(frames_differ, cases))
        yield Measured("frames, pixels, sound", f"frame indices, length ({len(cases)} clips)", differ, 0, "cases")
    stored = golden.inputs.get("mel_fp32_first_200_frames.short")
    if stored is not None:
        used = golden.read("inputs.json")["clips"]["short"]["samples_used"]
        waveform = golden.inputs["waveform_int16.short"][:used].numpy().astype(np.float32) / 32768
        difference = largest(golden.processor.features(waveform)[:, :, : stored.shape[2]], stored)
        yield Measured("frames, pixels, sound", "log-mel features, short", difference, 1e-4)
    stored = golden.inputs["pixel_values"]
    yield Measured("frames, pixels, sound", "pixels", largest(golden.pixels(list(range(len(stored)))), stored), 1e-6)


def frames_differ(case: dict[str, Any]) -> bool:
    """Whether our frames or the length of the clip differ from the published."""
    sampling = Sampling("salmonn2", 1 / case["video_fps"], 1, round(case["max_time"] * case["video_fps"]))
    interval = case.get("timestamps") or (None, None)
    indices = sample_indices(case["total_frames"], case["avg_fps"], sampling, *interval)
    length = length_s(case["total_frames"], case["avg_fps"], sampling, *interval)
    return indices != case["frame_indices"] or length != case["real_time"]


def prompt_rows(golden: Golden) -> Iterator[Measured]:
    """Prompts with their answers, token by token, and the stretching of sound."""
    differ, compared = 0, 0
    for case in golden.read("prompt_assembly.json")["cases"]:
        for form in () if case["name"] in OTHER_PROMPTS else FORMS:
            if case.get(form) is not None:
                compared += 1
                differ += prompt_differs(golden, case, form)
    yield Measured("prompt", f"tokens of {compared} conversations", differ, 0, "cases")
    rows = golden.read("fusion.json")["nearest_index_table"]
    differ = sum(sources(row["tokens"], row["frames"]) != row["source_index"] for row in rows)
    yield Measured("prompt", f"sound stretched over frames ({len(rows)} lengths)", differ, 0, "cases")


def prompt_differs(golden: Golden, case: dict[str, Any], form: str) -> bool:
    """Whether our prompt with one kind of answers is another than the published, or an answer not learnt to its end."""
    turns, kinds = case["conversation"], {turn["from"] for turn in case["conversation"]}
    answer = FORMS[form] if "reject_gpt" in kinds else "gpt"  # without a rejected one all forms are the chosen one
    if case["test_mode"] and form == "chosen":
        turns = turns[:-1]
    asked = published_turns(turns, answer) if case["has_media"] else plain(turns, answer)
    made = golden.processor.prepare_ids(asked, [Block("audio", n_audio_tokens=1)] if case["has_media"] else [])
    placed = made["input_ids"] == golden.processor.rules.audio_id
    end = golden.processor.writer.turn_end if asked[-1].role == "assistant" else np.empty(0)
    learnt = made["labels"][len(placed) - len(end) :].tolist() == end.tolist()
    return made["input_ids"].masked_fill(placed, PLACEHOLDER).tolist() != case[form]["input_ids"] or not learnt


def plain(turns: list[dict[str, str]], answer: str) -> list[Any]:
    """The turns of a conversation without media: what stands for media in it is text."""
    marked = [{**turn, "value": turn["value"].replace("<image>", "\0")} for turn in turns]
    found = published_turns(marked, answer)
    return [type(turn)(turn.role, turn.text.replace("\0", "<image>")) for turn in found]


def sources(n_tokens: int, n_frames: int) -> list[int]:
    """Which audio token stands at each place among the frames of a clip that is long enough for all of them."""
    repeats = spread_sound(n_tokens, n_frames, n_tokens).repeats
    return np.repeat(np.arange(n_tokens), repeats).tolist()


@torch.no_grad()
def encoder_rows(golden: Golden) -> Iterator[Measured]:
    """Audio tokens, positions of chunks, visual tokens, and whole sequences of embeddings."""
    for name in ("short", "mid", "long"):
        mel = golden.mel(f"mel.{name}")
        if mel is not None:
            tokens, stored = golden.model.encode_audio(mel), golden.fusion[f"audio.{name}.tokens"]
            yield Measured("encoders", f"audio tokens, {name}", largest(tokens, stored), 1e-5)
    stored = golden.fusion["segment_positions"]
    positions = segment_positions(torch.arange(len(stored)), stored.shape[1])
    yield Measured("encoders", "positions of chunks", largest(positions, stored), 1e-6)
    real = golden.fusion.get("patches27.vision_tower_out")
    if real is not None:
        pooled = golden.model.visual.pool(real.float()).flatten(1, 2)
        stored = golden.fusion["patches27.visual_tokens"]
        yield Measured("encoders", "pooled patches of 27 x 27", largest(pooled, stored), 1e-5)
    turns = golden.read("forward.json")["cases"][0]["conversation"]
    for case in golden.read("fusion.json")["cases"]:
        stored = golden.fusion.get(f"{case['tensors_of']}.inputs_embeds")
        made = None if stored is None else golden.sample(case, turns)
        if made is not None and stored is not None:
            text, media = made
            embeds = golden.model.embed(text["input_ids"], **media)
            yield Measured("fusion", f"embeddings, {case['name']}", largest(embeds, stored), 1e-5)


@torch.no_grad()
def forward_rows(golden: Golden) -> Iterator[Measured]:
    """Logits and losses (on the published labels, which count tokens around turns too)."""
    stored = golden.tensors("forward.safetensors")
    for case in golden.read("forward.json")["cases"]:
        made = golden.sample(case, case["conversation"])
        if made is not None:
            name, (text, media) = case["name"], made
            labels = stored[f"{name}.expanded_labels"]
            output = golden.model(**text | {"labels": labels}, **media, logits_to_keep=0)
            picked = stored.get(f"{name}.logit_positions", torch.arange(labels.shape[1]))
            found = largest(output.logits[:, picked], stored[f"{name}.logits"])
            yield Measured("forward", f"logits, {name}", found, 1e-4)
            yield Measured("forward", f"loss, {name}", abs(output.loss.item() - case["loss"]), 1e-4)


@torch.no_grad()
def generation_rows(golden: Golden) -> Iterator[Measured]:
    """Greedy tokens."""
    asked = {case["name"]: case["conversation"][:1] for case in golden.read("forward.json")["cases"]}
    for case in golden.read("generate.json")["cases"]:
        made = golden.sample(case, asked[case["name"]])
        if made is not None:
            text, media = made
            ids, theirs = text["input_ids"], case["generated_ids"]
            known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": text["position_ids"]}
            golden.model.generation_config.eos_token_id = None  # as there, to have all of them
            made_ids = golden.model.generate(**known, **media, do_sample=False, max_new_tokens=len(theirs))
            ours = made_ids[0, ids.shape[1] :].tolist()
            differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
            yield Measured("generation", f"greedy tokens, {case['name']}", differ, 0, "tokens")


def gdpo_rows(golden: Golden) -> Iterator[Measured]:
    """Adapter, log-probabilities, losses and gradients, all from one packed pass.

    The published labels count tokens around turns, which do not depend on the answer: they are left out of the
    log-probabilities of answers, where they cancel, and put into the ground truth's cross-entropy, where they do not.
    """
    known = golden.read("gdpo/gdpo.json")
    turns = known["sample"]["conversation"]
    adapted = checkpoints.load_adapter(golden.model, golden.folder / "gdpo" / "adapter", trained=True)
    model: Any = adapted.base_model.model
    stored = golden.tensors("gdpo/grads_other_trainable.safetensors")
    others = {our_key(name): value for name, value in stored.items()}
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name or name in others)
    answers = [turn["from"] for turn in turns[1:]]
    forms = [golden.sample(known["sample"], [turns[0], {**turns[number], "from": "gpt"}]) for number in (1, 2, 3)]
    texts = [form[0] for form in forms if form is not None]
    assert answers == ["gpt", "reject_gpt", "gt"] and len(texts) == 3 and forms[0] is not None
    media = forms[0][1]
    flat = [
        {name: value[:, 0] if name == "position_ids" else value[0] for name, value in text.items()} for text in texts
    ]
    start = int((flat[0]["labels"] != IGNORED).nonzero()[0]) - 1
    batch = collate_packed([pack(flat, start)], golden.processor.pad_id)
    with branch_attention_in(model):
        found, _, branches = packed_log_probs(model, batch, **media)
        with torch.no_grad(), adapted.disable_adapter():
            before, _, _ = packed_log_probs(model, batch, **media)
        for who, ours in (("policy", found), ("reference", before)):
            for branch, name in ((1, "chosen"), (2, "rejected")):
                theirs = torch.tensor(known["per_token"][f"{who}_{name}"]["logps"])
                mine = ours[branches == branch]
                difference = largest(mine, theirs[-len(mine) :])
                yield Measured("gDPO, packed", f"log-probabilities of tokens, {who}, {name}", difference, 2e-4)
        both = [answer_log_probs(ours, branches - 1, 3)[None, :2] for ours in (found, before)]
        preference = dpo(*both, beta=known["beta"])
        yield Measured("gDPO, packed", "dpo loss", abs(preference.loss_P.item() - known["dpo_loss"]), 1e-4)
        margin = (preference.rewards_P2[0, 0] - preference.rewards_P2[0, 1]).item()
        yield Measured("gDPO, packed", "margin of rewards", abs(margin - known["reward_margin"]), 1e-4)
    yield from ground_truth_rows(golden, adapted, preference.loss_P.mean(), texts[2], media, others)


def ground_truth_rows(
    golden: Golden, adapted: Any, preference: torch.Tensor, text: Tensors, media: Tensors, others: Tensors
) -> Iterator[Measured]:
    """Cross-entropy of the ground truth on the published labels, the whole loss, and its gradients."""
    known = golden.read("gdpo/gdpo.json")
    labels = expanded(golden.tensors("gdpo/inputs.safetensors")["gt.labels"], text["input_ids"], golden)
    loss = adapted(**text | {"labels": labels}, **media).loss
    total = preference + known["ce_loss_weight"] * loss
    yield Measured("gDPO", "ce loss of the ground truth", abs(loss.item() - known["ce_loss_gt"]), 1e-4)
    yield Measured("gDPO", "total loss", abs(total.item() - known["total_loss"]), 1e-4)
    adapted.zero_grad()
    total.backward()
    grads = named_grads(adapted)
    lora = golden.tensors("gdpo/grads_lora.safetensors")
    lora = {key.replace("model.model.layers", "model.language_model.layers"): value for key, value in lora.items()}
    yield from gradient_rows("gDPO, adapter", {key.replace(".default", ""): grad for key, grad in grads.items()}, lora)
    bare = {key.removeprefix("base_model.model."): grad for key, grad in grads.items()}
    yield from gradient_rows("gDPO, projection, newline, Q-Former", bare, others)


def expanded(labels_1L: torch.Tensor, ids_1L: torch.Tensor, golden: Golden) -> torch.Tensor:
    """Published labels, in which media take one place, at the places of our prompt."""
    rules = golden.processor.rules
    placed = (ids_1L[0] == rules.video_id) | (ids_1L[0] == rules.audio_id)
    labels = torch.full_like(ids_1L, IGNORED)
    first = int(placed.nonzero()[0])
    stored = labels_1L[0]
    labels[0, ~placed] = torch.cat([stored[:first], stored[first + 1 :]])
    return labels


GROUPS: dict[str, Callable[[Golden], Iterator[Measured]]] = {
    "inputs": input_rows,
    "prompt": prompt_rows,
    "encoders": encoder_rows,
    "forward": forward_rows,
    "generation": generation_rows,
    "gdpo": gdpo_rows,
}


def measure(folder: Path, group: str, attention: str = "sdpa") -> list[Measured]:
    """The rows of one group of `GROUPS`, measured with a freshly loaded model."""
    return list(GROUPS[group](Golden(folder, attention)))


def page(rows: list[Measured], attention: str) -> str:
    """docs/parity-salmonn2.md."""
    passed = sum(row.passed for row in rows)
    return f"""# Parity with the published video-SALMONN 2

{passed} of {len(rows)} quantities agree within their limits. The numbers on the other side were produced once with the
published code of the first paper (transformers 4.39.2, float32, plain attention) and a tiny model of random weights;
they are described in `tests/golden/salmonn2/README.md`. A part of them is kept with the tests and checked by
`tests/test_parity.py`.

Measured with torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__} on
{platform.machine()}, one thread, float32, attention `{attention}`, by

    python benchmarks/parity_salmonn2.py --golden FOLDER --attention {attention}

{table(rows)}

What is other here, on purpose

- The loss of training is on answers alone. The published code also learns the tokens around the turns of system and
  user; in a preference they cancel. The rows above count what it counts.
- On files an adapter of the language model is trained. The published scripts also train projection, newline, Q-Former
  and the layers behind it (the rows of their gradients show that this could be done).
- The string of a special token in a text is text. Images are refused, and so is a second medium in a turn, which is
  text there.
- The reference of a preference is the model as it was, without dropout.
- A clip in which less than two frames are shown is refused there. Here its sound, if it has any, is heard alone, and a
  note says so.
- Sequences are not cut at 32,768 tokens; a note says that the model knows fewer positions.
"""


def main() -> None:
    compare((__doc__ or "").splitlines()[0], "salmonn2", "docs/parity-salmonn2.md", GROUPS, measure, page)


if __name__ == "__main__":
    main()
