"""Training end to end on hand-made data: batch arithmetic, loop, resume, two processes, precision, checkpoints."""
from __future__ import annotations

import conftest
import pytest
import torch
from helpers import ROOT, assert_same, fill, flags, losses_of, refused, run, together, weights, weights_of  # noqa: F401

import args
import checkpoints
import engines
from engines.base import parameter_groups
from engines.native import split_batch
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from utils.errors import UsageError
from utils.schedules import Plateau, cosine_factor, epoch_factor

folder = conftest.folder  # other files take it from here
SMALL = DalleConfig(num_text_tokens=8, num_image_tokens=8, text_seq_len=4, grid=2, dim=8, depth=1, heads=1, dim_head=4)
GENERATED = ["--config", "unit_test", "--generated-data", "--device", "cpu"]


@pytest.mark.parametrize("global_batch, batch_size, world, expected", [
    (16384, 2, 1, (2, 8192)), (16384, 2, 8, (2, 1024)), (15, 1, 3, (1, 5)), (12, 8, 1, (6, 2)), (6, 4, 3, (2, 1)),
    (7, 4, 1, (1, 7)),
])
def test_a_global_batch_is_shared_in_equal_micro_batches(global_batch, batch_size, world, expected):
    batching = split_batch(global_batch, batch_size, world)
    assert (batching.micro, batching.accumulation, batching.global_batch) == (*expected, global_batch)
    refused("--gradient-accumulation", split_batch, 10, 2, 4, kind=UsageError)  # which does not divide


def test_weight_decay_leaves_vectors_alone():
    model = DalleModel(SMALL)
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    names_of = [{names[id(parameter)] for parameter in group["params"]} for group in (kept, decayed)]
    assert {"norm.weight", "image_head.bias", "transformer.layers.0.attention.scale"} <= names_of[0]
    assert "text_emb.weight" in names_of[1]


def test_schedules_follow_the_published_constants_and_resume():
    assert [epoch_factor("constant", e, 10) for e in (0, 1, 2, 9)] == [1 / 3, 2 / 3, 1.0, 1.0]
    assert [epoch_factor("multi_step", e, 10) for e in (1, 2, 5, 6, 9)] == [2 / 3, 1.0, 1.0, 0.1, 0.1]
    assert epoch_factor("multi_step", 0, 1) == 1.0
    assert [cosine_factor(done) for done in (0, 1, 2)] == pytest.approx([1.0, 0.01, 0.01])
    plateau = Plateau(1e-3)
    for _ in range(11):
        plateau.step(1.0)
    assert plateau.learning_rate == 1e-3
    copy = Plateau(1e-3)
    copy.load_state_dict(plateau.state_dict())
    for one in (plateau, copy):
        one.step(1.0)
        assert one.learning_rate == 5e-4


