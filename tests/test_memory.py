"""What this process keeps of the memory that it frees."""
from __future__ import annotations

import sys

import pytest
from helpers import run_script

from utils import memory

FAULTS = """
import os, resource
import torch
from utils.memory import freed_memory_kept, keep_freed_memory
for how in ("keep", "leave", "return"):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    kept = how == "keep" and keep_freed_memory()
    if how == "return":
        with freed_memory_kept():
            pass
    torch.ones(9 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(15):
        torch.ones(9 << 20)  # 38 MB
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_is_freed_is_used_again_without_asking_the_system():
    done = run_script("-c", FAULTS, OMP_NUM_THREADS="1")
    (kept, keep), (_, leave), (_, returned) = (line.split() for line in done.stdout.splitlines())
    if kept == "False":
        pytest.skip("another C library")
    assert int(keep) < min(int(leave), int(returned)) / 3


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
    with memory.freed_memory_kept():
        pass
