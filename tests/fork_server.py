"""Runs train.py in forked processes, each in milliseconds instead of the seconds that importing PyTorch takes.

As a program it is the server: JSON lines in, JSON lines out. It has never run a model itself, so that a fork is safe.

    with ForkServer() as server:
        pid = server.start(["--config", "unit_test"], log=path, RANK="0")
        status = server.wait(pid)            # exit status, or minus the signal that ended it
"""
from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import json
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class ForkServer:
    def __init__(self):
        self.seconds = {}  # process id -> CPU time that an ended process took

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        self._process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)
        return self

    def __exit__(self, *_):
        self._process.stdin.write("null\n")  # closing it would not do: another child of this process may hold it open
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv, log, kill=None, script="train", largest_file=None, **environment):
        """Start the program, without the rights of root; stderr goes to the end of `log`.

        kill: ("module:name", n, "before" or "after", signal): sent by the process to itself at the n-th call of this
        function; SIGKILL if not given. The name of an exception instead of a signal: raised there.
        largest_file: bytes; writing beyond them is an error of the system.
        """
        request = {"argv": argv, "log": str(log), "kill": kill, "script": script, "largest_file": largest_file}
        return self._ask(environment=environment, **request)

    def start_all(self, argv, logs, kills=(), agent=None, **more):
        """Start a process for each log, as torchrun would. agent: the store of its agent, which outlives them."""
        from helpers import free_port
        common = {"WORLD_SIZE": str(len(logs)), "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = str(agent.port if agent else free_port())
        common.update({"TORCHELASTIC_USE_AGENT_STORE": "True"} if agent else {}, **more)
        return [
            self.start(argv, log, kill, RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank, (log, kill) in enumerate(itertools.zip_longest(logs, kills))
        ]

    def together(self, argv, folder, count=2, **more):
        """Run so many processes to their good end; return what each wrote."""
        logs = [folder / f"process{rank}.log" for rank in range(count)]
        pids = self.start_all(argv, logs, **more)
        statuses, written = [self.wait(pid) for pid in pids], [log.read_text() for log in logs]
        assert statuses == [0] * count, written
        return written

    def kill_after(self, pid, cpu_seconds, seconds=600):
        """SIGKILL when the process has used so much CPU time: a moment that other work on the machine does not move."""
        deadline, ticks = time.monotonic() + seconds, os.sysconf("SC_CLK_TCK")
        while True:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if state == "Z":
                return  # it has ended
            if int(fields[10]) + int(fields[11]) >= ticks * cpu_seconds:  # in the system and outside it, all threads
                os.kill(pid, signal.SIGKILL)
                return
            assert time.monotonic() < deadline, f"process {pid} does not go on"
            time.sleep(0.001)

    def wait(self, pid, seconds=600):
        """Return the exit status; the process is killed, and TimeoutError raised, when it takes longer."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self._ask(poll=pid)
            if ended is not None:
                status, self.seconds[pid] = ended
                return status
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"process {pid} did not end within {seconds} s")
            time.sleep(0.02)


def _end(how):
    if isinstance(how, int):
        return os.kill(os.getpid(), how)
    from utils.errors import UserError
    kinds = {kind.__name__: kind for kind in (UserError, RuntimeError, SystemExit, KeyboardInterrupt)}
    raise kinds[how]("as the test wants it")


def _kill_at(target, count, when, how=signal.SIGKILL):
    place, name = re.fullmatch(r"(.+)[:.](\w+)", target).groups()
    owner = pkgutil.resolve_name(place)
    function, calls = getattr(owner, name), itertools.count(1)

    def counting(*args, **kwargs):
        now = next(calls) == count
        if now and when == "before":
            _end(how)
        result = function(*args, **kwargs)
        if now and when == "after":
            _end(how)
        return result

    setattr(owner, name, counting)


def be_ordinary():
    """Give up root's right to write what nobody may write (capset(2): all capabilities)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)())


def _run(request):
    os.setsid()
    sys.stdin = open(os.devnull)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    script = importlib.import_module(request["script"])
    sys.argv = [request["script"] + ".py", *request["argv"]]
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    be_ordinary()
    if request["kill"]:
        _kill_at(*request["kill"])
    from utils.errors import run_main
    run_main(script.main)


def _serve():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    # torch._dynamo: what the first optimizer imports; torch.distributed.fsdp: what --shard does.
    for name in ("training.command", "engines.native", "torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:  # the first curve reads fonts
        lines = Path(folder, "metrics.jsonl")
        lines.write_text('{"event": "train", "step": 1, "loss": 1.0}\n')
        importlib.import_module("log").plot_losses(lines, Path(folder, "loss.png"))
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            return
        if "poll" in request:
            pid, status, used = os.wait4(request["poll"], os.WNOHANG)
            status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            answer = [status, used.ru_utime + used.ru_stime] if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                _run(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
