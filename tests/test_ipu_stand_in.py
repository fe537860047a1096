"""The stand-in for PopTorch refuses what PopTorch 3.4 refuses; otherwise the tests over it would prove little."""
from __future__ import annotations

import poptorch_stand_in as poptorch
import poptorch_stand_in_device as device
import pytest
import torch
from helpers import refused
from poptorch_stand_in import Options
from torch import nn

pytestmark = pytest.mark.usefixtures("poptorch")


class Model(nn.Module):
    """Linear regression with a mark on the loss; `before` runs first in each forward pass, `after` on its results."""

    def __init__(self, marks=1, before=lambda x: x, after=lambda model, loss, x, target: (loss, x)):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 4)
        self.marks, self.before, self.after = marks, before, after

    def forward(self, x, target):
        x = self.second(self.first(self.before(x)))
        loss = None if self.marks < 0 else nn.functional.cross_entropy(x, target)
        for _ in range(self.marks):
            loss = poptorch.identity_loss(loss, reduction="none")
        return self.after(self, loss, x, target)


def options_of(accumulation=3, iterations=1, replicas=1, stages="AutoIncrement"):
    options = Options().deviceIterations(iterations).replicationFactor(replicas).outputMode(poptorch.OutputMode.Sum)
    options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage[stages]))
    options.Training.gradientAccumulation(accumulation)
    return options


def training(model=None, options=None, **settings):
    model = model or Model()
    optimizer = device.Adam(model.parameters(), lr=0.1, **settings)
    return poptorch.trainingModel(model, options=options or options_of(), optimizer=optimizer)


