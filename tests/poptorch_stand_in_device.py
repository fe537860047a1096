"""The stand-in's "device": capture on PyTorch's meta device, execution on the CPU. See poptorch_stand_in.py."""
from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMED_OPS = set((Path(__file__).parent / "assets" / "poptorch_named_ops.txt").read_text().split())
#: How PyTorch breaks up operators that PopTorch takes whole: a change of type, and dropout.
SYNONYMS = {"_to_copy": "to", "empty_like": "empty"}

CAPTURES = []  # the capture that is running, if any
RUNS = []  # losses marked in the micro-batch that is running, if any
ATTACHED = []  # the executor that holds the IPUs, if any


class Error(RuntimeError):
    """What PopTorch raises."""


def mark_loss(x):
    if CAPTURES:
        CAPTURES[-1].losses += 1
    if RUNS:
        RUNS[-1].append(x)
    return x


def op_name(func):
    name = func.overloadpacket.__name__
    if name.endswith("_") and name not in NAMED_OPS:
        name = name[:-1]  # in place, which PopTorch takes as well
    return SYNONYMS.get(name, name)


class Capture(TorchDispatchMode):
    """One pass of the model on the meta device: operators, stages, weights of each IPU, losses."""

    def __init__(self, parameters, auto_increment):
        super().__init__()
        self.owners = {id(parameter): name for name, parameter in parameters}
        self.auto_increment = auto_increment
        self.ipu, self.stage, self.switches, self.blocks = 0, 0, 0, []
        self.used_ipus, self.weights, self.ops = {0}, {}, set()
        self.losses = self.cross_entropies = self.checkpoints = 0
        self.serialized = []

    def begin_block(self, user_id, ipu_id):
        assert isinstance(user_id, str) and isinstance(ipu_id, int) and ipu_id >= 0
        stage = self.stage + 1 if self.auto_increment and user_id not in self.blocks else ipu_id
        if stage < self.stage:
            raise Error(f"block {user_id} is in stage {stage}, after stage {self.stage}")
        self.switches += ipu_id != self.ipu
        self.blocks.append(user_id)
        self.ipu, self.stage = ipu_id, stage
        self.used_ipus.add(ipu_id)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = op_name(func)
        if name not in NAMED_OPS:
            raise Error(f"No shape inference handler for aten::{name}")
        self.ops.add(name)
        self.cross_entropies += name in ("nll_loss_forward", "cross_entropy_loss")
        for value in _tensors(args):
            if value.device.type != "meta" and value.dim():
                raise Error(f"aten::{name} takes a tensor on the {value.device}: give it device=x.device")
            if id(value) in self.owners:
                self.weights.setdefault(self.owners[id(value)], set()).add(self.ipu)
        result = func(*args, **(kwargs or {}))
        if any(value.device.type != "meta" for value in _tensors([result])):
            raise Error(f"aten::{name} makes a tensor on the CPU: give it device=x.device")
        return result


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class VariableAttributes:
    def __init__(self, variable, allowed):
        self.variable, self.allowed = set(variable), set(allowed)

    def markAsConstant(self, name):
        assert name in self.allowed, f"Unknown attribute {name}"
        self.variable.discard(name)


class _Optimizer:
    """Hyper-parameters and a place for the state; the arithmetic is the device's."""

    ACCUMULATED = ("accum_type", "first_order_momentum_accum_type", "second_order_momentum_accum_type")

    def __init__(self, params, loss_scaling=1.0, max_grad_norm=float("inf"), **options):
        kinds = {name: options.pop(name, torch.float32) for name in self.ACCUMULATED}
        assert set(kinds.values()) <= {torch.float16, torch.float32}, "Accumulation types must be float32 or float16"
        assert options.keys() <= {"lr", "betas", "eps", "weight_decay"}, "what PopTorch has no use for, or amsgrad"
        super().__init__(params, **options)
        vars(self).update(kinds, loss_scaling=loss_scaling, max_grad_norm=max_grad_norm)
        self.variable_attrs = VariableAttributes(options, [*self.defaults, "loss_scaling"])
        self.ipu_state = {"ipu_state": None, "ipu_param": None}
        self.executor, self.to_device = None, False

    def state_dict(self):
        if self.executor is not None and not self.to_device:
            self.ipu_state = self.executor.read_optimizer_state()
        return dict(self.ipu_state, **torch.optim.Optimizer.state_dict(self))

    def load_state_dict(self, state):
        torch.optim.Optimizer.load_state_dict(self, {key: state[key] for key in ("state", "param_groups")})
        if "ipu_state" not in state or "ipu_param" not in state:
            raise RuntimeError("Only IPU optimizer states can be loaded onto the IPU.")
        self.ipu_state = {key: state[key] for key in ("ipu_state", "ipu_param")}
        self.to_device = True


class Adam(_Optimizer, torch.optim.Adam):
    pass


class AdamW(_Optimizer, torch.optim.AdamW):
    def __init__(self, params, bias_correction=True, **options):
        assert bias_correction is True, "the stand-in's arithmetic is PyTorch's, which always corrects"
        super().__init__(params, **options)


