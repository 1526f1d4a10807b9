"""The processes of one run: what they add up, what the first does for all, and how none waits for a dead one.

``torchrun`` or ``accelerate launch`` starts them. Each has its share of every step's rows and the whole model; masters,
scales and moments are shared out, by rows of every matrix. Per step they add up the normalisers, the gradients and the
measurements, each once and on every process whatever it has found, so no process waits in a sum that another one skips.

A process that fails says why in the store that the launcher opened, and everyone looks there each second: all of them
end with one reason. One that is killed says nothing; it is missed when its counter in the store has stood still for
``SILENCE_SECONDS``. Neither needs the launcher, which knows its own machine only, or NCCL, whose own limit is minutes.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

# Not used here: it has the group of all processes as default arguments. Imported when there is one (by Transformers),
# they would keep it, and with it gloo's threads, beyond the interpreter's end.
import torch.distributed.nn.functional
from torch import distributed
from torch.distributed.distributed_c10d import _coalescing_manager

from grace_vlm.errors import ConfigError, GraceError, OtherProcessError
from grace_vlm.models.load import use_device
from grace_vlm.train.launcher import plain_accelerator

# Renamed in torch 2.14; 2.11 has the old names only.
_reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

PERIOD_SECONDS = 1.0
SILENCE_SECONDS = 15.0
"""Of a process's counter, until it is taken for dead."""
_runs = itertools.count()
"""Several runs of one process share its store: every process counts them alike."""


class LostProcessError(Exception):
    """A sum could not be made; why is not known here."""


class Going:
    """An exchange that goes on while the device computes.

    Args:
        works: what is waited for. kept: what must live until then.
    """

    def __init__(self, ranks: Ranks, works: Sequence[Any], kept: Sequence[torch.Tensor] = ()) -> None:
        self._ranks, self._works, self._kept = ranks, works, kept

    def wait(self) -> None:
        """On a GPU what is queued next waits, and the host does not."""
        with self._ranks.exchange():
            for work in self._works:
                work.wait()
        self._kept = ()


