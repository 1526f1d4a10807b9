"""Certificates: of values and not of files, and they find what differs; digests; consent to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import copy_of, edit_json, edit_tensors

from grace_vlm.errors import FormatError
from grace_vlm.formats.certificate import differing, read_certificate, root_of
from grace_vlm.formats.converter import CERTIFICATE
from grace_vlm.formats.pack import convert, pack
from grace_vlm.formats.registry import read_model
from grace_vlm.formats.rounding import Exactness, rounded
from grace_vlm.formats.values import digest
from grace_vlm.formats.verify import verify, verify_certificate
from grace_vlm.quant import QuantizedTensor, QuantScheme

FIRST = "model.language_model.layers.0.self_attn.q_proj"


def test_a_digest_is_of_values() -> None:
    values = torch.tensor([[1.5, -0.0, float("nan")]])
    same = [values.double(), values.half(), values.bfloat16(), values.abs(), -values.neg()]
    assert {digest(tensor) for tensor in same} == {digest(values)}
    others = [
        values.t(),
        values + 1,
        values.flatten(),
        torch.tensor([[1.5, 1e-30, float("nan")]]),
        torch.tensor([[1, 0, 0]]),
    ]
    assert len({digest(tensor) for tensor in (values, *others)}) == 1 + len(others)
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert len({digest(third), digest(third.float()), digest(third.half())}) == 3


def test_it_travels_and_needs_no_source(models: Path, tmp_path: Path) -> None:
    for layout in ("compressed-tensors", "awq", "gptq"):
        pack(models / "w4", tmp_path / layout, layout)
    roots = {verify_certificate(tmp_path / layout)[0] for layout in ("compressed-tensors", "awq", "gptq")}
    assert len(roots) == 1
    # A's certificate proves B, also the source that never had one.
    assert verify_certificate(models / "w4", tmp_path / "awq" / CERTIFICATE)[1] == []
    assert verify_certificate(models / "w8", tmp_path / "awq" / CERTIFICATE)[1] != []


def test_it_names_what_differs(models: Path, tmp_path: Path) -> None:
    pack(models / "w4", tmp_path / "packed", "gptq")
    changed = copy_of(tmp_path / "packed", tmp_path / "changed")

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{FIRST}.qweight"][3, 5] ^= 1 << 9
        tensors["model.language_model.norm.weight"][7] += 1

    edit_tensors(changed / "model.safetensors", flip)
    assert verify_certificate(changed)[1] == [f"{FIRST}.codes", "model.language_model.norm.weight"]


def test_a_damaged_certificate_is_refused(models: Path, tmp_path: Path) -> None:
    pack(models / "w4", tmp_path / "packed", "mlx")
    stated = json.loads((tmp_path / "packed" / CERTIFICATE).read_text())
    zeros = "0" * 64
    for change, message in (
        (lambda c: c.update(root=zeros), "has a root that is not that of its tensors"),
        (lambda c: c["linears"][FIRST].update(codes=zeros), "has a root that is not that of its tensors"),
        (lambda c: c["linears"][FIRST].update(codes="x"), "expected codes, scale, scheme, shape"),
        (lambda c: c["linears"].update({FIRST: 7}), "expected codes, scale, scheme, shape"),
        (lambda c: c.update(tensors=[]), "has no object 'tensors'"),
        (lambda c: c.update(format_version=2), "has format_version 2"),
    ):
        path = tmp_path / "damaged.json"
        path.write_text(json.dumps(stated))
        edit_json(path, change)  # type: ignore[arg-type]
        with pytest.raises(FormatError, match=message):
            read_certificate(path)
    (tmp_path / "packed" / CERTIFICATE).unlink()
    with pytest.raises(FormatError, match=r"has no grace-certificate\.json; name another folder"):
        verify_certificate(tmp_path / "packed")


def test_rounding_is_what_the_user_is_told(models: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(FormatError, match="pass --allow-rounding to write it all the same"):
        pack(models / "fp32", tmp_path / "out", "gptq", notify=said.append)
    assert len(said) == 1
    assert said[0].startswith("gptq is not exact: ")
    assert not (tmp_path / "out").exists()
    packed = convert(models / "fp32", tmp_path / "out", "gptq", allow_rounding=True)
    before, after = read_model(models / "fp32"), read_model(tmp_path / "out")
    for name, tensor in before.quantized.items():
        assert torch.equal(after.quantized[name].codes, tensor.codes)
        assert torch.equal(after.quantized[name].scale, tensor.scale.half().float())
    assert 0 < packed.exactness.scale_error <= 2**-11
    assert verify_certificate(tmp_path / "out")[1] == []
    assert packed.root != convert(models / "fp32", tmp_path / "mlx", "mlx").root


def test_scales_that_vanish_are_refused_with_any_consent(models: Path) -> None:
    from dataclasses import replace

    from grace_vlm.formats.awq import Awq

    content = read_model(models / "fp32")
    small = {
        name: QuantizedTensor(t.codes, torch.full_like(t.scale, 1e-9), t.scheme)
        for name, t in content.quantized.items()
    }
    with pytest.raises(FormatError, match="awq stores them in float16, which cannot hold them"):
        rounded(replace(content, quantized=small), Awq()).quantized[FIRST]


def test_the_largest_error_is_kept() -> None:
    scheme = QuantScheme(4, 2, "fp32")
    codes = torch.tensor([[1, -8]], dtype=torch.int8)

    def of(scale: float) -> QuantizedTensor:
        return QuantizedTensor(codes, torch.tensor([[scale]]), scheme)

    found = (
        Exactness().including("a", of(1.0), of(1.25)).including("b", of(2.0), of(2.25)).including("c", of(1.0), of(1.0))
    )
    assert (found.num_scales, found.num_changed, found.tensor) == (3, 2, "a")
    assert (found.scale_error, found.weight_error) == (0.25, 2.0)


def test_a_name_with_a_line_in_it_is_not_two_tensors() -> None:
    def made(names: list[str]) -> dict[str, Any]:
        return {"linears": {}, "tensors": {name: {"shape": [1], "values": "0" * 64} for name in names}}

    forged = f"a [1] {'0' * 64}\nb"
    assert root_of(made(["a", "b"])) != root_of(made([forged]))


def test_a_dense_tensor_cannot_stand_for_codes() -> None:
    linear = {"scheme": "w4g128", "shape": [1, 128], "codes": "1" * 64, "scale": "2" * 64}
    honest = {"linears": {"x": linear}, "tensors": {}}
    other = {
        "linears": {"x": {**linear, "codes": "3" * 64}},
        "tensors": {"x.codes": {"shape": [1], "values": "1" * 64}},
    }
    assert differing(honest, other) == ["x.codes"]


def test_other_files_are_those_that_were_published(models: Path, tmp_path: Path) -> None:
    folder = pack(models / "w4", tmp_path / "out", "compressed-tensors")
    assert verify_certificate(folder)[1] == []
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert verify_certificate(folder)[1] == ["file config.json"]
    found = verify(models / "w4", folder).first
    assert str(found) == f"config.json: text_config.rms_norm_eps: {eps_of(models / 'w4')} in A, 0.5 in B"


def eps_of(folder: Path) -> float:
    return float(json.loads((folder / "config.json").read_text())["text_config"]["rms_norm_eps"])
