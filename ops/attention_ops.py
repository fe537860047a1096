"""Attention of queries, keys and values that lie side by side, under one description of who sees whom.

Implementations: an explicit matmul and softmax (the reference), PyTorch's fused kernel, one that computes only what a
sparse pattern shows (local_attention.py), and a native kernel. Those that can be recomputed in the backward pass are
`Function`s for `add_linear`.

Letters: B batch, L positions, H heads, K width of a head, P positions of the text part, G side of the code grid, W rows
in a window, R channels that turn.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import dispatch, native_attention, registered
from ops.linear_ops import IDENTITY, Function
from ops.local_attention import from_windows, local_attention, window_weights, windows


class Visible(NamedTuple):
    """Who sees whom among L = P + G * G - 1 positions: the text part and all codes but the last."""

    mask: Tensor
    """(L, L), True where a row's position may attend to a column's."""
    causal: bool = False
    """The mask is the plain lower triangle."""
    window: Tensor | None = None
    """(G, G, W * G): codes see the text and their window of W rows (columns with `by_column`), of which this is added
    to the scores, 0 or -inf. None: codes see more than a window."""
    by_column: bool = False

    @property
    def simple(self) -> bool:
        """Whether positions see all that comes before them, or besides the text their own row or column alone."""
        return self.causal or self.lines > 0

    @property
    def lines(self) -> int:
        """G where codes see the earlier ones of their own row or column alone, else 0."""
        return self.window.shape[0] if self.window is not None and self.window.shape[2] == self.window.shape[0] else 0


_SHORT = 512
"""Queries up to which PyTorch's fused kernel on a CPU multiplies blocks so small that rounding them to bfloat16, which
float32 matmuls of medium precision do, takes most of the time: up to six times that of the explicit matmul."""
_DENSE_ON_GPU = 512
"""Positions up to which a GPU takes one fused kernel under a mask. An estimate: no GPU was measured."""


def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v, from matmul and softmax alone. (B, H, L, K), (B, H, m, K) twice -> (B, H, L, K).

    mask (..., L, m): True where a position is seen, or floats to add to the scores; None: all are.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))  # (B, H, L, m)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """The same by PyTorch's fused kernel, where that is not slow (see _SHORT); `causal`: without reading the mask."""
    short = query.shape[2] <= _SHORT and torch.get_float32_matmul_precision() == "medium"
    if dispatch.uses_reference() or (short and dispatch.suits(query)):
        return explicit(query, key, value, mask)
    if causal:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def prompt_attention(query: Tensor, text: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v, where the images of a prompt share the text's keys and values.

    query (B, H, n, K), text (2, prompts, H, P, K), codes (2, B, H, m, K), keys and values, B a multiple of the prompts;
    bias (n, P + m) or (B, 1, n, P + m), added to the scores -> (B, H, n, K).
    """
    (rows, heads, count, width), prompts = query.shape, text.shape[1]

    def by_prompt(x: Tensor) -> Tensor:  # (B, H, n, ...) -> (prompts, H, images * n, ...)
        return x.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, count)).transpose(1, 2).reshape(rows, heads, count, -1)

    query = query * width**-0.5
    # All images of a prompt read the same text keys: one matmul for them.
    on_text = by_row(torch.matmul(by_prompt(query), text[0].transpose(-1, -2)))
    scores = torch.cat([on_text, torch.matmul(query, codes[0].transpose(-1, -2))], dim=-1)  # (B, H, n, P + m)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    on_text, on_codes = weights.split([text.shape[3], codes.shape[3]], dim=-1)
    return torch.matmul(on_codes, codes[1]) + by_row(torch.matmul(by_prompt(on_text), text[1]))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the leading channel pairs of x (..., L, K) by angles (L, R), or (B, 1, L, R) for x (3, B, H, L, K)."""
    width = angles.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    pairs = turned.unflatten(-1, (-1, 2))
    quarter = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.cat([turned * angles.cos() + quarter * angles.sin(), rest], dim=-1).to(x.dtype)


def split_heads(qkv: Tensor, heads: int, angles: Tensor | None) -> Tensor:
    """(B, L, 3 * H * K) -> queries, keys and values (3, B, H, L, K), turned where there are angles (see `rotate`)."""
    parts = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return parts if angles is None else rotate(parts, angles)  # DALLE-pytorch turns the values too


def attention(
    qkv: Tensor, heads: int, visible: Visible, angles: Tensor | None = None
) -> tuple[Tensor, Function]:
    """Return a tensor and what makes of it the heads side by side, (B, L, H * K): for `add_linear`.

    qkv (B, L, 3 * H * K), angles (L, R) or None.
    """
    implementation = dispatch.attention()
    if angles is None and implementation == "auto" and visible.simple:
        if dispatch.compiling():
            if registered.AVAILABLE and dispatch.refusal(qkv, registered=True) is None and native_attention.exists():
                return registered.attention(qkv, heads, visible.lines, visible.by_column), IDENTITY
        elif NativeAttention.suits(qkv, visible):
            return qkv, NativeAttention(visible, heads)
    if _windowed(qkv, visible, implementation):
        if angles is None and torch.is_grad_enabled():
            return qkv, _Local(visible.window, visible.by_column, heads)
        attended = local_attention(*split_heads(qkv, heads, angles), visible.window, visible.by_column)
    else:
        attend = explicit if implementation == "explicit" else sdpa
        attended = attend(*split_heads(qkv, heads, angles), visible.mask, visible.causal)
    return attended.transpose(1, 2).flatten(2), IDENTITY


def _windowed(x: Tensor, visible: Visible, implementation: str) -> bool:
    """Whether to compute only what the pattern shows: always on a CPU, on a GPU when that is much less."""
    if visible.window is None or implementation not in ("auto", "local"):
        return False
    return implementation == "local" or x.device.type == "cpu" or x.shape[1] > _DENSE_ON_GPU


class NativeAttention:
    """Attention to all that comes before, or to the text and one's own row or column, by csrc/attention.c."""

    differentiable, number = False, -1

    @staticmethod
    def suits(qkv: Tensor, visible: Visible) -> bool:
        """Whether there is a kernel for it."""
        return visible.simple and dispatch.suits(qkv) and qkv.is_contiguous() and native_attention.available()

    def __init__(self, visible: Visible, heads: int) -> None:
        self.pattern = native_attention.Pattern(heads, visible.lines, visible.by_column)

    def __call__(self, x: Tensor) -> Tensor:
        return native_attention.forward(x, self.pattern)

    def recompute(self, x: Tensor, grad_output: Tensor, grad_input: Tensor) -> Tensor:
        native_attention.backward(x, self.pattern, grad_output, grad_input)
        return grad_output


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


class _Local:
    """`local_attention`: qkv (B, L, 3 * H * K) -> (B, L, H * K)."""

    differentiable, number = False, -1

    def __init__(self, bias: Tensor, by_column: bool, heads: int) -> None:
        """bias (G, G, W * G), see `Visible`."""
        self.bias, self.by_column, self.heads = bias, by_column, heads
        self.grid = bias.shape[0]
        self.rows = bias.shape[2] // self.grid

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, int]:
        """(B, L, parts * H * K) -> a view (parts, B, H, L, K) and P."""
        x = x.unflatten(2, (parts, self.heads, -1))
        return x.permute(2, 0, 3, 1, 4), x.shape[1] - self.grid**2 + 1

    def _on_grid(self, codes: Tensor) -> Tensor:
        """`on_grid` in one copy, (..., N - 1, K) -> (..., G, G, K)."""
        grid = self.grid
        result = codes.new_empty(*codes.shape[:-2], grid, grid, codes.shape[-1])
        by_row = result.transpose(-3, -2) if self.by_column else result
        whole = grid * (grid - 1)
        by_row[..., :-1, :, :] = codes[..., :whole, :].unflatten(-2, (grid - 1, grid))
        by_row[..., -1, :-1, :] = codes[..., whole:, :]
        by_row[..., -1, -1, :] = 0
        return result

    def _off_grid(self, codes: Tensor, result: Tensor) -> None:
        """The way back, into the image positions of `result` (B, H, L, K)."""
        grid, text_len = self.grid, result.shape[2] - self.grid**2 + 1
        by_row = codes.transpose(2, 3) if self.by_column else codes
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

    def recompute(self, x: Tensor, grad_output: Tensor, grad_input: Tensor) -> Tensor:
        parts = self._parts(x)
        factor = parts.query.shape[-1] ** -0.5
        (grad_query, grad_key, grad_value), text_len = self._split(grad_input, 3)
        gradient = self._split(grad_output, 1)[0][0]  # (B, H, L, K)

        # Text positions among themselves.
        on_text = gradient[:, :, :text_len].contiguous()
        grad_text_value = torch.matmul(parts.text_weights.transpose(-1, -2), on_text)
        on_text = torch.matmul(on_text, parts.text_value.transpose(-1, -2))
        scores = _softmax_gradient(on_text, parts.text_weights)
        grad_query[:, :, :text_len] = torch.matmul(scores, parts.text_key).mul_(factor)
        grad_text_key = torch.matmul(scores.transpose(-1, -2), parts.text_query)

        # Image positions: what they see of the text, and of their window.
        on_grid = self._on_grid(gradient[:, :, text_len:])
        codes = on_grid.flatten(2, 3)  # (B, H, N, K)
        grad_text_value += torch.matmul(parts.on_text.transpose(-1, -2), codes)
        self._off_grid(from_windows(torch.matmul(parts.on_window.transpose(-1, -2), on_grid), self.rows), grad_value)
        on_text = torch.matmul(codes, parts.text_value.transpose(-1, -2)).unflatten(2, on_grid.shape[2:4])
        on_window = torch.matmul(on_grid, parts.value.transpose(-1, -2))
        scores = _softmax_gradient(torch.cat([on_text, on_window], dim=-1), parts.weights)
        text_scores, window_scores = scores[..., :text_len].flatten(2, 3), scores[..., text_len:]
        grad_codes = torch.matmul(window_scores, parts.key)
        grad_codes += torch.matmul(text_scores, parts.text_key).view_as(grad_codes)
        self._off_grid(grad_codes.mul_(factor), grad_query)
        grad_text_key += torch.matmul(text_scores.transpose(-1, -2), parts.query.flatten(2, 3))
        self._off_grid(from_windows(torch.matmul(window_scores.transpose(-1, -2), parts.query), self.rows), grad_key)
        grad_key[:, :, :text_len], grad_value[:, :, :text_len] = grad_text_key, grad_text_value

        self._attend(parts, gradient)  # in the place of what came in
        return grad_output


def _softmax_gradient(grad_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient for the scores of softmax(scores) = weights."""
    return torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
