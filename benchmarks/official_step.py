"""The official GRACE training step, restated from a description of its code: the peer of bench_train.py.

    student   Transformers' own forward, gradient checkpointing, SDPA; in ``qat`` and ``grace`` every linear of its
              decoder fake-quantizes its BF16 weight anew in every forward, in eager FP32 (``FakeQuantLinear``)
    teacher   Transformers' own forward in BF16, for every micro-batch, logits of all positions
    loss      cross-entropy, GDKD in chunks under autograd (official_loss.py), and 1 - CKA of the
              last layer's input, image by image, with its two host reads each
    update    BF16 gradients added up by autograd, clip, torch's fused AdamW over BF16 weights with BF16 moments

The vision tower is frozen and runs in every micro-batch of both models. Rows are padded. Weights are not kept in FP32:
the official run shards its masters over 16 GPUs and one GPU's share is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from official_loss import IGNORE_INDEX, official_loss
from torch import nn

from grace_vlm.data.collate import Batch
from grace_vlm.models.registry import adapter_for
from grace_vlm.quant.scale_init import init_scale
from grace_vlm.quant.scheme import QuantScheme

Mode = Literal["sft", "qat", "grace"]
GROUP_SIZE, QMIN, QMAX = 128, -8, 7
RELATIONAL_WEIGHT, MIN_TOKENS, DEGENERATE = 3.0, 4, 1e-8


def bounds_have_gradient() -> bool:
    """Whether clamp's gradient is 1 at its bounds: so in torch 2.5, the official run's, and in 2.11; 0 in 2.14."""
    x = torch.zeros((), requires_grad=True)
    torch.clamp(x, 0, 1).backward()
    return bool(x.grad == 1)


def closed_clamp(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """clamp with a gradient of 1 at its bounds. Weights on the outermost codes are a few percent of all."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def fake_quantize(weight: torch.Tensor, log_scale: torch.Tensor, clamp: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(out, in) BF16 weight on its grid, in eager FP32 under autograd; ``log_scale``: one for each 128 weights."""
    groups = weight.float().reshape(weight.shape[0], -1, GROUP_SIZE)
    scale = log_scale.float().exp().reshape(weight.shape[0], -1, 1)
    ratio = groups / scale
    rounded = ratio + (ratio.round() - ratio).detach()
    return (clamp(rounded, QMIN, QMAX) * scale).reshape(weight.shape).to(weight.dtype)


class FakeQuantLinear(nn.Module):
    """A linear whose weight passes the grid in every forward: w -> clamp(round(w / s)) s, straight through."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        scale = init_scale(linear.weight.detach().float(), QuantScheme(4, GROUP_SIZE), "minmax")
        self.log_scale = nn.Parameter(scale.log().to(linear.weight.dtype))
        self.register_buffer("scale_initialized", torch.ones((), dtype=torch.bool, device=linear.weight.device))
        self.clamp = torch.clamp if bounds_have_gradient() else closed_clamp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if not bool(self.get_buffer("scale_initialized").item()):
            raise RuntimeError("the scale has no start")
        return F.linear(x, fake_quantize(self.weight, self.log_scale, self.clamp), self.bias)


def image_relation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor | None:
    """1 - CKA of one image's (n, d_s) and (n, d_t) features; None for one that stays out."""
    if student.shape[0] < MIN_TOKENS:
        return None
    grams = []
    for features in (student, teacher):
        unit = F.normalize(features.float(), dim=-1)
        gram = unit @ unit.t()
        gram = gram - gram.mean(dim=0, keepdim=True)
        grams.append(gram - gram.mean(dim=1, keepdim=True))
    cross, own, other = (grams[0] * grams[1]).sum(), (grams[0] ** 2).sum(), (grams[1] ** 2).sum()
    if float(own.detach()) < DEGENERATE or float(other.detach()) < DEGENERATE:
        return None
    return 1.0 - cross / (own * other).sqrt()


class OfficialStep:
    """Optimizer steps of the official algorithm.

    Args:
        student, teacher: Transformers models in BF16 (FP32 on a CPU) on one device; the student is changed in place.
        mode: ``sft`` fine-tuning alone, ``qat`` with fake-quantization, ``grace`` with the teacher as well.
    """

    def __init__(self, student: Any, teacher: Any | None, mode: Mode, *, learning_rate: float = 1e-5) -> None:
        self.student, self.teacher, self.mode = student, teacher, mode
        self.distillation_weight = 0.5
        self.terms: dict[str, torch.Tensor] = {}
        adapter = adapter_for(student.config.model_type)
        self.image_token_id = adapter.image_token_id(student.config)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not name.startswith(adapter.frozen))
        if mode != "sft":
            _quantize_layers(student.model.language_model)
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        student.train()
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=1e-3, fused=True)

    def run(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step over padded batches; the mean loss, a scalar on the device."""
        total = torch.zeros((), device=self.trained[0].device)
        for batch in micro_batches:
            loss = self.loss(batch) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of one micro-batch, with graph; ``terms`` has its parts."""
        device = self.trained[0].device
        labels = batch.labels[:, 1:].to(device)
        logits, tapped = self._forward(self.student, batch, device)
        if self.teacher is None or self.mode != "grace":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX)
        with torch.no_grad():
            teacher_logits, teacher_tapped = self._forward(self.teacher, batch, device)
        words, cross_entropy, gdkd = official_loss(
            logits[:, :-1].flatten(0, 1),
            teacher_logits[:, :-1].flatten(0, 1),
            labels.flatten(),
            distillation_weight=self.distillation_weight,
        )
        lengths = list(batch.image_lengths)
        parts = zip(tapped.split(lengths), teacher_tapped.split(lengths), strict=True)
        found = [one for one in (image_relation(s, t) for s, t in parts) if one is not None]
        relation = torch.stack(found).mean() if found else words.new_zeros(())
        self.terms = {"cross_entropy": cross_entropy, "distillation": gdkd, "relational": relation}
        return words + RELATIONAL_WEIGHT * relation

    def _forward(self, model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits (B, S, V) of all positions, (n_visual, d) input of the last layer at the visual tokens)."""
        ids = batch.input_ids.to(device)
        seen: list[torch.Tensor] = []
        hook = model.model.language_model.layers[-1].register_forward_pre_hook(
            lambda _, args: seen.append(args[0]) if not seen else None
        )
        vision: dict[str, torch.Tensor] = {}
        if batch.pictures:
            weight = next(model.model.visual.parameters())
            pixels = [picture.pixels for picture in batch.pictures if picture.pixels is not None]
            vision["pixel_values"] = torch.cat(pixels).to(device, weight.dtype)
            vision["image_grid_thw"] = torch.tensor([picture.grid for picture in batch.pictures], device=device)
        out = model(input_ids=ids, position_ids=batch.position_ids.to(device), use_cache=False, **vision)
        hook.remove()
        return out.logits, seen[0][ids == self.image_token_id]


def _quantize_layers(language: Any) -> None:
    for layer in language.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, FakeQuantLinear(child))
