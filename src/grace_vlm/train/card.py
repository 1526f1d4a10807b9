"""The README.md of a model folder: what it is, from what, how to open it."""

from __future__ import annotations

from grace_vlm.quant.plan import QuantPlan
from grace_vlm.train.config import Recipe


def model_card(recipe: Recipe, plan: QuantPlan) -> str:
    """Markdown with YAML front matter, derived from the recipe and the plan alone."""
    names = sorted({scheme.name for scheme in plan.schemes.values()})
    grid = ", ".join(names) if names else "none (BF16)"
    teacher = f"\n- Teacher: `{recipe.model.teacher}`" if recipe.objective().needs_teacher else ""
    grid_note = (
        "\n`grid/` holds the integer codes and scales; the BF16 weights are exactly bf16(code x scale).\n"
        "`grace pack` turns this folder into a packed INT4/INT8 checkpoint, `grace verify` proves it equal.\n"
        if names
        else ""
    )
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
tags: [grace-vlm, {recipe.method}]
---

# {recipe.method} {recipe.scheme}

- Student: `{recipe.model.student}`{teacher}
- Method: {recipe.method}
- Grid: {grid}; {len(plan.schemes)} linears quantized, {len(plan.bf16_names)} in BF16
- Steps: {recipe.optim.num_steps} of {recipe.data.micro_batch_size} x {recipe.data.accumulation} rows
- Data: `{recipe.data.train}`
{grid_note}
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", dtype="bfloat16")
processor = AutoProcessor.from_pretrained("FOLDER")
```

Trained with grace-vlm (the method: Chen et al., arXiv 2601.22709).
"""
