"""Masters behind leaves: once a step equals once a forward; what the leaves hold; what comes back."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from grace_vlm.models.adapter import linear_shapes
from grace_vlm.models.qwen3_vl import Qwen3VLAdapter
from grace_vlm.models.toy import build_toy_model, build_toy_processor
from grace_vlm.quant.affine import bake, quantize_tensor
from grace_vlm.quant.lsq import LsqFakeQuantize
from grace_vlm.quant.plan import QuantPlan, make_plan
from grace_vlm.quant.scale_init import init_scale
from grace_vlm.quant.scheme import QuantScheme
from grace_vlm.train.masters import Masters, _start


class Net(nn.Module):
    """Two quantized linears, one that is not, a norm and a frozen input layer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem, self.first = nn.Linear(16, 32), nn.Linear(32, 48, bias=False)
        self.norm, self.second, self.out = nn.LayerNorm(48), nn.Linear(48, 32), nn.Linear(32, 5)
        self.to(dtype)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
        self.stem.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.second(self.norm(torch.tanh(self.first(self.stem(x)))))))


def net_plan(net: Net, scheme: str = "w4g16") -> QuantPlan:
    return make_plan(linear_shapes(net), "first|second", scheme)


def micro_batches(dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 16, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 5)
        for n in (7, 1, 12, 4)
    ]


class OnGrid(nn.Module):
    """The per-forward form, as a parametrization of a weight."""

    def __init__(self, log_scale: torch.Tensor, options: tuple[Any, ...]) -> None:
        super().__init__()
        self.log_scale, self.options = nn.Parameter(log_scale.clone()), options

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return LsqFakeQuantize.apply(weight, self.log_scale, *self.options)


def test_scales_that_are_given_go_to_the_rows_that_a_process_has() -> None:
    scheme, weight = QuantScheme(4, 16), torch.randn(8, 64)
    given = {"one": torch.rand(8, 4).bfloat16()}
    start = _start("one.weight", weight[2:5], scheme, given, slice(2, 5))
    assert start.dtype == torch.float32
    assert torch.equal(start, given["one"][2:5].float())
    assert torch.equal(_start("one.weight", weight, scheme, given, None), given["one"].float())


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("clip_mask", ["official", "lsq", "pass_through"])
@pytest.mark.parametrize("scale_gradient", ["none", "lsq"])
def test_once_per_step_equals_once_per_forward(bits: int, clip_mask: Any, scale_gradient: Any) -> None:
    once, every = Net(), Net()
    plan = net_plan(once, f"w{bits}g16")
    masters = Masters(once, plan, clip_mask=clip_mask, scale_gradient=scale_gradient)
    log_scales = dict(masters.log_scales())
    for name, scheme in plan.schemes.items():
        grid = OnGrid(log_scales[f"{name}.weight"].detach(), (scheme, clip_mask, scale_gradient))
        parametrize.register_parametrization(every.get_submodule(name), "weight", grid)
    for x, y in micro_batches():
        ours, theirs = (F.cross_entropy(net(x), y, reduction="sum") / 24 for net in (once, every))
        assert ours.item() == theirs.item()
        ours.backward()
        theirs.backward()
    masters.collect()
    reference = {
        name.replace("parametrizations.", "").replace(".original", ""): p for name, p in every.named_parameters()
    }
    compared = 0
    for name, master in masters.masters():
        expected = reference[name].grad
        assert master.grad is not None
        assert expected is not None
        assert float((master.grad - expected).abs().max()) <= 1e-12 * float(expected.abs().max()), name
        compared += 1
    for name, log_scale in masters.log_scales():
        expected = reference[f"{name}.0.log_scale"].grad
        assert log_scale.grad is not None
        assert expected is not None
        assert float((log_scale.grad - expected).abs().max()) <= 1e-12 * float(expected.abs().max()), name
        compared += 1
    assert compared == 7 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_keep_the_sign_that_they_start_with(dtype: torch.dtype) -> None:
    """A net of -w whose scales are negated is the mirror image: same gradients of log |s|, leaves of the other sign."""
    net, mirror = Net(dtype), Net(dtype)
    plan = net_plan(net)
    start = {
        name: init_scale(net.get_submodule(name).weight.detach(), scheme, "mse_signed")
        for name, scheme in plan.schemes.items()
    }
    assert any(bool((scale < 0).any()) for scale in start.values())
    with torch.no_grad():
        for name in start:
            mirror.get_submodule(name).weight.neg_()
    masters = Masters(net, plan, scale_init="mse_signed")
    others = Masters(mirror, plan, scale_init={name: -scale for name, scale in start.items()})
    for step in range(3):
        for one, other in zip(masters.accumulators(), others.accumulators(), strict=True):
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
            other.copy_(one if one.shape != (48, 32) and one.shape != (32, 48) else -one)
        masters.collect()
        others.collect()
        for (name, scale), (_, twin) in zip(masters.log_scales(), others.log_scales(), strict=True):
            assert scale.grad is not None
            assert twin.grad is not None
            assert torch.equal(scale.grad, twin.grad), name
            with torch.no_grad():
                scale -= 0.05 * scale.grad.sign()
                twin -= 0.05 * twin.grad.sign()
        masters.materialize(count_flips=True)
        others.materialize(count_flips=True)
        for name, tensor in masters.quantized().items():
            weight, twin = net.get_submodule(name).weight, mirror.get_submodule(name).weight
            assert torch.equal(tensor.scale.sign(), start[name].sign().to(tensor.scale))
            assert torch.equal(weight, -twin)
            assert torch.equal(weight.to(torch.bfloat16), bake(tensor))
    assert torch.equal(masters.scale_drift(), others.scale_drift())
    assert 0.05 <= float(masters.scale_drift()) <= 0.1500001  # three steps of 0.05, there and back or on
    state = masters.scale_state()
    assert {name for name in state if "#" in name} == {f"{name}.weight#sign" for name in start}
    again = Masters(Net(dtype), plan, scale_init={name: scale.abs() * -1 for name, scale in start.items()})
    again.load_state_dict({name: p.detach() for name, p in masters.masters()}, state)
    for name, tensor in masters.quantized().items():
        assert torch.equal(tensor.scale, again.quantized()[name].scale)
        assert torch.equal(tensor.codes, again.quantized()[name].codes)


