"""Files that are either complete or absent: atomic writing and content hashes."""
from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import uuid
from pathlib import Path
from typing import IO, Any, Iterator, Union

PathLike = Union[str, "os.PathLike[str]"]

IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".bmp", ".webp", ".jfif", ".jpe", ".gif", ".tif", ".tiff")
"""Of two images with one name, the suffix that comes first here has the captions."""

TEXT_SUFFIXES = (".txt", ".caption", ".cap")
"""Suffixes of caption files, the preferred one first."""


@contextlib.contextmanager
def atomic_write(path: PathLike, mode: str = "w", permissions: int = 0o666) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it replaces `path` in one step, on any error it is removed.

    A reader therefore sees the old file or the new one, never half of one, also after a crash or a full disk.
    Text is written as UTF-8 with "\\n" line ends. permissions: of the new file, less the umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = str(path.parent / f".{path.name[:100]}.{uuid.uuid4().hex[:16]}.tmp")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, permissions)  # mkstemp would not take them, and the umask is not one thread's own

    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    opened = open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline, opener=opener)
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, str(path))
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _sync_folder(folder: Path) -> None:
    """Let a new name in a folder survive a loss of power, before anything older is deleted."""
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(str(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: PathLike, more_flags: int = 0) -> IO[bytes]:
    """Open a plain file for reading bytes. Raises OSError, also for pipes and devices.

    Those lie in folders from anywhere, and reading one can wait for ever or never end. more_flags: of os.open.
    """

    def opener(name: str, flags: int) -> int:
        # Opening a pipe would wait for its other end.
        return os.open(name, flags | more_flags | getattr(os, "O_NONBLOCK", 0))

    file = open(str(path), "rb", opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return file


def sha256_file(path: PathLike) -> str:
    """Return the sha256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
