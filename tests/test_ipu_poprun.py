"""Two real processes, as poprun starts them, train what one process trains: batches, weights, metrics, files, resume.

PopTorch, popdist and horovod are stand-ins; what passes between the processes, goes through torch.distributed.

    python tests/test_ipu_poprun.py INDEX COUNT STORE FLAG...      one of the processes; the tests start them
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import poptorch_stand_in
import poptorch_stand_in_device as device
import pytest
import torch
import torch.distributed as dist
from test_ipu_train import flags, folder, newest, run  # noqa: F401 (folder is a fixture)

import args
import engines
import log
import train

ROOT = Path(__file__).resolve().parents[1]


class Horovod(types.ModuleType):
    """The functions of horovod.torch that the engine calls."""

    def __init__(self, index, count, store):
        super().__init__("horovod.torch")
        self.index, self.count, self.store = index, count, store

    def init(self):
        dist.init_process_group("gloo", init_method="file://" + self.store, rank=self.index, world_size=self.count)

    def broadcast(self, tensor, root_rank):
        tensor = tensor.clone()
        dist.broadcast(tensor, root_rank)
        return tensor

    def broadcast_parameters(self, parameters, root_rank):
        for value in parameters.values():
            dist.broadcast(value.detach().as_subclass(torch.Tensor), root_rank)

    def allreduce(self, tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor / self.count


def install(monkeypatch, index, count, store):
    """Let this process be one of `count`, with one replica each."""
    poptorch_stand_in.install(monkeypatch)
    horovod = Horovod(index, count, store)
    popdist, options = types.ModuleType("popdist"), types.ModuleType("popdist.poptorch")
    popdist.isPopdistEnvSet = lambda: True
    popdist.getNumTotalReplicas = popdist.getNumInstances = lambda: count
    popdist.getNumLocalReplicas = lambda: 1
    popdist.getInstanceIndex = lambda: index
    options.Options = lambda ipus_per_replica: poptorch_stand_in.Options()
    modules = {"popdist": popdist, "popdist.poptorch": options, "horovod.torch": horovod}
    modules["horovod"] = types.ModuleType("horovod")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    update, call = device.Executor._update, device.Executor.__call__

    def reduced_update(self):
        """Gradients are reduced on the devices, not by the hosts."""
        for parameter in self._device_optimizer_parameters():
            if parameter.grad is not None:
                parameter.grad = horovod.allreduce(parameter.grad)
        update(self)

    def own_random_call(self, *inputs):
        """Each process's replicas have a random state of their own."""
        result = call(self, *inputs)
        self._cached_rng_state[1] += 1000 * index
        return result

    monkeypatch.setattr(device.Executor, "_update", reduced_update)
    monkeypatch.setattr(device.Executor, "__call__", own_random_call)


def worker(index, count, store, words):
    """Do what main() of train.py does."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(log, "plot_losses", lambda *_: False)
        install(monkeypatch, index, count, store)
        engine = engines.create(args.parse(words))
        try:
            log.setup(engine.config.log_dir, engine.is_main)
            train.train(engine.config, engine)
        finally:
            engine.close()


def poprun(store, commands):
    """Run one process for each command line, together."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), OMP_NUM_THREADS="1")
    start = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*start, str(index), str(len(commands)), str(store), *words],
            env=environment,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        for index, words in enumerate(commands)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), "\n".join(errors)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path, folder, monkeypatch):  # noqa: F811
    poptorch_stand_in.install(monkeypatch)
    monkeypatch.setattr(log, "plot_losses", lambda *_: False)
    one, both, nothing = (tmp_path / name for name in ("one", "both", "nothing"))
    layout = [
        "--ipus-per-replica", "2", "--layers-per-ipu", "0", "3", "--gradient-accumulation", "3",
        "--replication-factor", "2",
    ]
    expected = run(folder, one, *layout)
    assert [line["step"] for line in expected] == [1, 2, 2, 3, 4, 4]
    # The second process would have another order, other captions, other pairs held out and other first weights.
    codes = ["--cache-codes", str(tmp_path / "codes")]  # each process encodes its share of the images
    first, second = flags(folder, both, *layout, *codes), flags(folder, nothing, *layout, *codes, "--random-seed", "7")
    poprun(tmp_path / "store1", [[*words, "--max-steps", "3"] for words in (first, second)])
    assert not list(nothing.rglob("*.pt")) and not list(nothing.rglob("*.jsonl")) and not list(nothing.rglob("*.log"))
    states = newest(both).training["engine"]["random_states"]
    assert states.shape[0] == 2 and states[0, 0] == states[1, 0] == 42 and states[0, 1] != states[1, 1]
    resumed = [*first, "--resume"]  # both see the same files
    poprun(tmp_path / "store2", [resumed, resumed])
    found = [json.loads(line) for line in (both / "metrics.jsonl").read_text().splitlines()]
    by_step = {("validation" in line.values(), line["step"]): line for line in found}
    for line in expected:
        other = by_step["validation" in line.values(), line["step"]]
        for name in ("loss", "text_loss", "image_loss"):
            assert line[name] == pytest.approx(other[name], abs=1e-5), (line, other)
    ours, theirs = newest(both).weights, newest(one).weights
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5
    grown = newest(both).training["engine"]["random_states"]
    assert grown[0, 1] > states[0, 1] and grown[1, 1] - grown[0, 1] > states[1, 1] - states[0, 1]


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
