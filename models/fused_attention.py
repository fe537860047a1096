"""Attention as the products of fused.py take it: computed again for the backward pass, from queries, keys and values.

Letters: B batch, L positions, H heads, K width of a head, P positions of the text part, G side of the code grid, W rows
in a window.
"""

from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from models.kernels import attention as attention_kernel
from models.kernels.build import usable
from models.local_attention import from_windows, window_weights, windows


class _Parts(NamedTuple):
    """Queries (scaled), keys and values of text and codes, and who attends to what how much."""

    text_query: Tensor
    """(B, H, P, K), and so are text_key and text_value."""
    text_key: Tensor
    text_value: Tensor
    query: Tensor
    """(B, H, G, G, K); the last position, which is not there, is zeros."""
    key: Tensor
    """(B, H, G, W * G, K), and so is value."""
    value: Tensor
    text_weights: Tensor
    """Of the text on itself, (B, H, P, P)."""
    on_text: Tensor
    """Of the codes on the text, (B, H, N, P)."""
    on_window: Tensor
    """(B, H, G, G, W * G)"""
    weights: Tensor
    """Both side by side, (B, H, G, G, P + W * G)."""


class LocalAttention:
    """`local_attention` of a pattern: qkv (B, L, 3 * H * K) -> (B, L, H * K)."""

    def __init__(self, bias: Tensor, pattern: str, heads: int) -> None:
        """bias: see `window_bias`."""
        self.bias, self.pattern, self.heads = bias, pattern, heads
        self.grid = bias.shape[0]
        self.rows = bias.shape[2] // self.grid

    def _split(self, x: Tensor, parts: int) -> Tuple[Tensor, int]:
        """(B, L, parts * H * K) -> a view (parts, B, H, L, K) and P."""
        x = x.unflatten(2, (parts, self.heads, -1))
        return x.permute(2, 0, 3, 1, 4), x.shape[1] - self.grid**2 + 1

    def _on_grid(self, codes: Tensor) -> Tensor:
        """`on_grid` in one copy, (..., N - 1, K) -> (..., G, G, K)."""
        grid = self.grid
        result = codes.new_empty(*codes.shape[:-2], grid, grid, codes.shape[-1])
        by_row = result.transpose(-3, -2) if self.pattern == "axial_col" else result
        whole = grid * (grid - 1)
        by_row[..., :-1, :, :] = codes[..., :whole, :].unflatten(-2, (grid - 1, grid))
        by_row[..., -1, :-1, :] = codes[..., whole:, :]
        by_row[..., -1, -1, :] = 0
        return result

    def _off_grid(self, codes: Tensor, result: Tensor) -> None:
        """The way back, into the image positions of `result` (B, H, L, K)."""
        grid, text_len = self.grid, result.shape[2] - self.grid**2 + 1
        by_row = codes.transpose(2, 3) if self.pattern == "axial_col" else codes
        whole = text_len + grid * (grid - 1)
        result[:, :, text_len:whole].unflatten(2, (grid - 1, grid)).copy_(by_row[:, :, :-1])
        result[:, :, whole:] = by_row[:, :, -1, :-1]

    def _parts(self, qkv: Tensor) -> _Parts:
        heads, text_len = self._split(qkv, 3)
        text_query, text_key, text_value = heads[:, :, :, :text_len].contiguous().unbind(0)
        query, key, value = self._on_grid(heads[:, :, :, text_len:]).unbind(0)
        factor = query.shape[-1] ** -0.5
        text_query, query = text_query.mul_(factor), query.mul_(factor)
        key, value = windows(key, self.rows), windows(value, self.rows)
        later = torch.full((text_len, text_len), float("-inf"), dtype=qkv.dtype, device=qkv.device).triu(1)
        text_weights = torch.softmax(torch.matmul(text_query, text_key.transpose(-1, -2)).add_(later), dim=-1)
        weights = window_weights(query, key, text_key, self.bias)
        on_text, on_window = weights[..., :text_len].flatten(2, 3), weights[..., text_len:]
        return _Parts(text_query, text_key, text_value, query, key, value, text_weights, on_text, on_window, weights)

    def _attend(self, parts: _Parts, result: Tensor) -> None:
        """Write what all positions attend to into `result` (B, H, L, K)."""
        result[:, :, : parts.text_query.shape[2]] = torch.matmul(parts.text_weights, parts.text_value)
        image = torch.matmul(parts.on_window, parts.value)
        image += torch.matmul(parts.on_text, parts.text_value).view_as(image)
        self._off_grid(image, result)

    def __call__(self, x: Tensor) -> Tensor:
        result = x.new_empty(*x.shape[:2], x.shape[2] // 3)  # before what is freed again
        with torch.autocast(x.device.type, enabled=False):  # x has the type that products have
            self._attend(self._parts(x), self._split(result, 1)[0][0])
        return result

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        parts = self._parts(x)
        factor = parts.query.shape[-1] ** -0.5
        (for_query, for_key, for_value), text_len = self._split(for_x, 3)
        gradient = self._split(incoming, 1)[0][0]  # (B, H, L, K)

        # Text positions among themselves.
        on_text = gradient[:, :, :text_len].contiguous()
        for_text_value = torch.matmul(parts.text_weights.transpose(-1, -2), on_text)
        on_text = torch.matmul(on_text, parts.text_value.transpose(-1, -2))
        scores = _softmax_gradient(on_text, parts.text_weights)
        for_query[:, :, :text_len] = torch.matmul(scores, parts.text_key).mul_(factor)
        for_text_key = torch.matmul(scores.transpose(-1, -2), parts.text_query)

        # Image positions: what they see of the text, and of their window.
        on_grid = self._on_grid(gradient[:, :, text_len:])
        codes = on_grid.flatten(2, 3)  # (B, H, N, K)
        for_text_value += torch.matmul(parts.on_text.transpose(-1, -2), codes)
        self._off_grid(from_windows(torch.matmul(parts.on_window.transpose(-1, -2), on_grid), self.rows), for_value)
        on_text = torch.matmul(codes, parts.text_value.transpose(-1, -2)).unflatten(2, on_grid.shape[2:4])
        on_window = torch.matmul(on_grid, parts.value.transpose(-1, -2))
        scores = _softmax_gradient(torch.cat([on_text, on_window], dim=-1), parts.weights)
        text_scores, window_scores = scores[..., :text_len].flatten(2, 3), scores[..., text_len:]
        for_codes = torch.matmul(window_scores, parts.key)
        for_codes += torch.matmul(text_scores, parts.text_key).view_as(for_codes)
        self._off_grid(for_codes.mul_(factor), for_query)
        for_text_key += torch.matmul(text_scores.transpose(-1, -2), parts.query.flatten(2, 3))
        self._off_grid(from_windows(torch.matmul(window_scores.transpose(-1, -2), parts.query), self.rows), for_key)
        for_key[:, :, :text_len], for_value[:, :, :text_len] = for_text_key, for_text_value

        self._attend(parts, gradient)  # in the place of what came in
        return incoming


class KernelAttention:
    """Attention of the patterns full, axial_row and axial_col by a kernel: qkv (B, L, 3 * H * K) -> (B, L, H * K)."""

    @staticmethod
    def suits(qkv: Tensor, pattern: str) -> bool:
        """Whether there is a kernel for it."""
        known = pattern in ("full", "axial_row", "axial_col")
        return known and usable(qkv) and qkv.is_contiguous() and attention_kernel.available()

    def __init__(self, pattern: str, heads: int, grid: int) -> None:
        self.pattern = attention_kernel.Pattern(heads, 0 if pattern == "full" else grid, pattern == "axial_col")

    def __call__(self, x: Tensor) -> Tensor:
        return attention_kernel.forward(x, self.pattern)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        attention_kernel.backward(x, self.pattern, incoming, for_x)
        return incoming


def _softmax_gradient(for_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient for the scores of softmax(scores) = weights."""
    return torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
