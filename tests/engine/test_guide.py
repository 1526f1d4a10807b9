"""Answers of a schema: a random model at a high temperature says nothing else."""

from __future__ import annotations

import json
import sys

import pytest
from worlds import loaded_toy

from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import ConfigError, RequestError

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "blue", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "is_round": {"type": "boolean"},
    },
    "required": ["color", "count", "is_round"],
    "additionalProperties": False,
}


def test_every_answer_is_a_document_of_the_schema() -> None:
    """Beside others that have none, greedy and drawn, with a stop list and penalties."""
    llm = LLM(loaded_toy("tiny"), options=EngineOptions(max_running=5))
    guided = [
        SamplingParams(200, temperature, seed=seed, json_schema=SCHEMA, repetition_penalty=penalty)
        for seed, (temperature, penalty) in enumerate([(0.0, 1.0), (2.0, 1.0), (2.0, 1.0), (5.0, 1.3), (2.0, 1.0)])
    ]
    free = SamplingParams(max_tokens=12, ignore_eos=True)
    sampling = [one for pair in zip(guided, [free] * 5, strict=True) for one in pair]
    answers = llm.generate(["yes"] * 10, sampling=sampling)
    documents = [json.loads(answer.text) for answer in answers[::2]]
    for document, answer in zip(documents, answers[::2], strict=True):
        assert answer.finish == "stop"
        assert set(document) == {"color", "count", "is_round"}
        assert document["color"] in ("red", "blue", "green")
        assert 0 <= document["count"] <= 20
        assert isinstance(document["is_round"], bool)
    assert len({json.dumps(document) for document in documents}) > 1
    assert all(answer == answers[1] for answer in answers[3::2])


def test_a_length_cuts_a_document() -> None:
    answer = LLM(loaded_toy("tiny")).generate("yes", sampling=SamplingParams(max_tokens=3, json_schema=SCHEMA))[0]
    assert answer.finish == "length"
    assert answer.text.lstrip().startswith("{")


def test_what_is_no_schema_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(loaded_toy("tiny"))
    with pytest.raises(RequestError, match="json_schema cannot be followed: "):
        llm.generate("yes", sampling=SamplingParams(json_schema="{"))
    with pytest.raises(RequestError, match="json_schema cannot be followed: "):
        llm.generate("yes", sampling=SamplingParams(json_schema={"type": "colour"}))
    with pytest.raises(RequestError, match="json_schema is 3; expected a JSON schema, as text or as an object"):
        SamplingParams(json_schema=3)  # type: ignore[arg-type]
    assert not llm.engine.has_work
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError) as caught:
        llm.generate("yes", sampling=SamplingParams(json_schema=SCHEMA))
    assert str(caught.value) == "json_schema needs llguidance; pip install llguidance"
