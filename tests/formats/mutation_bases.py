"""The smallest models of every layout, as files: what the mutations damage.

``<layout>-w4`` and ``-w8`` have two quantized linears of 32 x 32 and a few dense tensors; ``-real`` is a whole Qwen3-VL
of one layer; ``-shards`` has an index; ``-fp32`` has FP32 scales (the official one without a word on its bits).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

from family_models import write_family
from safetensors.torch import load_file
from tiny_models import TEXTS, edit_json, write_model_folder

from grace_vlm.errors import FormatError
from grace_vlm.formats.folder import read_grid, write_grid
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import converters
from grace_vlm.formats.shards import write_weights
from grace_vlm.models.toy import TOY_SIZES, ToySize, build_toy_model, build_toy_processor
from grace_vlm.quant import QuantizedTensor, QuantScheme, bake

_SMALLEST = ToySize(32, 32, 1, 1, 1, 32, 32, 1, 1, (0,))
_LAYER = "model.language_model.layers.0"
_LINEARS = (f"{_LAYER}.self_attn.o_proj", f"{_LAYER}.mlp.down_proj")
_DENSE = (f"{_LAYER}.self_attn.k_proj.weight", f"{_LAYER}.input_layernorm.weight", "model.language_model.norm.weight")
_DENSE_VISION = (
    "model.visual.merger.norm.bias",
    "model.visual.blocks.0.attn.proj.weight",
    "model.visual.deepstack_merger_list.0.norm.bias",
)


def _write_real(folder: Path) -> None:
    processor = build_toy_processor(TEXTS, vocab_size=272)
    with patch.dict(TOY_SIZES, smallest=_SMALLEST):
        model = build_toy_model("smallest", processor)
    write_model_folder(folder, model, processor, lambda name: "w4g32")


def _write_small(folder: Path, real: Path, scheme: QuantScheme) -> None:
    """Two linears of ``real`` and a few of its other tensors; its configuration and its tokenizer."""
    shutil.copytree(real, folder, ignore=shutil.ignore_patterns("*.safetensors", "grid", "*.jinja"))
    stored, grid = load_file(real / "model.safetensors"), read_grid(real)
    quantized = {}
    for name in _LINEARS:
        scale = grid[name].scale
        if scheme.scale_rounding == "fp32":  # what a logarithm in FP32 gives back
            scale = (scale.double() * 1.01).log().float().double().exp().float()
        quantized[name] = QuantizedTensor(grid[name].codes, scale, scheme)
    tensors = {name: stored[name] for name in (*_DENSE, *_DENSE_VISION)}
    write_weights(folder, tensors | {f"{name}.weight": bake(tensor) for name, tensor in quantized.items()})
    write_grid(folder, quantized, (f"{_LAYER}.self_attn.k_proj",))


def _add_family(root: Path, family: str, suffix: str) -> None:
    """Two families whose names and rows GGUF has otherwise."""
    write_family(root / "source", family, "w4g32")
    pack(root / "source", root / f"gguf-real-{suffix}", "gguf")
    shutil.rmtree(root / "source")


def _into_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()
    write_weights(folder, tensors, 2048)


def write_bases(root: Path) -> None:
    """Write every base folder into ``root``, each with a certificate where its layout gives it one."""
    _write_real(root / "grace-real")
    sources = {"w4": QuantScheme(4, 32), "w8": QuantScheme(8, 32), "fp32": QuantScheme(4, 32, "fp32")}
    for suffix, scheme in sources.items():
        _write_small(root / f"grace-{suffix}", root / "grace-real", scheme)
    for suffix in ("real", *sources):
        for layout in converters():
            if layout == "grace":
                continue
            try:
                pack(root / f"grace-{suffix}", root / f"{layout}-{suffix}", layout)
            except FormatError:  # W8 as AWQ; FP32 scales in most
                assert suffix in ("w8", "fp32")
    _add_family(root, "Qwen2-VL", "qwen2")
    _add_family(root, "LLaVA-1.5", "llava")
    edit_json(root / "official-fp32" / "config.json", lambda config: config.pop("qat"))
    for layout in ("grace", "compressed-tensors", "gptq"):
        shutil.copytree(root / f"{layout}-w4", root / f"{layout}-shards")
        _into_shards(root / f"{layout}-shards")


def read_bases(root: Path) -> dict[str, dict[str, bytes]]:
    """Base name -> path in its folder -> bytes."""
    return {
        folder.name: {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for folder in sorted(root.iterdir())
    }
