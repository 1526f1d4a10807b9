"""The README.md of a model folder: what it is, from what, how well it did, how to open it.

Made from the run alone: recipe, plan, the last recorded step and the ledger. The licence is the base's, read from the
base's own README (or known, for the published bases); where neither says, the card says that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from grace_vlm import __version__
from grace_vlm.models.known import LICENCES
from grace_vlm.models.load import is_hub_id
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.train.config import Recipe

_TERMS = ("loss", "cross_entropy", "distillation", "relational", "weight", "scale_drift")


def base_licence(recipe: Recipe) -> str | None:
    """The licence of what the student started from, as its README's front matter names it; None if nothing does."""
    for name in (recipe.model.student, recipe.model.base):
        if name is None:
            continue
        for folder in (Path(name), Path(name) / "final"):
            readme = folder / "README.md"
            if readme.is_file() and (found := _front_matter(readme).get("license")):
                return str(found)
        if name in LICENCES:
            return LICENCES[name]
    return None


def _front_matter(readme: Path) -> dict[str, Any]:
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        found = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def model_card(
    recipe: Recipe, plan: QuantPlan, last_line: Mapping[str, Any] | None = None, num_bad_rows: int = 0
) -> str:
    """Markdown with YAML front matter.

    Args:
        last_line: of ``metrics.jsonl``; None before the first step.
        num_bad_rows: rows in the ledger.
    """
    names = sorted({scheme.name for scheme in plan.schemes.values()})
    grid = ", ".join(names) if names else "none (BF16)"
    data = recipe.data
    licence = base_licence(recipe)
    lines = [f"- Student: `{recipe.model.student}`"]
    if recipe.objective().needs_teacher:
        lines.append(f"- Teacher: `{recipe.model.teacher}`, {recipe.model.teacher_precision}")
    rows = f"up to {data.max_batch_tokens:,} tokens" if data.max_batch_tokens else f"{data.micro_batch_size} rows"
    lines += [
        f"- Method: {recipe.method}, seed {recipe.runtime.seed}",
        f"- Grid: {grid}; {len(plan.schemes)} matrices on it, {len(plan.bf16_names)} linears in BF16",
        f"- Steps: {recipe.optim.num_steps} of {data.accumulation} x {rows}"
        f"{', packed' if data.packing else ''}; learning rate {recipe.optim.learning_rate:g}",
        f"- Data: `{data.train}`; {num_bad_rows} rows could not be used (`ledger.jsonl` of the run names them)",
        f"- Pictures while training: {_pixels(recipe)}; the processor here is the base's",
        f"- Licence: {licence or 'not stated by the base; ask its authors'}",
    ]
    return f"""---
library_name: transformers
{f"license: {licence}" if licence else "license: other"}
base_model: {_base(recipe)}
pipeline_tag: image-text-to-text
tags: [grace-vlm, {recipe.method}]
---

# {recipe.method} {recipe.scheme}

{chr(10).join(lines)}
{_results(last_line)}{_grid_note(bool(names))}
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", dtype="bfloat16")
processor = AutoProcessor.from_pretrained("FOLDER")
```

Trained with grace-vlm {__version__}, torch {torch.__version__}, transformers {transformers.__version__} (the method:
Chen et al., arXiv 2601.22709). The whole recipe is `config.yaml` of the run.
"""


def _base(recipe: Recipe) -> str:
    """What the student is, or what the run of ours that it is started from."""
    student, base = recipe.model.student, recipe.model.base
    return student if base is None or is_hub_id(student) else base


def _pixels(recipe: Recipe) -> str:
    least, most = recipe.data.min_pixels, recipe.data.max_pixels
    if least is None and most is None:
        return "as the processor resizes them"
    return f"{least or 'any'} to {most or 'any'} pixels each"


def _results(last_line: Mapping[str, Any] | None) -> str:
    if last_line is None:
        return ""
    values = [(name, last_line.get(name)) for name in _TERMS]
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in values if value is not None)
    return f"\n| at step {last_line['step'] + 1} | |\n|---|---|\n{rows}\n"


def _grid_note(has_grid: bool) -> str:
    if not has_grid:
        return ""
    return (
        "\n`grid/` holds the integer codes and scales; the BF16 weights are exactly bf16(code x scale).\n"
        "`grace pack` turns this folder into a packed INT4/INT8 checkpoint, `grace verify` proves it equal.\n"
    )