def batch(size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 2, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def compiled(stages=None, accumulation=3, how="AutoIncrement", **model):
    """The capture of a model whose parts begin on some IPUs."""
    program = training(placed(Model(**model), **(stages or {})), options_of(accumulation, stages=how))
    program.compile(*batch())
    return program.capture


def placed(model, **ipus):
    for name, ipu in ipus.items():
        poptorch.BeginBlock(getattr(model, name), user_id=name, ipu_id=ipu)
    return model


def frozen():
    options = options_of()
    poptorch.DataLoader(options, torch.utils.data.TensorDataset(torch.zeros(8)), auto_distributed_partitioning=False)
    assert options.clone().deviceIterations(2).device_iterations == 2 and options.device_iterations == 1
    return options


def inference(accumulation, iterations, model=None):
    model = placed((model or Model()).eval(), second=1)
    return poptorch.inferenceModel(model, options=options_of(accumulation, iterations))(*batch())


def loader(mode="AsyncRebatched", **settings):
    settings = {"rebatched_worker_size": 4, "async_options": {"early_preload": True}, **settings}
    data = torch.utils.data.TensorDataset(torch.arange(20))
    settings.update(mode=poptorch.DataLoaderMode[mode], auto_distributed_partitioning=False)
    return poptorch.DataLoader(options_of(), data, batch_size=2, **settings)


def ran(size=6, **options):
    program = training(**options)
    program(*batch(size))
    return program


def second_loss(model, loss, x, target):
    return loss + nn.functional.cross_entropy(2 * x, target), x


def tied(model, loss, x, target):
    return loss, x + model.first.weight.sum()


BACK = {"first": 1, "second": 0}
REFUSED = {
    "unknown option": (lambda: Options().noSuchThing, "Invalid attribute noSuchThing"),
    "unknown option of training": (lambda: Options().Training.noSuchThing, "Invalid attribute noSuchThing"),
    "unknown option of precision": (lambda: Options().Precision.noSuchThing, "Invalid attribute noSuchThing"),
    "option without its method": (lambda: setattr(Options(), "device_iterations", 3), "through their methods"),
    "float for a number": (lambda: Options().deviceIterations(2.0), "Unexpected type"),
    "bool for a number": (lambda: Options().deviceIterations(True), "Unexpected type"),
    "number for a bool": (lambda: Options().autoRoundNumIPUs(1), "Unexpected type"),
    "text for a mode": (lambda: Options().outputMode("Sum"), "Unexpected type"),
    "options of a loader": (lambda: frozen().deviceIterations(2), "frozen"),
    "options of a loader's training": (lambda: frozen().Training.gradientAccumulation(4), "frozen"),
    "part of a micro-batch": (lambda: ran(7), "Invalid batch dimension"),
    "another batch": (lambda: ran()(*batch(12)), "expected inputs"),
    "two marks": (lambda: compiled(marks=2), "Multiple independent losses"),
    "two losses": (lambda: compiled(marks=0, after=second_loss), "Multiple independent losses"),
    "no loss": (lambda: compiled(marks=-1, after=lambda model, loss, x, target: (x,)), "find a loss"),
    "a value that is read": (lambda: compiled(before=lambda x: x * x.sum().item()), None),
    "a branch on data": (lambda: compiled(before=lambda x: x if x.sum() > 0 else -x), None),
    "a tensor of the host": (lambda: compiled(before=lambda x: x + torch.ones(2)), "CPU|cpu"),
    "a shape that depends on data": (lambda: compiled(before=lambda x: x[x > 0].view(-1, 2)), None),
    "an operator without a name": (lambda: compiled(before=torch.linalg.inv), "linalg_inv"),
    "too few micro-batches": (lambda: compiled({"second": 1}, 2), r"stages \(3\)"),
    "weight on two IPUs": (lambda: compiled({"second": 1}, after=tied), "more than one IPU"),
    "stages that go back": (lambda: compiled(BACK, 6, "SameAsIpu"), "in stage 0, after stage 1"),
    "three IPUs": (lambda: compiled({"second": 2}), "powers of 2"),
    "two blocks of a module": (lambda: placed(placed(Model(), second=1), second=1), "already been assigned"),
    "two programs": (lambda: (ran(), ran()), "another program"),
    "unknown setting of an optimizer": (lambda: training(momentum=0.9), "momentum"),
    "amsgrad": (lambda: training(amsgrad=True), "amsgrad"),
    "unknown attribute": (lambda: training()._optimizer.variable_attrs.markAsConstant("no"), "Unknown attribute"),
    "inference with accumulation": (lambda: inference(3, 1), "gradientAccumulation to 1"),
    "inference that fills no pipeline": (lambda: inference(1, 1), "deviceIterations"),
    "workers that stay, without any": (lambda: loader("Sync", persistent_workers=True), "num_workers > 0"),
    "too large batches of workers": (lambda: loader(rebatched_worker_size=9), "combined batch size"),
    "unknown options of a loader": (lambda: loader(async_options={"no": 1}), "async_options"),
}


@pytest.mark.parametrize("use, message", REFUSED.values(), ids=REFUSED)
def test_what_poptorch_refuses_is_refused(use, message):
    kinds = (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
    refused(message, use, kind=kinds)


@pytest.mark.parametrize("stages, accumulation, model", [
    ({}, 3, {"marks": 0}),  # a single cross-entropy is found
    ({}, 3, {"after": tied}),
    (BACK, 6, {}),  # stages count up
])
def test_what_poptorch_takes_is_taken(stages, accumulation, model):
    assert compiled(stages, accumulation, **model).weights["first.weight"] == {stages.get("first", 0)}


def test_a_program_holds_the_ipus_and_its_model_until_it_lets_go(poptorch):
    with pytest.raises(AttributeError):
        poptorch.noSuchThing  # noqa: B018
    model = Model()
    program = ran(model=model)
    program.detachFromDevice()
    refused("not attached", program.detachFromDevice, kind=device.Error)
    refused("already been wrapped", training, model, kind=RuntimeError)
    program.destroy()
    assert type(model) is Model and type(model.first.weight) is nn.Parameter
    ran(model=model)


def test_weights_come_back_only_when_asked_for():
    model = Model()
    start = model.first.weight.detach().clone()
    program = ran(model=model)
    assert torch.equal(model.first.weight, start)
    assert program.copyWeightsToHostIfNeeded() and not program.copyWeightsToHostIfNeeded()
    assert not torch.equal(model.first.weight, start)
    program(*batch())
    before = model.first.weight.detach().clone()
    assert not torch.equal(model.state_dict()["first.weight"], before)  # asks by itself


def test_outputs_are_summed_and_several_replicas_have_one_each():
    loss, x = training(options=options_of(3, 2, 2))(*batch(24))
    assert loss.shape == (2,) and x.shape == (2, 2, 4)


def test_inference_fills_its_pipeline():
    loss, _ = inference(1, 2)
    assert loss.shape == ()


def test_the_device_learns_of_variable_attributes_when_told():
    program = training(weight_decay=0.1)
    program.compile(*batch())
    optimizer = program._optimizer
    optimizer.variable_attrs.markAsConstant("weight_decay")
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.7)
    own = program._device_optimizer.param_groups[0]
    assert (own["lr"], own["weight_decay"]) == (0.1, 0.1)
    program.setOptimizer(optimizer)
    assert (own["lr"], own["weight_decay"]) == (0.5, 0.1)


def test_only_states_of_ipus_load():
    model = Model()
    optimizer = device.Adam(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="Only IPU optimizer states"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters(), lr=0.1).state_dict())
    assert sorted(optimizer.state_dict()) == ["ipu_param", "ipu_state", "param_groups", "state"]


def test_loaders_rebatch_and_drop_the_rest():
    batches = loader()
    assert [batch[0].tolist() for batch in batches] == [list(range(first, first + 6)) for first in (0, 6, 12)]
    batches.terminate()
    with pytest.raises(AssertionError, match="terminated"):
        next(iter(batches))
