"""Ops: one place decides which implementation runs, and all of them give what the reference gives."""
from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from test_attention import OPTIONS, TINY, random_
from test_train import ROOT

import ops
from models.config import ATTENTION_PATTERNS
from models.dalle import DALLE
from models.transformer import Transformer
from ops import dispatch, native_attention, registered


@pytest.mark.parametrize("activation", ["geglu", "gelu", "quick_gelu"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_every_block_has_the_gradients_of_the_reference(pattern, options, activation):
    """In float32, for which there are native kernels, with shifts and norms that the fused ops do not know too."""
    config = dataclasses.replace(TINY, grid=5, attn_types=(pattern,), activation=activation, **options)
    transformer = random_(Transformer(config)).train()
    x = torch.randn(2, config.seq_len, TINY.dim, requires_grad=True)
    weight, results = torch.randn_like(x), []
    for kind in ("native", "reference"):
        with ops.use(kind):
            output = transformer(x)
            results.append((output, *torch.autograd.grad((output * weight).sum(), (x, *transformer.parameters()))))
    with torch.no_grad():
        torch.testing.assert_close(transformer(x), results[1][0], rtol=1e-4, atol=1e-5)
    for native, reference in zip(*results):
        size = float(reference.detach().abs().max())
        torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-5 * size + 1e-6)


def test_a_linear_layer_of_another_kind_computes_as_it_says():
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    transformer = random_(Transformer(TINY))
    for block in transformer.layers:
        out = block.attention.fn.out
        block.attention.fn.out = Doubling(out.in_features, out.out_features)
        block.attention.fn.out.load_state_dict(out.state_dict())
    x = torch.randn(1, TINY.seq_len, TINY.dim, requires_grad=True)
    native = transformer(x)
    with ops.use("reference"):
        torch.testing.assert_close(native, transformer(x))


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
    with pytest.raises(ValueError, match="unknown implementations 'fast'"):
        ops.use("fast")
    assert not ops.uses_reference()


@pytest.mark.parametrize("name", ["relu", ""])
def test_an_unknown_activation_is_an_error(name):
    with pytest.raises(ValueError, match="unknown activation"):
        ops.activation(name)


def test_explain_says_what_runs_and_why():
    with ops.use("reference"):
        assert all(line[1:] == ("PyTorch", "reference implementations are asked for") for line in ops.explain())
    for like, reason in ((torch.ones(1).double(), "a tensor of float64"), (torch.ones(1, device="meta"), "on meta")):
        assert all(line.implementation == "PyTorch" and reason in line.reason for line in ops.explain(like))
    environment = dict(os.environ, DALLE_KERNELS="off")
    command = [sys.executable, "-m", "ops"]
    output = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert len(output.splitlines()) == len(ops.explain()) == output.count("DALLE_KERNELS=off")


@pytest.mark.skipif(not registered.AVAILABLE, reason="operators with autograd came with PyTorch 2.4")
@pytest.mark.skipif(not native_attention.available(), reason="no C compiler, or kernels are switched off")
@pytest.mark.parametrize("how", ["compile", "export"])
def test_native_attention_stays_in_what_is_compiled_or_exported(how, monkeypatch):
    torch.manual_seed(1)
    model = random_(DALLE(dataclasses.replace(TINY, attn_types=("full", "axial_col"), depth=2)))
    text = torch.randint(1, TINY.num_text_tokens, (2, TINY.text_seq_len))
    codes = torch.randint(TINY.num_image_tokens, (2, TINY.grid**2))
    expected = model(text, codes)[1]
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    seen = []

    def backend(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    if how == "compile":
        torch._dynamo.reset()
        found = torch.compile(model, backend=backend, fullgraph=True)(text, codes)[1]
        found.square().sum().backward()
        for gradient, parameter in zip(gradients, (p for p in model.parameters() if p.grad is not None)):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
    else:
        with torch.no_grad():
            exported = torch.export.export(model, (text, codes))
            found = exported.module()(text, codes)[1]
        seen.extend(str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum("dalle.attention" in name for name in seen) == 2
    if how == "export":
        with pytest.raises(ValueError, match="float32 on a CPU, not torch.float64 on cpu"):
            exported.module().double()(text, codes)
