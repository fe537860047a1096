"""Who sees whom: masks against their definition position by position, and implementations against the explicit one."""
from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from models_for_tests import randomised
from test_ops import TINY

import ops
from models.config import ATTENTION_PATTERNS
from models.patterns import CONV_KERNEL_SIZE, allowed_codes, build_mask, rotary_2d_angles, rotary_angles, window_bias
from models.transformer import Transformer
from ops.attention_ops import explicit, rotate, sdpa
from ops.dispatch import ATTENTION
from ops.local_attention import local_attention


def sees(pattern, text_len, grid, query, key):
    """The patterns in words of one pair of positions."""
    if key > query:
        return False
    if query < text_len or key < text_len:
        return True
    query_row, query_column = divmod(query - text_len, grid)
    row, column = divmod(key - text_len, grid)
    return {
        "full": True, "axial_row": row == query_row, "axial_col": column == query_column,
        "conv_like": row >= query_row - 2 and query_column - 2 <= column <= query_column + 2,
        "conv_causal": row >= query_row - 4 and query_column - 4 <= column <= query_column,
    }[pattern]


def gradients(output, weight, *inputs):
    return [output, *torch.autograd.grad((output * weight).sum(), inputs)]


@pytest.mark.parametrize("text_len, grid", [(1, 1), (1, 2), (5, 3), (3, 8)])
@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_mask_is_its_definition(pattern, text_len, grid):
    length = text_len + grid * grid - 1
    expected = [[sees(pattern, text_len, grid, query, key) for key in range(length)] for query in range(length)]
    mask = build_mask(pattern, text_len, grid)
    assert mask.dtype == torch.bool and mask.tolist() == expected
    assert bool(mask.diagonal().all())  # nobody sees nothing: a row without any key has no softmax


def test_patterns_differ_on_a_grid_larger_than_their_window_and_take_turns_in_layers():
    assert CONV_KERNEL_SIZE == 5
    masks = {pattern: build_mask(pattern, 3, 8) for pattern in ATTENTION_PATTERNS}
    assert len({mask.numpy().tobytes() for mask in masks.values()}) == len(ATTENTION_PATTERNS)
    with pytest.raises(ValueError, match="diagonal"):
        build_mask("diagonal", 3, 8)
    config = dataclasses.replace(TINY, depth=5, attn_types=("full", "axial_row"))
    transformer = Transformer(config)
    for layer, pattern in enumerate(["full", "axial_row", "full", "axial_row", "full"]):
        assert torch.equal(transformer.context(layer).visible.mask, build_mask(pattern, config.text_len, config.grid))
    assert not any("mask" in name for name in transformer.state_dict())  # masks are no part of a checkpoint


