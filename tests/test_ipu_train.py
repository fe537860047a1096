"""train.py --device ipu, from flags to checkpoints, over the stand-in for PopTorch: the loop must not notice it."""
from __future__ import annotations

import json
import logging
import os
import sys
import types

import poptorch_stand_in
import poptorch_stand_in_device as device
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same, read_metrics, train_here, training_flags, weights_of
from ipu_helpers import install_poprun
from PIL import Image

import args
import checkpoints
import engines
import log
import train as program
from models.dalle import DalleConfig, DalleModel
from training.run import train
from utils.errors import UsageError

pytestmark = pytest.mark.usefixtures("poptorch")


def flags(folder, out, *more):
    """The command line of a tiny run: 20 pairs for training, 7 in a step, 4 for validation."""
    options = "--device ipu --batch-size 1 --gradient-accumulation 7 --num-hidden-layers 3 --ipus-per-replica 4"
    options += " --layers-per-ipu 0 1 1 1 --embedding-serialization-factor 4 --validation-fraction 0.17"
    return training_flags(folder, out, *options.split(), "--lr-scheduler", "ReduceLROnPlateau", *more)


def run(folder, out, *more):
    train_here(flags(folder, out, *more)).close()
    metrics = read_metrics(out) if (out / "metrics.jsonl").exists() else []
    return [(line["event"], line["step"], line["loss"]) for line in metrics]


def steps(metrics):
    return [step for event, step, _ in metrics if event == "train"]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        poptorch_stand_in.install(monkeypatch)
        return out, run(folder, out)


def test_a_run_on_ipus_logs_validates_and_saves_what_one_on_the_cpu_does(folder, tmp_path, whole):
    metrics = run(folder, tmp_path, "--device", "cpu")
    assert [line[:2] for line in metrics] == [line[:2] for line in whole[1]] and steps(metrics) == [1, 2, 3, 4]
    assert [event for event, *_ in metrics].count("validation") == 2
    assert [loss for *_, loss in metrics] == pytest.approx([loss for *_, loss in whole[1]], abs=1e-5)
    ours, theirs = weights_of(tmp_path), weights_of(whole[0])
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5
    model = DalleModel(DalleConfig.from_dict(checkpoints.read_dalle(whole[0] / "ckpt/dalle_1.pt").config))
    model.load_state_dict(theirs)  # under the names that generate.py knows
    assert {value.dtype for value in theirs.values()} == {torch.float32}


def test_a_resumed_run_ends_with_the_same_weights(folder, tmp_path, whole):
    run(folder, tmp_path, "--max-steps", "3")  # inside the second epoch
    run(folder, tmp_path, "--resume")
    assert_same(weights_of(tmp_path), weights_of(whole[0]))
    out = tmp_path / "iterations"  # count all their steps
    assert steps(run(folder, out, "--device-iterations", "2", "--epochs", "1")) == [2]
    assert checkpoints.read_dalle(out / "ckpt/dalle_0.pt").training["position"]["step"] == 2


@pytest.mark.parametrize("first, second", [("ipu", "cpu"), ("cpu", "ipu")])
def test_weights_cross_engines_and_optimizer_states_are_dropped_aloud(folder, tmp_path, first, second, caplog):
    run(folder, tmp_path, "--device", first, "--max-steps", "2")
    assert steps(run(folder, tmp_path, "--device", second, "--resume")) == [1, 2, 3, 4]
    assert "optimizer state" in caplog.text and "ignored" in caplog.text


def test_compile_only_compiles_and_stops(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(folder, tmp_path, "--compile-only", "--cache-codes", str(tmp_path / "codes")) == []
    # It is made for codes, of which one tells the shapes; hours of encoding are for the run itself.
    for start in ("Compiled model in ", "encoding 1 of 1 images"):
        assert any(message.startswith(start) for message in caplog.messages)
    assert not list(tmp_path.rglob("*.pt"))


def test_wrong_flags_are_told_before_any_data_are_read(tmp_path):
    words = "--config L16 --device ipu --layers-per-ipu 0 6 6 5 --input-folder /nowhere"
    with pytest.raises(UsageError, match="adds up to 17, but the model has 16 layers"):
        engines.create(args.parse(words.split()))


def test_plan_needs_neither_data_nor_poptorch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "poptorch", None)

    def printed(plan):
        words = f"train.py --config L16 {plan} --device ipu --input-folder /nowhere --log-dir {tmp_path}"
        monkeypatch.setattr("sys.argv", words.split())
        program.main()
        return capsys.readouterr().out

    text, alone = printed("--plan auto"), printed("--plan")
    assert "layers 12-15 norm text_head image_head" in text and "4 stages, 8192 micro-batches" in text
    assert "layers_per_ipu, best division: [4, 4, 4, 4]" in text
    assert "layers_per_ipu as configured: [0, 6, 6, 4]" in alone and "best division" not in alone
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 600


# Two real processes, as poprun starts them: batches, weights, metrics, files and resume are those of one process.
# PopTorch, popdist and horovod are stand-ins; what passes between the processes, goes through torch.distributed.


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
        train(engine.config, engine)
        engine.close()


def poprun(server, store, *commands):
    server.together([str(store), json.dumps(commands)], store.parent, len(commands), script="test_ipu_train")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(server, tmp_path, folder):
    one, both, nothing = (tmp_path / name for name in ("one", "both", "nothing"))
    layout = "--ipus-per-replica 2 --layers-per-ipu 0 3 --gradient-accumulation 5 --replication-factor 2".split()
    assert [step for _, step, _ in run(folder, one, *layout)] == [1, 2, 2, 3, 4, 4]
    # The second process would have another order, other captions, other pairs held out and other first weights.
    layout += ["--cache-codes", str(tmp_path / "codes")]  # each process encodes its share of the images
    first, second = flags(folder, both, *layout), flags(folder, nothing, *layout, "--random-seed", 7)
    poprun(server, tmp_path / "store1", *([*words, "--max-steps", "3"] for words in (first, second)))
    assert not [path for pattern in ("*.pt", "*.jsonl", "*.log") for path in nothing.rglob(pattern)]

    def random_states():
        return checkpoints.read_dalle(checkpoints.newest_checkpoint(both / "ckpt")).training["engine"]["random_states"]

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
