"""Run one command: its output goes to files while it runs, a time limit ends it with everything it started.

The command gets its own session and a mark in its environment. Both, and the chain of parents, tell later which
processes are its descendants, also those (of torchrun, mpirun, poprun) that left the session or lost their parent.
"""

import logging
import os
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

logger = logging.getLogger(__name__)

MARK = "EXAMPLES_UTILS_MARK"
TIMED_OUT = 124  # as `timeout` of coreutils
GRACE = 5.0  # seconds between asking processes to end and ending them


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `exitcode` is negative after a signal, 124 after the time limit, 126 or 127 if it never
    began; `problem` then says why."""

    exitcode: int
    seconds: float
    problem: Optional[str] = None


class Output:
    """Copies pipes byte for byte, each to a file of its own and all to a shared one; knows the newest line."""

    def __init__(self, combined: IO[bytes]) -> None:
        self._combined = combined
        self._lock = threading.Lock()
        self._last = b""

    def copy(self, pipe: IO[bytes], path: Path) -> threading.Thread:
        """Start to copy `pipe` until its end; the thread returned ends with it."""
        thread = threading.Thread(target=self._copy, args=(pipe, path), daemon=True)
        thread.start()
        return thread

    def write(self, data: bytes) -> None:
        """Add to the shared file only."""
        with self._lock:
            self._combined.write(data)
            self._combined.flush()

    def last_line(self) -> str:
        """The newest line that is not blank; progress bars separate theirs with carriage returns."""
        with self._lock:
            text = self._last.decode("utf-8", errors="replace")
        lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
        return lines[-1].strip() if lines else ""

    def _copy(self, pipe: IO[bytes], path: Path) -> None:
        broken = False
        with open(str(path), "wb", buffering=0) as file, pipe:
            while True:
                data = os.read(pipe.fileno(), 1 << 16)  # returns what is there, without waiting for a full buffer
                if not data:
                    return
                with self._lock:
                    self._last = (self._last + data)[-4096:]
                try:
                    if not broken:
                        file.write(data)
                        self.write(data)
                except (OSError, ValueError) as error:
                    # A full disk: go on reading, or the command would wait for us for ever.
                    logger.error("cannot write %s, the rest of this output is lost: %s", path, error)
                    broken = True


def run(words: Sequence[str], cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path, output: Output,
        timeout: Optional[float] = None, period: float = 1.0,
        on_progress: Optional[Callable[[float, str], None]] = None) -> Outcome:
    """Run `words` in `cwd` with exactly `env`.

    stdout, stderr: files that get the two streams as they come.
    timeout: seconds until the command and all its descendants are ended (None: no limit).
    on_progress: called every `period` seconds with the seconds elapsed and the newest line of output.
    Whatever happens, also Ctrl-C here, no descendant is left running.
    """
    mark = uuid.uuid4().hex
    begin = time.monotonic()
    try:
        process = subprocess.Popen(list(words), cwd=str(cwd), env=dict(env, **{MARK: mark}), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    except (OSError, ValueError) as error:
        problem = "cannot start {}: {}".format(words[0], getattr(error, "strerror", None) or error)
        stdout.write_bytes(b"")
        stderr.write_bytes((problem + "\n").encode())
        output.write((problem + "\n").encode())
        return Outcome(127 if isinstance(error, FileNotFoundError) else 126, 0.0, problem)
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("a process without pipes")
    threads = [output.copy(process.stdout, stdout), output.copy(process.stderr, stderr)]
    exitcode: Optional[int] = None
    try:
        exitcode = _wait(process, begin, timeout, period, on_progress, output)
        seconds = time.monotonic() - begin
    finally:
        left = end_tree(process, mark)
        for thread in threads:
            thread.join(timeout=10)
    if exitcode is None:
        problem = "ended after the time limit of {:g} seconds".format(timeout or 0)
        _append(stderr, output, "\nTimeout ({:g})\n".format(timeout or 0))
        return Outcome(TIMED_OUT, seconds, problem)
    if left:
        logger.warning("%d processes that the command had left running were ended", left)
    if exitcode < 0:
        return Outcome(exitcode, seconds, "ended by signal {}".format(-exitcode))
    return Outcome(exitcode, seconds)


def _wait(process: "subprocess.Popen[bytes]", begin: float, timeout: Optional[float], period: float,
          on_progress: Optional[Callable[[float, str], None]], output: Output) -> Optional[int]:
    """Wait for the process; its exit status, or None when the time is over."""
    next_progress = begin + period
    while True:
        now = time.monotonic()
        if timeout is not None and now - begin >= timeout:
            return None
        until = min(next_progress, begin + timeout) if timeout is not None else next_progress
        try:
            return process.wait(timeout=max(until - now, 0.01))
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if now >= next_progress:
            next_progress = now + period
            if on_progress is not None:
                on_progress(now - begin, output.last_line())


def _append(stderr: Path, output: Output, text: str) -> None:
    with open(str(stderr), "ab") as file:
        file.write(text.encode())
    output.write(text.encode())


# The process tree ----------------------------------------------------------------------------------------------------


def end_tree(process: "subprocess.Popen[bytes]", mark: str) -> int:
    """End the process and all its descendants: SIGTERM, and SIGKILL for those that are still there after GRACE.

    Returns how many descendants (without the process itself) had to be ended.
    """
    victims: Set[int] = set()
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        until = time.monotonic() + patience
        signalled: Set[int] = set()
        while True:
            running = process.poll() is None
            alive = _tree(process.pid, mark, victims, running)
            for pid in alive - signalled:  # those too that were started meanwhile
                _signal(pid, number)
            signalled |= alive
            victims |= alive
            if not alive:
                return len(victims - {process.pid})
            if time.monotonic() >= until:
                break
            time.sleep(0.02)
    process.poll()
    return len(victims - {process.pid})


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError) as error:
        logger.debug("process %d: %s", pid, error)


def _tree(root: int, mark: str, known: Set[int], root_runs: bool) -> Set[int]:
    """Living processes of the session of `root`, their descendants, and those that carry the mark."""
    table = _processes()
    found = {pid for pid, (_, session) in table.items() if session == root or pid in known or _carries(pid, mark)}
    found.discard(root)
    if root_runs:  # else its number may already be another's
        found.add(root)
    while True:
        more = {pid for pid, (parent, _) in table.items() if parent in found} - found
        if not more:
            return found - {os.getpid()}
        found |= more


def _processes() -> Dict[int, Tuple[int, int]]:
    """{pid: (parent, session)} of all living processes; zombies are left out. Where there is no /proc: from ps."""
    table: Dict[int, Tuple[int, int]] = {}
    if Path("/proc/self/stat").exists():
        for entry in os.listdir("/proc"):
            fields = _stat(int(entry)) if entry.isdigit() else []
            if fields and fields[0] not in ("Z", "X"):
                table[int(entry)] = (int(fields[1]), int(fields[3]))
        return table
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], stdout=subprocess.PIPE,
                           universal_newlines=True, check=False).stdout.splitlines()
    for pid, parent, group, state in (line.split(None, 3) for line in lines if len(line.split()) >= 4):
        if not state.startswith("Z"):
            table[int(pid)] = (int(parent), int(group))
    return table


def _stat(pid: int) -> List[str]:
    """Fields of /proc/PID/stat from the state on (the name before it may hold anything); none if it has gone."""
    try:
        text = Path("/proc/{}/stat".format(pid)).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _carries(pid: int, mark: str) -> bool:
    """Whether the environment the process started with holds the mark (unreadable for other users' processes)."""
    try:
        return (MARK + "=" + mark).encode() in Path("/proc/{}/environ".format(pid)).read_bytes()
    except OSError:
        return False
