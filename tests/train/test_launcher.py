"""What a launcher asks for in the environment, as a sharding of ours; what is not there is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grace_vlm.errors import ConfigError
from grace_vlm.train.launcher import Asked, asked_for, plain_accelerator, resolved

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "sharding"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}, None),
        (FSDP2, "parameters"),
        ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"}, "parameters"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "optimizer"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "optimizer"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "gradients"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "parameters"),
        (DEEPSPEED, "gradients"),  # accelerate's own default
    ],
)
def test_what_is_asked_for(environment: dict[str, str], sharding: str | None) -> None:
    asked = asked_for(environment)
    assert (None if asked is None else asked.sharding) == sharding


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM; expected DDP, FSDP version 2 or DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP version 1, which is not there; set fsdp_version: 2"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "asks for fsdp_offload_params: true, which is not there"),
        ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "asks for fsdp_reshard_after_forward: false, which is not"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set runtime.gradient_checkpointing=true"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism configuration"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "ZeRO stage '4'; expected 0, 1, 2 or 3"),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            "DeepSpeed to offload to cpu, which is not there",
        ),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, "which has no zero_optimization.stage"),
    ],
)
def test_what_is_not_there_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asked_for(environment)


def test_deepspeeds_own_file_is_read_for_its_stage(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    asked = asked_for({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert asked == Asked("optimizer", "DeepSpeed ZeRO stage 1")
    file.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "fp16": {}}')
    assert asked_for({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) is not None
    file.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    with pytest.raises(ConfigError, match="asks for offload_optimizer, which is not there: nothing is offloaded"):
        asked_for({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


def test_a_recipe_that_contradicts_the_launcher_is_refused() -> None:
    asked = Asked("parameters", "FSDP version 2")
    assert resolved(None, None) == "optimizer"
    assert resolved("gradients", None) == "gradients"
    assert resolved(None, asked) == resolved("parameters", asked) == "parameters"
    with pytest.raises(
        ConfigError,
        match=r"asks for FSDP version 2, which is runtime\.sharding=parameters, and the recipe has "
        r"runtime\.sharding=optimizer; leave one of them out",
    ):
        resolved("optimizer", asked)


def test_accelerates_plug_ins_stay_out_and_transformers_loads_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**FSDP2, **DEEPSPEED, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(name, value)
    accelerator = plain_accelerator(is_cpu=True)  # DeepSpeed is not installed here
    assert accelerator.num_processes == 1
    assert accelerator.distributed_type == "NO"
    assert {name: os.environ[name] for name in (*FSDP2, *DEEPSPEED)} == {**FSDP2, **DEEPSPEED}
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
