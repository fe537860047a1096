"""The graph that an IPU would get: L16 at full size, captured on the meta device, in operators that PopTorch names."""
from __future__ import annotations

import operator

import poptorch_stand_in
import poptorch_stand_in_device as device
import pytest
import torch
from ipu_helpers import published_model, small_model
from poptorch_stand_in_device import NAMED_OPS, Capture, op_name
from torch.fx.experimental.proxy_tensor import make_fx

import args
from engines.ipu.model import IpuStep, adapt, place
from engines.ipu.plan import pipeline_plan
from models.dalle import DalleModel, TextToImage
from models.vqgan import VQGAN, VqganConfig


@pytest.fixture(autouse=True)
def poptorch(monkeypatch):
    return poptorch_stand_in.install(monkeypatch)


def test_the_published_model_is_captured_whole():
    """Reading a value on the host (a branch on data, `.item()`) cannot be traced on meta tensors: it would raise."""
    config = args.parse(["--config", "L16"])
    with torch.device("meta"):
        model = TextToImage(DalleModel(published_model(config)), VQGAN(VqganConfig()))
        text = torch.empty(config.execution.batch_size, 80, dtype=torch.long)
        images = torch.empty(config.execution.batch_size, 3, 256, 256, dtype=torch.uint8)
    model = adapt(model, True, config.ipu.embedding_serialization_factor, True)
    begun = place(model, pipeline_plan(config))
    graph = make_fx(IpuStep(model).train())(text, images).graph  # a step on one micro-batch, by PyTorch's own tracer
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    names = [op_name(target) for target in called if target is not operator.getitem]
    assert set(names) <= NAMED_OPS, sorted(set(names) - NAMED_OPS)
    assert {
        "convolution", "argmax", "native_group_norm", "native_layer_norm", "gelu", "embedding", "nll_loss_forward",
        "masked_fill",
    } <= set(names)
    assert not any("scaled_dot_product" in name for name in names)
    assert names.count("_softmax") == 16 + 3  # one in each layer, and in the VQGAN's three attentions at 16x16
    assert len(begun) == 3
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    outputs = [node.meta["val"] if "val" in node.meta else node.meta["tensor_meta"] for node in results]
    assert [(tuple(output.shape), output.dtype) for output in outputs] == [((), torch.float32)] * 3


@pytest.mark.parametrize("changes", [
    {"rotary": True, "dim_head": 12}, {"shift_tokens": True}, {"stable": True}, {"sandwich_norm": True},
    {"activation": "gelu"}, {"activation": "quick_gelu"}, {"bos": False, "unique_pads": False},
    {"image_positions": "learned"}, {"ff_dropout": 0.1, "attn_dropout": 0.1}, {"attn_types": ("conv_like",)},
    {"attn_types": ("conv_causal",)},
], ids=str)
def test_options_of_other_checkpoints_are_captured_too(changes, monkeypatch):
    config = args.Config().replace(num_hidden_layers=1, layers_per_ipu=[1], device="ipu")
    model = adapt(TextToImage(DalleModel(small_model(**{"depth": 1, **changes}))), True, 1, False).to("meta")
    place(model, pipeline_plan(config, encodes_images=False))
    step = IpuStep(model).train()
    capture = Capture(list(step.named_parameters()), auto_increment=True)
    monkeypatch.setattr(device, "CAPTURES", [capture])
    with capture:  # raises for an operator without a name, and for what is read or made on the host
        step(*(torch.empty(2, size, dtype=torch.long, device="meta") for size in (6, 16)))
    assert capture.losses == 1 and {"_softmax", "nll_loss_forward"} <= capture.ops


def test_attention_of_the_native_engine_would_not_pass():
    """The checks above can fail: the fused attention is not among PopTorch's operators."""
    assert not {"scaled_dot_product_attention", "multinomial", "rms_norm"} & NAMED_OPS
    assert "softmax" in NAMED_OPS and len(NAMED_OPS) > 250
