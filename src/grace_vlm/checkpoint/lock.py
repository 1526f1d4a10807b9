"""One writer a folder: the second process is refused, a dead one's lock is taken over.

The kernel holds the lock (POSIX record lock on ``.lock``), so it ends with its process however that dies, is not
inherited by forked data workers, and does not mistake a reused process id for the dead owner. The text in the file,
``pid host``, is for the message, and for two cases that the kernel cannot judge: a file system without locks (the pid
is looked up instead), and a lock left by another host, which is refused because its owner may be alive behind a mount
that does not share locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from grace_vlm.checkpoint.atomic import disk_errors, is_alive
from grace_vlm.errors import CheckpointError

LOCK = ".lock"
_held: set[str] = set()
"""Record locks do not exclude their own process: these folders are locked by this one."""


class FolderLock:
    """``with FolderLock(folder):`` — the only writer below ``folder`` (which is made if missing).

    Raises:
        CheckpointError: on entering, naming the process that holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.path = self.folder / LOCK
        self._descriptor = -1

    def __enter__(self) -> FolderLock:
        if str(self.path) in _held:
            raise self._refusal("this process")
        with disk_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._acquire()
        _held.add(str(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)  # while it is still locked: who waits for it sees the inode change
        os.close(self._descriptor)
        _held.discard(str(self.path))

    def _refusal(self, owner: str) -> CheckpointError:
        return CheckpointError(f"{self.folder} is in use by {owner}; wait for it, or write elsewhere")

    def _acquire(self) -> int:
        """A locked descriptor whose file is still the one named ``.lock``, with our pid and host in it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor)
                if self._is_current(descriptor):
                    text = f"{os.getpid()} {socket.gethostname()}\n".encode()
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, text, 0)
                    kept, descriptor = descriptor, -1
                    return kept
            finally:
                if descriptor != -1:
                    os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        """False if the owner of before deleted this very file while we waited for it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _lock(self, descriptor: int) -> None:
        pid, _, host = os.pread(descriptor, 1024, 0).decode("utf-8", "replace").strip().partition(" ")
        supported = True
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(f"process {pid or '?'} on {host or 'this machine'}") from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            supported = False
        if host and host != socket.gethostname():
            raise CheckpointError(
                f"{self.folder} is locked by process {pid} on {host}; if that one is gone, delete {self.path}"
            )
        if not supported and pid.isdecimal() and int(pid) != os.getpid() and is_alive(int(pid)):
            raise self._refusal(f"process {pid} on {host}")
