"""The relation loss from packed Gram matrices of the teacher is the loss from its features."""

from __future__ import annotations

import random

import pytest
import torch
from test_rcka import features
from test_rcka_batches import BUDGETS_BYTES, random_set

from grace_vlm.losses import rcka
from grace_vlm.losses.rcka import centred_grams, relational_cka_sum
from grace_vlm.losses.signal import Grams, triangle


def loss_and_gradient(x: torch.Tensor, teacher: torch.Tensor | Grams, lengths: list[int]) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    loss, count = relational_cka_sum(leaf, teacher, lengths)
    loss.backward()
    assert leaf.grad is not None
    return [loss.detach(), count, leaf.grad]


@pytest.mark.parametrize("budget", BUDGETS_BYTES)
@pytest.mark.parametrize("seed", range(6))
def test_grams_give_the_loss_of_the_features(seed: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, images that enter, gradient: 1e-10 of the largest in FP64, 2e-5 in FP32."""
    monkeypatch.setattr(rcka, "SUB_BATCH_BYTES", budget)
    x, y, lengths, left_out = random_set(seed)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        grams = centred_grams(y.to(dtype), lengths)
        assert grams.values.dtype == dtype
        assert grams.values.shape == (sum(map(triangle, lengths)),)
        expected = loss_and_gradient(x.to(dtype), y.to(dtype), lengths)
        found = loss_and_gradient(x.to(dtype), grams, lengths)
        assert found[1] == expected[1]
        if dtype == torch.float64:
            assert found[1] == len(lengths) - len(left_out)
        for ours, theirs in zip(found, expected, strict=True):
            assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def test_the_triangle_is_that_of_the_definition() -> None:
    """H X^ X^^T H written out, row after row of the lower triangle, for images of 1 to 20 tokens."""
    lengths = [5, 1, 20, 2, 17]
    y = features(lengths, 9, 9)[1]
    values = centred_grams(y, lengths).values
    for part, packed in zip(y.split(lengths), values.split([triangle(n) for n in lengths]), strict=True):
        unit = part / part.norm(dim=1, keepdim=True)
        centre = torch.eye(len(part), dtype=part.dtype) - 1 / len(part)
        whole = centre @ unit @ unit.T @ centre
        rows, columns = torch.tril_indices(len(part), len(part))
        assert torch.allclose(packed, whole[rows, columns], rtol=0, atol=1e-14)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    """Packed one by one or together, to FP32's rounding: entries of a cache may be put together in any order."""
    chance = random.Random(0)
    lengths = [chance.randint(1, 60) for _ in range(12)]
    y = features(lengths, 3, 48)[1].float()
    together = centred_grams(y, lengths).values
    alone = torch.cat([centred_grams(part, [len(part)]).values for part in y.split(lengths)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)


def test_a_nan_of_the_teacher_stays_in_its_image() -> None:
    lengths = [6, 9, 5]
    x, y = features(lengths, 7, 11)
    y[7] = float("nan")
    values = centred_grams(y, lengths).values.split([triangle(n) for n in lengths])
    assert [bool(part.isnan().any()) for part in values] == [False, True, False]
    loss, _ = relational_cka_sum(x, Grams(torch.cat(values)), lengths)
    assert loss.isnan()
    alone, _ = relational_cka_sum(x[:6], Grams(values[0]), [6])
    assert alone.isfinite()


def test_nothing_is_read_from_the_device() -> None:
    """On the meta device there are no values: whatever reads one fails."""
    lengths = [6, 9, 5, 40]
    x, y = (f.to("meta").requires_grad_() for f in features(lengths, 7, 11))
    grams = centred_grams(y.detach(), lengths)
    relational_cka_sum(x, grams, lengths)[0].backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_no_image_is_no_value() -> None:
    empty = centred_grams(torch.zeros(0, 8), [])
    assert empty.values.shape == (0,)
    loss, count = relational_cka_sum(torch.zeros(0, 4), empty, [])
    assert (float(loss), float(count)) == (0.0, 0.0)


def test_values_that_do_not_fit_the_images() -> None:
    with pytest.raises(ValueError, match="image_lengths") as caught:
        relational_cka_sum(torch.zeros(7, 3), Grams(torch.zeros(20)), [3, 4])
    assert str(caught.value) == (
        "image_lengths add up to 7, features have 7 (student) and 20 (teacher) packed values where 16 are expected"
    )
