"""Linear layers laid out for inference with a few rows."""
from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.linear_ops import Matrix, Projection

_PACKED_ROWS = 4
"""Rows from which packed weights are faster. With fewer, memory bandwidth is the limit either way."""


def for_few_rows(matrix: Matrix, rows: int, dtype: torch.dtype) -> Projection:
    """Return a copy of a linear layer in this dtype, laid out for inputs of `rows` rows, without gradients.

    On a CPU a matmul with a few rows repacks the weight each time, which costs more than the matmul itself. Packed
    once, 8 rows take about half the time (AVX-512, L16). With another dtype, the cast of autocast happens only once.
    """
    weight, bias = matrix.weight.detach(), matrix.bias
    if weight.dtype != dtype:
        weight, bias = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
        return lambda x: F.linear(x.to(dtype), weight, bias)
    if not weight.is_cpu:
        return matrix
    if rows >= _PACKED_ROWS and _packs():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        multiply = torch.ops.mkl._mkl_linear

        def few(x: Tensor) -> Tensor:
            fits = x.numel() == rows * x.shape[-1]
            return multiply(x, packed, weight, bias, rows) if fits else F.linear(x, weight, bias)

        return few
    columns = weight.t().contiguous().t() if rows == 1 else weight
    return lambda x: F.linear(x, columns, bias)


@functools.lru_cache(maxsize=None)
def _packs() -> bool:
    """Whether PyTorch has the matmul with packed weights: 2.0 declares it without an implementation."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        weight = torch.zeros(1, 1)
        torch.ops.mkl._mkl_linear(weight, torch.ops.mkl._mkl_reorder_linear_weight(weight, 1), weight, None, 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True
