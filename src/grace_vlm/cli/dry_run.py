"""What ``grace train --dry-run`` and ``--fit`` print: plan, tokens, memory, work and hours, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_vlm.cli.output import emit_json, print_table, say

if TYPE_CHECKING:
    from grace_vlm.train.config import Recipe
    from grace_vlm.train.estimate import Estimate, Load, Teacher


class Described:
    """The models of a recipe on the meta device, described once for any number of estimates."""

    def __init__(
        self,
        recipe: Recipe,
        row_tokens: int | None,
        visual_tokens: int | None,
        supervised_share: float | None,
        num_processes: int = 1,
    ) -> None:
        from grace_vlm.train.open import check_relational_layer, check_trained_tower, describe_student, plan_for

        self.num_processes = num_processes
        self.student = describe_student(recipe)
        check_relational_layer(recipe, self.student[0])
        check_trained_tower(recipe, self.student[0])
        self.load = load_of(recipe, self.student[0].config, row_tokens, visual_tokens, supervised_share)
        self.teacher = teacher_of(recipe)
        self.plan = plan_for(recipe, self.student)

    def estimate(self, recipe: Recipe) -> Estimate:
        from grace_vlm.train.estimate import estimate

        return estimate(recipe, self.plan, self.student, self.teacher, self.load, self.num_processes)


def teacher_of(recipe: Recipe) -> Teacher:
    """The teacher on the meta device; of a cached one the head, as the cache has it or as the cache will have it."""
    from grace_vlm.train.cache_identity import FILE, read_info
    from grace_vlm.train.estimate import TeacherHead
    from grace_vlm.train.open import describe

    name, cache = recipe.model.teacher, recipe.model.teacher_cache
    if not recipe.objective().needs_teacher:
        return None
    if cache is not None and (name is None or (Path(cache) / FILE).is_file()):
        return TeacherHead(*read_info(Path(cache)).head)
    described = describe(str(name))
    if cache is None:
        return described
    text = described[0].config.text_config
    return TeacherHead(text.vocab_size, text.hidden_size)


def fitted(recipe: Recipe, described: Described, size: str, may_shard: bool) -> Recipe:
    """The recipe changed to fit a GPU; what was changed is said. ``may_shard``: as ``fit`` has it."""
    from grace_vlm.train.estimate import GIB
    from grace_vlm.train.fit import RESERVED_BYTES, fit, gpu_bytes

    chosen, changes = fit(recipe, gpu_bytes(size), described.estimate, described.num_processes, may_shard)
    peak_gib = described.estimate(chosen).largest_bytes / GIB
    say(f"fits {size}: {peak_gib:.1f} GiB of tensors and {RESERVED_BYTES / GIB:.0f} GiB reserved")
    for change in changes or ["the recipe as it is"]:
        say(f"  {change}")
    return chosen


def print_dry_run(recipe: Recipe, described: Described, gpu: str, as_json: bool) -> None:
    """The whole report."""
    from grace_vlm.cli.plan import plan_facts, print_facts, print_plan
    from grace_vlm.train.estimate import GIB

    found = described.estimate(recipe)
    facts = plan_facts(recipe.model.student, *described.student, described.plan)
    if as_json:
        said = {"plan": facts, "load": vars(described.load), "num_processes": described.num_processes}
        emit_json({**said, **found.to_json(gpu), "rows": _count_rows(recipe)})
        return
    print_plan(described.plan)
    print_facts(facts)
    print()
    rows = [(part, f"{size / GIB:.2f}") for part, size in found.memory.items()]
    count = described.num_processes
    of_each = f"memory of each of {count} GPUs" if count > 1 else "memory"
    print_table((of_each, "GiB"), [*rows, ("peak", f"{found.peak_bytes / GIB:.2f}")])
    print()
    if found.teacher_memory:
        theirs = [(part, f"{size / GIB:.2f}") for part, size in found.teacher_memory.items()]
        print_table((f"memory of {recipe.teacher_device}", "GiB"), theirs)
        print()
    work = [(part, f"{flop / 1e12:.1f}") for part, flop in found.flop_by_part.items()]
    print_table(("work of a step", "TFLOP"), [*work, ("total", f"{found.flop / 1e12:.1f}")])
    load = described.load
    print(
        f"\nassumed rows: {load.row_tokens} tokens, {load.visual_tokens} of them visual, "
        f"{load.supervised_share:.0%} supervised (--row-tokens, --visual-tokens, --supervised-share)"
    )
    print(f"a step: {found.num_rows} rows, {found.tokens:,} tokens on one process")
    print(
        f"the run: {found.num_steps:,} steps of about {found.step_seconds(gpu):.1f} s, "
        f"{found.hours(gpu):,.1f} hours on {'two' if found.teacher_memory else 'one' if count == 1 else count} {gpu}"
        f"{'' if count == 1 else ', without what they exchange'}"
    )
    num_rows = _count_rows(recipe)
    if num_rows is None:
        print(f"data: {recipe.data.train} is not there yet")
    elif num_rows == 0:
        print(f"data: {recipe.data.train} holds no rows")
    else:
        needed = count * found.num_rows * found.num_steps
        share = needed / num_rows
        print(f"data: {num_rows:,} rows in {recipe.data.train}; the run takes {needed:,}, {share:.2f} epochs")


def _count_rows(recipe: Recipe) -> int | None:
    from grace_vlm.data.rows import scan_elements

    path = recipe.data.rows_path
    return sum(1 for _ in scan_elements(path)) if path.is_file() else None


def load_of(
    recipe: Recipe, config: Any, row_tokens: int | None, visual_tokens: int | None, supervised_share: float | None
) -> Load:
    """What rows are assumed to be: as given, else for the model and the recipe; ``ConfigError`` if impossible."""
    from grace_vlm.errors import ConfigError
    from grace_vlm.train.estimate import SUPERVISED_TOKENS, TEXT_TOKENS, Load, visual_tokens_of

    visual = visual_tokens_of(recipe, config) if visual_tokens is None else visual_tokens
    row = visual + TEXT_TOKENS if row_tokens is None else row_tokens
    share = min(1.0, SUPERVISED_TOKENS / max(row, 1)) if supervised_share is None else supervised_share
    if not 0 <= visual <= row or row < 1 or not 0 < share <= 1:
        raise ConfigError(
            f"rows of {row} tokens, {visual} visual, share {share:.4g} supervised cannot be; "
            "expected 0 <= --visual-tokens <= --row-tokens and 0 < --supervised-share <= 1"
        )
    return Load(row, visual, share)


def check_gpu(gpu: str) -> str:
    """``gpu`` itself if its rate is known."""
    from grace_vlm.errors import ConfigError
    from grace_vlm.train.estimate import GPUS

    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu!r} is unknown; expected one of {', '.join(GPUS)}")
    return gpu