def test_training_lowers_the_loss_and_saves_what_generate_reads(folder, tmp_path):
    more = ("--learning-rate", "0.01", "--lr-scheduler", "cosine", "--keep-checkpoints", "2")
    events = run(folder, tmp_path, "--epochs", "6", *more)
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert len(losses) == 6 * 5 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert sum(event["event"] == "validation" for event in events) == 6
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert sorted(path.name for path in (tmp_path / "ckpt").glob("*.pt")) == ["dalle_4.pt", "dalle_5.pt"]
    checkpoint = checkpoints.read_dalle(tmp_path / "ckpt" / "dalle_5.pt")
    assert checkpoint.config["grid"] == 4 and checkpoint.identity["vqgan"]["sha256"]
    raw = torch.load(tmp_path / "ckpt" / "dalle_5.pt", weights_only=True)
    assert {"hparams", "vae_params", "epoch", "weights", "opt_state", "scheduler_state"} <= raw.keys()
    assert "model.transformer.layers.0.0.fn.fn.to_qkv.weight" in raw["weights"]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run without any options, and its losses."""
    out = tmp_path_factory.mktemp("whole")
    return out, [event["loss"] for event in run(folder, out)]


@pytest.mark.parametrize("more, tolerance", [
    (("--batch-size", "4", "--gradient-accumulation", "1"), 1e-4),
    (("--batch-size", "1", "--gradient-accumulation", "4"), 1e-4),
    (("--activation-checkpointing",), 1e-6), (("--precision", "bf16"), 0.05),
])
def test_accumulation_activation_checkpointing_and_bf16_change_no_losses(folder, whole, tmp_path, more, tolerance):
    assert [event["loss"] for event in run(folder, tmp_path, *more)] == pytest.approx(whole[1], rel=tolerance)


def test_two_processes_equal_one(server, folder, whole, tmp_path):
    server.together(flags(folder, tmp_path), tmp_path)
    one, two = weights_of(whole[0]), weights_of(tmp_path)
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key
    assert len(list((tmp_path / "ckpt").glob("*.pt"))) == 2


@pytest.mark.parametrize("more", [
    (), ("--ema-decay", "0.9", "--ff-dropout", "0.1", "--lr-scheduler", "ReduceLROnPlateau", "--weight-decay", "0.1"),
], ids=["plain", "all states"])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(folder, tmp_path, more):
    run(folder, tmp_path / "whole", *more)
    for stop in ("3", "5"):
        parts = tmp_path / stop
        run(folder, parts, "--max-steps", stop, *more)
        run(folder, parts, "--resume", *more)
        assert_same(weights_of(tmp_path / "whole"), weights_of(parts))
        kept = [event for event in losses_of(parts) if event[0] == "train" or event[1] != 3]
        assert kept == losses_of(tmp_path / "whole")


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


def test_pretrained_checkpoint_starts_from_its_weights(folder, tmp_path):
    run(folder, tmp_path / "a", "--epochs", "1")
    start = tmp_path / "a/ckpt/dalle_0.pt"
    run(folder, tmp_path / "b", "--epochs", "1", "--learning-rate", "1e-12", "--pretrained-checkpoint", str(start))
    for key, value in weights(start).items():
        assert torch.allclose(value, weights(tmp_path / "b/ckpt/dalle_0.pt")[key], atol=1e-6), key
    refused("text_seq_len", run, folder, tmp_path / "c", "--pretrained-checkpoint", str(start), "--text-seq-len", "9")


@pytest.mark.parametrize("units, many, runner", [
    (True, 1, "EXAMPLES_UTILS_MARK"), (True, 10**7, "POPLAR_SDK_ENABLED"), (False, 1, None),
])
def test_hints_and_lines_for_benchmarks_appear_where_they_mean_something(monkeypatch, caplog, units, many, runner):
    monkeypatch.setattr("engines.native.multiplies_bf16", lambda: units)
    monkeypatch.setattr("engines.native._MANY_WEIGHTS", many)
    for name in ("EXAMPLES_UTILS_MARK", "POPLAR_SDK_ENABLED"):
        monkeypatch.setenv(name, "1") if name == runner else monkeypatch.delenv(name, raising=False)
    with caplog.at_level("INFO"):
        engines.create(args.parse(GENERATED)).prepare(TextToImage(DalleModel(SMALL)))
    assert ("--matmul-precision medium trains faster" in caplog.text) == (units and many == 1)
    assert ("Compiled model in " in caplog.text) == (runner is not None)


def test_products_are_as_exact_as_asked_for_until_the_engine_closes(products):
    for precision in ("high", "medium"):
        engine = engines.create(args.parse([*GENERATED, "--matmul-precision", precision]))
        assert torch.get_float32_matmul_precision() == precision
        assert f"matmuls of {precision} precision" in engine.describe()
        engine.close()
        assert torch.get_float32_matmul_precision() == "highest"
    products("high")
    engine = engines.create(args.parse(GENERATED))  # what was set elsewhere stays
    assert torch.get_float32_matmul_precision() == "high" and "matmuls" not in engine.describe()
    engine.close()


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
