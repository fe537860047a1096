"""train.py --device ipu, from flags to checkpoints, over the stand-in for PopTorch: the loop must not notice it."""
from __future__ import annotations

import json
import logging
import sys

import poptorch_stand_in
import pytest
import torch
from PIL import Image
from test_train import fill

import args
import checkpoints
import engines
import log
import train
from models.dalle import DalleConfig, DalleModel
from utils.errors import UsageError


@pytest.fixture(autouse=True)
def poptorch(monkeypatch):
    return install(monkeypatch)


def install(monkeypatch):
    monkeypatch.setattr(log, "plot_losses", lambda *_: False)  # half of a tiny run's time
    return poptorch_stand_in.install(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("ipu"), 18)


def flags(folder, out, *more):
    """The command line of a tiny run: 15 pairs for training, 7 in a step, 3 for validation."""
    words = [
        "--config", "unit_test", "--device", "ipu", "--image-size", "16", "--batch-size", "1",
        "--gradient-accumulation", "7", "--epochs", "2", "--max-steps", "0", "--text-seq-len", "8", "--hidden-size",
        "16", "--dim-head", "8", "--num-hidden-layers", "3", "--ipus-per-replica", "4", "--layers-per-ipu", "0", "1",
        "1", "1", "--embedding-serialization-factor", "4", "--validation-fraction", "0.17", "--log-every", "1",
        "--lr-scheduler", "ReduceLROnPlateau",
    ]
    return [
        *words,
        *("--input-folder", str(folder / "pairs"), "--checkpoint-output-dir", str(out / "ckpt")),
        *("--vqgan-model-path", str(folder / "vqgan.safetensors"), "--vqgan-config-path", str(folder / "vqgan.yaml")),
        *more,
    ]


def run(folder, out, *more):
    """Train and return the metrics."""
    config = args.parse(flags(folder, out, *more))
    engine = engines.create(config)
    try:
        train.train(config, engine)
    finally:
        engine.close()
    metrics = out / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def newest(out):
    return checkpoints.read_dalle(checkpoints.newest_checkpoint(out / "ckpt"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run on the IPU."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        return out, run(folder, out)


def test_a_run_on_ipus_logs_validates_and_saves(whole):
    out, metrics = whole
    assert [line["step"] for line in metrics if "validation" not in line.values()] == [1, 2, 3, 4]
    assert len([line for line in metrics if "validation" in line.values()]) == 2
    checkpoint = newest(out)
    model = DalleModel(DalleConfig.from_dict(checkpoint.config))
    model.load_state_dict(checkpoint.weights)  # under the names that generate.py knows
    assert {value.dtype for value in checkpoint.weights.values()} == {torch.float32}


def test_the_same_run_on_the_cpu_gives_the_same_numbers(folder, tmp_path, whole):
    metrics = run(folder, tmp_path, "--device", "cpu")
    for line, other in zip(metrics, whole[1]):
        assert (line["step"], line["loss"]) == (other["step"], pytest.approx(other["loss"], abs=1e-5))
    assert len(metrics) == len(whole[1]) == 6
    ours, theirs = newest(tmp_path).weights, newest(whole[0]).weights
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5


def test_a_resumed_run_ends_with_the_same_weights(folder, tmp_path, whole):
    run(folder, tmp_path, "--max-steps", "3")  # inside the second epoch
    run(folder, tmp_path, "--resume")
    ours, theirs = newest(tmp_path).weights, newest(whole[0]).weights
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("devices", [("ipu", "cpu"), ("cpu", "ipu")])
def test_weights_cross_engines_and_optimizer_states_are_dropped_aloud(folder, tmp_path, devices, caplog):
    first, second = devices
    run(folder, tmp_path, "--device", first, "--max-steps", "2")
    with caplog.at_level(logging.WARNING):
        metrics = run(folder, tmp_path, "--device", second, "--resume")
    assert any("ignored" in record.message for record in caplog.records)
    assert [line["step"] for line in metrics if "validation" not in line.values()] == [1, 2, 3, 4]


def test_device_iterations_count_all_their_steps(folder, tmp_path):
    metrics = run(folder, tmp_path, "--device-iterations", "2", "--epochs", "1")
    assert [line["step"] for line in metrics if "validation" not in line.values()] == [2]
    assert newest(tmp_path).training["position"]["step"] == 2


def test_compile_only_compiles_and_stops(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert run(folder, tmp_path, "--compile-only", "--cache-codes", str(tmp_path / "codes")) == []
    messages = [record.message for record in caplog.records]
    assert any(message.startswith("Compiled model in ") for message in messages)
    # It is made for codes, of which one tells the shapes; hours of encoding are for the run itself.
    assert any(message.startswith("encoding 1 of 1 images") for message in messages)
    assert not list(tmp_path.rglob("*.pt"))


def test_wrong_flags_are_told_before_any_data_are_read(tmp_path):
    words = ["--config", "L16", "--device", "ipu", "--layers-per-ipu", "0", "6", "6", "5", "--input-folder"]
    config = args.parse([*words, str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="adds up to 17, but the model has 16 layers"):
        engines.create(config)


def test_plan_needs_neither_data_nor_poptorch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "poptorch", None)
    words = "train.py --config L16 --plan auto --device ipu --input-folder /nowhere --log-dir"
    monkeypatch.setattr("sys.argv", [*words.split(), str(tmp_path)])
    train.main()
    text = capsys.readouterr().out
    assert "layers 12-15 norm text_head image_head" in text and "4 stages, 8192 micro-batches" in text
    assert "layers_per_ipu, best division: [4, 4, 4, 4]" in text
    words = words.replace(" auto", "")
    monkeypatch.setattr("sys.argv", [*words.split(), str(tmp_path)])
    train.main()
    alone = capsys.readouterr().out
    assert "layers_per_ipu as configured: [0, 6, 6, 4]" in alone and "best division" not in alone
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 600
