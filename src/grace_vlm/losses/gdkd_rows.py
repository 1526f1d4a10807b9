"""Cross-entropy and decoupled distillation of a few rows of logits, with their gradient in closed form.

The plain torch form of ``kernels/gdkd_rows.py``, and what runs without a GPU. For one row: student logits z, teacher
logits y, target k, temperature T, weights w (cross-entropy) and v (distillation), a and b of eq. 3. As in
``losses/gdkd.py`` the target is masked out of every sum and folded back:

    A = logsumexp_{j != k} z/T,  B = logsumexp_{j != k} y/T,  A_1 = logsumexp_{j != k} z
    u_1 = z_k - A_1,  u_s = z_k/T - A,  u_t = y_k/T - B        so that softmax(z)_k = sigmoid(u_1), p_k = sigmoid(u_s)
    CE = softplus(-u_1),  TCKD = KL(sigmoid(u_t) || sigmoid(u_s)),  NCKD = sum_{j != k} q^_j (y_j - z_j)/T - B + A

Gradient of w CE + v T^2 (a TCKD + b NCKD), with delta = sigmoid(u_s) - sigmoid(u_t):

    j != k:  w sigmoid(-u_1) e^{z_j - A_1}  +  v T (b - a delta) p^_j  -  v T b q^_j
    j  = k:  -w sigmoid(-u_1)  +  v T a delta

because dTCKD/du_s = delta, du_s/dz_j = -p^_j / T, dNCKD/dz_j = (p^_j - q^_j) / T. The entries of a row add up to 0.
Plain KL(q || p) is a = 1, b = 1 - q_k. Nothing is formed as 1 - p: sigmoid(-u_1) is 1 - softmax(z)_k to the last
digit, and delta = sigmoid(high) sigmoid(-low) (1 - e^{low - high}), so the target's entry is right for confident
teachers and students too.

With e = exp((z - max z) / T) and f likewise, p^ = e / sum e, q^ = f / sum f and, for an integer T, e^{z - max z} is a
power of e: one exponential a logit and model.
"""

from __future__ import annotations

import torch

from grace_vlm.losses.gdkd import binary_kl, softplus


def _sigmoid_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sigmoid(a) - sigmoid(b) without cancellation."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    size = -torch.sigmoid(high) * torch.sigmoid(-low) * torch.expm1(low - high)
    return torch.where(a >= b, size, -size)


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
) -> torch.Tensor:
    """Divergences of rows, and the gradient of their weighted sum.

    Args:
        student_logits: (C, V) FP32 or FP64, a workspace: overwritten. teacher_logits: (C, V_t) likewise, or None:
            cross-entropy only. Where V_t and V differ, distributions are over the leading min(V, V_t) words, the
            cross-entropy over all V.
        targets: (C,) int64 below min(V, V_t) (else the row's divergences are NaN); negative rows are ignored.
        cross_entropy_weights, distillation_weights: (C,), w and v of the head of this file.
        gradient: (C, V) of any floating dtype, written with dL/dz; may be ``student_logits`` itself. None: not needed.

    Returns:
        (C, 4) in the logits' dtype: CE, TCKD, NCKD (without T^2) and 1 - q_k; zeros at ignored rows.
    """
    ignored = (targets < 0).unsqueeze(1)
    index = targets.clamp_min(0).unsqueeze(1)
    width = 0 if teacher_logits is None else min(student_logits.shape[1], teacher_logits.shape[1])
    z_k = student_logits.gather(1, index)
    rest = student_logits.scatter_(1, index, -torch.inf)
    common, tail = rest[:, :width], rest[:, width:]
    log_rest = tail.logsumexp(1, keepdim=True)
    values = student_logits.new_zeros(student_logits.shape[0], 4)
    scaled: tuple[torch.Tensor, ...] = ()
    if teacher_logits is not None:
        teacher = teacher_logits[:, :width]
        lacks = index >= width
        within = index.clamp_max(width - 1)
        y_k = torch.where(lacks, torch.nan, teacher.gather(1, within))
        kept_y = torch.where(lacks, teacher.gather(1, within), -torch.inf)
        teacher = teacher.scatter_(1, within, kept_y)
        m_z, m_y = common.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
        z, y = common - m_z, teacher - m_y
        e, f = torch.exp(z / temperature), torch.exp(y / temperature)
        power = _power(e, z, temperature)
        log_rest = torch.logaddexp(log_rest, m_z + power.sum(1, keepdim=True).log())
        s_z, s_y = e.sum(1, keepdim=True), f.sum(1, keepdim=True)
        # 0 (-inf + inf) at the target.
        d = y.sub_(z).mul_(f).scatter_(1, within, torch.where(lacks, y.gather(1, within), 0.0)).sum(1, keepdim=True)
        u_s = (z_k - m_z) / temperature - s_z.log()
        u_t = (y_k - m_y) / temperature - s_y.log()
        values[:, 1:2] = binary_kl(u_t, u_s)
        values[:, 2:3] = d / (temperature * s_y) - s_y.log() + s_z.log()
        values[:, 3:4] = torch.sigmoid(-u_t)
        scaled = (e, f, power, s_z, s_y, m_z, _sigmoid_difference(u_s, u_t))
    u_1 = z_k - log_rest
    values[:, :1] = softplus(-u_1)
    values.masked_fill_(ignored, 0.0)
    if gradient is None:
        return values

    not_k = torch.sigmoid(-u_1)
    w = cross_entropy_weights.unsqueeze(1).to(not_k.dtype) * not_k
    at_k = -w
    out = torch.empty_like(student_logits) if gradient.dtype != student_logits.dtype else gradient
    torch.mul(torch.exp(tail - log_rest), w, out=out[:, width:])
    if scaled:
        e, f, power, s_z, s_y, m_z, delta = scaled
        v = distillation_weights.unsqueeze(1).to(not_k.dtype) * temperature
        a, b = (tckd_weight, nckd_weight) if decoupled else (1.0, values[:, 3:4])
        at_k = at_k + v * a * delta
        torch.mul(power, w * torch.exp(m_z - log_rest), out=out[:, :width])
        out[:, :width].addcmul_(e, v * (b - a * delta) / s_z).addcmul_(f, -v * b / s_y)
    out.scatter_(1, index, at_k).masked_fill_(ignored, 0.0)
    if out is not gradient:
        gradient.copy_(out)
    return values


def _power(e: torch.Tensor, exponent: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp(exponent) from e = exp(exponent / T); by products where T is a small integer."""
    if temperature == 1:
        return e
    if temperature == 2:
        return e * e
    if temperature in (3, 4):
        return e.pow(int(temperature))
    return exponent.exp()
