"""Kept tower outputs: identical with and without, within the budget, never with a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from toy_world import SIZES, World

from grace_vlm.models.adapter import TowerOutput
from grace_vlm.models.vision import VisionFeatures


@dataclass(frozen=True)
class Stub:
    key: str
    grid: tuple[int, int, int]
    pixels: torch.Tensor | None


@pytest.fixture
def pictures(world: World) -> list[Stub]:
    inputs = world.inputs([[f"<{w}x{h}>" for w, h in SIZES]])
    return [Stub(f"{i}", g, p) for i, (g, p) in enumerate(zip(world.grids(inputs), world.pixels(inputs), strict=True))]


class CountingAdapter:
    """The real adapter; counts the pictures that the tower runs."""

    def __init__(self, world: World) -> None:
        self.world, self.ran = world, 0

    def tower(self, model: object, pixels: list[torch.Tensor], grids: list[tuple[int, int, int]]) -> list[TowerOutput]:
        self.ran += len(pixels)
        return self.world.adapter.tower(model, pixels, grids)  # type: ignore[arg-type]


def equal(ours: list[TowerOutput], expected: list[TowerOutput]) -> bool:
    return all(
        torch.equal(a.hidden, b.hidden) and all(map(torch.equal, a.deepstack, b.deepstack))
        for a, b in zip(ours, expected, strict=True)
    )


def test_kept_outputs_are_identical_and_the_tower_rests(world: World, pictures: list[Stub]) -> None:
    adapter = CountingAdapter(world)
    kept = VisionFeatures(adapter, world.model, 10**9)  # type: ignore[arg-type]
    never = VisionFeatures(world.adapter, world.model)
    expected = never.of(pictures)
    assert equal(kept.of(pictures), expected)
    assert adapter.ran == len(pictures)
    without_pixels = [Stub(p.key, p.grid, None) for p in pictures]
    assert equal(kept.of(without_pixels), expected)
    assert equal(kept.of(without_pixels[::-1]), expected[::-1])
    assert adapter.ran == len(pictures)
    assert all(kept.keeps(p.key) for p in pictures)
    assert not any(never.keeps(p.key) for p in pictures)


def test_what_is_kept_does_not_depend_on_a_pictures_companions(world: World, pictures: list[Stub]) -> None:
    """A resumed run meets a picture in another batch than the run that was not interrupted."""
    alone = VisionFeatures(world.adapter, world.model, 10**9)
    expected = [alone.of([picture])[0] for picture in pictures]
    together = VisionFeatures(world.adapter, world.model, 10**9)
    assert equal(together.of(pictures), expected)


def test_the_budget_is_never_exceeded_and_nothing_is_dropped(world: World, pictures: list[Stub]) -> None:
    outputs = VisionFeatures(world.adapter, world.model).of(pictures)
    budget = outputs[0].num_bytes + outputs[1].num_bytes + 100
    adapter = CountingAdapter(world)
    features = VisionFeatures(adapter, world.model, budget)  # type: ignore[arg-type]
    for _ in range(3):
        assert equal(features.of(pictures), outputs)
    kept = [p.key for p in pictures if features.keeps(p.key)]
    assert kept == ["0", "1"]
    assert adapter.ran == len(pictures) + 2 * (len(pictures) - 2)


def test_what_is_kept_owns_its_memory(world: World, pictures: list[Stub]) -> None:
    features = VisionFeatures(world.adapter, world.model, 10**9)
    features.of(pictures)
    for output in features.of(pictures):
        for tensor in (output.hidden, *output.deepstack):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_picture_that_stands_twice_runs_once(world: World, pictures: list[Stub]) -> None:
    adapter = CountingAdapter(world)
    features = VisionFeatures(adapter, world.model)  # type: ignore[arg-type]
    outputs = features.of([pictures[0], pictures[1], pictures[0]])
    assert adapter.ran == 2
    assert equal([outputs[0]], [outputs[2]])
    assert features.of([]) == []


def test_a_frozen_tower_has_no_graph_and_a_trained_one_keeps_it_and_nothing_else(
    world: World, pictures: list[Stub]
) -> None:
    frozen = VisionFeatures(world.adapter, world.model, 10**9).of(pictures[:1])
    assert not frozen[0].hidden.requires_grad
    trained = VisionFeatures(world.adapter, world.model, 10**9, trained=True)
    assert trained.of(pictures[:1])[0].hidden.requires_grad
    assert not trained.keeps("0")
    with torch.no_grad():
        assert not trained.of(pictures[:1])[0].hidden.requires_grad


def test_pictures_of_many_sizes_in_one_call_are_each_themselves(
    world: World, pictures: list[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where one kernel knows the borders; here frame by frame in its place."""
    from grace_vlm.models import qwen_vision

    pixels, grids = [p.pixels for p in pictures if p.pixels is not None], [p.grid for p in pictures]
    assert len(set(grids)) > 1
    expected = world.adapter.tower(world.model, pixels, grids)
    seen = []

    def by_frame(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        borders: torch.Tensor,
        longest: int,
        how: object,
    ) -> torch.Tensor:
        sizes = borders.diff().tolist()
        assert longest == max(sizes)
        assert how == {}
        seen.append(sizes)
        parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        frames = [torch.nn.functional.scaled_dot_product_attention(a, b, c, scale=scale) for a, b, c in parts]
        return torch.cat(frames, dim=2).transpose(1, 2)

    monkeypatch.setattr(qwen_vision, "attend_varlen", by_frame)
    monkeypatch.setattr(qwen_vision, "_together", lambda grids, weight: [list(range(len(grids)))])
    found = world.adapter.tower(world.model, pixels, grids)
    assert seen[0] == [h * w for t, h, w in grids for _ in range(t)]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip((one.hidden, *one.deepstack), (other.hidden, *other.deepstack), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
