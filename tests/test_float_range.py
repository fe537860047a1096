"""Native ops beside float64: in all shapes, over the whole range of floats, on 1 to 5 threads; forward and gradient.

An error may be some times K * eps * sum(|a| |b|) of a sum of K products wherever that sum is finite, and what a float
loses where it is subnormal. What is not finite stays in its row, its head or its tile.
"""
from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import TEXT, decode, needs_kernels, random_codes, random_model

import ops
from models.config import ACTIVATIONS
from models.patterns import build_mask, visible
from models.quantization import Int8Linear
from models.vqgan_layers import Conv3x3, NormSwish
from ops import convolution, elementwise, matmul, native_attention, noise
from ops.attention_ops import HEAD_EPS, NativeAttention
from ops.elementwise import Dropout
from ops.rows import Packed
from sampling.decoders import Decoder
from sampling.native import NativeDecoder, best_decoder

pytestmark = needs_kernels

NAN, INF, LARGEST = float("nan"), float("inf"), torch.finfo(torch.float32).max
EPS = 2.0**-24
LOST = 2.0**-149  # of a subnormal number
FLUSHED = 2.0**-126  # exponentials below are 0


def pytest_generate_tests(metafunc):
    if "chance" in metafunc.fixturenames:
        seeds = range(60 if metafunc.config.getoption("--slow") else 2)
        metafunc.parametrize("chance", seeds, indirect=True, ids="seed {}".format)


@pytest.fixture
def chance(request, threads):
    """Random sizes; PyTorch's random numbers are seeded, and it has 1 to 5 threads."""
    torch.manual_seed(request.param)
    chance = random.Random(request.param)
    threads(chance.randint(1, 5))
    return chance


def wild(*shape, low=-149, high=127):
    """Floats of random exponents, each its own, and a tenth of zeros of either sign."""
    exponents = torch.randint(low, high + 1, shape).double()
    x = (1 + torch.rand(shape, dtype=torch.float64)) * 2**exponents * torch.randint(0, 2, shape).mul(2).sub(1)
    return torch.where(torch.rand(shape) < 0.1, x.sign() * 0.0, x).float().clamp(-LARGEST, LARGEST)


def assert_within(result, exact, sums, terms, eps=EPS, lost=LOST, times=4):
    """result beside exact, both of the shape of `sums`, where those are finite."""
    known = sums < LARGEST / 4
    assert known.any() or not known.numel()
    error = (result.double() - exact).abs()[known]
    bound = times * terms * (eps * sums[known] + lost)
    assert bool((error <= bound).all()), f"{float((error / bound).nan_to_num(1e99).max())} times too far off"


def assert_close(result, exact, tolerance):
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()) + 1e-7)


def on_threads(threads, compute, counts=(1, 2)):
    """Tensors that `compute` returns, which are the same to the bit on each number of threads."""
    results = []
    for count in counts:
        threads(count)
        results.append(compute())
    for others in results[1:]:
        assert all(torch.equal(first, other) for first, other in zip(results[0], others))
    return results[0]


def odd_rows(x):
    return (~x.flatten(1).isfinite()).any(dim=1).nonzero().flatten().tolist()


# ---- matmuls


@pytest.mark.parametrize("precision, eps", [("highest", EPS), ("high", 2.0**-16), ("medium", 2.0**-8)])
@pytest.mark.parametrize("ranges", [((-149, 39), (-149, 28)), ((-149, -60), (-126, 10)), ((-149, 127), (-149, -5))])
def test_matmuls_by_the_matrix_unit(unit, precision, eps, ranges, chance, products):
    products(precision)
    m, n, k = (chance.randint(64, 140) for _ in range(3))
    k *= chance.choice((1, 1, 8))
    turned = [chance.random() < 0.5 for _ in "ab"]
    a, b = (
        wild(*(shape[::-1] if t else shape), low=low, high=high)
        for shape, t, (low, high) in zip(((m, k), (k, n)), turned, ranges)
    )
    a, b = a.t() if turned[0] else a, b.t() if turned[1] else b
    sums = a.double().abs() @ b.double().abs()
    with mock.patch.object(torch, "mm", side_effect=torch.mm) as by_pytorch:
        result = matmul.matmul(a, b)
    assert by_pytorch.called == bool(sums.max() > 2.0**80), "the matrix unit is for all but the largest numbers"
    assert_within(result, a.double() @ b.double(), sums, k, eps=eps)


