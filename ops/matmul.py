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


@functools.lru_cache(maxsize=None)
def _functions() -> Any:
    found = library("matrix")
    if found is None or not found.multiplies():
        return None
    size: Any = ctypes.c_long
    address: Any = ctypes.c_void_p
    found.matmul.argtypes = [size] * 3 + [address, size, size] * 2 + [size, address, size]
    return found


@functools.lru_cache(maxsize=None)
def _bfloat16() -> Any:
    found = library("bfloat16")
    if found is None or not found.multiplies():
        return None
    size: Any = ctypes.c_long
    address: Any = ctypes.c_void_p
    options = [ctypes.c_float, ctypes.c_int, ctypes.c_int]
    found.matmul.argtypes = [size] * 3 + [address, size, size] * 2 + [*options, address, size]
    return found


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
            _multiply_in_bfloat16(a, b, result)
        return result if bias is None else result.add_(bias)
    (a_line, a_step), (b_step, b_line) = a.stride(), b.stride()
    failed = _functions().matmul(
        rows, columns, depth,
        pointer(a), a_line, a_step, pointer(b), b_line, b_step,
        _PARTS[torch.get_float32_matmul_precision()], pointer(result), result.stride(0),
    )  # fmt: skip
    if failed == 2:  # not finite, or too large for the unit; PyTorch's float32 may round to bfloat16 and to infinity
        result.copy_(torch.mm(a.double(), b.double()))
    elif failed:
        raise MemoryError(f"not enough memory for the matmul of {tuple(a.shape)} and {tuple(b.shape)}")
    return result if bias is None else result.add_(bias)


def _multiply_in_bfloat16(
    a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, add: bool = False, symmetric: bool = False
) -> None:
    (rows, depth), columns = a.shape, b.shape[1]
    (a_line, a_step), (b_step, b_line) = a.stride(), b.stride()
    if _bfloat16().matmul(
        rows, columns, depth,
        pointer(a), a_line, a_step, pointer(b), b_line, b_step, alpha, add, symmetric, pointer(out), out.stride(0),
    ):  # fmt: skip
        raise MemoryError(f"not enough memory for the matmul of {tuple(a.shape)} and {tuple(b.shape)}")


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
    _multiply_in_bfloat16(a, b, out, alpha, add=True, symmetric=symmetric)
    return out
