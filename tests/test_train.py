"""Training end to end on hand-made data: batch arithmetic, loop, resume, two processes, precision, checkpoints."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import args
import checkpoints
import engines
import train
from engines.base import parameter_groups
from engines.native import split_batch
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.vqgan import VQGAN
from models.vqgan_config import VqganConfig
from utils.errors import UsageError, UserError
from utils.schedules import Plateau, cosine_factor, epoch_factor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("training"), 24)


def fill(folder, count):
    """Put a tiny VQGAN (16x16 pixels to 4x4 codes) and so many pictures with two captions each into a folder."""
    config = VqganConfig(
        embed_dim=8, num_codes=16, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=8, ch_mult=(1, 1, 1),
        num_res_blocks=1, attn_resolutions=(), num_groups=4,
    )
    torch.manual_seed(0)
    save_file(VQGAN(config).state_dict(), str(folder / "vqgan.safetensors"))
    config.to_yaml(folder / "vqgan.yaml")
    (folder / "pairs").mkdir()
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        pixels = torch.randint(0, 256, (16, 20, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "pairs" / f"{index:03d}.png")
        (folder / "pairs" / f"{index:03d}.txt").write_text(f"picture {index}\nthe {index} th\n")
    return folder


def flags(folder, out, *more):
    generated, validated = "--generated-data" in more, "--validation-folder" in more
    return [
        *("--config", "unit_test", "--image-size", "16"),
        *(() if generated else ("--input-folder", str(folder / "pairs"))),
        *(() if generated or validated else ("--validation-fraction", "0.17")),
        *("--batch-size", "2", "--gradient-accumulation", "2", "--epochs", "2", "--max-steps", "0"),
        *("--text-seq-len", "8", "--hidden-size", "16", "--dim-head", "8"),
        *("--device", "cpu"),
        *("--vqgan-model-path", str(folder / "vqgan.safetensors"), "--vqgan-config-path", str(folder / "vqgan.yaml")),
        *("--checkpoint-output-dir", str(out / "ckpt"), "--log-every", "1"), *more,
    ]


def run(folder, out, *more):
    """Train in this process and return the metrics."""
    config = args.parse(flags(folder, out, *more))
    engine = engines.create(config)
    train.train(config, engine)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def together(command, count):
    """Run so many processes as torchrun would; return what each wrote: (stdout, stderr)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(count))
    common.update(PYTHONPATH=str(ROOT))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(command, env=dict(common, RANK=str(rank), LOCAL_RANK=str(rank)), cwd=ROOT, **pipes)
        for rank in range(count)
    ]
    written = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, written
    return written


def weights(path):
    return checkpoints.read_dalle(path).weights


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


# Batch arithmetic


@pytest.mark.parametrize(
    "global_batch,batch_size,world,expected",
    [
        (16384, 2, 1, (2, 8192)),
        (16384, 2, 8, (2, 1024)),
        (15, 1, 3, (1, 5)),
        (12, 8, 1, (6, 2)),
        (6, 4, 3, (2, 1)),
        (7, 4, 1, (1, 7)),
    ],
)
def test_a_global_batch_is_shared_in_equal_micro_batches(global_batch, batch_size, world, expected):
    batching = split_batch(global_batch, batch_size, world)
    assert (batching.micro, batching.accumulation) == expected
    assert batching.global_batch == global_batch


def test_a_global_batch_that_does_not_divide_is_an_error():
    with pytest.raises(UsageError, match="--gradient-accumulation"):
        split_batch(10, 2, 4)


def test_weight_decay_leaves_vectors_alone():
    model = DalleModel(
        DalleConfig(num_text_tokens=8, num_image_tokens=8, text_seq_len=4, grid=2, dim=8, depth=1, heads=1, dim_head=4)
    )
    decayed, kept = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    kept_names = {names[id(parameter)] for parameter in kept["params"]}
    assert "norm.weight" in kept_names and "image_head.bias" in kept_names
    assert "transformer.layers.0.attention.scale" in kept_names
    assert "text_emb.weight" in {names[id(parameter)] for parameter in decayed["params"]}


# Schedules


def test_epoch_schedules_follow_the_published_constants():
    assert [epoch_factor("constant", e, 10) for e in (0, 1, 2, 9)] == [1 / 3, 2 / 3, 1.0, 1.0]
    assert [epoch_factor("multi_step", e, 10) for e in (1, 2, 5, 6, 9)] == [2 / 3, 1.0, 1.0, 0.1, 0.1]
    assert epoch_factor("multi_step", 0, 1) == 1.0
    assert (
        cosine_factor(0) == 1.0 and cosine_factor(1) == pytest.approx(0.01) and cosine_factor(2) == pytest.approx(0.01)
    )


