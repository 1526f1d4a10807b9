"""``grace teacher cache`` and what ``train --dry-run`` says of a cached teacher, as a user sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_user_errors import grace
from toy_run import recipe_tree, write_models, write_rows

CHART = "recipes/qwen3_vl_2b_grace_w4g128.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_rows(folder)
    write_models(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(folder, optim__num_steps=2)))
    return folder


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*args: object) -> tuple[int, str, str]:
        return grace(capsys, monkeypatch, *args)

    return run


def test_cache_verify_and_train(world: Path, tmp_path: Path, says: Any) -> None:
    recipe, out = world / "recipe.yaml", tmp_path / "cache"
    code, text, _ = says("teacher", "cache", recipe, "--out", out, "--json")
    made = json.loads(text)
    assert (code, made["num_rows"], made["num_entries"], made["num_new"]) == (0, 24, 24, 24)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    code, text, _ = says("teacher", "cache", recipe, "--out", out)
    tokens = made["num_tokens"]
    assert text == f"{out}  (24 rows, 0 of them new, {tokens:,} supervised tokens, {num_bytes:,} bytes)\n"
    code, text, _ = says("teacher", "cache", recipe, "--out", out, "--verify")
    assert (code, text) == (0, f"{out}: every byte of 24 rows is what was written ({num_bytes:,} bytes)\n")
    code, text, _ = says("train", recipe, f"model.teacher_cache={out}", "model.teacher=null", "--out", tmp_path / "run")
    assert code == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_dry_run_says_what_a_build_then_makes(world: Path, tmp_path: Path, says: Any) -> None:
    recipe, out = world / "recipe.yaml", tmp_path / "cache"
    for hidden in ("exact", "fp8"):
        _, text, _ = says("teacher", "cache", recipe, "--dry-run", "--hidden", hidden, "--json")
        expected = json.loads(text)
        _, text, _ = says("teacher", "cache", recipe, "--out", out / hidden, "--hidden", hidden, "--json")
        made = json.loads(text)
        assert expected["supervised_tokens"] == made["num_tokens"]
        assert (expected["num_rows"], expected["num_sampled"]) == (24, 24)
        shards = sum(path.stat().st_size for path in out.rglob(f"{hidden}/**/*.safetensors"))
        assert expected["num_bytes"] == pytest.approx(shards, abs=2000)  # the two headers
        assert expected["hours"] > 0
    code, text, _ = says("teacher", "cache", recipe, "--dry-run", "--gpu", "a100")
    assert code == 0
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "cache",
        "------------------------",
        "rows",
        "tokens",
        "supervised tokens",
        "bytes a supervised token",
        "bytes in all",
        "hours on one a100",
        "",
        "from 24 of the rows, read as a build reads them; hidden states are kept as exact",
    ]


def test_dry_run_of_true_models_reads_no_weights(world: Path, says: Any) -> None:
    """Qwen3-VL-2B and 8B over the toy rows: 8,196 bytes a supervised token in BF16, 4,104 in FP8; the head 1.24 GB."""
    names = [f"model.{who}=random:Qwen/Qwen3-VL-{size}B-Instruct" for who, size in (("student", 2), ("teacher", 8))]
    command = ("teacher", "cache", world / "recipe.yaml", *names, "runtime.device=auto", "--dry-run", "--json")
    found = {kind: json.loads(says(*command, "--hidden", kind)[1]) for kind in ("exact", "fp8")}
    assert [found[kind]["token_bytes"] for kind in found] == [2 * 4096 + 4, 4096 + 8]
    assert found["exact"]["num_bytes"] > 2 * 151936 * 4096


def test_user_errors_are_one_line(world: Path, tmp_path: Path, says: Any) -> None:
    recipe = world / "recipe.yaml"
    lines = {
        ("--out", str(tmp_path / "c"), "--hidden", "int8"): (
            2,
            "--hidden 'int8' is unknown; expected one of exact, bf16, fp8",
        ),
        (): (2, "--out is missing; give the cache folder to make, for example --out runs/teacher-cache"),
        ("--dry-run", "--gpu", "abacus"): (
            2,
            "--gpu 'abacus' is unknown; expected one of h100, h200, a100, l40s, rtx4090",
        ),
        ("--out", str(tmp_path / "c"), "--verify"): (
            5,
            f"{tmp_path}/c is no cache of a teacher (no cache.json); make it with grace teacher cache RECIPE "
            f"--out {tmp_path}/c",
        ),
        ("method=qat", "model.teacher=null", "--out", str(tmp_path / "c")): (
            2,
            "a cache needs a teacher to make it of; set model.teacher to a model folder",
        ),
        (f"model.teacher={world}/nobody", "--out", str(tmp_path / "c")): (
            2,
            f"{world}/nobody does not exist; expected a model folder, a run folder or a hub id like org/name",
        ),
    }
    for words, (code, line) in lines.items():
        assert says("teacher", "cache", recipe, *words) == (code, "", f"error: {line}\n")
        assert not (tmp_path / "c").exists(), words


def cost(says: Any, *words: object) -> dict[str, Any]:
    code, text, error = says("train", CHART, "--dry-run", "--json", *words)
    assert code == 0, error
    return dict(json.loads(text))


def test_a_cached_teacher_costs_its_head(world: Path, tmp_path: Path, says: Any) -> None:
    """Before the cache is there the teacher's configuration says how large its head will be, after it the cache."""
    random = "model.teacher=random:Qwen/Qwen3-VL-8B-Instruct"
    online = cost(says, random)
    cached = cost(says, random, f"model.teacher_cache={tmp_path}/to-come")
    words, width = 151936, 4096
    assert "teacher weights" not in cached["memory_bytes"]
    assert cached["memory_bytes"]["teacher head"] == 2 * words * width
    assert cached["memory_bytes"]["teacher signals"] < online["memory_bytes"]["teacher signals"]
    parts = {part for part in cached["flop_by_part"] if part.startswith("teacher")}
    assert parts == {"teacher head"}
    assert cached["flop_by_part"]["teacher head"] == pytest.approx(online["flop_by_part"]["teacher head"] / 2)
    assert cached["peak_bytes"] < online["peak_bytes"] - 14 * (1 << 30)
    assert cached["hours"] < online["hours"]
    out = tmp_path / "cache"
    says("teacher", "cache", world / "recipe.yaml", "--out", out)
    small = cost(says, "model.teacher=null", f"model.teacher_cache={out}")
    assert small["memory_bytes"]["teacher head"] == 2 * 384 * 128


def test_a_cache_that_is_not_there_and_no_teacher(tmp_path: Path, says: Any) -> None:
    code, _, error = says("train", CHART, "--dry-run", "model.teacher=null", f"model.teacher_cache={tmp_path}/no")
    assert code == 5
    assert error == (
        f"error: {tmp_path}/no is no cache of a teacher (no cache.json); make it with grace teacher cache RECIPE "
        f"--out {tmp_path}/no\n"
    )


def test_fit_counts_on_the_cache_and_pulls_no_lever_of_the_teacher(tmp_path: Path, says: Any) -> None:
    """The published step: 40 GB as it is; on 26 GB all changes but the teacher's precision."""
    cached = ("train", CHART, "model.teacher=random:Qwen/Qwen3-VL-8B-Instruct", f"model.teacher_cache={tmp_path}/c")
    _, _, text = says(*cached, "--dry-run", "--fit", "40GB", "--json")
    assert text.splitlines()[1:] == ["  the recipe as it is"]
    _, _, text = says(*cached, "--dry-run", "--fit", "26GB", "--json")
    assert text.startswith("fits 26GB: ")
    assert "teacher" not in text
