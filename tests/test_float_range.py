"""Native kernels over the whole range of floats: beside float64, from subnormals to 1e38, on 1 to 5 threads.

An error may be some times K * eps * sum(|a| |b|) of a sum of K products wherever that sum is finite, and what a float
loses where it is subnormal. What is not finite stays in its row, its head or its tile.
"""
from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_kernels_training import attend
from test_sampling import TEXT, decode, random_codes, random_model

import ops
from models.patterns import build_mask, visible
from models.quantization import Int8Linear
from models.vqgan_layers import Conv3x3, NormSwish
from ops import build, convolution, matmul
from ops import elementwise as training
from ops.attention_ops import NativeAttention
from ops.rows import Packed
from sampling.decoders import Decoder
from sampling.native import NativeDecoder, best_decoder

pytestmark = pytest.mark.skipif(build.library("training") is None, reason="no C compiler, or kernels are switched off")

LARGEST = torch.finfo(torch.float32).max
EPS = 2.0**-24
LOST = 2.0**-149  # of a subnormal number
FLUSHED = 2.0**-126  # exponentials below are 0
MANY = [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 60))]


@pytest.fixture(params=MANY)
def chance(request):
    """Random sizes; PyTorch's random numbers are seeded, and it has 1 to 5 threads."""
    torch.manual_seed(request.param)
    before, chance = torch.get_num_threads(), random.Random(request.param)
    torch.set_num_threads(chance.randint(1, 5))
    yield chance
    torch.set_num_threads(before)


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
    a = (
        wild(k, m, low=ranges[0][0], high=ranges[0][1]).t()
        if turned[0]
        else wild(m, k, low=ranges[0][0], high=ranges[0][1])
    )
    b = (
        wild(n, k, low=ranges[1][0], high=ranges[1][1]).t()
        if turned[1]
        else wild(k, n, low=ranges[1][0], high=ranges[1][1])
    )
    sums = a.double().abs() @ b.double().abs()
    with mock.patch.object(torch, "mm", side_effect=torch.mm) as by_pytorch:
        result = matmul.matmul(a, b)
    assert by_pytorch.called == bool(sums.max() > 2.0**80), "the matrix unit is for all but the largest numbers"
    assert_within(result, a.double() @ b.double(), sums, k, eps=eps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), LARGEST])
def test_a_number_that_is_not_finite_spoils_its_row_alone(unit, bad):
    a, b = torch.randn(100, 130), torch.randn(130, 90)
    a[70, 65] = bad
    expected = a @ b
    torch.testing.assert_close(matmul.matmul(a, b), expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matmul.matmul(b.t(), a.t()), expected.t(), equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@torch.no_grad()
def test_matmuls_of_the_row_decoder(kind, chance):
    outputs, depth, count = chance.randint(1, 70), chance.randint(1, 300), chance.choice((0, 1, 3, 14))
    layer = torch.nn.Linear(depth, outputs)
    layer.weight.copy_(wild(outputs, depth, high=-9))
    layer.bias.copy_(wild(outputs))
    if kind == "int8":
        layer = Int8Linear(layer.weight, layer.bias)
    x = wild(count, depth, high=110)  # int8 sums, up to 127 * 300 times as large, are scaled last: the stated ceiling
    if count > 2:
        x[1] = float("nan")
    result = Packed(layer.weight, layer.bias, getattr(layer, "scale", None))(x)
    assert odd_rows(result) == ([1] if count > 2 else [])
    keep = [i for i in range(count) if count < 3 or i != 1]
    weight = layer.weight.double() * (layer.scale.double()[:, None] if kind == "int8" else 1)
    exact = F.linear(x[keep].double(), weight, layer.bias.double())
    sums = F.linear(x[keep].double().abs(), weight.abs(), layer.bias.double().abs())
    # Scales come last: a subnormal sum is lost before them.
    assert_within(result[keep], exact, sums, depth + 1, times=2)


# ---- what surrounds them in training


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "geglu"])
def test_gelu_and_its_gradient(gated, chance):
    count, width = chance.choice((0, 1, 5)), chance.randint(1, 70)
    x = wild(count, width * (1 + gated))
    near = torch.rand(x.shape) < 0.5  # where the function bends
    x = torch.where(near, torch.randn(x.shape) * 6, x)
    bias = torch.where(torch.rand(x.shape[1]) < 0.5, wild(x.shape[1], high=4), torch.zeros(x.shape[1]))
    grad_output, grad_input = wild(count, width, high=40), torch.empty_like(x)
    exact = (x + bias).double().requires_grad_()  # one rounding that both have
    left, gate = exact.chunk(2, dim=1) if gated else (torch.ones(()).double(), exact)
    expected = left * F.gelu(gate)
    expected.backward(grad_output.double())
    size = left.detach().abs() * gate.detach().abs()
    result = training.gelu(x, gated, bias)
    lost = FLUSHED * (1 + left.detach().abs())
    assert_within(result, expected.detach(), size, 1, times=60, lost=lost.expand_as(size)[size < LARGEST / 4])
    assert torch.equal(
        F.gelu(x.new_tensor([3.4e38, -3.4e38])), training.gelu(x.new_tensor([[3.4e38, -3.4e38]]), False)[0]
    )
    again = grad_output.clone()
    training.gelu_backward(x, gated, again, grad_input, bias)
    assert torch.equal(again, result)
    slope = left.detach().abs() * (1 + gate.detach().abs().clamp(max=20))
    bounds = grad_output.double().abs() * slope
    if gated:
        bounds = torch.cat([grad_output.double().abs() * gate.detach().abs(), bounds], dim=1)
    lost = FLUSHED * (1 + grad_output.double().abs() * (1 + left.detach().abs()))
    lost = torch.cat([lost.expand_as(size)] * (1 + gated), dim=1)
    assert_within(grad_input, exact.grad, bounds, 1, times=60, lost=lost[bounds < LARGEST / 4])


