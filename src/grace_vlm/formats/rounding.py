"""Does a layout hold the scales of a checkpoint exactly, and if not, what is the nearest that it does hold?

Codes are never touched. ``Converter.stored_scale`` says what reading gives back of a scale; where that is another
value, writing needs the user's consent (``--allow-rounding``), and the checkpoint is rounded first, so that what is
written is proved against exactly what was consented to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import Converter, ModelContent
from grace_vlm.formats.folder import scale_dtype
from grace_vlm.formats.lazy import Lazy
from grace_vlm.quant.affine import bake
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme


@dataclass(frozen=True)
class Exactness:
    """What a layout does to the scales of a checkpoint.

    Args:
        num_scales, num_changed: scales, and those that the layout cannot hold.
        scale_error: largest |stored - s| / |s|.
        weight_error: largest |bf16(q stored) - bf16(q s)|.
        tensor: the linear that has the largest scale error; empty if all are exact.
    """

    num_scales: int = 0
    num_changed: int = 0
    scale_error: float = 0.0
    weight_error: float = 0.0
    tensor: str = ""

    @property
    def exact(self) -> bool:
        return self.num_changed == 0

    def __str__(self) -> str:
        if self.exact:
            return f"exact: all {self.num_scales:,} scales are kept"
        return (
            f"not exact: {self.num_changed:,} of {self.num_scales:,} scales are rounded, by "
            f"{100 * self.scale_error:.3g} % at most ({self.tensor}); "
            f"no weight changes by more than {self.weight_error:.3g}"
        )

    def including(self, name: str, before: QuantizedTensor, after: QuantizedTensor) -> Exactness:
        """This record with one more linear, as it is and as the layout stores it."""
        scale, stored = before.scale.float(), after.scale.float()
        total = self.num_scales + scale.numel()
        changed = int((scale != stored).sum())
        if changed == 0:
            return replace(self, num_scales=total)
        error = float(((stored - scale) / scale).abs().max())
        weight_error = float((bake(after).float() - bake(before).float()).abs().max())
        return Exactness(
            num_scales=total,
            num_changed=self.num_changed + changed,
            scale_error=max(error, self.scale_error),
            weight_error=max(weight_error, self.weight_error),
            tensor=name if error > self.scale_error else self.tensor,
        )


def as_stored(name: str, tensor: QuantizedTensor, converter: Converter) -> QuantizedTensor:
    """A linear with the scales that ``converter`` stores; ``FormatError`` if one becomes zero or infinite."""
    scheme = tensor.scheme
    stored = converter.stored_scale(tensor.scale, scheme)
    if torch.equal(stored, tensor.scale.float()):
        return tensor
    if not bool((torch.isfinite(stored) & (stored != 0)).all()):
        dtype = str(converter.scale_dtype).removeprefix("torch.")
        raise FormatError(
            f"{name} has scales of {float(tensor.scale.abs().min()):.3g} to {float(tensor.scale.abs().max()):.3g}; "
            f"{converter.name} stores them in {dtype}, which cannot hold them"
        )
    return _in(_scheme_of(scheme, converter), tensor.codes, stored)


def _scheme_of(scheme: QuantScheme, converter: Converter) -> QuantScheme:
    """``scheme`` with the rounding that scales have after ``converter`` rounded them."""
    return replace(scheme, scale_rounding="bf16" if converter.scale_dtype == torch.bfloat16 else "fp32")


def _in(scheme: QuantScheme, codes: torch.Tensor, scale: torch.Tensor) -> QuantizedTensor:
    return QuantizedTensor(codes, scale.to(scale_dtype(scheme)), scheme)


def rounded(content: ModelContent, converter: Converter) -> ModelContent:
    """``content`` with every scale as ``converter`` stores it, and weights baked from those."""
    linears = {
        name: replace(entry, scheme=_scheme_of(entry.scheme, converter))
        for name, entry in content.linears.items()
        if entry.scheme
    }

    def load(name: str) -> QuantizedTensor:
        tensor, scheme = as_stored(name, content.quantized[name], converter), linears[name].scheme
        assert scheme is not None
        return _in(scheme, tensor.codes, tensor.scale)

    return replace(content, linears=linears, quantized=Lazy(linears, load), baked={})


def keeps_fp32_scales(converter: Converter) -> bool:
    """Whether a layout gives FP32 scales back as they were, asked of some that need every bit."""
    scales = torch.linspace(0.01, 0.02, 128).unsqueeze(0)
    return torch.equal(converter.stored_scale(scales, QuantScheme(4, 1, "fp32")), scales)
