"""What a recipe of training is made of: z-loss, rates that fit any width, views of images, bfloat16 matmuls."""
from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import Letters, words

import args
from data import DemoDataset, TextSettings
from data.demo import demo_records
from engines.ipu import plan
from engines.native import NativeEngine
from engines.optimizers import make_optimizers
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from ops import matmul
from utils.errors import UsageError

TINY = DalleConfig(
    num_text_tokens=11, num_image_tokens=13, text_seq_len=4, grid=4, dim=16, depth=2, heads=2, dim_head=8, init_std=0.1
)  # fmt: skip
BATCH = torch.randint(1, 11, (3, 4)), torch.randint(13, (3, 16))


@pytest.mark.parametrize("text_seq_len, bos", [(4, True), (1, False)])
def test_z_loss_is_added_to_the_total_in_training_alone(text_seq_len, bos):
    torch.manual_seed(0)
    model = DalleModel(dataclasses.replace(TINY, text_seq_len=text_seq_len, bos=bos, z_loss=0.1))
    text, codes = BATCH[0][:, :text_seq_len], BATCH[1]
    logits = model(text, codes)
    losses, plain = model.loss(*logits, text, codes), model.eval().loss(*logits, text, codes)
    squares = [part.exp().sum(-1).log().square() for part in logits]
    expected = squares[1].mean() if text_seq_len == 1 else (squares[0].mean() + 7 * squares[1].mean()) / 8
    assert losses.total.item() == pytest.approx((plain.total + 0.1 * expected).item(), rel=1e-6)
    assert losses[1:] == plain[1:]


def engine_of(optimizer, dim, base_width):
    """A native engine's model and optimizers, at its learning rate."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, dim=dim, heads=dim // 8, base_width=base_width, layer_scale=False)
    model = TextToImage(DalleModel(config))
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
        (block, 0.1 / 2, 3e-3 / (2 if optimizer == "Muon" else 4)),
        (dalle.image_head.weight, 0.1 / 4, 3e-3 / 4),
        (dalle.image_emb.weight, 0.1, 3e-3),
        (dalle.norm.weight, None, 3e-3),
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
            before = model.dalle(*BATCH)[1].detach()
            for _ in range(3):
                model(*BATCH).total.backward()
                for one in optimizers:
                    one.step()
                    one.zero_grad()
            changes.append((model.dalle(*BATCH)[1].detach() - before).square().mean().sqrt().item())
        growth[base_width] = changes[1] / changes[0]
    assert growth[32.0] < 1.6 and growth[0.0] > 1.5 * growth[32.0], growth


def test_base_width_is_refused_where_nothing_scales_rates():
    with pytest.raises(UsageError, match="--base-width: steps of --optimizer Adafactor"):
        args.parse("--config unit_test --optimizer Adafactor --base-width 64".split())
    config = args.parse("--config unit_test --base-width 64".split())
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
        ("mirrored", lambda x: x.flip(-1)),
        ("moved left", lambda x: F.pad(x[:, :, 3:], (0, 3), value=255)),
        ("moved down", lambda x: F.pad(x[:, :-3], (0, 0, 3, 0), value=255)),
    ):
        original, image = seen[f", {name}"]
        assert (move(original) != image).float().mean() < 0.05, name  # but for what the border repeats


@pytest.mark.skipif(not matmul._multiplies_vectors(), reason="needs AVX-512 with bfloat16")
def test_medium_precision_multiplies_in_bfloat16_without_a_matrix_unit(monkeypatch):
    monkeypatch.setattr(matmul, "_functions", lambda: None)
    a, b, bias, out = torch.randn(100, 70), torch.randn(80, 70).t(), torch.randn(80), torch.empty(100, 80)
    exact = a.double() @ b.double() + bias
    assert not matmul.suits(a, b)
    torch.set_float32_matmul_precision("medium")
    try:
        assert matmul.suits(a, b, out) and matmul.matmul(a, b, out, bias) is out
        assert matmul.matmul(a, b).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision("highest")
    lost = (out - exact).norm() / exact.norm()
    assert 1e-4 < lost < 1e-2


def test_codes_start_from_the_codebook():
    """As large as they were, and alike where the codebook's are."""
    torch.manual_seed(0)
    model, codebook = DalleModel(dataclasses.replace(TINY, dim=64)), torch.randn(13, 6)
    codebook[3] = codebook[7]
    before = [table.std().item() for table in (model.image_emb.weight, model.image_head.weight)]
    model.start_from(codebook)
    for table, std in zip((model.image_emb.weight, model.image_head.weight), before):
        assert torch.equal(table[3], table[7]) and table.std().item() == pytest.approx(std, rel=1e-3)
        likeness = torch.corrcoef(table)[0, 1:], torch.corrcoef((codebook - codebook.mean(0)) / codebook.std(0))[0, 1:]
        assert torch.corrcoef(torch.stack(likeness))[0, 1] > 0.8


@pytest.mark.parametrize("per_image", [False, True])
def test_each_image_may_have_its_own_share_of_wrong_codes(per_image):
    torch.manual_seed(0)
    model = TextToImage(DalleModel(TINY), None, 0.3, per_image)
    wrong = (model._add_code_noise(torch.full((4000, 100), 13)) != 13).float().mean(dim=1)
    assert wrong.mean().item() == pytest.approx(0.3, abs=0.02)
    assert wrong.std().item() == pytest.approx(0.6 / 12**0.5 if per_image else 0.3 / 6, abs=0.02)
