"""train.py --device ipu, from flags to checkpoints, over the stand-in for PopTorch: the loop must not notice it."""
from __future__ import annotations

import logging
import sys

import poptorch_stand_in
import pytest
import torch
from helpers import assert_same, read_metrics, train_here, training_flags, weights_of
from PIL import Image

import args
import checkpoints
import engines
import train
from models.dalle import DalleConfig, DalleModel
from utils.errors import UsageError


@pytest.fixture(autouse=True)
def poptorch(monkeypatch):
    return poptorch_stand_in.install(monkeypatch)


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
        train.main()
        return capsys.readouterr().out

    text, alone = printed("--plan auto"), printed("--plan")
    assert "layers 12-15 norm text_head image_head" in text and "4 stages, 8192 micro-batches" in text
    assert "layers_per_ipu, best division: [4, 4, 4, 4]" in text
    assert "layers_per_ipu as configured: [0, 6, 6, 4]" in alone and "best division" not in alone
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 600
