"""Training end to end on hand-made data: batch arithmetic, loop, resume, two processes, precision, checkpoints."""
from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import Letters, assert_same, flags, losses_of, refused, run, weights, weights_of, words

import args
import checkpoints
import engines
from data import DemoDataset, TextSettings
from data.demo import demo_records
from engines.base import parameter_groups
from engines.ipu import plan
from engines.native import NativeEngine, split_batch
from engines.optimizers import make_optimizers
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from training.run import train
from utils.errors import UsageError
from utils.schedules import Plateau, cosine_factor, epoch_factor

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


def test_a_configuration_may_fade_soft_codes_that_a_flag_disables(tmp_path):
    config = args.parse([*GENERATED, "--max-steps", "1", "--checkpoint-output-dir", str(tmp_path)])
    train(config.replace(soft_codes_fade=0.5), engines.create(config))


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


def test_a_model_of_newer_blocks_is_saved_and_resumed(folder, tmp_path):
    words = "--norm rms --qk-norm --rotary-2d --activation swiglu --sandwich-norm --value-residual".split()
    run(folder, tmp_path, *words, "--max-steps", "2")
    config = checkpoints.read_dalle(checkpoints.newest_checkpoint(tmp_path / "ckpt")).config
    assert [config[name] for name in ("norm", "qk_norm", "rotary_2d", "activation")] == ["rms", True, True, "swiglu"]
    assert config["value_residual"] is True
    assert max(event["step"] for event in run(folder, tmp_path, *words, "--max-steps", "4", "--resume")) == 4


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
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(folder, whole, tmp_path, more):
    expected = tmp_path / "whole" if more else whole[0]
    if more:
        run(folder, expected, *more)
    for stop in ("3", "5"):
        parts = tmp_path / stop
        run(folder, parts, "--max-steps", stop, *more)
        run(folder, parts, "--resume", *more)
        assert_same(weights_of(expected), weights_of(parts))
        assert [event for event in losses_of(parts) if event[0] == "train" or event[1] != 3] == losses_of(expected)


def test_a_second_run_moves_the_first_ones_checkpoints_aside(folder, tmp_path, caplog):
    """Resumed, a finished run is left as it is."""
    caplog.set_level("INFO")
    path, short = tmp_path / "ckpt/dalle_0_3.pt", ("--max-steps", "3")
    run(folder, tmp_path, *short)
    (told,) = (record for record in caplog.records if record.message.startswith("saved "))
    assert str(path) in told.message and not hasattr(told, "detail")  # on a terminal too
    saved = path.read_bytes()
    run(folder, tmp_path, *short, "--resume")
    assert path.read_bytes() == saved and list(path.parent.glob("*.pt")) == [path]
    run(folder, tmp_path, *short, "--random-seed", "7")
    assert (tmp_path / "ckpt/earlier.1/dalle_0_3.pt").read_bytes() == saved != path.read_bytes()


def test_pretrained_checkpoint_starts_from_its_weights(folder, whole, tmp_path):
    start = whole[0] / "ckpt/dalle_0.pt"
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
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9), (130, 60), (60, 70)])
def test_muon_orthogonalises_as_exactly_as_pytorch_on_cpus(shape, native, monkeypatch):
    """In float32 where a CPU emulates bfloat16, or natively in bfloat16."""
    from engines import muon
    from ops import matmul
    if native and matmul._bfloat16() is None:
        pytest.skip("needs AVX-512 with bfloat16")
    kernel = matmul._bfloat16() if native else None
    module = torch.optim._muon
    theirs = module._zeropower_via_newtonschulz
    monkeypatch.setattr(module, "_zeropower_via_newtonschulz", theirs)  # what it was comes back
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr(matmul, "_functions", lambda: None)
    monkeypatch.setattr(matmul, "_bfloat16", lambda: kernel)
    muon.choose_precision(torch.device("cpu"))
    ours = module._zeropower_via_newtonschulz
    assert ours is muon.orthogonalized
    a, b, c = coefficients = 3.4445, -4.775, 2.0315
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    for singular in (s, s[0] * torch.arange(1, len(s) + 1) ** -1.5):  # all alike, or few of them large
        matrix, exact = u * singular @ v, singular / singular.norm()
        for _ in range(5):
            exact = a * exact + b * exact**3 + c * exact**5
        expected, found = u * exact @ v, ours(matrix.float(), coefficients, 5, 1e-7)
        assert found.dtype == torch.float32
        error, usual = ((x - expected).norm() for x in (found, theirs(matrix.float(), coefficients, 5, 1e-7)))
        assert error < (max(usual, 0.05 * expected.norm()) if native else 1e-4 * expected.norm())
    assert not bool(ours(torch.zeros(shape), coefficients, 5, 1e-7).any())


