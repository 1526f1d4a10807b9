"""From hidden states to the loss: both vocabulary heads, cross-entropy and gated distillation, no (N, V) tensor.

For N supervised tokens with student states H (N, d_s), student head W (V, d_s), teacher states and head likewise:

    for every group of rows
        for every chunk of the group
            Z = H W^T, Y = H_t W_t^T         FP32 out of BF16 products: BF16 logits would cost the gradient 4 to 8 %
            divergences of each row, dZ      gdkd_rows.py; dZ in H's dtype, its one rounding
            dH = dZ W
        dW = dW + dZ^T H                     added up in FP32

Everything that scales the loss comes in as weights of the tokens: the normalisers (over the whole step and all ranks),
the gate, beta and its warm-up. So dZ is final when it is formed, the gradients are made in the forward pass, and
backward only multiplies them by the gradient of the loss; no number is read by the host.

A chunk is as many rows as fit ``workspace_bytes``; several chunks share one dW, because each reads and
writes V d_s FP32 numbers (1.2 GB for Qwen3-VL-2B), which takes as long as 1,000 rows of its arithmetic. With a CUDA
GPU and Triton rows go through ``kernels/gdkd_rows.py``, else through plain torch, chunk by chunk alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import runs_triton
from grace_vlm.losses import gdkd_rows as plain
from grace_vlm.losses.gdkd import (
    GateSignal,
    VocabularyPolicy,
    entropy_rows,
    gate_of_entropy,
    gate_of_margin,
    margin_rows,
)

WORKSPACE_BYTES = 1_250_000_000
"""Of a GPU, for the logits of a chunk and the dZ of a group; 512 and 2,048 rows at 151,936 words."""
CPU_WORKSPACE_BYTES = 64_000_000
CHUNKS_OF_A_GROUP = 4
_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
MOST_ROWS = 512
"""Of a chunk: more rows make no product faster (measured on an H100), and cost memory."""
ROW_MULTIPLE = 64
"""Chunks of so many rows keep the products' shapes on the tensor cores' tiles."""


@dataclass(frozen=True)
class LinearGdkdTerms:
    """The loss of N tokens and what it is made of.

    Args:
        loss: scalar with a gradient, sum of w_i CE_i + v_i DKD_i.
        cross_entropy: (N,) CE_i, detached.
        distillation: (N,) DKD_i = T^2 (a TCKD_i + b NCKD_i), detached, neither gated nor weighted; 0 without a teacher.
        tckd, nckd: (N,) detached, without T^2. All are 0 at ignored tokens.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    distillation: torch.Tensor
    tckd: torch.Tensor
    nckd: torch.Tensor


@dataclass(frozen=True)
class _Setting:
    """What does not change from token to token."""

    temperature: float
    tckd_weight: float
    nckd_weight: float
    decoupled: bool
    workspace_bytes: int | None

    def distillation(self, values: torch.Tensor) -> torch.Tensor:
        """(N, 4) rows of ``gdkd_rows`` -> (N,) T^2 (a TCKD + b NCKD)."""
        _, tckd, nckd, rest = values.unbind(1)
        mixed = self.tckd_weight * tckd + self.nckd_weight * nckd if self.decoupled else tckd + rest * nckd
        return self.temperature**2 * mixed


