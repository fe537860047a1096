"""How this process gets memory from the system."""
from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any, Iterator

# Parameters of glibc's mallopt(3) and their defaults; of the thresholds, those reached once large tensors were freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM_THRESHOLD: 64 * 2**20, _MMAP_THRESHOLD: 32 * 2**20, _MMAP_MAX: 65536}


def keep_freed_memory() -> bool:
    """Keep freed memory for the next allocation, instead of returning it to the system each time.

    glibc maps new pages for every large tensor, and the kernel zeroes them: a fifth of the time of decoding or encoding
    a 256x256 image on a CPU. Meant for loops over the same tensor sizes; fragmentation costs some 200 MB there. A
    training step gains less than it costs. Returns whether it was set: only with glibc on Linux.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`; the memory kept is returned at the next free."""
    libc = _glibc()
    if libc is not None:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """`keep_freed_memory` within the context only."""
    kept = keep_freed_memory()
    try:
        yield
    finally:
        if kept:
            return_freed_memory()


def _glibc() -> Any:
    """The C library, or None if it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt  # noqa: B018  # raises where it is missing
    except (OSError, AttributeError):
        return None
    return libc
