"""How this process gets its memory from the system."""

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep what is freed from now on for the next allocation, instead of giving it back to the system each time.

    glibc maps every large tensor anew, and the kernel then clears it page by page: a fifth of decoding an image of
    256x256 pixels on a CPU. For what runs in rounds of the same tensors, like drawing: what is kept fits the next round
    only roughly, and takes some 200 MB more there. A training step wins less than it takes. The process still frees
    everything when it ends. Returns whether it could be set: only with glibc, on Linux; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
