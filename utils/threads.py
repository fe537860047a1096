"""How this process's threads share the cores with other processes."""

import ctypes
import functools
import logging
import os
import sys
import threading
from typing import List

logger = logging.getLogger(__name__)

_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables by which a user decides how threads wait."""


@functools.lru_cache(maxsize=None)
def share_cores() -> bool:
    """Let threads that wait for each other sleep soon, instead of spinning for milliseconds. Returns whether they do.

    Beside busy processes a thread spins until its time slice ends, while its partner is not scheduled: two threads on
    two such cores then take 10 to 60 times as long as one. OpenMP reads its environment when PyTorch is imported, which
    a notebook did long ago, so this works on the loaded library: GNU's spins a thousandth as long once there are more
    threads than cores, so a sleeping team of as many threads as cores is added; Intel's and LLVM's have a function.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _CHOSEN):
        return False
    done = False
    for path in _loaded_runtimes():
        try:
            runtime = ctypes.CDLL(path)
            if hasattr(runtime, "kmp_set_blocktime"):
                runtime.kmp_set_blocktime(0)
            else:
                _add_sleeping_team(runtime)
            done = True
        except (OSError, AttributeError, RuntimeError) as error:
            logger.debug("threads of %s go on spinning: %s", path, error)
    return done


def _loaded_runtimes() -> List[str]:
    """The files of the OpenMP libraries in this process."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and line.count("/")}
    return sorted(path for path in paths if os.path.basename(path).startswith(("libgomp", "libiomp", "libomp")))


def _add_sleeping_team(runtime: ctypes.CDLL) -> None:
    ready = threading.Event()

    def run() -> None:
        # Any function without effect is a body of the region. The team lives as long as the thread that began it.
        runtime.GOMP_parallel(runtime.omp_get_thread_num, None, len(os.sched_getaffinity(0)) + 1, 0)
        ready.set()
        threading.Event().wait()

    runtime.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    runtime.GOMP_parallel.restype = None
    threading.Thread(target=run, name="sleeping team", daemon=True).start()
    ready.wait(timeout=10)
