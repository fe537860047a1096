"""Attention on packed queries, keys and values, under one description of which positions see which.

Implementations: an explicit matmul and softmax (the reference), PyTorch's fused kernel, one that computes only the
visible part of a sparse pattern (local_attention.py), and a native kernel. Those that can be recomputed in the backward
pass are `Function`s for `add_linear`.

Letters: B batch, L positions, H heads, K width of a head, P positions of the text part, G side of the code grid, W rows
in a window, R rotated channels.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import dispatch, elementwise, native_attention
from ops.linear_ops import IDENTITY, Function, Norm, Recompute, fuses, normalise
from ops.local_attention import local_attention


class Visible(NamedTuple):
    """Which of L = P + G * G - 1 positions see which: the text part and all codes but the last."""

    mask: Tensor
    """(L, L), True where a row's position may attend to a column's."""
    causal: bool = False
    """The mask is the plain lower triangle."""
    window: Tensor | None = None
    """(G, G, W * G): codes see the text and their window of W rows (columns with `by_column`); this bias, 0 or -inf, is
    added to the window's scores. None: codes see more than a window."""
    by_column: bool = False

    @property
    def simple(self) -> bool:
        """Whether positions see everything before them, or only the text and their own row or column."""
        return self.causal or self.lines > 0

    @property
    def lines(self) -> int:
        """G where codes see only the earlier ones of their own row or column, else 0."""
        return self.window.shape[0] if self.window is not None and self.window.shape[2] == self.window.shape[0] else 0


HEAD_EPS = 1e-6
"""Added to the mean square of a head's queries or keys where they are normalised."""
_SHORT = 512
"""Up to so many queries PyTorch's fused CPU kernel multiplies such small blocks that rounding them to bfloat16 (float32
matmuls of medium precision) dominates: it takes up to six times as long as the explicit matmul."""
_DENSE_ON_GPU = 512
"""Positions up to which a GPU uses one fused kernel with a mask. An estimate: not measured on a GPU."""