def test_accumulators_start_again_and_leaves_keep_no_gradient() -> None:
    net = Net()
    masters = Masters(net, net_plan(net))
    x, y = micro_batches()[0]
    grads = []
    for _ in range(2):
        F.cross_entropy(net(x), y).backward()
        assert all(p.grad is None for p in net.parameters())
        masters.collect()
        grads.append({name: p.grad.clone() for name, p in masters.masters() if p.grad is not None})
        masters.materialize()
        assert all(bool((a == 0).all()) for a in masters.accumulators())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_accumulation_of_bf16_leaves_is_in_fp32() -> None:
    """16 micro-batches of 2^-8 of the sum each: a BF16 sum would lose them."""
    leaf = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    masters = Masters(leaf, QuantPlan(()))
    for x in [256.0] + [1.0] * 16:
        leaf(torch.tensor([[x]], dtype=torch.bfloat16)).sum().backward()
    masters.collect()
    ((_, master),) = masters.masters()
    assert master.dtype == torch.float32
    assert master.grad is not None
    assert master.grad.item() == 272.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaves_hold_the_grid_and_bf16_values(dtype: torch.dtype) -> None:
    net = Net(dtype)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    masters = Masters(net, net_plan(net), scale_init="minmax")
    log_scales = dict(masters.log_scales())
    for name, leaf in net.named_parameters():
        if name.startswith("stem"):
            assert torch.equal(leaf, before[name]), "a frozen parameter was touched"
        elif f"{name}" in log_scales:
            scale = log_scales[name].detach().exp().bfloat16().float().unsqueeze(-1)
            groups = before[name].float().reshape(leaf.shape[0], -1, 16)
            value = ((groups / scale).round().clamp(-8, 7) * scale).bfloat16().reshape(leaf.shape)
            assert torch.equal(leaf, value.to(dtype)), name
        else:
            assert torch.equal(leaf, before[name].bfloat16().to(dtype)), name
    for name, master in masters.masters():
        assert master.dtype == torch.float32
        assert torch.equal(master, before[name].float()), name
    assert set(log_scales) == {"first.weight", "second.weight"}


