"""Kernels of our own for the training step: the results and gradients of PyTorch's, in any shape, on any threads."""
from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

import ops
from models.config import DalleConfig
from models.dalle import DALLE
from models.patterns import build_mask, visible
from ops import build
from ops import elementwise as training
from ops import native_attention as attention
from ops.attention_ops import NativeAttention

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="needs a C compiler"),
    pytest.mark.skipif(os.environ.get(build.SWITCH, "") != "", reason="kernels are switched off"),
]

TINY = DalleConfig(
    num_text_tokens=20, num_image_tokens=11, text_seq_len=5, grid=4, dim=24, depth=4, heads=3, dim_head=8,
    attn_types=("axial_row", "axial_col", "full", "conv_like"),
)  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def attend(qkv, pattern, heads, grid):
    """The plain product under its mask."""
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mask = build_mask(pattern, qkv.shape[1] - grid * grid + 1, grid)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def close(own, exact, tolerance):
    """Within so much of the largest value."""
    torch.testing.assert_close(own.double(), exact.double(), rtol=0, atol=tolerance * float(exact.abs().max()) + 1e-7)


@pytest.mark.parametrize("pattern", ["axial_row", "axial_col", "full"])
@pytest.mark.parametrize(
    "batch, text, grid, heads, width",
    [(1, 7, 4, 3, 32), (2, 80, 16, 2, 64), (3, 1, 5, 2, 40), (1, 33, 17, 2, 8), (2, 3, 1, 1, 5), (1, 50, 7, 2, 100)],
)
def test_attention_is_that_of_the_mask(pattern, batch, text, grid, heads, width, threads):
    torch.manual_seed(batch)
    length = text + grid * grid - 1
    qkv = torch.randn(batch, length, 3 * heads * width)
    gradient = torch.randn(batch, length, heads * width)
    exact = qkv.double().requires_grad_()
    expected = attend(exact, pattern, heads, grid)
    expected.backward(gradient.double())
    assert NativeAttention.suits(qkv, visible(pattern, text, grid))
    own = NativeAttention(visible(pattern, text, grid), heads)
    result, for_qkv = own(qkv), torch.full_like(qkv, float("nan"))
    close(result, expected.detach(), 1e-6)
    again = own.recompute(qkv, gradient.clone(), for_qkv)
    assert torch.equal(again, result)
    close(for_qkv, exact.grad, 3e-6)


@pytest.mark.parametrize("grid", [3, 16, 17])
def test_what_scratch_memory_held_before_does_not_matter(grid, monkeypatch):
    plain = attention._scratch
    results = []
    for value in (0.0, float("nan")):
        monkeypatch.setattr(attention, "_scratch", lambda *arguments, value=value: plain(*arguments).fill_(value))
        torch.manual_seed(0)
        qkv, gradient = torch.randn(1, 5 + grid * grid - 1, 30), torch.randn(1, 5 + grid * grid - 1, 10)
        for_qkv = torch.empty_like(qkv)
        results.append((NativeAttention(visible("axial_col", 5, grid), 2).recompute(qkv, gradient, for_qkv), for_qkv))
    assert all(torch.equal(first, second) and first.isfinite().all() for first, second in zip(*results))


def seeded_dropout(x, probability):
    """Drops what the kernel would drop."""
    return x * training.drop(torch.ones(x.shape), int(torch.randint(2**63 - 1, ())), probability)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "quick_gelu"])
@pytest.mark.parametrize("attn_dropout, ff_dropout", [(0.1, 0.0), (0.0, 0.3), (0.5, 0.1)])
def test_a_layer_drops_the_same_forward_and_backward(activation, attn_dropout, ff_dropout, monkeypatch):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, activation=activation, attn_dropout=attn_dropout, ff_dropout=ff_dropout)
    model = DALLE(config)
    monkeypatch.setattr(torch.nn.functional, "dropout", seeded_dropout)
    text, codes = torch.randint(1, 20, (2, 5)), torch.randint(11, (2, 16))
    results = []
    for kind in ("native", "reference"):
        model.zero_grad()
        torch.manual_seed(1)
        with ops.use(kind):
            loss = model.loss(*model(text, codes), text, codes).total
            loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9])
