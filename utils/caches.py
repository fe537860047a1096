"""Cache folders, and which of their files may be run as code.

    folder = cache_folder("dalle", "codes")                            # ~/.cache/dalle/codes
    folder = trusted_folder(cache_folder("dalle", "kernels"), 0o755)   # UntrustedError if others may change it
    with open_trusted(folder / name) as file: ...
"""
from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import IO

from utils.files import PathLike, open_regular

_MAX_LINKS = 40
"""Symbolic links in a path before it counts as a loop, as in Linux."""


def cache_folder(*names: str, holding: str | None = None) -> Path:
    """Return the folder of these names in $XDG_CACHE_HOME, or in ~/.cache if that is unset or relative.

    holding: a file that earlier versions always kept in ~/.cache; where it exists, that folder is used.
    Source: XDG Base Directory Specification 0.8, which says to ignore relative paths. Not platformdirs, whose last
    version for Python 3.8 accepts them, and which would move the caches on macOS.
    """
    root, default = os.environ.get("XDG_CACHE_HOME", ""), Path(os.path.expanduser("~/.cache"), *names)
    if not os.path.isabs(root) or (holding is not None and os.path.exists(str(default / holding))):
        return default
    return Path(root, *names)


class UntrustedError(OSError):
    """A user other than this one and root may change the file or folder."""


def trusted_folder(folder: PathLike, mode: int | None = None, shared: bool = False) -> Path:
    """Return the folder, its links resolved, if only this user and root may write to it or replace its path.

    mode: permissions of missing folders that are created; None: none are created. shared: accept a sticky folder such
    as /tmp, where others may add files but not change those of this user.
    Raises UntrustedError, and OSError where the folder is missing or out of reach.
    """
    path = _resolved(Path(os.path.abspath(str(folder))), mode, 0)
    _check(path, os.lstat(str(path)), passing=shared)
    return path


def open_trusted(path: PathLike) -> IO[bytes]:
    """Open a regular file in a trusted folder for reading. Raises UntrustedError and OSError; follows no links."""
    file = open_regular(path, getattr(os, "O_NOFOLLOW", 0))
    try:
        _check(path, os.fstat(file.fileno()))
    except UntrustedError:
        file.close()
        raise
    return file


def _resolved(path: Path, mode: int | None, links: int) -> Path:
    """Resolve an absolute path from the root down. No other user can change the part that is already checked."""
    if path == path.parent:
        _check(path, os.lstat(str(path)), passing=True)
        return path
    parent = _resolved(path.parent, mode, links)
    if path.name == "..":  # of a link
        return parent.parent
    path = parent / path.name
    if mode is not None and not os.path.lexists(str(path)):
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(str(path), mode)
    found = os.lstat(str(path))
    _check(path, found, passing=True)
    if stat.S_ISLNK(found.st_mode):
        if links == _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return _resolved(parent / os.readlink(str(path)), mode, links + 1)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def _check(path: PathLike, found: os.stat_result, passing: bool = False) -> None:
    """Raise UntrustedError if other users may write to it. passing: it is only a parent folder or link."""
    owners = {0, os.geteuid()}
    if passing:
        owners.add(os.lstat("/").st_uid)  # root under another id, in a container that maps users
    if found.st_uid not in owners:
        raise UntrustedError(errno.EPERM, f"belongs to another user (uid {found.st_uid})", str(path))
    harmless = stat.S_ISLNK(found.st_mode) or (passing and found.st_mode & stat.S_ISVTX)
    if found.st_mode & 0o022 and not harmless:
        mode = stat.S_IMODE(found.st_mode)
        raise UntrustedError(errno.EPERM, f"may be written by others (mode {mode:o})", str(path))
