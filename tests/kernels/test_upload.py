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


BUFFER = bytearray(torch.arange(48.0).numpy().tobytes())


def halves(*_: Any) -> list[torch.Tensor]:
    """Neighbours in memory that are no pieces of one tensor."""
    return [torch.frombuffer(BUFFER, dtype=torch.float32, count=24, offset=at).view(3, 8) for at in (0, 96)]


@pytest.mark.parametrize(
    ("cut", "num_copies"),
    [
        (lambda x: x.split([2, 3, 1]), 1),
        (lambda x: x[1:].split([1, 4]), 1),
        (lambda x: [x], 1),
        (lambda x: [x[0:2:2], x[1:2]], 1),  # of one row, whose stride says nothing
        (lambda x: [x[:2], x[3:]], 2),  # a gap
        (lambda x: [x[:1], x[1:2], x[3:4], x[4:]], 2),
        (lambda x: [x[2:], x[:2]], 2),  # another order
        (lambda x: [x[:3], x[:3]], 2),  # the same twice
        (lambda x: [x[:2, :4], x[2:4, :4]], 2),  # not whole rows
        (lambda x: [x[:2].clone(), x[2:]], 2),  # two memories
        (halves, 2),
        (lambda x: [x[:2], x.view(torch.int32)[2:]], 2),
        (lambda x: [x.flatten()[:8].view(2, 4), x.as_strided((2, 4), (1, 2), 8)], 2),  # columns first
    ],
)
def test_pieces_that_lie_end_to_end_go_up_as_one(monkeypatch: Any, cut: Any, num_copies: int) -> None:
    parts, copies = list(cut(torch.arange(48.0).view(6, 8))), []
    monkeypatch.setattr("grace_vlm.kernels.upload.upload", lambda host, device: copies.append(host) or host)
    assert torch.equal(upload_cat(parts, torch.device("cpu")), torch.cat(parts))
    assert len(copies) == num_copies
    assert copies[0].data_ptr() == parts[0].data_ptr()


def test_pieces_of_different_widths_are_no_tensor() -> None:
    x = torch.arange(48.0).view(6, 8)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        upload_cat([x[:2], x[2:].view(2, 16)], torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_pieces_go_up_without_a_wait() -> None:
    host = torch.arange(48.0).view(6, 8).pin_memory()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = upload_cat(host.split([1, 2, 3]), torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), host)