def engine_of(optimizer, dim, base_width):
    """A native engine's model and optimizers, at its learning rate."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, depth=2, dim=dim, heads=dim // 8, dim_head=8, base_width=base_width)
    model = TextToImage(DalleModel(dataclasses.replace(config, layer_scale=False, init_std=0.1)))
    options = args.OptimizerConfig(optimizer=optimizer, learning_rate=3e-3)
    engine = mock.Mock(optimizers=make_optimizers(model, options))
    NativeEngine.set_learning_rate(engine, options.learning_rate)
    return model, engine.optimizers


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_base_width_scales_weights_and_rates(optimizer):
    model, optimizers = engine_of(optimizer, 64, 16.0)
    dalle, rates = model.dalle, {}
    for group in (group for one in optimizers for group in one.param_groups):
        rates.update((id(p), group["lr"]) for p in group["params"])
    block = dalle.transformer.layers[0].feed_forward.fn.up.weight
    for weight, std, rate in (
        (block, 0.1 / 2, 3e-3 / (2 if optimizer == "Muon" else 4)), (dalle.image_head.weight, 0.1 / 4, 3e-3 / 4),
        (dalle.image_emb.weight, 0.1, 3e-3), (dalle.norm.weight, None, 3e-3),
    ):
        assert rates[id(weight)] == pytest.approx(rate)
        assert std is None or weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_steps_change_logits_as_much_at_any_width(optimizer):
    """With --base-width, as is its purpose; without it a model of eight times the width changes several times as much.
    """
    growth = {}
    for base_width in (0.0, 32.0):
        changes = []
        for dim in (32, 256):
            model, optimizers = engine_of(optimizer, dim, base_width)
            batch = torch.randint(1, 8, (3, 4)), torch.randint(8, (3, 4))
            before = model.dalle(*batch)[1].detach()
            for _ in range(3):
                model(*batch).total.backward()
                for one in optimizers:
                    one.step()
                    one.zero_grad()
            changes.append((model.dalle(*batch)[1].detach() - before).square().mean().sqrt().item())
        growth[base_width] = changes[1] / changes[0]
    assert growth[32.0] < 1.6 and growth[0.0] > 1.5 * growth[32.0], growth


def test_base_width_is_refused_where_nothing_scales_rates():
    words = "--config unit_test --optimizer Adafactor --init-std 0.02 --base-width 64".split()
    refused("--base-width: steps of --optimizer Adafactor", args.parse, words, kind=UsageError)
    words = "--config unit_test --base-width 64".split()
    refused("--base-width: scales --init-std", args.parse, words, kind=UsageError)
    config = args.parse("--config unit_test --init-std 0.02 --base-width 64".split())
    assert any(line.startswith("--base-width 64") for line in plan.problems(config))


def test_captions_say_in_which_view_an_image_is():
    records = demo_records("train")[:60]
    plain = DemoDataset(records, TextSettings(Letters(), 40), 64)
    views = DemoDataset(records, TextSettings(Letters(), 40), 64)
    views.augment, seen = "views", {}
    for epoch in range(3):
        views.set_epoch(epoch)
        for index, record in enumerate(records):
            text, image = views[index]
            caption, original = words(text), plain[index][1]
            assert caption.startswith(record.caption)
            added = caption[len(record.caption) :]
            assert added or torch.equal(image, original)
            if added:
                assert len(caption) <= 40
                seen[added] = (original, image)
    assert set(seen) == {f", {name}" for name in "mirrored,moved left,moved right,moved up,moved down,smaller,larger"
                         .split(",")}  # fmt: skip
    for name, move in (
        ("mirrored", lambda x: x.flip(-1)), ("moved left", lambda x: F.pad(x[:, :, 3:], (0, 3), value=255)),
        ("moved down", lambda x: F.pad(x[:, :-3], (0, 0, 3, 0), value=255)),
    ):
        original, image = seen[f", {name}"]
        assert (move(original) != image).float().mean() < 0.05, name  # but for what the border repeats
