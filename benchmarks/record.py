"""One CSV schema for what is timed on a GPU, and how samples become its rows.

    bench,case,impl,metric,p20,p50,p80,unit,device,driver,torch,triton,commit,date

One row per (case, impl, metric): percentiles of its samples, and what they were taken on. ``write_rows`` replaces rows
of the same key and keeps the others, and a reader never sees half a file. ``time_interleaved`` runs the competitors in
turns in one process: CUDA events around every call and one synchronisation at the end, so that the clock of a warm GPU
and its neighbours' load are the same for all.

Only PyTorch is imported: this runs on a machine that has little else.
"""

from __future__ import annotations

import csv
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    "bench", "case", "impl", "metric", "p20", "p50", "p80", "unit",
    "device", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip
KEY = ("case", "impl", "metric")
STANDARD_GPU = "NVIDIA H100 80GB HBM3"
"""The GPU whose rows stand in ``<bench>.csv``; those of another one go to ``<bench>_<gpu>.csv``."""
GB = 1e9

Row = dict[str, str]
Call = Callable[[], object]


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(p20, p50, p80), linear between the samples; at least one sample."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = math.floor(place), math.ceil(place)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.5), at(0.8)


def device_name(device: torch.device) -> str:
    """The GPU's name as CUDA says it; ``cpu`` for a CPU."""
    if device.type != "cuda":
        return "cpu"
    gpu()
    return torch.cuda.get_device_name(device)


def gpu() -> torch.device:
    """The GPU; a program that wants one where none is ends with a line."""
    if not torch.cuda.is_available():
        sys.stderr.write("error: a GPU is wanted, and none is usable here (grace doctor)\n")
        sys.exit(2)
    return torch.device("cuda")


def results_file(bench: str, device: torch.device) -> Path:
    """``benchmarks/results/<bench>.csv`` for the standard GPU, ``<bench>_<gpu>.csv`` for any other device."""
    name = device_name(device)
    if name == STANDARD_GPU:
        return RESULTS / f"{bench}.csv"
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ")).strip("_")
    return RESULTS / f"{bench}_{slug}.csv"


def _said_by(*command: str) -> str | None:
    """Standard output of a program without its last line's end; None if it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def driver_version() -> str:
    """Of the GPU's driver, by nvidia-smi; empty without one."""
    said = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return said.partition("\n")[0]


def commit_name(root: Path = ROOT) -> str:
    """The commit of the code, ``-dirty`` behind it if a tracked file differs.

    ``benchmarks/results`` may differ: a measurement changes it and it changes no measurement. The environment variable
    GRACE_COMMIT, if set, is believed instead: it is for a machine that has a copy of the tree without its history.
    """
    given = os.environ.get("GRACE_COMMIT")
    if given:
        return given
    commit = _said_by("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    tracked = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return f"{commit}-dirty" if _said_by("git", "-C", str(root), *tracked) else commit


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def place_of(device: torch.device) -> Row:
    """The columns from ``device`` to ``date``."""
    return {
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": commit_name(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def row_of(bench: str, case: str, impl: str, metric: str, samples: Sequence[float], unit: str, place: Row) -> Row:
    """One row; ``place`` is what ``place_of`` says."""
    numbers = dict(zip(("p20", "p50", "p80"), (f"{value:.6g}" for value in percentiles(samples)), strict=True))
    return {"bench": bench, "case": case, "impl": impl, "metric": metric, **numbers, "unit": unit, **place}


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of this schema; a file with other columns is a ``ValueError``."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than {','.join(COLUMNS)}; name another file")
        return list(reader)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, in the place of those with the same case, impl and metric; whole or not at all."""
    merged = {tuple(row[key] for key in KEY): row for row in (read_rows(path) if path.exists() else [])}
    merged.update({tuple(row[key] for key in KEY): row for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(merged.values())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def time_interleaved(
    calls: Mapping[str, Call], device: torch.device, iterations: int = 20, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of every call, taken in turns: a b c a b c ...

    On a GPU the time between two CUDA events around the call, with one synchronisation after all of them, so the host
    may run ahead; on a CPU ``perf_counter``. What a call returns is dropped at once.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    if device.type != "cuda":
        return _time_on_cpu(calls, iterations)
    with torch.cuda.device(device):
        pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        torch.cuda.synchronize()
        for _ in range(iterations):
            for name, call in calls.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                pairs[name].append((begin, end))
        torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in found] for name, found in pairs.items()}


def _time_on_cpu(calls: Mapping[str, Call], iterations: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(iterations):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            samples[name].append(1000 * (time.perf_counter() - started))
    return samples


def extra_gigabytes(call: Call, device: torch.device) -> float:
    """Peak memory of a call beyond what was there before it, in GB = 1e9 bytes, what it returns included.

    A GPU's only. Call once before, so that what libraries keep for themselves (cuBLAS' workspace) is there already.
    """
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / GB