@pytest.mark.skipif(matmul._bfloat16() is None, reason="needs AVX-512 with bfloat16")
@pytest.mark.parametrize("ranges", [((-149, 39), (-149, 28)), ((-3, 3), (-3, 3)), ((-149, 127), (-149, -5))])
@pytest.mark.parametrize("symmetric", [False, True])
def test_matmuls_in_bfloat16(symmetric, ranges, chance, threads, monkeypatch):
    monkeypatch.setattr(matmul, "_functions", lambda: None)  # no matrix unit
    ranges = ranges[::-1] if symmetric else ranges
    m, n, k = (chance.randint(1, 140) for _ in range(3))
    k *= chance.choice((1, 1, 8))
    a, b = (wild(rows, k + 3, low=low, high=high)[:, 1:-2] for rows, (low, high) in zip((m, n), ranges))
    a = torch.empty(k, m + 1)[:, 1:].t().copy_(a) if chance.random() < 0.5 else a
    b = a.t() if symmetric else b.contiguous().t() if chance.random() < 0.5 else b.t().contiguous()
    before = torch.ones(m, b.shape[1]) if symmetric else wild(m, n, low=-149, high=3)
    around = torch.full((m + 2, b.shape[1] + 5), 7.0)
    out, alpha = around[1:-1, 2:-3], chance.choice((1.0, -0.3))

    def compute():
        out.copy_(before)
        return [matmul.add_matmul(out, a, b, alpha, symmetric).nan_to_num(0.0)]  # infinity times 0

    (result,) = on_threads(threads, compute, range(1, 6))
    assert int((around == 7.0).sum()) >= around.numel() - out.numel(), "written beside its place"
    assert not symmetric or torch.equal(result, result.t())
    # The instructions take subnormal numbers for zero, and flush subnormal sums.
    a, b = (torch.where(x.abs() < FLUSHED, torch.zeros(()), x).bfloat16().double() for x in (a, b))
    sums = abs(alpha) * (a.abs() @ b.abs()) + before.abs()
    assert_within(result, alpha * (a @ b) + before, sums, k + 2, lost=FLUSHED)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_matmuls_of_the_row_decoder(kind, chance, unit_of_rows):
    outputs, depth, count = chance.randint(1, 70), chance.randint(1, 300), chance.choice((0, 1, 3, 14))
    layer = torch.nn.Linear(depth, outputs)
    layer.weight.copy_(wild(outputs, depth, high=-9))
    layer.bias.copy_(wild(outputs))
    if kind == "int8":
        layer = Int8Linear(layer.weight, layer.bias)
    if kind == "bfloat16":
        layer.bfloat16()
    x = wild(count, depth, high=110)  # int8 sums, up to 127 * 300 times as large, are scaled last: the stated ceiling
    if count > 2:
        x[1] = NAN
    result = Packed(layer.weight, layer.bias, getattr(layer, "scale", None))(x)
    assert odd_rows(result) == ([1] if count > 2 else [])
    keep = [i for i in range(count) if count < 3 or i != 1]
    weight = layer.weight.double() * (layer.scale.double()[:, None] if kind == "int8" else 1)
    exact = F.linear(x[keep].double(), weight, layer.bias.double())
    sums = F.linear(x[keep].double().abs(), weight.abs(), layer.bias.double().abs())
    lost = torch.full_like(sums, LOST)  # scales come last: a subnormal sum is lost before them
    if kind == "int8" and unit_of_rows != "none":  # inputs as whole numbers of 30 bits
        lost += x[keep].double().abs().amax(dim=1, keepdim=True) * 2.0**-30 * weight.abs().sum(dim=1)
    assert_within(result[keep], exact, sums, depth + 1, times=2, lost=lost[sums < LARGEST / 4])


# ---- gelu, residual add, dropout, the gradient's norm


def exact_gelu(x, bias, gated, grad_output):
    """In double precision: the left half, the gate, the result, and the gradient for x."""
    exact = (x if bias is None else x + bias).double().requires_grad_()  # one rounding that both have
    left, gate = exact.chunk(2, dim=-1) if gated else (torch.ones(()).double(), exact)
    expected = left * F.gelu(gate)
    expected.backward(grad_output.double())
    return left.detach(), gate.detach(), expected.detach(), exact.grad


