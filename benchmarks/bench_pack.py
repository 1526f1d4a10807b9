"""``grace pack`` at the size of a model: seconds and peak memory of each layout, beside ``cp -r`` of the same folder.

    python benchmarks/bench_pack.py [--source Qwen/Qwen3-VL-2B-Instruct] [--scheme w4g128]

Weights are random at the true shapes; a layout is packed in a process of its own, whose peak memory is what the kernel
says of it (resident, mapped pages of the source included). ``cp`` is timed before each, so both see the same page
cache. Appends to ``benchmarks/results/pack.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path("benchmarks/results/pack.csv")
FIELDS = (
    "source", "scheme", "layout", "seconds", "cpu_seconds", "cp_seconds", "ratio_to_cp", "peak_rss_mib",
    "source_bytes", "bytes", "exact", "cores", "python", "torch", "commit",
)  # fmt: skip


def make_source(root: Path, source: str, scheme: str) -> Path:
    """A model folder with a grid: random codes and scales at the true shapes, written tensor by tensor."""
    import torch

    from grace_vlm.formats.converter import ModelContent
    from grace_vlm.formats.folder import ModelFolder
    from grace_vlm.formats.lazy import Lazy, TensorSpec
    from grace_vlm.models.adapter import plan_model, stored_name
    from grace_vlm.models.load import describe_model
    from grace_vlm.models.toy import build_toy_processor
    from grace_vlm.quant.scheme import QuantizedTensor

    folder = root / f"{source.split('/')[-1]}-{scheme}"
    if folder.exists():
        return folder
    model, adapter = describe_model(source)
    config = model.config
    plan = plan_model(model, adapter, scheme)
    entries = {stored_name(adapter, e.name): e for e in plan.entries if e.scheme}
    shapes = {stored_name(adapter, name): tuple(p.shape) for name, p in model.named_parameters()}
    dense = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in entries}
    generator = torch.Generator().manual_seed(0)

    def linear(name: str) -> QuantizedTensor:
        entry = entries[name]
        assert entry.scheme is not None
        shape, groups = (entry.out_features, entry.in_features), entry.in_features // entry.scheme.group_size
        codes = torch.randint(entry.scheme.qmin, entry.scheme.qmax + 1, shape, generator=generator, dtype=torch.int8)
        scale = torch.empty(shape[0], groups).uniform_(0.002, 0.02, generator=generator).to(torch.bfloat16)
        return QuantizedTensor(codes, scale, entry.scheme)

    made: dict[str, QuantizedTensor] = {}

    def remembered(name: str) -> QuantizedTensor:
        return made.setdefault(name, linear(name))

    content = ModelContent(
        layout="grace",
        folder=root,
        config=json.loads(config.to_json_string()),
        linears=entries,
        quantized=Lazy(entries, remembered),
        baked={},
        dense=Lazy(
            dense,
            lambda n: torch.empty(dense[n]).normal_(0, 0.02, generator=generator).to(torch.bfloat16),
            lambda n: TensorSpec(torch.bfloat16, dense[n]),
        ),
        bf16_names=tuple(stored_name(adapter, name) for name in plan.bf16_names),
        companions=lambda stage: None,
    )
    folder.mkdir(parents=True)
    # A toy's tokenizer and picture settings: gguf carries them in its headers.
    build_toy_processor(["what shape is in the picture?"] * 8).save_pretrained(folder)
    ModelFolder().write(content, folder)
    return folder


def pack_once(folder: Path, target: Path, layout: str) -> None:
    """The child: pack, and say what it took."""
    from grace_vlm.formats.pack import convert

    started = time.perf_counter()
    packed = convert(folder, target, layout)
    used, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime + children.ru_utime + children.ru_stime,
        "peak_rss_mib": max(used.ru_maxrss, children.ru_maxrss) / 1024,
        "exact": packed.exactness.exact,
    }
    print(json.dumps(report))


def copy_seconds(folder: Path, target: Path) -> float:
    """``cp -r`` and ``sync`` of the source: what the disk takes for as many bytes."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", folder, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="Qwen/Qwen3-VL-2B-Instruct")
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--root", type=Path, default=Path("runs/bench_pack"))
    parser.add_argument("--layouts", nargs="*")
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        pack_once(Path(options.child[0]), Path(options.child[1]), options.child[2])
        return
    import torch

    from grace_vlm.formats.registry import converters

    folder = make_source(options.root, options.source, options.scheme)
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for layout in options.layouts or converters():
            target = options.root / "packed"
            shutil.rmtree(target, ignore_errors=True)
            copied = copy_seconds(folder, options.root / "copy")
            command = [sys.executable, __file__, "--child", str(folder), str(target), layout]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                print(f"{layout}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            report = json.loads(ran.stdout.splitlines()[-1])
            row = {
                "source": options.source,
                "scheme": options.scheme,
                "layout": layout,
                "seconds": f"{report['seconds']:.1f}",
                "cpu_seconds": f"{report['cpu_seconds']:.1f}",
                "cp_seconds": f"{copied:.1f}",
                "ratio_to_cp": f"{report['seconds'] / copied:.2f}",
                "peak_rss_mib": f"{report['peak_rss_mib']:.0f}",
                "source_bytes": folder_bytes(folder),
                "bytes": folder_bytes(target),
                "exact": report["exact"],
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "commit": os.environ.get("GRACE_COMMIT", ""),
            }
            writer.writerow(row)
            file.flush()
            print(row, flush=True)
            shutil.rmtree(target)


if __name__ == "__main__":
    main()
