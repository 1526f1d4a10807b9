"""Which codes a grid uses: how often each, how many bits that carries, and how many stand at its ends.

    bits used  =  - sum over codes of (share log2 share)          at most the scheme's bits

A grid whose scale is too large uses few codes around zero; one too small has many at its ends, where weights are
clipped. Counts are integers and add up to the number of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from grace_vlm.quant.scheme import QuantizedTensor


def histogram(tensor: QuantizedTensor) -> list[int]:
    """How often each code stands in a weight, from qmin to qmax: 2^bits counts."""
    scheme = tensor.scheme
    places = tensor.codes.flatten().to(torch.int64) - scheme.qmin
    return torch.bincount(places, minlength=1 << scheme.num_bits).tolist()


def bits_used(counts: list[int]) -> float:
    """Entropy of the codes in bits a weight; 0 of nothing."""
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return abs(-sum(share * math.log2(share) for share in shares))


def share_at_ends(counts: list[int]) -> float:
    """Share of weights with the least or the largest code."""
    total = sum(counts)
    return (counts[0] + counts[-1]) / total if total else 0.0


def code_use(quantized: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
    """By scheme, all linears together, and each linear; a tensor at a time is in memory."""
    linears: dict[str, dict[str, Any]] = {}
    schemes: dict[str, list[int]] = {}
    for name in quantized:
        tensor = quantized[name]
        counts = histogram(tensor)
        linears[name] = {"scheme": tensor.scheme.name, **_said(counts)}
        total = schemes.setdefault(tensor.scheme.name, [0] * len(counts))
        schemes[tensor.scheme.name] = [a + b for a, b in zip(total, counts, strict=True)]
    together = {
        name: {"first_code": -(len(counts) // 2), "counts": counts, **_said(counts)} for name, counts in schemes.items()
    }
    return {"schemes": together, "linears": linears}


def _said(counts: list[int]) -> dict[str, Any]:
    return {"num_codes": sum(counts), "bits_used": bits_used(counts), "share_at_ends": share_at_ends(counts)}
