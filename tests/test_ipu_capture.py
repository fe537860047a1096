"""The graph that an IPU would get: L16 at full size, captured on the meta device, in operators that PopTorch names."""
from __future__ import annotations

import operator
import shutil
import subprocess
import sys
from pathlib import Path

import poptorch_stand_in
import poptorch_stand_in_device as device
import pytest
import torch
from poptorch_stand_in_device import NAMED_OPS, Capture, op_name
from torch.fx.experimental.proxy_tensor import make_fx

import args
from engines.ipu.model import IpuStep, adapt, place
from engines.ipu.plan import pipeline_plan
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.vqgan import VQGAN, VqganConfig

ROOT = Path(__file__).resolve().parents[1]


def captured(config, model, *inputs):
    """The graph of a training step on one micro-batch, traced by PyTorch's own tracer."""
    placed = place(model, pipeline_plan(config))
    step = IpuStep(model).train()
    graph = make_fx(step)(*inputs).graph
    return graph, placed


def op_names(graph):
    """Names of all operators, one for each call; taking a result out of a tuple is none."""
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    return [op_name(target) for target in called if target is not operator.getitem]


def test_the_published_model_is_captured_whole(monkeypatch):
    """Reading a value on the host (a branch on data, `.item()`) cannot be traced on meta tensors: it would raise."""
    poptorch_stand_in.install(monkeypatch)
    config = args.parse(["--config", "L16"])
    options = config.model
    with torch.device("meta"):
        model = TextToImage(
            DalleModel(
                DalleConfig(
                    num_text_tokens=8192, num_image_tokens=1024, text_seq_len=80, grid=16, dim=options.hidden_size,
                    depth=options.num_hidden_layers, heads=options.num_attention_heads, dim_head=options.dim_head,
                    attn_types=options.attn_types, sandwich_norm=options.sandwich_norm,
                )
            ),
            VQGAN(VqganConfig()),
        )
    model = adapt(model, True, config.ipu.embedding_serialization_factor, True)
    batch = config.execution.batch_size
    text = torch.empty(batch, 80, dtype=torch.long, device="meta")
    images = torch.empty(batch, 3, 256, 256, dtype=torch.uint8, device="meta")
    graph, begun = captured(config, model, text, images)
    ops = set(op_names(graph))
    assert ops <= NAMED_OPS, sorted(ops - NAMED_OPS)
    assert {
        "convolution", "argmax", "native_group_norm", "native_layer_norm", "_softmax", "gelu", "embedding",
        "nll_loss_forward", "masked_fill",
    } <= ops
    assert not any("scaled_dot_product" in op for op in ops)
    softmaxes = op_names(graph).count("_softmax")
    assert softmaxes == 16 + 3  # one in each layer, and in the VQGAN's three attentions at 16x16
    assert len(begun) == 3
    outputs = [
        node.meta["val"] if "val" in node.meta else node.meta["tensor_meta"]
        for node in next(node for node in graph.nodes if node.op == "output").args[0]
    ]
    assert [(tuple(output.shape), output.dtype) for output in outputs] == [((), torch.float32)] * 3


def test_options_of_other_checkpoints_are_captured_too(monkeypatch):
    """Rotary positions, shifted tokens, `stable` and the other activations of models trained elsewhere."""
    poptorch_stand_in.install(monkeypatch)
    config = args.Config().replace(num_hidden_layers=1, layers_per_ipu=[1], device="ipu")
    for changes in (
        {"rotary": True, "dim_head": 12},
        {"shift_tokens": True},
        {"stable": True},
        {"sandwich_norm": True},
        {"activation": "gelu"},
        {"activation": "quick_gelu"},
        {"bos": False, "unique_pads": False},
        {"image_positions": "learned"},
        {"ff_dropout": 0.1, "attn_dropout": 0.1},
        {"attn_types": ("conv_like",)},
        {"attn_types": ("conv_causal",)},
    ):
        settings = {
            "num_text_tokens": 30, "num_image_tokens": 11, "text_seq_len": 6, "grid": 4, "dim": 16, "depth": 1,
            "heads": 2, "dim_head": 8,
        }
        model = TextToImage(DalleModel(DalleConfig(**dict(settings, **changes))))
        model = adapt(model, True, 1, False).to("meta")
        text, codes = (torch.empty(2, size, dtype=torch.long, device="meta") for size in (6, 16))
        place(model, pipeline_plan(config, encodes_images=False))
        step = IpuStep(model).train()
        capture = Capture(list(step.named_parameters()), auto_increment=True)
        monkeypatch.setattr(device, "CAPTURES", [capture])
        with capture:  # raises for an operator without a name, and for what is read or made on the host
            step(text, codes)
        assert capture.losses == 1 and {"_softmax", "nll_loss_forward"} <= capture.ops, changes


def test_attention_of_the_native_engine_would_not_pass():
    """The check above can fail: the fused attention is not among PopTorch's operators."""
    assert "scaled_dot_product_attention" not in NAMED_OPS and "multinomial" not in NAMED_OPS
    assert "rms_norm" not in NAMED_OPS and "softmax" in NAMED_OPS and len(NAMED_OPS) > 250


def runs(python):
    """Whether this interpreter starts: a shim of pyenv may stand for one that is not chosen."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def test_the_ipu_path_compiles_with_the_python_of_the_poplar_sdk(tmp_path):
    candidates = [shutil.which("python3.8"), *map(str, Path.home().glob(".pyenv/versions/3.8.*/bin/python3.8"))]
    if sys.version_info[:2] == (3, 8):
        candidates.insert(0, sys.executable)
    python = next((path for path in candidates if path and runs(path)), None)
    if python is None:
        pytest.skip("no Python 3.8 on this machine; test_structure.py parses every file by its grammar")
    files = [
        str(path)
        for folder in ("engines", "models", "data", "training", "utils", "bpe")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    files += [str(ROOT / name) for name in ("args.py", "log.py", "train.py")]
    script = "import sys; [compile(open(path, encoding='utf-8').read(), path, 'exec') for path in sys.argv[1:]]"
    subprocess.run([python, "-c", script, *files], check=True, cwd=str(tmp_path))
