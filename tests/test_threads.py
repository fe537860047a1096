"""Threads that wait for each other leave their cores to others."""

import os
import subprocess
import sys

import pytest
from test_train import ROOT

from utils import threads

# How often a thread other than the main one went to sleep while the main one was busy for a millisecond at a time.
COUNT = """
import os, sys, time
import torch
from utils.threads import share_cores

def sleeps():
    total = 0
    for thread in os.listdir("/proc/self/task"):
        with open("/proc/self/task/{}/status".format(thread)) as status:
            lines = dict(line.split(":", 1) for line in status)
        total += int(lines["voluntary_ctxt_switches"]) if int(thread) != os.getpid() else 0
    return total

torch.set_num_threads(2)
x = torch.ones(1 << 16)
x.exp()  # PyTorch's threads are there before anything is set: as in a notebook
shares = share_cores()
assert share_cores() == shares  # once is enough
x.exp()
time.sleep(0.05)
before = sleeps()
for _ in range(100):
    x.exp()
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass
print(shares, sleeps() - before)
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
    assert int(count) < 20 if chosen else int(count) > 80
