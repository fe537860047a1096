"""--shard: two processes that share a model out compute what two processes with a model each do, bit for bit."""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_same, free_port, read_metrics, refused, train_here, training_flags
from test_numerics import poison
from torch.utils._pytree import keystr, tree_flatten_with_path

import args
import checkpoints
import engines
import log
from engines import sharding
from engines.ipu import plan
from engines.memory import training_memory
from models.config import DalleConfig
from training import setup
from training.run import train
from utils.errors import UsageError

pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this PyTorch has no fully_shard", allow_module_level=True)

#: All state that there is: moments, decay, averaged weights; two patterns, and matrices with odd numbers of rows.
FULL = "--optimizer AdamW --weight-decay 0.1 --ema-decay 0.9 --checkpoint-save-steps 2 --num-hidden-layers 2"
FULL += " --attn-types full axial_row --text-seq-len 7 --epochs 1 --validation-fraction 0.17"


def main():
    """One of two processes: trains one run after the other, of those that `two_processes` wrote into a file.

    A run may have "start": a checkpoint to be put into its folder first, "poison": [process, steps], "model": fields of
    DalleConfig that no flag has, and "scale": the first scale of fp16 gradients, for which the command line would want
    a GPU.
    """
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(run["port"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log, "plot_losses", lambda *_: False)
            if "model" in run:
                describe = setup.dalle_config
                patch.setattr(setup, "dalle_config", lambda *a: dataclasses.replace(describe(*a), **run["model"]))  # noqa: B023
            if "poison" in run:
                poison(patch, set(run["poison"][1]), rank=run["poison"][0])
            if "start" in run and os.environ["RANK"] == "0":  # the other process waits for this one in engines.create
                folder = Path(args.parse(run["flags"]).checkpoints.checkpoint_output_dir)
                folder.mkdir(parents=True)
                shutil.copy(run["start"], folder)
            engine = engines.create(args.parse(run["flags"]))
            if "scale" in run:
                scaler = sharding.make_scaler if "--shard" in run["flags"] else torch.amp.GradScaler
                engine.autocast_dtype, engine.scaler = torch.float16, scaler("cpu", init_scale=run["scale"])
            train(engine.config, engine)
            engine.close()


def flags(folder, out, *more):
    return training_flags(folder, out, *FULL.split(), *" ".join(more).split())


def two_processes(server, work, runs):
    (work / "runs.json").write_text(json.dumps([dict(run, port=free_port()) for run in runs]))
    server.together([str(work / "runs.json")], work, script="test_sharding")


def contents(path):
    """All that a checkpoint holds but for what tells runs apart: their options, and the random states."""
    checkpoint = torch.load(path, weights_only=True)
    engine, position = (checkpoint["training"][name] for name in ("engine", "position"))
    del engine["random_states"], position["seconds"]
    found = {"weights": checkpoint["weights"], "optimizer": checkpoint["opt_state"], "engine": engine, "at": position}
    leaves = tree_flatten_with_path(found)[0]
    return {keystr(key): torch.as_tensor(leaf) for key, leaf in leaves if not isinstance(leaf, (str, type(None)))}


def losses(out, after=0):
    keys = ("event", "step", "loss", "text_loss", "image_loss", "bad_steps")
    return [{key: line[key] for key in keys if key in line} for line in read_metrics(out) if line["step"] > after]


def norms(out):
    return [event["grad_norm"] for event in read_metrics(out, "train")]


@pytest.fixture(scope="module")
def trained(server, folder, tmp_path_factory):
    """Folder of the runs of two processes that the fast tests look at: all by one pair of processes."""
    work = tmp_path_factory.mktemp("sharded")
    start = {name: {"start": str(work / name / "ckpt/dalle_0_2.pt")} for name in ("whole", "shard")}
    runs = {
        "whole": "", "shard": "--shard", "stay": "--shard --resume", "leave": "--resume", "join": "--shard --resume",
        "clip whole": "--clip-grad-norm 0.1", "clip shard": "--clip-grad-norm 0.1 --shard", "bad": "--shard",
    }
    extra = {"stay": start["shard"], "leave": start["shard"], "join": start["whole"], "bad": {"poison": ["1", [2]]}}
    two_processes(server, work, [
        dict(extra.get(name, {}), flags=flags(folder, work / name, more)) for name, more in runs.items()
    ])  # fmt: skip
    return work


def test_sharing_a_model_out_changes_no_bit(trained):
    """Weights, moments, averages and losses of training and validation are those of DistributedDataParallel."""
    assert losses(trained / "shard") == losses(trained / "whole")
    assert {event["event"] for event in losses(trained / "shard")} == {"train", "validation"}
    assert_same(contents(trained / "shard/ckpt/dalle_0.pt"), contents(trained / "whole/ckpt/dalle_0.pt"))
    assert norms(trained / "shard") == pytest.approx(norms(trained / "whole"), rel=1e-6)


@pytest.mark.parametrize("how", ["stay", "leave", "join"])
def test_a_run_goes_on_with_the_same_bits_with_and_without_shard(trained, how):
    assert losses(trained / how) == losses(trained / "whole", after=2) != []
    assert_same(contents(trained / how / "ckpt/dalle_0.pt"), contents(trained / "whole/ckpt/dalle_0.pt"))


def test_one_process_goes_on_where_two_stopped(trained, folder, tmp_path):
    for out, more in ((tmp_path, ""), (tmp_path / "other", "--batch-size 1 --gradient-accumulation 3")):
        (out / "ckpt").mkdir(parents=True)
        shutil.copy(trained / "shard/ckpt/dalle_0_2.pt", out / "ckpt")
        train_here(flags(folder, out, "--resume", more))
    position = checkpoints.read_dalle(out / "ckpt/dalle_0.pt").training["position"]
    assert (position["step"], position["samples"]) == (2 + 4, 2 * 4 + 4 * 3)  # all 20
    for event, expected in zip(losses(tmp_path), losses(trained / "whole", after=2)):
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
    events = read_metrics(trained / "bad", "train")
    assert [event["bad_steps"] for event in events] == [0] + [1] * (len(events) - 1)
    assert events[0]["loss"] == losses(trained / "whole")[0]["loss"]
    found = contents(trained / "bad/ckpt/dalle_0.pt")
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found["['optimizer']['state'][0]['step']"] == len(events) - 1


def test_where_it_cannot_be_the_reason_is_told(folder, tmp_path, monkeypatch):
    config = args.parse(flags(folder, tmp_path, "--shard"))
    refused("torchrun.*omit --shard", engines.create, config, kind=UsageError)
    assert any("--shard" in problem for problem in plan.problems(config))
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    refused("--shard needs PyTorch 2.7", sharding.check, 2, kind=UsageError)


def test_the_estimate_of_memory_shares_out_what_is_shared_out():
    tokens = {"num_text_tokens": 16448, "num_image_tokens": 16384, "text_seq_len": 64, "grid": 16}
    model = DalleConfig(**tokens, dim=1536, depth=42, heads=24, dim_head=64)
    config = args.Config().replace(precision="bf16", activation_checkpointing=True, optimizer="AdamW")
    whole, shard = (training_memory(model, config.replace(shard=shard), "bf16", 4) for shard in (False, True))
    assert [shard.weights, shard.gradients, shard.optimizer] == [part / 4 for part in whole[:3]]
    assert shard.total < 0.4 * whole.total


MINDALLE = "--architecture mindalle --dim-head 16 --attn-types full"
OPTIONS = {
    "Adam, dropout and noise": "--optimizer Adam --ff-dropout 0.2 --code-noise 0.2 --soft-codes 0.5",
    "Muon": "--optimizer Muon", "Adafactor": "--optimizer Adafactor", "bf16": "--precision bf16 --layer-scale false",
    "activation checkpointing": "--activation-checkpointing --precision bf16 --layer-scale false",
    "explicit attention": "--activation-checkpointing --attention-impl explicit --sandwich-norm",
    "flip, no cached codes": "--augment flip --cache-codes off", "minDALL-E": f"{MINDALLE} --init-std 0.02",
    "layers that share weights": "--num-hidden-layers 4 --attn-types full",
    "no row for the second process": f"{MINDALLE} --optimizer Adafactor --text-seq-len 1 --truncate-captions",
}
SHARED_LAYERS = {"shared_attn_ids": [0, 1], "shared_ff_ids": [0, 0, 1, 1], "tie_embeddings": True}


@pytest.mark.slow
def test_every_option_gives_the_same_bits_shared_out(server, folder, tmp_path):
    runs = []
    for name, options in OPTIONS.items():
        model = {"model": SHARED_LAYERS} if name == "layers that share weights" else {}
        saved = {"start": str(tmp_path / name / "shard/ckpt/dalle_0_2.pt")}
        for how, more, start in (("whole", "", {}), ("shard", "--shard", {}), ("again", "--shard --resume", saved)):
            runs.append(dict(model, **start, flags=flags(folder, tmp_path / name / how, options, more)))
    two_processes(server, tmp_path, runs)
    for name in OPTIONS:
        out = tmp_path / name
        whole = contents(out / "whole/ckpt/dalle_0.pt")
        assert losses(out / "shard") == losses(out / "whole"), name
        for how in ("shard", "again"):
            assert_same(contents(out / how / "ckpt/dalle_0.pt"), whole)


@pytest.mark.slow
def test_options_that_add_up_in_another_order_are_close(server, folder, tmp_path):
    """Micro-batches are averaged one by one, compiled kernels may differ in the last bit, LayerScale's gradient is
    computed from rounded weights in bf16; and the scale of fp16 falls in all processes."""
    cases = {
        "bf16": "--precision bf16", "micro-batches": "--gradient-accumulation 4 --batch-size 1", "scale": "",
        "compile": "--compile", "compile, checkpointing": "--compile --activation-checkpointing --precision bf16",
    }
    runs = []
    for name, options in cases.items():
        extra = {"scale": 1024.0, "poison": ["1", [2]]} if name == "scale" else {}
        for how, more in (("whole", ""), ("shard", "--shard")):
            runs.append(dict(extra, flags=flags(folder, tmp_path / name / how, options, more)))
    two_processes(server, tmp_path, runs)
    for name in cases:
        first, second = losses(tmp_path / name / "whole"), losses(tmp_path / name / "shard")
        for one, other in zip(first, second):
            rough = 1e-4 if name == "bf16" else 1e-5
            assert (one["loss"] or 0.0) == pytest.approx(other["loss"] or 0.0, rel=rough), name  # none: not finite
    for how in ("whole", "shard"):
        assert contents(tmp_path / "scale" / how / "ckpt/dalle_0.pt")["['engine']['scaler']['scale']"] == 512


@pytest.mark.slow
def test_the_programs_train_with_it_and_draw_with_what_it_saved(folder, tmp_path):
    """torchrun train.py --shard, an odd number of validation pairs, an unfinished run, then generate.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "train.py"]
    command += flags(folder, tmp_path, "--shard --gradient-accumulation 3 --attn-types axial_row --epochs 2")

    def call(*words):
        subprocess.run(words, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), check=True, timeout=600)

    call(*command, "--max-steps", "3")
    call(*command, "--resume")
    newest = checkpoints.newest_checkpoint(tmp_path / "ckpt")
    assert newest.name == "dalle_1.pt" and checkpoints.read_dalle(newest).ema is not None
    draw = ["--dalle_path", newest, "--text", "picture 1", "--num_images", "1", "--outputs_dir", tmp_path / "o"]
    call(sys.executable, "generate.py", *draw)
    assert [path for path in (tmp_path / "o").rglob("*") if path.suffix in (".jpg", ".png")]
