"""The published hyper-parameters, typed in apart from the recipes: what a recipe that names a source is held to.

``SCRIPT_QWEN3`` is the column of the authors' finetune_qwen3vl_2b_grace.slurm (what it does not set is the default of
their classes, which runs with it); ``SCRIPT_LLAVA`` their LLaVA QAT script; ``PAPER`` and ``CARD`` the paper (v5)
and the model card of Qwen3-VL-2B-GRACE-W4G128.
"""

from __future__ import annotations

from typing import Any

LOSS_TERMS: dict[str, Any] = {
    "loss.temperature": 2.0,
    "loss.tckd_weight": 1.0,
    "loss.nckd_weight": 4.0,
    "loss.relational_weight": 3.0,
    "loss.relational_layer": -2,
    "loss.distillation_warmup_steps": 0,
    "loss.relational_warmup_steps": 400,
    "loss.adaptive_weight.initial": 0.5,
    "loss.adaptive_weight.minimum": 0.1,
    "loss.adaptive_weight.maximum": 1.0,
    "loss.adaptive_weight.target": 3.0,
    "loss.adaptive_weight.step_size": 0.003,
    "loss.adaptive_weight.ema_decay": 0.99,
}
MIX665K_ROWS = 665_298
SCRIPT_QWEN3: dict[str, Any] = {
    **LOSS_TERMS,
    "data.micro_batch_size": 2,
    "data.max_tokens": 8192,
    "data.min_pixels": 784,
    "data.max_pixels": 448 * 448,
    "data.packing": True,
    # One epoch of 512 rows a step.
    "optim.num_steps": MIX665K_ROWS // 512,
    "optim.learning_rate": 1e-5,
    "optim.scale_learning_rate": 2e-4,
    "optim.weight_decay": 1e-3,
    "optim.warmup_fraction": 0.03,
    "optim.max_grad_norm": 1.0,
    "quant.scale_init": "mse",
    "quant.clip_mask": "official",
    "quant.scale_gradient": "none",
    "runtime.gradient_checkpointing": True,
}
SCRIPT_LLAVA: dict[str, Any] = {
    **LOSS_TERMS,
    "data.micro_batch_size": 4,
    "data.max_tokens": 8192,
    "optim.learning_rate": 2e-5,
    "optim.scale_learning_rate": 2e-6,
    "optim.weight_decay": 0.0,
    "optim.warmup_fraction": 0.03,
    "optim.max_grad_norm": 1.0,
    "quant.scale_init": "mse",
    "quant.scale_gradient": "lsq",
}
CARD: dict[str, dict[str, Any]] = {
    scheme: {
        "method": "grace",
        "scheme": scheme,
        # The card and the README start W4 and W8 from GRACE-BF16; here that is our own run of it.
        "model.student": "Qwen/Qwen3-VL-2B-Instruct" if scheme == "bf16" else "runs/qwen3_vl_2b_grace_bf16",
        "model.base": "Qwen/Qwen3-VL-2B-Instruct",
        "model.teacher": "Qwen/Qwen3-VL-8B-Instruct",
    }
    for scheme in ("bf16", "w8g128", "w4g128")
}
PAPER: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "method": "grace",
        "scheme": "w4g128",
        "model.student": "Qwen/Qwen2-VL-2B-Instruct",
        "model.teacher": "Qwen/Qwen2-VL-7B-Instruct",
        "loss.relational_layer": -2,
        "quant.scale_init": "mse",
    },
    "llava": {
        "method": "grace",
        "scheme": "w4g128",
        "model.student": "llava-hf/llava-1.5-7b-hf",
        "model.teacher": "llava-hf/llava-1.5-13b-hf",
    },
}
COLUMNS: dict[str, dict[str, dict[str, Any]]] = {
    **{f"qwen3_vl_2b_grace_{scheme}": {"script": SCRIPT_QWEN3, "card": CARD[scheme]} for scheme in CARD},
    "qwen2_vl_2b_grace_w4g128": {"paper": PAPER["qwen2_vl"]},
    "llava_1_5_7b_grace_w4g128": {"script": SCRIPT_LLAVA, "paper": PAPER["llava"]},
}
"""Recipe -> source -> key -> published value."""
