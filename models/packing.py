"""Weights in the layout that small matrix products like best, for the time of a drawing.

A token of a few images multiplies a handful of rows with every weight. On a CPU, MKL rearranges a weight for that in
each call, which costs more than the product itself; rearranged once, 8 rows take about half the time (AVX-512, L16).
"""

import contextlib
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Bytes of weights up to which a second, rearranged copy is made. Larger models need the memory more than the time.
_MAX_BYTES = 2 * 2**30
#: With fewer rows the products read weights as fast as memory gives them, in either layout.
_MIN_ROWS = 4


def _can_pack(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkl, "_mkl_linear")
    )


def _product(weight: Tensor, bias: Any, rows: int) -> Callable[[Tensor], Tensor]:
    """Return x -> x @ weight.T + bias, fast for x of `rows` rows."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)

    def multiply(x: Tensor) -> Tensor:
        if x.numel() != rows * x.shape[-1]:
            return F.linear(x, weight, bias)
        return torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)

    return multiply


@contextlib.contextmanager
def packed_weights(modules: Sequence[nn.Module], rows: int) -> Iterator[None]:
    """Within the context, inputs of `rows` rows pass these modules' linear layers faster; nothing else changes.

    Does nothing on a GPU, in half precision or without MKL, and makes no copies for few rows or for more than 2 GiB of
    weights. Weights must not change meanwhile, and no gradient is taken.
    """
    linears = [module for root in modules for module in root.modules() if type(module) is nn.Linear]
    if not linears or not all(_can_pack(linear) for linear in linears):
        yield
        return
    if rows < _MIN_ROWS or sum(linear.weight.numel() * 4 for linear in linears) > _MAX_BYTES:
        linears = []
    for linear in linears:
        linear.forward = _product(linear.weight, linear.bias, rows)  # type: ignore[method-assign]
    # For a row or two, oneDNN takes longer to set up its gelu than PyTorch's own takes to compute it.
    before = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before[0])
        for linear in linears:
            del linear.forward
