"""What this process keeps of the memory that it frees."""
from __future__ import annotations

import subprocess
import sys

import pytest

from utils import memory

FAULTS = """
import resource, sys
from utils.memory import freed_memory_kept, keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
if sys.argv[1] == "return":
    with freed_memory_kept():
        pass
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(9 << 20)
before = faults()
for _ in range(60):
    torch.ones(9 << 20)  # 38 MB
print(kept, faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_is_freed_is_used_again_without_asking_the_system():
    results = {}
    for how in ("keep", "leave", "return"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        kept, faults = done.stdout.split()
        results[how] = int(faults)
        if how == "keep" and kept == "False":
            pytest.skip("another C library")
    assert results["keep"] < min(results["leave"], results["return"]) / 3


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
    with memory.freed_memory_kept():
        pass
