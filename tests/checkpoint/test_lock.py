"""One writer a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from checkpoint_states import in_child

from grace_vlm.checkpoint import FolderLock
from grace_vlm.errors import CheckpointError


def try_lock(folder: Path) -> int:
    """0: got it, 3: refused in one line that names the folder."""
    try:
        with FolderLock(folder):
            return 0
    except CheckpointError as error:
        return 3 if str(folder) in str(error) and "\n" not in str(error) else 4


def test_the_second_process_is_refused_twenty_times(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"):
        assert [in_child(lambda: try_lock(tmp_path / "run")) for _ in range(20)] == [3] * 20
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    assert in_child(lambda: try_lock(tmp_path / "run")) == 0
    assert os.listdir(tmp_path / "run") == []


def test_the_message(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        with FolderLock(tmp_path):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    expected = f"{tmp_path} is in use by process {holder} on {socket.gethostname()}; wait for it, or write elsewhere"
    with pytest.raises(CheckpointError) as caught, FolderLock(tmp_path):
        pytest.fail("two holders")
    assert str(caught.value) == expected
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with FolderLock(tmp_path):  # the dead one's lock is taken over, file and all
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with (
        FolderLock(tmp_path),
        pytest.raises(CheckpointError, match="in use by this process"),
        FolderLock(tmp_path),
    ):
        pytest.fail("two holders")


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Data workers outlive a killed trainer for a moment; the next trainer must not wait for them."""
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        FolderLock(tmp_path).__enter__()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer, f"{worker}\n".encode())
        time.sleep(60)
    worker = int(os.read(reader, 64))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        assert try_lock(tmp_path) == 0
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_of_another_host_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("17 elsewhere\n")
    with pytest.raises(CheckpointError) as caught, FolderLock(tmp_path):
        pytest.fail("two holders")
    assert str(caught.value) == (
        f"{tmp_path} is locked by process 17 on elsewhere; if that one is gone, delete {tmp_path}/.lock"
    )


def test_without_kernel_locks_the_pid_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    (tmp_path / ".lock").write_text(f"{os.getppid()} {socket.gethostname()}\n")
    assert try_lock(tmp_path) == 3
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    (tmp_path / ".lock").write_text(f"{dead} {socket.gethostname()}\n")
    assert try_lock(tmp_path) == 0


def test_eight_processes_never_hold_it_together(tmp_path: Path) -> None:
    """Each holder makes a file that must not exist yet; acquiring and releasing race for half a second."""

    def work() -> int:
        deadline, held = time.monotonic() + 0.5, 0
        while time.monotonic() < deadline:
            try:
                with FolderLock(tmp_path / "run"):
                    os.close(os.open(tmp_path / "alone", os.O_CREAT | os.O_EXCL))
                    os.unlink(tmp_path / "alone")
                    held += 1
            except CheckpointError:
                continue
        return 0 if held else 5

    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = work()
            finally:
                os._exit(status)
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert set(statuses) <= {0, 5}
    assert 0 in statuses
