"""Atomic writing, checks of output paths, safe reading and content hashes."""
from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import uuid
from pathlib import Path
from typing import IO, Any, Iterator, Union

from utils.errors import UserError

PathLike = Union[str, "os.PathLike[str]"]

IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".bmp", ".webp", ".jfif", ".jpe", ".gif", ".tif", ".tiff")
"""Of two images with the same stem, the one whose suffix comes first here gets the captions."""

TEXT_SUFFIXES = (".txt", ".caption", ".cap")
"""Suffixes of caption files, the preferred one first."""


@contextlib.contextmanager
def atomic_write(path: PathLike, mode: str = "w", permissions: int = 0o666) -> Iterator[IO[Any]]:
    """Open a temporary file next to `path`; on success it replaces `path` atomically, on any error it is removed.

    Readers see the old file or the new one, never a partial one, also after a crash or with a full disk.
    Text is written as UTF-8 with "\\n" line ends. permissions: of the new file, before the umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = str(path.parent / f".{path.name[:100]}.{uuid.uuid4().hex[:16]}.tmp")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, permissions)  # mkstemp does not take them, and the umask is process-wide

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


def write_json(path: PathLike, content: Any, **settings: Any) -> None:
    """Write a JSON file, as `atomic_write` does, with these settings of `json.dumps`."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, **settings) + "\n")


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power loss, before anything older is deleted."""
    with contextlib.suppress(OSError):  # not supported by every file system
        descriptor = os.open(str(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(flag: str, folder: PathLike, shown: PathLike = "") -> Path:
    """Make a folder for results, before the work starts. Raises UserError if it is not writable.

    shown: the flag's value, if it is not the folder.
    """
    folder, where = Path(folder), f"{flag} {shown or folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((place for place in (folder, *folder.parents) if os.path.isfile(place)), None)
        reason = error.strerror or error if file is None else f"{file} is a file, not a folder"
        raise UserError(f"{where}: {reason}") from error
    if not os.access(str(folder), os.W_OK | os.X_OK):
        raise UserError(f"{where}: no permission to write there")
    return folder


def check_writable(flag: str, file: PathLike) -> None:
    """Make the folder of a file that will be written later. Raises UserError if it could not be written."""
    if Path(file).is_dir():
        raise UserError(f"{flag} {file}: is a folder, not a file")
    make_folder(flag, Path(file).parent, file)


@contextlib.contextmanager
def writing(what: str, path: PathLike) -> Iterator[None]:
    """Within the context an error of writing is a UserError that begins with `what` (the flag) and the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror or error}") from error


def open_regular(path: PathLike, more_flags: int = 0) -> IO[bytes]:
    """Open a regular file for reading bytes. Raises OSError, also for pipes and devices.

    Untrusted folders may hold those, and reading one may block or never end. more_flags: of os.open.
    """

    def opener(name: str, flags: int) -> int:
        # Opening a pipe would block until its other end is opened.
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
