"""A small MMStar and a small HallusionBench in the real layouts, for the suite's tests."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

NUM_ROWS = 24


def png(number: int) -> bytes:
    """A picture of its own, of one of four sizes."""
    rng = np.random.default_rng(number)
    side = 64 + 32 * (number % 4)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(out, format="PNG")
    return out.getvalue()


def write_mmstar(folder: Path, num_rows: int = NUM_ROWS, broken: int | None = None) -> Path:
    """``MMStar.tsv``; the picture of row ``broken`` is none."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["index", "question", "A", "B", "C", "D", "answer", "category", "l2_category", "image"]
    with (folder / "MMStar.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for number in range(num_rows):
            picture = b"not a picture" if number == broken else png(number // 2)
            writer.writerow({
                "index": number, "question": f"What is number {number}?\nLook well.", "A": "red", "B": "blue",
                "C": f"shape {number}", "D": "none", "answer": "ABCD"[number % 4], "category": f"c{number % 3}",
                "l2_category": f"s{number % 6}", "image": base64.b64encode(picture).decode(),
            })  # fmt: skip
    return folder
