"""Matmuls by the matrix unit: as exact as PyTorch's in float32, in any shape, on any threads."""
from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from helpers import in_threads, refused
from test_ops import learn

from models.config import DalleConfig
from models.dalle import DalleModel
from ops import matmul as matrix

NAN, INF, LARGEST = float("nan"), float("inf"), torch.finfo(torch.float32).max
SQUARE = torch.ones(64, 64)
needs_unit = pytest.mark.usefixtures("unit")

SHAPES = [
    (64, 64, 64), (65, 67, 71), (77, 131, 705), (96, 241, 128),
    (160, 270, 1500),  # several steps of depth
    (131, 1000, 96),  # many units of columns
    (130, 300, 2200),  # units and rows are packed ahead, in four steps of depth
    (700, 300, 70),  # tall, of a short k
    (700, 70, 300),  # tall: the transpose is computed
    (1400, 710, 64),  # more rows than are packed at a time
]
LARGE = [(672, 512, 1500), (131, 3000, 96), (200, 700, 2200), (2000, 300, 70), (1500, 1500, 64)]


def operand(rows, columns, turned, scale=1.0):
    """Random numbers amid others that must not be read as theirs: not a number."""
    rows, columns = (columns, rows) if turned else (rows, columns)
    inside = torch.full((rows + 2, columns + 3), NAN)[1:-1, 1:-2]
    inside.copy_(torch.randn(rows, columns) * scale)
    return inside.t() if turned else inside


