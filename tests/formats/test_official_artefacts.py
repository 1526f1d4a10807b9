"""The released artefacts, imitated: their key names, shapes, dtypes and files; and their loaders, written again here.

The loaders below know nothing of ours: they are made from the description of the layouts alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import write_family
from safetensors.torch import load_file, save_file
from tiny_models import copy_of, edit_json

from grace_vlm.errors import FormatError
from grace_vlm.formats.pack import convert, pack
from grace_vlm.formats.registry import read_model
from grace_vlm.formats.sidecar import SIDECAR
from grace_vlm.formats.verify import verify

QWEN = {
    **{f"self_attn.{name}_proj": shape for name, shape in (("q", (2048, 2048)), ("k", (1024, 2048)))},
    "mlp.down_proj": (2048, 6144),
}
LLAVA = {"self_attn.q_proj": (4096, 4096), "mlp.down_proj": (4096, 11008)}


def grid(shape: tuple[int, int], bits: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, log_scale as the official code trains it, baked weight)."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    log_scale = torch.empty(shape[0] * shape[1] // 128).uniform_(-6, -3, generator=generator)
    scale = log_scale.exp().reshape(shape[0], -1, 1)
    weight = (codes.float().reshape(shape[0], -1, 128) * scale).reshape(shape).to(torch.bfloat16)
    weight[weight == 0] = -0.0
    return codes, log_scale, weight


def write_released(folder: Path, prefix: str, shapes: dict[str, tuple[int, int]], bits: int, config: Any) -> Any:
    """One layer at true shapes, as ``torch.save`` and ``save_file`` of the official scripts leave it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    made, tensors, sidecar = {}, {}, {}
    for number, (leaf, shape) in enumerate(shapes.items()):
        name = f"{prefix}.{leaf}"
        made[name] = grid(shape, bits, number)
        tensors[f"{name}.weight"] = made[name][2]
        sidecar[f"{name}.weight"], sidecar[f"{name}.log_scale"] = made[name][2].clone(), made[name][1]
    tensors["lm_head.weight"] = torch.zeros(8, 8, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(sidecar, folder / SIDECAR)
    return made


RELEASED = [
    ("model.language_model.layers.0", QWEN, 4, {"model_type": "qwen3_vl"}),
    ("model.language_model.layers.0", QWEN, 8, {"model_type": "qwen3_vl", "qat": {"bits": 8, "group_size": 128}}),
    ("model.layers.0", LLAVA, 4, {"model_type": "llava_llama", "vocab_size": 8}),
]


@pytest.mark.parametrize(("prefix", "shapes", "bits", "config"), RELEASED)
def test_a_released_folder_is_read(
    tmp_path: Path, prefix: str, shapes: dict[str, tuple[int, int]], bits: int, config: Any
) -> None:
    """With or without the bits stated; group from the lengths; FP32 scales."""
    made = write_released(tmp_path / "released", prefix, shapes, bits, config)
    content = read_model(tmp_path / "released")
    assert content.layout == "official"
    assert content.linears.keys() == made.keys()
    for name, (codes, log_scale, _) in made.items():
        found = content.quantized[name]
        assert found.scheme.name == f"w{bits}g128"
        assert found.scheme.scale_rounding == "fp32"
        assert torch.equal(found.codes, codes)
        torch.testing.assert_close(found.scale.reshape(-1), log_scale.exp(), rtol=2.5e-7, atol=0)


def test_fp32_scales_that_came_from_a_sidecar_go_back_into_one(tmp_path: Path) -> None:
    """exp and log meet again: the official layout is exact for what it held, and so are grace and MLX, others not."""
    shapes = {"self_attn.q_proj": (512, 512), "mlp.down_proj": (512, 1536)}
    write_released(tmp_path / "released", RELEASED[0][0], shapes, 4, {"model_type": "qwen3_vl"})
    for layout in ("official", "grace", "mlx"):
        assert convert(tmp_path / "released", tmp_path / layout, layout).exactness.exact
        assert verify(tmp_path / "released", tmp_path / layout).equal
    for layout in ("compressed-tensors", "awq", "official-awq", "gptq"):
        with pytest.raises(FormatError, match=r"is not exact: [0-9,]+ of [0-9,]+ scales are rounded, by 0\.[0-9]+ %"):
            pack(tmp_path / "released", tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()
        packed = convert(tmp_path / "released", tmp_path / layout, layout, allow_rounding=True)
        before, after = read_model(tmp_path / "released"), read_model(tmp_path / layout)
        errors = []
        for name, tensor in before.quantized.items():
            assert torch.equal(after.quantized[name].codes, tensor.codes)
            errors.append(float(((after.quantized[name].scale.float() - tensor.scale) / tensor.scale).abs().max()))
        assert packed.exactness.scale_error == pytest.approx(max(errors))
        assert max(errors) <= (2**-8 if layout == "compressed-tensors" else 2**-11)


@pytest.mark.parametrize("largest", [1, 6])
def test_uncertain_bits_are_refused(tmp_path: Path, largest: int) -> None:
    shapes = {"mlp.down_proj": (256, 512)}
    made = write_released(tmp_path / "released", RELEASED[0][0], shapes, 4, {"model_type": "qwen3_vl"})
    tensors, sidecar = load_file(tmp_path / "released" / "model.safetensors"), {}
    for name, (codes, log_scale, _) in made.items():
        small = codes.clamp(-largest, largest).float().reshape(len(codes), -1, 128)
        weight = (small * log_scale.exp().reshape(len(codes), -1, 1)).reshape(codes.shape).to(torch.bfloat16)
        tensors[f"{name}.weight"] = sidecar[f"{name}.weight"] = weight
        sidecar[f"{name}.log_scale"] = log_scale
    save_file(tensors, tmp_path / "released" / "model.safetensors", metadata={"format": "pt"})
    torch.save({key: tensor.clone() for key, tensor in sidecar.items()}, tmp_path / "released" / SIDECAR)
    with pytest.raises(FormatError, match=rf"lie in \[-{largest}, {largest}\].*the bits are uncertain"):
        read_model(tmp_path / "released")
    edit_json(tmp_path / "released" / "config.json", lambda c: c.update(qat={"bits": 8}))
    assert next(iter(read_model(tmp_path / "released").linears.values())).scheme.name == "w8g128"  # type: ignore[union-attr]


def official_sidecar(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Their reader: {module: (codes, scale (out, groups))} of a baked folder."""
    stored = torch.load(folder / SIDECAR, weights_only=True)
    weights = load_file(folder / "model.safetensors")
    found = {}
    for key, log_scale in stored.items():
        if not key.endswith(".log_scale"):
            continue
        name = key.removesuffix(".log_scale")
        weight = stored[f"{name}.weight"]
        assert torch.equal(weight, weights[f"{name}.weight"])
        scale = log_scale.exp().reshape(weight.shape[0], -1)
        wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
        found[name] = ((weight.float() / wide).round(), scale)
    return found


def official_packed(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Their other reader: side file, then nibble by nibble."""
    side = json.loads((folder / "awq_quantized_modules.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config["awq_packing"] == {"bits": 4, "group_size": 128, "zero_point": 8, "version": "gemm"}
    assert side["bits"] == 4
    assert side["modules"] == sorted(side["modules"])
    weights = load_file(folder / "model.safetensors")
    found = {}
    for name in side["modules"]:
        words, scales = weights[f"{name}.qweight"].long() & 0xFFFFFFFF, weights[f"{name}.scales"]
        assert scales.dtype == torch.float16
        assert bool((weights[f"{name}.qzeros"].long() & 0xFFFFFFFF == 0x88888888).all())
        outputs = torch.empty(words.shape[0], words.shape[1] * 8)
        for nibble, channel in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            outputs[:, channel::8] = ((words >> (4 * nibble)) & 15).float() - 8
        found[name] = (outputs.t(), scales.t().float())
    return found


@pytest.mark.parametrize("family", ["Qwen3-VL", "Qwen2-VL"])
def test_their_loaders_read_what_we_write(tmp_path: Path, family: str) -> None:
    source = write_family(tmp_path / "source", family, "w4g128")
    expected = read_model(source).quantized
    pack(source, tmp_path / "official", "official")
    pack(source, tmp_path / "official-awq", "official-awq")
    for found in (official_sidecar(tmp_path / "official"), official_packed(tmp_path / "official-awq")):
        assert found.keys() == expected.keys()
        for name, (codes, scale) in found.items():
            assert torch.equal(codes, expected[name].codes.float())
            torch.testing.assert_close(scale, expected[name].scale.float(), rtol=5e-7, atol=0)


def test_their_package_is_read_without_our_statement(tmp_path: Path) -> None:
    """No runtime's quantization_config, as released."""
    source = write_family(tmp_path / "source", "Qwen3-VL", "w4g128")
    pack(source, tmp_path / "packed", "official-awq")
    released = copy_of(tmp_path / "packed", tmp_path / "released")
    edit_json(released / "config.json", lambda c: c.pop("quantization_config"))
    assert read_model(released).layout == "official-awq"
    assert verify(source, released).equal
    edit_json(released / "awq_quantized_modules.json", lambda c: c["modules"].pop())
    with pytest.raises(FormatError, match=r"awq_quantized_modules.json does not list .*; list and tensors must agree"):
        read_model(released)


def test_what_torch_reads_of_our_pickle(tmp_path: Path) -> None:
    """Written by hand, a tensor at a time; read by torch in every way it has."""
    from grace_vlm.formats.sidecar import write_sidecar

    tensors = {
        "a.weight": torch.randn(128, 96).to(torch.bfloat16),
        "a.log_scale": torch.randn(77),
        "b.bias": torch.randn(3, dtype=torch.float16),
    }
    write_sidecar(tmp_path / SIDECAR, tensors)
    for options in ({}, {"mmap": True}, {"weights_only": True}):
        found = torch.load(tmp_path / SIDECAR, **options)
        assert list(found) == list(tensors)
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )


def _change_weight(folder: Path, name: str, change: Any) -> None:
    """Give a linear another weight, in the safetensors and in the pickle."""
    tensors, sidecar = load_file(folder / "model.safetensors"), torch.load(folder / SIDECAR, weights_only=True)
    weight = tensors[f"{name}.weight"].clone()
    change(weight)
    tensors[f"{name}.weight"] = sidecar[f"{name}.weight"] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(sidecar, folder / SIDECAR)


def test_a_scale_that_no_step_repairs_stays_as_it_was(tmp_path: Path) -> None:
    """Two neighbours in one group, one up and one down: no single scale gives both."""
    made = write_released(tmp_path / "released", RELEASED[0][0], {"mlp.up_proj": (256, 256)}, 4, {})
    name = next(iter(made))
    before = read_model(tmp_path / "released").quantized[name]
    odd = (before.codes[0, :128].abs() > 2).nonzero()[:2, 0].tolist()

    def nudge(weight: torch.Tensor) -> None:
        for column, step in zip(odd, (1, -1), strict=True):
            weight.view(torch.int16)[0, column] += step

    _change_weight(tmp_path / "released", name, nudge)
    after = read_model(tmp_path / "released").quantized[name]
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scale, before.scale)


def test_nan_in_a_weight_is_named(tmp_path: Path) -> None:
    made = write_released(tmp_path / "released", RELEASED[0][0], {"mlp.up_proj": (256, 256)}, 4, {})
    _change_weight(tmp_path / "released", next(iter(made)), lambda weight: weight[0, :1].fill_(torch.nan))
    with pytest.raises(FormatError, match="has a quantized weight with NaN or Inf in it"):
        read_model(tmp_path / "released")
