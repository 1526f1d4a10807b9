"""Change a recipe until its estimated peak fits a GPU, least harm first, and say what was changed and why.

The first levers change nothing that is learned: recomputing activations, smaller micro-batches with more of them
(where the loss is normalised over the whole step and the order of the rows does not depend on the size of a
micro-batch), smaller parts of the loss, no CUDA graphs, and of several processes decoder layers that are shared out.
Smaller packs hold other rows together, and about as many a step. The last two levers do change what is learned: a
teacher in FP8 is a slightly different teacher, and moments of one byte are slightly other updates. What a later lever
made needless is taken back. What does not fit after all of them is refused; nothing is tried on the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from grace_vlm.errors import ConfigError
from grace_vlm.train.config import Recipe
from grace_vlm.train.estimate import GIB, Estimate

RESERVED_BYTES = 2 * GIB
"""For the CUDA context, libraries' workspaces, and what the allocator cannot use for fragmentation."""

SMALL_WORKSPACE_MIB = 128
"""Of the loss where memory is short."""


def gpu_bytes(text: str) -> int:
    """``24GB`` -> bytes of such a card; ``ConfigError`` for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,3})\s*(GB|GiB)", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--fit {text!r} is no size of a GPU; expected for example 24GB, 40GB, 48GB or 80GB")
    # A card sold as 24 GB has 24 GiB, give or take what its firmware keeps.
    return int(match[1]) * GIB


def _setups(recipe: Recipe, num_processes: int, may_shard: bool) -> Iterator[tuple[Recipe, list[str]]]:
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
    if recipe.runtime.gradient_checkpointing and recipe.runtime.kept_layers:
        tree["runtime"]["kept_layers"] = 0
        changes.append("runtime.kept_layers=0: activations of all layers are computed twice")
        yield now()
    data, given = tree["data"], recipe.data
    rows = given.micro_batch_size * given.accumulation
    for size in range(given.micro_batch_size - 1, 0, -1) if _same_rows_in_smaller_parts(recipe) else ():
        if rows % size == 0:
            data["micro_batch_size"], data["accumulation"] = size, rows // size
            changes[:] = [change for change in changes if not change.startswith("data.")]
            said = f"data.micro_batch_size={size} data.accumulation={rows // size}"
            changes.append(f"{said}: the same rows a step in smaller parts")
            yield now()
    while data["max_batch_tokens"] is not None and data["max_batch_tokens"] // 2 >= given.max_tokens:
        data["max_batch_tokens"] //= 2
        data["accumulation"] *= 2
        changes[:] = [change for change in changes if not change.startswith("data.")]
        said = f"data.max_batch_tokens={data['max_batch_tokens']} data.accumulation={data['accumulation']}"
        changes.append(f"{said}: smaller packs, about the same rows a step")
        yield now()
    if recipe.loss.implementation == "fused" and recipe.runtime.loss_workspace_mib is None:
        tree["runtime"]["loss_workspace_mib"] = SMALL_WORKSPACE_MIB
        changes.append(f"runtime.loss_workspace_mib={SMALL_WORKSPACE_MIB}: the loss in smaller parts, a little slower")
        yield now()
    if recipe.runtime.cuda_graphs:
        tree["runtime"]["cuda_graphs"] = False
        changes.append("runtime.cuda_graphs=false: layers kernel by kernel, at the pace of the host")
        yield now()
    if num_processes > 1 and may_shard and recipe.runtime.sharding != "parameters":
        tree["runtime"]["sharding"] = "parameters"
        changes.append("runtime.sharding=parameters: decoder layers are shared out, and come and go in every pass")
        if recipe.runtime.gather != "weights":
            tree["runtime"]["gather"] = "weights"
            changes[-1] += " (runtime.gather=weights with it)"
        yield now()
    is_asked = recipe.objective().needs_teacher and recipe.model.teacher_cache is None
    is_whole = is_asked and recipe.model.teacher_sharding == "whole" and not recipe.has_teacher_elsewhere
    if num_processes > 1 and is_whole:
        tree["model"]["teacher_sharding"] = "parameters"
        changes.append("model.teacher_sharding=parameters: the teacher's decoder layers are shared out too")
        yield now()
    if is_asked and recipe.model.teacher_precision == "bf16":
        tree["model"]["teacher_precision"] = "fp8"
        changes.append("model.teacher_precision=fp8: the teacher's linears take one byte a weight, and differ a little")
        yield now()
    if recipe.optim.moments == "fp32":
        tree["optim"]["moments"] = "8bit"
        changes.append("optim.moments=8bit: Adam's moments take one byte each, and updates differ a little")
        yield now()


def _same_rows_in_smaller_parts(recipe: Recipe) -> bool:
    """Whether cutting a step into more micro-batches leaves its rows and its loss as they are."""
    data = recipe.data
    return recipe.loss.normalization == "global" and not data.group_by_length and data.max_batch_tokens is None


def _without_idle(
    recipe: Recipe,
    candidate: Recipe,
    changes: list[str],
    num_bytes: int,
    estimate: Callable[[Recipe], Estimate],
) -> tuple[Recipe, list[str]]:
    """The set-up without the changes that those after them made needless: a teacher in FP8 frees more than all that was
    given up before it, and with two GPUs one side's do nothing for the other. What changes what is learned is taken
    back first."""
    kept = list(changes)
    for change in reversed(changes):
        tree = candidate.model_dump(mode="json")
        for setting in change.split(": ")[0].split(" "):
            section, key = setting.split("=")[0].split(".")
            tree[section][key] = recipe.model_dump(mode="json")[section][key]
        try:
            without = Recipe.model_validate(tree)
        except ConfigError:  # a change that is kept needs this one
            continue
        if estimate(without).largest_bytes + RESERVED_BYTES <= num_bytes:
            candidate = without
            kept.remove(change)
    return candidate, kept


def _way_out(recipe: Recipe) -> str:
    """Of a recipe that fits nowhere."""
    if recipe.objective().needs_teacher and recipe.model.teacher_cache is None:
        return "use a larger GPU, smaller models or a cached teacher (model.teacher_cache, docs/training.md)"
    return "use a larger GPU or smaller models"


def fit(
    recipe: Recipe,
    num_bytes: int,
    estimate: Callable[[Recipe], Estimate],
    num_processes: int = 1,
    may_shard: bool = True,
) -> tuple[Recipe, list[str]]:
    """The first set-up whose estimate fits, and what it changes.

    Args:
        num_bytes: of the card; ``RESERVED_BYTES`` of them are not counted on.
        estimate: of a recipe, on each of ``num_processes``. may_shard: whether ``runtime.sharding`` may be changed;
            not where a launcher has asked for one.

    Raises:
        ConfigError: none fits; it says what the smallest needs and for what.
    """
    smallest: Estimate | None = None
    for candidate, changes in _setups(recipe, num_processes, may_shard):
        smallest = estimate(candidate)
        if smallest.largest_bytes + RESERVED_BYTES <= num_bytes:
            return _without_idle(recipe, candidate, changes, num_bytes, estimate)
    assert smallest is not None
    is_student = smallest.peak_bytes == smallest.largest_bytes
    memory = smallest.memory if is_student else smallest.teacher_memory
    largest = sorted(memory.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    raise ConfigError(
        f"no set-up of this recipe fits {num_bytes / GIB:.0f} GiB: the smallest needs "
        f"{(smallest.largest_bytes + RESERVED_BYTES) / GIB:.1f} GiB ({parts}, ...); {_way_out(recipe)}"
    )
