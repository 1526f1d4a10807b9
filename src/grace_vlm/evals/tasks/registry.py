"""The tasks by name."""

from __future__ import annotations

from collections.abc import Mapping

from grace_vlm.errors import ConfigError
from grace_vlm.evals.tasks.ai2d import MASKED, UNMASKED
from grace_vlm.evals.tasks.gqa import GQA
from grace_vlm.evals.tasks.hallusion import HallusionBench
from grace_vlm.evals.tasks.mmbench import MMBench
from grace_vlm.evals.tasks.mme import MME
from grace_vlm.evals.tasks.mmmu import MMMU
from grace_vlm.evals.tasks.mmstar import MMStar
from grace_vlm.evals.tasks.pope import POPE
from grace_vlm.evals.tasks.scienceqa import ScienceQA
from grace_vlm.evals.tasks.seed import SEEDBench
from grace_vlm.evals.tasks.task import Task
from grace_vlm.evals.tasks.vqa import TEXTVQA, VIZWIZ, VQAV2

_ALL: tuple[Task, ...] = (
    *(HallusionBench(), MMBench(), ScienceQA(), MASKED, UNMASKED, MMMU(), SEEDBench(), MMStar()),
    *(POPE(), GQA(), VQAV2, TEXTVQA, VIZWIZ, MME()),
)
TASKS: Mapping[str, Task] = {task.about.name: task for task in _ALL}
"""Those of the card's table first, in its order; then those of LLaVA-1.5."""


def task_named(name: str) -> Task:
    """
    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]
