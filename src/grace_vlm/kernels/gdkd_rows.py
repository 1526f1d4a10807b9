"""Triton: cross-entropy and decoupled distillation of rows of logits, and their gradient (losses/gdkd_rows.py).

One program is one row. It reads the row twice and keeps nothing of it:

    pass 1   over the words that are no target, with e = exp((z - m_z) / T), f = exp((y - m_y) / T):
                 S_z = sum e    S_1 = sum e^T    S_y = sum f    D = sum f ((y - m_y) - (z - m_z))
    scalars  u_1, u_s, u_t, delta, and the coefficients c_1, c_2, c_3, t of the gradient
    pass 2   dz_j = c_1 e^T + c_2 e - c_3 f,  dz_k = t

m need not be the maximum, only near it: it is that of the row's first words, and the lanes keep their own maxima beside
the sums. No lane waits for another inside the loop. A row with a word more than ``LARGEST_EXPONENT`` above m, where
sums could overflow, is read again with the maximum that was found.

So there is one exponential a logit, model and pass for T = 1, 2, 3, 4, and one more of the student's for others.
Exponentials are made again in pass 2 and not kept as BF16: reading FP32 logits twice moves as many bytes (8 + 8 + 2)
as keeping them (8 + 4 + 4 + 2), and e^2 of a rounded e would be the larger part of the error.

Words that only the student has (a wider, padded head) are in the cross-entropy alone: ``tail``. Without a teacher every
word is. A row with a negative target is ignored: zeros, whatever its logits hold. Offsets are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_WORDS, NUM_WARPS = 4096, 32
"""Words that a program holds at a time: 16 KB of each model's logits; and its warps. Chosen on an H100
(benchmarks/results/loss_rows.csv)."""
LARGEST_EXPONENT = tl.constexpr(60.0)
"""e^60 times a vocabulary is far from the largest FP32 number, e^88."""
INTEGER_TEMPERATURES = (1, 2, 3, 4)
"""e^T is formed by products; for others by a second exponential."""


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] to the last digits: what 1 + x rounds away is put back."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    t = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, t) / (1.0 + t)


@triton.jit
def _expm1_below_0(x):
    """exp(x) - 1 for x <= 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _sigmoid_difference(a, b):
    """sigmoid(a) - sigmoid(b) without cancellation: sigmoid(high) sigmoid(-low) (1 - exp(low - high))."""
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    size = -_sigmoid(high) * _sigmoid(-low) * _expm1_below_0(low - high)
    return tl.where(a >= b, size, -size)


@triton.jit
def _power(e, exponent, INTEGER_T: tl.constexpr):
    """e^T where e = exp(exponent / T): the exponential at T = 1."""
    if INTEGER_T == 1:
        return e
    elif INTEGER_T == 2:
        return e * e
    elif INTEGER_T == 3:
        return e * e * e
    elif INTEGER_T == 4:
        return (e * e) * (e * e)
    else:
        return tl.exp(exponent)


