"""Two captioners that need no model, as files for `kokanee score`: one that says nothing, one that copies an annotator.

python benchmarks/controls.py runs/exam runs/controls --every 4

writes empty.jsonl and annotator.jsonl, with --every also of intervals (empty-every4.jsonl, annotator-every4.jsonl). The
annotator's caption of a whole clip is the first one in samples.jsonl; of an interval it is written anew.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from kokanee.captions import Caption, intervals
from kokanee.formats import append_jsonl, read_jsonl
from kokanee.outputs import caption_record
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import exact
from kokanee.world.language import write
from kokanee.world.make import scene_of


def annotated(sample: dict[str, Any], start_s: float, end_s: float) -> str:
    """What an annotator says of a part of a clip."""
    rng = random.Random(f"{sample['file']}/{start_s}")
    return write(annotate(exact(scene_of(sample), start_s, end_s), Bias(), rng), rng)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("clips", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--every", type=float)
    chosen = options.parse_args()
    for every_s in dict.fromkeys((None, chosen.every)):
        files: dict[str, list[dict[str, Any]]] = {"empty": [], "annotator": []}
        for sample in read_jsonl(chosen.clips / "samples.jsonl"):
            whole = (0.0, sample["duration_s"])
            parts = [whole] if every_s is None else intervals(0.0, sample["duration_s"], every_s)
            said = [sample["captions_annotated"][0] if every_s is None else annotated(sample, *part) for part in parts]
            for name, texts in (("empty", [""] * len(parts)), ("annotator", said)):
                captions = [Caption(text, *part) for text, part in zip(texts, parts, strict=True)]
                path = chosen.clips / sample["file"]
                files[name].append(caption_record(path, name, "", {"every_s": every_s}, captions))
        for name, records in files.items():
            place = chosen.out / (name + ("" if every_s is None else f"-every{every_s:g}") + ".jsonl")
            place.unlink(missing_ok=True)
            append_jsonl(place, records)
            print(place)


if __name__ == "__main__":
    main()
