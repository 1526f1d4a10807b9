"""A cache of a byte a number: its size, that nothing depends on how requests are cut and mixed, and what it changes."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from worlds import DEVICE, asked, loaded_toy, on_a_cpu, pictures

from grace_vlm.engine.cache import PAGE_TOKENS
from grace_vlm.engine.engine import CacheKind, Engine, EngineOptions
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import ConfigError
from grace_vlm.kernels.cache_rows import FP8

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no E4M3 on this GPU"
)
FAMILIES = ("tiny", "qwen2_vl", "llava")


def test_a_page_takes_a_byte_a_number() -> None:
    loaded = loaded_toy("tiny")
    loaded.model.to(torch.bfloat16)
    half, whole = (Engine(copy.deepcopy(loaded), options=EngineOptions(kv_cache=kind)) for kind in ("fp8", "model"))
    own = half.weights
    assert half.cache.page_bytes == 2 * len(own.layers) * PAGE_TOKENS * own.num_kv_heads * own.head_dim
    assert whole.cache.keys.dtype == torch.bfloat16
    assert whole.cache.page_bytes == 2 * half.cache.page_bytes
    assert whole.cache.keys.nbytes + whole.cache.values.nbytes == whole.cache.page_bytes * (whole.pages.num_pages + 1)


@on_a_cpu
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_where_prompts_are_cut(family: str, tmp_path: Path) -> None:
    """With pictures, all at once and in pieces of 32 tokens beside others; a prompt reads what the cache keeps."""
    loaded, prompts = loaded_toy(family), asked(pictures(tmp_path, 4), 16)
    texts, images = [text for text, _ in prompts], [images for _, images in prompts]
    found = {}
    for kind in ("fp8", "model"):
        pieces = EngineOptions(cache_tokens=1536, max_running=5, max_step_tokens=32, kv_cache=kind)
        for options in (EngineOptions(kv_cache=kind), pieces):
            llm = LLM(copy.deepcopy(loaded), options=options)
            answers = llm.generate(texts, images, SamplingParams(max_tokens=12, logprobs=0))
            found[kind, options is pieces] = answers
            assert llm.engine.cache.keys.dtype == (FP8 if kind == "fp8" else torch.float32)
            assert llm.engine.pages.num_free == llm.engine.pages.num_pages
    for kind in ("fp8", "model"):
        differing = 0
        for whole, cut in zip(found[kind, False], found[kind, True], strict=True):
            differing += whole.token_ids != cut.token_ids
            for one, other in zip(whole.choices, cut.choices, strict=False):
                if one.token != other.token:
                    break
                # A sum that rounds otherwise may fall on the other side of a middle of E4M3.
                assert one.logprob == pytest.approx(other.logprob, abs=0.02 if kind == "fp8" else 1e-4)
        assert differing <= (1 if kind == "fp8" else 0)
    # The first token's distribution has the same prompt before it, and is another: the prompt's own keys are rounded.
    first = [[answer.choices[0].logprob for answer in found[kind, False]] for kind in ("fp8", "model")]
    away = [abs(a - b) for a, b in zip(*first, strict=True)]
    assert 1e-5 < max(away) < 0.5


@pytest.mark.parametrize("is_ahead", [False, True])
def test_batch_invariant_requests_are_those_alone_to_the_last_bit(is_ahead: bool) -> None:
    loaded = loaded_toy("tiny")
    options = EngineOptions(cache_tokens=1600, max_running=5, batch_invariant=True, kv_cache="fp8")
    crowd, alone = (LLM(copy.deepcopy(loaded), options=options) for _ in range(2))
    crowd.engine._is_ahead = is_ahead
    rng = random.Random(1)
    texts = [
        " ".join(rng.choices(["yes", "count the blue triangles", "is there"], k=rng.randint(1, 30))) for _ in range(24)
    ]
    drawn = [
        SamplingParams(max_tokens=rng.choice([1, 6, 20]), temperature=rng.choice([0.0, 1.0]), seed=n, logprobs=1)
        for n in range(24)
    ]
    together = crowd.generate(texts, sampling=drawn)
    assert together == [alone.generate([text], sampling=[one])[0] for text, one in zip(texts, drawn, strict=True)]


@on_a_cpu
def test_first_differences_are_near_ties(tmp_path: Path) -> None:
    """Where greedy answers part, the other cache's log-probabilities of both tokens are close."""
    loaded, prompts = loaded_toy("tiny"), asked(pictures(tmp_path, 4), 50)
    texts, images = [text for text, _ in prompts], [images for _, images in prompts]
    params = SamplingParams(max_tokens=12, logprobs=20, ignore_eos=True)
    kinds: tuple[CacheKind, CacheKind] = ("model", "fp8")
    right, found = (
        LLM(copy.deepcopy(loaded), options=EngineOptions(kv_cache=kind)).generate(texts, images, params)
        for kind in kinds
    )
    gaps = []
    for ours, theirs in zip(found, right, strict=True):
        pairs = zip(ours.choices, theirs.choices, strict=True)
        parted = next(((a, b) for a, b in pairs if a.token != b.token), None)
        if parted is not None:
            gaps.append(parted[1].logprob - dict(parted[1].top_logprobs).get(parted[0].token, -1e9))
    assert 0 < len(gaps) < 25
    assert max(gaps) < 0.5


def test_a_cache_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions(kv_cache="int8")  # type: ignore[arg-type]
    assert str(caught.value) == "kv_cache is 'int8'; expected model or fp8"
    from grace_vlm.engine.engine import _cache_dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an A10")
    there = torch.device("cuda")
    with pytest.raises(ConfigError) as caught:
        _cache_dtype(EngineOptions(kv_cache="fp8"), torch.bfloat16, there)
    assert str(caught.value) == (
        "kv_cache is 'fp8' and an A10 cannot convert from it; expected compute capability 8.9 or newer, or 'model'"
    )
    assert _cache_dtype(EngineOptions(), torch.bfloat16, there) == torch.bfloat16
