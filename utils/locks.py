"""Locks on files and folders: one process at a time writes there. A lock ends with its process: none is ever stale.

Not filelock: its last version for Python 3.8 empties the file that names the holder, and forks keep the lock.
"""
from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import weakref
from pathlib import Path
from typing import IO, Any, Iterator

from utils.errors import UserError
from utils.files import PathLike

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class Lock:
    """A lock that this process holds, until `close` or its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        _held.add(self)

    def close(self) -> None:
        """Release the lock. May be called again."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError, AttributeError):  # no locks here
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # now, even if a fork still has the file open
            self.forget()

    def forget(self) -> None:
        """Close without unlocking: in a forked process, unlocking would release the parent's lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_held):
        lock.forget()


# A worker that outlives its killed parent by some seconds must not hold its locks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def try_lock(path: PathLike) -> Lock | None:
    """Lock an existing folder, or a file, created if missing; None if another process holds the lock.

    The holder is written into the file; symbolic links are not followed. File systems without locks: logs a warning and
    proceeds. Raises OSError.
    """
    is_folder = os.path.isdir(path)
    new_file = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, os.O_RDONLY if is_folder else new_file, 0o666)
    if not _locked(descriptor, path, getattr(fcntl, "LOCK_NB", 0)):
        os.close(descriptor)
        return None
    if not is_folder:
        with contextlib.suppress(OSError):  # a full disk: the lock holds, but its file does not name the holder
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return Lock(descriptor)


def wait_for_lock(file: IO[Any]) -> None:
    """Lock an open file until it is closed, waiting for any other holder; no-op without file locks."""
    _locked(file.fileno(), file.name)


def _locked(descriptor: int, path: PathLike, more_flags: int = 0) -> bool:
    """Return False if another process holds the lock and the flags say not to wait; True also without file locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | more_flags)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        _warn(f"{path}: this file system has no locks ({error.strerror or error})")
    return True


@functools.lru_cache(maxsize=None)
def _warn(message: str) -> None:
    logger.warning("%s", message)


def holder(path: PathLike) -> str:
    """Return a description of the process that holds the lock on a file."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text(encoding="utf-8") or "another process"
    return "another process"


@contextlib.contextmanager
def only_writer(*folders: tuple[str, Path]) -> Iterator[None]:
    """Within the context, no other process can enter `only_writer` for these (flag, folder).

    Makes missing folders. Raises UserError that names flag, folder and the other process. A folder where no lock can be
    made is ignored: writing there will report the reason.
    """
    with contextlib.ExitStack() as held:
        known = set()
        for flag, folder in folders:
            if folder.resolve() in known:
                continue
            known.add(folder.resolve())
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = try_lock(folder / ".lock")
            except OSError:
                continue
            if lock is None:
                raise UserError(
                    "{} {}: {} is already writing there; wait for it, end it, or give another folder".format(
                        flag, folder, holder(folder / ".lock")
                    )
                )
            held.callback(lock.close)
        yield
