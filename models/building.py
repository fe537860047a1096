"""Build a model around existing weights, without initialising random ones first and holding both.

dalle = build_dalle(config, checkpoint.weights)                       # takes the tensors out of the dictionary
dalle = build_dalle(config, checkpoint.weights, dtype="bfloat16")     # converted one by one
"""
from __future__ import annotations

import contextlib
import threading
from typing import Any, Iterator, MutableMapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from models.config import DalleConfig
from models.dalle import DalleModel
from models.quantization import Int8Linear


class _Uninitialised(TorchFunctionMode):
    """Skips initialisation: normal numbers on the meta device load PyTorch's compiler, half a second for nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", *args[:1])
        return function(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within the context new modules are on the meta device: shapes without memory."""
    with torch.device("meta"), _Uninitialised():
        yield


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within the context new modules have their parameters on the meta device, where they take no memory or time.

    Buffers, such as attention masks, are real, since nothing fills them later. Other threads are not affected.
    """
    thread = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: Tensor | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        with _Uninitialised():
            yield
    finally:
        handle.remove()


def build_dalle(
    config: DalleConfig,
    weights: MutableMapping[str, Tensor],
    dtype: str = "float32",
) -> DalleModel:
    """Return a DALL-E with these weights (names of `DalleModel.state_dict()`), which are removed from the dictionary.

    Tensors that already have the right dtype become the parameters themselves; others are converted one by one.
    dtype: "float32", "bfloat16", or "int8" for linear layers (the rest float32). int8 cannot be trained.
    Raises ValueError if names or shapes do not match the model.
    """
    with without_weights():
        model = DalleModel(config)
    float_type = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    done: set[nn.Module] = set()
    made: dict[int, nn.Parameter] = {}  # a parameter shared by several modules is made once
    for path, module in list(model.named_modules(remove_duplicate=False)):
        tensors = {leaf: _take(weights, path, leaf, own) for leaf, own in module.named_parameters(recurse=False)}
        if module in done:
            continue  # shared by several layers: the same weights
        done.add(module)
        if dtype == "int8" and isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Int8Linear(tensors["weight"], tensors.get("bias")))
            continue
        for leaf, tensor in tensors.items():
            empty = getattr(module, leaf)
            if id(empty) not in made:
                made[id(empty)] = nn.Parameter(tensor.to(float_type))
            setattr(module, leaf, made[id(empty)])
    if weights:
        raise ValueError("weights that are not in the model: {}".format(", ".join(list(weights)[:3])))
    return model


def _take(weights: MutableMapping[str, Tensor], path: str, leaf: str, empty: Tensor) -> Tensor:
    name = path + "." + leaf if path else leaf
    if name not in weights:
        raise ValueError(f"weight {name} is missing")
    tensor = weights.pop(name)
    if tensor.shape != empty.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(empty.shape)}")
    return tensor
