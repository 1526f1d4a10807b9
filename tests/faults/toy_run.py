"""A training run small enough to be killed forty times: two tiny models, 24 rows, every step saved."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black")


def write_rows(folder: Path, num_rows: int = 24, seed: int = 0) -> Path:
    """Pictures of one coloured square and a question each; returns the file of rows."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(num_rows):
        colour = rng.choice(COLOURS)
        image = Image.new("RGB", (128, 128), "white")
        left, top = rng.randrange(64), rng.randrange(64)
        ImageDraw.Draw(image).rectangle((left, top, left + 48, top + 48), fill=colour)
        image.save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat color is the square?"}, {"from": "gpt", "value": colour}]
        lines.append(json.dumps({"id": f"r{number}", "image": f"images/{number}.png", "conversations": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_models(folder: Path) -> None:
    """``teacher`` and ``student``: two random starts of the tiny size with one tokenizer."""
    from grace_vlm.formats.publish import publish_model
    from grace_vlm.models.toy import build_toy_model, build_toy_processor

    processor = build_toy_processor(["what color is the square?", *COLOURS] * 3, vocab_size=320)
    for seed, name in enumerate(("teacher", "student")):
        publish_model(folder / name, build_toy_model("tiny", processor, seed), processor, {}, (), "# tiny\n")


def recipe_tree(folder: Path, **overrides: Any) -> dict[str, Any]:
    """A GRACE W4G128 recipe over ``folder``; ``overrides`` replace whole sections' keys, ``section__key=value``."""
    tree: dict[str, Any] = {
        "method": "grace",
        "scheme": "w4g128",
        "model": {"student": str(folder / "student"), "teacher": str(folder / "teacher")},
        "data": {"train": str(folder / "rows.jsonl"), "micro_batch_size": 2, "accumulation": 2, "max_bad_fraction": 0},
        "optim": {"num_steps": 8, "learning_rate": 1e-3, "scale_learning_rate": 1e-2, "warmup_fraction": 0.2},
        "loss": {"relational_warmup_steps": 3, "adaptive_weight": {"target": 1.0, "ema_decay": 0.5}},
        "runtime": {"device": "cpu", "tower_cache_gib": 0.1, "checkpoint_every_steps": 1},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return tree
