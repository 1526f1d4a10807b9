"""Change a recipe until its estimated peak fits a GPU, least harm first, and say what was changed and why.

The first levers change nothing that is learned: recomputing activations, and smaller micro-batches with more of them
(the loss is normalised over the whole step). The last one does: a teacher in FP8 is a slightly different teacher.
What does not fit after all of them is refused; nothing is tried on the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from grace_vlm.errors import ConfigError
from grace_vlm.train.config import Recipe
from grace_vlm.train.estimate import GIB, Estimate

RESERVED_BYTES = 2 * GIB
"""For the CUDA context, libraries' workspaces, and what the allocator cannot use for fragmentation."""


def gpu_bytes(text: str) -> int:
    """``24GB`` -> bytes of such a card; ``ConfigError`` for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,3})\s*(GB|GiB)", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--fit {text!r} is no size of a GPU; expected for example 24GB, 40GB, 48GB or 80GB")
    # A card sold as 24 GB has 24 GiB, give or take what its firmware keeps.
    return int(match[1]) * GIB


def _setups(recipe: Recipe) -> Iterator[tuple[Recipe, list[str]]]:
    """Set-ups from the recipe's own on, each with what it changes."""
    tree = recipe.model_dump(mode="json")
    changes: list[str] = []

    def now() -> tuple[Recipe, list[str]]:
        return Recipe.model_validate(tree), list(changes)

    yield now()
    if not recipe.runtime.gradient_checkpointing:
        tree["runtime"]["gradient_checkpointing"] = True
        changes.append("runtime.gradient_checkpointing=true: activations are computed twice instead of kept")
        yield now()
    data = tree["data"]
    while data["micro_batch_size"] % 2 == 0 and data["max_batch_tokens"] is None:
        data["micro_batch_size"] //= 2
        data["accumulation"] *= 2
        size = f"data.micro_batch_size={data['micro_batch_size']} data.accumulation={data['accumulation']}"
        changes[:] = [change for change in changes if not change.startswith("data.micro_batch_size")]
        changes.append(f"{size}: the same rows a step in smaller parts")
        yield now()
    if recipe.objective().needs_teacher and recipe.model.teacher_precision == "bf16":
        tree["model"]["teacher_precision"] = "fp8"
        changes.append("model.teacher_precision=fp8: the teacher's linears take one byte a weight, and differ a little")
        yield now()


def fit(recipe: Recipe, num_bytes: int, estimate: Callable[[Recipe], Estimate]) -> tuple[Recipe, list[str]]:
    """The first set-up whose estimate fits, and what it changes.

    Args:
        num_bytes: of the card; ``RESERVED_BYTES`` of them are not counted on.
        estimate: of a recipe.

    Raises:
        ConfigError: none fits; it says what the smallest needs and for what.
    """
    smallest: Estimate | None = None
    for candidate, changes in _setups(recipe):
        smallest = estimate(candidate)
        if smallest.peak_bytes + RESERVED_BYTES <= num_bytes:
            return candidate, changes
    assert smallest is not None
    largest = sorted(smallest.memory.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    raise ConfigError(
        f"no set-up of this recipe fits {num_bytes / GIB:.0f} GiB: the smallest needs "
        f"{(smallest.peak_bytes + RESERVED_BYTES) / GIB:.1f} GiB ({parts}, ...); use a larger GPU or smaller models"
    )