def test_gelu_of_what_is_not_finite():
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0, -0.0, 0.0]])
    odd = torch.cat([odd, torch.tensor([[0x7F800001, 0x7FC00001, -1]], dtype=torch.int32).view(torch.float32)], dim=1)
    torch.testing.assert_close(training.gelu(odd, False), F.gelu(odd), equal_nan=True)


def test_branches_sums_and_norms(chance):
    count, width = chance.choice((0, 1, 7)), chance.randint(1, 90)
    residual, branch, scale, bias = (
        wild(count, width),
        wild(count, width, high=60),
        wild(1, 1, width, high=60),
        wild(width),
    )
    exact = residual.double() + scale[0].double() * (branch.double() + bias.double())
    sums = residual.double().abs() + scale[0].double().abs() * (branch.double().abs() + bias.double().abs())
    result = training.add_branch(residual, scale, bias, branch.clone())
    assert_within(result, exact, sums, 3, lost=LOST * (1 + float(scale.abs().max())))
    x, y, factor = wild(count, width), wild(count, width, high=-8), wild(count, high=0)
    scaled = x.clone()
    result = training.sum_products_and_scale(scaled, y, factor)
    assert_within(result, (x.double() * y.double()).sum(1), (x.double() * y.double()).abs().sum(1), width)
    assert torch.equal(scaled, x * factor[:, None])
    tensors = [wild(count, width, high=55), wild(chance.randint(0, 5000), high=50), wild(1, high=55)]
    squares = sum(tensor.double().square().sum() for tensor in tensors)
    found = training.total_norm(tensors)
    assert_within(found[None].double() ** 2, squares[None], squares[None], 64)
    tensors[1] = torch.cat([tensors[1], torch.tensor([float("nan")])])
    assert training.total_norm(tensors).isnan() and training.total_norm([torch.empty(0)]) == 0


def test_dropout(chance):
    x, probability = wild(chance.choice((0, 1, 9000)), high=126), chance.choice((0.0, 0.1, 0.5))
    kept = training.drop(torch.ones(x.shape), 5, probability) != 0
    result = training.drop(x.clone(), 5, probability)
    exact = torch.where(kept, x.double() / (1 - probability), torch.zeros(()).double())
    assert_within(result, exact, exact.abs(), 1)


