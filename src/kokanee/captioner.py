"""Files -> captions: of a whole clip or of every interval, one or several samples, as text that grows or as records.

captioner = Captioner.from_pretrained("nano")
print(captioner.caption("clip.mp4").text)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from kokanee.captions import Caption, Decoding, FileCaptioner, Medium, Prepared, Request, groups
from kokanee.checkpoints import Type, base_of, load, locate, save
from kokanee.defaults import Defaults, origin
from kokanee.generation import Answer, TextStream, answers, end_ids, steps, text_of
from kokanee.media import Clip
from kokanee.model import Kokanee
from kokanee.processor import Processor
from kokanee.prompt import Turn
from kokanee.weights import Device, fingerprint


class Captioner(FileCaptioner):
    """A model with its processor that captions files; see `FileCaptioner`. `from_pretrained` loads one."""

    def __init__(
        self,
        model: Kokanee,
        processor: Processor,
        defaults: Defaults | None = None,
        name: str = "",
        base: str | None = None,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.defaults = defaults or Defaults()
        self.name, self.base = name, base

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = "nano",
        *,
        device: Device = "auto",
        dtype: Type = None,
        attention: str = "sdpa",
        base: str | Path | None = None,
        **processor_settings: Any,
    ) -> Captioner:
        """Load "nano", a checkpoint's folder, or a model of the hub; see `checkpoints.load`.

        `device` "auto": all accelerators, or the CPU if there is none. `dtype` None: as stored, but float32 on a CPU.
        """
        folder = locate(name_or_folder)
        if device == "auto" and not torch.accelerator.is_available():
            device = "cpu"
        if dtype is None and str(device) == "cpu":
            dtype = torch.float32
        model, processor = load(
            folder, dtype=dtype, device=device, base=base, attention=attention, **processor_settings
        )
        below = base_of(folder, base)
        defaults = Defaults.of(origin(folder, below))
        return cls(model, processor, defaults, str(name_or_folder), None if below is None else str(below))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Kokanee folder with the checkpoint's own question; see `checkpoints.save`."""
        self.defaults.save(save(self.model, self.processor, folder))

    def identity(self) -> dict[str, Any]:
        return {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "base": self.base,
            "weights": fingerprint(self.model),
            "processor": self.processor.config.model_dump(mode="json"),
        }

    def read(self, request: Request) -> Clip:
        return self.processor.read(Path(request.path), request.start_s, request.end_s, request.use)

    def sample(self, medium: Medium, question: str, notes: list[str]) -> Any:
        """The model's input; see processor.py. Notes where it is longer than the positions that the model knows."""
        sample = self.processor.prepare(medium, [Turn("user", question)])
        longest, known = int(sample["position_ids"].max()) + 1, self.model.config.text_config.max_position_embeddings
        if longest > known:
            notes.append(
                f"too long for this model ({longest} positions, it knows {known}); caption shorter parts (--every)"
            )
        return sample

    def answer(self, prepared: Sequence[Prepared], decoding: Decoding, n_samples: int = 1) -> list[list[Caption]]:
        """As the frame says; all come from one prefill."""
        if not prepared:
            return []
        batch = self.processor.collate([part.sample for part in prepared], padding_side="left")
        found = answers(self.model, batch, decoding, n_samples, [part.key for part in prepared])
        rows = groups(found, n_samples)
        return [
            [self.made(part, answer, decoding, sample) for sample, answer in enumerate(row)]
            for part, row in zip(prepared, rows, strict=True)
        ]

    def made(self, part: Prepared, answer: Answer, decoding: Decoding, sample: int = 0) -> Caption:
        """The caption that an answer is."""
        return Caption(
            text=text_of(self.processor.tokenizer, answer.ids),
            start_s=part.start_s,
            end_s=part.end_s,
            sample=sample,
            seed=decoding.seed if decoding.temperature else None,
            n_tokens=len(answer.ids),
            finished=answer.finished,
            notes=part.notes,
        )

    def growing(self, part: Prepared, decoding: Decoding) -> Generator[str, None, Caption]:
        batch = self.processor.collate([part.sample], padding_side="left")
        text, answer, ends = TextStream(self.processor.tokenizer), Answer(), end_ids(self.model)
        for (token,) in steps(self.model, batch, decoding, keys=[part.key]):
            if token in ends:
                answer.finished = True
            else:
                answer.ids.append(token)
                if piece := text.add(token):
                    yield piece
        if piece := text.end():
            yield piece
        return self.made(part, answer, decoding)
