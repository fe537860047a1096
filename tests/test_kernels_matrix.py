"""Products by the matrix unit: as exact as PyTorch's in float32, in any shape, on any threads."""
from __future__ import annotations

import threading

import pytest
import torch

from models.config import DalleConfig
from models.dalle import DALLE
from ops import matmul as matrix

SQUARE = torch.ones(64, 64)
needs_unit = pytest.mark.usefixtures("unit")

SHAPES = [
    (64, 64, 64),
    (65, 67, 71),
    (77, 131, 705),
    (672, 512, 1500),  # several steps of depth
    (131, 3000, 96),  # many units of columns
    (200, 700, 2200),  # units and rows are packed ahead, in four steps of depth
    (2000, 300, 70),  # tall: the transpose is computed
    (1500, 1500, 64),  # more rows than are packed at a time
    (96, 241, 128),
]


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def operand(rows, columns, turned, scale=1.0):
    """Random numbers amid others that must not be read as theirs: not a number."""
    rows, columns = (columns, rows) if turned else (rows, columns)
    around = torch.full((rows + 2, columns + 3), float("nan"))
    inside = around[1:-1, 1:-2]
    inside.copy_(torch.randn(rows, columns) * scale)
    return inside.t() if turned else inside


def error(result, exact):
    return float((result.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("rows, columns, depth", SHAPES)
def test_no_less_exact_than_the_product_of_pytorch(rows, columns, depth, turned, threads, unit):
    if unit == "emulated" and threads != 1 + (depth + sum(turned)) % 3:
        pytest.skip("slow: one number of threads for each shape")
    torch.manual_seed(depth)
    a, b = operand(rows, depth, turned[0]), operand(depth, columns, turned[1])
    around = torch.full((rows + 2, columns + 5), 7.0)
    out = around[1:-1, 2:-3]
    assert matrix.suits(a, b, out)
    assert matrix.matmul(a, b, out) is out
    exact = a.double() @ b.double()
    assert error(out, exact) <= 1.1 * error(a @ b, exact)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6 * depth)
    assert float(around.sum()) == pytest.approx(7.0 * (around.numel() - out.numel()) + float(out.sum()), abs=0.1)
    around[1:-1, 2:-3] = 7.0
    assert bool((around == 7.0).all()), "written beside its place"


@needs_unit
def test_the_same_on_any_number_of_threads():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    a, b = torch.randn(133, 1500), torch.randn(1500, 477)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(matrix.matmul(a, b))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_of_later_steps_do_not_overwrite_those_in_use(unit):
    """The last row is packed on its own, by one of some threads, of which the others may be steps of depth behind."""
    torch.manual_seed(4)
    before = torch.get_num_threads()
    a, b = torch.randn(65, 2200), torch.randn(2200, 64)
    torch.set_num_threads(1)
    expected = matrix.matmul(a, b)
    try:
        for threads in (3, 5, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(matrix.matmul(a, b), expected) for _ in range(150 if unit == "native" else 9))
    finally:
        torch.set_num_threads(before)


@needs_unit
@pytest.mark.parametrize(
    "values",
    [
        [1 + 2**-7 - 2**-23, 1 + 2**-8 + 2**-9, 2 - 2**-23],  # halfway between numbers of 8 bits, and just beside
        [1e-30, 3e-30, 7.77e-30],
        [1e15, -3.3e14, 1.234567e15],
        [1.0, 2.0, -3.0],
    ],
    ids=["halfway", "small", "large", "whole"],
)
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
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_where_it_belongs(bad):
    a, b = torch.randn(100, 130), torch.randn(130, 500)
    a[70, 65] = bad
    expected = torch.ones(100, 500, dtype=torch.bool)
    expected[70] = False
    assert torch.equal(matrix.matmul(a, b).isfinite(), expected)
    assert torch.equal(matrix.matmul(b.t(), a.t()).isfinite(), expected.t())
    assert bool(matrix.matmul(torch.randn(100, 130), b).isfinite().all()), "packed memory kept it"


def test_threads_of_python_do_not_disturb_each_other(unit):
    torch.manual_seed(2)
    pairs = [(torch.randn(100 + 10 * i, 640), torch.randn(640, 300 + 50 * i)) for i in range(4)]
    expected = [matrix.matmul(a, b) for a, b in pairs]
    wrong = []

    def again(index):
        for _ in range(20 if unit == "native" else 2):
            if not torch.equal(matrix.matmul(*pairs[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=again, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_unit
def test_others_find_the_matrix_unit_as_it_was():
    torch.manual_seed(3)
    a, b = torch.randn(200, 300).bfloat16(), torch.randn(300, 250).bfloat16()
    before = a @ b
    for _ in range(3):
        matrix.matmul(torch.randn(200, 300), torch.randn(300, 250))
        assert torch.equal(a @ b, before)


@needs_unit
def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="no matmul"):
        matrix.matmul(torch.ones(64, 65), torch.ones(66, 64))
    with pytest.raises(ValueError, match="no matmul"):
        matrix.matmul(SQUARE, SQUARE, torch.ones(64, 65))


@pytest.mark.parametrize(
    "a, b",
    [
        (torch.randn(5, 100), torch.randn(100, 100)),
        (torch.randn(100, 100).double(), torch.randn(100, 100).double()),
        (torch.randn(100, 200)[:, ::2], torch.randn(100, 100)),
    ],
    ids=["few rows", "double", "every second column"],
)
def test_pytorch_multiplies_what_does_not_suit(a, b):
    assert not matrix.suits(a, b)
    assert torch.equal(matrix.matmul(a, b), a @ b)
    out = a.new_empty(len(a), b.shape[1])
    assert torch.equal(matrix.matmul(a, b, out), a @ b)


@needs_unit
@pytest.mark.parametrize("precision, tolerance, least", [("high", 6e-6, 1e-6), ("medium", 3e-3, 1e-3)])
@pytest.mark.parametrize("rows, columns, depth", [(64, 64, 64), (100, 300, 1000), (700, 200, 70), (1400, 90, 800)])
def test_as_exact_as_pytorch_is_told_to_be(precision, tolerance, least, rows, columns, depth, products):
    """Two parts of a float are 18 bits of it at best, one part 9: so much is lost, and no more."""
    torch.manual_seed(0)
    products(precision)
    for turned in (False, True):
        a = torch.randn(depth, rows).t() if turned else torch.randn(rows, depth)
        b = torch.randn(depth, columns) if turned else torch.randn(columns, depth).t()
        exact = a.double() @ b.double()
        error = (matrix.matmul(a, b) - exact).norm() / exact.norm()
        assert (0 if depth < 100 else least) < error < tolerance
        whole = torch.randint(-16, 16, a.shape).float()  # few bits: nothing is lost
        few = whole[:90].t()
        assert torch.equal(matrix.matmul(whole, few).double(), whole.double() @ few.double())


@needs_unit
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_exact_products_pass_on_what_is_no_number(precision, products):
    a, b = torch.randn(100, 100), torch.randn(100, 100)
    a[3, 5], a[70, 0] = float("nan"), float("inf")
    products(precision)
    odd = ~matrix.matmul(a, b).isfinite().all(dim=1)
    assert odd.nonzero().flatten().tolist() == [3, 70]


@pytest.mark.parametrize("missing", ["library", "unit"])
def test_pytorch_multiplies_without_a_matrix_unit(missing, monkeypatch):
    class Library:
        @staticmethod
        def multiplies():
            return 0

    monkeypatch.setattr(matrix, "library", lambda name: None if missing == "library" else Library)
    matrix._functions.cache_clear()
    try:
        a, b = torch.randn(100, 100), torch.randn(100, 100)
        assert not matrix.suits(a, b)
        assert torch.equal(matrix.matmul(a, b), a @ b)
    finally:
        matrix._functions.cache_clear()


@needs_unit
@pytest.mark.parametrize(
    "options",
    [{}, {"sandwich_norm": True}, {"attn_dropout": 0.2, "ff_dropout": 0.2, "layer_scale": False, "ff_bias": False}],
    ids=["fused", "not fused", "dropout"],
)
def test_a_training_step_uses_it_and_learns_the_same(options, monkeypatch, products):
    torch.manual_seed(0)
    config = DalleConfig(
        num_text_tokens=70, num_image_tokens=70, text_seq_len=30, grid=8, dim=64, depth=2, heads=2, dim_head=32,
        attn_types=("axial_row", "full"), qkv_bias=True, head_bias=True, **options,
    )  # fmt: skip
    model = DALLE(config)
    text, codes = torch.randint(1, 70, (3, 30)), torch.randint(70, (3, 64))
    used, plain = [], matrix.suits

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model.loss(*model(text, codes), text, codes).total.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    monkeypatch.setattr(matrix, "suits", lambda *tensors: used.append(plain(*tensors)) or used[-1])
    own = gradients()
    # Three or more products for each of four matrices in a layer and of two heads; nothing in this step is too small.
    assert len(used) >= 30 and all(used)
    monkeypatch.setattr(matrix, "suits", lambda *tensors: False)
    plainly = gradients()
    for ours, theirs in zip(own, plainly):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(matrix, "suits", plain)
    for precision, tolerance in (("high", 1e-4), ("medium", 0.05)):
        products(precision)
        for ours, theirs in zip(gradients(), plainly):
            assert float((ours - theirs).norm()) < tolerance * float(theirs.norm()) + 1e-6


@needs_unit
@pytest.mark.parametrize("gate", [-9.8, -12.0])
def test_gates_that_are_all_but_closed_spoil_no_gradient(gate, monkeypatch):
    """Their gradients are tiny numbers, which the unit takes for zero unless they are scaled."""
    torch.manual_seed(0)
    config = DalleConfig(
        num_text_tokens=70, num_image_tokens=70, text_seq_len=12, grid=8, dim=64, depth=1, heads=1, dim_head=64,
        attn_types=("full",),
    )  # fmt: skip
    model = DALLE(config)
    up = model.transformer.layers[0].feed_forward.fn.up
    torch.nn.init.constant_(up.bias[len(up.bias) // 2 :][:4], gate)
    text, codes, norms = torch.randint(1, 70, (4, 12)), torch.randint(70, (4, 64)), []
    for suits in (matrix.suits, lambda *tensors: False):
        monkeypatch.setattr(matrix, "suits", suits)
        model.zero_grad()
        model.loss(*model(text, codes), text, codes).total.backward()
        norms.append(torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm())
    torch.testing.assert_close(norms[0], norms[1])