def native_gelu(x, bias, gated, grad_output, dropout=elementwise.NO_DROPOUT):
    """The result and the gradients for x and bias, with which the result is computed once more to the bit."""
    again, grad_input = grad_output.clone(), torch.full_like(x, NAN)
    result = elementwise.gelu(x, gated, bias, dropout)
    grad_bias = elementwise.gelu_backward(x, gated, again, grad_input, bias, dropout)
    assert torch.equal(again, result)
    return result, grad_input, torch.zeros(0) if grad_bias is None else grad_bias


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "geglu"])
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 16), (70, 37), (33, 64)])
def test_gelu_of_all_shapes(gated, rows, width, threads):
    torch.manual_seed(0)
    x, grad_output = torch.randn(2, rows, width * (1 + gated)) * 3, torch.randn(2, rows, width)
    for bias in (None, torch.randn(width * (1 + gated))):
        *_, expected, grad_input = exact_gelu(x, bias, gated, grad_output)
        found = on_threads(threads, lambda bias=bias: native_gelu(x, bias, gated, grad_output))
        assert_close(found[0], expected, 3e-7)
        assert_close(found[1], grad_input, 3e-7)
        if bias is not None:
            assert_close(found[2], grad_input.sum(dim=(0, 1)), 3e-6)
        dropout = Dropout(9, 0.3)
        result, grad_input, _ = native_gelu(x, bias, gated, grad_output, dropout)
        assert torch.equal(result, elementwise.drop(found[0].clone(), dropout))
        assert torch.equal(grad_input, native_gelu(x, bias, gated, elementwise.drop(grad_output.clone(), dropout))[1])


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "geglu"])
def test_gelu_of_all_numbers(gated, chance):
    count, width = chance.choice((0, 1, 5)), chance.randint(1, 70)
    x = wild(count, width * (1 + gated))
    near = torch.rand(x.shape) < 0.5  # where the function bends
    x = torch.where(near, torch.randn(x.shape) * 6, x)
    bias = torch.where(torch.rand(x.shape[1]) < 0.5, wild(x.shape[1], high=4), torch.zeros(x.shape[1]))
    grad_output = wild(count, width, high=40)
    left, gate, expected, exact_grad = exact_gelu(x, bias, gated, grad_output)
    result, grad_input, grad_bias = native_gelu(x, bias, gated, grad_output)
    left, gate, size = left.abs(), gate.abs(), left.abs() * gate.abs()
    lost = FLUSHED * (1 + left)
    assert_within(result, expected, size, 1, times=60, lost=lost.expand_as(size)[size < LARGEST / 4])
    bounds = grad_output.double().abs() * left * (1 + gate.clamp(max=20))
    if gated:
        bounds = torch.cat([grad_output.double().abs() * gate, bounds], dim=1)
    lost = FLUSHED * (1 + grad_output.double().abs() * (1 + left))
    lost = torch.cat([lost.expand_as(size)] * (1 + gated), dim=1)
    assert_within(grad_input, exact_grad, bounds, 1, times=60, lost=lost[bounds < LARGEST / 4])
    summed = grad_input.double()
    assert_within(grad_bias, summed.sum(dim=0), summed.abs().sum(dim=0), count + 32)


def test_gelu_relative_to_its_result_and_of_what_is_not_finite():
    """The left tail too is right, as far as e^(-x^2 / 2) is in float32."""
    sizes = torch.logspace(-45, 38, 4000)
    x = torch.cat([sizes, -sizes, torch.linspace(-14, 14, 20001), torch.tensor([0.0, -0.0])])[None]
    exact = x.double().requires_grad_()
    expected = 0.5 * exact * torch.special.erfc(-exact / 2**0.5)
    expected.sum().backward()
    result, grad_input, _ = native_gelu(x, None, False, torch.ones_like(x))
    error = (result.double() - expected).abs() / expected.abs().clamp(min=1e-37)
    assert error[x > -11].max() < 1e-5 and (result.double() - expected).abs()[x.abs() < 14].max() < 1e-6
    assert (grad_input.double() - exact.grad).abs().max() < 3e-7
    odd = torch.tensor([[NAN, INF, -INF, 3.4e38, -3.4e38, 1.0, -0.0, 0.0]])
    bits = torch.tensor([[0x7F800001, 0x7FC00001, -1]], dtype=torch.int32).view(torch.float32)  # other nans
    odd = torch.cat([odd, bits], dim=1)
    expected = F.gelu(odd.double()).float()  # oneDNN's float32 gelu(inf) is not a number on AVX-512
    torch.testing.assert_close(elementwise.gelu(odd, False), expected, equal_nan=True)
    again, grad_input = torch.ones_like(odd), torch.empty_like(odd)
    elementwise.gelu_backward(odd, False, again, grad_input)
    assert again.isfinite().tolist() == grad_input.isfinite().tolist() == [[False] * 3 + [True] * 5 + [False] * 3]