class Ranks:
    """This process among those of a run, as a context: inside it a failure of one ends all.

    Attributes:
        index, count: 0-based, and how many there are. device: where this one computes.
        sent_bytes: of tensors out of this process so far, as rings send them: a sum twice the others' shares.
    """

    def __init__(self, device: torch.device, index: int = 0, count: int = 1) -> None:
        self.device, self.index, self.count, self.sent_bytes = device, index, count, 0
        self._watch = _Watch(index, count) if count > 1 else None

    @classmethod
    def started(cls, device: str) -> Ranks:
        """Those that the launcher started; ``device`` as in ``runtime.device``.

        Raises:
            ConfigError: several processes and one GPU named for all of them.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and device.startswith("cuda:"):
            raise ConfigError(f"runtime.device is {device} for several processes; leave it out, each takes its own GPU")
        chosen = use_device(device)
        accelerator = plain_accelerator(is_cpu=chosen.type == "cpu")
        return cls(accelerator.device, accelerator.process_index, accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        """The process that writes what there is one of."""
        return self.index == 0

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """What fails inside, another process is missing in."""
        try:
            yield
        except RuntimeError as error:
            # Gloo says so at once when a peer is gone, in words that name none.
            raise LostProcessError(str(error)) from error

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, written into ``tensor``, the same bits everywhere."""
        if self.count > 1:
            with self.exchange():
                distributed.all_reduce(tensor)
            self.sent_bytes += 2 * self._others(tensor)
        return tensor

    def share_of(self, tensor: torch.Tensor) -> slice | None:
        """The rows of a matrix that this process has to itself; None: all of it, as every other process has."""
        if self.count == 1 or tensor.ndim < 2 or tensor.shape[0] % self.count:
            return None
        size = tensor.shape[0] // self.count
        return slice(self.index * size, (self.index + 1) * size)

    def sum_together_(self, tensors: Sequence[torch.Tensor]) -> None:
        """``sum_`` of many small ones, in one exchange."""
        if self.count > 1 and tensors:
            flat = self.sum_(torch.cat([tensor.flatten() for tensor in tensors]))
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def sum_shares_(self, wholes: Sequence[torch.Tensor], owns: Sequence[slice]) -> None:
        """The sums over processes in this one's rows of each of ``wholes``; the other rows are then anything. One
        exchange for all, since a hundred small ones wait for one another."""
        if self.device.type == "cpu":  # gloo adds up whole tensors
            for whole in wholes:
                self.sum_(whole)
            return
        with self.exchange(), _coalescing_manager():
            for whole, own in zip(wholes, owns, strict=True):
                _reduce_scatter(whole[own], whole)
                self.sent_bytes += self._others(whole)

    def gather_shares_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every process's share of ``tensor``'s rows, written into it."""
        own = self.share_of(tensor)
        if own is not None:
            with self.exchange():
                _all_gather(tensor, self._mine(tensor, own))
            self.sent_bytes += self._others(tensor)
        return tensor

    def start_gather_shares(self, tensors: Sequence[torch.Tensor]) -> Going:
        """Begin ``gather_shares_`` of many in one exchange; all have rows of this process's own."""
        owns = [self.share_of(tensor) for tensor in tensors]
        pairs = zip(tensors, owns, strict=True)
        return self.start_gather(tensors, [self._mine(tensor, own) for tensor, own in pairs if own is not None])

    def _mine(self, tensor: torch.Tensor, own: slice) -> torch.Tensor:
        """This process's rows, to be gathered into ``tensor``: NCCL writes in place; gloo must not read where it
        writes."""
        return tensor[own].clone() if self.device.type == "cpu" else tensor[own]

    def start_gather(self, wholes: Sequence[torch.Tensor], shares: Sequence[torch.Tensor]) -> Going:
        """Begin to write every process's rows into each of ``wholes``; ``shares``: this one's, in other memory or, on
        a GPU, where they stand in it. One exchange for all; what is queued on the GPU goes on beside it."""
        with self.exchange(), _coalescing_manager(async_ops=True) as going:
            for whole, share in zip(wholes, shares, strict=True):
                _all_gather(whole, share)
                self.sent_bytes += self._others(whole)
        return Going(self, [going], shares)

    def start_sum_shares(
        self, wholes: Sequence[torch.Tensor], owns: Sequence[slice]
    ) -> tuple[Going, list[torch.Tensor]]:
        """Begin to add up each of ``wholes`` over processes; returns this one's rows of the sums, which are there when
        it is waited for. ``wholes`` are then anything."""
        if self.device.type == "cpu":  # gloo adds up whole tensors, in the order of ``sum_shares_``
            with self.exchange():
                works = [distributed.all_reduce(whole, async_op=True) for whole in wholes]
            self.sent_bytes += sum(2 * self._others(whole) for whole in wholes)
            return Going(self, works, wholes), [whole[own] for whole, own in zip(wholes, owns, strict=True)]
        shares = [torch.empty_like(whole[own]) for whole, own in zip(wholes, owns, strict=True)]
        with self.exchange(), _coalescing_manager(async_ops=True) as going:
            for whole, share in zip(wholes, shares, strict=True):
                _reduce_scatter(share, whole)
                self.sent_bytes += self._others(whole)
        return Going(self, [going], wholes), shares

    def _others(self, tensor: torch.Tensor) -> int:
        """Bytes of the other processes' shares of a tensor: what gathering or scattering it sends out of each."""
        return tensor.numel() * tensor.element_size() * (self.count - 1) // self.count

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            with self.exchange():
                distributed.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by index; plain data."""
        found: list[Any] = [value]
        if self.count > 1:
            found = [None] * self.count
            with self.exchange():
                distributed.all_gather_object(found, value)
        return found

    def of_first(self, value: Any) -> Any:
        """What the first process gives, on every one; plain data."""
        return self.gather(value if self.is_first else None)[0]

    def __enter__(self) -> Ranks:
        if self._watch is not None:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is None:
            if error is None:
                _leave_at_exit()
            return
        try:
            if error is None:
                self.wait()
                self._watch.stop()
                _leave_at_exit()
                return
        except LostProcessError as lost:
            error = lost
        atexit.unregister(_leave)
        is_known_here = not isinstance(error, LostProcessError | OtherProcessError)
        failure = self._watch.tell(error) if is_known_here else self._watch.await_failure()
        self._watch.leave()
        if failure is not None and str(failure) != str(error):
            raise failure from error


def _leave_at_exit() -> None:
    """Take the exchange's threads down while the interpreter still stands: one that lets go of a tensor after that
    aborts the process (pytorch/pytorch#179291). Not while another run may follow, nor where one has failed: there it
    could wait for a process that is gone."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


class _Watch:
    """This process's word in the store, and its ear there.

    A failure is ``{"reason": ..., "exit_code": ...}`` under one key; the first one stays.
    """

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self._prefix = f"grace/{next(_runs)}"
        self._store = self._connect()
        self._ended, self._is_over = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="grace-watch", daemon=True)
        self._seen = {other: (0, time.monotonic()) for other in range(count)}

    @staticmethod
    def _connect() -> distributed.TCPStore:
        """A connection of our own: on the process group's, a call that waits would hold ours up."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return distributed.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE_SECONDS)
        )

    def start(self) -> None:
        self._thread.start()

    def leave(self) -> None:
        """Fall silent. A thread that is in the store's C++ when Python ends takes the process down with SIGABRT, and
        its exit code is not ours."""
        self._ended.set()
        self._thread.join(SILENCE_SECONDS)

    def stop(self) -> None:
        """Fall silent: this process is done."""
        self.leave()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._prefix}/done/{self.index}", "1")

    def tell(self, error: BaseException) -> OtherProcessError | None:
        """Say why this process ends, and leave when the others can have read it. Returns what stands there: another
        may have been first."""
        is_own = isinstance(error, GraceError)
        text = str(error) if is_own else f"{type(error).__name__}: {error}"
        reason = text if is_own else f"process {self.index} of {self.count}: {' '.join(text.split())}"
        self._is_over.acquire()  # what the others say to it is no news
        with contextlib.suppress(RuntimeError):
            self._post(reason, getattr(error, "exit_code", 1))
            time.sleep(2.5 * PERIOD_SECONDS)
            failure = self._failure()
            return None if failure is not None and str(failure) == reason else failure
        return None

    def await_failure(self) -> OtherProcessError:
        """Why a process is missing, when the store knows it."""
        self._is_over.acquire()
        until = time.monotonic() + SILENCE_SECONDS + 5 * PERIOD_SECONDS
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until:
                if (found := self._failure()) is not None:
                    return found
                self._look_around()
                time.sleep(PERIOD_SECONDS / 4)
        return OtherProcessError(self._gone())

    def _gone(self) -> str:
        return f"the store of the {self.count} processes is gone: process 0 or its launcher was killed"

    def _post(self, reason: str, exit_code: int) -> None:
        text = json.dumps({"reason": reason, "exit_code": exit_code})
        self._store.compare_set(f"{self._prefix}/failure", "", text)

    def _failure(self) -> OtherProcessError | None:
        key = f"{self._prefix}/failure"
        if not self._store.check([key]):
            return None
        found = json.loads(self._store.get(key))
        return OtherProcessError(found["reason"], found["exit_code"])

    def _look_around(self) -> None:
        """Count on; and miss whoever does not."""
        self._store.add(f"{self._prefix}/alive/{self.index}", 1)
        now = time.monotonic()
        for other, (last, since) in self._seen.items():
            number = self._store.add(f"{self._prefix}/alive/{other}", 0)
            if number != last:
                self._seen[other] = (number, now)
            elif now - since > SILENCE_SECONDS and not self._store.check([f"{self._prefix}/done/{other}"]):
                self._post(
                    f"process {other} of {self.count} has said nothing for {SILENCE_SECONDS:.0f} seconds: it was "
                    "killed or its machine is gone; the last checkpoint is whole, go on with --resume",
                    1,
                )

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_SECONDS):
            try:
                self._look_around()
                failure = self._failure()
            except RuntimeError:
                failure = OtherProcessError(self._gone())
            if failure is not None and self._is_over.acquire(blocking=False):
                # The main thread may be in a sum that will never be made.
                sys.stderr.write(f"error: {failure}\n")
                sys.stderr.flush()
                os._exit(failure.exit_code)
