"""A thousand mixed requests: under ``batch_invariant`` each is to the last bit as it is alone, and nothing is left."""

from __future__ import annotations

import copy
import random
import resource
from pathlib import Path

import pytest
import torch
from worlds import DEVICE, asked, loaded_toy, pictures

from grace_vlm.engine.engine import Engine, EngineOptions, Event
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.request import Prompt
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import RequestError

NUM_REQUESTS, CACHE_TOKENS = 1_000, 2_048
MOST_GROWTH = 24 << 20
"""Of memory over the second half of the requests."""


def params_of(number: int, rng: random.Random) -> SamplingParams:
    """Greedy, drawn, with penalties, with log-probabilities; from one token to twenty."""
    tokens = rng.choice([1, 3, 8, 20])
    return rng.choice(
        [
            SamplingParams(max_tokens=tokens, logprobs=1),
            SamplingParams(max_tokens=tokens, ignore_eos=True),
            SamplingParams(max_tokens=tokens, temperature=0.9, top_p=0.9, seed=number, logprobs=2),
            SamplingParams(max_tokens=tokens, temperature=1.2, top_k=30, min_p=0.01, seed=number),
            SamplingParams(max_tokens=tokens, repetition_penalty=1.2, presence_penalty=0.3),
        ]
    )


def memory() -> int:
    """Bytes that are held: on a GPU now, else the most that the process ever had."""
    if DEVICE.type == "cuda":
        return int(torch.cuda.memory_allocated())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_alone(engine: Engine, name: str, prompt: Prompt, params: SamplingParams) -> list[Event]:
    engine.add(name, prompt, params)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


@pytest.mark.soak
def test_a_thousand_mixed_requests(tmp_path: Path) -> None:
    loaded = loaded_toy("tiny")
    options = EngineOptions(cache_tokens=CACHE_TOKENS, max_running=9, batch_invariant=True, picture_bytes=1 << 20)
    llm, other = (LLM(copy.deepcopy(loaded), options=options) for _ in range(2))
    crowd, alone = llm.engine, other.engine
    rng, found, made = random.Random(0), {}, {}
    held = []
    for number, (text, images) in enumerate(asked(pictures(tmp_path, 40), NUM_REQUESTS)):
        name, text = f"q{number}", " ".join([text] * rng.choice([1, 1, 6]))
        made[name] = (text, images, params_of(number, rng))
        crowd.add(name, llm.prompt(text, images), made[name][2])
        while len(crowd.scheduler.waiting) > 20:
            for event in crowd.step():
                found.setdefault(event.request_id, []).append(event)
        if rng.random() < 0.15:
            crowd.cancel(f"q{rng.randrange(max(0, number - 25), number + 1)}")
        if number in (NUM_REQUESTS // 2, NUM_REQUESTS - 1):
            held.append(memory())
    while crowd.has_work:
        for event in crowd.step():
            found.setdefault(event.request_id, []).append(event)
    assert crowd.pages.num_free == crowd.pages.num_pages
    assert not crowd.scheduler.running
    assert not crowd.scheduler.waiting
    assert held[1] - held[0] < MOST_GROWTH
    ended = {name: events for name, events in found.items() if events[-1].finish}
    assert NUM_REQUESTS * 0.75 < len(ended) < NUM_REQUESTS * 0.95, "some are cancelled, most are not"
    assert sum(len(made[name][1]) > 0 for name in ended) > NUM_REQUESTS // 2
    for name, events in ended.items():
        text, images, params = made[name]
        assert run_alone(alone, name, other.prompt(text, images), params) == events, name
    assert alone.pages.num_free == alone.pages.num_pages


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    llm = LLM(loaded_toy("tiny"), options=EngineOptions(cache_tokens=64, max_running=2))
    with pytest.raises(RequestError, match=r"64") as caught:
        llm.engine.add("big", llm.prompt("yes"), SamplingParams(max_tokens=500))
    assert "request big" in str(caught.value)
    assert not llm.engine.has_work