def test_a_scale_that_starts_as_stored_is_stored_as_it_started() -> None:
    """log and exp in FP32 must not move a BF16 scale to its neighbour."""
    generator = torch.Generator().manual_seed(5)
    net = nn.Linear(1024, 256, bias=False)
    net.weight.data = torch.randn(256, 1024, generator=generator) * torch.logspace(-3, 3, 256).unsqueeze(1)
    masters = Masters(net, QuantPlan(make_plan({"": (256, 1024)}, "", "w4g16").entries), scale_init="minmax")
    assert dict(masters.log_scales()) == {}  # the module itself has no name: nothing is planned for it
    box = nn.ModuleDict({"only": net})
    masters = Masters(box, make_plan(linear_shapes(box), "only", "w4g16"), scale_init="minmax")
    start = net.weight.detach().reshape(256, 64, 16)
    ((_, log_scale),) = masters.log_scales()
    ((_, master),) = masters.masters()
    expected = (master.detach().reshape(256, 64, 16).abs().amax(-1) / 7).clamp(2.0**-14, 2.0**15).bfloat16()
    assert start.shape == (256, 64, 16)
    assert torch.equal(masters.quantized()["only"].scale, expected)
    assert torch.equal(log_scale.detach().exp().bfloat16(), expected)


def test_quantized_is_what_the_leaves_hold() -> None:
    net = Net(torch.float32)
    masters = Masters(net, net_plan(net))
    quantized = masters.quantized()
    assert set(quantized) == {"first", "second"}
    for name, tensor in quantized.items():
        leaf = net.get_submodule(name).weight
        groups = tensor.codes.float().reshape(leaf.shape[0], -1, 16)
        value = (groups * tensor.scale.float().unsqueeze(-1)).reshape(leaf.shape).bfloat16().float()
        assert torch.equal(value, leaf), name
        assert tensor.scheme == QuantScheme(4, 16)


def test_a_weight_without_a_gradient_in_a_step_has_none_of_the_step_before() -> None:
    net = Net()
    masters = Masters(net, net_plan(net))
    x, _ = micro_batches()[0]
    net(x).sum().backward()
    masters.collect()
    assert float(dict(masters.masters())["out.weight"].grad.abs().max()) > 0
    masters.materialize()
    torch.tanh(net.first(net.stem(x))).sum().backward()  # only ``first`` has a part in it
    masters.collect()
    grads = {name: master.grad for name, master in masters.masters()}
    assert float(grads["first.weight"].abs().max()) > 0
    assert all(bool((grads[name] == 0).all()) for name in ("out.weight", "second.weight", "norm.weight"))


def test_others_can_add_to_a_leafs_sum() -> None:
    """As the fused loss does with the head: before and after what autograd brings."""
    net = Net()
    masters = Masters(net, net_plan(net))
    total = masters.accumulator(net.out.weight)
    assert total is not None
    assert masters.accumulator(net.stem.weight) is None  # frozen
    x, _ = micro_batches()[0]
    for _ in range(2):
        total.add_(1.0)
        net(x).sum().backward()
        total.add_(1.0)
        (expected,) = torch.autograd.grad(net(x).sum(), net.out.weight)
        masters.collect()
        grad = dict(masters.masters())["out.weight"].grad
        assert grad is not None
        assert torch.allclose(grad, expected + 2.0)
        masters.materialize()


def test_flips_are_counted_from_the_leaves() -> None:
    net = Net(torch.float32)
    masters = Masters(net, net_plan(net))
    before = {name: tensor.codes for name, tensor in masters.quantized().items()}
    assert masters.num_codes == sum(codes.numel() for codes in before.values())
    assert masters.materialize(count_flips=True) == 0
    with torch.no_grad():
        for number, (_, parameter) in enumerate((*masters.masters(), *masters.log_scales())):
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    after = {name: tensor.codes for name, tensor in masters.quantized().items()}
    flips = sum(int((after[name] != codes).sum()) for name, codes in before.items())
    assert flips > 20
    assert masters.materialize(count_flips=True) == flips
    assert masters.materialize(count_flips=True) == 0
    assert masters.materialize() == 0


