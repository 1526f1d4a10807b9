"""Copies to a device: pinned, queued, and none where nothing has to move."""

from __future__ import annotations

from typing import Any

import torch

from grace_vlm.kernels.upload import upload


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
