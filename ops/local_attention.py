"""Sparse attention patterns, without computing the scores that their masks would discard.

An image position of an axial or conv pattern sees the text and a few rows (or its column) of codes. Attending to these
alone, a layer of L16 computes a third of the dense scores, at 512x512 pixels a tenth, with the same result.

Letters: B batch, P positions of the text part, G side of the code grid, W rows in a window, L positions, H heads, K
width of a head. Grids are transposed if the window of a position consists of columns (`by_column`).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def on_grid(codes: Tensor, grid: int, by_column: bool) -> Tensor:
    """Lay out all image positions but the last on the grid, (B, H, N - 1, K) -> (B, H, G, G, K), the last as zeros.

    A window consists of rows of the result: columns of codes with `by_column`.
    """
    codes = F.pad(codes, (0, 0, 0, 1)).unflatten(2, (grid, grid))
    return codes.transpose(2, 3) if by_column else codes


def off_grid(codes: Tensor, by_column: bool) -> Tensor:
    """The inverse: (B, H, G, G, K) -> (B, H, N - 1, K)."""
    return (codes.transpose(2, 3) if by_column else codes).flatten(2, 3)[:, :, :-1]


def windows(codes: Tensor, rows: int) -> Tensor:
    """Give each row the W rows that it sees, those above first. (B, H, G, G, K) -> (B, H, G, W * G, K)."""
    if rows == 1:
        return codes
    grid = codes.shape[2]
    padded = F.pad(codes, (0, 0, 0, 0, rows - 1, 0))
    return torch.stack([padded[:, :, first : first + grid] for first in range(rows)], dim=3).flatten(3, 4)


def window_weights(query: Tensor, key: Tensor, text_key: Tensor, bias: Tensor) -> Tensor:
    """Attention weights of the image positions on the text and on their windows, (B, H, G, G, P + W * G).

    query (B, H, G, G, K), scaled; key (B, H, G, W * G, K); text_key (B, H, P, K).
    """
    # Every position sees the whole text: one matmul for all.
    text_scores = torch.matmul(query.flatten(2, 3), text_key.transpose(-1, -2)).unflatten(2, query.shape[2:4])
    window_scores = torch.matmul(query, key.transpose(-1, -2))
    scores = torch.cat([text_scores, window_scores + bias.to(window_scores.dtype)], dim=-1)
    return torch.softmax(scores, dim=-1)


def local_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, by_column: bool) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v where image positions see the text and their window. (B, H, L, K) -> (B, H, L, K).

    bias (G, G, W * G): 0 where a code of the window is visible, else -inf. The last image position is absent (L = P +
    G * G - 1), as always in training.
    """
    grid = bias.shape[0]
    rows, text_len = bias.shape[2] // grid, query.shape[2] - grid * grid + 1
    text_key, text_value = key[:, :, :text_len], value[:, :, :text_len]
    from_text = F.scaled_dot_product_attention(query[:, :, :text_len], text_key, text_value, is_causal=True)
    query, key, value = (on_grid(part[:, :, text_len:], grid, by_column) for part in (query, key, value))
    weights = window_weights(query * query.shape[-1] ** -0.5, windows(key, rows), text_key, bias)
    image = torch.matmul(weights[..., :text_len].flatten(2, 3), text_value).unflatten(2, (grid, grid))
    image = image + torch.matmul(weights[..., text_len:], windows(value, rows))
    return torch.cat([from_text.to(image.dtype), off_grid(image, by_column)], dim=2)
