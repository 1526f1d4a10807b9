"""How many tokens a second one CPU core prepares: read, decode, resize, patchify, tokenize, pack.

    pip download --no-deps scikit-learn -d wheels && unzip -j wheels/scikit_learn-*.whl '*/china.jpg' '*/flower.jpg' -d photos
    python benchmarks/bench_loader.py --photos photos --out benchmarks/results/loader.csv

The rows show photographs of 640 x 480 (crops and mirrors of those in ``--photos``, JPEG quality 90) under the published
limit of 200,704 pixels, with a question of 40 words and an answer of 200; a word is one token of four characters, as
English is to a real tokenizer. ``profile`` says where the time of one core goes.
"""  # noqa: E501 - a command

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_true_size import WORDS, machine
from PIL import Image, ImageOps

from grace_vlm.data.encode import Encoder
from grace_vlm.data.ledger import Ledger
from grace_vlm.data.loader import TrainLoader
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.reader import Preparer, RowReader
from grace_vlm.data.rows import Row, RowFile
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

SIZE = (640, 480)
PACK_TOKENS = 8192


def write_rows(photos: Path, folder: Path, num_rows: int) -> Path:
    """Rows with one photograph each, no two alike."""
    rng = random.Random(0)
    sources = [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))]
    if not sources:
        raise SystemExit(f"{photos} has no .jpg; see the head of this file")
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(num_rows):
        source = sources[number % len(sources)]
        left, top = (rng.randrange(max(1, side // 8)) for side in source.size)
        crop = source.crop((left, top, source.width - rng.randrange(max(1, source.width // 8)), source.height))
        crop = ImageOps.mirror(crop) if rng.random() < 0.5 else crop
        crop.resize(SIZE, Image.Resampling.LANCZOS).save(folder / "images" / f"{number}.jpg", quality=90)
        question, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (40, 200))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"id": str(number), "image": f"images/{number}.jpg", "conversations": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_loader(rows: RowFile, family: str, workers: int, folder: Path, dtype: torch.dtype) -> TrainLoader:
    texts = (turn.text for row in rows for turn in getattr(row, "turns", ()))
    size = {"qwen3_vl": "tiny"}.get(family, family)
    processor = build_toy_processor(texts, size=size, side=336)
    config = build_toy_model(size, processor).config
    adapter = adapter_for(config.model_type)
    limits = (None, None) if family == "llava" else (784, 200704)
    pictures = PictureStore(patchify_of(adapter, config, processor, *limits), dtype=dtype)
    preparer = Preparer(rows, Encoder(processor, adapter, config), pictures, max_tokens=PACK_TOKENS)
    reader = RowReader(preparer, Ledger(folder / f"ledger-{family}-{workers}.jsonl"), 0.0)
    return TrainLoader(reader, 64, 0, packed=True, max_batch_tokens=PACK_TOKENS, num_workers=workers)


def measure(loader: TrainLoader, num_rows: int) -> tuple[float, int]:
    """(tokens a second, rows) over about ``num_rows`` rows, after a first batch that is not counted."""
    loader.next()
    tokens = rows = 0
    started = time.perf_counter()
    while rows < num_rows:
        batch = loader.next()
        tokens, rows = tokens + batch.num_tokens, rows + len(batch.sample_ids)
    return tokens / (time.perf_counter() - started), rows


def profile(loader: TrainLoader, num_rows: int) -> dict[str, float]:
    """Milliseconds a row of each part, on this core."""
    preparer = loader.reader.preparer
    parts = dict.fromkeys(("parse", "decode", "patchify", "encode"), 0.0)

    def timed(part: str, function: Any, *args: Any) -> Any:
        started = time.perf_counter()
        result = function(*args)
        parts[part] += time.perf_counter() - started
        return result

    for index in range(num_rows):
        row = timed("parse", preparer.rows.row, index)
        assert isinstance(row, Row)
        loaded = timed("decode", preparer.rows.load_image, row, row.images[0])
        picture = timed("patchify", preparer.pictures.add, row.images[0], loaded)
        timed("encode", preparer.encoder.encode, row, [picture.grid])
    return {part: 1000 * seconds / num_rows for part, seconds in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = RowFile(write_rows(args.photos, folder / "data", args.rows))
        for family in ("qwen3_vl", "qwen2_vl", "llava"):
            for workers in args.workers:
                loader = make_loader(rows, family, workers, folder, torch.bfloat16)
                rate, counted = measure(loader, args.rows * max(1, workers))
                parts = profile(loader, min(100, args.rows)) if workers == 0 else {}
                loader.close()
                lines.append(
                    {
                        "family": family,
                        "workers": workers,
                        "tokens_per_second": f"{rate:.0f}",
                        "tokens_per_second_per_core": f"{rate / max(1, workers):.0f}",
                        "rows": counted,
                        **{f"{part}_ms": f"{parts.get(part, float('nan')):.2f}" for part in
                           ("parse", "decode", "patchify", "encode")},
                        **machine(),
                    }
                )  # fmt: skip
                print(lines[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
