"""``grace verify``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, show

if TYPE_CHECKING:
    import torch

    from grace_vlm.formats.converter import ModelContent
    from grace_vlm.formats.verify import VerifyReport
    from grace_vlm.quant.scheme import QuantizedTensor

HELP = """Prove that two folders hold the same model: codes, scales, bf16(q*s), and the rest by value.

B may be a certificate file; without B, A is checked against the certificate that lies in it.
Exits 0 only when they are equal. Example: grace verify runs/demo/grace_w4 runs/demo/grace_w4_packed"""


def verify_models(
    a: Path = typer.Argument(..., help="Model folder, run folder or packed folder of any layout."),
    b: Path = typer.Argument(None, help="The other one, or a grace-certificate.json."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    if b is None or b.is_file():
        _verify_certificate(a, b, as_json)
    with ProgressBar("comparing") as bar:
        report = _compared(a, b, bar.update)
    if as_json:
        emit_json({**asdict(report), "equal": report.equal})
    elif report.equal and report.num_linears == 0:
        print(
            f"equal by value, but neither has a grid (no codes, no scales): {report.num_tensors} tensors "
            f"({report.num_values:,} values)"
        )
    elif report.equal:
        print(
            f"equal: {report.num_linears} linears ({report.num_codes:,} codes, {report.num_scales:,} scales, every "
            f"bf16(q*s)) and {report.num_tensors} other tensors ({report.num_values:,} values)"
        )
    else:
        show(f"different: {report.num_different} tensors or settings; the first is {report.first}")
    raise typer.Exit(0 if report.equal else 1)


def _compared(a: Path, b: Path, update: Callable[[int, int], None]) -> VerifyReport:
    from grace_vlm.formats.folder import resolve_model
    from grace_vlm.formats.registry import read_model
    from grace_vlm.formats.verify import compare

    one, other = read_model(resolve_model(a)), read_model(resolve_model(b))
    return compare(_counting(one, update), other)


def _counting(content: ModelContent, update: Callable[[int, int], None]) -> ModelContent:
    """``content``, of which each tensor that is read moves the bar: by its weights, as a certificate counts them."""
    from grace_vlm.formats.lazy import Lazy, spec_of

    sizes = {name: entry.out_features * entry.in_features for name, entry in content.linears.items()}
    sizes |= {name: spec_of(content.dense, name).num_bytes // 2 for name in content.dense}
    done: dict[str, int] = {}

    def read(name: str) -> None:
        done[name] = sizes[name]
        update(sum(done.values()), sum(sizes.values()))

    def quantized(name: str) -> QuantizedTensor:
        read(name)
        return content.quantized[name]

    def dense(name: str) -> torch.Tensor:
        read(name)
        return content.dense[name]

    return replace(
        content,
        quantized=Lazy(content.quantized, quantized),
        dense=Lazy(content.dense, dense, lambda name: spec_of(content.dense, name)),
    )


def _verify_certificate(folder: Path, certificate: Path | None, as_json: bool) -> None:
    from grace_vlm.formats.verify import verify_certificate

    with ProgressBar("proving") as bar:
        root, different = verify_certificate(folder, certificate, bar.update)
    if as_json:
        emit_json({"root": root, "equal": not different, "num_different": len(different), "different": different[:20]})
    elif different:
        show(f"different: {len(different)} tensors or files are not as certified; the first is {different[0]}")
    else:
        print(f"equal: every tensor is that of the certificate {root}")
    raise typer.Exit(1 if different else 0)
