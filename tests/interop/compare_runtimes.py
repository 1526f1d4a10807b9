"""Runs in an environment without grace: do AWQ and GPTQ folders give the baked folder's logits, MLX its weights?

    python compare_runtimes.py BAKED --inputs FILE.safetensors --dtype float32 PACKED...
    python compare_runtimes.py --mlx BAKED PACKED [BAKED PACKED]...

The first loads each PACKED with stock Transformers (which calls gptqmodel and optimum) and asks both. The second runs
``mx.dequantize`` on the tensors of each PACKED and compares with the weights of the BAKED before it. Prints one JSON
line; it is for the caller to judge.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from compare_logits import load, stored_inputs
from safetensors import safe_open

LIMIT = 60


def compare_models(options: argparse.Namespace, problems: list[str]) -> dict[str, object]:
    dtype = getattr(torch, options.dtype)
    baked = load(options.baked, problems, dtype=dtype)
    report: dict[str, object] = {}
    for folder in options.packed:
        packed = load(folder, problems, dtype=dtype, device_map="cpu")
        kinds = sorted({type(m).__name__ for m in packed.modules() if "Linear" in type(m).__name__} - {"Linear"})
        if not kinds:
            problems.append(f"{folder}: no linear is quantized")
        largest = agree = total = pictures = 0
        with torch.inference_mode():
            for inputs in stored_inputs(options.inputs, LIMIT):
                inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
                expected, found = baked(**inputs).logits.float(), packed(**inputs).logits.float()
                largest = max(largest, (found - expected).abs().max().item())
                agree += int((found.argmax(-1) == expected.argmax(-1)).sum())
                total += expected.shape[0] * expected.shape[1]
                pictures += "pixel_values" in inputs
        report[Path(folder).name] = {
            "linears": kinds,
            "max_abs_difference": largest,
            "top1_agreement": agree / max(1, total),
            "with_picture": pictures,
            "logit_std": expected.std().item(),
        }
    return report


def compare_mlx(options: argparse.Namespace) -> dict[str, object]:
    import mlx.core as mx
    import numpy as np

    report: dict[str, object] = {}
    folders = [options.baked, *options.packed]
    for source, folder in zip(folders[::2], folders[1::2], strict=True):
        with safe_open(Path(source) / "model.safetensors", framework="pt") as handle:
            baked = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        stated = json.loads((Path(folder) / "config.json").read_text())["quantization"]
        tensors = mx.load(str(Path(folder) / "model.safetensors"))
        names = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
        largest, changed = 0.0, 0
        for name in names:
            parts = (tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
            weight = mx.dequantize(*parts, group_size=stated["group_size"], bits=stated["bits"], mode=stated["mode"])
            found = torch.from_numpy(np.array(weight.astype(mx.float32))).to(torch.bfloat16)
            expected = baked[f"{name}.weight"]
            changed += int((found != expected).sum())
            largest = max(largest, (found.float() - expected.float()).abs().max().item())
        report[Path(folder).name] = {"linears": len(names), "weights_changed": changed, "max_abs_difference": largest}
    return report


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("baked")
    parser.add_argument("packed", nargs="+")
    parser.add_argument("--inputs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mlx", action="store_true")
    options = parser.parse_args()
    problems: list[str] = []
    if importlib.util.find_spec("grace_vlm") is not None:
        problems.append("grace_vlm can be imported here: this environment proves nothing")
    found = compare_mlx(options) if options.mlx else compare_models(options, problems)
    print(json.dumps({"problems": problems, "folders": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
