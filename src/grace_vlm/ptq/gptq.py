"""GPTQ: round column after column, and let the columns that are left make up for each error.

Frantar et al. 2022, algorithm 1, on our grid. With H = mean x x^T over calibration tokens (the paper's 2 / n cancels),
damped by 1 % of its mean diagonal, and U the upper Cholesky factor of H^-1, column j of W is rounded to q_j s and then

    W[:, k] -= (W[:, j] - q_j s) / U[j, j] * U[j, k]      for k > j

Columns go in their own order (no act-order), so groups stay contiguous. A group's scale is chosen by our scale rule
from the compensated weights when its first column is reached, and is the stored scale (``round_scale``) before any
code is computed.

Deviations from the authors' code: U is made in FP64 (theirs FP32); a block is a whole number of groups, so that a
group inside a block sees the compensation of that block too; columns without any input do not enter the mean diagonal.
"""

from __future__ import annotations

import torch

from grace_vlm.errors import FormatError, NonFiniteError
from grace_vlm.quant.affine import compute_dtype
from grace_vlm.quant.scale_init import ScaleRule, init_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean."""
BLOCK_COLUMNS = 128
"""Columns whose compensation is applied to the rest of the matrix at once."""


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """U, upper triangular with U^T U = (H + damping mean(diag H) I)^-1; (in, in) FP64.

    A column that no token ever used (zero diagonal) counts as one of mean diagonal, apart from all others.

    Raises:
        NonFiniteError: no Cholesky factor.
    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    is_dead = diagonal == 0
    mean = float(diagonal[~is_dead].mean()) if not bool(is_dead.all()) else 1.0
    diagonal[is_dead] = mean
    diagonal += damping * mean
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError("a calibration Hessian cannot be inverted; calibrate on more rows") from error


def gptq_quantize(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, rule: ScaleRule, damping: float = DAMPING
) -> QuantizedTensor:
    """(codes, stored scale) of one linear, computed in FP32 (FP64 if the weight is).

    Args:
        weight: (out, in). hessian: (in, in), the mean of x x^T over tokens.
        rule: how a group's scale is chosen. damping: share of the mean diagonal.

    Raises:
        ConfigError: the group size does not divide. FormatError: NaN or Inf in ``weight``.
        NonFiniteError: see ``inverse_factor``.
    """
    scheme.check(weight.shape[0], weight.shape[1], "this weight")
    if not bool(torch.isfinite(weight).all()):
        raise FormatError("cannot quantize a weight with NaN or Inf in it; look at the step that made it")
    dtype = compute_dtype(weight)
    factor = inverse_factor(hessian, damping).to(dtype)
    # A copy: errors are added to it. A column without input costs nothing at 0, and then no scale is chosen for it.
    left = weight.detach().to(dtype).masked_fill(hessian.diagonal() == 0, 0.0)
    codes, scales = torch.empty_like(left), []
    size = scheme.group_size
    block_columns = max(size, BLOCK_COLUMNS // size * size)
    for start in range(0, left.shape[1], block_columns):
        end = min(start + block_columns, left.shape[1])
        block, local = left[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.empty_like(block)
        for column in range(end - start):
            if column % size == 0:
                scales.append(init_scale(block[:, column : column + size], scheme, rule)[:, 0])
            value, scale = block[:, column], scales[-1]
            code = (value / scale).round().clamp(scheme.qmin, scheme.qmax)
            errors[:, column] = (value - code * scale) / local[column, column]
            block[:, column + 1 :] -= errors[:, column, None] * local[column, column + 1 :]
            codes[:, start + column] = code
        left[:, end:] -= errors @ factor[start:end, end:]
    scale_dtype = torch.float32 if scheme.scale_rounding == "fp32" else torch.bfloat16
    return QuantizedTensor(codes.to(torch.int8), torch.stack(scales, dim=1).to(scale_dtype), scheme)
