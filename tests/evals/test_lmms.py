"""What lmms-eval's tasks ask, as our engine takes it. lmms-eval itself runs in tests/interop/test_lmms_eval.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import ConfigError, RequestError
from grace_vlm.evals import lmms

STUDENT = str(Path(__file__).parents[2] / "assets" / "toy-student")


def test_lmms_eval_is_not_needed_here() -> None:
    assert not [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]
    with pytest.raises(AttributeError, match=r"module 'grace_vlm\.evals\.lmms' has no attribute 'Model'"):
        _ = lmms.Model


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        # As lmms-eval fills in what a task leaves out: its stop text is no task's.
        ({"until": ["\n\n"], "do_sample": False}, SamplingParams(128)),
        ({"until": None}, SamplingParams(128)),
        (
            {"max_new_tokens": 16, "temperature": 0.0, "top_p": 0, "num_beams": 1, "do_sample": False},
            SamplingParams(16),
        ),
        ({"until": ["ASSISTANT:", "", "\n\n"]}, SamplingParams(128, stop=("ASSISTANT:",))),
        ({"until": "."}, SamplingParams(128, stop=(".",))),
        ({"image_aspect_ratio": "original"}, SamplingParams(128)),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, SamplingParams(128)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3}, SamplingParams(128, 0.7, 5, 0.9, seed=3)),
        ({"do_sample": True}, SamplingParams(128, 1.0)),
        ({"do_sample": True, "temperature": 0}, SamplingParams(128)),
        ({"repetition_penalty": 1.2}, SamplingParams(128, repetition_penalty=1.2)),
    ],
)
def test_generation_kwargs(kwargs: dict[str, Any], expected: SamplingParams) -> None:
    assert lmms.sampling_of(kwargs) == expected


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        ({"num_beams": 4}, "num_beams is 4; expected 1: the engine searches no beams"),
        (
            {"visual_cot": True},
            "generation_kwargs has visual_cot; grace_vlm knows max_new_tokens, temperature, do_sample, until, "
            "num_beams, top_p, top_k, seed, repetition_penalty: use --gen_kwargs",
        ),
        ({"max_new_tokens": "many"}, "max_tokens is 'many'; expected a whole number"),
    ],
)
def test_kwargs_that_cannot_be_had(kwargs: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError) as raised:
        lmms.sampling_of(kwargs)
    assert str(raised.value) == line


def test_messages() -> None:
    picture = Image.new("RGB", (8, 8))
    content = [
        {"type": "text", "text": "First "},
        {"type": "image", "url": picture},
        {"type": "image", "url": "cat.png"},
        {"type": "text", "text": " <image>?"},
    ]
    parts = lmms.parts_of([{"role": "user", "content": content}]).parts
    assert parts == ("First ", picture, Path("cat.png"), " <image>?")
    assert lmms.parts_of([{"role": "user", "content": "What?"}]).parts == ("What?",)


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], "the task's messages are those of nobody; expected one user's"),
        (
            [{"role": role, "content": "x"} for role in ("system", "user")],
            "the task's messages are those of system, user; expected one user's",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}],
            "the task asks about video; expected texts and images",
        ),
    ],
)
def test_messages_that_cannot_be_asked(messages: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(RequestError) as raised:
        lmms.parts_of(messages)
    assert str(raised.value) == line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"pretrained": "x", "beams": 2}, "--model_args has beams, which grace_vlm does not know; leave it out"),
        ({}, "--model_args has no pretrained; expected pretrained=DIR, a model folder or a hub id"),
        ({"pretrained": "x", "batch_size": "auto"}, "--batch_size is auto; expected a number, for example 64"),
        ({"pretrained": "x", "batch_size": 0}, "--batch_size is 0; expected a number, for example 64"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        lmms.Answering(**arguments)
    assert str(raised.value) == line


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError) as raised:
        lmms.Answering(pretrained=STUDENT)
    assert str(raised.value) == "4 processes were started; start one, or share the work by grace eval --part 1/4"


def test_what_it_does_not_do() -> None:
    model = lmms.Answering(pretrained=STUDENT, batch_size="2", device="cpu")
    with pytest.raises(RequestError, match="grace_vlm writes answers and ranks no given ones"):
        model.loglikelihood([])
    with pytest.raises(RequestError, match="grace_vlm answers one turn"):
        model.generate_until_multi_round([])
