"""The elementwise ops of a training step, by csrc/training.c: for contiguous float32 tensors on a CPU."""
from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor

from ops import dispatch
from ops.build import library, pointer

_CHUNKS = 32
"""Parts of a sum over rows: a fixed number, so that it does not depend on the number of threads."""


@functools.lru_cache(maxsize=None)
def _functions() -> Any:
    found = library("training")
    if found is not None:
        address, size = ctypes.c_void_p, ctypes.c_long
        dropout = [ctypes.c_uint64, ctypes.c_double]
        gelu = [size, size, ctypes.c_int, address, address, *dropout]
        signatures: list[tuple[Any, list[Any]]] = [
            (found.gelu_forward, [*gelu, address]),
            (found.gelu_backward, [*gelu, address, address, size, address]),
            (found.add_branch, [size, size, address, address, address, address]),
            (found.row_dots_and_scale, [size, size, address, address, address, address]),
            (found.drop, [size, *dropout, address]),
            (found.heads_forward, [size] * 4 + [ctypes.c_float] + [address] * 5),
            (found.heads_backward, [size] * 4 + [ctypes.c_float] + [address] * 6 + [size, address]),
        ]
        for function, arguments in signatures:
            function.argtypes, function.restype = arguments, None
        found.norm.argtypes, found.norm.restype = [size, address, address, address], ctypes.c_float
    return found


def suits(*tensors: Tensor | None) -> bool:
    """Whether these kernels run on this machine and can take these tensors."""
    return (
        dispatch.suits(*tensors)
        and all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        and _functions() is not None
    )


def _size(x: Tensor) -> tuple[int, int]:
    """Number of rows, and elements in a row."""
    return x[..., 0].numel(), x.shape[-1]


def _expect(shape: torch.Size, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    _expect_contiguous(*tensors)


def _expect_contiguous(*tensors: Tensor | None) -> None:
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("tensors must be contiguous")


class Dropout(NamedTuple):
    """Zeroes elements with this probability, and divides the others by 1 - probability.

    A seed (64 bits) always drops the same elements, so the backward pass needs no mask. PyTorch generates its masks
    serially, which takes a fifth of a small model's step.
    """

    seed: int
    probability: float

    def checked(self) -> Dropout:
        if not 0 <= self.probability < 1:
            raise ValueError(f"probability {self.probability} is not in [0, 1)")
        return self


NO_DROPOUT = Dropout(0, 0.0)


def gelu(x: Tensor, gated: bool, bias: Tensor | None = None, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """gelu(x + bias) with dropout; gated: the first half of x + bias (..., n) times gelu of the second."""
    rows, width = _size(x)
    if gated and width % 2:
        raise ValueError(f"gated gelu needs an even last dimension, not {width}")
    _expect_contiguous(x)
    _expect(x.shape[-1:], bias)
    width //= 1 + gated
    result = x.new_empty(*x.shape[:-1], width)
    arguments = rows, width, gated, pointer(x), pointer(bias), *dropout.checked()
    _functions().gelu_forward(*arguments, pointer(result))
    return result


def gelu_backward(
    x: Tensor,
    gated: bool,
    grad_output: Tensor,
    grad_input: Tensor,
    bias: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor | None:
    """Write the gradient of x to `grad_input`, and overwrite `grad_output` with the result of `gelu`; return the
    gradient of the bias."""
    rows, width = _size(grad_output)
    _expect(x.shape, grad_input)
    _expect(x.shape[-1:], bias)
    _expect(torch.Size([*x.shape[:-1], x.shape[-1] // (1 + gated)]), grad_output)
    _expect_contiguous(x)
    grad_bias = None if bias is None else bias.new_zeros(_CHUNKS, len(bias))
    arguments = rows, width, gated, pointer(x), pointer(bias), *dropout.checked(), pointer(grad_output)
    _functions().gelu_backward(*arguments, pointer(grad_input), _CHUNKS, pointer(grad_bias))
    return None if grad_bias is None else grad_bias.sum(dim=0)


def add_branch(residual: Tensor, scale: Tensor | None, bias: Tensor | None, branch: Tensor) -> Tensor:
    """Overwrite `branch` (..., D) with residual + scale * (branch + bias), scale (1, 1, D), bias (D); return it."""
    rows, width = _size(branch)
    _expect(branch.shape, branch, residual)
    _expect(branch.shape[-1:], bias, None if scale is None else scale.flatten())
    _functions().add_branch(rows, width, pointer(residual), pointer(scale), pointer(bias), pointer(branch))
    return branch


def row_dots_and_scale(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    """Return the row sums (rows) of x * y (rows, n); then multiply each row of x by its factor (rows)."""
    rows, width = x.shape
    _expect(x.shape, x, y)
    _expect(x.shape[:1], factor)
    sums = x.new_empty(rows)
    _functions().row_dots_and_scale(rows, width, pointer(y), pointer(factor), pointer(x), pointer(sums))
    return sums


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """Apply dropout in place; return x."""
    _expect_contiguous(x)
    _functions().drop(x.numel(), *dropout.checked(), pointer(x))
    return x


class Heads(NamedTuple):
    """How queries and keys of each head are normalised and turned, see `attention_ops.prepare_heads`."""

    heads: int
    eps: float
    scales: Tensor | None
    """(2, K) of queries and keys; None: they are not normalised."""
    cosine: Tensor | None
    """(n, K) for each position; None: they are not turned."""
    sine: Tensor | None
    """(n, K), negative for the first channel of a pair."""

    def _arguments(self, qkv: Tensor) -> list[Any]:
        rows, width = _size(qkv)
        positions, width = qkv.shape[-2], width // (3 * self.heads)
        _expect(torch.Size([2, width]), self.scales)
        _expect(torch.Size([positions, width]), self.cosine, self.sine)
        _expect_contiguous(qkv)
        tables = pointer(self.scales), pointer(self.cosine), pointer(self.sine)
        return [rows, positions, self.heads, width, self.eps, *tables, pointer(qkv)]

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv (B, n, 3 * H * K) -> (B, n, 3 * H * K)."""
        result = torch.empty_like(qkv)
        _functions().heads_forward(*self._arguments(qkv), pointer(result))
        return result

    def backward(self, qkv: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of qkv and of the scales."""
        _expect(qkv.shape, grad_output)
        grad_input = torch.empty_like(qkv)
        grad_scales = None if self.scales is None else self.scales.new_zeros(_CHUNKS, *self.scales.shape)
        _functions().heads_backward(
            *self._arguments(qkv), pointer(grad_output), pointer(grad_input), _CHUNKS, pointer(grad_scales)
        )
        return grad_input, None if grad_scales is None else grad_scales.sum(dim=0)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together, a scalar."""
    if not suits(*tensors):
        return torch.nn.utils.get_total_norm(tensors)
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    sizes = torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)
    sums = torch.empty(len(tensors), dtype=torch.float64)
    return torch.tensor(_functions().norm(len(tensors), pointer(addresses), pointer(sizes), pointer(sums)))
