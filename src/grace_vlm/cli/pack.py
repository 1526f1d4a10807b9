"""``grace pack``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, say

HELP = """Convert a quantized model folder to a layout that runtimes load, prove it and certify it.

Codes are never changed. A layout that cannot hold the scales is refused, unless --allow-rounding.
Example: grace pack runs/demo/grace_w4 runs/packed --format compressed-tensors"""
FORMATS = "compressed-tensors, awq, gptq, gptq_v2, gguf, mlx, official, official-awq or grace."


def pack_model(
    src: str = typer.Argument(..., help="Quantized model folder of any readable layout, or run folder."),
    dst: Path = typer.Argument(..., help="Folder to write."),
    format: str = typer.Option("compressed-tensors", "--format", help=FORMATS),
    allow_rounding: bool = typer.Option(False, "--allow-rounding", help="Write scales that the layout must round."),
    vision_tower: str = typer.Option(None, "--vision-tower", help="Tower of a checkpoint in LLaVA's original layout."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing target."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.formats.pack import convert

    with ProgressBar("packing") as bar:
        packed = convert(
            Path(src),
            dst,
            format,
            allow_rounding=allow_rounding,
            vision_tower=vision_tower,
            overwrite=overwrite,
            notify=say,
            progress=lambda what, done, total: bar.update(done, total, what),
        )
    num_bytes = sum(path.stat().st_size for path in dst.rglob("*") if path.is_file())
    if as_json:
        exact = packed.exactness
        emit_json(
            {
                "model": str(dst),
                "format": format,
                "bytes": num_bytes,
                "exact": exact.exact,
                "largest_scale_error": exact.scale_error,
                "largest_weight_error": exact.weight_error,
                "certificate": packed.root,
            }
        )
    else:
        print(f"{dst}  ({format}, {num_bytes:,} bytes, certificate {packed.root[:16]})")
