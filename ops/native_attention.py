"""Attention by csrc/attention.c: a causal text part visible to all, then codes that see their row or column.

Letters: B batch, L positions, H heads, K width of a head, P positions of the text part, G side of the code grid.
"""
from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.build import library, pointer


class Shape(ctypes.Structure):
    """The same struct as in attention.c."""

    _fields_ = [(name, ctypes.c_long) for name in ("batch", "length", "heads", "width", "text", "grid", "by_column")]


@functools.lru_cache(maxsize=None)
def _functions() -> Any:
    found = library("attention")
    if found is not None:
        address, size = ctypes.c_void_p, ctypes.c_long
        found.attention_scratch.argtypes, found.attention_scratch.restype = [address, ctypes.c_int], size
        found.attention_forward.argtypes = [address, address, address, address, size, ctypes.c_int]
        found.attention_backward.argtypes = [address, address, address, address, address, size, ctypes.c_int]
        found.attention_forward.restype = found.attention_backward.restype = None
    return found


def available() -> bool:
    """Whether these kernels run on this machine."""
    return _functions() is not None


@getattr(getattr(torch, "compiler", None), "assume_constant_result", lambda function: function)
def exists() -> bool:
    """`available` as a constant for torch.compile."""
    return available()


class Pattern(NamedTuple):
    """Which positions see which. grid 0: no codes, plain causal attention on text."""

    heads: int
    grid: int
    by_column: bool

    def shape(self, qkv: Tensor) -> Shape:
        """qkv (B, L, 3 * H * K), L = P + G * G - 1 or P."""
        if qkv.dtype != torch.float32 or not qkv.is_cpu:  # an exported model may have been moved or converted
            raise ValueError(f"native attention takes float32 on a CPU, not {qkv.dtype} on {qkv.device.type}")
        batch, length, width = qkv.shape
        text = length - self.grid**2 + 1 if self.grid else length
        if width % (3 * self.heads) or text < 1:
            raise ValueError(f"qkv of shape {tuple(qkv.shape)} does not fit {self.heads} heads and grid {self.grid}")
        return Shape(batch, length, self.heads, width // (3 * self.heads), text, self.grid, self.by_column)


def _scratch(shape: Shape, backward: bool, like: Tensor) -> Tensor:
    """(threads, floats)"""
    each = _functions().attention_scratch(ctypes.byref(shape), backward)
    return like.new_empty(torch.get_num_threads(), each)


def forward(qkv: Tensor, pattern: Pattern) -> Tensor:
    """Attend. qkv (B, L, 3 * H * K) -> (B, L, H * K)."""
    qkv, shape = qkv.contiguous(), pattern.shape(qkv)
    result = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)  # before scratch, which is freed
    scratch = _scratch(shape, False, qkv)
    threads, each = scratch.shape
    _functions().attention_forward(ctypes.byref(shape), pointer(qkv), pointer(result), pointer(scratch), each, threads)
    return result


def backward(qkv: Tensor, pattern: Pattern, grad_output: Tensor, grad_qkv: Tensor) -> None:
    """Write the gradient of qkv to `grad_qkv`, and overwrite `grad_output` with the result of `forward`.

    qkv and grad_qkv (B, L, 3 * H * K), grad_output (B, L, H * K), all contiguous.
    """
    shape = pattern.shape(qkv)
    wanted = (*qkv.shape[:2], qkv.shape[2] // 3)
    if grad_output.shape != wanted or grad_qkv.shape != qkv.shape:
        raise ValueError(f"gradients have wrong shapes: {tuple(grad_output.shape)}, {tuple(grad_qkv.shape)}")
    if not (qkv.is_contiguous() and grad_output.is_contiguous() and grad_qkv.is_contiguous()):
        raise ValueError("queries, keys, values and gradients must be contiguous")
    scratch = _scratch(shape, True, qkv)
    threads, each = scratch.shape
    _functions().attention_backward(
        ctypes.byref(shape), pointer(qkv), pointer(grad_output), pointer(grad_qkv), pointer(scratch), each, threads
    )
