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
    """Linear regression with a mark on the loss; `before` runs first in each forward pass."""

    def __init__(self, marks=1, before=None):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 4)
        self.marks, self.before = marks, before

    def forward(self, x, target):
        import poptorch

        if self.before is not None:
            x = self.before(x)
        x = self.second(self.first(x))
        loss = nn.functional.cross_entropy(x, target)
        for _ in range(self.marks):
            loss = poptorch.identity_loss(loss, reduction="none")
        return loss, x


def options_of(poptorch, accumulation=3, iterations=1, replicas=1, mode="Sum"):
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas)
    options.outputMode(getattr(poptorch.OutputMode, mode)).setExecutionStrategy(
        poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    )
    options.Training.gradientAccumulation(accumulation)
    return options


def training(poptorch, model, options=None, **settings):
    optimizer = poptorch.optim.Adam(model.parameters(), lr=0.1, **settings)
    return poptorch.trainingModel(model, options=options or options_of(poptorch), optimizer=optimizer)


def batch(size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 2, generator=generator), torch.randint(0, 4, (size,), generator=generator)


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
        (options.deviceIterations, 2.0),
        (options.deviceIterations, True),
        (options.autoRoundNumIPUs, 1),
        (options.outputMode, "Sum"),
        (options.Precision.setPartialsType, torch.bfloat16),
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
        training(poptorch, Model())(*batch(7))
    program = training(poptorch, Model())
    program(*batch(6))
    with pytest.raises(device.Error, match="expected inputs"):
        program(*batch(12))


def test_losses_must_be_marked_once(poptorch):
    with pytest.raises(device.Error, match="Multiple independent losses"):
        training(poptorch, Model(marks=2)).compile(*batch())
    training(poptorch, Model(marks=0)).compile(*batch())  # a single cross-entropy is found

    class TwoLosses(Model):
        def forward(self, x, target):
            loss, x = super().forward(x, target)
            return loss + nn.functional.cross_entropy(2 * x, target), x

    with pytest.raises(device.Error, match="Multiple independent losses"):
        training(poptorch, TwoLosses(marks=0)).compile(*batch())

    class NoLoss(Model):
        def forward(self, x, target):
            return (self.first(x),)

    with pytest.raises(device.Error, match="find a loss"):
        training(poptorch, NoLoss()).compile(*batch())


@pytest.mark.parametrize("before, message", [
    (lambda x: x * x.sum().item(), None),
    (lambda x: x if x.sum() > 0 else -x, None),
    (lambda x: x + torch.ones(2), "CPU|cpu"),
    (lambda x: x[x > 0].view(-1, 2), None),
    (torch.linalg.inv, "linalg_inv"),
])
def test_what_cannot_be_captured_fails(poptorch, before, message):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        training(poptorch, Model(before=before)).compile(*batch())


def test_stages_and_shared_weights(poptorch):
    model = Model()
    poptorch.BeginBlock(model.second, user_id="second", ipu_id=1)
    with pytest.raises(device.Error, match="already been assigned"):
        poptorch.BeginBlock(model.second, user_id="again", ipu_id=1)
    with pytest.raises(device.Error, match="stages \\(3\\)"):
        training(poptorch, model, options_of(poptorch, accumulation=2)).compile(*batch())

    class Tied(Model):
        """The second layer uses the first one's weight as well."""

        def forward(self, x, target):
            loss, x = super().forward(x, target)
            return loss, x + self.first.weight.sum()

    apart = Tied()
    poptorch.BeginBlock(apart.second, user_id="second", ipu_id=1)
    with pytest.raises(device.Error, match="more than one IPU"):
        training(poptorch, apart).compile(*batch())
    together = Tied()
    program = training(poptorch, together)
    program.compile(*batch())
    assert program.capture.weights["first.weight"] == {0}


def test_stages_must_not_decrease_unless_they_count_up(poptorch):
    model = Model()
    poptorch.BeginBlock(model.first, user_id="first", ipu_id=1)
    poptorch.BeginBlock(model.second, user_id="second", ipu_id=0)
    options = options_of(poptorch, accumulation=6)
    training(poptorch, model, options).compile(*batch(6))
    same = options.clone()
    same.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.SameAsIpu))
    other = Model()
    poptorch.BeginBlock(other.first, user_id="first", ipu_id=1)
    poptorch.BeginBlock(other.second, user_id="second", ipu_id=0)
    with pytest.raises(device.Error, match="stage"):
        training(poptorch, other, same).compile(*batch(6))


def test_three_ipus_are_not_to_be_had(poptorch):
    model = Model()
    poptorch.BeginBlock(model.second, user_id="second", ipu_id=2)
    with pytest.raises(device.Error, match="powers of 2"):
        training(poptorch, model).compile(*batch())


