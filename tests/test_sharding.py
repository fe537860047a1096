"""--shard: two processes that share a model out compute what two processes with a model each do, bit for bit."""
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from test_train import ROOT, assert_same, flags, folder, run  # noqa: F401 (a fixture)

import args
import checkpoints
import engines
from engines import sharding
from engines.ipu import plan
from engines.memory import training_memory
from models.config import DalleConfig
from utils.errors import UsageError

pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this PyTorch has no fully_shard", allow_module_level=True)

#: All state that there is: moments, decay, averaged weights; two patterns, and matrices with odd numbers of rows.
FULL = (
    *("--optimizer", "AdamW", "--weight-decay", "0.1", "--ema-decay", "0.9", "--checkpoint-save-steps", "2"),
    *("--num-hidden-layers", "2", "--attn-types", "full", "axial_row", "--text-seq-len", "7", "--epochs", "1"),
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(work, runs, timeout=200):
    """Run the worker twice, as torchrun would. runs: what sharding_worker.py reads, but for the port."""
    (work / "runs.json").write_text(json.dumps([dict(run, port=free_port()) for run in runs]))
    environment = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE="2")
    command = [sys.executable, str(ROOT / "tests" / "sharding_worker.py"), str(work / "runs.json")]
    processes = [
        subprocess.Popen(
            command, env=dict(environment, RANK=str(rank), LOCAL_RANK="0"), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def flat(value, name=""):
    """Every tensor and number of a nested state, by its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    return {key: leaf for part, inner in items for key, leaf in flat(inner, f"{name}.{part}").items()}


def contents(path):
    """All that a checkpoint holds but for what tells runs apart: their options, and the random states."""
    checkpoint = torch.load(path, weights_only=True)
    engine = checkpoint["training"]["engine"]
    engine.pop("random_states")
    found = {"weights": checkpoint["weights"], "optimizer": checkpoint["opt_state"], "engine": engine}
    found["position"] = {key: value for key, value in checkpoint["training"]["position"].items() if key != "seconds"}
    leaves = flat(found).items()
    return {key: torch.as_tensor(value) for key, value in leaves if not isinstance(value, (str, type(None)))}


def losses(out):
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("event", "step", "loss", "text_loss", "image_loss", "bad_steps")
    return [{key: event[key] for key in keys if key in event} for event in events]


def norms(out):
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event["grad_norm"] for event in events if event["event"] == "train"]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):  # noqa: F811
    """Folder of the runs of two processes that the fast tests look at: all by one pair of processes."""
    work = tmp_path_factory.mktemp("sharded")

    def one(name, *more, **extra):
        return dict(extra, flags=flags(folder, work / name, *FULL, *more))

    saved = {name: str(work / name / "ckpt/dalle_0_2.pt") for name in ("whole", "shard")}
    two_processes(
        work,
        [
            one("whole"), one("shard", "--shard"), one("stay", "--shard", "--resume", start=saved["shard"]),
            one("leave", "--resume", start=saved["shard"]), one("join", "--shard", "--resume", start=saved["whole"]),
            one("clip whole", "--clip-grad-norm", "0.1"), one("clip shard", "--clip-grad-norm", "0.1", "--shard"),
            one("bad", "--shard", poison=["1", [2]]),
        ],
    )
    return work


def test_sharing_a_model_out_changes_no_bit(trained):
    """Weights, moments, averages and losses of training and validation are those of DistributedDataParallel."""
    assert losses(trained / "shard") == losses(trained / "whole")
    assert {event["event"] for event in losses(trained / "shard")} == {"train", "validation"}
    assert_same(contents(trained / "shard/ckpt/dalle_0.pt"), contents(trained / "whole/ckpt/dalle_0.pt"))
    assert norms(trained / "shard") == pytest.approx(norms(trained / "whole"), rel=1e-6)


@pytest.mark.parametrize("how", ["stay", "leave", "join"])
def test_a_run_goes_on_with_the_same_bits_with_and_without_shard(trained, how):
    whole = losses(trained / "whole")
    assert losses(trained / how) == [event for event in whole if event["step"] > 2] != []
    assert_same(contents(trained / how / "ckpt/dalle_0.pt"), contents(trained / "whole/ckpt/dalle_0.pt"))


def test_one_process_goes_on_where_two_stopped(trained, folder, tmp_path):  # noqa: F811
    for out in (tmp_path, tmp_path / "other batch"):
        (out / "ckpt").mkdir(parents=True)
        shutil.copy(trained / "shard/ckpt/dalle_0_2.pt", out / "ckpt")
    run(folder, tmp_path, *FULL, "--resume")
    run(folder, out, *FULL, "--resume", "--batch-size", "1", "--gradient-accumulation", "3")
    position = checkpoints.read_dalle(out / "ckpt/dalle_0.pt").training["position"]
    assert (position["step"], position["samples"]) == (2 + 4, 2 * 4 + 4 * 3)  # all 20
    whole = losses(trained / "whole")
    for event, expected in zip(losses(tmp_path), [event for event in whole if event["step"] > 2]):
        assert event["event"] == expected["event"] and event["step"] == expected["step"]
        assert event["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # samples are added up in another order
    found = contents(tmp_path / "ckpt/dalle_0.pt")
    for key, value in contents(trained / "whole/ckpt/dalle_0.pt").items():
        assert torch.allclose(found[key], value, atol=1e-5), key


def test_gradients_are_clipped_by_the_norm_of_the_whole_gradient(trained):
    whole, shard = norms(trained / "clip whole"), norms(trained / "clip shard")
    assert min(whole) > 0.1 and shard == pytest.approx(whole, rel=1e-6)
    first, second = (contents(trained / name / "ckpt/dalle_0.pt") for name in ("clip whole", "clip shard"))
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=1e-4, atol=1e-7), key
    unclipped = contents(trained / "whole/ckpt/dalle_0.pt")
    assert any(not torch.allclose(value, unclipped[key], rtol=1e-2) for key, value in first.items())


def test_all_processes_leave_out_a_step_that_is_bad_in_one(trained):
    events = [event for event in losses(trained / "bad") if event["event"] == "train"]
    assert [event["bad_steps"] for event in events] == [0] + [1] * (len(events) - 1)
    assert events[0]["loss"] == losses(trained / "whole")[0]["loss"]
    found = contents(trained / "bad/ckpt/dalle_0.pt")
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found[".optimizer.state.0.step"] == len(events) - 1


def test_where_it_cannot_be_the_reason_is_told(folder, tmp_path, monkeypatch):  # noqa: F811
    config = args.parse(flags(folder, tmp_path, "--shard"))
    with pytest.raises(UsageError, match="torchrun.*omit --shard"):
        engines.create(config)
    assert any("--shard" in problem for problem in plan.problems(config))
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(UsageError, match="--shard needs PyTorch 2.7"):
        sharding.check(2)


def test_the_estimate_of_memory_shares_out_what_is_shared_out():
    tokens = {"num_text_tokens": 16448, "num_image_tokens": 16384, "text_seq_len": 64, "grid": 16}
    model = DalleConfig(**tokens, dim=1536, depth=42, heads=24, dim_head=64)
    config = args.Config().replace(precision="bf16", activation_checkpointing=True, optimizer="AdamW")
    whole, shard = (training_memory(model, config.replace(shard=shard), "bf16", 4) for shard in (False, True))
    assert [shard.weights, shard.gradients, shard.optimizer] == [part / 4 for part in whole[:3]]
    assert shard.total < 0.4 * whole.total


OPTIONS = {
    "Adam, dropout and noise": ("--optimizer", "Adam", "--ff-dropout", "0.2", "--code-noise", "0.2"),
    "Muon": ("--optimizer", "Muon"),
    "Adafactor": ("--optimizer", "Adafactor"),
    "bf16": ("--precision", "bf16", "--layer-scale", "false"),
    "activation checkpointing": ("--activation-checkpointing", "--precision", "bf16", "--layer-scale", "false"),
    "explicit attention": ("--activation-checkpointing", "--attention-impl", "explicit", "--sandwich-norm"),
    "flip, no cached codes": ("--augment", "flip", "--cache-codes", "off"),
    "minDALL-E": ("--architecture", "mindalle", "--dim-head", "16", "--attn-types", "full", "--init-std", "0.02"),
    "layers that share weights": ("--num-hidden-layers", "4", "--attn-types", "full"),
    "no row for the second process": (
        *("--architecture", "mindalle", "--dim-head", "16", "--attn-types", "full", "--optimizer", "Adafactor"),
        *("--text-seq-len", "1", "--truncate-captions"),
    ),
}


SHARED_LAYERS = {"shared_attn_ids": [0, 1], "shared_ff_ids": [0, 0, 1, 1], "tie_embeddings": True}


@pytest.mark.slow
def test_every_option_gives_the_same_bits_shared_out(folder, tmp_path):  # noqa: F811
    runs = []
    for name, options in OPTIONS.items():
        whole, shard = (flags(folder, tmp_path / name / how, *FULL, *options) for how in ("whole", "shard"))
        again = flags(folder, tmp_path / name / "again", *FULL, *options, "--shard", "--resume")
        saved = str(tmp_path / name / "shard/ckpt/dalle_0_2.pt")
        model = {"model": SHARED_LAYERS} if name == "layers that share weights" else {}
        runs += [dict(model, flags=whole), dict(model, flags=[*shard, "--shard"])]
        runs.append(dict(model, flags=again, start=saved))
    two_processes(tmp_path, runs, timeout=1500)
    for name in OPTIONS:
        out = tmp_path / name
        whole = contents(out / "whole/ckpt/dalle_0.pt")
        assert losses(out / "shard") == losses(out / "whole"), name
        for how in ("shard", "again"):
            assert_same(contents(out / how / "ckpt/dalle_0.pt"), whole)


@pytest.mark.slow
def test_options_that_add_up_in_another_order_are_close(folder, tmp_path):  # noqa: F811
    """Micro-batches are averaged one by one, compiled kernels may differ in the last bit, LayerScale's gradient is
    computed from rounded weights in bf16; and the scale of fp16 falls in all processes."""
    cases = {
        "bf16": ("--precision", "bf16"),
        "micro-batches": ("--gradient-accumulation", "4", "--batch-size", "1"),
        "compile": ("--compile",),
        "compile, checkpointing": ("--compile", "--activation-checkpointing", "--precision", "bf16"),
    }
    runs = []
    for name, options in cases.items():
        for how in ("whole", "shard"):
            more = ("--shard",) if how == "shard" else ()
            runs.append({"flags": flags(folder, tmp_path / name / how, *FULL, *options, *more)})
    for how, more in (("whole", ()), ("shard", ("--shard",))):
        own = flags(folder, tmp_path / "scale" / how, *FULL, *more)
        runs.append({"flags": own, "scale": 1024.0, "poison": ["1", [2]]})
    two_processes(tmp_path, runs, timeout=1500)
    for name in [*cases, "scale"]:
        first, second = losses(tmp_path / name / "whole"), losses(tmp_path / name / "shard")
        for one, other in zip(first, second):
            rough = 1e-4 if name == "bf16" else 1e-5
            assert (one["loss"] or 0.0) == pytest.approx(other["loss"] or 0.0, rel=rough), name  # none: not finite
    states = [contents(tmp_path / "scale" / how / "ckpt/dalle_0.pt") for how in ("whole", "shard")]
    assert states[0][".engine.scaler.scale"] == states[1][".engine.scaler.scale"] == 512


@pytest.mark.slow
def test_the_programs_train_with_it_and_draw_with_what_it_saved(folder, tmp_path):  # noqa: F811
    """torchrun train.py --shard, an odd number of validation pairs, an unfinished run, then generate.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "train.py"]
    options = flags(folder, tmp_path, "--shard", "--gradient-accumulation", "3", "--ema-decay", "0.9")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([*command, *options, "--max-steps", "3"], cwd=ROOT, env=environment, check=True, timeout=600)
    subprocess.run([*command, *options, "--resume"], cwd=ROOT, env=environment, check=True, timeout=600)
    newest = checkpoints.newest_checkpoint(tmp_path / "ckpt")
    assert newest.name == "dalle_1.pt" and checkpoints.read_dalle(newest).ema is not None
    draw = ["--dalle_path", str(newest), "--text", "picture 1", "--num_images", "1"]
    draw += ["--outputs_dir", str(tmp_path / "o")]
    subprocess.run([sys.executable, "generate.py", *draw], cwd=ROOT, env=environment, check=True, timeout=600)
    assert list((tmp_path / "o").rglob("*.jpg")) + list((tmp_path / "o").rglob("*.png"))
