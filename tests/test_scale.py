"""generate.py and evaluate.py in several processes: who does what, layouts, what is kept when a run is resumed."""
from __future__ import annotations

import contextlib
import json
import re
import signal
import tarfile

import pytest
import torch
from helpers import refused
from tiny_model import TinyModel
from torch.distributed import TCPStore

import generate
from utils.processes import Processes

VOLATILE = ("images_per_second", "codes_per_pass", "window")  # of the process that completed a folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TinyModel(tmp_path_factory.mktemp("model"))


@pytest.fixture
def flags(model):
    """The flags of generate.py for 40 images, and more."""

    def flags(out, more=""):
        words = f"--num-images 20 --batch-size 3 --top-k 0 --device cpu --format png {more}".split()
        return ["--dalle-path", str(model.dalle), "--text", "a cat|dog", "--outputs-dir", str(out), *words]

    return flags


@pytest.fixture
def processes(server):
    """Run a program in several processes as torchrun does, whose agent outlives them; returns statuses and logs."""

    def run(argv, folder, count, script="generate", kill=()):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
        common.update(TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1")
        logs = [folder / f"{script}-{count}-{rank}.log" for rank in range(count)]
        kills = [*kill, *[None] * (count - len(kill))]
        pids = [
            server.start(argv, log, kills[rank], script, RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank, log in enumerate(logs)
        ]
        statuses = [server.wait(pid, 60) for pid in pids]
        return statuses, [log.read_text() for log in logs]

    return run


def tree(folder):
    """{name: bytes} of all files; reports without what depends on the process that completed them."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith("generation.json")]:
        report = json.loads(found[name])
        found[name] = {key: value for key, value in report.items() if key not in VOLATILE}
    return found


LAYOUTS = ["folders", "folders --keep 4", "flat", "tar --images-per-shard 7", "tar --keep 4 --images-per-shard 9"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_on_two_processes_and_resumed_on_three(layout, flags, processes, tmp_path):
    """At image 17 of 40: what is there is kept, the rest is sampled once, and all bytes are those of one process."""
    more = f"--layout {layout}"
    generate.main(flags(tmp_path / "whole", more))
    out = tmp_path / "out"
    kill = [("dalle.journal:Journal.append", count, "after") for count in (8, 9)]
    statuses, logs = processes(flags(out, more), tmp_path, 2, kill=kill)
    assert statuses == [-signal.SIGKILL] * 2, logs
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert not list(out.rglob("*.tar")) or "tar" in layout
    statuses, logs = processes(flags(out, f"{more} --resume"), tmp_path, 3)
    assert statuses == [0] * 3, logs
    assert "--resume: 17 of 40 images are there" in logs[0] and "40 images" not in logs[1]
    assert tree(out) == tree(tmp_path / "whole")
    left = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert left == {path: before[path] for path in left}
    if layout == "flat":
        assert len(before) == 17 and left == before
    # Complete: nothing is sampled, and nothing changes.
    generate.main(flags(out, f"{more} --resume"))
    assert tree(out) == tree(tmp_path / "whole")
