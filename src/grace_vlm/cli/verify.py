"""``grace verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from grace_vlm.cli.output import ProgressBar, emit_json

HELP = """Prove that two quantized folders hold the same model: codes, scales, bf16(q*s), and the rest by value.

B may be a certificate file; without B, A is checked against the certificate that lies in it.
Exits 0 only when they are equal. Example: grace verify runs/demo/grace_w4 runs/demo/grace_w4_packed"""


def verify_models(
    a: Path = typer.Argument(..., help="Model folder, run folder or packed folder of any layout."),
    b: Path = typer.Argument(None, help="The other one, or a grace-certificate.json."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    if b is None or b.is_file():
        _verify_certificate(a, b, as_json)
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


def _verify_certificate(folder: Path, certificate: Path | None, as_json: bool) -> None:
    from grace_vlm.formats.verify import verify_certificate

    with ProgressBar("proving") as bar:
        root, different = verify_certificate(folder, certificate, bar.update)
    if as_json:
        emit_json({"root": root, "equal": not different, "num_different": len(different), "different": different[:20]})
    elif different:
        print(f"different: {len(different)} tensors are not those of the certificate; the first is {different[0]}")
    else:
        print(f"equal: every tensor is that of the certificate {root}")
    raise typer.Exit(1 if different else 0)
