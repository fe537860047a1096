"""Ops: one place decides which implementation runs, and a model learns the same with each of them."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import refused
from models_for_tests import needs_kernels, randomised

import ops
from models.config import ATTENTION_PATTERNS, DalleConfig
from models.dalle import DalleModel
from models.patterns import visible
from models.transformer import Transformer
from ops import dispatch, elementwise, native_attention, registered, rows
from ops.attention_ops import NativeAttention

TINY = DalleConfig(
    num_text_tokens=9, num_image_tokens=7, text_seq_len=4, grid=3, dim=16, depth=2, heads=2, dim_head=12,
    attn_types=("full",),
)  # fmt: skip
#: Blocks with and without what the fused ops know: each activation, biases and scales, shifts, rotations, more norms.
BLOCKS = {
    "plain": {}, "rotary": {"rotary": True},
    "rotary and shift": {"rotary": True, "shift_tokens": True, "text_positions": False, "image_positions": "none"},
    "stable sandwich": {"stable": True, "sandwich_norm": True},
    "without bos": {"bos": False, "unique_pads": False, "layer_scale": False, "image_positions": "learned"},
    "gelu": {"activation": "gelu", "qkv_bias": True, "layer_scale": False},
    "gelu, stable sandwich": {"activation": "gelu", "stable": True, "sandwich_norm": True},
    "quick_gelu without biases": {"activation": "quick_gelu", "out_bias": False, "ff_bias": False},
    "quick_gelu, shift": {"activation": "quick_gelu", "shift_tokens": True},
    "rms, swiglu": {"norm": "rms", "qk_norm": True, "rotary_2d": True, "activation": "swiglu", "shift_tokens": True},
    "value residual": {"depth": 2, "value_residual": True},
    "rms sandwich, relu2": {"norm": "rms", "sandwich_norm": True, "layer_scale": False, "activation": "relu2"},
}


def trained(transformer, x, weight, kind):
    """The output, and the gradients of its weighted sum for the input and all parameters."""
    with ops.use(kind):
        output = transformer(x)
        return [output, *torch.autograd.grad((output * weight).sum(), (x, *transformer.parameters()))]


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
@pytest.mark.parametrize("grid", [1, 5, 6])
def test_blocks_have_the_gradients_of_the_reference(grid, pattern, options):
    """In double precision, where fused ops are PyTorch's, and in float32, for which there are native kernels."""
    config = dataclasses.replace(TINY, grid=grid, attn_types=(pattern,), **{"depth": 1, **options})
    transformer = randomised(Transformer(config)).double().train()
    x = torch.randn(2, config.seq_len, config.dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    exact = trained(transformer, x, weight, "reference")
    for fused, plain in zip(trained(transformer, x, weight, "native"), exact):
        torch.testing.assert_close(fused, plain)
        assert fused.shape == plain.shape and fused.dtype == plain.dtype
    transformer, x = transformer.float(), x.detach().float().requires_grad_()
    for native, plain in zip(trained(transformer, x, weight.float(), "native"), exact):
        size = float(plain.detach().abs().max())
        torch.testing.assert_close(native.double(), plain, rtol=1e-4, atol=1e-5 * size + 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(transformer(x).double(), exact[0], rtol=1e-4, atol=1e-5)


def batch(config, count=2):
    chance = torch.Generator().manual_seed(3)
    text = torch.randint(1, config.num_text_tokens, (count, config.text_seq_len), generator=chance)
    return text, torch.randint(config.num_image_tokens, (count, config.grid**2), generator=chance)


def learn(model, kind="native", count=2):
    """The loss of a batch and the gradients of all parameters."""
    text, codes = batch(model.config, count)
    model.zero_grad()
    torch.manual_seed(1)
    with ops.use(kind):
        loss = model.loss(*model(text, codes), text, codes).total
        loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


MIXED = dataclasses.replace(
    TINY, num_text_tokens=20, num_image_tokens=11, text_seq_len=5, grid=4, dim=24, depth=4, heads=3, dim_head=8,
    attn_types=("axial_row", "axial_col", "full", "conv_like"),
)  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("activation", ["geglu", "gelu", "quick_gelu"])
@pytest.mark.parametrize("biases", [True, False])
def test_a_model_learns_as_in_double_precision(activation, biases):
    torch.manual_seed(3)
    has = dict.fromkeys(("layer_scale", "qkv_bias", "out_bias", "ff_bias"), biases)
    model = DalleModel(dataclasses.replace(MIXED, activation=activation, **has))
    native, again, exact = learn(model), learn(model), learn(model.double())
    for first, second, expected in zip(native, again, exact):
        assert torch.equal(first, second)
        atol = 1e-5 * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(first.double(), expected.double(), rtol=0, atol=atol)


@needs_kernels
@pytest.mark.parametrize("activation", ["geglu", "gelu", "quick_gelu"])
@pytest.mark.parametrize("attn_dropout, ff_dropout", [(0.1, 0.0), (0.0, 0.3), (0.5, 0.1)])
def test_a_layer_drops_the_same_forward_and_backward(activation, attn_dropout, ff_dropout, monkeypatch):
    torch.manual_seed(0)
    options = {"activation": activation, "attn_dropout": attn_dropout, "ff_dropout": ff_dropout}
    model = DalleModel(dataclasses.replace(MIXED, **options))

    def seeded_dropout(x, probability):
        dropout = elementwise.Dropout(int(torch.randint(2**63 - 1, ())), probability)
        return x * elementwise.drop(torch.ones(x.shape), dropout)

    monkeypatch.setattr(torch.nn.functional, "dropout", seeded_dropout)
    for native, plain in zip(learn(model), learn(model, "reference")):
        torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-6)


def test_a_linear_layer_of_another_kind_computes_as_it_says():
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    transformer = randomised(Transformer(TINY))
    for block in transformer.layers:
        out = block.attention.fn.out
        block.attention.fn.out = Doubling(out.in_features, out.out_features)
        block.attention.fn.out.load_state_dict(out.state_dict())
    x = torch.randn(1, TINY.seq_len, TINY.dim, requires_grad=True)
    native = transformer(x)
    with ops.use("reference"):
        torch.testing.assert_close(native, transformer(x))


def test_definitions_of_norms_and_activations():
    x, scale = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    assert torch.allclose(ops.normalise(x, ops.Norm(scale, None, 1e-6)), expected)
    assert torch.allclose(ops.activation("relu2")(x), x.clamp(min=0) ** 2)
    assert torch.allclose(ops.activation("swiglu")(x), x[:, :4] * x[:, 4:] / (1 + (-x[:, 4:]).exp()))
    qkv = torch.randn(2, 3, 3 * 2 * 4, dtype=torch.float64)
    own = ops.prepare_heads(qkv, 2, torch.full((2, 4), 3.0, dtype=torch.float64), None).view(2, 3, 3, 2, 4)
    assert torch.allclose(own[:, :, :2].pow(2).mean(-1), torch.full((2, 3, 2, 2), 9.0, dtype=torch.float64), atol=1e-4)
    assert torch.equal(own[:, :, 2], qkv.view(2, 3, 3, 2, 4)[:, :, 2])


def test_the_choice_holds_within_its_context_or_for_good():
    assert not ops.uses_reference()
    with ops.use("reference"):
        assert ops.uses_reference() and not dispatch.suits(torch.ones(1))
        with ops.use("native"):
            assert not ops.uses_reference()
        assert ops.uses_reference()
    assert not ops.uses_reference()
    before = ops.use("reference")
    assert ops.uses_reference()
    before.__exit__()
    refused("unknown implementation 'fast'", ops.use, "fast", kind=ValueError)
    assert not ops.uses_reference()
    for name in ("relu", ""):
        refused("unknown activation", ops.activation, name, kind=ValueError)


def test_explain_says_what_runs_and_why(server, tmp_path):
    with ops.use("reference"):
        assert all(line[1:] == ("PyTorch", "reference implementations are selected") for line in ops.explain())
    for like, reason in ((torch.ones(1).double(), "a tensor of float64"), (torch.ones(1, device="meta"), "on meta")):
        assert all(line.implementation == "PyTorch" and reason in line.reason for line in ops.explain(like))
    assert server.wait(server.start([], tmp_path / "output", script="ops.__main__", DALLE_KERNELS="off")) == 0
    output = (tmp_path / "output").read_text()
    assert len(output.splitlines()) == len(ops.explain()) == output.count("DALLE_KERNELS=off")
    assert ("int8 weights by the matrix unit" in ops.explain()[-1].reason) == rows.multiplies()


@needs_kernels
def test_other_types_and_devices_take_pytorch():
    full = visible("full", 5, 4)
    for options in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        assert not NativeAttention.suits(torch.zeros(1, 20, 24, **options), full)
    assert not NativeAttention.suits(torch.zeros(1, 20, 24), visible("conv_like", 5, 4))
    x = torch.zeros(2, 3)
    assert elementwise.suits(x, None) and not elementwise.suits(x, x.t()) and not elementwise.suits(x.double())


@needs_kernels
@pytest.mark.parametrize("shapes, message", [
    ([(1, 20, 9)], "fit 2 heads"), ([(1, 15, 12)], "fit 2 heads"),
    ([(1, 20, 12), (1, 20, 4), (1, 20, 6)], "wrong shapes"), ([(1, 12, 20), (1, 20, 4), (1, 20, 12)], "contiguous"),
])
def test_attention_of_wrong_shapes_is_refused(shapes, message):
    pattern, (qkv, *gradients) = native_attention.Pattern(heads=2, grid=4, by_column=False), map(torch.zeros, shapes)
    qkv = qkv.transpose(1, 2) if message == "contiguous" else qkv
    with pytest.raises(ValueError, match=message):
        (native_attention.backward if gradients else native_attention.forward)(qkv, pattern, *gradients)


@pytest.mark.skipif(not registered.AVAILABLE, reason="operators with autograd came with PyTorch 2.4")
@needs_kernels
@pytest.mark.parametrize("how", ["compile", "export"])
def test_native_attention_stays_in_what_is_compiled_or_exported(how):
    model = randomised(DalleModel(dataclasses.replace(TINY, attn_types=("full", "axial_col"))))
    text, codes = batch(TINY)
    seen, expected = [], model(text, codes)[1]

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True)

    def backend(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    if how == "compile":
        torch._dynamo.reset()
        found = torch.compile(model, backend=backend, fullgraph=True)(text, codes)[1]
        torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
    else:
        with torch.no_grad():
            exported = torch.export.export(model, (text, codes))
            found = exported.module()(text, codes)[1]
        seen.extend(str(node.target) for node in exported.graph.nodes)
        with pytest.raises(ValueError, match="float32 on a CPU, not torch.float64 on cpu"):
            exported.module().double()(text, codes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum("dalle.attention" in name for name in seen) == 2