def _logits_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a b, out in FP32 (or FP64) whatever a and b are; sums in FP32."""
    if a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, total in FP32 (or FP64)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _uses_kernel(logits: torch.Tensor) -> bool:
    return logits.dtype == torch.float32 and runs_triton(logits)


def _rows_function(logits: torch.Tensor) -> Any:
    if _uses_kernel(logits):
        from grace_vlm.kernels import gdkd_rows as kernel

        return kernel.gdkd_rows
    return plain.gdkd_rows


@dataclass(frozen=True)
class Chunking:
    """How rows are cut: ``rows`` of logits at a time, ``group`` rows of dZ at a time; ``num_bytes`` of workspace."""

    rows: int
    group: int
    num_bytes: int


def chunking(
    num_rows: int, num_words: int, teacher_words: int, gradient_bytes: int, workspace_bytes: int, itemsize: int = 4
) -> Chunking:
    """Cut ``num_rows`` so that the workspace fits, in parts of about the same size.

    Args:
        num_words, teacher_words: of the two heads; 0 for no teacher.
        gradient_bytes: of one element of dZ; 0 if it takes the place of the logits (or is not needed).
        itemsize: bytes of a logit.
    """
    logits = itemsize * (num_words + teacher_words)
    kept = gradient_bytes * num_words
    chunks_of_a_group = CHUNKS_OF_A_GROUP if gradient_bytes else 1
    most = workspace_bytes // max(1, logits + chunks_of_a_group * kept)
    most = min(max(most, 1), MOST_ROWS)
    rows = _even_share(num_rows, most)
    group = min(rows * chunks_of_a_group, max(num_rows, 1))
    return Chunking(rows, group, rows * logits + group * kept)


def _even_share(num_rows: int, most: int) -> int:
    """Rows of each of the fewest equal parts of at most ``most`` rows, on the tiles if that many fit."""
    parts = max(1, math.ceil(num_rows / most))
    rows = math.ceil(num_rows / parts)
    on_tiles = math.ceil(rows / ROW_MULTIPLE) * ROW_MULTIPLE
    return max(1, on_tiles if on_tiles <= most and parts > 1 else rows)


def _default_workspace_bytes(device: torch.device) -> int:
    return WORKSPACE_BYTES if device.type == "cuda" else CPU_WORKSPACE_BYTES


@dataclass
class _Inputs:
    """Tensors of a call; ``teacher_hidden`` and ``teacher_head`` are None without a teacher."""

    hidden: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    ce_weights: torch.Tensor
    kd_weights: torch.Tensor
    teacher_hidden: torch.Tensor | None
    teacher_head: torch.Tensor | None


def _run(
    inputs: _Inputs, setting: _Setting, d_hidden: torch.Tensor | None, d_head: torch.Tensor | None
) -> torch.Tensor:
    """(N, 4) divergences of all tokens; fills ``d_hidden`` (N, d_s) and adds to ``d_head`` (V, d_s) where given."""
    hidden, head = inputs.hidden, inputs.head
    dtype, device = _logits_dtype(hidden), hidden.device
    num_rows, num_words = hidden.shape[0], head.shape[0]
    teacher_words = 0 if inputs.teacher_head is None else inputs.teacher_head.shape[0]
    needs_gradient = d_hidden is not None or d_head is not None
    in_place = hidden.dtype == dtype
    cut = chunking(
        num_rows,
        num_words,
        teacher_words,
        0 if in_place or not needs_gradient else hidden.element_size(),
        setting.workspace_bytes or _default_workspace_bytes(device),
        dtype.itemsize,
    )
    values = torch.empty(num_rows, 4, dtype=dtype, device=device)
    # 0 times a NaN is NaN: an ignored token's states must not reach dW.
    kept = hidden if d_head is None else hidden.masked_fill((inputs.targets < 0).unsqueeze(1), 0.0)
    z = torch.empty(cut.rows, num_words, dtype=dtype, device=device)
    y = torch.empty(cut.rows, teacher_words, dtype=dtype, device=device) if teacher_words else None
    dz = z if in_place or not needs_gradient else torch.empty(cut.group, num_words, dtype=hidden.dtype, device=device)
    rows_of = _rows_function(z)
    for group in range(0, num_rows, cut.group):
        group_end = min(group + cut.group, num_rows)
        for first in range(group, group_end, cut.rows):
            end = min(first + cut.rows, group_end)
            part = slice(first, end)
            z_part = z[: end - first]
            _product(hidden[part], head.t(), z_part)
            y_part = None
            if y is not None:
                assert inputs.teacher_hidden is not None
                assert inputs.teacher_head is not None
                y_part = y[: end - first]
                _product(inputs.teacher_hidden[part], inputs.teacher_head.t(), y_part)
            dz_part = dz[first - group : end - group]
            values[part] = rows_of(
                z_part,
                y_part,
                inputs.targets[part],
                inputs.ce_weights[part],
                inputs.kd_weights[part],
                temperature=setting.temperature,
                tckd_weight=setting.tckd_weight,
                nckd_weight=setting.nckd_weight,
                decoupled=setting.decoupled,
                gradient=dz_part if needs_gradient else None,
            )
            if d_hidden is not None:
                torch.mm(dz_part, head, out=d_hidden[part])
        if d_head is not None:
            _add_product(d_head, dz[: group_end - group].t(), kept[group:group_end])
    return values


class _LinearGdkd(torch.autograd.Function):
    """The weighted loss of ``_Inputs``, with gradients of the student's states and head made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        inputs: _Inputs,
        setting: _Setting,
        head_gradient: torch.Tensor | None,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        d_hidden = torch.empty_like(hidden) if with_gradient and ctx.needs_input_grad[0] else None
        d_head = head_gradient if with_gradient and ctx.needs_input_grad[1] else None
        if head_gradient is None and with_gradient and ctx.needs_input_grad[1]:
            d_head = torch.zeros_like(head, dtype=_logits_dtype(hidden))
        values = _run(inputs, setting, d_hidden, d_head)
        loss = (inputs.ce_weights * values[:, 0]).sum()
        if inputs.teacher_head is not None:
            loss = loss + (inputs.kd_weights * setting.distillation(values)).sum()
        ctx.d_hidden = d_hidden
        ctx.d_head = d_head if head_gradient is None else None
        ctx.head_dtype = head.dtype
        ctx.is_final, ctx.is_spent = head_gradient is not None, False
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.is_final and not d_loss.is_cuda and float(d_loss) != 1.0:
            # On a GPU the test would wait for the device.
            raise ValueError(
                f"the loss was scaled by {float(d_loss)} after head_gradient had been added up; put the factor into "
                "cross_entropy_weights and distillation_weights"
            )
        if ctx.is_spent:
            raise RuntimeError("the gradients of linear_gdkd went with its first backward; compute the loss again")
        d_hidden, d_head = ctx.d_hidden, ctx.d_head
        ctx.d_hidden = ctx.d_head = None
        ctx.is_spent = True
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(d_loss)
        if d_head is not None:
            d_head = d_head.mul_(d_loss).to(ctx.head_dtype)
        return d_hidden, d_head, None, None, None, None