def test_the_plateau_halves_after_ten_bad_epochs_and_resumes():
    plateau = Plateau(1e-3)
    for _ in range(11):
        plateau.step(1.0)
    assert plateau.learning_rate == 1e-3
    copy = Plateau(1e-3)
    copy.load_state_dict(plateau.state_dict())
    for one in (plateau, copy):
        one.step(1.0)
        assert one.learning_rate == 5e-4


# The loop


def test_training_lowers_the_loss_and_saves_what_generate_reads(folder, tmp_path):
    events = run(folder, tmp_path, "--epochs", "6", "--learning-rate", "0.01", "--lr-scheduler", "cosine")
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert len(losses) == 6 * 5
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert sum(event["event"] == "validation" for event in events) == 6
    assert (tmp_path / "loss.png").stat().st_size > 1000
    checkpoint = checkpoints.read_dalle(tmp_path / "ckpt" / "dalle_5.pt")
    assert checkpoint.config["grid"] == 4 and checkpoint.identity["vqgan"]["sha256"]
    raw = torch.load(tmp_path / "ckpt" / "dalle_5.pt", weights_only=True)
    assert {"hparams", "vae_params", "epoch", "weights", "opt_state", "scheduler_state"} <= raw.keys()
    assert "model.transformer.layers.0.0.fn.fn.to_qkv.weight" in raw["weights"]


def test_accumulation_equals_one_large_batch(folder, tmp_path):
    one = run(folder, tmp_path / "one", "--batch-size", "4", "--gradient-accumulation", "1")
    many = run(folder, tmp_path / "many", "--batch-size", "1", "--gradient-accumulation", "4")
    for a, b in zip(one, many):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [(), ("--ema-decay", "0.9", "--ff-dropout", "0.1", "--lr-scheduler", "ReduceLROnPlateau", "--weight-decay", "0.1")],
    ids=["plain", "all states"],
)
@pytest.mark.parametrize("stop", [3, 5])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(folder, tmp_path, more, stop):
    run(folder, tmp_path / "whole", *more)
    run(folder, tmp_path / "parts", "--max-steps", str(stop), *more)
    events = run(folder, tmp_path / "parts", "--resume", *more)
    assert_same(weights(tmp_path / "whole/ckpt/dalle_1.pt"), weights(tmp_path / "parts/ckpt/dalle_1.pt"))
    whole = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    pick = [(event["step"], event["loss"]) for event in whole if event["event"] == "train"]
    assert [(event["step"], event["loss"]) for event in events if event["event"] == "train"] == pick


def test_a_second_run_moves_the_first_ones_checkpoints_aside(folder, tmp_path):
    run(folder, tmp_path, "--epochs", "1")
    first = weights(tmp_path / "ckpt/dalle_0.pt")
    run(folder, tmp_path, "--epochs", "1", "--random-seed", "7")
    assert_same(first, weights(tmp_path / "ckpt/earlier.1/dalle_0.pt"))
    assert not torch.equal(first["image_emb.weight"], weights(tmp_path / "ckpt/dalle_0.pt")["image_emb.weight"])


def test_a_finished_run_is_left_as_it_is(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run(folder, tmp_path, "--max-steps", "3")
    (told,) = (record for record in caplog.records if record.message.startswith("saved "))
    assert str(tmp_path / "ckpt/dalle_0_3.pt") in told.message and not hasattr(told, "detail")  # on a terminal too
    saved = sorted((path.name, path.read_bytes()) for path in (tmp_path / "ckpt").glob("*.pt"))
    run(folder, tmp_path, "--max-steps", "3", "--resume")
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "ckpt").glob("*.pt")) == saved


def test_resume_takes_moments_from_the_file_and_options_from_the_run(folder, tmp_path):
    run(folder, tmp_path, "--max-steps", "2", "--optimizer", "AdamW")
    run(folder, tmp_path, "--max-steps", "3", "--optimizer", "AdamW", "--weight-decay", "0.5", "--resume")
    state = checkpoints.read_dalle(tmp_path / "ckpt/dalle_0_3.pt").opt_state
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.0]
    assert float(state["state"][0]["step"]) == 3
    with pytest.raises(UserError, match="--optimizer AdamW, not Muon"):
        run(folder, tmp_path, "--max-steps", "4", "--optimizer", "Muon", "--resume")


def test_old_checkpoints_are_dropped_as_configured(folder, tmp_path):
    run(folder, tmp_path, "--epochs", "4", "--keep-checkpoints", "2")
    assert sorted(path.name for path in (tmp_path / "ckpt").glob("*.pt")) == ["dalle_2.pt", "dalle_3.pt"]


