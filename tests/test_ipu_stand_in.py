"""The stand-in for PopTorch refuses what PopTorch 3.4 refuses; otherwise the tests over it would prove little."""
from __future__ import annotations

import poptorch_stand_in
import poptorch_stand_in_device as device
import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def poptorch(monkeypatch):
    return poptorch_stand_in.install(monkeypatch)


class Model(nn.Module):
    """Linear regression with a mark on the loss; `before` runs first in each forward pass, `after` on its results."""

    def __init__(self, marks=1, before=lambda x: x, after=lambda model, loss, x, target: (loss, x)):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 4)
        self.marks, self.before, self.after = marks, before, after

    def forward(self, x, target):
        import poptorch

        x = self.second(self.first(self.before(x)))
        loss = None if self.marks < 0 else nn.functional.cross_entropy(x, target)
        for _ in range(self.marks):
            loss = poptorch.identity_loss(loss, reduction="none")
        return self.after(self, loss, x, target)


def options_of(poptorch, accumulation=3, iterations=1, replicas=1, mode="Sum", stages="AutoIncrement"):
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas)
    options.outputMode(poptorch.OutputMode[mode])
    options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage[stages]))
    options.Training.gradientAccumulation(accumulation)
    return options


def training(poptorch, model=None, options=None, **settings):
    model = model or Model()
    optimizer = poptorch.optim.Adam(model.parameters(), lr=0.1, **settings)
    return poptorch.trainingModel(model, options=options or options_of(poptorch), optimizer=optimizer)


def batch(size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 2, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def placed(poptorch, model=None, **ipus):
    model = model or Model()
    for name, ipu in ipus.items():
        poptorch.BeginBlock(getattr(model, name), user_id=name, ipu_id=ipu)
    return model


def test_unknown_names_raise(poptorch):
    options = poptorch.Options()
    for owner in (poptorch, options, options.Training, options.Precision, poptorch.optim):
        with pytest.raises(AttributeError):
            owner.noSuchThing  # noqa: B018
    with pytest.raises(AttributeError):
        options.device_iterations = 3
    with pytest.raises(TypeError):
        poptorch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)


def test_options_check_types_and_freeze(poptorch):
    options = options_of(poptorch)
    for setting, value in (
        (options.deviceIterations, 2.0), (options.deviceIterations, True), (options.autoRoundNumIPUs, 1),
        (options.outputMode, "Sum"), (options.Precision.setPartialsType, torch.bfloat16),
    ):
        with pytest.raises(AssertionError):
            setting(value)
    poptorch.DataLoader(options, torch.utils.data.TensorDataset(torch.zeros(8)), auto_distributed_partitioning=False)
    for setting, value in ((options.deviceIterations, 2), (options.Training.gradientAccumulation, 4)):
        with pytest.raises(AttributeError, match="frozen"):
            setting(value)
    assert options.clone().deviceIterations(2).device_iterations == 2 and options.device_iterations == 1


def test_the_batch_must_hold_whole_micro_batches(poptorch):
    with pytest.raises(AssertionError, match="Invalid batch dimension"):
        training(poptorch)(*batch(7))
    program = training(poptorch)
    program(*batch(6))
    with pytest.raises(device.Error, match="expected inputs"):
        program(*batch(12))


def second_loss(model, loss, x, target):
    return loss + nn.functional.cross_entropy(2 * x, target), x


@pytest.mark.parametrize("options, message", [
    ({"marks": 2}, "Multiple independent losses"),
    ({"marks": 0, "after": second_loss}, "Multiple independent losses"),
    ({"marks": 0}, "fine"),  # a single cross-entropy is found
    ({"marks": -1, "after": lambda model, loss, x, target: (x,)}, "find a loss"),
    ({"before": lambda x: x * x.sum().item()}, None),
    ({"before": lambda x: x if x.sum() > 0 else -x}, None),
    ({"before": lambda x: x + torch.ones(2)}, "CPU|cpu"),
    ({"before": lambda x: x[x > 0].view(-1, 2)}, None),
    ({"before": torch.linalg.inv}, "linalg_inv"),
])
def test_losses_are_marked_once_and_what_cannot_be_captured_fails(poptorch, options, message):
    program = training(poptorch, Model(**options))
    if message == "fine":
        return program.compile(*batch())
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        program.compile(*batch())


def tied(model, loss, x, target):
    return loss, x + model.first.weight.sum()


