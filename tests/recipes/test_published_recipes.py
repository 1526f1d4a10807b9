"""Every value of a published run says where it is from, and what is not ours is what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from published import COLUMNS

from grace_vlm.errors import ConfigError
from grace_vlm.train.config import load_recipe, recipe_from

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS_OF_A_STEP = {"llava_1_5_7b_grace_w4g128": 256}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def stated(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(key -> value, key -> source) of a recipe file."""
    tree = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    sources = {key: source for source, keys in tree.pop("sources").items() for key in keys}
    return leaves(tree), sources


@pytest.mark.parametrize("name", COLUMNS)
def test_every_field_has_one_source(name: str) -> None:
    values, sources = stated(name)
    assert set(values) == set(sources)
    listed = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["sources"].values()
    assert sum(len(keys) for keys in listed) == len(sources), "a key is listed twice"


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_not_ours_is_what_was_published(name: str) -> None:
    values, sources = stated(name)
    held = 0
    for key, source in sources.items():
        if source != "ours":
            assert values[key] == COLUMNS[name][source][key], key
            held += 1
    assert held >= 6
    # And nothing that was published under that source is left out or called ours.
    for source, column in COLUMNS[name].items():
        missing = [key for key in column if key in values and sources[key] == "ours"]
        assert missing == [], source


@pytest.mark.parametrize("name", COLUMNS)
def test_a_step_has_the_published_rows(name: str) -> None:
    data = load_recipe(RECIPES / f"{name}.yaml").data
    assert data.micro_batch_size * data.accumulation == ROWS_OF_A_STEP.get(name, 512)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("qat", ["method=qat"]),
        ("kd", ["method=kd", "loss.adaptive=false"]),
        ("sft", ["method=sft", "scheme=bf16"]),
    ],
)
def test_ablations_are_overrides(name: str, method: str, overrides: list[str]) -> None:
    if method == "qat" and name.endswith("bf16"):
        with pytest.raises(ConfigError, match="method qat needs a grid"):
            load_recipe(RECIPES / f"{name}.yaml", overrides)
        return
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    assert recipe.method == method
    assert recipe.objective().needs_teacher == (method == "kd")


def test_a_source_must_be_known() -> None:
    tree = yaml.safe_load((RECIPES / "qwen3_vl_2b_grace_w4g128.yaml").read_text())
    tree["sources"]["rumour"] = ["scheme"]
    with pytest.raises(ConfigError, match=r"sources\.rumour"):
        recipe_from(tree, "test")


def test_a_recipe_that_goes_on_from_a_run_says_what_to_do_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grace_vlm.data.rows import RowFile
    from grace_vlm.train.open import describe_student, open_student

    recipe = load_recipe(RECIPES / "qwen3_vl_2b_grace_w4g128.yaml", [f"model.student={tmp_path}/run"])
    model, adapter = describe_student(recipe)
    assert adapter.model_type == "qwen3_vl"
    assert model.config.text_config.hidden_size == 2048
    (tmp_path / "a.jsonl").write_text('{"id": 1, "conversations": []}\n')
    with pytest.raises(ConfigError) as caught:
        open_student(recipe, RowFile(tmp_path / "a.jsonl"))
    assert str(caught.value) == (
        f"{tmp_path}/run does not exist: this recipe goes on from that run; train it first, "
        "or start from its base with model.student=Qwen/Qwen3-VL-2B-Instruct"
    )
    # The advice leads on: with the base as student the hub is asked, not this sentence repeated.
    advised = load_recipe(RECIPES / "qwen3_vl_2b_grace_w4g128.yaml", ["model.student=Qwen/Qwen3-VL-2B-Instruct"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="Qwen/Qwen3-VL-2B-Instruct is no folder here"):
        open_student(advised, RowFile(tmp_path / "a.jsonl"))