@pytest.mark.parametrize("pattern", ["axial_row", "axial_col", "full"])
def test_attention_and_its_gradient(pattern, chance):
    """Scores are exact up to `off`, weights up to twice as much of themselves."""
    batch, heads, grid = chance.choice((1, 2)), chance.choice((1, 3)), chance.choice((1, 3, 8))
    text, width = chance.randint(1, 60), chance.choice((1, 8, 21, 64))
    length = text + grid * grid - 1
    shape = (batch, length, heads * width)
    # Scores of a few hundred at most, of factors of all sizes; values of all sizes.
    high = chance.choice((-70, 0, 3))
    query, key = wild(*shape, high=high + 2), wild(*shape, low=-100, high=-high)
    qkv, grad = torch.cat([query, key, wild(*shape, high=50)], dim=2), wild(*shape, high=50)
    exact = qkv.double().requires_grad_()
    expected = attend(exact, pattern, heads, grid)
    expected.backward(grad.double())

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
    own = NativeAttention(visible(pattern, text, grid), heads)
    result, for_qkv = own(qkv), torch.full_like(qkv, float("nan"))
    bound = (unsure * (4 * off + length * EPS)) @ v.abs() + LOST * length
    assert bool(((split(result)[0] - split(expected.detach())[0]).abs() <= 4 * bound).all())
    again = own.recompute(qkv, grad.clone(), for_qkv)
    assert torch.equal(again, result)

    flows = g.abs() @ v.abs().transpose(-1, -2)
    flows = unsure * (flows + (unsure * flows).sum(-1, keepdim=True))
    sums = (flows @ k.abs(), flows.transpose(-1, -2) @ q.abs(), unsure.transpose(-1, -2) @ g.abs())
    lost = FLUSHED * length * (1 + float(k.abs().max()) + float(q.abs().max()))
    lost = (lost, lost + flows.sum(-2)[..., None] * LOST, lost)  # of queries that are subnormal when they are scaled
    off = 12 * float(off.max()) + 4 * (length + width) * EPS
    for error, size, most in zip((split(for_qkv) - split(exact.grad)).abs(), sums, lost):
        assert bool((error <= 4 * off * size + most)[size < LARGEST / 4].all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_attention_keeps_what_is_not_finite_in_its_head(bad):
    qkv, grad = torch.randn(2, 20, 3 * 2 * 8), torch.randn(2, 20, 16)
    qkv[1, 3, ::16] = bad  # of the first head: a query, a key and a value
    own, for_qkv = NativeAttention(visible("axial_row", 5, 4), 2), torch.empty_like(qkv)
    result = own.recompute(qkv, grad, for_qkv)
    for x in (own(qkv), result, for_qkv):
        odd = (~x.isfinite()).unflatten(2, (-1, 2, 8)).any(dim=2).any(dim=1).any(dim=-1)  # (B, H)
        assert odd.tolist() == [[False, False], [True, False]]


# ---- the VQGAN

BACK = torch.tensor(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
).double()  # fmt: skip
OUT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]).double()


def sums_of_tiles(x, weight):
    """What Winograd's algorithm adds up for each result: sum(|a| |b|) with its own a and b. (B, out, H, W)"""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 4 + 1, 1, 4 + 1)).abs()
    patches = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # (B, in, tiles, tiles, 6, 6)
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
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
    x[0, 0, 0, 0] = float("nan")
    odd = odd_rows(norm(x).unflatten(1, (groups, -1)).flatten(0, 1))
    assert odd == [0]


# ---- sampling


def test_sampling_from_logits(chance):
    """Each token lies where the cumulative distribution, by float64 and up to rounding, passes the random number."""
    count, size = chance.choice((0, 1, 6)), chance.choice((1, 7, 300))
    temperature = chance.choice((1.0, 1.3, 1e-3, 1e-30, 1e30))
    logits = torch.where(
        torch.rand(count, size) < 0.5, torch.randn(count, size) * 4, wild(count, size, high=chance.choice((4, 120)))
    )
    logits = torch.where(torch.rand(count, size) < 0.05, torch.tensor(-float("inf")), logits)
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)
    uniform = torch.rand(count, dtype=torch.float64)
    token, score = ops.sample(logits, uniform, ops.choice_of(count, temperature, None, None))
    exact = logits.double()
    share = ((exact - exact.amax(1, keepdim=True) if size else exact) / temperature).softmax(1)
    after = share.cumsum(1).gather(1, token[:, None])[:, 0]
    before, off = after - share.gather(1, token[:, None])[:, 0], 1e-4
    assert bool(((before - off <= uniform) & (uniform <= after + off)).all())
    assert bool((share.gather(1, token[:, None]) > 0).all())
    likelihood = exact.log_softmax(1).gather(1, token[:, None])[:, 0]
    known = likelihood > -LARGEST
    assert_within(
        score[known], likelihood[known], likelihood.abs()[known] + 20 + exact.amax(1).abs()[known], 1, lost=1e-6
    )
    greedy = ops.sample(logits, uniform, ops.choice_of(count, 0, None, None))[0]
    assert torch.equal(greedy, logits.argmax(1))


@pytest.mark.parametrize("activation", ["geglu", "gelu", "quick_gelu"])
@pytest.mark.parametrize("exponent", [-146, -100, -30, 0, 30, 55])
@torch.no_grad()
def test_steps_of_the_row_decoder(exponent, activation):
    """Embeddings of any size, beside the model in float64."""
    models = [random_model(attn_types=("full", "axial_row"), activation=activation) for _ in range(2)]
    models[0].float().image_emb.weight.mul_(2.0**exponent)
    models[1].image_emb.weight.copy_(models[0].image_emb.weight)
    codes, logits = random_codes(3)[:, :9], []
    for model in models:
        decoder = best_decoder(model, 1, 3)[0]
        assert type(decoder) is (NativeDecoder if model is models[0] else Decoder)
        logits.append(decode(decoder, TEXT[:1], codes, count=9))
    torch.testing.assert_close(logits[0].double(), logits[1], rtol=1e-4, atol=1e-4)
