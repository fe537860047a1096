"""Run one command: its output goes to files while it runs, a time limit ends it with everything it started.

On Linux, what loses its parent becomes a child of this process. So all descendants of the command are known, also those
(of torchrun, mpirun, poprun) that left its session or emptied their environment; elsewhere orphans are known by theirs.
"""
from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Callable, Iterator, Mapping, Sequence

import psutil

from log import RUNNER_MARK

logger = logging.getLogger(__name__)

TIMED_OUT = 124  # as `timeout` of coreutils
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
LINUX = sys.platform == "linux"


def run(words: Sequence[str], cwd: Path, env: Mapping[str, str], logs: Path, combined: IO[bytes],
        timeout: float = math.inf,
        tick: Callable[[float], None] = lambda seconds: None) -> tuple[int, float, str]:
    """Run `words` in `cwd` with exactly `env`. Whatever happens, also Ctrl-C here, no descendant is left running.

    logs: folder of `stdout` and `stderr`, files that get the two streams as they come; combined: an unbuffered file
    that gets both. timeout, tick: seconds until all is ended; called every second with those elapsed.
    Returns the exit status (negative after a signal, 124 after the time limit, 126 or 127 if the command never began),
    the seconds, and why it ended if the status does not tell.
    """
    if LINUX:
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    exitcode: int | None = None
    begin, seconds = time.monotonic(), 0.0
    with _copied(logs / "stdout", combined) as out, _copied(logs / "stderr", combined) as err:
        others = _descendants()
        try:
            process = subprocess.Popen(words, cwd=cwd, env={**env, RUNNER_MARK: str(os.getpid())}, stdout=out,
                                       stderr=err, stdin=subprocess.DEVNULL, start_new_session=True)
        except (OSError, ValueError) as error:
            problem = f"cannot start {words[0]}: {getattr(error, 'strerror', None) or error}"
            err.write(f"{problem}\n".encode())
            return 127 if isinstance(error, FileNotFoundError) else 126, 0.0, problem
        try:
            while exitcode is None and seconds < timeout:
                tick(seconds)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    exitcode = process.wait(min(1.0, timeout - seconds))
                seconds = time.monotonic() - begin
        finally:
            left = _end(others)
        if exitcode is None:
            err.write(f"\nTimeout ({timeout:g})\n".encode())
            return TIMED_OUT, seconds, f"ended after the time limit of {timeout:g} seconds"
    if left:
        logger.warning("processes that the command left running, now ended: %d", left)
    return exitcode, seconds, f"ended by signal {-exitcode}" if exitcode < 0 else ""


@contextlib.contextmanager
def _copied(path: Path, combined: IO[bytes]) -> Iterator[IO[bytes]]:
    """A pipe whose content goes to both files as it comes, read on where a disk is full."""
    path.write_bytes(b"")
    copier = subprocess.Popen(["tee", path], stdin=subprocess.PIPE, stdout=combined, start_new_session=True, bufsize=0)
    try:
        yield copier.stdin  # type: ignore[misc]
    finally:
        copier.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):  # what cannot be killed may hold the pipe open
            copier.wait(10)


def _descendants() -> set[psutil.Process]:
    marked = () if LINUX else psutil.process_iter(["environ"])
    return {*psutil.Process().children(recursive=True),
            *(process for process in marked if (process.info["environ"] or {}).get(RUNNER_MARK) == str(os.getpid()))}


def _end(others: set[psutil.Process]) -> int:
    """End all descendants but the others, also those started meanwhile, and return how many there were."""
    victims: dict[psutil.Process, int] = {}  # and the last signal that each got
    begin = time.monotonic()
    while time.monotonic() < begin + 2 * GRACE:
        _, alive = psutil.wait_procs({*victims, *_descendants()} - others, timeout=0.02)
        if not alive:
            break
        number = signal.SIGTERM if time.monotonic() < begin + GRACE else signal.SIGKILL
        for victim in alive:
            if victims.get(victim) != number:
                victims[victim] = number
                with contextlib.suppress(psutil.Error):
                    victim.send_signal(number)
    return len(victims)
