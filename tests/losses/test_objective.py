"""compute_terms: which method has which terms, and that micro-batches add up to the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grace_vlm.losses.gdkd import GateSignal, confidence_gate
from grace_vlm.losses.objective import Implementation, LossTerms, Normalizers, Objective, compute_terms
from grace_vlm.losses.signal import TeacherSignal

VOCABULARY, D_S, D_T = 19, 6, 9
LENGTHS = (5, 8, 2, 5)  # the third image is below min_tokens
CUTS = ((0, 7, 0, 13, 2), (7, 12, 13, 20, 4))
"""(first token, last token, first visual token, last visual token, images up to here) of two micro-batches."""


class World:
    """Twelve supervised tokens and four images, FP64, with a linear student so that gradients can be compared."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = randn(D_S, D_S).requires_grad_()
        self.head = randn(VOCABULARY, D_S)
        self.inputs, self.visual = randn(12, D_S), randn(sum(LENGTHS), D_S)
        self.teacher_hidden, self.teacher_head = randn(12, D_T), randn(VOCABULARY, D_T)
        self.teacher_visual = randn(sum(LENGTHS), D_T)
        self.targets = torch.randint(0, VOCABULARY, (12,), generator=generator)
        self.teacher_logits = self.teacher_hidden @ self.teacher_head.T
        probs = torch.softmax(self.teacher_logits, -1)
        self.gate = torch.exp((probs * probs.log()).sum(-1) / math.log(VOCABULARY))

    def terms(
        self, objective: Objective, tokens: slice, visual: slice, lengths: tuple[int, ...], normalizers: Normalizers
    ) -> LossTerms:
        gate = self.gate if objective.is_gated else torch.ones_like(self.gate)
        signal = TeacherSignal(self.teacher_hidden[tokens], gate[tokens], self.teacher_visual[visual], lengths)
        return compute_terms(
            objective,
            self.inputs[tokens] @ self.weight.T,
            self.head,
            self.targets[tokens],
            normalizers,
            distillation_weight=0.7,
            relational_ramp=0.5,
            student_relational=self.visual[visual] @ self.weight.T,
            teacher_head=self.teacher_head if objective.needs_teacher else None,
            signal=signal if objective.needs_teacher else None,
            image_lengths=lengths,
        )

    def whole(self, objective: Objective, normalizers: Normalizers) -> LossTerms:
        return self.terms(objective, slice(0, 12), slice(0, 20), LENGTHS, normalizers)


def counts(world: World, objective: Objective) -> Normalizers:
    gate = world.gate.sum() if objective.is_gated else torch.tensor(12.0, dtype=torch.float64)
    return Normalizers(torch.tensor(12.0, dtype=torch.float64), gate, torch.tensor(3.0))


ALL = Objective("grace")
VARIANTS = [
    Objective("sft"),
    Objective("qat"),
    Objective("kd"),
    ALL,
    replace(ALL, gate=False),
    replace(ALL, decoupled=False),
    replace(ALL, relational=False),
    replace(ALL, gate=False, decoupled=False, relational=False),
    replace(ALL, implementation="reference"),
    replace(ALL, implementation="reference", decoupled=False),
    Objective("kd", implementation="reference"),
    Objective("sft", implementation="reference"),
]


def gradient(terms: LossTerms, world: World) -> torch.Tensor:
    (grad,) = torch.autograd.grad(terms.total, world.weight)
    return grad


