"""Every layout of every family: codes and scales equal, weights bit-identical, one certificate; and the table of it.

``GRACE_WRITE_DOCS=1`` writes the table into docs/formats.md, where it must otherwise be found as it is made here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, write_family

from grace_vlm.errors import FormatError
from grace_vlm.formats.certificate import read_certificate
from grace_vlm.formats.converter import CERTIFICATE
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import converters, detect, read_model
from grace_vlm.formats.verify import verify, verify_certificate
from grace_vlm.quant import bake

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- exactness: made by tests/formats/test_exactness.py -->\n", "<!-- end of exactness -->"
SCHEMES = ("w4g128", "w8g128")
LAYOUTS = tuple(converters())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Path | str]:
    """(family, scheme, layout) -> the folder, or why the layout refuses it."""
    root = tmp_path_factory.mktemp("exactness")
    found: dict[tuple[str, str, str], Path | str] = {}
    for family in FAMILIES:
        for scheme in SCHEMES:
            source = write_family(root / f"{family}-{scheme}", family, scheme)
            for layout in LAYOUTS:
                try:
                    found[family, scheme, layout] = pack(source, root / f"{family}-{scheme}-{layout}", layout)
                except FormatError as error:
                    found[family, scheme, layout] = str(error)
    return found


def test_what_is_refused_is_what_the_layout_cannot_hold(folders: dict[tuple[str, str, str], Path | str]) -> None:
    refused = {key: value for key, value in folders.items() if isinstance(value, str)}
    assert {(scheme, layout) for _, scheme, layout in refused} == {("w8g128", "awq"), ("w8g128", "official-awq")}
    assert len(refused) == 2 * len(FAMILIES)
    assert all("holds w4 only: quantize to w4g128" in reason for reason in refused.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layout_has_the_same_certificate(
    folders: dict[tuple[str, str, str], Path | str], family: str, scheme: str
) -> None:
    """One root for all: so each equals each."""
    paths = [path for key, path in folders.items() if key[:2] == (family, scheme) and isinstance(path, Path)]
    assert len(paths) >= 6
    assert len({read_certificate(path / CERTIFICATE)["root"] for path in paths}) == 1
    for path in paths:
        assert verify_certificate(path)[1] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_scales_and_weights_without_certificates(
    folders: dict[tuple[str, str, str], Path | str], family: str, scheme: str
) -> None:
    reference = folders[family, scheme, "grace"]
    assert isinstance(reference, Path)
    expected = read_model(reference)
    for layout in LAYOUTS:
        folder = folders[family, scheme, layout]
        if not isinstance(folder, Path):
            continue
        assert detect(folder).name == layout
        content = read_model(folder)
        assert content.quantized.keys() == expected.quantized.keys()
        assert set(content.dense) == set(expected.dense)
        for name, tensor in expected.quantized.items():
            found = content.quantized[name]
            assert torch.equal(found.codes, tensor.codes)
            assert torch.equal(found.scale.float(), tensor.scale.float())
            assert torch.equal(bake(found), expected.baked[name])
        for name, dense in expected.dense.items():
            assert torch.equal(content.dense[name], dense)


def test_any_layout_into_any_other(folders: dict[tuple[str, str, str], Path | str], tmp_path: Path) -> None:
    """Once round through all of them, forwards and backwards, ends where it began."""
    for order in (LAYOUTS, LAYOUTS[::-1]):
        source = folders["Qwen2-VL", "w4g128", order[-1]]
        assert isinstance(source, Path)
        for number, layout in enumerate(order):
            source = pack(source, tmp_path / f"{order[0]}-{number}", layout)
        reference = folders["Qwen2-VL", "w4g128", "grace"]
        assert isinstance(reference, Path)
        assert verify(reference, source).equal


VLLM = "vLLM on a CPU with its matmul replaced"
CONSUMERS = {
    "compressed-tensors": f"Transformers: logits equal, 0.0; {VLLM}: 0.0. SGLang, vLLM on a GPU: not run",
    "awq": f"Transformers + gptqmodel; {VLLM}: 0.0. SGLang, vLLM on a GPU: not run",
    "gptq": f"Transformers + gptqmodel + optimum; {VLLM}, W4: 0.0. SGLang, vLLM on a GPU: not run",
    "gptq_v2": f"Transformers + gptqmodel + optimum; {VLLM}, W4: 0.0. SGLang, vLLM on a GPU: not run",
    "gguf": "`gguf`'s dequantizer: equal; llama.cpp with pictures: the same first tokens. llama.cpp on a GPU: not run",
    "mlx": "`mx.dequantize` on a CPU: weights equal. mlx-vlm and Metal: not run",
    "official": "Transformers, as plain BF16; a reader made from the layout's description (tests/formats)",
    "official-awq": f"as AWQ: Transformers + gptqmodel; {VLLM}: 0.0; a reader made from the layout's description",
    "grace": "Transformers, as plain BF16",
}
"""Seen in tests/interop and tests/formats."""


def table(folders: dict[tuple[str, str, str], Path | str]) -> str:
    """One line a layout: families and schemes that came through, and who opened it."""
    lines = ["| layout | " + " | ".join(f"{f} W4 / W8" for f in FAMILIES) + " | opened by |"]
    lines.append("|---" * (len(FAMILIES) + 2) + "|")
    for layout in sorted(LAYOUTS):
        cells = []
        for family in FAMILIES:
            states = ["equal" if isinstance(folders[family, s, layout], Path) else "refused" for s in SCHEMES]
            cells.append(" / ".join(states))
        lines.append(f"| {layout} | " + " | ".join(cells) + f" | {CONSUMERS[layout]} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_page(folders: dict[tuple[str, str, str], Path | str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE} needs the lines {BEGIN.strip()} and {END}"
    made = before + BEGIN + table(folders) + END + after
    if os.environ.get("GRACE_WRITE_DOCS"):
        PAGE.write_text(made, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == made, "run this test with GRACE_WRITE_DOCS=1"
