"""Run one command: its output goes to files while it runs, a time limit ends it with everything it started.

On Linux, what loses its parent meanwhile becomes a child of this process. So all descendants of the command are known,
also those (of torchrun, mpirun, poprun) that left its session or emptied their environment.
"""
from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Callable, Iterator, Mapping, NamedTuple, Sequence

import psutil

from log import RUNNER_MARK

logger = logging.getLogger(__name__)

TIMED_OUT = 124  # as `timeout` of coreutils
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
STREAMS = ("stdout", "stderr")


class Outcome(NamedTuple):
    """How a command ended. `exitcode` is negative after a signal, 124 after the time limit, 126 or 127 if it never
    began; `problem` then says why."""

    exitcode: int
    seconds: float
    problem: str = ""


def run(words: Sequence[str], cwd: Path, env: Mapping[str, str], logs: Path, combined: IO[bytes],
        timeout: float = math.inf, tick: Callable[[float], None] = lambda seconds: None) -> Outcome:
    """Run `words` in `cwd` with exactly `env`.

    logs: folder of `stdout` and `stderr`, files that get the two streams as they come; combined: an unbuffered file
    that gets both. timeout: seconds until the command and all its descendants are ended. tick: called every second with
    the seconds elapsed.
    Whatever happens, also Ctrl-C here, no descendant is left running.
    """
    exitcode: int | None = None
    begin, seconds = time.monotonic(), 0.0
    with _adopting_orphans(), contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(_copied(logs / name, combined)) for name in STREAMS)
        others = _descendants()
        try:
            process = subprocess.Popen(words, cwd=cwd, env={**env, RUNNER_MARK: "1"}, stdin=subprocess.DEVNULL,
                                       stdout=out, stderr=err, start_new_session=True)
        except (OSError, ValueError) as error:
            problem = f"cannot start {words[0]}: {getattr(error, 'strerror', None) or error}"
            err.write(f"{problem}\n".encode())
            return Outcome(127 if isinstance(error, FileNotFoundError) else 126, 0.0, problem)
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
            return Outcome(TIMED_OUT, seconds, f"ended after the time limit of {timeout:g} seconds")
    if left:
        logger.warning("processes that the command left running, now ended: %d", left)
    return Outcome(exitcode, seconds, f"ended by signal {-exitcode}" if exitcode < 0 else "")


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


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    prctl, child_subreaper = getattr(ctypes.CDLL(None), "prctl", lambda *_: None), 36
    prctl(child_subreaper, 1)
    try:
        yield
    finally:
        prctl(child_subreaper, 0)


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(others: set[psutil.Process]) -> int:
    """End all descendants but the others: SIGTERM, and SIGKILL for those that are still there after GRACE.

    Returns how many there were.
    """
    victims: set[psutil.Process] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        signalled: set[psutil.Process] = set()
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            _, alive = psutil.wait_procs((victims | _descendants()) - others, timeout=0.02)
            for victim in set(alive) - signalled:  # those too that were started meanwhile
                with contextlib.suppress(psutil.Error):
                    victim.send_signal(number)
            if not alive:
                return len(victims)
            signalled.update(alive)
            victims.update(alive)
    return len(victims)
