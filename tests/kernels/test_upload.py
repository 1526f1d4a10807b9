"""Copies to a device: pinned, queued, and none where nothing has to move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grace_vlm.kernels.upload import upload, upload_cat


class Host:
    """A host tensor that says what is done to it."""

    is_cuda = False

    def __init__(self, numel: int, pinned: bool = False) -> None:
        self.done: list[Any] = []
        self._numel, self._pinned = numel, pinned

    def numel(self) -> int:
        return self._numel

    def is_pinned(self) -> bool:
        return self._pinned

    def pin_memory(self) -> Host:
        self.done.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> None:
        self.done.append((device.type, non_blocking))


def done(host: Host, device: str) -> list[Any]:
    upload(host, torch.device(device))  # type: ignore[arg-type]
    return host.done


def test_the_copy_to_a_gpu_is_pinned_and_not_waited_for() -> None:
    assert done(Host(2), "cuda") == ["pinned", ("cuda", True)]


def test_nothing_is_pinned_twice_or_for_nothing() -> None:
    assert done(Host(2, pinned=True), "cuda") == [("cuda", True)]
    assert done(Host(0), "cuda") == [("cuda", True)]
    assert done(Host(2), "cpu") == [("cpu", True)]


def test_a_tensor_that_is_there_stays_itself() -> None:
    there = torch.arange(3)
    assert upload(there, torch.device("cpu")) is there


@pytest.mark.parametrize(
    ("cut", "is_one"),
    [
        (lambda x: x.split([2, 3, 1]), True),
        (lambda x: x[1:].split([1, 4]), True),
        (lambda x: [x], True),
        (lambda x: [x[:2], x[3:]], False),  # a gap
        (lambda x: [x[2:], x[:2]], False),  # another order
        (lambda x: [x[:3], x[:3]], False),  # the same twice
        (lambda x: [x[:2, :4], x[2:4, :4]], False),  # not whole rows
        (lambda x: [x[:2].clone(), x[2:]], False),  # two memories
        (lambda x: [x[:2], x[2:].double()], False),
    ],
)
def test_pieces_that_lie_end_to_end_go_up_as_one(cut: Any, is_one: bool) -> None:
    parts = list(cut(torch.arange(48.0).view(6, 8)))
    found = upload_cat(parts, torch.device("cpu"))
    assert torch.equal(found, torch.cat(parts))
    assert (found.data_ptr() == parts[0].data_ptr()) == is_one
