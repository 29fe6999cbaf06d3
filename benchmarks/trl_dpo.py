"""The decoder of a Kokanee as a stock Qwen2, and a step of TRL's DPOTrainer on it, at its fastest.

With stored references TRL takes prompts of text only. It has no place for a third answer: its cross-entropy is one
more pass, through TRL's own fused head, with a backward pass of its own, so that no more is kept than must be.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM

from kokanee.model import Kokanee
from kokanee.processor import Sample
from kokanee.prompt import IGNORED
from kokanee.tokenizer import build_tokenizer

VERSION = "1.16.0"
NAME = f"TRL {VERSION} DPOTrainer, stored reference, and a pass"
PATCHED = "On a CPU TRL is patched to score answers alone, as it does on a GPU; as it is, it scores prompts too."
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def missing() -> str | None:
    """Why TRL is left out, and what helps; None where it can be measured."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "not installed"
    if found == VERSION:
        return None
    return f"TRL is left out: {found}, {VERSION} is wanted. pip install -c constraints.txt trl=={VERSION}"


def as_qwen2(model: Kokanee) -> Qwen2ForCausalLM:
    """The decoder and head of `model`, without its adapter: the same tensors, no copies."""
    text = model.config.text_config
    rope = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
    config = Qwen2Config(**{name: getattr(text, name) for name in SIZES}, rope_parameters=rope)
    with torch.device("meta"):
        stock = Qwen2ForCausalLM(config)
    weights = {
        name.replace("language_model.", "model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if name.startswith(("language_model.", "lm_head.")) and "lora_" not in name
    }
    stock.load_state_dict(weights, assign=True)
    stock.model.rotary_emb = type(stock.model.rotary_emb)(config).to(model.device)  # its table is no weight
    return stock


def trainer_of(model: Kokanee, lora: LoraConfig, chosen: Sample, rejected: Sample) -> Any:
    """A trainer on the one pair, two batches of one that share their prompt, with the reference's scores stored."""
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()

    class AsPrepared(trl.DPOTrainer):
        """Takes ids instead of text."""

        def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
            return dataset

    settings = trl.DPOConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "kokanee-trl"),
        use_cpu=model.device.type == "cpu",
        bf16=False,  # the weights have their type already
        gradient_checkpointing=model.language_model.gradient_checkpointing,
        precompute_ref_log_probs=True,
        max_length=None,
        per_device_train_batch_size=1,
        report_to="none",
    )
    prompt = int((chosen["labels"] == IGNORED).sum())
    row = {
        "prompt_ids": chosen["input_ids"][0, :prompt].tolist(),
        "chosen_ids": chosen["input_ids"][0, prompt:].tolist(),
        "rejected_ids": rejected["input_ids"][0, prompt:].tolist(),
    }
    return AsPrepared(
        as_qwen2(model),
        args=settings,
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=build_tokenizer([], 264),
        peft_config=lora,
    )


def trl_step(
    model: Kokanee, lora: LoraConfig, adapter: Mapping[str, torch.Tensor], samples: list[Sample], gt_weight: float
) -> tuple[Callable[[], torch.Tensor], torch.nn.Module]:
    """A step on chosen, rejected and ground truth (batches of one), which returns the loss after the backward pass,
    and the model with its adapter, whose weights are those of `adapter`, by the ends of their names."""
    if model.device.type == "cpu":
        importlib.import_module("trl.trainer.utils").__dict__["_use_triton"] = lambda device: True
    chosen, rejected, truth = samples
    trainer = trainer_of(model, lora, chosen, rejected)
    stock = trainer.model
    for name, weight in stock.named_parameters():
        if "lora_" in name:
            weight.data.copy_(adapter[name[name.index("layers.") :]])
    if model.language_model.gradient_checkpointing:
        stock.gradient_checkpointing_enable()
    stock.train()
    pair = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def step() -> torch.Tensor:
        preference = trainer.compute_loss(stock, pair)
        preference.backward()
        entropy = gt_weight * stock(input_ids=truth["input_ids"], labels=truth["labels"], fused_lm_head=True).loss
        entropy.backward()
        return (preference + entropy).detach()

    return step, stock
