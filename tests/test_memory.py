"""What this process keeps of the memory that it frees."""

import subprocess
import sys

import pytest
import torch

import args
import engines
from models.config import DalleConfig
from models.dalle import DALLE, TextToImage
from utils import memory

FAULTS = """
import resource, sys
from utils.memory import keep_freed_memory, return_freed_memory
kept = sys.argv[1] != "leave" and keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory()
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
    assert memory.keep_freed_memory() is False and memory.return_freed_memory() is False


def test_the_engine_keeps_it_as_long_as_it_encodes_images(monkeypatch):
    done = []
    monkeypatch.setattr("engines.native.keep_freed_memory", lambda: done.append("keep"))
    monkeypatch.setattr("engines.native.return_freed_memory", lambda: done.append("return"))
    monkeypatch.setattr("engines.native.image_codes", lambda vqgan, images: images)
    model = DalleConfig(
        num_text_tokens=8, num_image_tokens=8, text_seq_len=4, grid=2, dim=8, depth=1, heads=1, dim_head=4
    )
    for vqgan, expected in ((None, ["keep", "return"]), (torch.nn.Identity(), ["keep"])):
        done.clear()
        engine = engines.create(args.parse(["--config", "unit_test", "--generated-data", "--device", "cpu"]))
        for _ in range(2):
            engine.encode(torch.nn.Identity(), torch.zeros(1))
        engine.prepare(TextToImage(DALLE(model), vqgan))
        assert done == expected
