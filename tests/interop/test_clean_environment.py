"""The packed folder, in an environment that has never heard of us: stock loaders, BF16, logits equal to the bake's.

A virtual environment is made from ``requirements.lock``'s versions with torch, torchvision, Transformers,
compressed-tensors, accelerate and Pillow alone. What is compared (all optional, from the environment):

    GRACE_INTEROP_BAKED      model folder with baked weights         default: a tiny model, made here
    GRACE_INTEROP_PACKED     its packed folder                       default: packed here
    GRACE_INTEROP_QUESTIONS  JSONL of LLaVA rows                     default: 200 random ones, 2 of 3 with a picture
    GRACE_INTEROP_IMAGES     root of their pictures                  default: the JSONL's folder
    GRACE_INTEROP_PYTHON     an interpreter that is already clean    default: a new virtual environment
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from environments import REPOSITORY, Base, clean_variables, environment, format_tests, pinned_versions

SCRIPT = Path(__file__).with_name("compare_logits.py")
PACKAGES = ("torch", "torchvision", "transformers", "compressed-tensors", "accelerate", "pillow")
NUM_QUESTIONS = 200

pytestmark = pytest.mark.interop


def test_pinned_versions() -> None:
    lock = (
        "# made by us\ntorch==2.14.1 \\\n    --hash=sha256:aa==\nnumpy==2.4.6 ; python_version >= '3.11'\na[b, c]==1\n"
    )
    assert pinned_versions(lock) == ["torch==2.14.1", "numpy==2.4.6", "a==1"]


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[Path]:
    pins = pinned_versions((REPOSITORY / "requirements.lock").read_text(encoding="utf-8"))
    assert {pin.split("==")[0].lower().replace("_", "-") for pin in pins} >= set(PACKAGES)
    yield from environment(tmp_path_factory.mktemp("clean"), "GRACE_INTEROP_PYTHON", PACKAGES, base)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """scheme -> (baked, packed)."""
    given = [os.environ.get(f"GRACE_INTEROP_{name}") for name in ("BAKED", "PACKED")]
    if all(given):
        return {"given": (Path(str(given[0])), Path(str(given[1])))}
    from grace_vlm.formats.pack import pack

    tiny, root = format_tests("tiny_models"), tmp_path_factory.mktemp("models")
    model, processor = tiny.build_tiny()
    for scheme in ("w4g128", "w8g128"):
        tiny.write_model_folder(root / scheme, model, processor, lambda name, scheme=scheme: scheme)
        pack(root / scheme, root / f"{scheme}-packed", "compressed-tensors")
    return {scheme: (root / scheme, root / f"{scheme}-packed") for scheme in ("w4g128", "w8g128")}


@pytest.fixture(scope="module")
def questions(folders: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that tell the script what to ask."""
    if given := os.environ.get("GRACE_INTEROP_QUESTIONS"):
        images = os.environ.get("GRACE_INTEROP_IMAGES")
        return ["--questions", given, *(["--images", images] if images else [])]
    from transformers import AutoProcessor

    tiny, (baked, _) = format_tests("tiny_models"), next(iter(folders.values()))
    path = tmp_path_factory.mktemp("questions") / "inputs.safetensors"
    processor = AutoProcessor.from_pretrained(baked)
    assert tiny.save_questions(path, tiny.random_questions(processor, NUM_QUESTIONS, seed=5)) == NUM_QUESTIONS
    return ["--inputs", str(path)]


def compare(python: Path, baked: Path, packed: Path, questions: list[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and report of the script, run from a folder that holds nothing of ours."""
    command = [python, "-I", SCRIPT, baked.resolve(), packed.resolve(), *questions]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=clean_variables() | {"HF_HUB_OFFLINE": "1"}, cwd="/", timeout=1200
    )
    assert ran.stdout.strip(), ran.stderr[-2000:]
    return ran.returncode, json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.timeout(1800)
def test_logits_are_equal_without_us(
    clean_python: Path, folders: dict[str, tuple[Path, Path]], questions: list[str]
) -> None:
    for scheme, (baked, packed) in folders.items():
        status, report = compare(clean_python, baked, packed, questions)
        assert report["problems"] == [], scheme
        assert report["questions"] >= NUM_QUESTIONS, scheme
        assert set(report["max_abs_difference"].values()) == {0.0}, (scheme, report)
        assert report["with_picture"] > 0
        assert status == 0


@pytest.mark.timeout(1800)
def test_questions_come_from_rows_too(
    clean_python: Path, folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The other way in: LLaVA rows and picture files, through the packed folder's own processor."""
    from PIL import Image

    rows: list[dict[str, Any]] = [{"id": "0", "conversations": [{"from": "human", "value": "yes or no?"}]}]
    for index, size in enumerate([(128, 160), (200, 130)], start=1):
        Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / f"{index}.png")
        ask = {"from": "human", "value": "<image>\nwhat shape is in the picture?"}
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": [ask]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    baked, packed = next(iter(folders.values()))
    status, report = compare(clean_python, baked, packed, ["--questions", str(tmp_path / "rows.jsonl")])
    assert (status, report["questions"], report["with_picture"], report["problems"]) == (0, 3, 2, [])


@pytest.mark.timeout(1800)
def test_the_comparison_can_fail(
    clean_python: Path, folders: dict[str, tuple[Path, Path]], questions: list[str], tmp_path: Path
) -> None:
    """With one code of each row changed in the packed file, the same script says so."""
    tiny, (baked, packed) = format_tests("tiny_models"), next(iter(folders.values()))
    changed = tiny.copy_of(packed, tmp_path / "changed")

    def flip(tensors: dict[str, Any]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("down_proj.weight_packed"))
        tensors[name][:, 0] ^= 0x4

    tiny.edit_tensors(changed / "model.safetensors", flip)
    status, report = compare(clean_python, baked, changed, [*questions, "--limit", "10"])
    assert status == 1
    assert min(report["max_abs_difference"].values()) > 0
