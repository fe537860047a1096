"""The only place that decides which implementation of an op runs.

    with ops.use("reference"): ...     # plain PyTorch within the context: for tracing, export, IPUs and tests
    ops.use("reference")               # from now on
    with ops.use(attention="sdpa"): ...

Native implementations take float32 tensors on a CPU that are not traced or compiled; each op adds its kernel's own
requirements (sizes, strides, gradients). On GPUs and in other dtypes PyTorch's operators run.
"""
from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor

NATIVE, REFERENCE = "native", "reference"
ATTENTION = ("auto", "sdpa", "local", "explicit")
"""Implementations of attention: auto takes the fastest, a native kernel where there is one."""


class _Chosen(NamedTuple):
    kind: str = NATIVE
    attention: str = "auto"


_chosen = _Chosen()
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
"""How many `TorchDispatchMode`s are active."""


class use:  # lower case: it is called like a function
    """Select implementations from now on, or within a context: "native" where they apply, or "reference"."""

    def __init__(self, kind: str | None = None, attention: str | None = None) -> None:
        """attention: one of ATTENTION. None: unchanged. Raises ValueError for unknown names."""
        global _chosen  # noqa: PLW0603 - one choice for the process
        for wanted, known in ((kind, (NATIVE, REFERENCE)), (attention, ATTENTION)):
            if wanted is not None and wanted not in known:
                raise ValueError(f"unknown implementation {wanted!r}; known: {', '.join(known)}")
        self.before = _chosen
        _chosen = _Chosen(kind or _chosen.kind, attention or _chosen.attention)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: Any) -> None:
        global _chosen  # noqa: PLW0603 - one choice for the process
        _chosen = self.before


def uses_reference() -> bool:
    """Whether reference implementations are selected."""
    return _chosen.kind == REFERENCE


def attention() -> str:
    """The selected implementation of attention, of ATTENTION."""
    return "explicit" if uses_reference() else _chosen.attention


def compiling() -> bool:
    """Whether torch.compile or torch.export is tracing."""
    compiler = getattr(torch, "compiler", None)  # absent before PyTorch 2.1
    return compiler is not None and hasattr(compiler, "is_compiling") and compiler.is_compiling()


def refusal(
    *tensors: Tensor | None, registered: bool = False, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> str | None:
    """Return why no native implementation can take these tensors (None: absent), or None if one can.

    registered: the implementation is a registered operator (registered.py), which may be compiled.
    """
    if uses_reference():
        return "reference implementations are selected"
    if compiling():
        if not registered:
            return "PyTorch is compiling"
    elif torch.jit.is_tracing() or _modes():  # what traces operators would not see native functions
        return "PyTorch is tracing"
    for tensor in tensors:
        if tensor is None:
            continue
        if not registered and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return "a subclass of Tensor"
        if not tensor.is_cpu:
            return f"a tensor on {tensor.device.type}"
        if tensor.dtype not in dtypes:
            return "a tensor of {}".format(str(tensor.dtype).replace("torch.", ""))
    return None


def suits(*tensors: Tensor | None) -> bool:
    """Whether a native implementation can take these tensors."""
    return refusal(*tensors) is None


def autocasts(x: Tensor) -> bool:
    """Whether matmuls of x may run in another dtype than its own."""
    if hasattr(torch, "get_autocast_dtype"):  # PyTorch 2.4 and newer: one call for all devices
        return torch.is_autocast_enabled(x.device.type)
    return torch.is_autocast_enabled() if x.is_cuda else torch.is_autocast_cpu_enabled()
