"""Losses and gradients that are not finite: such steps are left out and counted, too many in a row end the run."""
from __future__ import annotations

import json
import logging
import os
import sys
from types import SimpleNamespace

import poptorch_stand_in
import pytest
import torch
from test_train import ROOT, assert_same, flags, folder, together, weights  # noqa: F401 (a fixture)

import args
import engines
import train
from engines.native import NativeEngine
from models.dalle import TextToImage
from training.saver import Saver
from utils.bad_steps import BadSteps
from utils.errors import UserError

BAD = {"nan": float("nan"), "infinite": float("inf")}


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


def run(folder, out, *more):  # noqa: F811
    """Train in this process; returns the engine and the lines of training."""
    config = args.parse(flags(folder, out, "--epochs", "1", *more))
    engine = engines.create(config)
    train.train(config, engine)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return engine, [event for event in events if event["event"] == "train"]


@pytest.mark.parametrize("optimizer", ["Adam", "Muon"])  # decided by the fused kernel, and on the host
def test_a_bad_step_changes_nothing_and_is_counted(folder, tmp_path, monkeypatch, caplog, optimizer):  # noqa: F811
    if optimizer == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    options = ("--optimizer", optimizer, "--clip-grad-norm", "1")
    engine, _ = run(folder, tmp_path / "two", "--max-steps", "2", *options)
    expected = engine.state_dict()
    for name, value in BAD.items():
        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            poison(patch, {3}, value)
            engine, events = run(folder, tmp_path / name, "--max-steps", "3", *options)
        assert_same(weights(tmp_path / "two/ckpt/dalle_0_2.pt"), weights(tmp_path / name / "ckpt/dalle_0_3.pt"))
        state = engine.state_dict()
        assert flat(state["optimizer"]) == flat(expected["optimizer"]) and state["bad_steps"] == [1, 1]
        assert [event["bad_steps"] for event in events] == [0, 0, 1]
        assert events[1]["grad_norm"] > 0 and events[2]["grad_norm"] is None and events[2]["loss"] is None
        assert "step 3: loss or gradient not finite for 1 step(s), 1 in total" in caplog.text


def flat(state):
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items() if key != "lr"}
    if isinstance(state, list):
        return [flat(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def test_training_goes_on_after_a_bad_step_and_resumes_the_count(folder, tmp_path, monkeypatch):  # noqa: F811
    poison(monkeypatch, {2})
    _, whole = run(folder, tmp_path / "whole")
    assert [event["bad_steps"] for event in whole] == [0, 1, 1, 1, 1] and whole[-1]["loss"] > 0
    monkeypatch.undo()
    poison(monkeypatch, {2})
    run(folder, tmp_path / "parts", "--max-steps", "3")
    _, events = run(folder, tmp_path / "parts", "--resume")
    assert [(event["loss"], event["bad_steps"]) for event in events] == [
        (event["loss"], event["bad_steps"]) for event in whole
    ]
    assert_same(weights(tmp_path / "whole/ckpt/dalle_0.pt"), weights(tmp_path / "parts/ckpt/dalle_0.pt"))


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(folder, tmp_path, monkeypatch):  # noqa: F811
    poison(monkeypatch, {2, 4, 5})
    options = ("--max-bad-steps", "2", "--checkpoint-save-steps", "3")
    with pytest.raises(UserError, match=r"--max-bad-steps 2\); the last good checkpoint is .*dalle_0_3.pt"):
        run(folder, tmp_path, *options)
    good = weights(tmp_path / "ckpt/dalle_0_3.pt")
    assert all(torch.isfinite(value).all() for value in good.values())


def test_an_engine_that_cannot_leave_steps_out_is_watched_by_its_loss():
    watch, nan = BadSteps(20, 0, lambda: "take dalle_3.pt"), float("nan")
    for step, loss in [(10, 1.0), (20, nan), (30, 1.0), (40, nan)]:
        watch.look(step, loss, None)
    assert (watch.total, watch.row) == (20, 10)
    with pytest.raises(UserError, match="not finite 20 times in a row .*take dalle_3.pt"):
        watch.look(50, nan, None)


@pytest.mark.parametrize(
    "more, advice",
    [
        ((), "a lower --learning-rate or --clip-grad-norm 1"),
        (("--precision", "bf16", "--clip-grad-norm", "1"), "a lower --learning-rate or --precision fp32"),
        (("--device", "ipu", "--precision", "fp16"), "--clip-grad-norm 1, a lower --loss-scaling or --precision fp32"),
        (("--device", "ipu", "--precision", "fp32"), "a lower --learning-rate or --clip-grad-norm 1"),
    ],
)
def test_the_way_out_is_one_that_the_device_has(folder, tmp_path, monkeypatch, more, advice):  # noqa: F811
    poptorch_stand_in.install(monkeypatch)
    config = args.parse(flags(folder, tmp_path, *more))
    engine = engines.create(config)
    saver = Saver(SimpleNamespace(config=config, engine=engine), tmp_path / "dalle_1.pt")
    assert saver.way_out().startswith(f"the last good checkpoint is {saver.newest}: continue from it")
    assert saver.way_out().endswith(advice)


def test_weights_that_are_not_finite_are_never_saved(folder, tmp_path, monkeypatch):  # noqa: F811
    state = NativeEngine.model_state

    def damaged(self):
        return {key: value * float("nan") if self.num_updates > 2 else value for key, value in state(self).items()}

    monkeypatch.setattr(NativeEngine, "model_state", damaged)
    with pytest.raises(UserError, match="step 4: weights are not finite .*dalle_0_2.pt"):
        run(folder, tmp_path, "--checkpoint-save-steps", "2")
    assert [path.name for path in (tmp_path / "ckpt").glob("*.pt")] == ["dalle_0_2.pt"]


def test_the_loss_scale_falls_after_a_bad_step(folder, tmp_path, monkeypatch):  # noqa: F811
    """GradScaler with fp16 autocast, which the command line allows on GPUs alone, here on the CPU."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("before PyTorch 2.3 there is a GradScaler for CUDA only")
    config = args.parse(flags(folder, tmp_path, "--max-steps", "3", "--loss-scaling", "1024"))
    engine = engines.create(config)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    poison(monkeypatch, {2})
    scales, update = [], engine.scaler.update
    monkeypatch.setattr(engine.scaler, "update", lambda: (update(), scales.append(engine.scaler.get_scale())))
    train.train(config, engine)
    assert scales == [1024.0, 512.0, 512.0] and engine.state_dict()["bad_steps"] == [1, 0]


WORKER = """
import pytest, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_numerics, train
from utils.errors import run_main
test_numerics.poison(pytest.MonkeyPatch(), {{2}}, rank="1")
run_main(train.main)
"""


def test_two_processes_agree_on_a_step_that_is_bad_in_one(folder, tmp_path):  # noqa: F811
    (tmp_path / "worker.py").write_text(WORKER.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    together([sys.executable, str(tmp_path / "worker.py"), *flags(folder, tmp_path, "--max-steps", "3")], 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["bad_steps"] for line in lines if line["event"] == "train"] == [0, 1, 1]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "ckpt/dalle_0_3.pt").values())
