"""Memory: neither it nor open files and processes grow over 2,000 steps or images; what is kept of freed memory."""
from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import flags, read_metrics, run, run_script

import args
from training.setup import build_parts
from utils import memory
from utils.loading import make_loader, read

GROWTH = 4.0
"""MB from the second quarter to the last that are no growth: what an allocator or a cache of a fixed size may take."""


def watch(server, pid, progress, total, seconds=1500):
    """Wait for a process; returns (progress, MB, open files, child processes) of many moments."""
    seen, deadline, proc = [], time.monotonic() + seconds, Path(f"/proc/{pid}")
    while True:
        try:
            status = (proc / "status").read_text()
            memory = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024
            children = (proc / f"task/{pid}/children").read_text().split()
            seen.append((progress(), memory, len(list((proc / "fd").iterdir())), len(children)))
        except (OSError, StopIteration):
            break  # it has ended
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.wait(pid) == 0
    return seen


def check(seen, total, what):
    quarters = [[row for row in seen if low <= row[0] / total < low + 0.25] for low in (0.25, 0.5, 0.75)]
    assert all(len(quarter) >= 5 for quarter in quarters), f"too few moments: {len(seen)}"
    memory = [statistics.median(row[1] for row in quarter) for quarter in quarters]
    files, children = ([max(row[column] for row in quarter) for quarter in quarters] for column in (2, 3))
    print(f"{what}: {len(seen)} moments, MB {memory}, open files {files}, processes {children}")
    assert memory[-1] - memory[0] < GROWTH, memory
    assert files[-1] <= files[0] and children[-1] <= children[0], (files, children)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_training_does_not_grow(server, folder, tmp_path, workers):
    """8 epochs of 256 steps, each with a loader of its own, validation and checkpoints."""
    options = flags(folder, tmp_path, "--generated-data", "--validation-folder", str(folder / "pairs"))
    options += ["--dataloader-workers", str(workers), "--epochs", "8", "--checkpoint-save-steps", "100"]
    pid = server.start([*options, "--keep-checkpoints", "2", "--ema-decay", "0.9"], tmp_path / "stderr.log")

    def steps():
        metrics = tmp_path / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    check(watch(server, pid, steps, 2048), 2048, f"training, {workers} workers")
    lines = read_metrics(tmp_path)
    assert lines[-2]["step"] == 2048 and lines[-1]["event"] == "validation"


class Watched(torch.utils.data.Dataset):
    """Reads pairs again and again, and says what the process that does it has taken: its id, MB and open files."""

    def __init__(self, pairs, length):
        self.pairs, self.length = pairs, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert self.pairs[index % len(self.pairs)][1].dtype == torch.uint8
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return torch.tensor([os.getpid(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))])


@pytest.mark.slow
def test_loading_does_not_grow(folder, tmp_path):
    """2,000 batches of one loader, in each of its two processes; `test_training_does_not_grow` watches the main one."""
    pairs = build_parts(args.parse(flags(folder, tmp_path))).train_set
    loader = make_loader(Watched(pairs, 8000), 2, batch_size=4, prefetch_factor=4)
    seen = torch.cat(list(read(loader))).double()  # (8000, 3)
    processes = seen[:, 0].unique()
    assert len(processes) == 2 and os.getpid() not in processes
    for process in processes:
        early, late = (rows[rows[:, 0] == process] for rows in (seen[2000:4000], seen[6000:]))
        memory = [float(rows[:, 1].median()) for rows in (early, late)]
        print(f"a loader process: MB {memory}, open files {late[:, 2].max():.0f}")
        # A batch on its way to the main process is an open file; how many wait there depends on who is faster.
        files = [float(rows[:, 2].median()) for rows in (early, late)]
        assert memory[1] - memory[0] < GROWTH and abs(files[1] - files[0]) <= 4


@pytest.mark.slow
def test_generation_does_not_grow(server, folder, tmp_path):
    """2,000 images of 250 captions."""
    run(folder, tmp_path, "--max-steps", "1")
    (tmp_path / "prompts.txt").write_text("".join(f"picture {number}\n" for number in range(250)))
    checkpoint = tmp_path / "ckpt/dalle_0_1.pt"
    options = ["--dalle_path", str(checkpoint), "--prompts_file", str(tmp_path / "prompts.txt"), "--num_images", "8"]
    options += ["--outputs_dir", str(tmp_path / "out"), "--device", "cpu", "--batch_size", "8"]
    pid = server.start(options, tmp_path / "stderr.log", script="generate")

    def folders():
        return len(list((tmp_path / "out").iterdir())) if (tmp_path / "out").exists() else 0

    check(watch(server, pid, folders, 250), 250, "generation")
    assert len(list((tmp_path / "out").glob("*/7.jpg"))) == 250 and torch.load(checkpoint, weights_only=True)


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
    for _ in range(60):
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
