"""Losses and gradients that are not finite: such steps are left out and counted, too many in a row end the run."""
from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, flat, read_metrics, refused, train_here, training_flags, weights_of

import args
import checkpoints
import engines
import train as program
from engines.native import NativeEngine
from models.dalle import TextToImage
from training.run import train
from training.saver import Saver
from utils.bad_steps import BadSteps
from utils.errors import UserError


def poison(monkeypatch, steps, value=float("nan"), rank=None):
    """Multiply the loss of some steps, counted from 1 in each process, by a number that is not finite."""
    count, forward, step = [0], TextToImage.forward, NativeEngine.step

    def counted_step(self, batch):
        count[0] += 1
        return step(self, batch)

    def poisoned(self, *inputs):
        losses = forward(self, *inputs)
        if not self.training or count[0] not in steps or rank not in (None, os.environ.get("RANK")):
            return losses
        return losses._replace(total=losses.total * value)

    monkeypatch.setattr(NativeEngine, "step", counted_step)
    monkeypatch.setattr(TextToImage, "forward", poisoned)


def main():
    poison(pytest.MonkeyPatch(), {2}, rank="1")
    program.main()


def flags(folder, out, *more):
    """20 pairs for training, 4 in a step."""
    return training_flags(folder, out, "--validation-fraction", "0.17", "--epochs", "1", *more)


@pytest.fixture
def run(folder, tmp_path):
    """Train in this process; returns the folder of the run, the engine and the lines of training."""

    def run(name, *more):
        engine = train_here(flags(folder, tmp_path / name, *more))
        return tmp_path / name, engine, read_metrics(tmp_path / name, "train")

    return run


@pytest.mark.parametrize("optimizer", ["Adam", "Muon"])  # decided by the fused kernel, and on the host
def test_a_bad_step_changes_nothing_and_is_counted(run, monkeypatch, caplog, optimizer):
    if optimizer == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    options = ("--optimizer", optimizer, "--clip-grad-norm", "1")
    good, engine, _ = run("two", "--max-steps", "2", *options)
    expected = moments(engine)
    for name in ("nan", "inf"):
        caplog.clear()
        with monkeypatch.context() as patch:
            poison(patch, {3}, float(name))
            out, engine, events = run(name, "--max-steps", "3", *options)
        assert_same(weights_of(good), weights_of(out))
        assert moments(engine) == expected and engine.state_dict()["bad_steps"] == [1, 1]
        assert [event["bad_steps"] for event in events] == [0, 0, 1]
        assert events[1]["grad_norm"] > 0 and events[2]["grad_norm"] is None and events[2]["loss"] is None
        assert "step 3: loss or gradient not finite for 1 step(s), 1 in total" in caplog.text


def moments(engine):
    return {key: leaf for key, leaf in flat(engine.state_dict()["optimizer"]).items() if not key.endswith(".lr")}


def test_training_goes_on_after_a_bad_step_and_resumes_the_count(run, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {2})
        whole, _, expected = run("whole")
    assert [event["bad_steps"] for event in expected] == [0, 1, 1, 1, 1] and expected[-1]["loss"] > 0
    poison(monkeypatch, {2})
    run("parts", "--max-steps", "3")
    parts, _, events = run("parts", "--resume")
    assert [(e["loss"], e["bad_steps"]) for e in events] == [(e["loss"], e["bad_steps"]) for e in expected]
    assert_same(weights_of(whole), weights_of(parts))


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4, 5})
    with pytest.raises(UserError, match=r"--max-bad-steps 2\); the last good checkpoint is .*dalle_0_3.pt"):
        run("run", "--max-bad-steps", "2", "--checkpoint-save-steps", "3")
    good = checkpoints.read_dalle(tmp_path / "run/ckpt/dalle_0_3.pt").weights
    assert all(torch.isfinite(value).all() for value in good.values())


def test_an_engine_that_cannot_leave_steps_out_is_watched_by_its_loss():
    watch, nan = BadSteps(20, 0, lambda: "take dalle_3.pt"), float("nan")
    for step, loss in [(10, 1.0), (20, nan), (30, 1.0), (40, nan)]:
        watch.look(step, loss, None)
    assert (watch.total, watch.row) == (20, 10)
    refused("not finite 20 times in a row .*take dalle_3.pt", watch.look, 50, nan, None)


@pytest.mark.parametrize("more, advice", [
    ("", "a lower --learning-rate or --clip-grad-norm 1"),
    ("--precision bf16 --clip-grad-norm 1", "a lower --learning-rate or --precision fp32"),
    ("--device ipu --precision fp16", "--clip-grad-norm 1, a lower --loss-scaling or --precision fp32"),
    ("--device ipu --precision fp32", "a lower --learning-rate or --clip-grad-norm 1"),
])
def test_the_way_out_is_one_that_the_device_has(folder, tmp_path, poptorch, more, advice):
    config = args.parse(flags(folder, tmp_path, *more.split()))
    saver = Saver(SimpleNamespace(config=config, engine=engines.create(config)), tmp_path / "dalle_1.pt")
    assert saver.way_out().startswith(f"the last good checkpoint is {saver.newest}: continue from it")
    assert saver.way_out().endswith(advice)


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, monkeypatch):
    state = NativeEngine.model_state

    def damaged(self, averaged=False):
        return {key: value * float("nan") if self.num_updates > 2 else value for key, value in state(self).items()}

    monkeypatch.setattr(NativeEngine, "model_state", damaged)
    refused("step 4: weights are not finite .*dalle_0_2.pt", run, "run", "--checkpoint-save-steps", "2")
    assert [path.name for path in (tmp_path / "run/ckpt").glob("*.pt")] == ["dalle_0_2.pt"]


def test_the_loss_scale_falls_after_a_bad_step(folder, tmp_path, monkeypatch):
    """GradScaler with fp16 autocast, which the command line allows on GPUs alone, here on the CPU."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("before PyTorch 2.3 there is a GradScaler for CUDA only")
    config = args.parse(flags(folder, tmp_path, "--max-steps", "3", "--loss-scaling", "1024"))
    engine = engines.create(config)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    poison(monkeypatch, {2})
    scales, update = [], engine.scaler.update
    monkeypatch.setattr(engine.scaler, "update", lambda: (update(), scales.append(engine.scaler.get_scale())))
    train(config, engine)
    assert scales == [1024.0, 512.0, 512.0] and engine.state_dict()["bad_steps"] == [1, 0]


def test_two_processes_agree_on_a_step_that_is_bad_in_one(server, folder, tmp_path):
    server.together(flags(folder, tmp_path, "--max-steps", "3"), tmp_path, script="test_numerics")
    assert [line["bad_steps"] for line in read_metrics(tmp_path, "train")] == [0, 1, 1]
    assert all(torch.isfinite(value).all() for value in weights_of(tmp_path).values())