@pytest.mark.parametrize("objective", VARIANTS)
def test_two_micro_batches_add_to_one_batch(objective: Objective) -> None:
    world = World()
    normalizers = counts(world, objective)
    whole = world.whole(objective, normalizers)
    parts = []
    first_image = 0
    for start, end, first_visual, last_visual, last_image in CUTS:
        lengths = LENGTHS[first_image:last_image]
        parts.append(world.terms(objective, slice(start, end), slice(first_visual, last_visual), lengths, normalizers))
        first_image = last_image
    for name in ("cross_entropy", "distillation", "relational", "images"):
        added = sum(getattr(part, name).item() for part in parts)
        assert added == pytest.approx(getattr(whole, name).item(), rel=1e-12), name
    expected = gradient(whole, world)
    added_gradient = gradient(parts[0], world) + gradient(parts[1], world)
    assert float((added_gradient - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def independent_terms(world: World, objective: Objective) -> tuple[float, float, float]:
    """(cross-entropy sum, T^2 weighted distillation sum, sum of 1 - CKA) without a line of ours."""
    logits = (world.inputs @ world.weight.T @ world.head.T).detach()
    rows = torch.arange(12)
    cross_entropy = -torch.log_softmax(logits, -1)[rows, world.targets].sum()
    p, q = (torch.softmax(x / 2.0, -1) for x in (logits, world.teacher_logits))
    p_k, q_k = p[rows, world.targets], q[rows, world.targets]
    other = torch.ones_like(p).index_put((rows, world.targets), torch.tensor(0.0, dtype=p.dtype))
    p_hat, q_hat = (x * other / (x * other).sum(-1, keepdim=True) for x in (p, q))
    tckd = q_k * (q_k / p_k).log() + (1 - q_k) * ((1 - q_k) / (1 - p_k)).log()
    nckd = torch.where(other > 0, q_hat * (q_hat / p_hat).log(), 0.0).sum(-1)
    kl = (q * (q / p).log()).sum(-1)
    per_token = tckd + 4.0 * nckd if objective.method == "grace" and objective.decoupled else kl
    weights = world.gate if objective.is_gated else torch.ones(12)
    distillation = 4.0 * (weights * per_token).sum()
    relational, start = 0.0, 0
    for length in LENGTHS:
        own = slice(start, start + length)
        start += length
        if length < 4:
            continue
        grams = []
        for features in ((world.visual @ world.weight.T).detach()[own], world.teacher_visual[own]):
            unit = features / features.norm(dim=-1, keepdim=True)
            h = torch.eye(length, dtype=torch.float64) - 1.0 / length
            grams.append(h @ unit @ unit.T @ h)
        relational += float(1 - (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))
    return float(cross_entropy), float(distillation), relational


@pytest.mark.parametrize("objective", VARIANTS)
def test_terms_and_total_of_every_method(objective: Objective) -> None:
    world = World()
    terms = world.whole(objective, counts(world, objective))
    cross_entropy, distillation, relational = independent_terms(world, objective)
    has_teacher = objective.method in ("kd", "grace")
    has_relation = objective.method == "grace" and objective.relational
    assert terms.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-12)
    assert terms.distillation.item() == pytest.approx(distillation if has_teacher else 0.0, rel=1e-11)
    assert terms.relational.item() == pytest.approx(relational if has_relation else 0.0, rel=1e-11)
    assert terms.images.item() == (3 if has_relation else 0)
    total = cross_entropy / 12
    if has_teacher:
        total += 0.7 * distillation / (float(world.gate.sum()) if objective.is_gated else 12)
    if has_relation:
        total += 0.5 * 3.0 * relational / 3
    assert terms.total.item() == pytest.approx(total, rel=1e-12)
    assert not any(getattr(terms, n).requires_grad for n in ("cross_entropy", "distillation", "relational", "images"))


@pytest.mark.parametrize(
    ("objective", "needs_teacher", "is_gated", "is_relational"),
    [
        (Objective("sft"), False, False, False),
        (Objective("qat"), False, False, False),
        (Objective("kd"), True, False, False),  # plain: grace's switches mean nothing here
        (ALL, True, True, True),
        (replace(ALL, gate=False), True, False, True),
        (replace(ALL, relational=False), True, True, False),
    ],
)
def test_what_a_method_needs(objective: Objective, needs_teacher: bool, is_gated: bool, is_relational: bool) -> None:
    assert objective.needs_teacher is needs_teacher
    assert objective.is_gated is is_gated
    assert objective.is_relational is is_relational
    gate = objective.gate_of(torch.randn(4, 11) * 5, torch.eye(11))
    assert gate.dtype == torch.float32
    assert bool((gate == 1).all()) is not is_gated


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("signal", ["entropy", "margin"])
def test_a_colder_gate_is_a_power_of_it(implementation: Implementation, signal: GateSignal) -> None:
    hidden, head = torch.randn(6, 11, dtype=torch.float64) * 3, torch.randn(40, 11, dtype=torch.float64)
    plain = replace(ALL, implementation=implementation, gate_signal=signal)
    gate = plain.gate_of(hidden, head)
    assert torch.allclose(gate, confidence_gate(hidden @ head.T, signal), atol=1e-13)
    cold = replace(plain, gate_temperature=0.25).gate_of(hidden, head)
    assert torch.allclose(cold, gate**4, atol=1e-13)
    assert bool((cold >= math.exp(-4)).all())


@pytest.mark.parametrize("objective", VARIANTS)
def test_a_micro_batch_without_supervision_or_images_adds_nothing(objective: Objective) -> None:
    world = World()
    normalizers = Normalizers(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0))
    terms = world.terms(objective, slice(0, 0), slice(0, 0), (), normalizers)
    assert terms.total.item() == 0.0
    assert bool((gradient(terms, world) == 0).all())


def test_settings_reach_the_terms() -> None:
    world = World()
    base = world.whole(ALL, counts(world, ALL))
    for change in ({"temperature": 4.0}, {"tckd_weight": 2.0}, {"nckd_weight": 1.0}):
        changed = world.whole(replace(ALL, **change), counts(world, ALL))
        assert changed.distillation.item() != pytest.approx(base.distillation.item(), rel=1e-3), change
        assert changed.relational.item() == base.relational.item()
    assert world.whole(replace(ALL, min_tokens=6), counts(world, ALL)).images.item() == 1
    heavier = world.whole(replace(ALL, relational_weight=6.0), counts(world, ALL))
    assert heavier.total.item() - base.total.item() == pytest.approx(0.5 * 3.0 * base.relational.item() / 3, rel=1e-5)
