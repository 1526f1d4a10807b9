"""Every command of docs/data.md and docs/training.md, in their order, on small data and models.

The commands are taken from the pages. What is changed is said here and nowhere else: a training command gets a toy
student and teacher, and few small steps; so does one that caches a teacher.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grace_vlm.cli import main as cli

ROOT = Path(__file__).parents[2]
COLLECTIONS = ("coco/train2017", "gqa/images", "vg/VG_100K", "web-celebrity/images", "llava/llava_pretrain/images")
SMALL = ["model.teacher=toy:tiny", "optim.num_steps=3", "data.accumulation=2", "data.workers=0",
         "runtime.checkpoint_every_steps=1", "data.max_bad_fraction=0.5"]  # fmt: skip


def commands(page: str) -> list[str]:
    """The lines of the page's ```bash blocks."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]


def write_world(folder: Path) -> None:
    """``data/`` as ShareGPT4V's page lays it out, with few small pictures, and one of them missing."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(30):
        place = COLLECTIONS[number % len(COLLECTIONS)]
        name = f"{place}/{number // 2:06d}.jpg"
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (128, 160, 3), dtype=np.uint8)).save(path, quality=60)
        colour = rng.choice(["red", "green", "blue"])
        turns = [{"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": f"{number // 3}", "image": name, "conversations": turns})
    text_only = [{"from": "human", "value": "is red a color?"}, {"from": "gpt", "value": "yes"}]
    rows.append({"id": "words", "conversations": text_only})
    (folder / "data" / "sharegpt4v").mkdir()
    mix = "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"
    (folder / "data" / "sharegpt4v" / mix).write_text(json.dumps(rows))
    (folder / "data" / "llava_v1_5_mix665k.json").write_text(json.dumps(rows[3:]))
    (folder / "data" / rows[7]["image"]).unlink()
    kept = [row for row in rows if row.get("image") not in (None, rows[7]["image"])]
    questions = [{**row, "id": f"q{number}"} for number, row in enumerate(kept[:6])]
    (folder / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    llava = [row for row in rows[3:] if row.get("image") != rows[7]["image"]]
    (folder / "data" / "llava_v1_5_mix665k.json").write_text(json.dumps(llava))
    shutil.copytree(ROOT / "recipes", folder / "recipes")


def write_parquet(folder: Path) -> None:
    """A Hugging Face data set of the same columns, pictures inside."""
    import datasets

    data = folder / "data"
    rows = json.loads((data / "llava_v1_5_mix665k.json").read_text())[:5]
    columns = {
        "id": [f"hub{number}" for number in range(len(rows))],
        "image": [{"bytes": (data / row["image"]).read_bytes(), "path": None} for row in rows],
        "conversations": [row["conversations"] for row in rows],
    }
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    (data / "parquet").mkdir()
    made.to_parquet(str(data / "parquet" / "train-00000-of-00001.parquet"))


def run(line: str) -> int:
    words = shlex.split(line)
    assert words.pop(0) == "grace", line
    if words[0] in ("train", "teacher") and ("--dry-run" not in words or words[0] == "teacher"):
        added = [item for item in SMALL if not any(word.startswith(item.partition("=")[0] + "=") for word in words)]
        if words[1].endswith("_bf16.yaml"):
            added.append("model.student=toy:tiny")
        words += added
    try:
        code = cli.app(words, standalone_mode=False)
    except SystemExit as stop:
        code = stop.code
    return code if isinstance(code, int) else 0


def test_the_pages_from_download_to_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    data, training = commands("data.md"), commands("training.md")
    assert len(data) >= 4
    assert len(training) >= 10
    for line in data:
        if line.startswith("grace data prepare hf"):
            pytest.importorskip("datasets")
            write_parquet(tmp_path)
        assert run(line) == 0, line
    rows = (tmp_path / "data/sharegpt4v_mix665k/train.jsonl").read_text().splitlines()
    assert len(rows) == 31 - 1, "the row whose picture is missing was left out"
    for line in training:
        assert run(line) == 0, line
    assert (tmp_path / "runs/packed/config.json").is_file()
    assert (tmp_path / "runs/qwen3_vl_2b_grace_w4g128/final/grid/plan.json").is_file()
    assert (tmp_path / "runs/try/final/grid").is_dir()
    assert (tmp_path / "runs/teacher-cache/cache.json").is_file()
    assert (tmp_path / "runs/from_cache/final/grid").is_dir()
