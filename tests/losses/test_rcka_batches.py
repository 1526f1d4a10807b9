"""relational_cka over images of many lengths: padding, sub-batches, the gradient made in forward, no host read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_rcka import features, image_loss
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from grace_vlm.losses import rcka
from grace_vlm.losses.rcka import DEGENERATE_SQUARED_NORM, relational_cka, relational_cka_sum

BUDGETS_BYTES = (256 * 2**20, 20_000, 1)
"""All images of a bucket at once; a few at a time; each alone."""


def plain_sum(x: torch.Tensor, y: torch.Tensor, lengths: Sequence[int], min_tokens: int = 4) -> torch.Tensor:
    """Sum of 1 - CKA image by image, whose gradient autograd makes."""
    losses = [x[:0].sum()]
    for x_image, y_image in zip(x.split(list(lengths)), y.split(list(lengths)), strict=True):
        if len(x_image) < min_tokens:
            continue
        x_rows, y_rows = F.normalize(x_image, dim=-1), F.normalize(y_image, dim=-1)
        x_rows, y_rows = x_rows - x_rows.mean(0), y_rows - y_rows.mean(0)
        k_s, k_t = x_rows @ x_rows.T, y_rows @ y_rows.T
        squared_s, squared_t = k_s.square().sum(), k_t.square().sum()
        if min(squared_s.item(), squared_t.item()) >= DEGENERATE_SQUARED_NORM:
            losses.append(1 - (k_s * k_t).sum() / (squared_s.sqrt() * squared_t.sqrt()))
    return torch.stack(losses).sum()


def definition_sum(x: torch.Tensor, y: torch.Tensor, lengths: Sequence[int], left_out: set[int]) -> torch.Tensor:
    """Sum of 1 - CKA by H K H written out; which images have no part in it is told, not found."""
    pairs = enumerate(zip(x.split(list(lengths)), y.split(list(lengths)), strict=True))
    return torch.stack([x[:0].sum(), *(image_loss(a, b) for i, (a, b) in pairs if i not in left_out)]).sum()


def value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def relational_sum(x: torch.Tensor, y: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    return relational_cka_sum(x, y, lengths)[0]


def assert_close(ours: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Value and gradient, 1e-12 of the largest."""
    for mine, reference in zip(ours, expected, strict=True):
        assert mine.dtype == reference.dtype == torch.float64
        assert float((mine - reference).abs().max()) <= 1e-12 * float(reference.abs().max())


def random_set(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[int], set[int]]:
    """Features, lengths and which images stay out: too short, or with all tokens alike for one of the models."""
    chance = random.Random(seed)
    lengths = [chance.randint(1, 40) for _ in range(chance.randint(2, 9))]
    lengths.insert(chance.randrange(len(lengths)), chance.choice(lengths))  # one length twice
    x, y = features(lengths, 7, 11, seed=seed)
    starts = [sum(lengths[:image]) for image in range(len(lengths))]
    left_out = {image for image, length in enumerate(lengths) if length < 4}
    degenerate = chance.randrange(len(lengths))
    alike = chance.choice([x, y])[starts[degenerate] : starts[degenerate] + lengths[degenerate]]
    alike.copy_(alike[0].clone().expand_as(alike) * torch.arange(1, len(alike) + 1).unsqueeze(1))
    x = torch.cat([x, x[starts[-1] :]])  # the last image twice
    y = torch.cat([y, y[starts[-1] :]])
    copies = {len(lengths)} if degenerate == len(lengths) - 1 or lengths[-1] < 4 else set()
    return x, y, [*lengths, lengths[-1]], left_out | {degenerate} | copies


@pytest.mark.parametrize("budget_bytes", BUDGETS_BYTES)
@pytest.mark.parametrize("seed", range(8))
def test_random_sets_equal_the_definition(seed: int, budget_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rcka, "SUB_BATCH_BYTES", budget_bytes)
    x, y, lengths, left_out = random_set(seed)
    ours = value_and_gradient(lambda leaf: relational_sum(leaf, y, lengths), x)
    assert_close(ours, value_and_gradient(lambda leaf: definition_sum(leaf, y, lengths, left_out), x))
    assert relational_cka_sum(x, y, lengths)[1].item() == len(lengths) - len(left_out)
    for image, gradient in enumerate(ours[1].split(lengths)):
        assert bool((gradient == 0).all()) == (image in left_out)


@pytest.mark.parametrize("budget_bytes", BUDGETS_BYTES)
def test_every_length_equals_the_definition(budget_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rcka, "SUB_BATCH_BYTES", budget_bytes)
    lengths = list(range(1, 41))
    random.Random(0).shuffle(lengths)
    x, y = features(lengths, 6, 9)
    short = {image for image, length in enumerate(lengths) if length < 4}
    ours = value_and_gradient(lambda leaf: relational_sum(leaf, y, lengths), x)
    assert_close(ours, value_and_gradient(lambda leaf: definition_sum(leaf, y, lengths, short), x))


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-11])
def test_rows_at_the_floor_of_the_norm_are_those_of_normalize(size: float) -> None:
    lengths = [6, 19, 4, 33]
    x, y = features(lengths, 6, 9)
    for row in (0, 8, 24, 26, 61):
        x[row] *= size
        y[row + 1 if row == 8 else row] *= size
    ours = value_and_gradient(lambda leaf: relational_sum(leaf, y, lengths), x)
    expected = value_and_gradient(lambda leaf: plain_sum(leaf, y, lengths), x)
    assert float(expected[1][0].abs().max()) > 1e9  # the row is divided by 1e-12, or by little more
    assert_close(ours, expected)
    large = x.norm(dim=1) > 0.1  # the largest gradient is that of the small rows
    assert_close((ours[0], ours[1][large]), (expected[0], expected[1][large]))


