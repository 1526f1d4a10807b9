"""``runtime.deterministic``: what it asks of torch, that it takes that back, and on a GPU that runs repeat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch._inductor import config as compiler
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.train.repeat import repeatable


def asked() -> tuple[bool, ...]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()  # 2: refuses what does not repeat; attention looks at that
    return mode == 2, compiler.deterministic, filled


def test_it_lasts_as_long_as_the_run() -> None:
    before = asked()
    with repeatable(False):
        assert asked() == before
    with repeatable(True):
        assert asked() == (True, True, False)
    assert asked() == before
    with pytest.raises(KeyError), repeatable(True):
        raise KeyError
    assert asked() == before


def test_what_has_no_form_that_repeats_is_named() -> None:
    before = asked()
    said = r"^runtime\.deterministic=true, and avg_bwd .* but you set it; set runtime\.deterministic=false$"
    with pytest.raises(ConfigError, match=said), repeatable(True):
        raise RuntimeError("avg_bwd does not have a deterministic implementation, but you set it. You can turn")
    assert asked() == before
    with pytest.raises(RuntimeError, match=r"^another$"), repeatable(True):
        raise RuntimeError("another")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_long_rows_repeat_on_a_gpu(tmp_path: Path, compiled: bool) -> None:
    """Rows of several blocks of keys, whose sums differ from run to run otherwise."""
    path = write_rows(tmp_path, num_rows=16)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["conversations"][1]["value"] = "red blue " * 400
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    write_models(tmp_path)
    changes = {"data__max_tokens": 2048, "runtime__device": "cuda", "runtime__checkpoint_every_steps": 0}
    tree = recipe_tree(tmp_path, runtime__deterministic=True, runtime__compile=compiled, **changes)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for name in ("one", "two"):  # cuBLAS was used in this process before
        words = [sys.executable, "-m", "grace_vlm.cli.main", "train", "recipe.yaml", "--out", name]
        subprocess.run(words, check=True, cwd=tmp_path)
    one, two = (next((tmp_path / name / "final").glob("*.safetensors")).read_bytes() for name in ("one", "two"))
    assert one == two
