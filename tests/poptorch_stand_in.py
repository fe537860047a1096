"""A stand-in for PopTorch 3.4, so that the IPU engine can be tested without the Poplar SDK. It is not PopTorch.

It has only the names that engines/ipu uses; any other raises AttributeError. It is strict where PopTorch is (types of
options, freezing, batch sizes, stages, losses, one owner of the IPUs) and stricter where it can be: weights come back
to the host only when asked for. Capture runs the model on the `meta` device, where reading a value or mixing in a
tensor made on the CPU fails; execution runs it on the CPU in float32 (poptorch_stand_in_device.py). It says nothing
about what the compiler does: lowering, memory, half precision, stochastic rounding, sharded state, speed.
"""
from __future__ import annotations

import copy
import enum
import functools
import pickle
import sys
import types
from dataclasses import dataclass

import poptorch_stand_in_device as device
import torch

Error = device.Error

OutputMode = enum.Enum("OutputMode", "Sum")
ReductionType = enum.Enum("ReductionType", "Mean")
DataLoaderMode = enum.Enum("DataLoaderMode", "Sync AsyncRebatched")
AutoStage = enum.Enum("AutoStage", "SameAsIpu AutoIncrement")
MatMulSerializationMode = enum.Enum("MatMulSerializationMode", "OutputChannels")


# Options -------------------------------------------------------------------------------------------------------------


class _Settings:
    """Values of one group of options: set by its methods, each of one type, and frozen with the whole."""

    def __init__(self, methods, owner=None, **values):
        """methods: {name: (key of its value, type)}."""
        vars(self).update(_methods=methods, _owner=owner or self, _frozen=False, _values=values)

    def _set(self, key, kind, value):
        if self._owner._frozen:
            raise AttributeError("Can't modify frozen Options")
        assert type(value) is kind, f"Unexpected type {type(value)} for option {key}. Expected {kind}"
        self._values[key] = value
        return self

    def __setattr__(self, name, value):
        raise AttributeError(f"{name}: set options through their methods")

    def __getattr__(self, name):
        own = vars(self)
        if name in own.get("_methods", ()):
            return functools.partial(self._set, *self._methods[name])
        if name not in own.get("_values", ()):
            raise AttributeError(f"Invalid attribute {name}.")
        return self._values[name]

    def __deepcopy__(self, memo):
        memo[id(self)] = other = object.__new__(type(self))
        vars(other).update((key, key != "_frozen" and copy.deepcopy(value, memo)) for key, value in vars(self).items())
        return other


class TensorLocationSettings(_Settings):
    def __init__(self):
        super().__init__({"useOnChipStorage": ("on_chip", bool), "useReplicatedTensorSharding": ("sharded", bool)})


class _Popart(_Settings):
    def set(self, key, value):
        return self._set(key, type(value), value)


@dataclass
class PipelinedExecution:
    auto_stage: AutoStage


OPTIONS = {
    "deviceIterations": ("device_iterations", int), "replicationFactor": ("replication_factor", int),
    "autoRoundNumIPUs": ("auto_round_num_ipus", bool), "outputMode": ("output_mode", OutputMode),
    "setExecutionStrategy": ("strategy", PipelinedExecution), "enableExecutableCaching": ("cache", str),
    "enableSyntheticData": ("synthetic", bool), "setAvailableMemoryProportion": ("memory", dict),
}
TRAINING = {
    "gradientAccumulation": ("gradient_accumulation", int),
    "accumulationAndReplicationReductionType": ("reduction", ReductionType),
    "setAutomaticLossScaling": ("automatic_loss_scaling", bool),
}
PRECISION = {
    "enableStochasticRounding": ("stochastic_rounding", bool), "setPartialsType": ("partials_type", torch.dtype),
}


class Options(_Settings):
    def __init__(self):
        super().__init__(
            OPTIONS, device_iterations=1, replication_factor=1, output_mode=None, auto_round_num_ipus=False,
            offline=False, synthetic=False, strategy=PipelinedExecution(AutoStage.SameAsIpu), memory={}, cache=None,
            relaxed=False,
        )
        training = {"gradient_accumulation": 1, "reduction": None, "automatic_loss_scaling": False}
        vars(self).update(
            Training=_Settings(TRAINING, self, **training),
            Precision=_Settings(PRECISION, self, stochastic_rounding=False), _Popart=_Popart({}, self),
            TensorLocations=_Settings({"setOptimizerLocation": ("optimizer", TensorLocationSettings)}, self),
        )

    def randomSeed(self, value):
        torch.manual_seed(value)
        return self._set("random_seed", int, value)

    def useOfflineIpuTarget(self):
        return self._set("offline", bool, True)

    def relaxOptimizerAttributesChecks(self):
        return self._set("relaxed", bool, True)

    def clone(self):
        return copy.deepcopy(self)


def freeze(options):
    assert isinstance(options, Options)
    vars(options)["_frozen"] = True


# Model functions -----------------------------------------------------------------------------------------------------