def heads_of(qkv, heads, scales, angles, grad_output):
    """Prepared heads, and the gradients of qkv and scales."""
    own = [x.clone().requires_grad_() for x in (qkv, scales) if x is not None]
    result = ops.prepare_heads(own[0], heads, None if scales is None else own[1], angles)
    return [result.detach(), *torch.autograd.grad(result, own, grad_output)]


@pytest.mark.parametrize("heads, width, turned", [(1, 4, 4), (4, 56, 56), (3, 20, 12), (2, 130, 32)])
@pytest.mark.parametrize("scaled", [True, False])
def test_prepared_heads_of_all_shapes(heads, width, turned, scaled, threads):
    torch.manual_seed(0)
    qkv, grad_output = torch.randn(2, 3, 37, 3 * heads * width)
    scales = torch.rand(2, width) + 0.5 if scaled else None
    for angles in (torch.randn(37, turned // 2).repeat_interleave(2, dim=1), None):
        given = [x if x is None else x.double() for x in (qkv, scales, angles, grad_output)]
        with ops.use("reference"):
            expected = heads_of(given[0], heads, *given[1:])
        for grad in (grad_output, grad_output.mT.contiguous().mT):
            found = on_threads(threads, lambda given=(qkv, heads, scales, angles, grad): heads_of(*given), range(1, 6))
            for own, exact in zip(found, expected):
                assert_close(own, exact, 1e-6)


def test_prepared_heads_of_all_numbers(chance):
    """Squares may vanish or overflow; what is not finite stays in its head."""
    heads, width, count = chance.randint(1, 3), 4 * chance.randint(1, 17), chance.choice((1, 5))
    low = chance.choice((-149, -30, 70))  # beside 2^64 it depends on the order of a sum whether it overflows
    qkv = wild(count, 6, 3 * heads * width, low=low, high=low + 50)
    qkv[0, 2, 0] = chance.choice((NAN, INF, -INF, 0.0))
    angles = (torch.randn(6, width // 2) * 100).repeat_interleave(2, dim=1)
    scales, grad_output = wild(2, width, low=-10, high=10), wild(*qkv.shape, low=-40, high=10)
    found = heads_of(qkv, heads, scales, angles, grad_output)
    with ops.use("reference"):
        expected = heads_of(qkv, heads, scales, angles, grad_output)
    parts = qkv.double().unflatten(-1, (3, heads, width))
    inverse = torch.rsqrt(parts.square().mean(dim=-1, keepdim=True).float() + HEAD_EPS).double()
    inverse[:, :, 2] = 1
    normed = parts * inverse * torch.cat([scales, torch.ones(1, width)])[:, None].abs()
    sizes = normed.abs().amax(dim=-1, keepdim=True).expand_as(parts)
    given = grad_output.double().unflatten(-1, (3, heads, width)).abs().amax(dim=-1, keepdim=True) * inverse
    slopes = (given * (1 + sizes) * scales.abs().max().clamp(min=1) * width).expand_as(parts)
    for own, exact, size in zip(found, expected, (sizes, slopes)):
        assert bool((own.isfinite() | ~exact.isfinite()).all())  # autograd multiplies overflown squares by 0
        keep = exact.isfinite() & size.flatten(2).isfinite()
        assert bool(((own - exact)[keep].abs().double() <= 1e-5 * size.flatten(2)[keep] + FLUSHED * 1e3).all())
    assert bool((found[2].isfinite() | ~expected[2].isfinite()).all())
    bad, hurt = (set(odd_rows(x[0])) for x in (qkv, found[0]))
    assert hurt <= bad


@pytest.mark.parametrize("rows, width", [(1, 1), (7, 16), (9, 37), (70, 130)])
def test_residual_add_and_scaled_rows_of_all_shapes(rows, width, threads):
    torch.manual_seed(1)
    x, residual, scale, bias = (torch.randn(size, width) for size in (rows, rows, 1, 1))
    for own_scale, own_bias in ((scale[0], bias[0]), (None, bias[0]), (scale[0], None), (None, None)):
        branch = x.double() if own_bias is None else x.double() + own_bias
        expected = residual + (branch if own_scale is None else own_scale.double() * branch)
        add = lambda given=(own_scale, own_bias): [elementwise.add_branch(residual, *given, x.clone())]  # noqa: E731
        assert_close(on_threads(threads, add)[0], expected, 3e-7)
    factor = torch.randn(rows)

    def sum_and_scale():
        scaled = x.clone()
        return elementwise.row_dots_and_scale(scaled, residual, factor), scaled

    sums, scaled = on_threads(threads, sum_and_scale)
    assert_close(sums, (x.double() * residual).sum(dim=1), 1e-5)
    assert torch.equal(scaled, x * factor[:, None])


def test_residual_add_and_scaled_rows_of_all_numbers(chance):
    count, width = chance.choice((0, 1, 7)), chance.randint(1, 90)
    residual, branch = wild(count, width), wild(count, width, high=60)
    scale, bias = wild(1, 1, width, high=60), wild(width)
    exact = residual.double() + scale[0].double() * (branch.double() + bias.double())
    sums = residual.double().abs() + scale[0].double().abs() * (branch.double().abs() + bias.double().abs())
    result = elementwise.add_branch(residual, scale, bias, branch.clone())
    assert_within(result, exact, sums, 3, lost=LOST * (1 + float(scale.abs().max())))
    x, y, factor = wild(count, width), wild(count, width, high=-8), wild(count, high=0)
    scaled, multiplied = x.clone(), x.double() * y.double()
    result = elementwise.row_dots_and_scale(scaled, y, factor)
    assert_within(result, multiplied.sum(1), multiplied.abs().sum(1), width)
    assert torch.equal(scaled, x * factor[:, None])


def test_norm_of_many_tensors(chance, threads):
    tensors = [torch.randn(size) for size in ((1,), (37,), (8, 2049), (3, 0), (70, 1000))] + [torch.tensor(2.0)]
    exact = torch.cat([tensor.flatten() for tensor in tensors]).double().norm()
    assert_close(on_threads(threads, lambda: [elementwise.total_norm(tensors)])[0], exact, 1e-6)
    for odd, nature in ((NAN, torch.isnan), (-INF, torch.isinf)):
        tensors[2][5, 3] = odd
        assert nature(elementwise.total_norm(tensors))
    assert elementwise.total_norm([torch.empty(0)]) == 0
    tensors = [wild(chance.choice((0, 1, 400)), high=55), wild(chance.randint(0, 5000), high=50), wild(1, high=55)]
    squares = sum(tensor.double().square().sum() for tensor in tensors)[None]
    assert_within(elementwise.total_norm(tensors)[None].double() ** 2, squares, squares, 64)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9])
def test_as_many_numbers_are_dropped_as_asked_for(probability):
    torch.manual_seed(0)
    x = torch.rand(1000, 999) + 1
    dropped = [elementwise.drop(x.clone(), Dropout(seed, probability)) for seed in (1, 1, 2, 1 << 32)]
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
        elementwise.drop(x, Dropout(1, 1.0))


def test_dropout_of_all_numbers(chance, threads):
    x, probability = wild(chance.choice((0, 1, 9000)), high=126), chance.choice((0.0, 0.1, 0.5))
    kept = elementwise.drop(torch.ones(x.shape), Dropout(5, probability)) != 0
    [result] = on_threads(threads, lambda: [elementwise.drop(x.clone(), Dropout(5, probability))], counts=(1, 3))
    exact = torch.where(kept, x.double() / (1 - probability), torch.zeros(()).double())
    assert_within(result, exact, exact.abs(), 1)
    assert elementwise.drop(torch.full((100,), NAN), Dropout(7, 0.5)).isnan().all()


# ---- attention in training


def attend(qkv, pattern, heads, grid):
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mask = build_mask(pattern, qkv.shape[1] - grid * grid + 1, grid)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def exact_attention(qkv, grad, pattern, heads, grid):
    """In double precision: the result, and the gradient for qkv."""
    exact = qkv.double().requires_grad_()
    expected = attend(exact, pattern, heads, grid)
    expected.backward(grad.double())
    return expected.detach(), exact.grad


def native_attention_of(qkv, grad, pattern, heads, grid):
    """The same natively; the result is computed once more with the gradient, to the bit."""
    seen = visible(pattern, qkv.shape[1] - grid * grid + 1, grid)
    assert NativeAttention.suits(qkv, seen)
    own, grad_qkv = NativeAttention(seen, heads), torch.full_like(qkv, NAN)
    result = own(qkv)
    torch.testing.assert_close(own.recompute(qkv, grad.clone(), grad_qkv), result, rtol=0, atol=0, equal_nan=True)
    return result, grad_qkv


@pytest.mark.parametrize("pattern", ["axial_row", "axial_col", "full"])
@pytest.mark.parametrize("batch, text, grid, heads, width", [
    (1, 7, 4, 3, 32), (2, 80, 16, 2, 64), (3, 1, 5, 2, 40), (1, 33, 17, 2, 8), (2, 3, 1, 1, 5), (1, 50, 7, 2, 100)])
def test_attention_of_all_shapes(pattern, batch, text, grid, heads, width, threads):
    torch.manual_seed(batch)
    length = text + grid * grid - 1
    qkv, grad = torch.randn(batch, length, 3 * heads * width), torch.randn(batch, length, heads * width)
    expected, expected_grad = exact_attention(qkv, grad, pattern, heads, grid)
    result, grad_qkv = on_threads(threads, lambda: native_attention_of(qkv, grad, pattern, heads, grid))
    assert_close(result, expected, 1e-6)
    assert_close(grad_qkv, expected_grad, 3e-6)


@pytest.mark.parametrize("grid", [3, 16, 17])
def test_what_scratch_memory_held_before_does_not_matter(grid, monkeypatch):
    plain, results = native_attention._scratch, []
    torch.manual_seed(0)
    qkv, grad = torch.randn(1, 5 + grid * grid - 1, 30), torch.randn(1, 5 + grid * grid - 1, 10)
    for value in (0.0, NAN):
        monkeypatch.setattr(native_attention, "_scratch", lambda *sizes, value=value: plain(*sizes).fill_(value))
        results.append(native_attention_of(qkv, grad, "axial_col", 2, grid))
    assert all(torch.equal(first, second) and first.isfinite().all() for first, second in zip(*results))


@pytest.mark.parametrize("pattern", ["axial_row", "axial_col", "full"])
def test_attention_of_all_numbers(pattern, chance):
    """Scores are exact up to `off`, weights up to twice as much of themselves."""
    batch, heads, grid = chance.choice((1, 2)), chance.choice((1, 3)), chance.choice((1, 3, 8))
    text, width = chance.randint(1, 60), chance.choice((1, 8, 21, 64))
    length = text + grid * grid - 1
    shape = (batch, length, heads * width)
    # Scores of a few hundred at most, of factors of all sizes; values of all sizes.
    high = chance.choice((-70, 0, 3))
    query, key = wild(*shape, high=high + 2), wild(*shape, low=-100, high=-high)
    qkv, grad = torch.cat([query, key, wild(*shape, high=50)], dim=2), wild(*shape, high=50)
    expected, expected_grad = exact_attention(qkv, grad, pattern, heads, grid)
    result, grad_qkv = native_attention_of(qkv, grad, pattern, heads, grid)

    def split(x):
        return x.double().unflatten(2, (-1, heads, width)).permute(2, 0, 3, 1, 4)

    mask = build_mask(pattern, text, grid)
    (q, k, v), (g,) = split(qkv), split(grad)
    scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    off = EPS * (width * (q.abs() @ k.abs().transpose(-1, -2) / width**0.5).masked_fill(~mask, 0) + 100)
    off = off.amax(-1, keepdim=True) + scores.masked_fill(~mask, 0).abs().amax(-1, keepdim=True) * EPS * 4
    assert float(off.max()) < 0.1
    unsure = weights + FLUSHED * mask  # exponentials flush
    bound = (unsure * (4 * off + length * EPS)) @ v.abs() + LOST * length
    assert bool(((split(result)[0] - split(expected)[0]).abs() <= 4 * bound).all())
    flows = g.abs() @ v.abs().transpose(-1, -2)
    flows = unsure * (flows + (unsure * flows).sum(-1, keepdim=True))
    sums = (flows @ k.abs(), flows.transpose(-1, -2) @ q.abs(), unsure.transpose(-1, -2) @ g.abs())
    lost = FLUSHED * length * (1 + float(k.abs().max()) + float(q.abs().max()))
    lost = (lost, lost + flows.sum(-2)[..., None] * LOST, lost)  # of queries that are subnormal when they are scaled
    off = 12 * float(off.max()) + 4 * (length + width) * EPS
    for error, size, most in zip((split(grad_qkv) - split(expected_grad)).abs(), sums, lost):
        assert bool((error <= 4 * off * size + most)[size < LARGEST / 4].all())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 4, 12])  # of 5 + 15: the first and the last of the text part, and a code
