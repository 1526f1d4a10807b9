"""``grace pack``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import emit_json

HELP = """Convert a quantized model folder to a layout that runtimes load. Converts only; never rounds.

Example: grace pack runs/demo/grace_w4 runs/packed --format compressed-tensors"""


def pack_model(
    src: str = typer.Argument(..., help="Quantized model folder or run folder."),
    dst: Path = typer.Argument(..., help="Folder to write."),
    format: str = typer.Option("compressed-tensors", "--format", help="compressed-tensors or official."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing target."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.formats.pack import pack

    pack(Path(src), dst, format, overwrite=overwrite)
    num_bytes = sum(path.stat().st_size for path in dst.rglob("*") if path.is_file())
    if as_json:
        emit_json({"model": str(dst), "format": format, "bytes": num_bytes})
    else:
        print(f"{dst}  ({format}, {num_bytes:,} bytes)")
