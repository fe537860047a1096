"""Kernels of the VQGAN: convolutions and norms beside PyTorch's in double precision."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import needs_kernels
from torch import nn

import ops
from models.vqgan import VQGAN, VqganConfig
from models.vqgan_layers import Conv3x3, NormSwish
from ops import convolution


def layer(in_channels, out_channels):
    torch.manual_seed(in_channels)
    return Conv3x3(in_channels, out_channels).requires_grad_(False)


def takes(conv, x, doubled=False):
    return convolution.conv3x3_refusal(x, conv.weight, None, doubled) is None


def assert_exact(result, conv, x, residual=None, doubled=False):
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
    expected = F.conv2d(x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), padding=1)
    expected = expected if residual is None else expected + residual.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=5e-5)


@needs_kernels
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("batch, channels, height, width", [
    (1, (16, 32), 24, 24), (3, (48, 64), 30, 26), (2, (32, 96), 25, 47), (1, (128, 128), 34, 64)])
def test_a_convolution_is_exact(threads, batch, channels, height, width, doubled):
    times, conv, results = 1 + doubled, layer(*channels), []
    height, width = height // times, width // times
    x = torch.randn(batch, channels[0], height, width)
    residual = torch.randn(batch, channels[1], height * times, width * times)
    with torch.no_grad():
        assert takes(conv, x, doubled)
        for count in (1, 2, 3):
            threads(count)
            results.append(conv(x, residual, doubled))
            assert torch.equal(results[-1], results[0])
        assert_exact(results[0], conv, x, residual, doubled)
        alone = torch.cat([conv(x[i : i + 1], residual[i : i + 1], doubled) for i in range(batch)])
        assert torch.equal(alone, results[0]), "a result hangs on what else is in the batch"
        conv.bias = None
        assert_exact(conv(x, None, doubled), conv, x, None, doubled)


@needs_kernels
def test_memory_beside_the_maps_is_not_read():
    """Rows that only fill a product up, and pixels outside: what lies there must not come in."""
    conv = layer(16, 32)
    with torch.no_grad():
        store = torch.full((3, 25, 29, 16), float("nan"))
        store[1] = torch.randn(25, 29, 16)
        x = store[1:2].permute(0, 3, 1, 2)
        assert_exact(conv(x), conv, x)


@needs_kernels
def test_weights_that_change_are_transformed_again_and_the_transformed_are_no_part_of_a_model():
    conv, x = layer(32, 32), torch.randn(1, 32, 24, 24)
    size = len(pickle.dumps(conv))
    with torch.no_grad():
        before = conv(x)
        assert len(pickle.dumps(conv)) == size and set(conv.state_dict()) == {"weight", "bias"}
        for twin in (pickle.loads(pickle.dumps(conv)), copy.deepcopy(conv)):
            assert torch.equal(twin(x), before)
        conv.weight.mul_(2)
        assert_exact(conv(x), conv, x)
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last) / 2
        torch.testing.assert_close(conv(x), before)
        twin.load_state_dict({name: 3 * value for name, value in conv.state_dict().items()})
        torch.testing.assert_close(twin(x), 3 * before, rtol=1e-4, atol=5e-5)


def test_training_takes_pytorch():
    conv, norm, x = Conv3x3(32, 32), NormSwish(4, 32), torch.randn(1, 32, 24, 24)
    assert not takes(conv, x)
    assert not convolution._norm_suits(x.contiguous(memory_format=torch.channels_last), norm.weight)
    conv(norm(x), residual=x).sum().backward()
    assert conv.weight.grad.abs().sum() > 0 and norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("change", [
    lambda conv, x: (conv.double(), x.double()),
    lambda conv, x: (conv.bfloat16(), x.bfloat16()),
    lambda conv, x: (conv, x[:, :, :8]),  # too small to pay
    lambda conv, x: (layer(8, 32), x[:, :8]),
    lambda conv, x: (layer(32, 48), x),
    lambda conv, x: (conv.to("meta"), x.to("meta")),
    None,  # no kernels
])
@torch.no_grad()
def test_what_kernels_do_not_know_pytorch_computes(change, monkeypatch):
    conv, x = layer(32, 32), torch.randn(1, 32, 24, 24)
    if change:
        conv, x = change(conv, x)
    else:
        monkeypatch.setattr(convolution, "_library", lambda: None)
    assert not takes(conv, x) and conv(x).shape == (1, conv.out_channels, *x.shape[2:])
    if x.dtype == torch.float32 and x.device.type == "cpu":
        assert_exact(conv(x), conv, x)


@torch.no_grad()
def test_a_recorded_model_has_pytorchs_operators():
    conv, x = layer(32, 32), torch.randn(1, 32, 24, 24)
    traced = torch.jit.trace(conv, x)
    assert "convolution" in str(traced.inlined_graph)
    assert_exact(traced(x + 1), conv, x + 1)


@needs_kernels
@pytest.mark.parametrize(
    "batch, channels, groups, side, shift", [(2, 48, 3, 20, 0.0), (1, 128, 32, 64, 10.0), (3, 16, 16, 5, -100.0)]
)
def test_norm_and_swish_are_exact(threads, batch, channels, groups, side, shift):
    torch.manual_seed(0)
    norm = NormSwish(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(batch, channels, side, side) * 3 + shift).contiguous(memory_format=torch.channels_last)
    results = []
    with torch.no_grad():
        assert convolution._norm_suits(x, norm.weight)
        before = x.clone()
        wanted = F.silu(F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps))
        for count in (1, 2, 3):
            threads(count)
            results.append(norm(x))
            torch.testing.assert_close(results[-1].double(), wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(results[-1], results[0]) and torch.equal(x, before)
        norm.bias.zero_()  # a constant map has no variance
        assert torch.equal(norm(torch.full_like(x, 7.0)), torch.zeros_like(x))


@needs_kernels
def test_a_vqgan_gives_what_pytorch_gives():
    torch.manual_seed(0)
    sizes = {"ch": 32, "ch_mult": (1, 2), "z_channels": 32, "embed_dim": 32, "num_codes": 64, "resolution": 64}
    model = VQGAN(VqganConfig(**sizes, num_res_blocks=1, attn_resolutions=(32,))).eval().requires_grad_(False)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    convolution._transforms.clear()
    images = torch.rand(2, 3, 64, 64)
    drawn = torch.arange(2 * 32 * 32).view(2, -1) % 64
    with torch.no_grad():
        codes, pixels = model.encode(images), model.decode(drawn)
        assert len(convolution._transforms) > 5, "hardly any convolution took the kernel"
        with ops.use("reference"):
            assert torch.equal(model.encode(images), codes)
            torch.testing.assert_close(model.decode(drawn), pixels, rtol=1e-4, atol=1e-5)


def test_images_are_decoded_one_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model = VQGAN(VqganConfig(ch=32, ch_mult=(1,), num_res_blocks=1, resolution=8, num_codes=16, attn_resolutions=()))
    model.eval().requires_grad_(False)
    codes, sizes, decode = torch.arange(5 * 64).view(5, 64) % 16, [], model.decode
    monkeypatch.setattr(model, "decode", lambda part: sizes.append(len(part)) or decode(part))
    with torch.no_grad():
        assert torch.equal(model.decode_by_parts(codes), torch.cat([decode(codes[i : i + 1]) for i in range(5)]))
    assert sizes == [1] * 5
