"""Which implementation of an op runs: decided here, and here alone.

    with ops.use("reference"): ...     # plain PyTorch within the context: for tracing, export, IPUs and tests
    ops.use("reference")               # for good

Native implementations are for contiguous-enough float32 tensors on a CPU that nobody records or compiles; each op adds
what its own kernel asks for (sizes, strides, gradients). On GPUs and in other types PyTorch's operators run.
"""

from typing import Any, Optional

import torch
from torch import Tensor

NATIVE, REFERENCE = "native", "reference"
_chosen = NATIVE


class use:  # reads as a word: ops.use("reference")
    """Take this kind of implementations from now on, or within a context: "native" where they suit, or "reference"."""

    def __init__(self, kind: str) -> None:
        global _chosen
        if kind not in (NATIVE, REFERENCE):
            raise ValueError("unknown implementations {!r}: there are {!r} and {!r}".format(kind, NATIVE, REFERENCE))
        self.before, _chosen = _chosen, kind

    def __enter__(self) -> "use":
        return self

    def __exit__(self, *_: Any) -> None:
        global _chosen
        _chosen = self.before


def uses_reference() -> bool:
    """Whether reference implementations were asked for."""
    return _chosen == REFERENCE


def refusal(*tensors: Optional[Tensor]) -> Optional[str]:
    """Return why no native implementation may compute with these tensors (None: absent ones), or None where one may."""
    if _chosen == REFERENCE:
        return "reference implementations are asked for"
    compiler = getattr(torch, "compiler", None)  # absent before PyTorch 2.1
    compiling = compiler is not None and hasattr(compiler, "is_compiling") and compiler.is_compiling()
    if torch.jit.is_tracing() or compiling:
        return "PyTorch records or compiles"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return "a subclass of Tensor"
        if not tensor.is_cpu:
            return "a tensor on {}".format(tensor.device.type)
        if tensor.dtype != torch.float32:
            return "a tensor of {}".format(str(tensor.dtype).replace("torch.", ""))
    return None


def suits(*tensors: Optional[Tensor]) -> bool:
    """Whether a native implementation may compute with these tensors."""
    return refusal(*tensors) is None


def autocasts(x: Tensor) -> bool:
    """Whether matmuls of x may be computed in another type than its own."""
    if hasattr(torch, "get_autocast_dtype"):  # from PyTorch 2.4 on there is one question for all devices
        return torch.is_autocast_enabled(x.device.type)
    return torch.is_autocast_enabled() if x.is_cuda else torch.is_autocast_cpu_enabled()
