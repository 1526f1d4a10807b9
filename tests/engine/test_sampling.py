"""The choice of a token against the rules written down one by one, and what a request may ask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_vlm.engine.sampling import Chooser, SamplingParams, choose
from grace_vlm.errors import RequestError

parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 100),
)


def by_hand(logits: list[float], chooser: Chooser, u: float) -> set[int]:
    """The tokens that u may choose (two where it lies on a border), token by token in Python."""
    params, changed = chooser.params, list(logits)
    for token in range(len(changed)):
        count = chooser.answer.count(token)
        if count or token in chooser.prompt:
            r = params.repetition_penalty
            changed[token] = changed[token] / r if changed[token] > 0 else changed[token] * r
        changed[token] -= params.frequency_penalty * count + (params.presence_penalty if count else 0.0)
    top = max(changed)
    weights = [math.exp((z - top) / params.temperature) for z in changed]
    probabilities = [weight / sum(weights) for weight in weights]
    kept, before = [], 0.0
    for rank, token in enumerate(sorted(range(len(changed)), key=lambda t: (-probabilities[t], t))):
        if rank and (before >= params.top_p or (params.top_k and rank >= params.top_k)):
            break
        if rank and probabilities[token] < params.min_p * max(probabilities):
            break
        kept.append(token)
        before += probabilities[token]
    total, end, found = sum(probabilities[t] for t in kept), 0.0, set()
    for token in kept:
        start, end = end, end + probabilities[token]
        if start - 1e-5 <= u * total <= end + 1e-5:
            found.add(token)
    return found


@settings(max_examples=150, deadline=None)
@given(parameters, st.integers(0, 10_000), st.integers(2, 30))
def test_the_rules(params: SamplingParams, seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(size, generator=generator)).round(decimals=3)
    seen = torch.randint(0, size, (6,), generator=generator).tolist()
    chooser, twin = (Chooser(params, seen[:3], seen[3:]) for _ in range(2))
    token = choose(logits.unsqueeze(0), [chooser])[0].token
    assert token in by_hand(logits.tolist(), twin, twin.draw())


@given(st.lists(parameters, min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_rows_do_not_see_one_another(params: list[SamplingParams], seed: int) -> None:
    logits = torch.randn(len(params), 20, generator=torch.Generator().manual_seed(seed))
    together = choose(logits, [Chooser(one, [1, 2], [3, 3]) for one in params])
    alone = [
        choose(row.unsqueeze(0), [Chooser(one, [1, 2], [3, 3])])[0] for row, one in zip(logits, params, strict=True)
    ]
    assert together == alone


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    chooser = Chooser(SamplingParams(temperature=1.0, seed=3), [])
    tokens = [choose(logits.unsqueeze(0), [chooser])[0].token for _ in range(4000)]
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    assert torch.allclose(shares, logits.softmax(0), atol=0.03)


def test_the_smallest_temperature_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0]])
    for temperature in (1e-40, 1e-20, 1e-5):
        assert choose(logits, [Chooser(SamplingParams(temperature=temperature, seed=1), [])])[0].token == 1


def test_greedy_takes_the_largest_after_penalties() -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0]])
    assert choose(logits, [Chooser(SamplingParams(), [])])[0].token == 0
    assert choose(logits, [Chooser(SamplingParams(presence_penalty=0.2), [], [0])])[0].token == 1
    assert choose(logits, [Chooser(SamplingParams(presence_penalty=0.2), [0])])[0].token == 0, "the answer's alone"
    assert choose(logits, [Chooser(SamplingParams(repetition_penalty=1.1), [0])])[0].token == 1


def test_entropy_is_of_the_raw_logits_in_fp32_and_only_where_asked_for() -> None:
    logits = (4 * torch.randn(4, 500, generator=torch.Generator().manual_seed(2))).bfloat16()
    logits[0, 7] = float("-inf")
    drawn = SamplingParams(temperature=0.3, top_k=2, presence_penalty=1.5, seed=1, logprobs=1)
    params = [SamplingParams(logprobs=0), drawn, SamplingParams(), SamplingParams(temperature=1.0, seed=2)]
    found = choose(logits, [Chooser(one, [1], [2, 3]) for one in params])
    expected = torch.distributions.Categorical(logits=logits.double().clamp_min(-1e9)).entropy()
    for choice, own in zip(found[:2], expected.tolist(), strict=False):
        assert choice.entropy == pytest.approx(own, abs=1e-5)
    assert [choice.entropy for choice in found[2:]] == [choice.logprob for choice in found[2:]] == [None, None]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 (greedy) to 100"),
        ({"temperature": float("nan")}, "temperature is nan; expected 0 (greedy) to 100"),
        ({"top_p": 0.0}, "top_p is 0.0; expected above 0, at most 1"),
        ({"top_k": -1}, "top_k is -1; expected 0 (all) or more"),
        ({"min_p": 1.5}, "min_p is 1.5; expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected above 0, at most 100"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf; expected -100 to 100"),
        ({"stop": ("",)}, "stop is ('',); expected at most 16 texts, none of them empty"),
        ({"logprobs": 50}, "logprobs is 50; expected 0 to 20, or None"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number, or None"),
        ({"max_tokens": True}, "max_tokens is True; expected a whole number"),
        ({"top_p": "x"}, "top_p is 'x'; expected a number"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; expected a list of ids"),
    ],
)
def test_what_is_out_of_range_is_said(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**wrong)  # type: ignore[arg-type]
    assert str(caught.value) == message
