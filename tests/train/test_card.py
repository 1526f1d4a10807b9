"""The model card says what the run was, and whose licence holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.quant.plan import QuantPlan
from grace_vlm.train.card import base_licence, model_card
from grace_vlm.train.config import Recipe, recipe_from
from grace_vlm.train.loop import train
from grace_vlm.train.record import read_metrics


def recipe(folder: Path, **overrides: Any) -> Recipe:
    return recipe_from(recipe_tree(folder, **overrides), "test")


def with_student(folder: Path, student: str, base: str | None = None) -> Recipe:
    tree = recipe_tree(folder)
    tree["model"] |= {"student": student, "base": base}
    return recipe_from(tree, "test")


def test_the_card_of_a_run(tmp_path: Path) -> None:
    write_rows(tmp_path)
    write_models(tmp_path)
    (tmp_path / "student" / "README.md").write_text("---\nlicense: cc-by-4.0\ntags: [x]\n---\n# base\n")
    settings = {"runtime__checkpoint_every_steps": 0, "optim__num_steps": 3, "runtime__seed": 7}
    limits = {"data__max_pixels": 40000, "data__packing": True}
    final = train(recipe(tmp_path, **settings, **limits), tmp_path / "run")
    text = (final / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["base_model"] == str(tmp_path / "student")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    for part in (
        f"- Student: `{tmp_path}/student`",
        f"- Teacher: `{tmp_path}/teacher`, bf16",
        "- Method: grace, seed 7",
        "- Grid: w4g128; 14 matrices on it, 13 linears in BF16",
        "- Steps: 3 of 2 x 2 rows, packed; learning rate 0.001",
        "0 rows could not be used",
        "- Pictures while training: any to 40000 pixels each; the processor here is the base's",
        "- Licence: cc-by-4.0",
        "| at step 3 | |",
        f"| cross_entropy | {last['cross_entropy']:.4f} |",
        f"| scale_drift | {last['scale_drift']:.4f} |",
    ):
        assert part in text, part
    assert (final / "generation_config.json").is_file()


def test_whose_licence(tmp_path: Path) -> None:
    assert base_licence(with_student(tmp_path, "llava-hf/llava-1.5-7b-hf")) == "llama2"
    assert base_licence(with_student(tmp_path, "Qwen/Qwen3-VL-2B-Instruct")) == "apache-2.0"
    missing = with_student(tmp_path, str(tmp_path / "none"), "Qwen/Qwen2.5-VL-3B-Instruct")
    assert base_licence(missing) == "other"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("---\nlicense: [broken\n---\n")
    bare = with_student(tmp_path, str(tmp_path / "bare"))
    assert base_licence(bare) is None
    card = model_card(bare, QuantPlan(()))
    assert "- Licence: not stated by the base; ask its authors" in card
    assert "license: other" in card
    (tmp_path / "earlier" / "final").mkdir(parents=True)
    (tmp_path / "earlier" / "final" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert base_licence(with_student(tmp_path, str(tmp_path / "earlier"))) == "mit"
