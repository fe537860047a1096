"""How this process gets its memory from the system."""
from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any, Iterator

# Parameters of glibc's mallopt(3), and what they are without it; the thresholds, once large tensors were freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_TRIM_THRESHOLD: 64 * 2**20, _MMAP_THRESHOLD: 32 * 2**20, _MMAP_MAX: 65536}


def keep_freed_memory() -> bool:
    """Keep what is freed from now on for the next allocation, instead of giving it back to the system each time.

    glibc maps every large tensor anew, and the kernel then clears it page by page: a fifth of decoding or encoding an
    image of 256x256 pixels on a CPU. For what runs in rounds of the same tensors: what is kept fits the next round only
    roughly, and takes some 200 MB more there. A training step wins less than it takes. The process still frees
    everything when it ends. Returns whether it could be set: only with glibc, on Linux; elsewhere nothing changes.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`; what was kept is given back as soon as something else is freed."""
    libc = _glibc()
    if libc is not None:
        for parameter, value in _USUAL.items():
            libc.mallopt(parameter, value)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """`keep_freed_memory` within the context alone."""
    kept = keep_freed_memory()
    try:
        yield
    finally:
        if kept:
            return_freed_memory()


def _glibc() -> Any:
    """The C library, or None where it is another one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt  # noqa: B018  # raises where there is none
    except (OSError, AttributeError):
        return None
    return libc
