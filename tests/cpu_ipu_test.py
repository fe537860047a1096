"""On real IPUs: a few training steps must give the losses and weights that the CPU gives.

    pytest tests/cpu_ipu_test.py        on a machine with the Poplar SDK 3.4; elsewhere it is skipped and says why

This is the only test that needs the hardware, and the only one that says anything about the compiler.
"""
from __future__ import annotations

import contextlib

import pytest
import torch
from ipu_helpers import Pairs, largest_difference, make_config, make_model, train_plainly, train_with

try:
    import poptorch
except Exception as error:  # the SDK's modules fail in many ways where it is not enabled
    pytest.skip(f"PopTorch cannot be imported here ({error}): nothing was tested", allow_module_level=True)

from engines.ipu import IpuEngine


def need(ipus):
    if not hasattr(poptorch, "ipuHardwareIsAvailable"):
        pytest.skip("this poptorch is not PopTorch: nothing was tested")
    if not poptorch.ipuHardwareIsAvailable(ipus):
        pytest.skip(f"{ipus} IPUs are not to be had here: nothing was tested")


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("images", [False, True])
def test_training_equals_the_cpu(stages, images):
    need(stages)
    config = make_config(stages, embedding_serialization_factor=2)
    dataset = Pairs(4 * config.global_batch, images)
    with contextlib.closing(IpuEngine(config)) as engine:
        losses = train_with(engine, config, make_model(with_vqgan=images), dataset)
        weights = engine.model_state()
        validation = engine.evaluate(dataset)["loss"]
    expected, model = train_plainly(config, make_model(with_vqgan=images), dataset)
    assert losses == pytest.approx(expected, rel=1e-3) and largest_difference(weights, model.dalle.state_dict()) < 1e-3
    dataset.set_epoch(0)
    text, pictures = (torch.stack(tensors) for tensors in zip(*[dataset[index] for index in range(len(dataset))]))
    with torch.no_grad():
        assert validation == pytest.approx(float(model.eval()(text, pictures).total), rel=1e-3)


def test_half_precision_follows_the_cpu():
    need(4)
    config = make_config(4, fp16=True, stochastic_rounding=True, loss_scaling=128.0, learning_rate=1e-3)
    dataset = Pairs(8 * config.global_batch)
    with contextlib.closing(IpuEngine(config)) as engine:
        losses = train_with(engine, config, make_model(), dataset)
    expected, _ = train_plainly(config, make_model(), dataset)
    assert losses == pytest.approx(expected, rel=2e-2)
