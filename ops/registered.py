"""Native ops registered as PyTorch operators, with autograd and fake kernels, for torch.compile and torch.export.

Eager calls skip them: a registered operator with autograd costs tens of microseconds a call. Under compile and export a
direct C call would break the graph; these operators stay in it.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops import native_attention
from ops.native_attention import Pattern

AVAILABLE = hasattr(torch.library, "custom_op") and hasattr(torch.library, "register_autograd")
"""From PyTorch 2.4 on."""

if AVAILABLE:

    @torch.library.custom_op("dalle::attention", mutates_args=())
    def attention(qkv: Tensor, heads: int, grid: int, by_column: bool) -> Tensor:
        """`native_attention.forward`, (B, L, 3 * H * K) -> (B, L, H * K)."""
        return native_attention.forward(qkv, Pattern(heads, grid, by_column))

    @attention.register_fake
    def _(qkv: Tensor, heads: int, grid: int, by_column: bool) -> Tensor:
        return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)

    @torch.library.custom_op("dalle::attention_backward", mutates_args=())
    def attention_backward(qkv: Tensor, grad_output: Tensor, heads: int, grid: int, by_column: bool) -> Tensor:
        """The gradient of qkv, (B, L, 3 * H * K)."""
        grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        native_attention.backward(
            qkv.contiguous(), Pattern(heads, grid, by_column),
            grad_output.clone(memory_format=torch.contiguous_format), grad_qkv,
        )  # fmt: skip
        return grad_qkv

    @attention_backward.register_fake
    def _(qkv: Tensor, grad_output: Tensor, heads: int, grid: int, by_column: bool) -> Tensor:
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qkv, *ctx.pattern = inputs
        ctx.save_for_backward(qkv)

    def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return attention_backward(ctx.saved_tensors[0], grad_output, *ctx.pattern), None, None, None

    attention.register_autograd(_backward, setup_context=_keep)
