"""FP32 masters behind BF16-valued leaves, and the grid between them.

The model's parameters ("leaves") hold what the forward uses: bf16(q s) of a quantized linear, bf16(w) of everything
else that is trained. They are written **once per optimizer step**, from the masters; micro-batches share them. So

    materialize:  leaf <- grid value of (master, log_scale), or bf16(master)
    backward:     G = sum over micro-batches of dL/dleaf, in FP32
    collect:      (dL/dmaster, dL/dlog_scale) <- one straight-through backward of G (quant/lsq.py)

Why an FP32 accumulator: a BF16 sum over 16 micro-batches loses a term that is 2^-8 of the sum, and the published
accumulation is 16. Each leaf's gradient is added as soon as autograd has it and freed, so no BF16 copy stays. The
accumulator is then the master's gradient itself: a copy would be 7 GB for Qwen3-VL-2B.
FP64 models (tests) accumulate in FP64. On a CPU leaves are FP32 tensors that hold BF16 values.

Of several processes each has its share of the rows of every master, scale and moment (``Ranks.share_of``; a group lies
in one row, so grids do not notice). The model and its gradient sums are whole: sums are added up into the shares, and
leaves are gathered from them; of the decoder's layers they may be shared out too (``shards.py``). What has no rows to
share out, a norm or a bias, every process has.

A frozen weight with a grid (the vision tower under ``quant.tower``) is rounded to nearest once, at the start: it is
what is stored, and the student learns around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grace_vlm.quant.affine import bake, compute_dtype, quantize_tensor
from grace_vlm.quant.lsq import ClipMask, ScaleGradient
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.quant.scale_init import ScaleRule, init_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme
from grace_vlm.train.config import Gather, Sharding
from grace_vlm.train.gather_codes import gather_codes_
from grace_vlm.train.grids import Grids, GridWeight
from grace_vlm.train.ranks import Going, Ranks
from grace_vlm.train.shards import LayerShards, Matrix, cut_loose
from grace_vlm.train.sums import GradientSum, LeafSums


def _rows(of: torch.Tensor, share: slice | None) -> torch.Tensor:
    """A view; of all rows where they are not shared out."""
    return of if share is None else of[share]


def _start(
    name: str,
    weight: torch.Tensor,
    scheme: QuantScheme,
    scale_init: ScaleRule | Mapping[str, torch.Tensor],
    share: slice | None,
) -> torch.Tensor:
    """(out, groups) scales that ``weight``, or a share of its rows, begins with."""
    if isinstance(scale_init, str):
        return init_scale(weight, scheme, scale_init)
    return _rows(scale_init[name.removesuffix(".weight")], share).to(weight)


def _may_be_negative(scale_init: ScaleRule | Mapping[str, torch.Tensor]) -> bool:
    """The same in every process: of given scales each has all."""
    if isinstance(scale_init, str):
        return scale_init == "mse_signed"
    return any(bool((scale < 0).any()) for scale in scale_init.values())


@dataclass
class _Tracked:
    """One trained parameter: its leaf, its master, the sum of its gradients, and whether it has a grid."""

    leaf: nn.Parameter
    master: nn.Parameter
    gradient: GradientSum
    on_grid: bool
    share: slice | None
    """Rows of the leaf that the master is of; None: all."""
    own: torch.Tensor
    """Those rows of the leaf, where they stay."""
    is_scattered: bool
    """Whether the gradient sum is of those rows only, and over processes (``shards.py``)."""
    is_freed: bool
    """Whether the leaf comes and goes; ``own`` is then memory of its own."""

    @property
    def summed(self) -> torch.Tensor:
        """dL/dleaf of the master's rows, over micro-batches and, once they are added up, processes."""
        total = self.gradient.settled()
        return total if self.share is None or self.is_scattered else total[self.share]


