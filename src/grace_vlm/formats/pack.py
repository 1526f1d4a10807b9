"""Convert a model folder into another layout, prove it, certify it, publish it.

    read source -> is the layout exact for it? -> write a stage -> read the stage back -> same certificate? -> publish

Tensor by tensor: one is in memory at a time. Nothing is published whose certificate, made from the staged bytes, is not
that of the source (rounded first, where the layout cannot hold its scales and the user agreed to it).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.atomic import publish_folder, refuse_existing, refuse_overlap, sweep_partials
from grace_vlm.errors import FormatError
from grace_vlm.formats.certificate import Certificate, Progress, certify, write_certificate
from grace_vlm.formats.converter import Converter, ModelContent, refuse
from grace_vlm.formats.folder import resolve_model
from grace_vlm.formats.lazy import spec_of
from grace_vlm.formats.llava_original import in_transformers_names
from grace_vlm.formats.registry import converter_for, read_model
from grace_vlm.formats.rounding import Exactness, as_stored, rounded
from grace_vlm.formats.shards import shard_bytes
from grace_vlm.formats.verify import compare
from grace_vlm.quant.scheme import QuantizedTensor

_ROOM_BYTES = 1 << 20


@dataclass(frozen=True)
class Packed:
    """What ``convert`` published: where, how exactly, and the root of its certificate."""

    folder: Path
    exactness: Exactness
    root: str


def estimate_bytes(content: ModelContent, converter: Converter) -> int:
    """What a layout will write, a little too high: checked against the free space before anything is written."""
    linears_bytes = sum(converter.linear_bytes(entry) for entry in content.linears.values())
    dense_bytes = shard_bytes(spec_of(content.dense, name) for name in content.dense)
    small = [path for path in content.folder.iterdir() if path.suffix not in (".safetensors", ".bin", ".gguf")]
    return linears_bytes + dense_bytes + sum(path.stat().st_size for path in small if path.is_file()) + _ROOM_BYTES


def certify_as_stored(
    content: ModelContent, converter: Converter, progress: Progress | None = None
) -> tuple[Certificate, Exactness]:
    """The certificate that ``content`` has once ``converter`` stored it, and what its scales lose, in one reading.

    The stored BF16 weights of the source are checked against its own scales on the way.
    """
    found = Exactness()

    def stored(name: str, before: QuantizedTensor) -> QuantizedTensor:
        nonlocal found
        after = as_stored(name, before, converter)
        found = found.including(name, before, after)
        return after

    return certify(content, progress, stored), found


def convert(
    src: Path,
    dst: Path,
    format_name: str,
    *,
    allow_rounding: bool = False,
    vision_tower: str | None = None,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda message: None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Packed:
    """Write the model in ``src`` to ``dst`` in another layout, atomically; says how exactly.

    Args:
        src: a model folder of any readable layout, or a run folder.
        format_name: one of ``registry.converters()``.
        allow_rounding: write also where the layout cannot hold every scale; codes are kept in any case.
        vision_tower: for the original LLaVA layout, the folder or hub id of its tower.
        overwrite: replace a published ``dst``.
        notify: told whether the layout is exact for this checkpoint, before anything is written.
        progress: called with (what, weights done, weights in all).

    Raises:
        ConfigError: unknown format.
        FormatError: no grid in ``src``, a grid that the layout cannot hold, or scales that it would round.
        CheckpointError: ``src`` is no model, ``dst`` exists, or the disk refuses.
    """
    converter = converter_for(format_name)
    source = resolve_model(src)
    refuse_overlap(source, dst)
    for left in sweep_partials(Path(os.path.abspath(dst)).parent, only=dst.name):
        notify(f"recovered from an interrupted write: {left.name}")
    refuse_existing(dst, overwrite)
    content = read_model(source)
    if not content.linears:
        raise FormatError(f"{source} has no grid, so there is nothing to pack; quantize it first (grace quantize)")
    if not (source / "config.json").is_file():
        raise FormatError(f"{source} has no config.json, which {format_name} needs; put the model's own beside it")
    if not converter.keeps_original_names:
        content = in_transformers_names(content, vision_tower)
    refuse(converter, content)

    def bar(what: str) -> Progress | None:
        return (lambda done, total: progress(what, done, total)) if progress else None

    wanted, exactness = certify_as_stored(content, converter, bar("reading"))
    notify(f"{format_name} is {exactness}")
    if not exactness.exact:
        if not allow_rounding:
            raise FormatError(f"{format_name} is {exactness}; pass --allow-rounding to write it all the same")
        content = rounded(content, converter)
    with publish_folder(dst, overwrite=overwrite, needed_bytes=estimate_bytes(content, converter)) as stage:
        if progress:
            progress("writing", 0, 1)
        converter.write(content, stage)
        staged = converter.read(stage)
        certificate = certify(staged, bar("proving"))
        if certificate["root"] != wanted["root"]:
            raise FormatError(
                f"{dst} is not published: it would not be equal to {source}: {compare(content, staged).first}"
            )
        write_certificate(stage, certificate)
    return Packed(dst, exactness, certificate["root"])


def pack(src: Path, dst: Path, format_name: str, **options: Any) -> Path:
    """``convert`` with the same arguments and errors, for those who want the folder alone; returns ``dst``."""
    return convert(src, dst, format_name, **options).folder
