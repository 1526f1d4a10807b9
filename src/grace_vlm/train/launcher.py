"""What ``accelerate launch`` asks for in the environment, as what this package does about it.

FSDP version 2 is ``runtime.sharding=parameters``; DeepSpeed's ZeRO stages 1, 2 and 3 are ``optimizer``, ``gradients``
and ``parameters``. Neither library's wrapper is used, nor is DeepSpeed imported (``accelerate launch`` itself wants it
installed): the sharding is ours (``shards.py``), with masters, scales and moments in FP32 under all of them. What a
launcher asks for beyond that and is not there, offloading or FSDP version 1, is refused by name.

Names are those of accelerate 1.15 (``accelerate/utils/launch.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from grace_vlm.errors import ConfigError
from grace_vlm.train.config import Recipe, Sharding

STAGES: Mapping[int, Sharding] = {0: "optimizer", 1: "optimizer", 2: "gradients", 3: "parameters"}
"""DeepSpeed's ZeRO stage -> ours; 0 shares out nothing there, and masters and moments always are here."""
_ASKS = "ACCELERATE_USE_"
_PLUGINS = tuple(f"{_ASKS}{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"))

_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@dataclass(frozen=True)
class Asked:
    """``sharding``, and by ``whom``, in words."""

    sharding: Sharding
    whom: str


def _is(environment: Mapping[str, str], name: str, default: str = "false") -> bool:
    return environment.get(name, default).lower() == "true"


def asked_for(environment: Mapping[str, str]) -> Asked | None:
    """What the launcher's environment asks for; None: nothing but processes.

    Raises:
        ConfigError: for what is not there.
    """
    if _is(environment, f"{_ASKS}MEGATRON_LM"):
        raise ConfigError(
            "the launcher asks for Megatron-LM; expected DDP, FSDP version 2 or DeepSpeed ZeRO (recipes/cluster)"
        )
    if _is(environment, f"{_ASKS}PARALLELISM_CONFIG"):
        raise ConfigError(
            "the launcher asks for a parallelism configuration (tensor, context or sequence parallelism); expected "
            "DDP, FSDP version 2 or DeepSpeed ZeRO (recipes/cluster)"
        )
    if _is(environment, f"{_ASKS}FSDP"):
        return _fsdp(environment)
    if _is(environment, f"{_ASKS}DEEPSPEED"):
        return _deepspeed(environment)
    return None


def _fsdp(environment: Mapping[str, str]) -> Asked:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"the launcher asks for FSDP version {version}, which is not there; set fsdp_version: 2 in its file "
            "(recipes/cluster/fsdp2.yaml)"
        )
    if _is(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "the launcher asks for fsdp_activation_checkpointing, which the recipe says here; leave it out and set "
            "runtime.gradient_checkpointing=true"
        )
    for name, refused in (("FSDP_OFFLOAD_PARAMS", "true"), ("FSDP_RESHARD_AFTER_FORWARD", "false")):
        if environment.get(name, "").lower() == refused:
            raise ConfigError(
                f"the launcher asks for {name.lower()}: {refused}, which is not there: weights stay on their GPU and "
                "are freed after a layer's forward; leave it out (recipes/cluster/fsdp2.yaml)"
            )
    return Asked("parameters", "FSDP version 2")


def _deepspeed(environment: Mapping[str, str]) -> Asked:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if file == "none" else _stage_of(Path(file))
    if stage not in map(str, STAGES):
        raise ConfigError(f"the launcher asks for DeepSpeed ZeRO stage {stage!r}; expected 0, 1, 2 or 3")
    for part in ("OPTIMIZER", "PARAM"):
        where = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
        if where != "none":
            raise ConfigError(
                f"the launcher asks DeepSpeed to offload to {where}, which is not there; "
                f"set offload_{part.lower()}_device: none (recipes/cluster/zero2.yaml)"
            )
    return Asked(STAGES[int(stage)], f"DeepSpeed ZeRO stage {stage}")


def _stage_of(path: Path) -> str:
    """The stage that DeepSpeed's own file names. Precision, batch and optimizer in it are the recipe's to say here."""
    try:
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        stage = str(zero["stage"])
        offloads = [key for key, value in zero.items() if key.startswith("offload") and value.get("device") != "none"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the launcher names DeepSpeed's file {path}, which has no zero_optimization.stage; "
            "give accelerate's own keys instead (recipes/cluster/zero2.yaml)"
        ) from error
    if offloads:
        raise ConfigError(f"{path} asks for {offloads[0]}, which is not there: nothing is offloaded; leave it out")
    return stage


def resolved(chosen: Sharding | None, asked: Asked | None) -> Sharding:
    """The sharding of a run, by ``runtime.sharding`` and the launcher; ``ConfigError`` if they contradict."""
    if asked is None:
        return chosen or "optimizer"
    if chosen is not None and chosen != asked.sharding:
        raise ConfigError(
            f"the launcher asks for {asked.whom}, which is runtime.sharding={asked.sharding}, and the recipe has "
            f"runtime.sharding={chosen}; leave one of them out"
        )
    return asked.sharding


def as_asked(recipe: Recipe, asked: Asked | None) -> Recipe:
    """The recipe with the sharding that a run under this launcher would have; ``ConfigError`` as it would say."""
    if asked is None:
        return recipe
    sharding = resolved(recipe.runtime.sharding, asked)
    recipe.check_sharding(sharding)
    runtime = recipe.runtime.model_copy(update={"sharding": sharding})
    return recipe.model_copy(update={"runtime": runtime})


def plain_accelerator(is_cpu: bool) -> Accelerator:
    """Accelerate's processes and devices without its plug-ins, which would wrap, or import DeepSpeed to do so.

    Its default for FSDP, "efficient loading", goes too: Transformers reads it, and leaves tensors of all but the first
    process of a machine for a wrapper to fill.
    """
    if _EFFICIENT_LOADING in os.environ:
        os.environ[_EFFICIENT_LOADING] = "false"
    hidden = {name: os.environ.pop(name) for name in _PLUGINS if name in os.environ}
    try:
        return Accelerator(cpu=is_cpu)
    finally:
        os.environ.update(hidden)
