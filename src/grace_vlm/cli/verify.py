"""``grace verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from grace_vlm.cli.output import emit_json

HELP = """Prove that two quantized folders hold the same model: codes, scales, bf16(q*s), and the rest by value.

Exits 0 only when they are equal. Example: grace verify runs/demo/grace_w4 runs/demo/grace_w4_packed"""


def verify_models(
    a: Path = typer.Argument(..., help="Model folder, run folder or packed folder."),
    b: Path = typer.Argument(..., help="The other one."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.formats.verify import verify

    report = verify(a, b)
    if as_json:
        emit_json({**asdict(report), "equal": report.equal})
    elif report.equal:
        print(
            f"equal: {report.num_linears} linears ({report.num_codes:,} codes, {report.num_scales:,} scales, every "
            f"bf16(q*s)) and {report.num_tensors} other tensors ({report.num_values:,} values)"
        )
    else:
        print(f"different: {report.num_different} tensors; the first is {report.first}")
    raise typer.Exit(0 if report.equal else 1)
