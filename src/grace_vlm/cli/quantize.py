"""``grace quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import typer

from grace_vlm.cli.output import ProgressBar, emit_json
from grace_vlm.errors import ConfigError

HELP = """Quantize a model without training it: rounding, AWQ, GPTQ or block reconstruction.

Example: grace quantize runs/demo/student runs/gptq --method gptq --scheme w4g128 --calibration runs/demo/data/train_questions.jsonl"""  # noqa: E501


def quantize_model(
    model: str = typer.Argument(..., help="Model folder, run folder or hub id."),
    dst: Path = typer.Argument(..., help="Model folder to write."),
    scheme: str = typer.Option(..., "--scheme", help="w8g128, w4g128, w3g64, ..."),
    method: str = typer.Option("rtn", "--method", help="rtn (round to nearest), awq, gptq or block."),
    scale: str = typer.Option(
        "mse", "--scale", help="minmax, mse or mse_signed (negative where that errs less): how scales are chosen."
    ),
    calibration: Path = typer.Option(None, "--calibration", help="Rows to calibrate on, for all but rtn."),
    images: Path = typer.Option(None, "--images", help="Root of their image paths; default: their folder."),
    num_rows: int = typer.Option(None, "--num-rows", help="How many of the rows are drawn; default: 128."),
    seed: int = typer.Option(None, "--seed", help="Of that draw; default: 0."),
    device: str = typer.Option(None, "--device", help="auto, cpu, cuda: where a calibration computes; default: auto."),
    for_training: bool = typer.Option(
        False, "--for-training", help="awq, block: do not round; write a student for quant.scale_init=stored."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing target."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.ptq.calibration import Calibration
    from grace_vlm.ptq.quantize import PtqMethod, quantize_folder
    from grace_vlm.quant.scale_init import ScaleRule

    for key, value, known in (("method", method, get_args(PtqMethod)), ("scale", scale, get_args(ScaleRule))):
        if value not in known:
            raise ConfigError(f"{key} {value!r} is not one of {', '.join(known)}")
    given: dict[str, Any] = {"images": images, "num_rows": num_rows, "seed": seed, "device": device}
    given = {name: value for name, value in given.items() if value is not None}
    if given and calibration is None:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{names} is of a calibration; give --calibration FILE with --method awq, gptq or block")
    with ProgressBar("quantizing") as bar:
        plan = quantize_folder(
            model,
            dst,
            scheme,
            method=cast("PtqMethod", method),
            scale=cast("ScaleRule", scale),
            calibration=None if calibration is None else Calibration(calibration, **given),
            for_training=for_training,
            overwrite=overwrite,
            progress=bar.update,
        )
    if as_json:
        emit_json({"model": str(dst), "quantized": len(plan.schemes), "bf16": len(plan.bf16_names)})
    elif for_training:
        print(f"{dst}  (a start for {len(plan.schemes)} linears on {scheme}: train it with quant.scale_init=stored)")
    else:
        print(f"{dst}  ({len(plan.schemes)} linears on {scheme}, {len(plan.bf16_names)} in bf16)")
