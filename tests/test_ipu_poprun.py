"""Two real processes, as poprun starts them, train what one process trains: batches, weights, metrics, files, resume.

PopTorch, popdist and horovod are stand-ins; what passes between the processes, goes through torch.distributed.
"""
from __future__ import annotations

import json
import os
import sys
import types

import poptorch_stand_in
import poptorch_stand_in_device as device
import pytest
import torch
import torch.distributed as dist
from helpers import read_metrics, weights_of
from ipu_helpers import install_poprun
from test_ipu_train import flags, run

import args
import checkpoints
import engines
import log
import train


class Horovod(types.ModuleType):
    """The functions of horovod.torch that the engine calls."""

    def __init__(self, index, count, store):
        super().__init__("horovod.torch")
        self.count, self.group = count, {"init_method": "file://" + store, "rank": index, "world_size": count}

    def init(self):
        dist.init_process_group("gloo", **self.group)

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
    poptorch_stand_in.install(monkeypatch)
    options = lambda ipus_per_replica: poptorch_stand_in.Options()  # noqa: E731
    horovod = install_poprun(monkeypatch, Horovod(index, count, store), options, index, count, replicas=count)
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


def main():
    """Be one of the processes: what main() of train.py does."""
    index, commands = int(os.environ["RANK"]), json.loads(sys.argv[2])
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, index, len(commands), store=sys.argv[1])
        monkeypatch.setattr(log, "plot_losses", lambda *_: False)
        engine = engines.create(args.parse(commands[index]))
        log.setup(engine.config.log_dir, engine.is_main)
        train.train(engine.config, engine)
        engine.close()


def poprun(server, store, *commands):
    server.together([str(store), json.dumps(commands)], store.parent, len(commands), script="test_ipu_poprun")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(server, tmp_path, folder, monkeypatch):
    poptorch_stand_in.install(monkeypatch)
    one, both, nothing = (tmp_path / name for name in ("one", "both", "nothing"))
    layout = "--ipus-per-replica 2 --layers-per-ipu 0 3 --gradient-accumulation 5 --replication-factor 2".split()
    assert [step for _, step, _ in run(folder, one, *layout)] == [1, 2, 2, 3, 4, 4]
    # The second process would have another order, other captions, other pairs held out and other first weights.
    layout += ["--cache-codes", str(tmp_path / "codes")]  # each process encodes its share of the images
    first, second = flags(folder, both, *layout), flags(folder, nothing, *layout, "--random-seed", 7)
    poprun(server, tmp_path / "store1", *([*words, "--max-steps", "3"] for words in (first, second)))
    assert not [path for pattern in ("*.pt", "*.jsonl", "*.log") for path in nothing.rglob(pattern)]

    def random_states():
        newest = checkpoints.newest_checkpoint(both / "ckpt")
        return checkpoints.read_dalle(newest).training["engine"]["random_states"]

    states = random_states()
    assert states.shape[0] == 2 and states[0, 0] == states[1, 0] == 42 and states[0, 1] != states[1, 1]
    poprun(server, tmp_path / "store2", [*first, "--resume"], [*first, "--resume"])  # both see the same files
    found = {(line["event"], line["step"]): line for line in read_metrics(both)}
    for line in read_metrics(one):
        for name in ("loss", "text_loss", "image_loss"):
            assert line[name] == pytest.approx(found[line["event"], line["step"]][name], abs=1e-5), line
    ours, theirs = weights_of(both), weights_of(one)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5
    grown = random_states()
    assert grown[0, 1] > states[0, 1] and grown[1, 1] - grown[0, 1] > states[1, 1] - states[0, 1]