class WrappedParameter(torch.nn.Parameter):
    """PopTorch gives a wrapped model's parameters a class of its own."""


class Executor:
    """A compiled program and its weights on the "device", which are not those of the host's model."""

    def __init__(self, model, options, optimizer):
        self._user_model, self.options, self._optimizer = model, options, optimizer
        self.capture, self._device_model, self._dirty = None, None, False
        self._cached_rng_state = [options.random_seed] if hasattr(options, "random_seed") else None
        if optimizer is None:
            return
        self._class, self._parameter_classes = type(model), [(p, type(p)) for p in model.parameters()]
        executor = self

        class Wrapped(type(model)):
            poptorch_executor = True

            def copyWeightsToHostIfNeeded(self):
                return executor.copyWeightsToHostIfNeeded()

            def state_dict(self, *args, **kwargs):
                executor.copyWeightsToHostIfNeeded()
                state = super().state_dict(*args, **kwargs)
                return OrderedDict((key, value.as_subclass(torch.Tensor)) for key, value in state.items())

        model.__class__ = Wrapped
        for parameter in model.parameters():
            parameter.__class__ = WrappedParameter
        optimizer.executor = self

    # Compilation

    def isCompiled(self):
        return self._device_model is not None

    @property
    def _micro_batches(self):
        options = self.options
        return options.device_iterations, options.Training.gradient_accumulation, options.replication_factor

    def compile(self, *inputs):
        assert not self.isCompiled()
        self._signature = [(tensor.shape, tensor.dtype) for tensor in inputs]
        iterations, accumulation, replicas = self._micro_batches
        count = iterations * accumulation * replicas
        for tensor in inputs:
            assert tensor.shape[0] % count == 0, f"Invalid batch dimension: {tensor.shape} is no multiple of {count}"
        assert all(p.is_contiguous() for p in self._user_model.parameters()), "weights are copied as they lie in memory"
        self._capture([tensor[: tensor.shape[0] // count] for tensor in inputs])
        self._device_model = copy.deepcopy(self._user_model)
        for parameter in self._device_model.parameters():
            parameter.__class__ = torch.nn.Parameter
        if self._optimizer is not None:
            self._make_device_optimizer()
        if not self.options.offline:
            self.attachToDevice()

    def _capture(self, inputs):
        host = dict(self._user_model.named_parameters())
        model = copy.deepcopy(self._user_model).to("meta")
        names = list(model.named_parameters(remove_duplicate=False))
        self.capture = Capture(names, self.options.strategy.auto_stage.name == "AutoIncrement")
        before = [id(value) for _, value in names] + [id(value) for value in model.buffers()]
        inputs = [tensor.to("meta") for tensor in inputs]
        CAPTURES.append(self.capture)
        try:
            with self.capture:
                model(*inputs)
        finally:
            CAPTURES.pop()
        after = [id(value) for value in model.parameters(recurse=True)]
        assert set(after) <= set(before), "parameters were replaced while the graph was captured"
        self._check_capture(host)

    def _check_capture(self, host):
        capture, stages = self.capture, self.capture.switches + 1
        ipus = max(capture.used_ipus) + 1
        if ipus & (ipus - 1) and not self.options.auto_round_num_ipus:
            raise Error(f"the model uses {ipus} IPUs; they are reserved in powers of 2")
        shared = {}
        for name, used_on in capture.weights.items():
            shared.setdefault(id(host.get(name)) if name in host else name, set()).update(used_on)
        if any(len(used_on) > 1 for used_on in shared.values()):
            raise Error(f"a weight is used on more than one IPU: {capture.weights}")
        iterations, accumulation, _ = self._micro_batches
        if self._optimizer is None:
            if stages > 1 and iterations < stages:
                raise Error(f"deviceIterations must be at least the number of pipeline stages ({stages})")
            return
        if capture.losses == 0 and capture.cross_entropies == 0:
            raise Error("Couldn't find a loss in graph!")
        if capture.losses > 1 or (capture.losses == 0 and capture.cross_entropies > 1):
            raise Error("Multiple independent losses found in graph")
        if stages > 1 and accumulation < 2 * stages - 1:
            raise Error(f"gradientAccumulation must be at least the number of pipeline stages ({2 * stages - 1})")

    def _make_device_optimizer(self):
        host, own = self._optimizer, dict(self._device_model.named_parameters())
        names = {id(parameter): name for name, parameter in self._user_model.named_parameters()}
        groups = [dict(group, params=[own[names[id(p)]] for p in group["params"]]) for group in host.param_groups]
        kind = torch.optim.AdamW if isinstance(host, torch.optim.AdamW) else torch.optim.Adam
        self._device_optimizer = kind(groups)
        self._names = {id(parameter): name for name, parameter in own.items()}

    # Device

    def isAttachedToDevice(self):
        return self in ATTACHED

    def attachToDevice(self):
        if self.isAttachedToDevice():
            raise Error("Device is already attached")
        if ATTACHED:
            raise Error("Failed to acquire an IPU: another program holds them")
        ATTACHED.append(self)
        self.copyWeightsToDevice()

    def detachFromDevice(self):
        if not self.isAttachedToDevice():
            raise Error("Device is not attached")
        self.copyWeightsToHostIfNeeded()
        if self._optimizer is not None:
            self._optimizer.state_dict()
        ATTACHED.remove(self)

    def destroy(self):
        if not self.isCompiled():
            return
        if self._optimizer is not None:
            self.copyWeightsToHostIfNeeded()
            self._user_model.__class__ = self._class
            for parameter, kind in self._parameter_classes:
                parameter.__class__ = kind
            self._optimizer.executor = None
        if self.isAttachedToDevice():
            ATTACHED.remove(self)
        self._device_model = None

    def copyWeightsToDevice(self):
        if self._optimizer is None and hasattr(self._user_model, "copyWeightsToHostIfNeeded"):
            self._user_model.copyWeightsToHostIfNeeded()
        self._copy_weights(lambda own, host: own.copy_(host))

    def copyWeightsToHostIfNeeded(self):
        if not self._dirty:
            return False
        self._copy_weights(lambda own, host: host.copy_(own))
        return True

    @torch.no_grad()
    def _copy_weights(self, copy_one):
        self._dirty = False
        for own, host in zip(self._device_model.parameters(), self._user_model.parameters()):
            copy_one(own, host.as_subclass(torch.Tensor))

    def _need_compiled(self):
        if not self.isCompiled():
            raise Error("Model has not been compiled or has been destroyed.")

    @property
    def rng_state(self):
        self._need_compiled()
        return self._cached_rng_state

    @rng_state.setter
    def rng_state(self, state):
        self._need_compiled()
        self._cached_rng_state = state.copy()

    # Optimizer

    def setOptimizer(self, optimizer):
        """The device learns of changed attributes only here, and only of variable ones."""
        assert optimizer is self._optimizer
        for own, host in zip(self._device_optimizer.param_groups, optimizer.param_groups):
            own.update((key, host[key]) for key in optimizer.variable_attrs.variable if key in host)

    def read_optimizer_state(self):
        self._need_compiled()
        states = self._device_optimizer.state.items()
        found = {self._names[id(p)]: {key: value.clone() for key, value in state.items()} for p, state in states}
        return {"ipu_state": found, "ipu_param": {}}

    def _write_optimizer_state(self):
        own = {self._names[id(p)]: p for p in self._device_optimizer_parameters()}
        for name, state in self._optimizer.ipu_state["ipu_state"].items():
            assert state["exp_avg"].shape == own[name].shape
            self._device_optimizer.state[own[name]] = {key: value.clone() for key, value in state.items()}
        self._optimizer.to_device = False

    def _device_optimizer_parameters(self):
        return [parameter for group in self._device_optimizer.param_groups for parameter in group["params"]]

    # Execution

    def __call__(self, *inputs):
        assert not self.options.offline, "Trying to run a model on an offline device: use model.compile(inputs)"
        if not self.isCompiled():
            self.compile(*inputs)
        if not self.isAttachedToDevice():
            self.attachToDevice()
        signature = [(tensor.shape, tensor.dtype) for tensor in inputs]
        if signature != self._signature:
            raise Error(f"expected inputs {self._signature}, got {signature}")
        if self._optimizer is not None and self._optimizer.to_device:
            self._write_optimizer_state()
        iterations, accumulation, replicas = self._micro_batches
        micro, results = inputs[0].shape[0] // (iterations * accumulation * replicas), []
        chunks = zip(*[tensor.split(micro) for tensor in inputs])  # replicas of each step of each iteration
        for _ in range(iterations):
            results += [[self._micro_batch(next(chunks)) for _ in range(replicas)] for _ in range(accumulation)]
            if self._optimizer is not None:
                self._update()
        self._dirty = self._optimizer is not None
        if self._cached_rng_state is not None:
            self._cached_rng_state = [self._cached_rng_state[0], sum(self._cached_rng_state[1:]) + 1]
        # Outputs are summed over steps and iterations; scalars of n replicas become (n,).
        sums = [[sum(values) for values in zip(*outputs)] for outputs in zip(*results)]
        return tuple(values[0] if replicas == 1 else torch.stack(values) for values in zip(*sums))

    def _micro_batch(self, inputs):
        RUNS.append([])
        try:
            with torch.set_grad_enabled(self._optimizer is not None):
                outputs = self._device_model(*inputs)
        finally:
            marked = RUNS.pop()
        if self._optimizer is not None:
            _, accumulation, replicas = self._micro_batches
            (marked[0] * (self._optimizer.loss_scaling / (accumulation * replicas))).backward()
        return [output.detach() for output in outputs]

    def _update(self):
        parameters = self._device_optimizer_parameters()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self._optimizer.loss_scaling
        if self._optimizer.max_grad_norm != float("inf"):
            torch.nn.utils.clip_grad_norm_(parameters, self._optimizer.max_grad_norm)
        self._device_optimizer.step()
        self._device_optimizer.zero_grad()