def test_attention_keeps_what_is_not_finite_in_its_head(bad, position):
    qkv, grad = torch.randn(2, 20, 3 * 2 * 8), torch.randn(2, 20, 16)
    qkv[1, position, ::16] = bad  # of the first head: a query, a key and a value
    result, grad_qkv = native_attention_of(qkv, grad, "axial_row", 2, 4)
    assert result[1, position, :8].isnan().all() and grad_qkv[1, position].isnan().any()
    for x in (result, grad_qkv):
        odd = (~x.isfinite()).unflatten(2, (-1, 2, 8)).any(dim=2).any(dim=1).any(dim=-1)  # (B, H)
        assert odd.tolist() == [[False, False], [True, False]]
    qkv = 30 * torch.randn(1, 20, 24)  # large scores do not overflow
    assert_close(NativeAttention(visible("axial_col", 5, 4), 1)(qkv), attend(qkv.double(), "axial_col", 1, 4), 1e-5)


# ---- the VQGAN

BACK = torch.tensor(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
).double()  # fmt: skip
OUT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]).double()


def sums_of_tiles(x, weight):
    """What Winograd's algorithm adds up for each result: sum(|a| |b|) with its own a and b. (B, out, H, W)"""
    height, width = x.shape[2:]
    patches = F.pad(x, (1, 4 + 1, 1, 4 + 1)).abs().unfold(2, 6, 4).unfold(3, 6, 4)  # (B, in, tiles, tiles, 6, 6)
    inside = torch.einsum("pj,bcyxji,qi->bcyxpq", BACK.abs(), patches, BACK.abs())
    transform = torch.tensor(convolution._G).double().abs()
    weights = torch.einsum("pk,ockl,ql->ocpq", transform, weight.abs(), transform)
    points = torch.einsum("ocpq,bcyxpq->boyxpq", weights, inside)
    tiles = torch.einsum("jp,boyxpq,iq->boyjxi", OUT.abs(), points, OUT.abs())
    return tiles.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