@triton.jit
def _gdkd_row(
    z_ptr,
    z_stride,
    y_ptr,
    y_stride,
    target_ptr,
    ce_weight_ptr,
    kd_weight_ptr,
    gradient_ptr,
    gradient_stride,
    values_ptr,
    num_words,
    num_common,
    temperature,
    tckd_weight,
    nckd_weight,
    HAS_TEACHER: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    DECOUPLED: tl.constexpr,
    INTEGER_T: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(target_ptr + row)
    z_row, y_row = z_ptr + row * z_stride, y_ptr + row * y_stride
    gradient_row = gradient_ptr + row * gradient_stride
    lanes = tl.arange(0, BLOCK)
    if k < 0:
        tl.store(values_ptr + row * 4 + tl.arange(0, 4), tl.zeros((4,), tl.float32))
        if WITH_GRADIENT:
            for start in range(0, num_words, BLOCK):
                cols = start + lanes
                tl.store(
                    gradient_row + cols,
                    tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty),
                    mask=cols < num_words,
                )
        return
    z_k = tl.load(z_row + k, mask=k < num_words, other=float("nan"))  # no word of the head: NaN, which stops a run
    inverse_t = 1.0 / temperature
    minus_inf = -float("inf")
    zeros = tl.zeros((BLOCK,), tl.float32)

    log_rest = minus_inf  # log sum exp of the student's words but the target, at T = 1
    m_z, m_y, s_z, s_y, d = minus_inf, minus_inf, 0.0, 0.0, 0.0
    if HAS_TEACHER:
        first = (lanes < num_common) & (lanes != k)
        high_z = tl.max(tl.load(z_row + lanes, mask=first, other=minus_inf))
        high_y = tl.max(tl.load(y_row + lanes, mask=first, other=minus_inf))
        sum_z, sum_1, sum_y, sum_d = zeros, zeros, zeros, zeros
        again = 1
        while again > 0:
            m_z, m_y = high_z, high_y
            sum_z, sum_1, sum_y, sum_d = zeros, zeros, zeros, zeros
            max_z, max_y = zeros + minus_inf, zeros + minus_inf
            for start in range(0, num_common, BLOCK):
                cols = start + lanes
                mask = (cols < num_common) & (cols != k)
                z = tl.load(z_row + cols, mask=mask, other=minus_inf)
                y = tl.load(y_row + cols, mask=mask, other=minus_inf)
                max_z, max_y = tl.maximum(max_z, z), tl.maximum(max_y, y)
                z, y = z - m_z, y - m_y
                e, f = tl.exp(z * inverse_t), tl.exp(y * inverse_t)
                sum_z += e
                sum_1 += _power(e, z, INTEGER_T)
                sum_y += f
                sum_d += tl.where(mask, f * (y - z), 0.0)
            high_z, high_y = tl.max(max_z), tl.max(max_y)
            largest = LARGEST_EXPONENT * tl.minimum(temperature, 1.0)  # of z - m, where e is exp((z - m) / T)
            again = ((high_z - m_z > largest) | (high_y - m_y > largest)).to(tl.int32)
        s_z, s_y, d = tl.sum(sum_z), tl.sum(sum_y), tl.sum(sum_d)
        log_rest = m_z + tl.log(tl.sum(sum_1))
    if HAS_TAIL:
        cols = num_common + lanes
        high = tl.max(tl.load(z_row + cols, mask=(cols < num_words) & (cols != k), other=minus_inf))
        sum_tail = zeros
        m_tail = minus_inf
        again = 1
        while again > 0:
            # A tail of the target alone has no maximum, and its sum is 0.
            m_tail = tl.where(high == minus_inf, 0.0, high)
            sum_tail, max_tail = zeros, zeros + minus_inf
            for start in range(num_common, num_words, BLOCK):
                cols = start + lanes
                z = tl.load(z_row + cols, mask=(cols < num_words) & (cols != k), other=minus_inf)
                max_tail = tl.maximum(max_tail, z)
                sum_tail += tl.exp(z - m_tail)
            high = tl.max(max_tail)
            again = (high - m_tail > LARGEST_EXPONENT).to(tl.int32)
        log_tail = m_tail + tl.log(tl.sum(sum_tail))
        above, below = tl.maximum(log_rest, log_tail), tl.minimum(log_rest, log_tail)
        log_rest = tl.where(below == minus_inf, above, above + _log1p(tl.exp(below - above)))

    u_1 = z_k - log_rest
    cross_entropy = _softplus(-u_1)
    ce_weight = tl.load(ce_weight_ptr + row)
    not_k = _sigmoid(-u_1)  # 1 - softmax(z)_k
    tckd, nckd, rest = 0.0, 0.0, 0.0
    at_k = -ce_weight * not_k
    c_z, c_y = 0.0, 0.0
    if HAS_TEACHER:
        # A target that the teacher lacks has no divergence: NaN, which stops a run.
        y_k = tl.load(y_row + k, mask=k < num_common, other=float("nan"))
        u_s = (z_k - m_z) * inverse_t - tl.log(s_z)
        u_t = (y_k - m_y) * inverse_t - tl.log(s_y)
        sign = tl.where(u_t > 0, -1.0, 1.0)
        teacher, student = sign * u_t, sign * u_s
        tckd = _sigmoid(teacher) * (teacher - student) + _softplus(student) - _softplus(teacher)
        nckd = d * inverse_t / s_y - tl.log(s_y) + tl.log(s_z)
        rest = _sigmoid(-u_t)
        weight = tl.load(kd_weight_ptr + row) * temperature
        delta = _sigmoid_difference(u_s, u_t)
        alpha, beta = tckd_weight, nckd_weight
        if not DECOUPLED:
            alpha, beta = 1.0, rest
        at_k += weight * alpha * delta
        c_z, c_y = weight * (beta - alpha * delta) / s_z, weight * beta / s_y
    values = values_ptr + row * 4
    tl.store(values, cross_entropy)
    tl.store(values + 1, tckd)
    tl.store(values + 2, nckd)
    tl.store(values + 3, rest)
    if WITH_GRADIENT:
        if HAS_TEACHER:
            c_1 = ce_weight * not_k * tl.exp(m_z - log_rest)
            # Backwards: what was read last may still be in the cache.
            num_blocks = tl.cdiv(num_common, BLOCK)
            for number in range(0, num_blocks):
                cols = (num_blocks - 1 - number) * BLOCK + lanes
                mask = cols < num_common
                z = tl.load(z_row + cols, mask=mask, other=0.0) - m_z
                y = tl.load(y_row + cols, mask=mask, other=0.0) - m_y
                e, f = tl.exp(z * inverse_t), tl.exp(y * inverse_t)
                g = c_1 * _power(e, z, INTEGER_T) + c_z * e - c_y * f
                g = tl.where(cols == k, at_k, g)
                tl.store(gradient_row + cols, g.to(gradient_ptr.dtype.element_ty), mask=mask)
        if HAS_TAIL:
            for start in range(num_common, num_words, BLOCK):
                cols = start + lanes
                mask = cols < num_words
                z = tl.load(z_row + cols, mask=mask, other=minus_inf)
                g = tl.where(cols == k, at_k, ce_weight * not_k * tl.exp(z - log_rest))
                tl.store(gradient_row + cols, g.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _entropy_row(y_ptr, y_stride, entropy_ptr, num_words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y_row = y_ptr + row * y_stride
    lanes = tl.arange(0, BLOCK)
    minus_inf = -float("inf")
    zeros = tl.zeros((BLOCK,), tl.float32)
    high = tl.max(tl.load(y_row + lanes, mask=lanes < num_words, other=minus_inf))
    m, sum_f, sum_fy = high, zeros, zeros
    again = 1
    while again > 0:
        m = high
        sum_f, sum_fy, max_y = zeros, zeros, zeros + minus_inf
        for start in range(0, num_words, BLOCK):
            cols = start + lanes
            y = tl.load(y_row + cols, mask=cols < num_words, other=minus_inf)
            max_y = tl.maximum(max_y, y)
            y = y - m
            f = tl.exp(y)
            sum_f += f
            sum_fy += tl.where(y == minus_inf, 0.0, f * y)
        high = tl.max(max_y)
        again = (high - m > LARGEST_EXPONENT).to(tl.int32)
    total = tl.sum(sum_f)
    tl.store(entropy_ptr + row, tl.log(total) - tl.sum(sum_fy) / total)


def gdkd_rows(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    cross_entropy_weights: torch.Tensor,
    distillation_weights: torch.Tensor,
    *,
    temperature: float,
    tckd_weight: float,
    nckd_weight: float,
    decoupled: bool,
    gradient: torch.Tensor | None,
    block_words: int = BLOCK_WORDS,
    num_warps: int = NUM_WARPS,
) -> torch.Tensor:
    """As ``losses.gdkd_rows.gdkd_rows``, on FP32 logits whose last dimension is contiguous.

    ``block_words`` and ``num_warps`` are for tuning; results differ in the last digits with ``block_words``.
    """
    num_rows, num_words = student_logits.shape
    values = torch.empty(num_rows, 4, dtype=torch.float32, device=student_logits.device)
    if num_rows == 0:
        return values
    num_common = 0 if teacher_logits is None else min(num_words, teacher_logits.shape[1])
    integer_t = int(temperature) if temperature in INTEGER_TEMPERATURES else 0
    teacher = student_logits if teacher_logits is None else teacher_logits
    out = values if gradient is None else gradient
    _gdkd_row[(num_rows,)](
        student_logits,
        student_logits.stride(0),
        teacher,
        teacher.stride(0),
        targets,
        cross_entropy_weights,
        distillation_weights,
        out,
        out.stride(0),
        values,
        num_words,
        num_common,
        float(temperature),
        float(tckd_weight),
        float(nckd_weight),
        HAS_TEACHER=teacher_logits is not None,
        HAS_TAIL=num_common < num_words,
        DECOUPLED=decoupled,
        INTEGER_T=integer_t,
        WITH_GRADIENT=gradient is not None,
        BLOCK=block_words,
        num_warps=num_warps,
    )
    return values


def entropy_rows(logits: torch.Tensor, *, block_words: int = BLOCK_WORDS, num_warps: int = NUM_WARPS) -> torch.Tensor:
    """As ``losses.gdkd_rows.entropy_rows``: (C, V) FP32 -> (C,) FP32, nats."""
    entropy = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _entropy_row[(logits.shape[0],)](
            logits, logits.stride(0), entropy, logits.shape[1], BLOCK=block_words, num_warps=num_warps
        )
    return entropy
