"""gated_decoupled_kd against a version written apart: class k cut out, 1 - p from log-sum-exp of the rest."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from grace_vlm.errors import ConfigError
from grace_vlm.losses.gdkd import confidence_gate, gated_decoupled_kd

IGNORE = -100
TEMPERATURES = (1.0, 1.5, 2.0, 4.0)
QWEN_VOCABULARY = 151_936


def row_divergences(z: torch.Tensor, y: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, ...]:
    """(TCKD, NCKD, 1 - q_k) of one row: two-class and remaining-class distributions spelt out."""

    def parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scaled = logits / temperature
        rest = torch.cat([scaled[:k], scaled[k + 1 :]])
        whole = torch.logsumexp(scaled, 0)
        log_target, log_other = scaled[k] - whole, torch.logsumexp(rest, 0) - whole  # log p_k, log(1 - p_k)
        # The logarithm of the larger of the two comes from the smaller, so that neither cancels.
        if bool(log_other < log_target):
            log_target = torch.log1p(-torch.exp(log_other))
        else:
            log_other = torch.log1p(-torch.exp(log_target))
        return log_target, log_other, torch.log_softmax(rest, 0)

    log_p, log_not_p, log_rest_p = parts(z)
    log_q, log_not_q, log_rest_q = parts(y)
    tckd = log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)
    nckd = (log_rest_q.exp() * (log_rest_q - log_rest_p)).sum()
    return tckd, nckd, log_not_q.exp()


def row_gate(y: torch.Tensor) -> torch.Tensor:
    probs = torch.softmax(y, 0)
    entropy = -(probs * probs.clamp_min(1e-300).log()).sum()
    return torch.exp(-entropy / math.log(len(y)))


def oracle(
    z: torch.Tensor, y: torch.Tensor, targets: torch.Tensor, temperature: float, a: float, b: float, decoupled: bool
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """(sum of g T^2 (...), TCKD, NCKD, gate), zeros at ignored rows."""
    zero = z.sum() * 0
    total, tckds, nckds, gates = zero, [], [], []
    for row, k in enumerate(targets.tolist()):
        if k == IGNORE:
            tckds.append(zero)
            nckds.append(zero)
            gates.append(zero)
            continue
        tckd, nckd, rest = row_divergences(z[row], y[row], k, temperature)
        gate = row_gate(y[row]).detach()
        weighted = a * tckd + b * nckd if decoupled else tckd + rest * nckd
        total = total + gate * temperature**2 * weighted
        tckds.append(tckd)
        nckds.append(nckd)
        gates.append(gate)
    return total, tckds, nckds, gates


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    ours, expected = ours.detach(), expected.detach()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    # Both are sums of terms of order 1: where student and teacher all but agree, 1e-15 is the last digit of either.
    # What the confident teacher's tiny TCKD is worth, 50 digits decide below.
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max() if ours.numel() else 0.0) <= max(tolerance * largest, 1e-15)


def compare(
    z: torch.Tensor, y: torch.Tensor, targets: torch.Tensor, temperature: float, a: float, b: float, decoupled: bool
) -> None:
    ours_z, ref_z = z.clone().requires_grad_(), z.clone().requires_grad_()
    options = {"temperature": temperature, "tckd_weight": a, "nckd_weight": b, "decoupled": decoupled}
    terms = gated_decoupled_kd(ours_z, y, targets, ignore_index=IGNORE, **options)
    total, tckds, nckds, gates = oracle(ref_z, y, targets, temperature, a, b, decoupled)
    assert terms.loss.dtype == torch.float64
    expected = total / torch.stack(gates).sum().clamp_min(1e-8)
    terms.loss.backward()
    expected.backward()
    assert ours_z.grad is not None
    assert ref_z.grad is not None
    assert_close(terms.loss.detach(), expected.detach())
    assert_close(terms.tckd.detach(), torch.stack(tckds).detach())
    assert_close(terms.nckd.detach(), torch.stack(nckds).detach())
    assert_close(terms.gate, torch.stack(gates))
    assert_close(terms.gate_sum, torch.stack(gates).sum())
    assert_close(ours_z.grad, ref_z.grad)


def make_confident(logits: torch.Tensor, k: int, one_minus_p: float) -> torch.Tensor:
    """The row with its entry k raised until 1 - softmax_k is ``one_minus_p``."""
    rest = torch.cat([logits[:k], logits[k + 1 :]])
    out = logits.clone()
    out[k] = torch.logsumexp(rest, 0) + math.log1p(-one_minus_p) - math.log(one_minus_p)
    return out


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    """(z, y, targets, a, b): odd sizes, every kind of row mixed in by the seed."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = (1, 2, 5, 7)[seed % 4]
    vocabulary = (2, 3, 11, 41, 257, 1001)[seed // 4 % 6]
    spread = (0.1, 1.0, 5.0)[seed % 3]
    z = torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    y = torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    targets = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    if seed % 2:
        targets[0] = vocabulary - 1
    if seed % 5 == 0:
        targets[:-1] = IGNORE  # one supervised token
    if seed % 7 == 0:
        targets[0] = IGNORE if num_rows > 1 else targets[0]
    if seed % 3 == 0 and int(targets[-1]) != IGNORE:
        y[-1] = make_confident(y[-1], int(targets[-1]), 1e-9)
    if seed % 6 == 1 and int(targets[-1]) != IGNORE:
        z[-1] = make_confident(z[-1], int(targets[-1]), 1e-6)
    a, b = ((1.0, 4.0), (1.0, 0.0), (0.0, 1.0), (2.5, 0.5))[seed % 4]
    return z, y, targets, a, b


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_values_and_gradients_equal_the_plain_version_on_240_cases(temperature: float) -> None:
    for seed in range(60):
        z, y, targets, a, b = random_case(seed)
        compare(z, y, targets, temperature, a, b, decoupled=seed % 8 != 3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_qwens_vocabulary_with_the_last_id_as_target(temperature: float) -> None:
    generator = torch.Generator().manual_seed(7)
    y = torch.randn(2, QWEN_VOCABULARY, generator=generator, dtype=torch.float64) * 2
    z = y + 0.7 * torch.randn(2, QWEN_VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.tensor([QWEN_VOCABULARY - 1, 77_091])
    y[1] = make_confident(y[1] / temperature, 77_091, 1e-9) * temperature
    compare(z, y, targets, temperature, 1.0, 4.0, decoupled=True)


@pytest.mark.parametrize("log_odds", [20.5, 22.0, 40.0])
def test_a_student_certain_of_another_word(log_odds: float) -> None:
    """Beyond 20 torch's softplus is the identity, which costs 2e-9 of this gradient."""
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    for teacher_odds in (3.0, -3.0):
        z[0, 2] = torch.logsumexp(z[0, [0, 1, 3, 4]], 0) - log_odds * math.copysign(1.0, teacher_odds)
        y[0, 2] = torch.logsumexp(y[0, [0, 1, 3, 4]], 0) + teacher_odds
        ours, expected = z.clone().requires_grad_(), z.clone().requires_grad_()
        gated_decoupled_kd(ours, y, torch.tensor([2]), temperature=1.0).tckd.sum().backward()
        # dTCKD/du = p - q, and du/dz is 1 at the target and minus the rest's distribution elsewhere.
        p = 1 / (1 + mpmath.exp(log_odds * math.copysign(1.0, teacher_odds)))
        delta = float(p - 1 / (1 + mpmath.exp(-teacher_odds)))
        rest = torch.softmax(torch.cat([z[0, :2], z[0, 3:]]), 0)
        by_hand = -delta * torch.cat([rest[:2], -torch.ones(1, dtype=torch.float64), rest[2:]])
        assert ours.grad is not None
        assert float((ours.grad[0] - by_hand).abs().max()) <= 1e-12 * float(by_hand.abs().max())
        compare(expected.detach(), y, torch.tensor([2]), 1.0, 1.0, 4.0, decoupled=True)


@pytest.mark.parametrize("one_minus_q", [1e-3, 1e-9, 1e-30])
def test_tckd_of_a_confident_teacher_keeps_every_digit(one_minus_q: float) -> None:
    """50 digits decide; a version that forms 1 - p, or clamps it at 1e-8, has none right."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    z = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    y[0] = make_confident(y[0], 39, one_minus_q)
    with mpmath.workdps(50):

        def target_and_rest(logits: torch.Tensor) -> tuple[mpmath.mpf, mpmath.mpf]:
            powers = [mpmath.exp(mpmath.mpf(v)) for v in logits[0].tolist()]
            return powers[39] / sum(powers), sum(powers[:39]) / sum(powers)

        (p, not_p), (q, not_q) = target_and_rest(z), target_and_rest(y)
        expected = float(q * mpmath.log(q / p) + not_q * mpmath.log(not_q / not_p))
        confident_student = z.clone()
        confident_student[0] = make_confident(z[0], 39, 3 * one_minus_q)
        p2, not_p2 = target_and_rest(confident_student)
        expected_both = float(q * mpmath.log(q / p2) + not_q * mpmath.log(not_q / not_p2))
    ours = gated_decoupled_kd(z, y, torch.tensor([39]), temperature=1.0).tckd.item()
    assert ours == pytest.approx(expected, rel=1e-12)
    both = gated_decoupled_kd(confident_student, y, torch.tensor([39]), temperature=1.0).tckd.item()
    assert both == pytest.approx(expected_both, rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_undecoupled_is_plain_kl_with_t_squared(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(9, 33, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(9, 33, generator=generator, dtype=torch.float64)
    ours = gated_decoupled_kd(
        z, y, torch.arange(9), temperature=temperature, decoupled=False, gate=torch.ones(9), normalizer=9.0
    )
    q = torch.softmax(y / temperature, -1)
    kl = (q * (torch.log_softmax(y / temperature, -1) - torch.log_softmax(z / temperature, -1))).sum(-1)
    rest = 1 - q[torch.arange(9), torch.arange(9)]
    expected = temperature**2 * kl.mean()
    assert_close(ours.loss.detach(), expected.detach())
    assert_close((ours.tckd + rest * ours.nckd).detach(), kl.detach())
    (grad,) = torch.autograd.grad(ours.loss, z)
    (grad_expected,) = torch.autograd.grad(expected, z)
    assert_close(grad, grad_expected)


def test_ignored_rows_have_no_part_in_anything() -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(6, 17, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 17, generator=generator, dtype=torch.float64)
    z[1], y[4] = torch.nan, torch.nan  # not even what stands there matters
    targets = torch.tensor([3, IGNORE, 16, 0, IGNORE, 5])
    kept = targets != IGNORE
    leaf = z.clone().requires_grad_()
    whole = gated_decoupled_kd(leaf, y, targets)
    whole.loss.backward()
    alone = z[kept].clone().requires_grad_()
    part = gated_decoupled_kd(alone, y[kept], targets[kept])
    part.loss.backward()
    assert leaf.grad is not None
    assert alone.grad is not None
    for name in ("tckd", "nckd", "gate"):
        values = getattr(whole, name)
        assert values.shape == (6,)
        assert bool((values[~kept] == 0).all())
        assert torch.equal(values[kept], getattr(part, name))
    assert whole.loss.item() == part.loss.item()
    assert torch.equal(leaf.grad[kept], alone.grad)
    assert bool((leaf.grad[~kept] == 0).all())


def test_the_ignored_id_is_an_argument() -> None:
    z, y = torch.randn(2, 5), torch.randn(2, 5)
    terms = gated_decoupled_kd(z, y, torch.tensor([0, 3]), ignore_index=0)
    assert terms.gate[0] == 0
    assert terms.gate[1] > 0


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("normalizer", [None, 8.0])
def test_nothing_supervised_is_zero_and_backward_works(num_rows: int, normalizer: float | None) -> None:
    z = torch.randn(num_rows, 7, requires_grad=True)
    targets = torch.full((num_rows,), IGNORE)
    terms = gated_decoupled_kd(z, torch.randn(num_rows, 7), targets, normalizer=normalizer)
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert terms.gate_sum.item() == 0.0
    assert z.grad is not None
    assert bool((z.grad == 0).all())


def test_gate_is_between_1_over_e_and_1_and_falls_with_entropy() -> None:
    uniform = torch.zeros(1, 1000, dtype=torch.float64)
    certain = torch.full((1, 1000), -1e6, dtype=torch.float64)
    certain[0, 3] = 0.0
    impossible = torch.full((1, 1000), -torch.inf, dtype=torch.float64)
    impossible[0, 3] = 0.0
    assert confidence_gate(uniform).item() == pytest.approx(math.exp(-1), rel=1e-14)
    assert confidence_gate(certain).item() == 1.0
    assert confidence_gate(impossible).item() == 1.0
    # Two words of probability 1/2 among 1000: H = log 2.
    two = torch.full((1, 1000), -1e6, dtype=torch.float64)
    two[0, :2] = 5.0
    assert confidence_gate(two).item() == pytest.approx(math.exp(-math.log(2) / math.log(1000)), rel=1e-14)
    generator = torch.Generator().manual_seed(5)
    gates = [confidence_gate(torch.randn(50, 1000, generator=generator) * sharp) for sharp in (0.1, 2.0, 20.0)]
    assert all(bool(((gate >= math.exp(-1) - 1e-6) & (gate <= 1)).all()) for gate in gates)
    assert gates[0].mean() < gates[1].mean() < gates[2].mean()


def test_a_gate_of_the_margin_is_the_lead_of_the_likeliest_word() -> None:
    uniform = torch.zeros(1, 1000, dtype=torch.float64)
    certain = torch.full((1, 1000), -torch.inf, dtype=torch.float64)
    certain[0, 3] = 0.0
    three = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    for logits, lead in ((uniform, 0.0), (certain, 1.0), (three, 0.2)):
        assert confidence_gate(logits + 7, "margin").item() == pytest.approx(math.exp(lead - 1), rel=1e-13)
    assert bool(confidence_gate(three * math.nan, "margin").isnan())


def test_gate_is_of_the_teacher_at_temperature_one_and_has_no_gradient() -> None:
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(4, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 11])
    cold, hot = (gated_decoupled_kd(z, y, targets, temperature=t) for t in (1.0, 4.0))
    assert torch.equal(cold.gate, hot.gate)
    assert_close(cold.gate, torch.stack([row_gate(row) for row in y.detach()]))
    assert not cold.gate.requires_grad
    cold.loss.backward()
    assert y.grad is None
    given = torch.rand(4, dtype=torch.float64, requires_grad=True)
    gated_decoupled_kd(z, y, targets, gate=given).loss.backward()
    assert given.grad is None


def test_a_given_gate_weighs_the_tokens() -> None:
    generator = torch.Generator().manual_seed(8)
    z = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    targets, gate = torch.tensor([4, IGNORE, 7]), torch.tensor([0.25, 9.0, 2.0], dtype=torch.float64)
    terms = gated_decoupled_kd(z, y, targets, gate=gate, temperature=2.0, tckd_weight=3.0, nckd_weight=5.0)
    per_token = 3.0 * terms.tckd + 5.0 * terms.nckd
    assert terms.gate.tolist() == [0.25, 0.0, 2.0]
    expected = 4.0 * (0.25 * per_token[0] + 2.0 * per_token[2]) / 2.25
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-14)


def test_two_halves_with_the_global_normalizer_add_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(9)
    z = torch.randn(40, 31, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 31, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(0, 31, (40,), generator=generator)
    targets[5:9] = IGNORE
    whole_z, half_z = z.clone().requires_grad_(), z.clone().requires_grad_()
    whole = gated_decoupled_kd(whole_z, y, targets)
    whole.loss.backward()
    cut = 7
    losses = []
    for part in (slice(0, cut), slice(cut, 40)):
        loss = gated_decoupled_kd(half_z[part], y[part], targets[part], normalizer=whole.gate_sum).loss
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(whole.loss.item(), rel=1e-13)
    assert whole_z.grad is not None
    assert half_z.grad is not None
    assert_close(half_z.grad, whole_z.grad, 1e-13)


def test_order_of_the_vocabulary_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(10)
    z = torch.randn(6, 50, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 50, generator=generator, dtype=torch.float64) * 4
    targets = torch.randint(0, 50, (6,), generator=generator)
    order = torch.randperm(50, generator=generator)
    place = torch.argsort(order)
    straight = gated_decoupled_kd(z, y, targets).loss
    shuffled = gated_decoupled_kd(z[:, order], y[:, order], place[targets]).loss
    assert shuffled.item() == pytest.approx(straight.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(straight, z)
    (grad_shuffled,) = torch.autograd.grad(shuffled, z)
    assert_close(grad_shuffled, grad, 1e-12)


def test_student_equal_to_teacher_up_to_a_constant_is_zero() -> None:
    y = torch.randn(5, 40, dtype=torch.float64) * 3
    z = (y + 2.5).requires_grad_()
    terms = gated_decoupled_kd(z, y, torch.tensor([0, 1, 2, 3, 39]))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(0.0, abs=1e-13)
    assert z.grad is not None
    assert z.grad.abs().max().item() < 1e-13


def test_gradients_of_a_row_add_to_zero_and_divergences_are_not_negative() -> None:
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(64, 29, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(64, 29, generator=generator, dtype=torch.float64) * 6
    terms = gated_decoupled_kd(z, y, torch.randint(0, 29, (64,), generator=generator))
    terms.loss.backward()
    assert z.grad is not None
    assert z.grad.sum(-1).abs().max().item() < 1e-14
    assert terms.tckd.min().item() >= 0.0
    assert terms.nckd.min().item() >= 0.0


def test_fp32_error_is_at_most_twice_that_of_a_plain_fp32_version() -> None:
    ours_error, plain_error = 0.0, 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randn(4, 2003, generator=generator) * 3
        z = y + 0.7 * torch.randn(4, 2003, generator=generator)
        targets = torch.randint(0, 2003, (4,), generator=generator)

        def gradient(of: str, dtype: torch.dtype, z=z, y=y, targets=targets) -> torch.Tensor:
            leaf = z.to(dtype).requires_grad_()
            if of == "ours":
                loss = gated_decoupled_kd(leaf, y.to(dtype), targets).loss
            else:
                total, _, _, gates = oracle(leaf, y.to(dtype), targets, 2.0, 1.0, 4.0, True)
                loss = total / torch.stack(gates).sum()
            loss.backward()
            assert leaf.grad is not None
            return leaf.grad.double()

        truth = gradient("plain", torch.float64)
        ours_error += float((gradient("ours", torch.float32) - truth).norm() / truth.norm())
        plain_error += float((gradient("plain", torch.float32) - truth).norm() / truth.norm())
    assert ours_error <= 2 * plain_error


def test_fp32_keeps_tckd_where_clamping_at_1e_8_would_lose_it() -> None:
    generator = torch.Generator().manual_seed(12)
    y = torch.randn(4, 5003, generator=generator, dtype=torch.float64)
    z = torch.randn(4, 5003, generator=generator, dtype=torch.float64)
    for row in range(4):
        y[row] = make_confident(y[row], row, 1e-9)
        z[row] = make_confident(z[row], row, 1e-4)
    y, z = y.float(), z.float()
    expected = torch.stack([row_divergences(z[r].double(), y[r].double(), r, 1.0)[0] for r in range(4)])
    ours = gated_decoupled_kd(z, y, torch.arange(4), temperature=1.0)
    assert ours.tckd.dtype == torch.float32
    assert float(((ours.tckd.double() - expected) / expected).abs().max()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    z, y = torch.randn(5, 100).to(dtype), torch.randn(5, 100).to(dtype)
    half = gated_decoupled_kd(z, y, torch.arange(5))
    full = gated_decoupled_kd(z.float(), y.float(), torch.arange(5))
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == full.loss.item()


def test_heads_of_different_width_are_an_error_by_default() -> None:
    with pytest.raises(ConfigError) as caught:
        gated_decoupled_kd(torch.zeros(1, 128), torch.zeros(1, 120), torch.tensor([0]))
    assert str(caught.value) == (
        "the student has 128 words and the teacher 120; "
        "set loss.vocabulary=common if both use one tokenizer and only the padding differs"
    )


@pytest.mark.parametrize(("student_width", "teacher_width"), [(40, 33), (33, 40)])
def test_common_words_give_no_probability_to_a_word_that_one_lacks(student_width: int, teacher_width: int) -> None:
    generator = torch.Generator().manual_seed(13)
    z = torch.randn(4, student_width, generator=generator, dtype=torch.float64)
    y = torch.randn(4, teacher_width, generator=generator, dtype=torch.float64)
    z[:, 33:] = 50.0  # a padded word that would swallow everything
    y[:, 33:] = 50.0
    targets = torch.tensor([0, 5, 32, IGNORE])
    leaf = z.clone().requires_grad_()
    terms = gated_decoupled_kd(leaf, y, targets, vocabulary="common")
    terms.loss.backward()
    narrow = gated_decoupled_kd(z[:, :33], y[:, :33], targets)
    assert leaf.grad is not None
    assert bool((leaf.grad[:, 33:] == 0).all())
    assert terms.loss.item() == narrow.loss.item()
    assert torch.equal(terms.gate, narrow.gate)  # log|V| is of the common words too


def test_a_target_outside_the_common_words_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        gated_decoupled_kd(torch.zeros(2, 40), torch.zeros(2, 33), torch.tensor([1, 35]), vocabulary="common")
    assert str(caught.value) == (
        "target id 35 is not among the 33 words that student and teacher share; their tokenizers differ"
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    with pytest.raises(ConfigError) as caught:
        gated_decoupled_kd(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), temperature=temperature)
    assert str(caught.value) == f"temperature is {temperature}; expected a number above 0"
