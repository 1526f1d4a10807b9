"""Convert a model folder into another layout, prove it, publish it.

Nothing is published that does not read back equal: the staged folder is compared with the source, value for value,
before it gets its name.
"""

from __future__ import annotations

import os
from pathlib import Path

from grace_vlm.checkpoint.atomic import publish_folder, refuse_existing
from grace_vlm.errors import CheckpointError, FormatError
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.folder import resolve_model
from grace_vlm.formats.registry import converter_for, read_model
from grace_vlm.formats.verify import verify

_ROOM_BYTES = 1 << 20


def estimate_bytes(content: ModelContent, format_name: str) -> int:
    """What ``format_name`` will write, a little too high: checked against the free space before anything is written."""
    entries = content.linears.values()
    baked_bytes = sum(entry.bf16_bytes for entry in entries)
    packed_bytes = sum(int(entry.stored_bytes) for entry in entries)
    scales_bytes = sum(4 * e.out_features * e.in_features // e.scheme.group_size for e in entries if e.scheme)
    files = [path for path in content.folder.iterdir() if path.is_file() and path.suffix != ".bin"]
    rest_bytes = sum(path.stat().st_size for path in files) - (baked_bytes if content.baked else packed_bytes)
    linears_bytes = {
        "grace": baked_bytes + baked_bytes // 2 + scales_bytes,
        "compressed-tensors": packed_bytes,
        "official": 2 * baked_bytes + scales_bytes,
    }
    return rest_bytes + linears_bytes[format_name] + _ROOM_BYTES


def pack(src: Path, dst: Path, format_name: str, *, overwrite: bool = False) -> Path:
    """Write the model in ``src`` to ``dst`` in another layout, atomically; returns ``dst``.

    Args:
        src: a model folder of any readable layout, or a run folder.
        format_name: ``compressed-tensors``, ``official`` or ``grace``.
        overwrite: replace a published ``dst``.

    Raises:
        FormatError: unknown format, no grid in ``src``, or a grid that the layout cannot hold exactly.
        CheckpointError: ``src`` is no model, ``dst`` exists, or the disk refuses.
    """
    converter = converter_for(format_name)
    source = resolve_model(src)
    if Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(source)):
        raise CheckpointError(f"{dst} is {source} or lies inside it; choose a folder elsewhere")
    refuse_existing(dst, overwrite)
    content = read_model(source)
    if not content.linears:
        raise FormatError(f"{source} has no grid, so there is nothing to pack; quantize it first (grace quantize)")
    with publish_folder(dst, overwrite=overwrite, needed_bytes=estimate_bytes(content, format_name)) as stage:
        converter.write(content, stage)
        report = verify(source, stage)
        if not report.equal:
            raise FormatError(f"{dst} is not published: it would not be equal to {source}: {report.first}")
    return dst
