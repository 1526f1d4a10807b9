"""Entropy, error and divergence over the vocabulary, in stretches, against whole logits."""

from __future__ import annotations

import math

import pytest
import torch

from grace_vlm.evals.why import vocabulary
from grace_vlm.evals.why.vocabulary import divergence, entropy_and_error


def test_entropies_that_are_known() -> None:
    """A head that is the identity makes the states the logits."""
    head = torch.eye(4)
    hidden = torch.tensor([[0.0, 0, 0, 0], [60.0, 0, 0, 0], [0.0, 0, 30, 30], [math.log(3.0), 0, -1e4, -1e4]])
    entropy, wrong = entropy_and_error(hidden, head, torch.tensor([0, 0, 3, 1]))
    three_to_one = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy.tolist() == pytest.approx([math.log(4), 0.0, math.log(2), three_to_one], abs=1e-6)
    assert wrong[[1, 3]].tolist() == [False, True]


def test_divergence_of_itself_is_0_and_of_others_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(33, 6, generator=generator) for _ in range(2))
    head = torch.randn(50, 6, generator=generator)
    kl, differs = divergence(p, head, p, head)
    assert kl.tolist() == [0.0] * 33
    assert not differs.any()
    kl, differs = divergence(p, head, q, head)
    log_p, log_q = ((x.double() @ head.double().T).log_softmax(-1) for x in (p, q))
    torch.testing.assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(differs, log_p.argmax(-1) != log_q.argmax(-1))


def test_stretches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(17, 5, generator=generator) for _ in range(2))
    head, targets = torch.randn(40, 5, generator=generator), torch.arange(17)
    whole = (*divergence(p, head, q, head), *entropy_and_error(p, head, targets))
    monkeypatch.setattr(vocabulary, "_STRETCH_ELEMENTS", 120)
    assert len(list(vocabulary.stretches(17, 40))) == 6
    for one, other in zip(whole, (*divergence(p, head, q, head), *entropy_and_error(p, head, targets)), strict=True):
        torch.testing.assert_close(one, other)
