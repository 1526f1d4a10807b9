"""relational_cka against H K H written out, image by image."""

from __future__ import annotations

import pytest
import torch

from grace_vlm.losses.rcka import relational_cka, relational_cka_sum


def image_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - CKA of one image by the definition, with the centring matrix."""
    n = x.shape[0]
    h = torch.eye(n, dtype=x.dtype) - torch.full((n, n), 1.0 / n, dtype=x.dtype)

    def gram(features: torch.Tensor) -> torch.Tensor:
        k = torch.empty(n, n, dtype=features.dtype)
        rows = [row / row.norm() for row in features]
        k = torch.stack([torch.stack([torch.dot(a, b) for b in rows]) for a in rows])
        return h @ k @ h

    k_s, k_t = gram(x), gram(y)
    return 1 - torch.trace(k_s.T @ k_t) / torch.sqrt(torch.trace(k_s.T @ k_s) * torch.trace(k_t.T @ k_t))


def features(lengths: list[int], d_s: int, d_t: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return (
        torch.randn(total, d_s, generator=generator, dtype=torch.float64),
        torch.randn(total, d_t, generator=generator, dtype=torch.float64) + 0.5,
    )


@pytest.mark.parametrize("lengths", [[16], [4, 9], [7, 5, 7, 12, 5], [5, 2, 6, 1, 4, 3]])
def test_value_and_gradient_equal_the_definition(lengths: list[int]) -> None:
    x, y = features(lengths, 6, 10)
    ours_x, ref_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = relational_cka(ours_x, y, lengths)
    losses, start = [], 0
    for n in lengths:
        if n >= 4:
            losses.append(image_loss(ref_x[start : start + n], y[start : start + n]))
        start += n
    expected = torch.stack(losses).mean()
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert ours_x.grad is not None
    assert ref_x.grad is not None
    assert float((ours_x.grad - ref_x.grad).abs().max()) <= 1e-12 * float(ref_x.grad.abs().max())


def test_lengths_may_be_a_list_or_a_tensor() -> None:
    x, y = features([6, 9], 5, 8)
    assert torch.equal(relational_cka(x, y, [6, 9]), relational_cka(x, y, torch.tensor([6, 9])))


def test_images_of_one_length_are_not_confused() -> None:
    """Equal lengths are one batched product: swapping two teacher images must change the loss, both must not."""
    x, y = features([5, 8, 5], 6, 6, seed=3)
    swapped = torch.cat([y[13:], y[5:13], y[:5]])
    x_swapped = torch.cat([x[13:], x[5:13], x[:5]])
    straight = relational_cka(x, y, [5, 8, 5]).item()
    assert relational_cka(x, swapped, [5, 8, 5]).item() != pytest.approx(straight, rel=1e-6)
    assert relational_cka(x_swapped, swapped, [5, 8, 5]).item() == pytest.approx(straight, rel=1e-13)


def test_gradient_by_finite_differences() -> None:
    x, y = features([5, 4], 3, 7, seed=1)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: relational_cka(f, y, [5, 4]), (x,), eps=1e-6, atol=1e-7)


def test_what_changes_no_relation_changes_nothing() -> None:
    x, _ = features([8, 6], 5, 5, seed=2)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    scaled = x * torch.rand(14, 1, dtype=torch.float64).add(0.1)
    wide = torch.cat([x, torch.zeros(14, 3, dtype=torch.float64)], 1)
    for same in (x, x @ rotation, scaled, wide):
        assert relational_cka(same, x, [8, 6]).item() == pytest.approx(0.0, abs=1e-12)


def test_loss_is_between_zero_and_one() -> None:
    for seed in range(20):
        x, y = features([10, 5], 4, 4, seed=seed)
        assert 0.0 <= relational_cka(x, y, [10, 5]).item() <= 1.0


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_image_without_relations_stays_out(who: str) -> None:
    x, y = features([6, 6], 4, 4)
    degenerate = x if who == "student" else y
    degenerate[:6] = degenerate[0].clone()  # every token alike: the centred Gram matrix vanishes
    x.requires_grad_()
    total, count = relational_cka_sum(x, y, [6, 6])
    total.backward()
    assert count.item() == 1
    assert total.item() == pytest.approx(image_loss(x[6:], y[6:]).item(), rel=1e-12)
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert bool((x.grad[:6] == 0).all())


@pytest.mark.parametrize("lengths", [[], [3], [1, 2, 3], [0]])
def test_no_image_gives_zero_and_backward_works(lengths: list[int]) -> None:
    x, y = features(lengths, 4, 6)
    x.requires_grad_()
    loss = relational_cka(x, y, lengths)
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert bool((x.grad == 0).all())


def test_min_tokens_counts_an_image_of_exactly_that_many() -> None:
    x, y = features([4, 5], 4, 4)
    assert relational_cka_sum(x, y, [4, 5], min_tokens=4)[1].item() == 2
    assert relational_cka_sum(x, y, [4, 5], min_tokens=5)[1].item() == 1
    assert relational_cka_sum(x, y, [4, 5], min_tokens=6)[1].item() == 0


def test_parts_with_the_global_normalizer_add_to_the_whole() -> None:
    lengths = [5, 9, 5, 7]
    x, y = features(lengths, 6, 9, seed=4)
    whole = relational_cka(x, y, lengths).item()
    first = relational_cka(x[:14], y[:14], lengths[:2], normalizer=4)
    second = relational_cka(x[14:], y[14:], lengths[2:], normalizer=torch.tensor(4.0))
    assert (first + second).item() == pytest.approx(whole, rel=1e-13)


def test_the_teacher_gets_no_gradient() -> None:
    x, y = features([6], 4, 4)
    x.requires_grad_()
    y.requires_grad_()
    relational_cka(x, y, [6]).backward()
    assert y.grad is None
    assert x.grad is not None


def test_bf16_features_are_computed_in_fp32() -> None:
    x, y = (f.to(torch.bfloat16) for f in features([8], 5, 5))
    loss = relational_cka(x, y, [8])
    assert loss.dtype == torch.float32
    assert loss.item() == relational_cka(x.float(), y.float(), [8]).item()


def test_lengths_that_do_not_add_up_are_refused() -> None:
    x, y = features([6], 4, 4)
    with pytest.raises(ValueError, match="image_lengths add up to 7") as caught:
        relational_cka(x, y, [7])
    assert str(caught.value) == "image_lengths add up to 7, features have 6 (student) and 6 (teacher) rows"
