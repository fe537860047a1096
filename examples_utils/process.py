"""Run one command: its output goes to files while it runs, a time limit ends it with everything it started.

The command gets its own session and a mark in its environment. Both, and the chain of parents, tell later which
processes are its descendants, also those (of torchrun, mpirun, poprun) that left the session or lost their parent.
"""
from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Callable, Mapping, NamedTuple, Sequence

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
    for name in STREAMS:
        (logs / name).write_bytes(b"")
    mark, begin, seconds = uuid.uuid4().hex, time.monotonic(), 0.0
    exitcode: int | None = None
    try:
        process = subprocess.Popen(words, cwd=cwd, env={**env, RUNNER_MARK: mark}, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    except (OSError, ValueError) as error:
        problem = f"cannot start {words[0]}: {getattr(error, 'strerror', None) or error}"
        _append(problem + "\n", logs, combined)
        return Outcome(127 if isinstance(error, FileNotFoundError) else 126, 0.0, problem)
    threads = [threading.Thread(target=_copy, args=(getattr(process, name), logs / name, combined), daemon=True)
               for name in STREAMS]
    try:
        for thread in threads:
            thread.start()
        while exitcode is None and seconds < timeout:
            tick(seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                exitcode = process.wait(min(1.0, timeout - seconds))
            seconds = time.monotonic() - begin
    finally:
        left = end_tree(process, mark)
        for thread in threads:
            thread.join(timeout=10)
    if exitcode is None:
        _append(f"\nTimeout ({timeout:g})\n", logs, combined)
        return Outcome(TIMED_OUT, seconds, f"ended after the time limit of {timeout:g} seconds")
    if left:
        logger.warning("processes that the command left running, now ended: %d", left)
    return Outcome(exitcode, seconds, f"ended by signal {-exitcode}" if exitcode < 0 else "")


def _copy(pipe: IO[bytes], path: Path, combined: IO[bytes]) -> None:
    """Copy a pipe to its end, byte for byte as it comes."""
    with pipe, open(path, "ab", buffering=0) as file:
        targets = [file, combined]
        for data in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
            try:
                for target in targets:
                    target.write(data)
            except (OSError, ValueError) as error:
                # A full disk: go on reading, or the command would block on a full pipe.
                logger.error("cannot write %s, the rest of this output is lost: %s", path, error)
                targets = []


def _append(text: str, logs: Path, combined: IO[bytes]) -> None:
    with open(logs / "stderr", "ab") as file:
        for target in (file, combined):
            target.write(text.encode())


def end_tree(root: subprocess.Popen[bytes], mark: str) -> int:
    """End the process and all its descendants: SIGTERM, and SIGKILL for those that are still there after GRACE.

    Returns how many descendants (without the process itself) had to be ended.
    """
    victims: set[psutil.Process] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + GRACE
        signalled: set[psutil.Process] = set()
        while time.monotonic() < until and (alive := _tree(root, mark, victims)):
            for victim in alive - signalled:  # those too that were started meanwhile
                with contextlib.suppress(psutil.Error):
                    victim.send_signal(number)
            signalled |= alive
            victims |= alive
            time.sleep(0.02)
    return sum(victim.pid != root.pid for victim in victims)


def _tree(root: subprocess.Popen[bytes], mark: str, known: set[psutil.Process]) -> set[psutil.Process]:
    """Living processes of the session of `root`, those that carry the mark or are known, and their descendants."""
    found, alive = set(known), set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # Where the root has ended, its number may already be another's.
            if process.status() != psutil.STATUS_ZOMBIE and (process.pid != root.pid or root.poll() is None):
                alive.add(process)
                if process in found or os.getsid(process.pid) == root.pid or process.environ().get(RUNNER_MARK) == mark:
                    found |= {process, *process.children(recursive=True)}
    return found & alive
