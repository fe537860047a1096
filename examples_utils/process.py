"""Run one command: its output goes to files while it runs, a time limit ends it with everything it started.

The command gets its own session and a mark in its environment. Both, and the chain of parents, tell later which
processes are its descendants, also those (of torchrun, mpirun, poprun) that left the session or lost their parent.
"""
from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import psutil
from tqdm import tqdm

from log import RUNNER_MARK

logger = logging.getLogger(__name__)

TIMED_OUT = 124  # as `timeout` of coreutils
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
GC_MONITOR = "gc-monitor"  # a program of the Poplar SDK


class Outcome(NamedTuple):
    """How a command ended. `exitcode` is negative after a signal, 124 after the time limit, 126 or 127 if it never
    began; `problem` then says why."""

    exitcode: int
    seconds: float
    problem: str | None = None


def run(words: Sequence[str], cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path, combined: IO[bytes],  # noqa: PLR0913
        timeout: float = math.inf, period: float = 1.0,
        on_progress: Callable[[float, str], None] = lambda seconds, line: None) -> Outcome:
    """Run `words` in `cwd` with exactly `env`.

    stdout, stderr: files that get the two streams as they come; combined: an unbuffered file that gets both.
    timeout: seconds until the command and all its descendants are ended.
    on_progress: called every `period` seconds with the seconds elapsed and the newest line of output.
    Whatever happens, also Ctrl-C here, no descendant is left running.
    """
    for path in (stdout, stderr):
        path.write_bytes(b"")
    mark, tail, begin, seconds = uuid.uuid4().hex, bytearray(), time.monotonic(), 0.0
    try:
        process = subprocess.Popen(words, cwd=cwd, env={**env, RUNNER_MARK: mark}, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    except (OSError, ValueError) as error:
        problem = f"cannot start {words[0]}: {getattr(error, 'strerror', None) or error}"
        _append(problem + "\n", stderr, combined)
        return Outcome(127 if isinstance(error, FileNotFoundError) else 126, 0.0, problem)
    threads = [threading.Thread(target=_copy, args=(pipe, path, combined, tail), daemon=True)
               for pipe, path in ((process.stdout, stdout), (process.stderr, stderr))]
    exitcode: int | None = None
    try:
        for thread in threads:
            thread.start()
        while exitcode is None and seconds < timeout:
            try:
                exitcode = process.wait(min(period, timeout - seconds))
            except subprocess.TimeoutExpired:
                # Progress bars separate their lines with carriage returns.
                said = [line.strip() for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
                on_progress(time.monotonic() - begin, said[-1] if said else "")
            seconds = time.monotonic() - begin
    finally:
        left = end_tree(process, mark)
        for thread in threads:
            thread.join(timeout=10)
    if exitcode is None:
        _append(f"\nTimeout ({timeout:g})\n", stderr, combined)
        return Outcome(TIMED_OUT, seconds, f"ended after the time limit of {timeout:g} seconds")
    if left:
        logger.warning("processes that the command left running, now ended: %d", left)
    return Outcome(exitcode, seconds, f"ended by signal {-exitcode}" if exitcode < 0 else None)


def _copy(pipe: IO[bytes], path: Path, combined: IO[bytes], tail: bytearray) -> None:
    """Copy a pipe to its end, byte for byte as it comes; `tail` keeps the newest bytes."""
    with pipe, open(path, "ab", buffering=0) as file:
        targets = [file, combined]
        for data in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
            tail[:] = (tail + data)[-4096:]
            try:
                for target in targets:
                    target.write(data)
            except (OSError, ValueError) as error:
                # A full disk: go on reading, or the command would block on a full pipe.
                logger.error("cannot write %s, the rest of this output is lost: %s", path, error)
                targets = []


def _append(text: str, stderr: Path, combined: IO[bytes]) -> None:
    with open(stderr, "ab") as file:
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


def printable(text: str) -> str:
    """The output of a command without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


@contextlib.contextmanager
def progress(name: str, period: float | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the `period` and `on_progress` of `run` that show time and newest line: on a terminal (every second) in
    one line that is overwritten, else (every minute) in the log."""
    def show(seconds: float, line: str) -> None:
        elapsed = timedelta(seconds=int(seconds))
        if bar.disable:
            logger.info("    %s running for %s: %s", name, elapsed, line)
        else:
            text = printable(f"    {name} {elapsed}  {line}")
            bar.set_description_str(text[:shutil.get_terminal_size().columns - 1])

    with tqdm(bar_format="{desc}", disable=None, leave=False, file=sys.stderr) as bar:
        yield {"period": period or (60.0 if bar.disable else 1.0), "on_progress": show}


@contextlib.contextmanager
def ipu_monitor(path: Path, period: float = 5.0) -> Iterator[None]:
    """While the context lasts, append what `gc-monitor --json` says every `period` seconds to `path`, one line each."""
    end = threading.Event()

    def watch() -> None:
        try:
            with open(path, "w", encoding="utf-8", buffering=1) as file:
                while not end.is_set():
                    said = subprocess.check_output([GC_MONITOR, "--json"], stderr=subprocess.DEVNULL, timeout=60)
                    stamp = f"{datetime.now():%Y-%m-%d-%H.%M.%S.%f}"
                    file.write(json.dumps({"timestamp": stamp, **json.loads(said)}) + "\n")
                    end.wait(period)
        except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
            logger.warning("--gc-monitor stops: %s", error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(timeout=10)