@pytest.mark.parametrize("high", [60, 118])
@torch.no_grad()
def test_convolutions(high, chance):
    height, width, batch = chance.randint(24, 31), chance.randint(24, 31), chance.choice((0, 1, 2))
    conv = Conv3x3(16, 32)
    conv.weight.copy_(wild(32, 16, 3, 3, low=-120, high=-10))
    conv.bias.copy_(wild(32, high=60))
    x, residual = wild(batch, 16, height, width, high=high), wild(batch, 32, height, width, high=60)
    if convolution.conv3x3_refusal(x, conv.weight):
        pytest.skip("no kernel here")
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1) + residual.double()
    sums = sums_of_tiles(x.double(), conv.weight.double()) + conv.bias.double().abs()[:, None, None] + residual.abs()
    lost = LOST * (1 + float(x.abs().max() if batch else 0)) + 1e4 * LOST
    assert_within(conv(x, residual.clone()), exact, sums, 16 * 9, lost=lost)


@pytest.mark.parametrize("bad", [NAN, INF, 3e38])
@torch.no_grad()
def test_convolutions_of_what_is_not_finite_are_those_of_pytorch(bad):
    conv, x = Conv3x3(16, 32), torch.randn(2, 16, 24, 25)
    x[1, 3, 12, 13] = bad
    torch.testing.assert_close(conv(x), torch.nn.Conv2d.forward(conv, x), equal_nan=True, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_group_norms_with_swish(chance):
    """The variance is taken about the first position of each channel."""
    batch, channels, groups, side = chance.choice((1, 2)), 32, chance.choice((1, 4, 16)), chance.choice((1, 5, 40))
    norm = NormSwish(groups, channels, eps=1e-6)
    norm.weight.copy_(wild(channels, low=-20, high=20))
    norm.bias.copy_(wild(channels, low=-20, high=120))
    x = wild(batch, channels, side, side, high=chance.choice((-60, 0, 45))).to(memory_format=torch.channels_last)
    x = x + chance.choice((0, 100.0)) * (x.abs() < 1)
    result = norm(x)
    y = x.double().unflatten(1, (groups, -1))
    centre, spread = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), unbiased=False, keepdim=True)
    about = (y - y[..., :1, :1]).square().mean((2, 3, 4), keepdim=True)
    about = about + (y[:, :, :, :1, :1] - y[:, :, :1, :1, :1]).square().mean((2, 3, 4), keepdim=True)
    weight = norm.weight.double().abs().unflatten(0, (groups, -1))[None, :, :, None, None]
    factor = weight / (spread + norm.eps).sqrt()
    off = 256 * EPS * about / (spread + norm.eps)
    bound = factor * ((y - centre).abs() * (off + 4 * EPS) + 4 * EPS * (y.abs() + centre.abs() + about.sqrt() * 64))
    normed = F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps)
    bound = 4 * bound.flatten(1, 2) + 60 * EPS * (normed.abs() + norm.bias.double().abs()[:, None, None]) + FLUSHED * 4
    assert bool(((result.double() - F.silu(normed)).abs() <= bound)[bound < LARGEST].all())
    x[0, 0, 0, 0] = NAN
    assert odd_rows(norm(x).unflatten(1, (groups, -1)).flatten(0, 1)) == [0]