def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v, from matmul and softmax alone. (B, H, L, K), (B, H, m, K) twice -> (B, H, L, K).

    mask (..., L, m): True where a position is visible, or floats to add to the scores; None: all are visible.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))  # (B, H, L, m)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """The same by PyTorch's fused kernel, where that is not slow (see _SHORT); `causal`: the mask is not read."""
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
        if prompts == count == 1:  # one view instead of several, which take as long as the matmuls
            return x.transpose(0, 2)
        return x.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:
        if prompts == count == 1:
            return x.transpose(0, 2)
        return x.unflatten(2, (-1, count)).transpose(1, 2).reshape(rows, heads, count, -1)

    query = query * width**-0.5
    (text_keys, text_values), (keys, values) = text.unbind(0), codes.unbind(0)
    # All images of a prompt read the same text keys: one matmul for them.
    on_text = by_row(torch.matmul(by_prompt(query), text_keys.transpose(-1, -2)))
    scores = torch.cat([on_text, torch.matmul(query, keys.transpose(-1, -2))], dim=-1)  # (B, H, n, P + m)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    on_text, on_codes = weights.split_with_sizes([text.shape[3], codes.shape[3]], dim=-1)
    return torch.matmul(on_codes, values) + by_row(torch.matmul(by_prompt(on_text), text_values))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the leading channel pairs of x (..., L, K) by angles (L, R), or (B, 1, L, R) for x (3, B, H, L, K)."""
    width = angles.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    pairs = rotated.unflatten(-1, (-1, 2))
    quarter = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.cat([rotated * angles.cos() + quarter * angles.sin(), rest], dim=-1).to(x.dtype)


def prepare_heads(qkv: Tensor, heads: int, scales: Tensor | None, angles: Tensor | None) -> Tensor:
    """Normalise queries and keys of each head and rotate them, (B, n, 3 * H * K) -> (B, n, 3 * H * K).

    scales (2, K) of queries and keys, or None for no norm; angles (n, R) or (B, 1, n, R), or None.
    """
    whole = angles is None or angles.dim() == 2
    if whole and fuses() and elementwise.suits(qkv, scales) and not dispatch.autocasts(qkv):
        return _PrepareHeads.apply(qkv, heads, scales, angles)
    parts = qkv.unflatten(-1, (3, heads, -1))  # (B, n, 3, H, K)
    pair, values = parts[:, :, :2], parts[:, :, 2:]
    if scales is not None:
        pair = normalise(pair, Norm(scales[:, None], None, HEAD_EPS))
    if angles is not None:
        pair = rotate(pair, (angles if angles.dim() == 2 else angles[:, 0])[..., None, None, :])
    return torch.cat([pair, values], dim=2).flatten(2)


class _PrepareHeads(torch.autograd.Function):
    """`prepare_heads` by kernels; only qkv is saved."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, scales: Tensor | None, angles: Tensor | None) -> Tensor:
        ctx.save_for_backward(qkv, scales, angles)
        ctx.heads = heads
        return _PrepareHeads.of(qkv, heads, scales, angles).forward(qkv)

    @staticmethod
    def of(qkv: Tensor, heads: int, scales: Tensor | None, angles: Tensor | None) -> elementwise.Heads:
        """Describe it for the kernels."""
        cosine = sine = None
        if angles is not None:
            rest = qkv.shape[-1] // (3 * heads) - angles.shape[-1]
            cosine = F.pad(angles.cos(), (0, rest), value=1.0)
            sine = F.pad(angles.sin() * angles.new_tensor([-1.0, 1.0]).repeat(angles.shape[-1] // 2), (0, rest))
        return elementwise.Heads(heads, HEAD_EPS, scales, cosine, sine)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        qkv, scales, angles = ctx.saved_tensors
        own = _PrepareHeads.of(qkv, ctx.heads, scales, angles)
        grad_qkv, grad_scales = own.backward(qkv, grad_output.contiguous())
        return grad_qkv, None, grad_scales, None


def split_heads(qkv: Tensor, heads: int, angles: Tensor | None) -> Tensor:
    """(B, L, 3 * H * K) -> queries, keys and values (3, B, H, L, K), rotated if there are angles (see `rotate`)."""
    parts = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return parts if angles is None else rotate(parts, angles)  # DALLE-pytorch rotates the values too


def attention(
    qkv: Tensor, heads: int, visible: Visible, angles: Tensor | None = None
) -> tuple[Tensor, Function]:
    """Return a tensor and the function that turns it into the concatenated heads, (B, L, H * K), for `add_linear`.

    qkv (B, L, 3 * H * K), angles (L, R) or None.
    """
    implementation = dispatch.attention()
    if angles is None and implementation == "auto" and visible.simple:
        if dispatch.compiling():
            from ops import registered  # registering loads PyTorch's compiler: 70 MB and a second, only for it

            if registered.AVAILABLE and dispatch.refusal(qkv, registered=True) is None and registered.exists():
                return registered.attention(qkv, heads, visible.lines, visible.by_column), IDENTITY
        elif NativeAttention.suits(qkv, visible):
            return qkv, NativeAttention(visible, heads)
    window = visible.window if _windowed(qkv, visible, implementation) else None
    if window is not None:

        def attend(qkv: Tensor) -> Tensor:
            query, key, value = split_heads(qkv, heads, angles)
            attended = local_attention(query, key, value, window, visible.by_column)
            return attended.transpose(1, 2).flatten(2)

        # Windows and weights take more memory than the rest of a block: recompute. A compiler decides by itself.
        return qkv, Recompute(attend, differentiable=dispatch.compiling())
    fused = explicit if implementation == "explicit" else sdpa
    query, key, value = split_heads(qkv, heads, angles)
    attended = fused(query, key, value, visible.mask, visible.causal)
    return attended.transpose(1, 2).flatten(2), IDENTITY


def _windowed(x: Tensor, visible: Visible, implementation: str) -> bool:
    """Whether to compute only the visible part: always on a CPU, on a GPU when that is much less."""
    if visible.window is None or implementation not in ("auto", "local"):
        return False
    return implementation == "local" or x.device.type == "cpu" or x.shape[1] > _DENSE_ON_GPU


class NativeAttention:
    """Attention to all earlier positions, or to the text and the own row or column, by csrc/attention.c."""

    differentiable, number = False, -1

    @staticmethod
    def suits(qkv: Tensor, visible: Visible) -> bool:
        """Whether there is a kernel for this."""
        return visible.simple and dispatch.suits(qkv) and qkv.is_contiguous() and native_attention.available()

    def __init__(self, visible: Visible, heads: int) -> None:
        self.pattern = native_attention.Pattern(heads, visible.lines, visible.by_column)

    def __call__(self, x: Tensor) -> Tensor:
        return native_attention.forward(x, self.pattern)

    def recompute(self, x: Tensor, grad_output: Tensor, grad_input: Tensor) -> Tensor:
        native_attention.backward(x, self.pattern, grad_output, grad_input)
        return grad_output
