"""Pictures of world clips for docs/nano.md: eight frames over the log-mel spectrogram, with truth and caption below.

python benchmarks/nano_pictures.py FOLDER_OF_WORLD_MAKE docs/pictures --clips 0 1 2 [--model nano]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kokanee import Captioner
from kokanee.formats import read_jsonl
from kokanee.media import read_clip
from kokanee.processor import Processor
from kokanee.sampling import Sampling

TILE, TILES, MARGIN, LINE = 112, 8, 8, 15
WIDTH = TILE * TILES + 2 * MARGIN


def spectrogram(processor: Processor, waveform: np.ndarray, width: int, height: int) -> Image.Image:
    """The log-mel features of a waveform as a picture, low frequencies at the bottom."""
    frames = min(len(waveform) // 160, processor.features(waveform).shape[-1])
    mel_MF = processor.features(waveform)[0, :, :frames].numpy()[::-1]
    grey = np.clip((mel_MF - mel_MF.min()) / (np.ptp(mel_MF) + 1e-6), 0, 1)
    colours = np.stack([255 * grey**0.6, 255 * grey**1.6, 90 + 120 * grey * (1 - grey)], axis=-1).astype(np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR)


def paragraph(title: str, text: str) -> list[str]:
    """A titled text in lines that fit the picture."""
    return textwrap.wrap(f"{title}: {text}", width=WIDTH // 7, subsequent_indent="    ")


def picture(path: Path, lines: list[str], processor: Processor) -> Image.Image:
    """Frames, spectrogram and text of one clip."""
    clip = read_clip(path, Sampling("salmonn2plus", 0.25, TILES, 240))
    assert clip.frames is not None and clip.waveform is not None
    chosen = [clip.frames[index] for index in np.linspace(0, len(clip.frames) - 1, TILES, dtype=int)]
    image = Image.new("RGB", (WIDTH, 2 * TILE + 3 * MARGIN + LINE * len(lines) + MARGIN), "white")
    for place, frame in enumerate(chosen):
        image.paste(Image.fromarray(frame).resize((TILE - 2, TILE - 2)), (MARGIN + place * TILE, MARGIN))
    sound = spectrogram(processor, clip.waveform, WIDTH - 2 * MARGIN, TILE)
    image.paste(sound, (MARGIN, TILE + 2 * MARGIN))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for number, line in enumerate(lines):
        draw.text((MARGIN, 2 * TILE + 3 * MARGIN + LINE * number), line, fill="black", font=font)
    return image


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--clips", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--model", default="nano")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    captioner = Captioner.from_pretrained(given.model)
    records = read_jsonl(given.folder / "samples.jsonl")
    for number in given.clips:
        record = records[number]
        caption = captioner.caption(given.folder / record["file"]).text
        lines = paragraph("Exact", record["caption_exact"])
        lines += paragraph("Annotator", record["captions_annotated"][0]) + paragraph("Kokanee", caption)
        target = given.out / f"nano-{number:05d}.png"
        picture(given.folder / record["file"], lines, captioner.processor).save(target, optimize=True)
        print(target, caption, sep="\n")


if __name__ == "__main__":
    main()
