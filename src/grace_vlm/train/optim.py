"""AdamW over masters and log-scales, with the published schedule.

Three groups: linear weights (decayed), everything else that is no scale (norms, embeddings, biases: not decayed; the
reference decays them), and log-scales (own rate, never decayed). Rate: linear warm-up, then cosine to 0.

With ``optim.moments=8bit`` the moments of large masters take a byte each (adamw8.py); those of log-scales and of small
tensors stay FP32, in torch's fused AdamW, which otherwise has all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from grace_vlm.train.adamw8 import MIN_ELEMENTS, AdamW8
from grace_vlm.train.config import OptimConfig
from grace_vlm.train.masters import Masters


def learning_rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor of the peak rate at ``step`` (0-based): (step + 1) / W while warming up, then a cosine that ends at 0."""
    warmup_steps = math.ceil(warmup_fraction * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: matrices of linears, not embeddings, norms or biases."""
    return parameter.ndim >= 2 and "embed" not in name and "lm_head" not in name


def has_byte_moments(num_elements: int, dtype: torch.dtype, config: OptimConfig) -> bool:
    """Whether a master of so many elements (not a log-scale) keeps its moments in a byte each."""
    return config.moments == "8bit" and num_elements >= MIN_ELEMENTS and dtype == torch.float32


_Group = tuple[list[tuple[str, torch.nn.Parameter]], float, float]
"""(named parameters, peak rate, weight decay)."""


def _only(groups: list[_Group], chosen: Callable[[str], bool]) -> list[_Group]:
    """All groups, each with the parameters whose names are ``chosen``. Some may be empty, even all of them: fine-tuning
    LLaVA-1.5 in BF16 trains no log-scale and nothing of fewer than 4,096 elements."""
    return [([named for named in members if chosen(named[0])], rate, decay) for members, rate, decay in groups]


class Optimizer:
    """AdamW with its groups, its clip and its schedule."""

    def __init__(self, masters: Masters, config: OptimConfig) -> None:
        self.config = config
        named = list(masters.masters())
        scales = list(masters.log_scales())
        decayed = [(name, p) for name, p in named if is_decayed(name, p)]
        plain = [(name, p) for name, p in named if not is_decayed(name, p)]
        rate = config.learning_rate
        groups: list[_Group] = [
            (decayed, rate, config.weight_decay),
            (plain, rate, 0.0),
            ([(f"{name}.log_scale", p) for name, p in scales], config.scale_learning_rate, 0.0),
        ]
        self._all = [named for group, _, _ in groups for named in group]
        # Of the whole tensor, not of this process's share: every number of processes is to decide alike.
        sizes = {name: masters.leaf_of(name)[0].numel() for name, _ in named}
        in_bytes = {name for name, p in named if has_byte_moments(sizes[name], p.dtype, config)}
        self._groups = _only(groups, lambda name: name not in in_bytes)
        byte_groups = _only(groups, lambda name: name in in_bytes)
        self._stopped: torch.Tensor | None = None
        self._adamw8 = AdamW8(byte_groups, config.beta1, config.beta2, config.epsilon) if in_bytes else None
        self._adamw = torch.optim.AdamW(
            [{"params": [p for _, p in group], "lr": lr, "weight_decay": decay} for group, lr, decay in self._groups],
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )

    @property
    def parameters(self) -> list[tuple[str, torch.Tensor]]:
        """(name, master or log-scale) of everything that is trained."""
        return list(self._all)

    def clip(self, norm: torch.Tensor) -> None:
        """Scale all gradients to the global norm limit, given their norm, a scalar tensor."""
        torch.nn.utils.clip_grads_with_norm_([p for _, p in self.parameters], self.config.max_grad_norm, norm)

    def guard(self, stopped: torch.Tensor) -> None:
        """Obey a flag: an FP32 scalar on the device. While it is 1, a step leaves weights, moments and counters as
        they are; nothing is read to know it."""
        self._stopped = stopped
        # What a gradient scaler would set: the fused kernel reads it on the device.
        self._adamw.found_inf = stopped  # type: ignore[attr-defined]

    def step(self, step: int) -> float:
        """One update at 0-based ``step``; returns the learning rate of the masters."""
        factor = learning_rate_factor(step, self.config.num_steps, self.config.warmup_fraction)
        for group, (_, rate, _) in zip(self._adamw.param_groups, self._groups, strict=True):
            group["lr"] = rate * factor
        self._adamw.step()
        if self._adamw8 is not None:
            self._adamw8.step(step, factor, self._stopped)
        for _, parameter in self._all:
            parameter.grad = None
        return self.config.learning_rate * factor

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``<name>#<moment>`` tensors; FP32 moments are missing before the first step."""
        state = self._adamw8.state_dict() if self._adamw8 is not None else {}
        for name, parameter in self.parameters:
            for key, value in self._adamw.state.get(parameter, {}).items():
                state[f"{name}#{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore ``state_dict``."""
        if self._adamw8 is not None:
            self._adamw8.load_state_dict(state)
        in_fp32 = {name for group, _, _ in self._groups for name, _ in group}
        by_name: dict[str, dict[str, Any]] = {}
        for key, value in state.items():
            name, _, moment = key.rpartition("#")
            if name in in_fp32:
                by_name.setdefault(name, {})[moment] = value
        for name, parameter in self.parameters:
            if name in by_name:
                own = by_name[name]
                # The fused kernel wants its step counter beside the parameter.
                self._adamw.state[parameter] = {key: value.clone().to(parameter.device) for key, value in own.items()}
