"""What of a run's memory each of several processes has, by ``runtime.sharding`` and ``model.teacher_sharding``.

Of N processes each has 1/N of masters, moments and scales (what is whole besides, norms and biases, is a thousandth);
under ``gradients`` and ``parameters`` of the gradient sums of the decoder's layers too, under ``parameters`` of their
weights. What then comes and goes is a part of its own, ``exchange``: weights of two layers, and of one layer the
gradients as autograd made them and as they are added up (``shards.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grace_vlm.train.config import Recipe


@dataclass(frozen=True)
class DecoderLayers:
    """``elements`` of the weights of ``count`` layers, so many bytes each."""

    elements: int
    count: int
    element_bytes: int = 2

    @property
    def num_bytes(self) -> int:
        return self.elements * self.element_bytes


def on_each(
    parts: Mapping[str, int], recipe: Recipe, num_processes: int, student: DecoderLayers, teacher: DecoderLayers | None
) -> dict[str, int]:
    """Bytes by part on each of ``num_processes``, of ``parts`` on one.

    Args:
        teacher: of an online teacher on the student's GPU; None for every other.
    """
    shared = dict(parts)
    for part in ("masters", "moments", "scales"):
        shared[part] //= num_processes
    elsewhere = 1 - 1 / num_processes
    exchange = 0
    sharding = recipe.runtime.sharding or "optimizer"
    if sharding != "optimizer":
        shared["gradients"] -= int(4 * student.elements * elsewhere)
        exchange += 6 * student.elements // student.count
    if sharding == "parameters":
        shared["student weights"] -= int(student.num_bytes * elsewhere)
        exchange += 2 * student.num_bytes // student.count
    if teacher is not None and recipe.model.teacher_sharding == "parameters":
        shared["teacher weights"] -= int(teacher.num_bytes * elsewhere)
        # Before the student's micro-batches: its layers and theirs are never here at once.
        exchange = max(exchange, 2 * teacher.num_bytes // teacher.count)
    return {**shared, "exchange": exchange} if exchange else shared
