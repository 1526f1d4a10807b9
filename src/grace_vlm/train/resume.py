"""When a run may go on from a checkpoint, and whether it then ends with the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers

from grace_vlm.checkpoint.manifest import sha256_file
from grace_vlm.checkpoint.store import require_same
from grace_vlm.train.cache_identity import FILE as CACHE_FILE
from grace_vlm.train.config import Recipe, Sharding, dump_recipe
from grace_vlm.train.ranks import Ranks


def fingerprint_of(recipe: Recipe, ranks: Ranks, sharding: Sharding, cache: str | None) -> dict[str, Any]:
    """What must be the same for a resume to be exact; ``cache``: folder of the teacher's signals, if they are read."""
    return {
        "recipe_sha256": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16],
        "num_processes": ranks.count,
        "sharding": sharding,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({} if cache is None else {"teacher_cache": sha256_file(Path(cache) / CACHE_FILE)[:16]}),
    }


def what_is_not_exact(own: dict[str, Any], found: dict[str, Any], run: Path) -> str:
    """Compare this run's fingerprint with a checkpoint's in the folder ``run``; returns what is to be said of a resume
    that is not exact.

    Another number of processes, and another sharding (that a launcher asks for), only add up in another order.

    Raises:
        CheckpointError: anything else differs.
    """
    sharding = found["sharding"]
    as_found = {**own, "sharding": sharding}
    said = ""
    if found["num_processes"] != own["num_processes"]:
        as_found |= {key: found[key] for key in ("num_processes", "num_threads")}
        said = f", which {found['num_processes']} processes wrote and {own['num_processes']} read: not bit-exact"
    elif sharding != own["sharding"]:
        said = f", which runtime.sharding={sharding} wrote and {own['sharding']} reads: not bit-exact"
    require_same(as_found, found, run)
    return said