def test_pretrained_checkpoint_starts_from_its_weights(folder, tmp_path):
    run(folder, tmp_path / "a", "--epochs", "1")
    start = tmp_path / "a/ckpt/dalle_0.pt"
    run(folder, tmp_path / "b", "--epochs", "1", "--learning-rate", "1e-12", "--pretrained-checkpoint", str(start))
    for key, value in weights(start).items():
        assert torch.allclose(value, weights(tmp_path / "b/ckpt/dalle_0.pt")[key], atol=1e-6), key
    with pytest.raises(UserError, match="text_seq_len"):
        run(folder, tmp_path / "c", "--pretrained-checkpoint", str(start), "--text-seq-len", "9")


def test_resume_refuses_another_vocabulary(folder, tmp_path):
    run(folder, tmp_path, "--max-steps", "2")
    vocabulary = (ROOT / "bpe" / "bpe_yttm_vocab.txt").read_text().splitlines()
    vocabulary[1], vocabulary[2] = vocabulary[2], vocabulary[1]
    (tmp_path / "other.txt").write_text("\n".join(vocabulary) + "\n")
    with pytest.raises(UserError, match="--bpe-path"):
        run(folder, tmp_path, "--resume", "--bpe-path", str(tmp_path / "other.txt"))


def test_activation_checkpointing_and_bf16_train(folder, tmp_path):
    plain = run(folder, tmp_path / "plain")
    saving = run(folder, tmp_path / "saving", "--activation-checkpointing")
    assert [event["loss"] for event in plain] == pytest.approx([event["loss"] for event in saving], rel=1e-6)
    half = run(folder, tmp_path / "half", "--precision", "bf16")
    assert [event["loss"] for event in half] == pytest.approx([event["loss"] for event in plain], rel=0.05)


@pytest.mark.parametrize("units, many, runner", [(True, 1, "EXAMPLES_UTILS_MARK"), (True, 10**7, "POPLAR_SDK_ENABLED"),
                                                 (False, 1, None)])
def test_hints_and_lines_for_benchmarks_appear_where_they_mean_something(monkeypatch, caplog, units, many, runner):
    monkeypatch.setattr("engines.native.multiplies_bf16", lambda: units)
    monkeypatch.setattr("engines.native._MANY_WEIGHTS", many)
    for name in ("EXAMPLES_UTILS_MARK", "POPLAR_SDK_ENABLED"):
        monkeypatch.setenv(name, "1") if name == runner else monkeypatch.delenv(name, raising=False)
    model = DalleConfig(
        num_text_tokens=8, num_image_tokens=8, text_seq_len=4, grid=2, dim=8, depth=1, heads=1, dim_head=4
    )
    with caplog.at_level("INFO"):
        engine = engines.create(args.parse(["--config", "unit_test", "--generated-data", "--device", "cpu"]))
        engine.prepare(TextToImage(DalleModel(model)))
    assert ("--matmul-precision medium trains faster" in caplog.text) == (units and many == 1)
    assert ("Compiled model in " in caplog.text) == (runner is not None)


def test_products_are_as_exact_as_asked_for_until_the_engine_closes(products):
    flags = ["--config", "unit_test", "--generated-data", "--device", "cpu"]
    for precision in ("high", "medium"):
        engine = engines.create(args.parse([*flags, "--matmul-precision", precision]))
        assert torch.get_float32_matmul_precision() == precision
        assert f"matmuls of {precision} precision" in engine.describe()
        engine.close()
        assert torch.get_float32_matmul_precision() == "highest"
    products("high")
    engine = engines.create(args.parse(flags))  # what was set elsewhere stays
    assert torch.get_float32_matmul_precision() == "high" and "matmuls" not in engine.describe()
    engine.close()


def test_two_processes_equal_one(folder, tmp_path):
    run(folder, tmp_path / "one")
    together([sys.executable, "train.py", *flags(folder, tmp_path / "two")], 2)
    one, two = weights(tmp_path / "one/ckpt/dalle_1.pt"), weights(tmp_path / "two/ckpt/dalle_1.pt")
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key
    assert len(list((tmp_path / "two/ckpt").glob("*.pt"))) == 2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_muon_computes_in_float32_where_bfloat16_is_emulated(shape, monkeypatch):
    from engines import muon

    module = torch.optim._muon
    theirs = module._zeropower_via_newtonschulz
    monkeypatch.setattr(module, "_zeropower_via_newtonschulz", theirs)  # what it was comes back
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    muon.choose_precision(torch.device("cpu"))
    ours = module._zeropower_via_newtonschulz
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    arguments = (gradient, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert ours is muon.orthogonalized and ours(*arguments).dtype == torch.float32
    spread = torch.linalg.svdvals(ours(*arguments))  # of an orthogonal matrix all are 1
    assert float(spread.min()) > 0.5 and float(spread.max()) < 1.3
    torch.testing.assert_close(ours(*arguments), theirs(*arguments).float(), rtol=0, atol=0.05)