@pytest.mark.parametrize("causal", [True, False])
def test_short_attention_of_medium_precision_is_the_explicit_product(causal, products):
    """PyTorch's own is slow there; see _SHORT."""
    mask, inputs = torch.ones(70, 70).tril().bool(), torch.randn(3, 2, 2, 70, 64).unbind()
    exact = explicit(*(x.double() for x in inputs), mask, causal)
    products("medium")
    result = sdpa(*inputs, mask, causal)
    assert torch.equal(result, explicit(*inputs, mask, causal))
    torch.testing.assert_close(result.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grid", [1, 2, 5, 7])
@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_implementations_agree(pattern, grid):
    torch.manual_seed(4)
    mask = build_mask(pattern, 4, grid)
    query, key, value = (torch.randn(2, 3, len(mask), 8, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, 3, len(mask), 8)
    outputs = [attend(query, key, value, mask, pattern == "full") for attend in (explicit, sdpa)]
    if pattern != "full":  # a window holds all that a sparse pattern shows
        bias = window_bias(pattern, allowed_codes(pattern, grid), grid)
        outputs.append(local_attention(query, key, value, bias, pattern == "axial_col"))
    plain, *others = [gradients(output, weight, query, key, value) for output in outputs]
    for found in others:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)

    # Against the formula itself, one query at a time, in double precision.
    for position in (0, len(mask) // 2, len(mask) - 1):
        keys = [other for other in range(len(mask)) if sees(pattern, 4, grid, position, other)]
        scores = (key.double()[:, :, keys] @ query.double()[:, :, position, :, None])[..., 0] / 8**0.5
        expected = (scores.softmax(-1)[..., None] * value.double()[:, :, keys]).sum(-2)
        torch.testing.assert_close(plain[0][:, :, position].double(), expected, rtol=1e-5, atol=1e-5)


def test_products_that_keep_less_do_keep_less():
    config = dataclasses.replace(TINY, grid=6, attn_types=("axial_row",), depth=1)
    transformer = Transformer(config)
    own = {tensor.data_ptr() for tensor in (*transformer.parameters(), *transformer.buffers())}

    def kept(kind):
        tensors = []
        with ops.use(kind), torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            transformer(torch.randn(2, config.seq_len, config.dim, requires_grad=True))
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if x.data_ptr() not in own}
        return sum(storage.nbytes() for storage in storages.values())

    assert kept("native") < 0.6 * kept("reference")


@pytest.mark.parametrize("pattern", ["full", "axial_col", "conv_like"])
def test_products_that_keep_less_work_in_half_precision(pattern):
    config = dataclasses.replace(TINY, grid=6, dim=64, heads=4, dim_head=16, attn_types=(pattern,))
    transformer = randomised(Transformer(config)).train()
    x = torch.randn(4, config.seq_len, config.dim, requires_grad=True)
    weight = torch.randn_like(x)

    def trained(kind, half, model, x):
        with ops.use(kind):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = model(x)
            return gradients(output, weight, x, *model.parameters())

    half, plain = (trained(kind, True, transformer, x) for kind in ("native", "reference"))
    exact = trained("reference", False, copy.deepcopy(transformer).double(), x.double())
    for own, other, true in zip(half, plain, exact):
        assert own.dtype == other.dtype
        error, usual = ((tensor.double() - true).norm() / true.norm() for tensor in (own, other))
        assert error < 2 * usual + 1e-3


@pytest.mark.parametrize("implementation", ATTENTION)
@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_a_layer_sees_exactly_what_its_mask_allows(pattern, implementation):
    """One layer's output at a position changes with an input exactly where the mask says so."""
    config = dataclasses.replace(TINY, depth=1, grid=6, attn_types=(pattern,))
    transformer = randomised(Transformer(config)).double()
    x = torch.randn(1, config.seq_len, config.dim, dtype=torch.float64, requires_grad=True)
    # In row i of a batch position i is another: (L, L, D).
    others = x + torch.eye(config.seq_len)[:, :, None] * torch.randn(config.dim, dtype=torch.float64)
    with ops.use(attention=implementation):
        influence = (transformer(others) - transformer(x)).abs().amax(-1).t() > 1e-9
    assert torch.equal(influence, build_mask(pattern, config.text_len, config.grid))


def test_rotation_is_that_of_complex_numbers():
    torch.manual_seed(1)
    x, angles = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    turned = rotate(x, angles.repeat_interleave(2, dim=-1))
    torch.testing.assert_close(turned[..., :8], torch.view_as_real(expected).flatten(-2))
    assert torch.equal(turned[..., 8:], x[..., 8:])  # the channels without an angle stay as they are


def test_rotary_angles_of_text_and_image():
    angles = rotary_angles(text_len=3, grid=3, dim_head=24)  # thirds of 8 channels: 4 frequencies each
    assert angles.shape == (3 + 9, 24)
    assert torch.equal(angles[:, 0::2], angles[:, 1::2])  # one angle for a pair of channels
    text, rows, columns = angles[:, ::2].double().split(4, dim=-1)
    frequencies = torch.tensor([10000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    pixel = torch.tensor([1.0, 1 + 4 / 3, 1 + 8 / 3, 5.0], dtype=torch.float64) * torch.pi
    torch.testing.assert_close(text[2], 2 * frequencies, rtol=1e-6, atol=0)
    torch.testing.assert_close(text[7], 8192 * frequencies, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows[1], -10 * pixel, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows[3 + 5], 0 * pixel, rtol=0, atol=1e-6)  # code 5: row 1 of 0..2, column 2
    torch.testing.assert_close(columns[3 + 5], 1 * pixel, rtol=1e-6, atol=0)


def test_2d_rotary_scores_depend_on_distances_alone():
    """For two codes on rows and columns, for two text tokens on their distance."""
    angles, grid = rotary_2d_angles(3, 5, 8).double(), 5
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned = [rotate(x.expand(28, 8), angles) for x in (query, key)]
    scores = turned[0] @ turned[1].T
    codes = scores[3:, 3:].view(grid, grid, grid, grid)
    assert torch.allclose(codes[1:, 1:, 1:, 1:], codes[:-1, :-1, :-1, :-1])
    assert not torch.allclose(codes[1, 2, 1, 1], codes[1, 2, 1, 2])
    assert torch.allclose(scores[0, 1], scores[1, 2]) and not torch.allclose(scores[0, 1], scores[1, 0])