# ---- sampling


def test_sampling_from_logits(chance):
    """Each token has the largest sum of logit and noise, by float64 and up to rounding."""
    count, size = chance.choice((0, 1, 6)), chance.choice((1, 7, 300))
    temperature = chance.choice((1.0, 1.3, 1e-3, 1e-30, 1e30))
    logits = torch.where(
        torch.rand(count, size) < 0.5, torch.randn(count, size) * 4, wild(count, size, high=chance.choice((4, 120)))
    )
    logits = torch.where(torch.rand(count, size) < 0.05, torch.tensor(-INF), logits)
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)
    keys = noise.keys(range(count))
    positions = torch.zeros_like(keys)
    token, score = ops.sample(logits, keys, positions, ops.choice_of(count, temperature, None, None))
    exact = logits.double()
    sums = (exact - exact.amax(1, keepdim=True)) / temperature
    sums += noise.gumbel(noise.stream(keys, positions, size), torch.arange(size))
    assert bool((sums.gather(1, token[:, None])[:, 0] >= sums.amax(1) - 1e-5).all())
    likelihood = exact.log_softmax(1).gather(1, token[:, None])[:, 0]
    known = likelihood > -LARGEST
    assert_within(
        score[known], likelihood[known], likelihood.abs()[known] + 20 + exact.amax(1).abs()[known], 1, lost=1e-6
    )
    assert torch.equal(ops.sample(logits, keys, positions, ops.choice_of(count, 0, None, None))[0], logits.argmax(1))


@pytest.mark.parametrize("options", [
    *({"activation": name} for name in ACTIVATIONS), {"norm": "rms", "qk_norm": True, "rotary_2d": True},
], ids=str)
@pytest.mark.parametrize("exponent", [-146, -100, -30, 0, 30, 55])
@torch.no_grad()
def test_steps_of_the_row_decoder(exponent, options):
    """Embeddings of any size, beside the model in float64."""
    models = [random_model(attn_types=("full", "axial_row"), **options) for _ in range(2)]
    models[0].float().image_emb.weight.mul_(2.0**exponent)
    models[1].image_emb.weight.copy_(models[0].image_emb.weight)
    codes, logits = random_codes(3)[:, :9], []
    for model in models:
        decoder = best_decoder(model, 1, 3)[0]
        assert type(decoder) is (NativeDecoder if model is models[0] else Decoder)
        logits.append(decode(decoder, TEXT[:1], codes, count=9))
    torch.testing.assert_close(logits[0].double(), logits[1], rtol=1e-4, atol=1e-4)
