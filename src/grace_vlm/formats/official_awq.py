"""The official packed layout: the tensors of AutoAWQ (awq.py), and what the official loader finds them by.

    config.json["awq_packing"]    {"bits": 4, "group_size": 128, "zero_point": 8, "version": "gemm"}
    awq_quantized_modules.json    {"bits": 4, "group_size": 128, "modules": [sorted names]}

Theirs has no ``quantization_config``, so nothing but its own loader opens it. Ours has: the official loader deletes it
in memory, and every AWQ runtime opens the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace_vlm.errors import FormatError
from grace_vlm.formats.awq import Awq
from grace_vlm.formats.converter import ModelContent
from grace_vlm.formats.packed import Grid, one_grid, stated_grid
from grace_vlm.formats.weights import read_inside

MODULES = "awq_quantized_modules.json"


class OfficialAwq(Awq):
    """The converter; see the head of the file for what it adds to AWQ."""

    name = "official-awq"
    keeps_original_names = True

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return "awq_packing" in config or (folder / MODULES).is_file()

    def read(self, folder: Path) -> ModelContent:
        content = super().read(folder)
        listed = read_inside(folder, MODULES).get("modules")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise FormatError(f"{folder / MODULES} needs a list 'modules' of names")
        if odd := sorted(set(listed) ^ content.linears.keys()):
            where = "lists, but no tensor has" if odd[0] in listed else "does not list"
            raise FormatError(f"{folder / MODULES} {where} {odd[0]}; list and tensors must agree")
        return content

    def take_statement(self, folder: Path, config: dict[str, Any]) -> list[Grid]:
        config.pop("quantization_config", None)
        packing, side = config.pop("awq_packing", None), read_inside(folder, MODULES)
        stated = [(name, s) for name, s in (("awq_packing", packing), (MODULES, side)) if isinstance(s, dict)]
        grids = {stated_grid(folder, name, s.get("bits"), s.get("group_size")) for name, s in stated}
        zero, version = stated[0][1].get("zero_point", 8), stated[0][1].get("version", "gemm")
        if len(grids) != 1 or next(iter(grids))[0] != 4 or zero != 8 or version != "gemm":
            raise FormatError(
                f"{folder} says {sorted(grids)} (bits, group_size), zero_point {zero!r}, version {version!r}; "
                "expected one grid of 4 bits, 8, 'gemm'"
            )
        return list(grids)

    def statement(self, content: ModelContent) -> dict[str, Any]:
        _, group_size = one_grid(self.name, content.linears)
        packing = {"bits": 4, "group_size": group_size, "zero_point": 8, "version": "gemm"}
        return {**super().statement(content), "awq_packing": packing}

    def write(self, content: ModelContent, stage: Path) -> None:
        super().write(content, stage)
        _, group_size = one_grid(self.name, content.linears)
        side = {"bits": 4, "group_size": group_size, "modules": sorted(content.linears)}
        (stage / MODULES).write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")
