"""AWQ, GPTQ and MLX folders in other programs: stock Transformers with gptqmodel and optimum, and MLX on a CPU.

Under ``scale_rounding: sig5`` q s is the same real number in BF16 and FP32, so in FP32 the logits must be equal: 0.0.
Under the default the same program in FP32 runs the unrounded q s, at most 2^-8 from the baked weight; the bound is that
of a few such layers. The environment is made here (some minutes); GRACE_INTEROP_GPTQ_PYTHON names one that is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from environments import Base, environment, format_tests, record, run_script

SCRIPT = Path(__file__).with_name("compare_runtimes.py")
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "pillow", "gptqmodel", "optimum", "mlx[cpu]")
FORMATS = {"w4g128": ("awq", "official-awq", "gptq", "gptq_v2", "mlx"), "w8g128": ("gptq", "mlx")}
"""Asked of Qwen3-VL; of the other families those that differ in more than a few bytes of metadata."""

RULES = {"w4g128": "mse_signed", "w8g128": "minmax"}
"""Scales of four bits have both signs here: runtimes take them as they are."""

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[Path]:
    yield from environment(tmp_path_factory.mktemp("gptq"), "GRACE_INTEROP_GPTQ_PYTHON", PACKAGES, base)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<family>-<scheme>-<rounding>[-<layout>], and <family>.safetensors with questions."""
    families, tiny = format_tests("family_models"), format_tests("tiny_models")
    from transformers import AutoProcessor

    from grace_vlm.formats.pack import pack

    root = tmp_path_factory.mktemp("models")
    for family in families.FAMILIES:
        for scheme, layouts in FORMATS.items():
            for rounding in ("sig5", "bf16"):
                name = f"{family}-{scheme}-{rounding}"
                families.write_family(root / name, family, scheme, rounding, RULES[scheme])
                for layout in layouts:
                    pack(root / name, root / f"{name}-{layout}", layout)
        processor = AutoProcessor.from_pretrained(root / f"{family}-w4g128-bf16")
        tiny.save_questions(root / f"{family}.safetensors", tiny.random_questions(processor, 6, seed=3))
    return root


def ask(python: Path, *arguments: object) -> dict[str, Any]:
    """The report of the script, run from a folder that holds nothing of ours."""
    report: dict[str, Any] = json.loads(run_script(python, SCRIPT, *arguments).splitlines()[-1])
    assert report["problems"] == []
    return report["folders"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["Qwen3-VL", "Qwen2-VL", "LLaVA-1.5"])
@pytest.mark.parametrize("scheme", FORMATS)
def test_transformers_with_gptqmodel(python: Path, folders: Path, family: str, scheme: str) -> None:
    # W8 products have more bits than BF16 whatever the scale: there is no exact case.
    bounds = (
        {"bf16": 0.1} if scheme == "w8g128" else {"sig5": 0.0, "bf16": 0.1} if family == "Qwen3-VL" else {"sig5": 0.0}
    )
    for rounding, limit in bounds.items():
        name = f"{family}-{scheme}-{rounding}"
        layouts = [f for f in FORMATS[scheme] if f != "mlx" and (family == "Qwen3-VL" or f in ("awq", "gptq"))]
        packed = [folders / f"{name}-{layout}" for layout in layouts]
        found = ask(python, folders / name, *packed, "--inputs", folders / f"{family}.safetensors")
        record(f"gptqmodel-{name}", found)
        for layout, report in found.items():
            assert report["max_abs_difference"] <= limit, (layout, report)
            assert report["top1_agreement"] >= (1.0 if limit == 0 else 0.9)
            assert report["with_picture"] > 0
            assert report["logit_std"] > 0.1


def test_mlx_dequantizes_to_the_baked_weights(python: Path, folders: Path) -> None:
    packed = sorted(folders.glob("*-mlx"))
    assert len(packed) == 12  # three families, W4 and W8, two kinds of scales
    pairs = [path for target in packed for path in (target.with_name(target.name.removesuffix("-mlx")), target)]
    found = ask(python, "--mlx", *pairs)
    record("mlx", found)
    for name, report in found.items():
        assert report["linears"] == 14, name
        assert report["weights_changed"] == 0, name