class Masters:
    """Masters of every trained parameter of a model.

    Args:
        model: its parameters with ``requires_grad`` are trained; their values are the masters' start.
        plan: which linears have a grid. scale_init: where their scales start, or the scales themselves, (out, groups)
            by name. ranks: the processes that share them; None: this one alone.
        sharding: what else they share of ``layers``, which then run over ``shards``.
        gather: what of the leaves on a grid goes between processes.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: QuantPlan,
        *,
        scale_init: ScaleRule | Mapping[str, torch.Tensor] = "mse",
        clip_mask: ClipMask = "official",
        scale_gradient: ScaleGradient = "none",
        ranks: Ranks | None = None,
        sharding: Sharding = "optimizer",
        layers: Sequence[nn.Module] = (),
        gather: Gather = "weights",
    ) -> None:
        self.gather = gather
        self.clip_mask, self.scale_gradient = clip_mask, scale_gradient
        self._device = next(model.parameters()).device
        self.ranks = Ranks(self._device) if ranks is None else ranks
        self._tracked: dict[str, _Tracked] = {}
        self._rounded: dict[str, QuantizedTensor] = {}
        schemes = {f"{name}.weight": scheme for name, scheme in plan.schemes.items()}
        weights: dict[tuple[QuantScheme, bool], list[GridWeight]] = {}
        number_of = {leaf: number for number, layer in enumerate(layers) for leaf in layer.parameters()}
        matrices: list[list[Matrix]] = [[] for _ in layers]
        for name, leaf in model.named_parameters():
            if not leaf.requires_grad:
                if name in schemes:
                    self._round(name, leaf, schemes[name], scale_init)
                continue
            share = self.ranks.share_of(leaf)
            number = number_of.get(leaf) if share is not None and sharding != "optimizer" else None
            is_freed = number is not None and sharding == "parameters"
            own = cut_loose(leaf, share) if is_freed and share is not None else _rows(leaf.detach(), share)
            master = nn.Parameter(own.to(compute_dtype(leaf), copy=True))
            whole = torch.zeros_like(master if number is not None else leaf, dtype=master.dtype, requires_grad=False)
            gradient = GradientSum(whole)
            tracked = _Tracked(leaf, master, gradient, name in schemes, share, own, number is not None, is_freed)
            if name in schemes:
                start = _start(name, master.detach(), schemes[name], scale_init, share)
                of_rows = whole if tracked.is_scattered else _rows(whole, share)
                weight = GridWeight(name, own, master.detach(), of_rows, start)
                weights.setdefault((schemes[name], share is not None), []).append(weight)
            self._tracked[name] = tracked
            if number is not None and share is not None:
                matrices[number].append(Matrix(leaf, share, own if is_freed else None, gradient))
            else:
                leaf.register_post_accumulate_grad_hook(self._add_to(gradient))
        self.shards = LayerShards(matrices, self.ranks) if any(matrices) else None
        self._coming: Going | None = None
        is_signed = _may_be_negative(scale_init)
        self._grids = [(Grids(scheme, members, is_signed), shared) for (scheme, shared), members in weights.items()]
        self.materialize()

    @torch.no_grad()
    def _round(
        self, name: str, leaf: nn.Parameter, scheme: QuantScheme, scale_init: ScaleRule | Mapping[str, torch.Tensor]
    ) -> None:
        weight = leaf.to(compute_dtype(leaf))
        rounded = quantize_tensor(weight, _start(name, weight, scheme, scale_init, None), scheme)
        self._rounded[name.removesuffix(".weight")] = rounded
        leaf.copy_(bake(rounded))

    @staticmethod
    def _add_to(total: GradientSum) -> Any:
        def hook(leaf: torch.Tensor) -> None:
            if leaf.grad is None:  # an untied head, whose gradient the loss has added itself
                return
            total.add(leaf.grad)
            leaf.grad = None

        return hook

    def masters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, tracked.master) for name, tracked in self._tracked.items())

    def log_scales(self) -> Iterator[tuple[str, nn.Parameter]]:
        """In the order of the model's parameters."""
        found = {name: scale for grids, _ in self._grids for name, scale in grids.log_scales.items()}
        yield from ((name, found[name]) for name in self._tracked if name in found)

    def scale_state(self) -> dict[str, torch.Tensor]:
        """Copies of what a checkpoint holds of scales: ``log_scales()``, and beside each that may be negative its sign,
        ``<name>#sign`` (out, groups) int8. (They are views of one buffer, which a file of tensors cannot hold.)"""
        signs = {name: sign for grids, _ in self._grids for name, sign in grids.signs.items()}
        state = {name: scale.detach().clone() for name, scale in self.log_scales()}
        return state | {f"{name}#sign": sign.to(torch.int8) for name, sign in signs.items()}

    @torch.no_grad()
    def materialize(self, count_flips: bool = False) -> torch.Tensor:
        """Write every leaf from its master; gradient sums start again. Other processes' rows are on their way until
        ``settle``.

        Returns:
            how many codes changed since the last call, an int64 scalar on the device; 0 if they are not counted. The
            old codes are read off the leaf, which holds bf16(q s): keeping them would cost a byte a weight.
        """
        self.settle()
        for tracked in self._tracked.values():
            tracked.gradient.clear()
            tracked.master.grad = None
        self._write_plain([tracked for tracked in self._tracked.values() if not tracked.on_grid])
        flipped = torch.zeros(2, dtype=torch.int64, device=self._device)
        for grids, shared in self._grids:
            found = grids.write_leaves(count_flips)
            if found is not None:
                flipped[int(shared)] += found
        as_codes = self.gather == "codes" and self.ranks.count > 1
        for grids, shared in self._grids if as_codes else ():
            if shared:
                gather_codes_(grids, lambda name: self._tracked[name].leaf.detach(), self.ranks)
        if count_flips:  # before the gather, which every later sum would wait for
            self.ranks.sum_(flipped[1])
        self._start_gather([t for t in self._tracked.values() if not (t.is_freed or (as_codes and t.on_grid))])
        return flipped.sum()

    @staticmethod
    def _write_plain(tracked: Sequence[_Tracked]) -> None:
        """Leaves without a grid from their masters, in BF16, a few launches for all of them."""
        # A BF16 leaf rounds as it is copied to: rounded masters beside the leaves would be the peak of a step. FP64
        # models (tests) keep the master's value: they check gradients, not rounding.
        direct = [(t.own, t.master.detach()) for t in tracked if t.own.dtype != torch.float32]
        if direct:
            torch._foreach_copy_([own for own, _ in direct], [master for _, master in direct])
        for one in tracked:
            if one.own.dtype == torch.float32:
                one.own.copy_(one.master.detach().to(torch.bfloat16))

    def _start_gather(self, tracked: Sequence[_Tracked]) -> None:
        """Begin to write every process's rows into these leaves: the next step's teacher computes beside it."""
        if shared := [t.leaf.detach() for t in tracked if t.share is not None]:
            self._coming = self.ranks.start_gather_shares(shared)

    def settle(self) -> None:
        """Wait for the leaves that ``materialize`` wrote: before anyone reads them."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients up over processes, and turn them into ``.grad`` of masters and log-scales, until
        ``materialize``."""
        if self.shards is not None:
            self.shards.finish()
        self.ranks.sum_together_([t.gradient.settled() for t in self._tracked.values() if t.share is None])
        whole = [
            (t.gradient.settled(), t.share)
            for t in self._tracked.values()
            if t.share is not None and not t.is_scattered
        ]
        if whole:
            self.ranks.sum_shares_(*zip(*whole, strict=True))
        for tracked in self._tracked.values():
            tracked.master.grad = tracked.summed
        for grids, _ in self._grids:
            grids.backward(self.clip_mask, self.scale_gradient)

    def accumulator(self, leaf: torch.Tensor) -> torch.Tensor | None:
        """The FP32 gradient sum of a leaf, for others to add to without autograd; None if the leaf is not trained."""
        for tracked in self._tracked.values():
            if tracked.leaf is leaf:
                tracked.gradient.is_shared = True
                tracked.gradient.clear()
                return tracked.gradient.total
        return None

    def leaf_of(self, name: str) -> tuple[torch.Size, slice | None]:
        """(shape of a leaf, this process's rows of it; None: all), by the name of its master."""
        return self._tracked[name].leaf.shape, self._tracked[name].share

    def sums_of(self, module: nn.Module) -> LeafSums:
        """The gradient sums of a module's trained parameters."""
        wanted = set(module.parameters())
        return LeafSums({t.leaf: t.gradient for t in self._tracked.values() if t.leaf in wanted})

    def accumulators(self) -> list[torch.Tensor]:
        """The gradient sums, leaf by leaf (before ``collect``)."""
        return [tracked.gradient.settled() for tracked in self._tracked.values()]

    @property
    def num_codes(self) -> int:
        """Trained weights on a grid."""
        return sum(tracked.leaf.numel() for tracked in self._tracked.values() if tracked.on_grid)

    def shared_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of all gradients of masters and log-scales, whether every log-scale is a number), over all processes:
        an FP32 and a bool scalar on the device."""
        scales = {name: scale.grad for name, scale in self.log_scales()}
        found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for name, tracked in self._tracked.items():
            grads = [tracked.master.grad, scales.get(name)]
            found[tracked.share is not None] += [grad for grad in grads if grad is not None]
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for grids, _ in self._grids:
            finite = finite & grids.are_finite()
        if self.ranks.count == 1:
            return nn.utils.get_total_norm(found[False]), finite
        shared, everywhere = (nn.utils.get_total_norm(found[key]).double().square() for key in (True, False))
        sums = self.ranks.sum_(torch.stack([shared, (~finite).double()]).to(self._device))
        return (sums[0] + everywhere).sqrt(), sums[1] == 0

    @torch.no_grad()
    def scale_drift(self) -> torch.Tensor:
        """Mean |log s - log s_0| over all groups: how far the scales have moved since the start; 0 without a grid. A
        scalar on the device."""
        if not self._grids:
            return torch.zeros((), device=self._device)
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self._device)  # (shared or not, (sum, groups))
        for grids, shared in self._grids:
            sums[int(shared)] += grids.drift()
        self.ranks.sum_(sums[1])
        total, groups = sums.sum(dim=0)
        return total / groups

    @torch.no_grad()
    def quantized(self) -> dict[str, QuantizedTensor]:
        """(codes, scale) by module name: what is saved, computed with the scale that is stored.

        Of several processes the first has them whole, on the host; the others, which give their rows, only those that
        are not shared out.
        """
        found = {**self._rounded}
        for grids, shared in self._grids:
            for name, tensor in grids.quantized().items():
                if shared:
                    codes, scale = self._whole(name, tensor.codes), self._whole(name, tensor.scale)
                    if codes is None or scale is None:
                        continue
                    tensor = dataclasses.replace(tensor, codes=codes, scale=scale)
                found[name.removesuffix(".weight")] = tensor
        return found

    @torch.no_grad()
    def freed_leaves(self) -> dict[str, torch.Tensor]:
        """The leaves that come and go and have no grid, by name, whole, as ``quantized`` has its own."""
        freed = ((name, tracked) for name, tracked in self._tracked.items() if tracked.is_freed and not tracked.on_grid)
        wholes = ((name, self._whole(name, tracked.own)) for name, tracked in freed)
        return {name: whole for name, whole in wholes if whole is not None}

    def _whole(self, name: str, own: torch.Tensor) -> torch.Tensor | None:
        """All rows, of what this process has the share of leaf ``name`` of, one at a time on the device; None but on
        the first process."""
        leaf, share = self._tracked[name].leaf, self._tracked[name].share
        assert share is not None
        whole = own.new_empty(leaf.shape[0], *own.shape[1:])
        whole[share] = own
        self.ranks.gather_shares_(whole)
        return whole.cpu() if self.ranks.is_first else None

    @torch.no_grad()
    def load_state_dict(self, masters: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]) -> None:
        """Restore what ``masters()`` and ``scale_state()`` gave, and write the leaves.

        The start of the scale drift is not state: it follows from the student, which a resumed run opens again.
        """
        for name, master in self.masters():
            master.copy_(masters[name])
        for name, log_scale in self.log_scales():
            log_scale.copy_(scales[name])
        for grids, _ in self._grids:
            for name, sign in grids.signs.items():
                sign.copy_(scales[f"{name}#sign"])
        self.materialize()
