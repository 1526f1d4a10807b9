"""The official layout: exact through logarithm and division, and a pickle that can do nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import copy_of, edit_json, edit_tensors

from grace_vlm.errors import FormatError
from grace_vlm.formats.pack import pack
from grace_vlm.formats.qat import _recover, log_of_scale, scale_of_log
from grace_vlm.formats.registry import converter_for, detect, read_model, validate
from grace_vlm.formats.sidecar import SIDECAR, read_sidecar
from grace_vlm.formats.verify import verify
from grace_vlm.quant import QuantizedTensor, QuantScheme, bake

FIRST = "model.language_model.layers.0.self_attn.q_proj"


def every_bf16_scale() -> torch.Tensor:
    """All BF16 numbers in [2^-14, 2^15]."""
    bits = torch.arange(0x3880, 0x4700 + 1, dtype=torch.int32).to(torch.int16)
    scales = bits.view(torch.bfloat16)
    assert (scales[0].item(), scales[-1].item()) == (2.0**-14, 2.0**15)
    return scales


def test_every_scale_survives_the_logarithm() -> None:
    scales = every_bf16_scale()
    assert torch.equal(scale_of_log(log_of_scale(scales), torch.bfloat16), scales)
    unrounded = scale_of_log(log_of_scale(scales), torch.float32)
    assert (unrounded == scales.float()).float().mean().item() < 0.5  # why scale_dtype is written


@pytest.mark.parametrize("num_bits", [8, 4, 3, 2])
def test_every_code_survives_the_division(num_bits: int) -> None:
    """Every scale times every code."""
    scheme = QuantScheme(num_bits, 1 << num_bits)
    scales = every_bf16_scale()
    codes = torch.arange(scheme.qmin, scheme.qmax + 1, dtype=torch.int8).expand(len(scales), -1).contiguous()
    tensor = QuantizedTensor(codes, scales.unsqueeze(1), scheme)
    assert torch.equal(_recover("x", bake(tensor), tensor.scale, scheme).codes, codes)


@pytest.mark.parametrize("name", ["w4", "w8"])
def test_round_trip(models: Path, on_grid: dict[str, dict[str, QuantizedTensor]], name: str) -> None:
    content = validate(models / f"{name}-official")
    assert content.layout == "official"
    for key, tensor in on_grid[name].items():
        found = content.quantized[key]
        assert torch.equal(found.codes, tensor.codes)
        assert torch.equal(found.scale, tensor.scale)
        assert found.scheme == tensor.scheme


def test_what_is_in_the_pickle_and_the_config(models: Path) -> None:
    folder = models / "w4-official"
    sidecar = torch.load(folder / SIDECAR, weights_only=True)
    assert len(sidecar) == 28
    assert sidecar[f"{FIRST}.log_scale"].shape == (128,)
    assert sidecar[f"{FIRST}.log_scale"].dtype == torch.float32
    assert sidecar[f"{FIRST}.weight"].dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["qat"] == {
        "bits": 4,
        "group_size": 128,
        "skip_keywords": ["visual", "lm_head"],
        "num_replaced": 14,
        "scale_dtype": "bfloat16",
    }


def test_stock_transformers_loads_it_as_plain_bf16(models: Path) -> None:
    from transformers import AutoModelForImageTextToText

    ours, theirs = (
        AutoModelForImageTextToText.from_pretrained(models / name, dtype=torch.bfloat16).state_dict()
        for name in ("w4", "w4-official")
    )
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_a_bias_goes_along(tmp_path: Path) -> None:
    from grace_vlm.formats.folder import write_grid
    from grace_vlm.formats.shards import write_weights

    codes = torch.arange(-4, 4, dtype=torch.int8).repeat(2, 4)
    tensor = QuantizedTensor(codes, torch.full((2, 1), 0.25, dtype=torch.bfloat16), QuantScheme(4, 32))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    write_weights(source, {"x.weight": bake(tensor), "x.bias": torch.ones(2, dtype=torch.bfloat16)})
    write_grid(source, {"x": tensor}, ())
    pack(source, tmp_path / "official", "official")
    sidecar = torch.load(tmp_path / "official" / SIDECAR, weights_only=True)
    assert sorted(sidecar) == ["x.bias", "x.log_scale", "x.weight"]
    assert verify(source, tmp_path / "official").equal


def test_the_official_codes_own_fp32_scales_are_read(models: Path, tmp_path: Path) -> None:
    """A folder as the official code writes it: no scale_dtype, FP32 log-scales, -0.0 among the weights."""
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    edit_json(folder / "config.json", lambda c: c["qat"].pop("scale_dtype"))
    sidecar = torch.load(folder / SIDECAR, weights_only=True)
    log_scale = sidecar[f"{FIRST}.log_scale"] + 0.001
    scale = log_scale.exp().reshape(128, 1)
    codes = validate(models / "w4-official").quantized[FIRST].codes
    weight = (codes.float() * scale).to(torch.bfloat16)
    weight[weight == 0] = -0.0
    sidecar.update({f"{FIRST}.weight": weight, f"{FIRST}.log_scale": log_scale})
    torch.save(sidecar, folder / SIDECAR)
    edit_tensors(folder / "model.safetensors", lambda t: t.update({f"{FIRST}.weight": weight}))
    found = validate(folder).quantized[FIRST]
    assert torch.equal(found.codes, codes)
    assert found.scale.dtype == torch.float32
    assert found.scheme.scale_rounding == "fp32"
    torch.testing.assert_close(found.scale, scale, rtol=2e-7, atol=0)


def test_what_it_cannot_hold_is_refused(models: Path, tmp_path: Path) -> None:
    for name, message in (
        ("fp32", r"official is not exact: [0-9,]+ of 1,536 scales are rounded, by .* % at most .*--allow-rounding"),
        ("mixed", "the official layout holds one scheme for the whole model; this one has w4g64, w8g128"),
    ):
        with pytest.raises(FormatError, match=message):
            pack(models / name, tmp_path / "out", "official")
        assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_started_reads_what_a_forked_one_does(models: Path, request: pytest.FixtureRequest) -> None:
    """The other tests fork it (conftest.py); users start it."""
    path = models / "w4-official" / SIDECAR
    forked = read_sidecar(path, 1 << 30)
    request.getfixturevalue("started_sidecars")
    started = read_sidecar(path, 1 << 30)
    assert started.weights == forked.weights
    assert started.log_scales.keys() == forked.log_scales.keys()
    assert all(torch.equal(started.log_scales[name], tensor) for name, tensor in forked.log_scales.items())


class Payload:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.usefixtures("started_sidecars")
def test_a_pickle_with_code_does_nothing(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    torch.save({"x.weight": Payload(tmp_path / "ran")}, folder / SIDECAR)
    with pytest.raises(FormatError, match=r"asks for posix\.system beside tensors, which could run code") as caught:
        validate(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    (folder / SIDECAR).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(FormatError, match="is no torch archive"):
        validate(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("started_sidecars")
@pytest.mark.parametrize("planted", ["torch.py", "json.py", "grace_vlm/__init__.py"])
def test_python_files_of_the_folder_are_never_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """The user stands in the folder, and the process that reads the pickle starts there."""
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    (folder / planted).parent.mkdir(exist_ok=True)
    (folder / planted).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "")
    validate(folder)
    assert not (tmp_path / "ran").exists()


def test_a_quantized_head_is_refused_by_name(models: Path) -> None:
    content = read_model(models / "w4")
    entry = next(iter(content.linears.values()))
    head = "model.language_model.embed_tokens"
    assert converter_for("official").refusal({**content.linears, head: replace(entry, name=head)}, ()) == (
        f"{head} has a grid; the official layout holds the decoder's linears: leave quant.head in bf16, or use gguf"
    )


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x.weight": torch.zeros(1 << 20)}, buffer)
    path = tmp_path / SIDECAR
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert path.stat().st_size < 1 << 17
    with pytest.raises(FormatError, match="holds compressed entries"):
        read_sidecar(path, 1 << 30)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match=r"has [0-9,]+ bytes; the model's weights allow at most 1,000"):
        read_sidecar(path, 1000)
    assert read_sidecar(path, 1 << 30).weights.keys() == {"x"}


STRIDE_TRICK = torch.zeros(1).expand(1 << 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; expected a dict"),
        ({}, "holds a dict; expected a dict of tensors"),
        ({"x.weight": 3}, r"holds 'x\.weight' \(int\)"),
        ({"x.momentum": torch.ones(1)}, "holds 'x.momentum'"),
        ({3: torch.ones(1)}, "holds 3"),
        ({"x.weight": torch.ones(2, 2).to_sparse()}, "holds 'x.weight'"),
        ({"x.weight": STRIDE_TRICK}, "holds 'x.weight'"),
        ({"x.weight": torch.nn.Parameter(torch.ones(1))}, "holds 'x.weight'"),
    ],
)
def test_anything_beyond_the_schema_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / SIDECAR)
    with pytest.raises(FormatError, match=message):
        read_sidecar(tmp_path / SIDECAR, 1 << 30)


@pytest.mark.parametrize("cut", [1, 100, 1000, -1, -100])
def test_a_truncated_pickle_is_refused(models: Path, tmp_path: Path, cut: int) -> None:
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    size = (folder / SIDECAR).stat().st_size
    os.truncate(folder / SIDECAR, cut if cut > 0 else size + cut)
    with pytest.raises(FormatError):
        validate(folder)


Change = Callable[[Any], Any]
SIDECAR_CASES: list[tuple[Change, str]] = [
    (lambda s: s.pop(f"{FIRST}.weight"), "is not a matrix in it and the safetensors"),
    (lambda s: s.pop(f"{FIRST}.log_scale"), f"has tensors of {FIRST} but no log_scale"),
    (lambda s: s.update({f"{FIRST}.log_scale": torch.zeros(127)}), "has 127 values; 128 x 128 weights need a whole"),
    (lambda s: s.update({f"{FIRST}.log_scale": torch.zeros(128).double()}), "is torch.float64"),
    (lambda s: s.update({f"{FIRST}.weight": torch.zeros(128, 64)}), r"is \(128, 64\) in qat_quantized_weights"),
    (lambda s: s[f"{FIRST}.weight"].mul_(2), "differs between qat_quantized_weights.bin and the safetensors"),
    (lambda s: s[f"{FIRST}.log_scale"].fill_(200.0), "exponential is not finite and positive"),
    (lambda s: s[f"{FIRST}.log_scale"].fill_(float("nan")), "exponential is not finite and positive"),
    (lambda s: s[f"{FIRST}.log_scale"].add_(0.3), "is not on the grid of its scales"),
    (lambda s: s[f"{FIRST}.log_scale"].sub_(1.0), r"leaves \[-8, 7\], the range of w4g128"),
    (lambda s: s.update({f"{FIRST}.bias": torch.zeros(128)}), rf"{FIRST}\.bias differs between"),
]


@pytest.mark.parametrize(("change", "message"), SIDECAR_CASES)
def test_a_sidecar_that_lies_is_refused(models: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    sidecar = torch.load(folder / SIDECAR, weights_only=True)
    change(sidecar)
    torch.save(sidecar, folder / SIDECAR)
    with pytest.raises(FormatError, match=message) as caught:
        validate(folder)
    assert len(str(caught.value).splitlines()) == 1


CONFIG_CASES: list[tuple[Change, str]] = [
    (lambda c: c.update(qat=[]), "has a 'qat' section that is no object"),
    (lambda c: c["qat"].update(bits=5), "qat says bits 5"),
    (lambda c: c["qat"].update(group_size="128"), "group_size '128'"),
    (lambda c: c["qat"].update(group_size=64), "qat says group_size 64, the log_scale"),
    (lambda c: c["qat"].update(scale_dtype="float16"), "scale_dtype 'float16'; expected one of bfloat16, float32"),
    (lambda c: c["qat"].update(bits=2), r"leaves \[-2, 1\], the range of w2g128"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_CASES)
def test_a_configuration_that_lies_is_refused(models: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    edit_json(folder / "config.json", change)
    assert detect(folder).name == "official"
    with pytest.raises(FormatError, match=message) as caught:
        validate(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_shard_that_leads_nowhere_is_not_counted(models: Path, tmp_path: Path) -> None:
    folder = copy_of(models / "w4-official", tmp_path / "copy")
    (folder / "stray.safetensors").symlink_to("nowhere")
    assert verify(folder, models / "w4").equal
