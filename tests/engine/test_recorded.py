"""Prompts laid into larger sizes and pictures by grid: the numbers of a forward as it is. On a GPU, recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import DEVICE, asked, loaded_toy, pictures

from grace_vlm.engine.engine import EngineOptions, _Rows
from grace_vlm.engine.forward import forward
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.recorded import MAX_SIZES, RecordedPictures, RecordedPrompts, Sizes, room_for
from grace_vlm.engine.request import Features, Request
from grace_vlm.engine.sampling import SamplingParams


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    tolerance = 1e-5 if DEVICE.type == "cpu" else 3e-2
    torch.testing.assert_close(found.float(), right.float(), atol=tolerance * float(right.abs().max()), rtol=0)


def test_sizes() -> None:
    assert [room_for(n) for n in (1, 16, 17, 128, 129, 230, 1000, 1025, 2048)] == [
        16, 16, 32, 128, 160, 256, 1024, 1280, 2048,
    ]  # fmt: skip
    assert all(n <= room_for(n) <= max(n + 15, 1.25 * n) for n in range(1, 5000))


@pytest.mark.parametrize("family", ["tiny", "qwen2_vl", "llava"])
def test_prompts_are_those_of_a_forward(family: str, tmp_path: Path) -> None:
    """States, keys and values, whatever lay in a recording before and on the page of nobody."""
    llm = LLM(loaded_toy(family), options=EngineOptions(cache_tokens=2048, max_running=4))
    engine = llm.engine
    recorded = RecordedPrompts(engine.weights, engine.cache, 1024)
    prompts = [llm.prompt(text, images) for text, images in asked(pictures(tmp_path, 3), 12)] * 2
    num_recorded = 0
    for number, prompt in enumerate(prompts):
        request = Request(str(number), prompt, SamplingParams())
        request.pages = engine.pages.take(-(-request.num_tokens // 16) + number % 3) or []
        if prompt.images:
            request.features = engine.pictures.of(prompt.images)
        rows = _Rows()
        engine._lay(rows, request, request.num_tokens)
        step = engine._step(rows)
        found = recorded.run(step)
        kept = [cache[:, step.slots].float() for cache in (engine.cache.keys, engine.cache.values)]
        right = forward(engine.weights, engine.cache, step)
        if found is not None:
            num_recorded += 1
            close(found, right)
            for own, cache in zip(kept, (engine.cache.keys, engine.cache.values), strict=True):
                close(own, cache[:, step.slots])
        engine.pages.give(request.pages)
    assert num_recorded >= len(prompts) // 2


def test_only_whole_prompts_of_one_request_are_recorded(tmp_path: Path) -> None:
    llm = LLM(loaded_toy("tiny"))
    engine, prompt = llm.engine, llm.prompt("how many are there to the left of the large green one?")
    recorded = RecordedPrompts(engine.weights, engine.cache, 64)
    request = Request("a", prompt, SamplingParams())
    request.pages = engine.pages.take(4) or []
    for count in (5, 5, request.num_tokens - 5):
        rows = _Rows()
        engine._lay(rows, request, count)
        assert recorded.run(engine._step(rows)) is None, "a piece"
        request.num_done = 5
    assert RecordedPrompts(engine.weights, engine.cache, 4).run(engine._step(rows)) is None, "too long"


def test_pictures_are_copies_of_what_a_recording_leaves() -> None:
    calls = []

    def make(pixels: torch.Tensor, grid: tuple[int, int, int]) -> Features:
        calls.append(grid)
        return Features(pixels * 2, (pixels + grid[1],))

    recorded = RecordedPictures(DEVICE, make)
    given = [torch.full((4, 3), float(number), device=DEVICE) for number in range(4)]
    found = [recorded(pixels, (1, 2, 2)) for pixels in given]
    for pixels, features in zip(given, found, strict=True):
        assert torch.equal(features.embeds, pixels * 2)
        assert torch.equal(features.deepstack[0], pixels + 2)
    assert calls[:1] == [(1, 2, 2)]


def test_the_longest_unused_is_forgotten_and_what_cannot_be_recorded_runs() -> None:
    sizes, made = Sizes[int, str](), []

    def record(key: int) -> str:
        made.append(key)
        if key < 0:
            raise RuntimeError("a tower that waits for the GPU")
        return str(key)

    assert [sizes.of(7, lambda: record(7)) for _ in range(3)] == [None, "7", "7"]
    assert [sizes.of(-1, lambda: record(-1)) for _ in range(3)] == [None, None, None]
    assert made == [7, -1]
    for key in range(100, 100 + MAX_SIZES):
        sizes.of(key, lambda: record(0))
    assert sizes.of(7, lambda: record(7)) is None, "it was forgotten"


@pytest.mark.gpu
def test_answers_with_recordings_are_those_without(tmp_path: Path) -> None:
    """The third prompt of a size is one launch; its first token is the eager one's or a near-tie."""
    llm = LLM(loaded_toy("tiny"))
    plain = LLM(loaded_toy("tiny"))
    plain.engine._prompts = None
    prompts = asked(pictures(tmp_path, 3), 12)
    params = SamplingParams(max_tokens=1, logprobs=2)
    for _ in range(3):
        for text, images in prompts:
            own, right = (one.generate(text, images, params)[0].choices[0] for one in (llm, plain))
            if own.token != right.token:
                a, b = (dict(right.top_logprobs)[token] for token in (own.token, right.token))
                assert abs(a - b) < 0.05
