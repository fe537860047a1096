"""Weights in fewer bits, and building a model around weights that are there: close logits, shared layers, memory."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import refused
from mindalle_folder import TOKENS
from torch import nn

from checkpoints import dalle_checkpoint, save_checkpoint
from dalle.loading import load
from dalle.models import Dalle
from models.building import build_dalle, without_weights
from models.config import ARCHITECTURES, DalleConfig
from models.dalle import DalleModel
from models.quantization import DTYPES, Int8Linear, quantize_rows
from models.vqgan_config import VqganConfig
from ops import build

SMALL = DalleConfig(
    num_text_tokens=30, num_image_tokens=20, text_seq_len=6, grid=4, dim=64, depth=4, heads=4, dim_head=16,
    init_std=0.05, **ARCHITECTURES["mindalle"],
)  # fmt: skip
OPTIONS = {
    "mindalle": {},
    "mini-dalle": dict(ARCHITECTURES["mini-dalle"], bos=True, unique_pads=True, image_positions="axial"),
    "shared": {"shared_attn_ids": (0, 1), "shared_ff_ids": (0,), "tie_embeddings": True},
    "sparse, rotary": {"attn_types": ("axial_row", "conv_like"), "rotary": True},
}
TEXT = torch.tensor([[3, 8, 2, 9, 0, 0], [1, 5, 7, 2, 29, 4]])
CODES = torch.arange(32).view(2, 16) * 7 % 20


def random_model(name, seed):
    torch.manual_seed(seed)
    return DalleModel(DalleConfig.from_dict(dict(SMALL.to_dict(), **OPTIONS[name])))


def logits(model):
    with torch.no_grad():
        return torch.cat([part.float().flatten() for part in model.eval()(TEXT, CODES)])


def test_rows_are_off_by_half_a_step_at_most():
    weight = torch.randn(40, 33) * torch.logspace(-6, 3, 40)[:, None]
    weight[5] = 0
    quantised, scale = quantize_rows(weight)
    assert quantised.dtype == torch.int8 and int(quantised.abs().max()) == 127
    assert ((quantised * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_by_the_rounded_weights(bias, monkeypatch):
    monkeypatch.setattr("ops.int8._PART", 40)  # several parts, the last one smaller
    linear = nn.Linear(8, 13, bias=bias)
    layer = Int8Linear(linear.weight, linear.bias)
    rounded = layer.weight * layer.scale[:, None]
    for x in (torch.randn(8), torch.randn(2, 3, 8)):
        assert torch.allclose(layer(x), x @ rounded.t() + (linear.bias if bias else 0), atol=1e-5)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPTIONS)
def test_a_built_model_has_the_weights_and_the_gradients_of_a_loaded_one(name):
    model = random_model(name, seed=0)
    state = dict(model.state_dict())
    built = build_dalle(model.config, dict(state))
    assert built.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in built.state_dict().items())
    assert torch.equal(logits(built), logits(model))
    for one in (model, built):
        one.loss(*one(TEXT, CODES), TEXT, CODES).total.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert gradients.keys() == dict(built.named_parameters()).keys()
    assert all(torch.equal(parameter.grad, gradients[key]) for key, parameter in built.named_parameters())


def test_weights_are_taken_not_copied():
    state = dict(DalleModel(SMALL).state_dict())
    addresses = {key: tensor.data_ptr() for key, tensor in state.items()}
    built = build_dalle(SMALL, state)
    assert not state and {key: tensor.data_ptr() for key, tensor in built.state_dict().items()} == addresses


def test_weights_of_another_model_are_refused():
    state = dict(DalleModel(SMALL).state_dict())
    for weights, message in (
        ({key: tensor for key, tensor in state.items() if key != "norm.bias"}, "norm.bias is missing"),
        (dict(state, more=torch.zeros(1)), "not in the model: more"),
        (dict(state, **{"norm.bias": torch.zeros(1)}), r"norm.bias has shape \(1,\)"),
    ):
        refused(message, build_dalle, SMALL, weights, kind=ValueError)


def test_modules_made_without_weights_have_real_buffers_and_later_ones_are_normal():
    with without_weights():
        model = DalleModel(SMALL)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers()) and not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype, limit", [("bfloat16", 0.05), ("int8", 0.03)])
def test_logits_are_close_to_those_of_float32(name, dtype, limit):
    model = random_model(name, seed=1)
    expected = logits(model)
    found = logits(build_dalle(model.config, dict(model.state_dict()), dtype=dtype))
    assert 0 < float((found - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("dtype, share", [("bfloat16", 0.5), ("int8", 0.45)])
def test_fewer_bits_take_less_memory(dtype, share):
    def size(model):
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.state_dict().values()])

    model = DalleModel(SMALL)
    assert size(build_dalle(SMALL, dict(model.state_dict()), dtype=dtype)) <= share * size(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_api_samples_with_every_dtype(mindalle_folder, dtype):
    model = Dalle.from_pretrained(mindalle_folder, dtype=dtype).to("cpu")
    options = {"num_candidates": 3, "seed": 1, "progress": False, "use_fp16": True, "cond_scale": 1.5}
    images = model.sampling("a painting of the sea", device="cpu", **options)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32 and torch.isfinite(images).all()
    if build.library("rows") is not None:
        assert not model.loaded.batch_changes_images(96)
    assert model.loaded.batch_changes_images(97)
    if not model.loaded.batch_changes_images(1):
        assert torch.equal(images, model.sampling("a painting of the sea", batch_size=2, **options))
    kinds = {type(module) for module in model.stage2.modules()}
    assert (Int8Linear in kinds) == (dtype == "int8") and not any(p.requires_grad for p in model.parameters())


def test_an_unknown_dtype_is_named(mindalle_folder):
    refused("--dtype float8: expected one of float32, bfloat16, int8", load, mindalle_folder, dtype="float8")


def resident(key):
    """VmRSS (now) or VmHWM (the peak) of this process in bytes, as Linux counts them."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024


def peak_of(call):
    """Bytes that a call adds to what is resident, at its peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    except OSError:
        pytest.skip("peaks of memory cannot be measured here")
    before = resident("VmRSS")
    return call(), resident("VmHWM") - before


@pytest.mark.parametrize("trained", [False, True], ids=["weights", "with training state"])
def test_loading_holds_the_weights_once(mindalle_folder, tmp_path, trained):
    sizes = {"dim": 512, "dim_head": 64, "depth": 6, "heads": 8, "num_text_tokens": TOKENS, "num_image_tokens": 24}
    config = DalleConfig.from_dict(dict(SMALL.to_dict(), **sizes))
    with without_weights():
        model = DalleModel(config)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    moments = {name: torch.ones(2, *tensor.shape) for name, tensor in state.items()} if trained else None
    save_checkpoint(tmp_path / "dalle_0.pt", dalle_checkpoint(config.to_dict(), state, 1, moments))
    VqganConfig.from_yaml(mindalle_folder / "config.yaml").to_yaml(tmp_path / "vqgan.yaml")
    del state, moments
    tokenizer, vqgan = mindalle_folder / "tokenizer", mindalle_folder / "stage1_last.ckpt"
    files = (tmp_path / "dalle_0.pt", tokenizer, vqgan, tmp_path / "vqgan.yaml")
    load(*files)  # whatever is imported on the way
    for dtype in DTYPES:
        loaded, peak = peak_of(lambda dtype=dtype: load(*files, dtype=dtype))
        # Converted weights lie beside the pages of the file that they were read from, where it is mapped.
        assert size > 70e6 and peak < (1.6 if trained else 1.0) * size + 35e6, dtype
        assert loaded.config == config
        del loaded
