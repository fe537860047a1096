"""How this process's threads share cores with other processes."""
from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import threading
import time
from typing import Any, Callable

logger = logging.getLogger(__name__)

_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how threads wait."""

_INTERVAL = 0.1
"""Seconds between two measurements of how long the threads waited for a core."""

_BUSY, _QUIET = 0.1, 0.05
"""Seconds that threads waited for a core per second that they ran. Measured: 0.00 to 0.02 alone, 0.45 to 1.0 next to
one busy process or one per core, whether they spin or sleep."""

_WORK = 0.02
"""Seconds that the threads must have run before that ratio is meaningful."""

_OTHERS = 0.3
"""Cores that others use below which waiting is not their fault. An idle virtual core takes some 20 microseconds to
wake up, which Linux counts, too: a small model's threads, if they sleep, wait for half of the time that they run."""


@functools.lru_cache(maxsize=None)
def share_cores() -> bool:
    """While other processes use the cores, let OpenMP threads that wait for each other sleep. Returns whether they can.

    Next to busy processes, a thread spins until its time slice ends while its partner is not scheduled: two threads on
    two such cores then take 10 to 60 times as long as one. On an idle machine spinning is faster, by a fifth for a
    small model. OpenMP reads its environment when PyTorch is imported, which in a notebook was long ago, so this acts
    on the loaded library. GNU's spins a thousandth as long once there are more threads than cores, so a sleeping team
    of as many threads as cores is started and ended; Intel's and LLVM's have a function, called once.
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
                runtime.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                runtime.GOMP_parallel.restype = None
                watch = (functools.partial(_SleepingTeam, runtime), _schedule, _used, threading.Event().wait)
                threading.Thread(target=_watch, args=watch, name="share cores", daemon=True).start()
            done = True
        except (OSError, AttributeError, RuntimeError) as error:
            logger.debug("threads of %s keep spinning: %s", path, error)
    return done


def _loaded_runtimes() -> list[str]:
    """Paths of the OpenMP libraries loaded in this process."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and line.count("/")}
    return sorted(path for path in paths if os.path.basename(path).startswith(("libgomp", "libiomp", "libomp")))


def _watch(
    new_team: Callable[[], Any],
    schedule: Callable[[], dict[str, tuple[float, float]]],
    used: Callable[[], tuple[float, float]],
    wait: Callable[[float], Any],
) -> None:
    """Keep a sleeping team at first, while this process waits for others, and where Linux has no such statistics."""
    try:
        _keep_team(new_team, schedule, used, wait)
    except (OSError, RuntimeError) as error:  # no more threads can be started
        logger.debug("threads are left as they are: %s", error)


def _keep_team(
    new_team: Callable[[], Any],
    schedule: Callable[[], dict[str, tuple[float, float]]],
    used: Callable[[], tuple[float, float]],
    wait: Callable[[float], Any],
) -> None:
    team = new_team()
    before, used_before = schedule(), used()
    while before:
        wait(_INTERVAL)
        now, used_now = schedule(), used()
        both = now.keys() & before.keys()
        ran, waited = (sum(now[thread][i] - before[thread][i] for thread in both) for i in (0, 1))
        if ran < _WORK:
            continue
        seconds, all_ran = (used_now[i] - used_before[i] for i in (0, 1))
        alone = ran / 2 <= all_ran < ran + _OTHERS * seconds  # less than its own: a container's /proc/stat lacks some
        if waited > _BUSY * ran and not alone and not team.is_alive():
            team = new_team()
        elif (waited < _QUIET * ran or alone) and team.is_alive():
            team.end()
        before, used_before = now, used_now
    team.join()


def _schedule() -> dict[str, tuple[float, float]]:
    """{thread: (seconds run, seconds waited for a core)} of this process; empty without scheduler statistics."""
    times = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                ran, waited, _ = file.read().split()
        except (OSError, ValueError):
            continue  # the thread has ended, or the kernel has no statistics
        times[thread] = (int(ran) / 1e9, int(waited) / 1e9)
    return times if any(ran for ran, _ in times.values()) else {}


def _used() -> tuple[float, float]:
    """(seconds now, seconds that all processes ran on the cores of this one, or that it was stopped by a limit)."""
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    with open("/proc/stat") as file:
        lines = [line.split() for line in file]
    ticks = sum(int(line[kind]) for line in lines if line[0] in own for kind in (1, 2, 3))  # user, nice, system
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") + _stopped()


def _stopped() -> float:
    """Seconds for which a limit of time on its cores stopped this container: spinning would use up more of it."""
    for path, name, unit in (("", "throttled_usec", 1e-6), ("cpu/", "throttled_time", 1e-9)):  # cgroups v2, v1
        try:
            with open(f"/sys/fs/cgroup/{path}cpu.stat") as file:
                return int(dict(line.split() for line in file)[name]) * unit
        except (OSError, KeyError, ValueError):
            continue
    return 0.0


class _SleepingTeam(threading.Thread):
    """As many sleeping threads of the OpenMP library as there are cores. They end with the thread that started them."""

    def __init__(self, runtime: ctypes.CDLL) -> None:
        super().__init__(name="sleeping team", daemon=True)
        self._runtime = runtime
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        # The body of the region: any function without side effects.
        cores = len(os.sched_getaffinity(0))
        self._runtime.GOMP_parallel(self._runtime.omp_get_thread_num, None, cores + 1, 0)
        self._over.wait()

    def end(self) -> None:
        """End these threads, so that working threads spin again."""
        self._over.set()
        self.join()