def test_as_many_numbers_are_dropped_as_asked_for(probability):
    torch.manual_seed(0)
    x = torch.rand(1000, 999) + 1
    dropped = [training.drop(x.clone(), seed, probability) for seed in (1, 1, 2, 1 << 32)]
    assert torch.equal(dropped[0], dropped[1])
    for result in dropped:
        gone = result == 0
        assert float(gone.float().mean()) == pytest.approx(probability, abs=0.002)
        spread = (probability * (1 - probability) / 1000) ** 0.5
        assert float(gone.float().mean(dim=0).std()) == pytest.approx(spread, rel=0.1)
        torch.testing.assert_close(result[~gone], x[~gone] / (1 - probability))
    both = ((dropped[0] == 0) & (dropped[2] == 0)).float().mean()
    assert float(both) == pytest.approx(probability**2, abs=0.002), "seeds must not drop the same numbers"
    with pytest.raises(ValueError, match="probability"):
        training.drop(x, 1, 1.0)


def test_dropping_hangs_on_no_threads_and_passes_on_what_is_no_number():
    before, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(training.drop(torch.ones(50_000), 7, 0.5))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    assert training.drop(torch.full((100,), float("nan")), 7, 0.5).isnan().all()


def test_attention_passes_on_what_is_no_number():
    own = NativeAttention(visible("axial_row", 5, 4), 1)
    for odd in (float("nan"), float("inf")):
        for position in (0, 4, 12):  # of 5 + 15, the last of a text part, and a code
            qkv = torch.randn(1, 20, 24)
            qkv[0, position] = odd
            assert own(qkv)[0, position].isnan().all()
            for_qkv = torch.empty_like(qkv)
            own.recompute(qkv, torch.randn(1, 20, 8), for_qkv)
            assert for_qkv[0, position].isnan().any()


def test_large_scores_do_not_overflow():
    qkv = 30 * torch.randn(1, 20, 24)
    close(NativeAttention(visible("axial_col", 5, 4), 1)(qkv), attend(qkv.double(), "axial_col", 1, 4), 1e-5)


def test_wrong_shapes_are_refused():
    pattern = attention.Pattern(heads=2, grid=4, by_column=False)
    with pytest.raises(ValueError, match="of 2 heads"):
        attention.forward(torch.zeros(1, 20, 9), pattern)
    with pytest.raises(ValueError, match="of 2 heads"):
        attention.forward(torch.zeros(1, 15, 12), pattern)
    with pytest.raises(ValueError, match="other shapes"):
        attention.backward(torch.zeros(1, 20, 12), pattern, torch.zeros(1, 20, 4), torch.zeros(1, 20, 6))
    with pytest.raises(ValueError, match="contiguous"):
        turned = torch.zeros(1, 12, 20).transpose(1, 2)
        attention.backward(turned, pattern, torch.zeros(1, 20, 4), torch.zeros(1, 20, 12))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 16), (70, 37), (33, 64)])
def test_gelu_and_its_gradient(gated, biased, rows, width, threads):
    torch.manual_seed(0)
    x = torch.randn(2, rows, width * (1 + gated)) * 3
    bias = torch.randn(width * (1 + gated)) if biased else None
    gradient = torch.randn(2, rows, width)
    exact = x.double().requires_grad_()
    shifted = exact if bias is None else exact + bias
    first, last = shifted.chunk(2, dim=-1) if gated else (1, shifted)
    expected = first * F.gelu(last)
    expected.backward(gradient.double())
    result, for_x = training.gelu(x, gated, bias), torch.full_like(x, float("nan"))
    training.gelu_backward(x, gated, gradient, for_x, bias)
    assert torch.equal(gradient, result)
    close(result, expected.detach(), 3e-7)
    close(for_x, exact.grad, 3e-7)