def _per_token(weights: torch.Tensor | float | None, like: torch.Tensor) -> torch.Tensor:
    """(N,) weights in the logits' dtype from a number, a scalar tensor or a vector; no gradient."""
    num_rows, dtype = like.shape[0], _logits_dtype(like)
    if weights is None:
        return torch.zeros(num_rows, dtype=dtype, device=like.device)
    if not isinstance(weights, torch.Tensor):
        return torch.full((num_rows,), float(weights), dtype=dtype, device=like.device)
    return weights.detach().to(like.device, dtype).expand(num_rows).contiguous()


def _check(inputs: _Inputs, setting: _Setting, policy: str, head_gradient: torch.Tensor | None) -> None:
    """``ConfigError`` for what cannot be right; reads nothing of a GPU."""
    head, teacher_head = inputs.head, inputs.teacher_head
    if setting.temperature <= 0:
        raise ConfigError(f"temperature is {setting.temperature}; expected a number above 0")
    if (inputs.teacher_hidden is None) != (teacher_head is None):
        raise ConfigError("linear_gdkd was given one of teacher_hidden and teacher_head; expected both or neither")
    if teacher_head is not None and policy == "equal" and head.shape[0] != teacher_head.shape[0]:
        raise ConfigError(
            f"the student has {head.shape[0]} words and the teacher {teacher_head.shape[0]}; "
            "set loss.vocabulary=common if both use one tokenizer and only the padding differs"
        )
    for whose, states, matrix in (("student", inputs.hidden, head), ("teacher", inputs.teacher_hidden, teacher_head)):
        if states is not None and matrix is not None and (states.dtype != matrix.dtype or states.dtype not in _DTYPES):
            raise ConfigError(
                f"the {whose}'s states are {states.dtype} and its head {matrix.dtype}; expected one of "
                "torch.bfloat16, torch.float32, torch.float64 for both (1 / N is below what float16 holds)"
            )
    if head_gradient is not None and (head_gradient.shape, head_gradient.dtype) != (
        head.shape,
        inputs.ce_weights.dtype,
    ):
        raise ConfigError(
            f"head_gradient is {head_gradient.dtype} {tuple(head_gradient.shape)}; expected "
            f"{inputs.ce_weights.dtype} {tuple(head.shape)}"
        )
    num_shared = head.shape[0] if teacher_head is None else min(head.shape[0], teacher_head.shape[0])
    if not inputs.targets.is_cuda and inputs.targets.numel() and int(inputs.targets.max()) >= num_shared:
        raise ConfigError(unknown_target(int(inputs.targets.max()), num_shared))


def unknown_target(target: int, num_shared: int) -> str:
    """What to say of a target that is no word of both heads."""
    return f"target id {target} is not among the {num_shared} words of student and teacher; their tokenizers differ"


