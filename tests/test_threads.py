"""Threads that wait for each other leave their cores to others."""
from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import ClassVar

import pytest
from helpers import ROOT

from utils import threads

# A notebook's process, first beside one busy process for each core, then alone. Prints whether threads share the
# cores, how often a thread other than the main one went to sleep while the main one was busy for a millisecond at a
# time (beside busy processes), and whether the sleeping team is gone (alone).
COUNT = """
import os, subprocess, sys, threading, time
import torch
from utils.threads import share_cores

def sleeps():
    total = 0
    for thread in os.listdir("/proc/self/task"):
        with open("/proc/self/task/{}/status".format(thread)) as status:
            lines = dict(line.split(":", 1) for line in status)
        total += int(lines["voluntary_ctxt_switches"]) if int(thread) != os.getpid() else 0
    return total

def work_until(wanted):
    end = time.monotonic() + 60
    while any(t.name == "sleeping team" for t in threading.enumerate()) != wanted and time.monotonic() < end:
        x.exp()

torch.set_num_threads(2)
x = torch.ones(1 << 16)
x.exp()  # PyTorch's threads are there before anything is set: as in a notebook
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
try:
    shares = share_cores()
    assert share_cores() == shares  # once is enough
    end = time.monotonic() + 1
    while time.monotonic() < end:
        x.exp()
    work_until(shares)
    before = sleeps()
    for _ in range(50):
        x.exp()
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass
    count = sleeps() - before
finally:
    for process in busy:
        process.kill()
        process.wait()
print(shares, count)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux only")
@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "infinity"}], ids=["ours", "the user's"])
def test_threads_that_wait_go_to_sleep(chosen):
    environment = {name: value for name, value in os.environ.items() if name not in threads._CHOSEN}
    command = [sys.executable, "-c", COUNT]
    output = subprocess.run(command, env={**environment, **chosen}, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    shares, count = output.split()
    if not chosen and shares == b"False":
        pytest.skip("this PyTorch uses no OpenMP library that is known")
    assert shares == (b"False" if chosen else b"True")
    assert int(count) < 10 if chosen else int(count) > 40


class Team:
    """A sleeping team, which counts those that were begun."""

    begun: ClassVar[list] = []

    def __init__(self):
        self.begun.append(self)
        self.alive = True

    def is_alive(self):
        return self.alive

    def end(self):
        self.alive = False


def test_the_team_sleeps_only_while_others_want_the_cores():
    # Seconds that a thread ran and waited for a core, at each look, and whether the team is alive then.
    looks = [(1.0, 0.0), (2.0, 0.01), (3.0, 0.51), (3.01, 0.6), (4.0, 0.71), (5.0, 0.78), (6.0, 0.79), (6.001, 9.0),
             (7.0, 9.5), (8.0, 9.9), (9.0, 10.3), (10.0, 10.7)]  # fmt: skip
    alive = [True, True, False, True, True, True, True, False, False, True, False, False]
    # Seconds that other processes ran by then; from the tenth look on they do not, and the waits are not for them.
    others, seen = [1.0, 2.0, 3.0, 3.01, 4.0, 5.0, 6.0, 6.001, 7.0, 7.1, 7.2, 7.3], []

    class Over(Exception):
        pass

    def look():
        if len(seen) == len(looks):
            raise Over
        seen.append(Team.begun[-1].is_alive())
        return {"1": looks[len(seen) - 1]}

    def used():
        ran = looks[len(seen) - 1][0]
        return ran, ran + others[len(seen) - 1]

    with pytest.raises(Over):
        threads._watch(Team, look, used, lambda seconds: None)
    assert seen == alive and len(Team.begun) == 3


@pytest.mark.parametrize("all_ran, alive", [(1.0, [True, False, False]), (0.0, [True, True, True])])
def test_the_team_stays_where_proc_stat_lacks_what_this_process_ran(all_ran, alive):
    """As in containers that number their cores anew."""
    seen, team = [], Team()

    def look():
        seen.append(team.is_alive())
        if len(seen) == 4:
            raise OSError
        return {"1": (float(len(seen)), 0.5 * len(seen))}

    threads._watch(lambda: team, look, lambda: (float(len(seen)), all_ran * len(seen)), lambda seconds: None)
    assert seen[1:] == alive


def test_time_for_which_a_limit_stopped_a_container_counts_as_that_of_others(monkeypatch):
    files = {"/proc/stat": f"cpu{min(os.sched_getaffinity(0))} 0 0 0 0", "/sys/fs/cgroup/cpu.stat": "usage_usec 9"}
    monkeypatch.setattr(threads, "open", lambda path: io.StringIO(files.get(path, "throttled_time 1500000000")), False)
    assert threads._used()[1] == 1.5
    files["/sys/fs/cgroup/cpu.stat"] = "usage_usec 9\nthrottled_usec 500000\n"
    assert threads._used()[1] == 0.5