def test_gelu_over_all_sizes_of_numbers():
    sizes = torch.logspace(-45, 38, 4000)
    x = torch.cat([sizes, -sizes, torch.linspace(-14, 14, 20001), torch.tensor([0.0, -0.0])])[None]
    gradient, for_x, exact = torch.ones_like(x), torch.empty_like(x), x.double().requires_grad_()
    result = training.gelu(x, gated=False)
    expected = 0.5 * exact * torch.special.erfc(-exact / 2**0.5)
    expected.sum().backward()
    # Relative to the result itself: the left tail too is right, as far as e^(-x^2 / 2) is in float32.
    inside = x.double() > -11
    error = (result.double() - expected).abs() / expected.abs().clamp(min=1e-37)
    assert error[inside].max() < 1e-5 and (result.double() - expected).abs()[x.abs() < 14].max() < 1e-6
    training.gelu_backward(x, False, gradient, for_x)
    assert (for_x.double() - exact.grad).abs().max() < 3e-7


def test_gelu_passes_on_what_is_no_number():
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1.0]])
    own, for_x = torch.ones_like(x), torch.empty_like(x)
    training.gelu_backward(x, False, own, for_x)
    assert own.isfinite().tolist() == for_x.isfinite().tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("rows, width", [(1, 1), (7, 16), (9, 37), (70, 130)])
def test_passes_around_the_products(rows, width, threads):
    torch.manual_seed(1)
    x, residual, scale, bias = (torch.randn(size, width) for size in (rows, rows, 1, 1))
    scale, bias = scale[0], bias[0]
    exact = x.double()
    for own_scale, own_bias in ((scale, bias), (None, bias), (scale, None), (None, None)):
        expected = residual + (1.0 if own_scale is None else own_scale.double()) * (
            exact if own_bias is None else exact + own_bias
        )
        close(training.add_branch(residual, own_scale, own_bias, x.clone()), expected, 3e-7)
    factor, own = torch.randn(rows), x.clone()
    close(training.sum_products_and_scale(own, residual, factor), (exact * residual).sum(dim=1), 1e-5)
    assert torch.equal(own, x * factor[:, None])


def test_norm_of_many_tensors(threads):
    torch.manual_seed(2)
    tensors = [torch.randn(size) for size in ((1,), (37,), (8, 2049), (3, 0), (70, 1000))] + [torch.tensor(2.0)]
    exact = torch.cat([tensor.flatten() for tensor in tensors]).double().norm()
    close(training.total_norm(tensors), exact, 1e-6)
    tensors[2][5, 3] = float("nan")
    assert training.total_norm(tensors).isnan()
    tensors[2][5, 3] = -float("inf")
    assert training.total_norm(tensors).isinf()


def gradients(model, text, codes):
    model.zero_grad()
    losses = model.loss(*model(text, codes), text, codes)
    losses.total.backward()
    return [losses.total.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("activation", ["geglu", "gelu", "quick_gelu"])
@pytest.mark.parametrize("biases", [True, False])
def test_a_model_learns_the_same_with_and_without(activation, biases, threads, monkeypatch):
    torch.manual_seed(3)
    config = dataclasses.replace(
        TINY, activation=activation, layer_scale=biases, qkv_bias=biases, out_bias=biases, ff_bias=biases
    )
    model = DALLE(config)
    text, codes = torch.randint(1, 20, (2, 5)), torch.randint(11, (2, 16))
    own, again = gradients(model, text, codes), gradients(model, text, codes)
    assert all(torch.equal(first, second) for first, second in zip(own, again))
    exact = gradients(model.double(), text, codes)
    for with_kernels, expected in zip(own, exact):
        close(with_kernels, expected, 1e-5)

    monkeypatch.setattr("ops.attention_ops.NativeAttention.suits", staticmethod(lambda qkv, visible: False))
    monkeypatch.setattr("ops.elementwise.suits", lambda *tensors: False)
    for without, expected in zip(gradients(model.float(), text, codes), exact):
        close(without, expected, 1e-5)


def test_other_types_and_devices_take_pytorch():
    full = visible("full", 5, 4)
    assert not NativeAttention.suits(torch.zeros(1, 20, 24, dtype=torch.bfloat16), full)
    assert not NativeAttention.suits(torch.zeros(1, 20, 24, device="meta"), full)
    assert not NativeAttention.suits(torch.zeros(1, 20, 24), visible("conv_like", 5, 4))
    assert training.suits(torch.zeros(2, 3), None) and not training.suits(torch.zeros(2, 3), torch.zeros(2, 3).t())
    assert not training.suits(torch.zeros(2, 3, dtype=torch.float64))
