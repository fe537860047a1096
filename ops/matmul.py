"""Float32 matmuls on the processor's matrix unit (AMX), if it has one, by csrc/matrix.c.

Their error is no larger than that of PyTorch's matmuls, which use only the vector units. If
`torch.set_float32_matmul_precision` allows rounding of the operands, a matmul takes half of the multiplications
("high": 16 bits, where TF32 on a GPU has 11) or a sixth ("medium": bfloat16, 8 bits). Sums are always float32.

Processors with only vector instructions for bfloat16 (AVX-512) use them for "medium", in half of the time, by
csrc/bfloat16.c. Without a compiler PyTorch's matmul takes its place, which also rounds results to bfloat16.
"""
from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ops import dispatch
from ops.build import library, pointer

_LEAST = 64
"""Rows, columns or depth below which packing costs more than the matrix unit saves."""


_PARTS = {"highest": 3, "high": 2, "medium": 1}
"""Parts of 8 bits that an operand is split into."""


def _kernels(name: str, *options: Any) -> Any:
    """The library of this name, if the processor has what its matmul needs. options: types of the matmul's own."""
    found = library(name)
    if found is None or not found.multiplies():
        return None
    size: Any = ctypes.c_long
    address: Any = ctypes.c_void_p
    found.matmul.argtypes = [size] * 3 + [address, size, size] * 2 + [*options, address, size]
    return found


@functools.lru_cache(maxsize=None)
def _functions() -> Any:
    return _kernels("matrix", ctypes.c_long)


@functools.lru_cache(maxsize=None)
def _bfloat16() -> Any:
    return _kernels("bfloat16", ctypes.c_float, ctypes.c_int, ctypes.c_int)


@functools.lru_cache(maxsize=None)
def _multiplies_vectors() -> bool:
    """Whether the processor has vector instructions for bfloat16, which PyTorch's matmuls use."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def _in_bfloat16() -> bool:
    """Whether matmuls take PyTorch's bfloat16: where it may be as inexact, and there is no matrix unit."""
    return _functions() is None and torch.get_float32_matmul_precision() == "medium" and _multiplies_vectors()


def available(*tensors: Tensor | None) -> bool:
    """Whether there is a matrix unit, or bfloat16 in its place, that can take these tensors."""
    return dispatch.suits(*tensors) and (_functions() is not None or _in_bfloat16())


def suits(a: Tensor, b: Tensor, out: Tensor | None = None) -> bool:
    """Whether `matmul` uses the matrix unit, or bfloat16 in its place, for these."""
    return (
        min(*a.shape, *b.shape) >= _LEAST
        and 1 in a.stride()
        and 1 in b.stride()
        and (out is None or out.stride(1) == 1)
        and available(a, b, out)
    )


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return a @ b + bias, of (M, K), (K, N) and (N); written to `out` (M, N) if given."""
    if not suits(a, b, out):
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    (rows, depth), columns = a.shape, b.shape[1]
    result = a.new_empty(rows, columns) if out is None else out
    if len(b) != depth or result.shape != (rows, columns):
        raise ValueError(f"matmul shapes do not fit: {tuple(a.shape)} @ {tuple(b.shape)} to {tuple(result.shape)}")
    if _functions() is None:
        if _bfloat16() is None:
            result.copy_(torch.mm(a.bfloat16(), b.bfloat16()))
        else:
            _multiply(_bfloat16(), a, b, result, 1.0, False, False)
    elif not _multiply(_functions(), a, b, result, _PARTS[torch.get_float32_matmul_precision()]):
        # PyTorch's float32 may round to bfloat16 and to infinity.
        result.copy_(torch.mm(a.double(), b.double()))
    return result if bias is None else result.add_(bias)


def _multiply(kernels: Any, a: Tensor, b: Tensor, out: Tensor, *options: Any) -> bool:
    """Write a @ b to `out`. False: an operand is not finite, or too large for the matrix unit."""
    (rows, depth), columns = a.shape, b.shape[1]
    (a_line, a_step), (b_step, b_line) = a.stride(), b.stride()
    failed = kernels.matmul(
        rows, columns, depth,
        pointer(a), a_line, a_step, pointer(b), b_line, b_step, *options, pointer(out), out.stride(0),
    )  # fmt: skip
    if failed not in (0, 2):
        raise MemoryError(f"not enough memory for the matmul of {tuple(a.shape)} and {tuple(b.shape)}")
    return not failed


def multiplies_in_bfloat16(*tensors: Tensor) -> bool:
    """Whether `add_matmul` has a kernel for these."""
    return dispatch.suits(*tensors) and _functions() is None and _bfloat16() is not None


def add_matmul(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, symmetric: bool = False) -> Tensor:
    """Add alpha * a @ b to `out` (M, N), of (M, K) and (K, N); return it.

    Rounds operands to bfloat16 where `multiplies_in_bfloat16`, at any precision of matmuls; a, b and `out` must have a
    stride of 1, `out` by rows. symmetric: the matmul and `out` are, and half of them is computed.
    """
    if not multiplies_in_bfloat16(out, a, b):
        return out.addmm_(a, b, alpha=alpha)
    if a.shape[1] != len(b) or out.shape != (len(a), b.shape[1]) or (symmetric and len(a) != b.shape[1]):
        raise ValueError(f"matmul shapes do not fit: {tuple(a.shape)} @ {tuple(b.shape)} to {tuple(out.shape)}")
    if out.stride(1) != 1 or 1 not in a.stride() or 1 not in b.stride():
        raise ValueError("a, b and out must have a stride of 1")
    _multiply(_bfloat16(), a, b, out, alpha, True, symmetric)
    return out
