"""``grace quantize``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import emit_json
from grace_vlm.errors import ConfigError

HELP = """Quantize a model without training it: the rounding baseline.

Example: grace quantize runs/demo/student runs/rtn --method rtn --scheme w4g128"""


def quantize_model(
    model: str = typer.Argument(..., help="Model folder, run folder or hub id."),
    dst: Path = typer.Argument(..., help="Model folder to write."),
    scheme: str = typer.Option(..., "--scheme", help="w8g128, w4g128, w3g64, ..."),
    method: str = typer.Option("rtn", "--method", help="rtn: round to nearest."),
    scale: str = typer.Option("mse", "--scale", help="minmax or mse: how scales are chosen."),
    calibration: Path = typer.Option(None, "--calibration", help="Rows to calibrate on; rtn takes none."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing target."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    if method != "rtn":
        raise ConfigError(f"method {method!r} is not one of rtn")
    if scale not in ("minmax", "mse"):
        raise ConfigError(f"scale {scale!r} is not one of minmax, mse")
    if calibration is not None:
        raise ConfigError("method rtn takes no --calibration; leave it out")
    from grace_vlm.ptq.quantize import quantize_folder

    plan = quantize_folder(model, dst, scheme, scale="mse" if scale == "mse" else "minmax", overwrite=overwrite)
    if as_json:
        emit_json({"model": str(dst), "quantized": len(plan.schemes), "bf16": len(plan.bf16_names)})
    else:
        print(f"{dst}  ({len(plan.schemes)} linears on {scheme}, {len(plan.bf16_names)} in bf16)")