def test_one_program_at_a_time_holds_the_ipus(poptorch):
    first, second = training(poptorch, Model()), training(poptorch, Model())
    first(*batch())
    with pytest.raises(device.Error, match="another program"):
        second(*batch())
    first.detachFromDevice()
    with pytest.raises(device.Error, match="not attached"):
        first.detachFromDevice()


def test_a_second_wrap_needs_destroy(poptorch):
    model = Model()
    program = training(poptorch, model)
    program(*batch())
    with pytest.raises(RuntimeError, match="already been wrapped"):
        training(poptorch, model)
    program.destroy()
    assert type(model) is Model and type(model.first.weight) is nn.Parameter
    training(poptorch, model)(*batch())


def test_weights_come_back_only_when_asked_for(poptorch):
    model = Model()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    program = training(poptorch, model)
    program(*batch())
    assert torch.equal(model.first.weight, start["first.weight"])
    assert program.copyWeightsToHostIfNeeded() and not program.copyWeightsToHostIfNeeded()
    assert not torch.equal(model.first.weight, start["first.weight"])
    program(*batch())
    before = model.first.weight.detach().clone()
    assert not torch.equal(model.state_dict()["first.weight"], before)  # asks by itself


@pytest.mark.parametrize("mode, shape", [("Final", (2,)), ("Sum", (2,)), ("All", (12,))])
def test_outputs_of_several_replicas(poptorch, mode, shape):
    loss, x = training(poptorch, Model(), options_of(poptorch, 3, 2, 2, mode))(*batch(24))
    assert loss.shape == shape and x.shape == ((24, 4) if mode == "All" else (4, 4))


def test_one_update_for_each_device_iteration(poptorch):
    model = Model()
    reference = Model()
    reference.load_state_dict(model.state_dict())
    program = training(poptorch, model, options_of(poptorch, 3, 2, 2), loss_scaling=64.0)
    x, target = batch(24)
    program(x, target)
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.1)
    for first in (0, 12):
        reference(x[first : first + 12], target[first : first + 12])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key


def test_the_device_learns_of_variable_attributes_when_told(poptorch):
    model = Model()
    program = training(poptorch, model, weight_decay=0.1)
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
        poptorch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)


def test_only_states_of_ipus_load(poptorch):
    model = Model()
    optimizer = poptorch.optim.Adam(model.parameters(), lr=0.1)
    plain = torch.optim.Adam(model.parameters(), lr=0.1).state_dict()
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.load_state_dict(plain)
    assert sorted(optimizer.state_dict()) == ["ipu_param", "ipu_state", "param_groups", "state"]


def test_an_offline_program_does_not_run(poptorch):
    program = training(poptorch, Model(), options_of(poptorch).useOfflineIpuTarget())
    program.compile(*batch())
    assert not program.isAttachedToDevice()
    with pytest.raises(AssertionError, match="offline"):
        program(*batch())


def test_inference_takes_no_accumulation_and_fills_its_pipeline(poptorch):
    model = Model().eval()
    with pytest.raises(device.Error, match="gradientAccumulation to 1"):
        poptorch.inferenceModel(model, options=options_of(poptorch))
    poptorch.BeginBlock(model.second, user_id="second", ipu_id=1)
    with pytest.raises(device.Error, match="deviceIterations"):
        poptorch.inferenceModel(model, options=options_of(poptorch, 1, 1))(*batch())
    loss, _ = poptorch.inferenceModel(model, options=options_of(poptorch, 1, 2))(*batch())
    assert loss.shape == ()


@pytest.mark.parametrize("settings, message", [
    ({"persistent_workers": True}, "num_workers > 0"),
    ({"mode": "AsyncRebatched", "rebatched_worker_size": 9, "async_options": {}}, "combined batch size"),
    ({"mode": "AsyncRebatched", "rebatched_worker_size": 2, "async_options": {"no": 1}}, "async_options"),
])
def test_loaders_refuse_what_poptorch_refuses(poptorch, settings, message):
    if "mode" in settings:
        settings = dict(settings, mode=getattr(poptorch.DataLoaderMode, settings["mode"]))
    data = torch.utils.data.TensorDataset(torch.arange(20))
    with pytest.raises(AssertionError, match=message):
        poptorch.DataLoader(options_of(poptorch), data, batch_size=2, auto_distributed_partitioning=False, **settings)


def test_loaders_rebatch_and_drop_the_rest(poptorch):
    data = torch.utils.data.TensorDataset(torch.arange(20))
    loader = poptorch.DataLoader(
        options_of(poptorch), data, batch_size=2, auto_distributed_partitioning=False,
        mode=poptorch.DataLoaderMode.AsyncRebatched, rebatched_worker_size=4, async_options={"early_preload": True},
    )
    assert [batch[0].tolist() for batch in loader] == [list(range(first, first + 6)) for first in (0, 6, 12)]
    loader.terminate()
    with pytest.raises(AssertionError, match="terminated"):
        next(iter(loader))
