"""Limits for untrusted checkpoints: options of the right type and size, and weights that fit them.

Options are checked before a model is built from them on the meta device, and the file's weights are compared with that
model before any memory is allocated.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Dict, Iterable, Mapping

import torch
from torch import Tensor

from models.building import shapes_only
from models.config import DalleConfig
from models.dalle import DalleModel
from utils.errors import UserError, nearest
from utils.files import PathLike
from utils.untrusted import is_number, shown

Weights = Dict[str, Tensor]

#: Maximum sequence length: an attention mask takes its square in bytes (here 1 GiB).
MAX_SEQ_LEN = 32768
#: Maximum layers, channels of a layer, and tokens: above any real model, but quick to build without weights.
MAX_DEPTH, MAX_WIDTH, MAX_TOKENS = 1024, 1 << 20, 10**9

#: Every option of a model with a value of its type: the default, or 1 for counts without default.
_OPTIONS = {
    field.name: 1 if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(DalleConfig)
}
_REQUIRED = [field.name for field in dataclasses.fields(DalleConfig) if field.default is dataclasses.MISSING]


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if isinstance(default, float):
        return is_number(value)
    if isinstance(default, str):
        return isinstance(value, str)
    if value is None:
        return default is None
    items = int if default is None else str  # shared_*_ids or attn_types
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(type(item) is items for item in value)


def model_config(values: Any, weights: Mapping[str, Any]) -> DalleConfig:
    """Check stored options. weights: those of the same file under internal names; the number of layers must match.

    Raises UserError naming an option that is unknown, missing, wrong or too large.
    """
    if not isinstance(values, Mapping):
        raise UserError("'config' is not a table of model options")
    for name in values:
        if name not in _OPTIONS:
            hint = nearest(name, _OPTIONS) if isinstance(name, str) else ""
            raise UserError(f"unknown model option {shown(name)}.{hint}")
    for name in _REQUIRED:
        if name not in values:
            raise UserError(f"model option '{name}' is missing")
    config = dict(_OPTIONS, **values)
    for name, value in config.items():
        if not _fits(value, _OPTIONS[name]):
            raise UserError(f"model option '{name}' has the impossible value {shown(value)}")
        if name.endswith("_dropout") and value > 1:
            raise UserError(f"model option '{name}' is a probability, not {shown(value)}")
    layers = len({name.split(".")[2] for name in weights if re.match(r"transformer\.layers\.\d+\.", name)})
    if config["depth"] != layers:
        raise UserError(f"option 'depth' is {config['depth']}, but there are weights for {layers} layers")
    check_size(config)
    return DalleConfig.from_dict(config)


def check_size(config: Mapping[str, Any], flags: Mapping[str, str] | None = None) -> None:
    """Raise UserError for a model that asks for more than any needs. flags: what messages call its options."""
    width = max(config["dim"] * config["ff_mult"], config["heads"] * config["dim_head"])
    for names, asked, what, limit in (
        ("text_seq_len grid", config["text_seq_len"] + config["grid"] ** 2, "positions", MAX_SEQ_LEN),
        ("dim ff_mult heads dim_head", width, "channels", MAX_WIDTH),
        ("num_text_tokens", config["num_text_tokens"], "tokens", MAX_TOKENS),
        ("num_image_tokens", config["num_image_tokens"], "tokens", MAX_TOKENS),
        ("depth", config["depth"], "layers", MAX_DEPTH),
    ):
        if asked > limit:
            options = " and ".join(f"{(flags or {}).get(name, name)} {config[name]}" for name in names.split())
            raise UserError(f"with {options} the model has {asked} {what}; at most {limit} are supported")


def empty_weights(config: DalleConfig) -> Weights:
    """Return a model's weights under internal names, on the meta device: shapes without memory."""
    with shapes_only():  # tables are not weights, and computing them there loads PyTorch's compiler
        return DalleModel(config, tables=False).state_dict(keep_vars=True)


def aliases(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the weights of a model that are the same tensor as another one: {name: name of the other}."""
    same: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in sorted(weights.items(), key=lambda item: "_emb." in item[0]):  # heads before embeddings
        if first.setdefault(id(tensor), name) != name:
            same[name] = first[id(tensor)]
    return same


def check_state(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: PathLike) -> None:
    """Compare names and shapes of weights with those of the model (`empty_weights`).

    Raises UserError naming the file and a few differences.
    """
    problems = [f"'{name}' is missing" for name in expected if name not in weights]
    problems += [f"{shown(name)} is unexpected" for name in weights if name not in expected]
    problems += [
        f"'{name}' has shape {tuple(weights[name].shape)} instead of {tuple(own.shape)}"
        for name, own in expected.items()
        if name in weights and weights[name].shape != own.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: the weights do not fit the model's options: {', '.join(problems[:3])}{more}")


def check_tensors(weights: Any) -> None:
    """Refuse weights that are not plain tensors, and tensors that claim more elements than the file holds."""
    if not isinstance(weights, Mapping) or not weights:
        raise UserError("its weights are not a table of tensors")
    for name, tensor in weights.items():
        if (
            not isinstance(name, str)
            or not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.is_meta
        ):
            raise UserError(f"weight {shown(name)} is not a plain tensor")
        if tensor.is_quantized or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"weight {shown(name)} of shape {tuple(tensor.shape)} claims more than the file holds")


def check_claims(value: Any, seen: set[int] | None = None, depth: int = 0) -> None:
    """Refuse tensors, anywhere in plain containers, that claim more elements than the file holds. Raises UserError."""
    seen = set() if seen is None else seen
    if depth > 20:
        raise UserError("its state is nested too deeply")
    if id(value) in seen:
        return  # shared containers are checked once, or nested sharing would take exponential time
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise UserError("its state holds a tensor that is not plain")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"its state holds a tensor of shape {tuple(value.shape)} that claims more than the file holds"
            )
    elif isinstance(value, (Mapping, list, tuple)):
        seen.add(id(value))
        for item in value.values() if isinstance(value, Mapping) else value:
            check_claims(item, seen, depth + 1)


def check_model(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: PathLike) -> None:
    """Check a file's weights against those of the model that its options describe (`empty_weights`)."""
    check_state(own, weights, path)
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise UserError(f"weight '{name}' holds {tensor.dtype} instead of floating-point numbers")
    # Many weights may be views of one small tensor, which the model would copy one by one.
    same = aliases(own)
    if overlap(tensor for name, tensor in weights.items() if name not in same):
        raise UserError("the weights claim more memory than the file holds")


def overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors share storage, so that copies of them take more memory than the file holds."""
    held: dict[int, int] = {}
    claimed = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        claimed += tensor.numel() * tensor.element_size()
    return claimed > sum(held.values())