@pytest.mark.parametrize("kind", ["far apart", "alike", "nearly one direction"])
def test_fp32_is_as_accurate_as_the_plain_version(kind: str) -> None:
    """Errors against FP64, summed over sets, in units of autograd's in FP32. A loss is off by a few ulp: by chance."""
    errors: dict[str, list[float]] = {"ours": [0.0, 0.0], "plain": [0.0, 0.0]}
    for seed in range(12):
        lengths = [random.Random(seed * 31 + i).randint(4, 90) for i in range(8)]
        x, y = (torch.cat([f, f.flip(1)], 1).float() for f in features(lengths, 32, 32, seed=seed))
        if kind == "alike":
            y = x + 0.01 * y
        elif kind == "nearly one direction":
            x, y = x + 30 * x[0], y + 30 * y[0]
        exact = value_and_gradient(lambda f, t=y, n=lengths: plain_sum(f, t.double(), n), x.double())
        for name, function in (("ours", relational_sum), ("plain", plain_sum)):
            found = value_and_gradient(lambda f, t=y, n=lengths, run=function: run(f, t, n), x)
            for part in (0, 1):
                assert found[part].dtype == torch.float32
                errors[name][part] += float((found[part].double() - exact[part]).norm() / exact[part].norm())
    assert min(errors["plain"]) > 0
    assert errors["ours"][0] <= 2 * errors["plain"][0]
    assert errors["ours"][1] <= 1.1 * errors["plain"][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_features_are_computed_in_fp32_and_their_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    lengths = [18, 5, 40, 7, 2]
    x, y = (f.to(dtype) for f in features(lengths, 6, 9))
    run = lambda leaf, teacher: 0.3 * relational_sum(leaf, teacher, lengths)  # noqa: E731
    narrow_loss, narrow = value_and_gradient(lambda leaf: run(leaf, y), x)
    wide_loss, wide = value_and_gradient(lambda leaf: run(leaf, y.float()), x.float())
    assert (narrow_loss.dtype, narrow.dtype) == (torch.float32, dtype)
    assert torch.equal(narrow_loss, wide_loss)
    assert torch.equal(narrow, wide.to(dtype))


def test_the_students_dtype_decides_and_strides_do_not_matter() -> None:
    lengths = [9, 17]
    x, y = features(lengths, 6, 8)
    expected = value_and_gradient(lambda leaf: relational_sum(leaf, y.float(), lengths), x.float())
    found = value_and_gradient(lambda leaf: relational_sum(leaf, y.float().double(), lengths), x.float())
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    strided = value_and_gradient(lambda leaf: relational_sum(leaf.T, y.T.contiguous().T, lengths), x.T.contiguous())
    straight = value_and_gradient(lambda leaf: relational_sum(leaf, y, lengths), x)
    assert torch.equal(strided[0], straight[0])
    assert torch.equal(strided[1].T, straight[1])


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_shows_in_the_loss_and_spoils_no_other(who: str, bad: float) -> None:
    lengths = [5, 9, 12, 9]
    x, y = features(lengths, 6, 9)
    keep = torch.tensor([*range(5), *range(14, 35)])
    expected = value_and_gradient(lambda leaf: relational_sum(leaf, y[keep], [5, 12, 9]), x[keep])
    (x if who == "student" else y)[[5, 13], 2] = bad  # next to both neighbours; padded places read the last row
    ours = value_and_gradient(lambda leaf: relational_sum(leaf, y, lengths), x)
    assert bool(torch.isnan(ours[0]))  # which stops a run, and names the term
    assert float((ours[1][keep] - expected[1]).abs().max()) <= 1e-12 * float(expected[1].abs().max())
    assert relational_cka_sum(x, y, lengths)[1].item() == 4


@pytest.mark.parametrize("min_tokens", [0, 1])
def test_images_of_no_or_one_token_have_no_relations(min_tokens: int) -> None:
    lengths = [0, 1, 6, 0, 1, 0]
    x, y = features(lengths, 4, 5)
    x.requires_grad_()
    total, count = relational_cka_sum(x, y, lengths, min_tokens=min_tokens)
    total.backward()
    assert count.item() == 1
    assert total.item() == pytest.approx(image_loss(x[1:7], y[1:7]).item(), rel=1e-12)
    assert x.grad is not None
    assert bool((x.grad[[0, 7]] == 0).all())


def test_backward_scales_what_forward_made_and_leaves_it_as_it_was() -> None:
    x, y = features([7, 20], 5, 6)
    x.requires_grad_()
    loss = relational_cka(x, y, [7, 20])
    once = torch.autograd.grad(loss, x, retain_graph=True)[0]
    half = torch.autograd.grad(loss, x, grad_outputs=torch.tensor(0.5, dtype=torch.float64), retain_graph=True)[0]
    again = torch.autograd.grad(loss, x)[0]
    assert torch.equal(half, 0.5 * once)
    assert torch.equal(again, once)


def test_there_is_no_second_derivative() -> None:
    x, y = features([7], 5, 6)
    x.requires_grad_()
    gradient = torch.autograd.grad(relational_cka(x, y, [7]).square(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Operations(TorchDispatchMode):
    """What torch is asked to do: names, copies between devices, and the bytes that are alive at one time.

    On the ``meta`` device there are no values, so that whatever reads one on the host (``item``, ``bool``, ``nonzero``,
    boolean indexing) fails as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.crossings: list[tuple[str, str]] = []
        self.peak_bytes = 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        given = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        self.count(given, is_new=False)  # what was there before counts nothing
        result = func(*args, **(kwargs or {}))
        made = list(result) if isinstance(result, tuple | list) else [result]
        self.count(made, is_new=True)
        sources = {tensor.device.type for tensor in given if tensor.dim()}
        self.crossings += [(source, made[0].device.type) for source in sources - {made[0].device.type}]
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.storages.values()))
        return result

    def count(self, tensors: list[torch.Tensor], is_new: bool) -> None:
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), is_new * storage.nbytes()))


def operations(lengths: list[int], d_s: int = 4, d_t: int = 6) -> Operations:
    """Of forward and backward; bytes of forward alone."""
    x, y = (f.to(torch.bfloat16) for f in features(lengths, d_s, d_t))
    x.requires_grad_()
    with Operations() as seen:
        loss = relational_cka(x, y, lengths)
        peak_bytes = seen.peak_bytes
        loss.backward()
    seen.peak_bytes = peak_bytes
    return seen


def test_the_number_of_operations_is_that_of_the_buckets() -> None:
    lengths = list(range(5, 35))
    random.Random(1).shuffle(lengths)
    per_bucket = operations([16, 17]).names.count("bmm") // 2
    assert per_bucket == 3
    assert operations(lengths).names.count("bmm") == 3 * per_bucket  # up to 16, 32 and 64 tokens
    assert operations(lengths).names == operations([10, 20, 34]).names
    assert len(operations(lengths).names) < 110 * 3  # views included; one product per length asked for 3,491


def test_nothing_is_read_by_the_host_and_one_table_goes_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, make, send = [], torch.tensor, rcka.upload

    def on_the_host(data: Any, *, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cpu"  # torch.tensor(..., device="cuda") waits for the copy, and is no operation to be seen
        return make(data, dtype=dtype, device=device)

    def recorded(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(host)
        return send(host, device)

    inputs = [f.to("meta") for f in features([12, 3, 30, 7, 30, 18], 4, 6)]
    lengths = torch.tensor([12, 3, 30, 7, 30, 18])
    monkeypatch.setattr(torch, "tensor", on_the_host)
    monkeypatch.setattr(rcka, "upload", recorded)
    inputs[0].requires_grad_()
    with Operations() as seen:
        relational_cka(*inputs, lengths).backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.shape == inputs[0].shape
    assert seen.crossings == [("cpu", "meta")]
    assert [host.shape for host in sent] == [(3, 5)]
    reads = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"}
    assert not reads & {*seen.names, *operations([12, 3, 30, 7]).names}


@pytest.mark.parametrize(("d_s", "d_t"), [(64, 8), (8, 128), (4, 4)])
def test_a_sub_batch_stays_below_its_bytes(d_s: int, d_t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [random.Random(i).randint(33, 64) for i in range(40)]
    budget_bytes = 500_000
    whole = operations(lengths, d_s, d_t)
    monkeypatch.setattr(rcka, "SUB_BATCH_BYTES", budget_bytes)
    parts = operations(lengths, d_s, d_t)
    gradient_bytes = 4 * (sum(lengths) + 1) * d_s
    assert whole.peak_bytes > gradient_bytes + budget_bytes
    assert 0.7 * budget_bytes < parts.peak_bytes - gradient_bytes <= budget_bytes
    monkeypatch.setattr(rcka, "SUB_BATCH_BYTES", 1)
    assert operations(lengths, d_s, d_t).names.count("bmm") == 3 * len(lengths)


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_without_a_gradient_none_is_computed(how: str) -> None:
    x, y = features([9, 20], 5, 6)
    x.requires_grad_(how == "no_grad")
    with torch.set_grad_enabled(how == "detached"), Operations() as seen:
        loss = relational_cka(x, y, [9, 20])
    assert not loss.requires_grad
    assert seen.names.count("bmm") == 2 * 2
    assert "index_copy_" not in seen.names
    assert loss.item() == relational_cka(x.detach().requires_grad_(), y, [9, 20]).item()
