"""The flag that reproduces the official arithmetic, against the restatement of the official code in benchmarks/."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from grace_vlm.losses.objective import Normalizers, Objective, compute_terms
from grace_vlm.losses.official import official_decoupled_kd
from grace_vlm.losses.signal import TeacherSignal

OFFICIAL = Objective("grace", relational=False, implementation="official")


@pytest.fixture(scope="module")
def restated() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "official_loss.py"
    spec = importlib.util.spec_from_file_location("official_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(num_tokens: int, words: int, spread: float = 4.0) -> tuple[torch.Tensor, ...]:
    """BF16 values in FP32 tensors, as on a CPU."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, 32), (words, 32), (num_tokens, 48), (words, 48))
    tensors = [torch.randn(*shape, generator=generator).bfloat16().float() for shape in shapes]
    tensors[1] *= spread / 32**0.5
    tensors[3] *= spread / 48**0.5
    return *(x.bfloat16().float() for x in tensors), torch.randint(0, words, (num_tokens,), generator=generator)


def ours(given: tuple[torch.Tensor, ...], weight: float) -> tuple[Any, torch.Tensor, torch.Tensor]:
    hidden, head = given[0].clone().requires_grad_(), given[1].clone().requires_grad_()
    gate = OFFICIAL.gate_of(given[2], given[3])
    signal = TeacherSignal(given[2], gate, torch.zeros(0, 48), ())
    counts = Normalizers(torch.tensor(float(len(given[4]))), gate.sum(), torch.tensor(0.0))
    terms = compute_terms(
        OFFICIAL,
        hidden,
        head,
        given[4],
        counts,
        distillation_weight=weight,
        teacher_head=given[3],
        signal=signal,
    )
    return terms, *torch.autograd.grad(terms.total, (hidden, head))


@pytest.mark.parametrize(("num_tokens", "words"), [(1, 11), (37, 301), (64, 5_003)])
def test_the_same_loss_and_gradients_as_the_restatement(restated: ModuleType, num_tokens: int, words: int) -> None:
    given = inputs(num_tokens, words)
    hidden, head = given[0].clone().requires_grad_(), given[1].clone().requires_grad_()
    # The heads return BF16 logits; chunks of 16 rows cut what the official code cuts at 2,048.
    logits = (hidden @ head.T).to(torch.bfloat16)
    teacher_logits = (given[2] @ given[3].T).to(torch.bfloat16)
    total, cross_entropy, gdkd = restated.official_loss(
        logits, teacher_logits, given[4], distillation_weight=0.7, chunk_size=16
    )
    d_hidden, d_head = torch.autograd.grad(total, (hidden, head))
    terms, our_hidden, our_head = ours(given, 0.7)
    gate = OFFICIAL.gate_of(given[2], given[3])
    assert terms.cross_entropy.item() / num_tokens == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert terms.distillation.item() / gate.sum().item() == pytest.approx(gdkd.item(), rel=1e-5)
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-5)
    # Their gradient of the logits is BF16, the dtype of their logits; so is ours.
    for mine, theirs in ((our_hidden, d_hidden), (our_head, d_head)):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_what_the_clamp_loses() -> None:
    """A teacher with 1 - q_k = 1e-10: its TCKD and the gradient of the target's logit are gone, ours are not."""
    logits = torch.zeros(1, 50)
    logits[0, 3] = 2 * (math.log(49) + math.log1p(-1e-10) - math.log(1e-10))
    student = logits.clone()
    student[0, 3] -= 8.0
    targets = torch.tensor([3])
    student.requires_grad_()
    lost = official_decoupled_kd(student, logits, targets, nckd_weight=0.0)
    (gradient,) = torch.autograd.grad(lost.sum(), student)
    assert lost.item() == 0.0
    assert gradient[0, 3].item() == 0.0
    from grace_vlm.losses.gdkd import gated_decoupled_kd

    kept = gated_decoupled_kd(student, logits, targets, nckd_weight=0.0, gate=torch.ones(1), normalizer=1.0).loss
    (gradient,) = torch.autograd.grad(kept, student)
    assert kept.item() > 0.0
    assert gradient[0, 3].item() < 0.0


def test_logits_are_bf16_ones() -> None:
    given = inputs(20, 101)
    from grace_vlm.losses.official import official_logits

    logits = official_logits(given[0], given[1])
    assert torch.equal(logits, (given[0] @ given[1].T).bfloat16())
    assert not torch.equal(logits.float(), given[0] @ given[1].T)