def BeginBlock(layer_to_call, user_id=None, ipu_id=None):
    def begin_block(module, inputs):
        if device.CAPTURES:
            device.CAPTURES[-1].begin_block(user_id, ipu_id)

    assert isinstance(layer_to_call, torch.nn.Module)
    if any(getattr(hook, "__name__", "") == "begin_block" for hook in layer_to_call._forward_pre_hooks.values()):
        raise Error("module has already been assigned to a block.")
    layer_to_call.register_forward_pre_hook(begin_block)
    return layer_to_call


def recomputationCheckpoint(*tensors):
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    if device.CAPTURES:
        device.CAPTURES[-1].checkpoints += len(tensors)
    return tensors[0] if len(tensors) == 1 else tensors


def serializedMatMul(lhs, rhs, mode, factor=0, keep_precision=False):
    assert isinstance(mode, MatMulSerializationMode) and type(factor) is int and type(keep_precision) is bool
    if mode is MatMulSerializationMode.OutputChannels and rhs.shape[-1] % factor:
        raise Error(f"serialization factor {factor} does not divide {rhs.shape[-1]} output channels")
    if device.CAPTURES:
        device.CAPTURES[-1].serialized.append(factor)
    return torch.matmul(lhs, rhs)


def identity_loss(x, reduction):
    assert reduction == "none"
    return device.mark_loss(x)


def _frozen_options(options):
    """A frozen copy of options that are frozen from now on."""
    assert options.output_mode is OutputMode.Sum, "the stand-in sums outputs, whatever it is told"
    freeze(options)
    options = options.clone()
    freeze(options)
    return options


def trainingModel(model, options=None, optimizer=None):
    assert isinstance(optimizer, torch.optim.Optimizer)
    if hasattr(type(model), "poptorch_executor"):
        raise RuntimeError("Model has already been wrapped in 'poptorch.trainingModel'. Call model.destroy() first.")
    return device.Executor(model, _frozen_options(options), optimizer)


def inferenceModel(model, options=None):
    if options.Training.gradient_accumulation != 1:
        raise Error("You must set Training.gradientAccumulation to 1 when running an inferenceModel().")
    return device.Executor(model, _frozen_options(options), None)


def ipuHardwareIsAvailable(num_ipus=1):
    return True


# Data ----------------------------------------------------------------------------------------------------------------


class DataLoader(torch.utils.data.DataLoader):
    """Batches of batch_size * device iterations * accumulation * local replicas samples, made in this process."""

    def __init__(
        self, options, dataset, batch_size=1, shuffle=False, num_workers=0, drop_last=True, persistent_workers=None,
        auto_distributed_partitioning=True, mode=DataLoaderMode.Sync, async_options=None, rebatched_worker_size=None,
    ):
        freeze(options)
        assert isinstance(mode, DataLoaderMode)
        assert not persistent_workers or num_workers > 0, "persistent_workers option needs num_workers > 0"
        assert auto_distributed_partitioning is False, "the engine shares the data out itself"
        steps = options.device_iterations * options.Training.gradient_accumulation
        combined, self.rebatched = batch_size * steps * options.replication_factor, 0
        if mode == DataLoaderMode.AsyncRebatched:
            assert combined > 1, "rebatched_size must be None or greater than 1"
            assert rebatched_worker_size <= combined, "rebatched_worker_size must be <= to the combined batch size"
            assert set(async_options) <= {"early_preload", "load_indefinitely"}, "unknown async_options"
            self.rebatched = combined
        if mode != DataLoaderMode.Sync:
            dataset = pickle.loads(pickle.dumps(dataset))  # it is loaded in another process
        self.closed, self.workers, self.persistent = False, num_workers, persistent_workers
        # Worker processes would cost the tests seconds and change nothing in what is loaded.
        super().__init__(
            dataset, batch_size=rebatched_worker_size if self.rebatched else combined, shuffle=shuffle,
            drop_last=drop_last and not self.rebatched,
        )

    def __iter__(self):
        assert not self.closed, "the loader has been terminated"
        if not self.rebatched:
            yield from super().__iter__()
            return
        waiting = []
        for batch in super().__iter__():
            waiting = [torch.cat(pair) for pair in zip(waiting, batch)] if waiting else batch
            while len(waiting[0]) >= self.rebatched:
                yield [tensor[: self.rebatched] for tensor in waiting]
                waiting = [tensor[self.rebatched :] for tensor in waiting]

    def terminate(self):
        self.closed = True


# The module ----------------------------------------------------------------------------------------------------------

_PUBLIC = (
    Error, OutputMode, ReductionType, DataLoaderMode, AutoStage, MatMulSerializationMode, TensorLocationSettings,
    PipelinedExecution, Options, BeginBlock, recomputationCheckpoint, serializedMatMul, identity_loss, trainingModel,
    inferenceModel, ipuHardwareIsAvailable, DataLoader,
)


def install(monkeypatch):
    """Let `import poptorch` find the stand-in for the length of a test, and popdist nothing. Returns the module."""
    module = types.ModuleType("poptorch", __doc__)
    for item in _PUBLIC:
        setattr(module, item.__name__, item)
    module.optim = types.ModuleType("poptorch.optim")
    module.optim.Adam, module.optim.AdamW = device.Adam, device.AdamW
    monkeypatch.setitem(sys.modules, "poptorch", module)
    monkeypatch.setitem(sys.modules, "popdist", None)
    monkeypatch.setattr(device, "ATTACHED", [])
    return module