def error(result, exact):
    return float((result.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("rows, columns, depth", [*SHAPES, *LARGE])
def test_no_less_exact_than_the_matmul_of_pytorch(rows, columns, depth, turned, threads, unit):
    if unit == "emulated" and (rows, columns, depth) in LARGE:
        pytest.skip("slow")
    torch.manual_seed(depth)
    a, b = operand(rows, depth, turned[0]), operand(depth, columns, turned[1])
    around = torch.full((rows + 2, columns + 5), 7.0)
    out = around[1:-1, 2:-3]
    exact, usual = a.double() @ b.double(), a @ b
    assert matrix.suits(a, b, out)
    # One number of threads for each shape is enough of what is slow.
    for count in (1 + (depth + sum(turned)) % 3,) if unit == "emulated" else (1, 2, 3):
        threads(count)
        assert matrix.matmul(a, b, out) is out and error(out, exact) <= 1.1 * error(usual, exact)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6 * depth)
        out.fill_(7.0)
        assert bool((around == 7.0).all()), "written beside its place"


def test_the_same_on_any_number_of_threads(unit, threads):
    """Where the last row is packed on its own, by one of some threads, others may be steps of depth behind."""
    torch.manual_seed(4)
    for (rows, columns, depth), counts, times in (
        ((133, 477, 1500), (2, 3, 5), 1), ((65, 64, 2200), (3, 5, 7), 150 if unit == "native" else 4),
    ):
        a, b = torch.randn(rows, depth), torch.randn(depth, columns)
        threads(1)
        expected = matrix.matmul(a, b)
        for count in counts:
            threads(count)
            assert all(torch.equal(matrix.matmul(a, b), expected) for _ in range(times))


@needs_unit
@pytest.mark.parametrize("values", [
    [1 + 2**-7 - 2**-23, 1 + 2**-8 + 2**-9, 2 - 2**-23],  # halfway between numbers of 8 bits, and just beside
    [1e-30, 3e-30, 7.77e-30], [1e15, -3.3e14, 1.234567e15], [1.0, 2.0, -3.0],
], ids=["halfway", "small", "large", "whole"])
def test_exact_for_digits_of_all_kinds(values):
    torch.manual_seed(1)
    a = torch.tensor(values)[torch.randint(3, (96, 320))]
    b = torch.tensor([1 + 2**-7 - 2**-23, 0.3, -0.7, 1 / 3])[torch.randint(4, (320, 416))]
    exact = a.double() @ b.double()
    assert error(matrix.matmul(a, b), exact) <= 1.1 * error(a @ b, exact) + 1e-45
    if values == [1.0, 2.0, -3.0]:
        whole = torch.randint(-99, 99, (320, 416)).float()
        assert torch.equal(matrix.matmul(a, whole), a @ whole)


@needs_unit
@pytest.mark.parametrize("bad", [NAN, INF, -INF, LARGEST])
def test_what_is_not_finite_spoils_its_row_alone(bad):
    a, b = torch.randn(100, 130), torch.randn(130, 300)
    a[70, 65] = bad
    expected = a @ b
    for found in (matrix.matmul(a, b), matrix.matmul(b.t(), a.t()).t()):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert bool(matrix.matmul(torch.randn(100, 130), b).isfinite().all()), "packed memory kept it"


def test_threads_of_python_do_not_disturb_each_other(unit):
    torch.manual_seed(2)
    pairs = [(torch.randn(100 + 10 * i, 640), torch.randn(640, 300 + 50 * i)) for i in range(4)]
    expected = [matrix.matmul(a, b) for a, b in pairs]

    def again(pair, result):
        return all(torch.equal(matrix.matmul(*pair), result) for _ in range(20 if unit == "native" else 1))

    assert all(in_threads(*(functools.partial(again, *case) for case in zip(pairs, expected))))


@needs_unit
def test_others_find_the_matrix_unit_as_it_was_and_wrong_shapes_are_refused():
    torch.manual_seed(3)
    a, b = torch.randn(200, 300).bfloat16(), torch.randn(300, 250).bfloat16()
    before = a @ b
    for _ in range(3):
        matrix.matmul(torch.randn(200, 300), torch.randn(300, 250))
        assert torch.equal(a @ b, before)
    for wrong in ((torch.ones(64, 65), torch.ones(66, 64)), (SQUARE, SQUARE, torch.ones(64, 65))):
        refused("matmul shapes do not fit", matrix.matmul, *wrong, kind=ValueError)


@pytest.mark.parametrize("a, b", [
    (torch.randn(5, 100), torch.randn(100, 100)), (torch.randn(100, 100).double(), torch.randn(100, 100).double()),
    (torch.randn(100, 200)[:, ::2], torch.randn(100, 100)),
], ids=["few rows", "double", "every second column"])
def test_pytorch_multiplies_what_does_not_suit(a, b):
    assert not matrix.suits(a, b) and torch.equal(matrix.matmul(a, b), a @ b)
    assert torch.equal(matrix.matmul(a, b, a.new_empty(len(a), b.shape[1])), a @ b)


@needs_unit
@pytest.mark.parametrize("precision, tolerance, least", [("high", 6e-6, 1e-6), ("medium", 3e-3, 1e-3)])
@pytest.mark.parametrize("rows, columns, depth", [(64, 64, 64), (100, 300, 1000), (700, 200, 70), (1400, 90, 200)])
def test_as_exact_as_pytorch_is_told_to_be(precision, tolerance, least, rows, columns, depth, products):
    """Two parts of a float are 18 bits of it at best, one part 9: so much is lost, and no more."""
    torch.manual_seed(0)
    products(precision)
    for turned in (False, True):
        a = torch.randn(depth, rows).t() if turned else torch.randn(rows, depth)
        b = torch.randn(depth, columns) if turned else torch.randn(columns, depth).t()
        exact = a.double() @ b.double()
        assert (0 if depth < 100 else least) < (matrix.matmul(a, b) - exact).norm() / exact.norm() < tolerance
        whole = torch.randint(-16, 16, a.shape).float()  # few bits: nothing is lost
        few = whole[:90].t()
        assert torch.equal(matrix.matmul(whole, few).double(), whole.double() @ few.double())
        a[3, 5], a[60, 0] = NAN, INF  # passed on, and no further
        assert (~matrix.matmul(a, b).isfinite()).any(dim=1).nonzero().flatten().tolist() == [3, 60]


@pytest.mark.parametrize("library", [None, mock.Mock(multiplies=lambda: 0)], ids=["no library", "no unit"])
def test_pytorch_multiplies_without_a_matrix_unit(library, monkeypatch):
    monkeypatch.setattr(matrix, "library", lambda name: library)
    monkeypatch.setattr(matrix, "_functions", matrix._functions.__wrapped__)
    a, b = torch.randn(100, 100), torch.randn(100, 100)
    assert not matrix.suits(a, b) and torch.equal(matrix.matmul(a, b), a @ b)


@pytest.mark.skipif(not matrix._multiplies_vectors(), reason="needs AVX-512 with bfloat16")
@pytest.mark.parametrize("compiled", [True, False])
def test_medium_precision_multiplies_in_bfloat16_without_a_matrix_unit(compiled, monkeypatch, products):
    monkeypatch.setattr(matrix, "_functions", lambda: None)
    kernel = matrix._bfloat16() if compiled else None
    monkeypatch.setattr(matrix, "_bfloat16", lambda: kernel)
    a, b, bias, out = torch.randn(100, 70), torch.randn(80, 70).t(), torch.randn(80), torch.empty(100, 80)
    exact = a.double() @ b.double() + bias
    assert not matrix.suits(a, b)
    products("medium")
    assert matrix.suits(a, b, out) and matrix.matmul(a, b, out, bias) is out
    assert matrix.matmul(a, b).dtype == torch.float32 and 1e-4 < (out - exact).norm() / exact.norm() < 1e-2
    before = out.clone()
    torch.testing.assert_close(matrix.add_matmul(out, a, b, 2.0), before + 2 * (a @ b), rtol=0.02, atol=0.5)
    # The first call of a thread has no memory yet.
    (empty,) = in_threads(lambda: matrix.add_matmul(torch.ones(5, 7), torch.empty(5, 0), torch.empty(0, 7)))
    assert empty.shape == (5, 7) and bool((empty == 1).all())
    for wrong in ((out, b, a), (out[:70, :70], a, a.t()), (out.t(), a, b), (out, a.repeat(1, 2)[:, ::2], b)):
        assert not compiled or refused("matmul shapes|stride of 1", matrix.add_matmul, *wrong, kind=ValueError)


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"num_text_tokens": 70, "num_image_tokens": 70, "grid": 8, "dim": 64, "attn_types": ("full",)}
    return DalleModel(DalleConfig(**dict(sizes, **options)))