@pytest.mark.parametrize("ipus, after, options, message", [
    ({"second": 1}, {}, {"accumulation": 2}, r"stages \(3\)"),
    ({"second": 1}, {"after": tied}, {}, "more than one IPU"),
    ({}, {"after": tied}, {}, None),
    ({"first": 1, "second": 0}, {}, {"accumulation": 6}, None),  # stages count up
    ({"first": 1, "second": 0}, {}, {"accumulation": 6, "stages": "SameAsIpu"}, "in stage 0, after stage 1"),
    ({"second": 2}, {}, {}, "powers of 2"),
])
def test_stages_and_shared_weights(poptorch, ipus, after, options, message):
    model = placed(poptorch, Model(**after), **ipus)
    program = training(poptorch, model, options_of(poptorch, **options))
    if message:
        with pytest.raises(device.Error, match=message):
            program.compile(*batch())
    else:
        program.compile(*batch())
        assert program.capture.weights["first.weight"] == {ipus.get("first", 0)}
    if "second" in ipus:
        with pytest.raises(device.Error, match="already been assigned"):
            placed(poptorch, model, second=1)


def test_one_program_at_a_time_holds_the_ipus_and_a_second_wrap_needs_destroy(poptorch):
    model = Model()
    program, second = training(poptorch, model), training(poptorch)
    program(*batch())
    with pytest.raises(device.Error, match="another program"):
        second(*batch())
    program.detachFromDevice()
    with pytest.raises(device.Error, match="not attached"):
        program.detachFromDevice()
    with pytest.raises(RuntimeError, match="already been wrapped"):
        training(poptorch, model)
    program.destroy()
    assert type(model) is Model and type(model.first.weight) is nn.Parameter
    training(poptorch, model)(*batch())


def test_weights_come_back_only_when_asked_for(poptorch):
    model = Model()
    start = model.first.weight.detach().clone()
    program = training(poptorch, model)
    program(*batch())
    assert torch.equal(model.first.weight, start)
    assert program.copyWeightsToHostIfNeeded() and not program.copyWeightsToHostIfNeeded()
    assert not torch.equal(model.first.weight, start)
    program(*batch())
    before = model.first.weight.detach().clone()
    assert not torch.equal(model.state_dict()["first.weight"], before)  # asks by itself


@pytest.mark.parametrize("mode, shape", [("Final", (2,)), ("Sum", (2,)), ("All", (12,))])
def test_outputs_of_several_replicas(poptorch, mode, shape):
    loss, x = training(poptorch, options=options_of(poptorch, 3, 2, 2, mode))(*batch(24))
    assert loss.shape == shape and x.shape == ((24, 4) if mode == "All" else (4, 4))


def test_the_device_learns_of_variable_attributes_when_told(poptorch):
    program = training(poptorch, weight_decay=0.1)
    program.compile(*batch())
    optimizer = program._optimizer
    optimizer.variable_attrs.markAsConstant("weight_decay")
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.7)
    own = program._device_optimizer.param_groups[0]
    assert (own["lr"], own["weight_decay"]) == (0.1, 0.1)
    program.setOptimizer(optimizer)
    assert (own["lr"], own["weight_decay"]) == (0.5, 0.1)
    with pytest.raises(AssertionError, match="Unknown attribute"):
        optimizer.variable_attrs.markAsConstant("no_such")
    with pytest.raises(ValueError, match="amsgrad"):
        training(poptorch, amsgrad=True)


def test_only_states_of_ipus_load(poptorch):
    model = Model()
    optimizer = poptorch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters(), lr=0.1).state_dict())
    assert sorted(optimizer.state_dict()) == ["ipu_param", "ipu_state", "param_groups", "state"]


def test_inference_takes_no_accumulation_and_fills_its_pipeline(poptorch):
    model = placed(poptorch, Model().eval(), second=1)
    with pytest.raises(device.Error, match="gradientAccumulation to 1"):
        poptorch.inferenceModel(model, options=options_of(poptorch))
    with pytest.raises(device.Error, match="deviceIterations"):
        poptorch.inferenceModel(model, options=options_of(poptorch, 1, 1))(*batch())
    loss, _ = poptorch.inferenceModel(model, options=options_of(poptorch, 1, 2))(*batch())
    assert loss.shape == ()


def loader(poptorch, mode="Sync", **settings):
    data = torch.utils.data.TensorDataset(torch.arange(20))
    settings.update(mode=poptorch.DataLoaderMode[mode], auto_distributed_partitioning=False)
    return poptorch.DataLoader(options_of(poptorch), data, batch_size=2, **settings)


def test_loaders_rebatch_drop_the_rest_and_refuse_what_poptorch_refuses(poptorch):
    options = {"mode": "AsyncRebatched", "rebatched_worker_size": 4, "async_options": {"early_preload": True}}
    for settings, message in (
        ({"persistent_workers": True}, "num_workers > 0"),
        (dict(options, rebatched_worker_size=9), "combined batch size"),
        (dict(options, async_options={"no": 1}), "async_options"),
    ):
        with pytest.raises(AssertionError, match=message):
            loader(poptorch, **settings)
    batches = loader(poptorch, **options)
    assert [batch[0].tolist() for batch in batches] == [list(range(first, first + 6)) for first in (0, 6, 12)]
    batches.terminate()
    with pytest.raises(AssertionError, match="terminated"):
        next(iter(batches))