def test_an_update_reaches_the_leaves_only_when_they_are_written() -> None:
    net = Net(torch.float32)
    masters = Masters(net, net_plan(net))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert masters.scale_drift() == 0.0
    with torch.no_grad():
        for _, parameter in (*masters.masters(), *masters.log_scales()):
            parameter.add_(0.25)
    assert masters.scale_drift() == pytest.approx(0.25, rel=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    masters.materialize()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("stem")}


def test_state_goes_round() -> None:
    net, other = Net(torch.float32), Net(torch.float32)
    masters = Masters(net, net_plan(net))
    with torch.no_grad():
        for _, parameter in (*masters.masters(), *masters.log_scales()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    masters.materialize()
    fresh = Masters(other, net_plan(other))
    assert not torch.equal(other.first.weight, net.first.weight)
    fresh.load_state_dict(
        {name: p.detach().clone() for name, p in masters.masters()},
        {name: p.detach().clone() for name, p in masters.log_scales()},
    )
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    for ours, theirs in ((masters.masters(), fresh.masters()), (masters.log_scales(), fresh.log_scales())):
        assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in zip(ours, theirs, strict=True))
    assert fresh.scale_drift() == masters.scale_drift()


def test_a_frozen_linear_on_the_plan_is_rounded_once_and_stays() -> None:
    net = Net(torch.float32)
    net.stem.weight.requires_grad_(False)
    before = net.stem.weight.detach().clone()
    masters = Masters(net, make_plan(linear_shapes(net), "stem|first", "w4g16"))
    rounded = masters.quantized()["stem"]
    expected = quantize_tensor(before, init_scale(before, rounded.scheme, "mse"), rounded.scheme)
    assert torch.equal(rounded.codes, expected.codes)
    assert torch.equal(rounded.scale, expected.scale)
    assert torch.equal(net.stem.weight, bake(expected).float())
    assert not torch.equal(net.stem.weight, before)
    assert "stem.weight" not in dict(masters.masters())
    assert set(masters.quantized()) == {"stem", "first"}
    baked = net.stem.weight.clone()
    masters.materialize()
    assert torch.equal(net.stem.weight, baked)


def test_without_a_grid_there_are_no_scales_and_no_drift() -> None:
    net = Net(torch.float32)
    masters = Masters(net, QuantPlan(()))
    assert list(masters.log_scales()) == []
    assert masters.scale_drift() == 0.0
    assert masters.quantized() == {}


def test_a_tied_head_is_one_master_with_both_gradients() -> None:
    processor = build_toy_processor(["yes", "no"], vocab_size=300)
    model = build_toy_model("tiny", processor)
    model.model.visual.requires_grad_(False)
    expected = build_toy_model("tiny", processor)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.bfloat16())
    plan = make_plan(linear_shapes(model), Qwen3VLAdapter.parts["language"], "bf16")
    masters = Masters(model, plan)
    names = [name for name, _ in masters.masters()]
    assert "model.language_model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)
    assert len({id(p) for _, p in masters.masters()}) == len(names)
    ids = torch.arange(12).reshape(2, 6)
    for one in (model, expected):
        one(input_ids=ids, labels=ids).loss.backward()
    masters.collect()
    for name, master in masters.masters():
        reference = expected.get_parameter(name).grad
        assert master.grad is not None
        assert reference is not None
        assert torch.allclose(master.grad, reference, rtol=1e-4, atol=1e-6), name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_masters_and_their_model_are_freed() -> None:
    """A comparison trains many models in one process; none may stay behind."""
    net = Net(torch.float32)
    masters = Masters(net, net_plan(net))
    F.cross_entropy(net(torch.zeros(2, 16)), torch.tensor([0, 1])).backward()
    masters.collect()
    watched = [weakref.ref(net), weakref.ref(masters), weakref.ref(net.first.weight)]
    del net, masters
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