@needs_unit
@pytest.mark.parametrize("options", [
    {}, {"sandwich_norm": True}, {"attn_dropout": 0.2, "ff_dropout": 0.2, "layer_scale": False, "ff_bias": False},
], ids=["fused", "not fused", "dropout"])
def test_a_training_step_uses_it_and_learns_the_same(options, monkeypatch, products):
    options = dict(options, attn_types=("axial_row", "full"), qkv_bias=True, head_bias=True)
    model = tiny(text_seq_len=30, depth=2, heads=2, dim_head=32, **options)
    used, plain = [], matrix.suits
    monkeypatch.setattr(matrix, "suits", lambda *tensors: used.append(plain(*tensors)) or used[-1])
    own = learn(model, count=3)
    # Three or more matmuls for each of four matrices in a layer and of two heads; nothing in this step is too small.
    assert len(used) >= 30 and all(used)
    monkeypatch.setattr(matrix, "suits", lambda *tensors: False)
    expected = learn(model, count=3)
    for ours, theirs in zip(own, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(matrix, "suits", plain)
    for precision, tolerance in (("high", 1e-4), ("medium", 0.05)):
        products(precision)
        for ours, theirs in zip(learn(model, count=3), expected):
            assert float((ours - theirs).norm()) < tolerance * float(theirs.norm()) + 1e-6


@needs_unit
@pytest.mark.parametrize("gate", [-9.8, -12.0])
def test_gates_that_are_all_but_closed_spoil_no_gradient(gate, monkeypatch):
    """Their gradients are tiny numbers, which the unit takes for zero unless they are scaled."""
    model = tiny(text_seq_len=12, depth=1, heads=1, dim_head=64)
    up = model.transformer.layers[0].feed_forward.fn.up
    torch.nn.init.constant_(up.bias[len(up.bias) // 2 :][:4], gate)
    norms = []
    for suits in (matrix.suits, lambda *tensors: False):
        monkeypatch.setattr(matrix, "suits", suits)
        norms.append(torch.stack([gradient.norm() for gradient in learn(model, count=3)]).norm())
    torch.testing.assert_close(norms[0], norms[1])
