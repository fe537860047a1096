"""Token shift: some channels of a position come from the previous token, or from the codes above and to the left.

Letters: B batch, P positions of the text part, G side of the code grid, L = P + G * G - 1 positions, n positions of a
chunk, D width.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.linear_ops import fuses


def shift_text(x: Tensor) -> Tensor:
    """Take the first half of the channels from the previous position (first: zeros). (B, P, D) -> (B, P, D)."""
    shifted, kept = x.chunk(2, dim=-1)
    return torch.cat([F.pad(shifted, (0, 0, 1, 0))[:, :-1], kept], dim=-1)


def shift_codes(x: Tensor, above: Tensor, left: Tensor, columns: Tensor) -> Tensor:
    """Take a quarter of the channels from the code above, and one from the code to the left.

    x, above, left (B, n, D), above zeros in the first row; columns (n,) or (B, n) of the codes: column 0 has no code to
    the left -> (B, n, D).
    """
    quarter = x.shape[-1] // 4
    left = left[..., quarter : 2 * quarter] * (columns != 0)[..., None]
    return torch.cat([above[..., :quarter], left, x[..., 2 * quarter :]], dim=-1)


def shift_tokens(x: Tensor, text_len: int, grid: int) -> Tensor:
    """Shift the whole sequence, P positions of text and all codes but the last, (B, L, D) -> (B, L, D)."""
    if fuses():
        return _Shift.apply(x, text_len, grid)
    text, codes = x[:, :text_len], x[:, text_len:]
    above, left = (F.pad(codes, (0, 0, by, 0))[:, : codes.shape[1]] for by in (grid, 1))
    columns = torch.arange(codes.shape[1], device=x.device) % grid
    return torch.cat([shift_text(text), shift_codes(codes, above, left, columns)], dim=1)


class _Shift(torch.autograd.Function):
    """`shift_tokens` with one copy in each pass; autograd fills and adds a tensor for each slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text_len: int, grid: int) -> Tensor:
        ctx.sizes = text_len, grid
        half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
        result = x.clone(memory_format=torch.contiguous_format)
        result[:, 1:text_len, :half] = x[:, : text_len - 1, :half]
        result[:, 0, :half] = 0
        codes, shifted = x[:, text_len:], result[:, text_len:]
        shifted[:, grid:, :quarter] = codes[:, :-grid, :quarter]
        shifted[:, :grid, :quarter] = 0
        shifted[:, 1:, quarter : 2 * quarter] = codes[:, :-1, quarter : 2 * quarter]
        shifted[:, ::grid, quarter : 2 * quarter] = 0
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        text_len, grid = ctx.sizes
        half, quarter = grad_output.shape[-1] // 2, grad_output.shape[-1] // 4
        grad_x = grad_output.clone(memory_format=torch.contiguous_format)
        grad_x[:, : text_len - 1, :half] = grad_output[:, 1:text_len, :half]
        grad_x[:, text_len - 1, :half] = 0
        grads, codes = grad_output[:, text_len:], grad_x[:, text_len:]
        codes[:, :-grid, :quarter] = grads[:, grid:, :quarter]
        codes[:, -grid:, :quarter] = 0
        codes[:, :-1, quarter : 2 * quarter] = grads[:, 1:, quarter : 2 * quarter]
        codes[:, grid - 1 :: grid, quarter : 2 * quarter] = 0
        codes[:, -1:, quarter : 2 * quarter] = 0
        return grad_x, None, None