def linear_gdkd(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    targets: torch.Tensor,
    *,
    cross_entropy_weights: torch.Tensor | float,
    teacher_hidden: torch.Tensor | None = None,
    teacher_head: torch.Tensor | None = None,
    distillation_weights: torch.Tensor | float | None = None,
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
    decoupled: bool = True,
    vocabulary: VocabularyPolicy = "equal",
    head_gradient: torch.Tensor | None = None,
    workspace_bytes: int | None = None,
) -> LinearGdkdTerms:
    """sum_i w_i CE_i + v_i T^2 (a TCKD_i + b NCKD_i) (GRACE eq. 3-6 and 21), without logits of all tokens.

    Equal to ``losses.gdkd`` on H W^T with normalisers and gate as weights: w = 1 / tokens, v = beta gate / sum gate.

    Args:
        student_hidden: (N, d_s) after the final norm, BF16, FP32 or FP64. student_head: (V, d_s) likewise, no bias.
        targets: (N,) int64 next tokens; negative tokens are ignored: no part in the loss, gradient 0, whatever their
            states hold. A target that a head lacks is refused on a CPU; on a GPU, where refusing would mean waiting
            for the device, it makes the loss NaN.
        cross_entropy_weights: w, a number, a scalar tensor or (N,). distillation_weights: v likewise; None is 0.
        teacher_hidden, teacher_head: (N, d_t), (V_t, d_t); no gradient. None for cross-entropy alone.
        temperature, tckd_weight, nckd_weight: T > 0, a, b. decoupled: False for plain KL (a = 1, b = 1 - q_k).
        vocabulary: heads of different width: ``equal`` refuses them, ``common`` compares the leading words of both.
        head_gradient: (V, d_s) FP32 (FP64) sum that dW is added to in this call, for example the gradient of a tied
            embedding; autograd then gives the head none, and ``loss`` must be passed backward unscaled (checked on a
            CPU). None: through autograd in the head's dtype. No dW is made, and nothing added, for a head without
            ``requires_grad`` or under ``torch.no_grad``.
        workspace_bytes: of logits and their gradient at a time; None for 1.25 GB of a GPU, 64 MB of a CPU (where the
            plain rows take about three times as much besides).

    Returns:
        ``LinearGdkdTerms``; gradients for the student's hidden states and head, not differentiable twice.

    Raises:
        ConfigError: a temperature that is not above 0; heads of different width under ``equal``; dtypes or shapes that
            do not fit; on a CPU a target that a head lacks.
        ValueError: backward of a scaled loss with ``head_gradient`` (CPU). RuntimeError: a second backward.
    """
    setting = _Setting(temperature, tckd_weight, nckd_weight, decoupled, workspace_bytes)
    inputs = _Inputs(
        student_hidden.detach(),
        student_head.detach(),
        targets.contiguous(),
        _per_token(cross_entropy_weights, student_hidden),
        _per_token(distillation_weights, student_hidden),
        None if teacher_hidden is None else teacher_hidden.detach(),
        None if teacher_head is None else teacher_head.detach(),
    )
    _check(inputs, setting, vocabulary, head_gradient)
    loss, values = _LinearGdkd.apply(
        student_hidden, student_head, inputs, setting, head_gradient, torch.is_grad_enabled()
    )
    distillation = setting.distillation(values) if teacher_head is not None else torch.zeros_like(values[:, 0])
    return LinearGdkdTerms(loss, values[:, 0], distillation, values[:, 1], values[:, 2])


@torch.no_grad()
def linear_gate(
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    signal: GateSignal = "entropy",
    *,
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """The confidence gate (GRACE eq. 1-2) of N tokens from the teacher's hidden states, chunk by chunk.

    Args:
        teacher_hidden: (N, d_t). teacher_head: (V_t, d_t), no bias. signal: as in ``confidence_gate``.
        workspace_bytes: of logits at a time; None as in ``linear_gdkd``.

    Returns:
        (N,) in [1/e, 1], FP32 (FP64 for FP64 states), no gradient.
    """
    num_rows, num_words = teacher_hidden.shape[0], teacher_head.shape[0]
    dtype, device = _logits_dtype(teacher_hidden), teacher_hidden.device
    cut = chunking(num_rows, 0, num_words, 0, workspace_bytes or _default_workspace_bytes(device), dtype.itemsize)
    logits = torch.empty(cut.rows, num_words, dtype=dtype, device=device)
    found = torch.empty(num_rows, dtype=dtype, device=device)
    rows_of = margin_rows if signal == "margin" else entropy_rows
    if signal == "entropy" and _uses_kernel(logits):
        from grace_vlm.kernels import gdkd_rows as kernel

        rows_of = kernel.entropy_rows
    for first in range(0, num_rows, cut.rows):
        part = slice(first, min(first + cut.rows, num_rows))
        chunk = logits[: part.stop - first]
        _product(teacher_hidden[part], teacher_head.t(), chunk)
        found[part] = rows_of(chunk)
    return gate_of_margin(found) if signal == "margin" else gate_of_entropy(found, num_words)
