"""Attention patterns as masks and windows, and the angles of rotary position embedding.

Letters: P positions of the text part, G side of the code grid, N = G * G codes, W rows in a window, L positions, R
rotated channels.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ops import Visible

#: Window of the conv patterns: side in codes, and dilation (as in Mini DALL-E and DALLE-pytorch).
CONV_KERNEL_SIZE = 5
CONV_DILATION = 1

#: Rows of codes that a position may see, its own included. axial_col is axial_row on the transposed grid.
_CONV_ROWS = {"axial_row": 1, "axial_col": 1, "conv_like": 3, "conv_causal": 5}


def allowed_codes(pattern: str, grid: int) -> Tensor:
    """Return a pattern's causal (N, N) boolean matrix among the image positions, N = grid * grid (see `build_mask`)."""
    num_codes = grid * grid
    row = torch.arange(num_codes).div(grid, rounding_mode="floor")
    column = torch.arange(num_codes) % grid
    down = row[:, None] - row[None, :]  # (N, N), > 0: the key is above the query
    right = column[:, None] - column[None, :]
    if pattern == "full":
        allowed = torch.ones(num_codes, num_codes, dtype=torch.bool)
    elif pattern == "axial_row":
        allowed = down == 0
    elif pattern == "axial_col":
        allowed = right == 0
    elif pattern == "conv_like":
        reach = CONV_KERNEL_SIZE // 2 * CONV_DILATION
        allowed = (
            (down.abs() <= reach) & (right.abs() <= reach) & (down % CONV_DILATION == 0) & (right % CONV_DILATION == 0)
        )
    elif pattern == "conv_causal":
        reach = (CONV_KERNEL_SIZE - 1) * CONV_DILATION
        allowed = (down >= 0) & (down <= reach) & (right >= 0) & (right <= reach)
        allowed &= (down % CONV_DILATION == 0) & (right % CONV_DILATION == 0)
    else:
        raise ValueError(f"unknown attention pattern {pattern!r}")
    return allowed.tril()


def window_rows(pattern: str) -> int | None:
    """Return W, the rows of codes (columns for axial_col) that a position sees, or None for a dense pattern."""
    return _CONV_ROWS.get(pattern)


def window_bias(pattern: str, allowed: Tensor, grid: int) -> Tensor:
    """Return the bias added to the scores of the window, (G, G, W * G): 0 where the pattern allows, else -inf.

    allowed (N, N): which image position (row) may attend to which (column), causal, N = G * G.
    """
    rows = window_rows(pattern) or grid
    allowed = allowed.view(grid, grid, grid, grid)  # query row, query column, key row, key column
    if pattern == "axial_col":
        allowed = allowed.permute(1, 0, 3, 2)
    bias = torch.full((grid, grid, rows, grid), float("-inf"))
    for row in range(grid):
        for window in range(rows):
            above = row - (rows - 1) + window
            if above >= 0:
                bias[row, :, window].masked_fill_(allowed[row, :, above], 0.0)
    return bias.flatten(2)


def build_mask(pattern: str, text_len: int, grid: int) -> Tensor:
    """Return the (L, L) boolean mask of an attention pattern, True where a row's position may attend to a column's.

    Every pattern is causal, and every image position sees the whole text part. Among the image positions
      full         sees all earlier ones,
      axial_row    the earlier ones of its own row,
      axial_col    the earlier ones of its own column,
      conv_like    the earlier ones of the 5x5 window centred on it (Mini DALL-E, DALLE-pytorch before 1.5),
      conv_causal  the 5x5 window that ends at it: up to 4 rows up and 4 columns to the left (DALLE-pytorch from 1.5).
    L = text_len + grid * grid - 1: the last image token is predicted but never attended from.
    """
    num_codes = grid * grid
    mask = torch.ones(text_len + num_codes, text_len + num_codes, dtype=torch.bool)
    mask[text_len:, text_len:] = allowed_codes(pattern, grid)
    return mask.tril()[:-1, :-1].contiguous()


def visible(pattern: str, text_len: int, grid: int) -> Visible:
    """Return a pattern in the form that ops take."""
    window = window_bias(pattern, allowed_codes(pattern, grid), grid) if window_rows(pattern) else None
    return Visible(build_mask(pattern, text_len, grid), pattern == "full", window, pattern == "axial_col")


def rotary_angles(text_len: int, grid: int, dim_head: int) -> Tensor:
    """Return DALLE-pytorch's rotary angles (P + N, R) for a head's first R = 3 * 2 * ((dim_head // 3) // 2) channels.

    A third rotates with the text position (image: 8192, far away), a third each with image row and column in [-1, 1]
    (text: -10). Frequencies as in rotary-embedding-torch: 10000 ** -(2i / n) for text, linear from pi to 5 pi for
    pixels; each angle is used by two neighbouring channels.
    """
    third = dim_head // 3
    text_freqs = 10000.0 ** -(torch.arange(0, third, 2)[: third // 2].float() / third)
    pixel_freqs = torch.linspace(1.0, 5.0, third // 2) * torch.pi

    def angles(positions: Tensor, freqs: Tensor) -> Tensor:
        return (positions.float()[:, None] * freqs).repeat_interleave(2, dim=-1)

    num_codes = grid * grid
    axis = torch.linspace(-1.0, 1.0, grid)
    rows, columns = axis.repeat_interleave(grid), axis.repeat(grid)
    text = torch.cat([torch.arange(text_len), torch.full((num_codes,), 8192)])
    outside = torch.full((text_len,), -10.0)
    return torch.cat(
        [
            angles(text, text_freqs),
            angles(torch.cat([outside, rows]), pixel_freqs),
            angles(torch.cat([outside, columns]), pixel_freqs),
        ],
        dim=-1,
    )


def rotary_2d_angles(text_len: int, grid: int, dim_head: int) -> Tensor:
    """Return rotary angles (P + N, dim_head) for two axes: the first half of the channels by row, the rest by column.

    Text token t is at (t, t), as in one dimension; the code of row r and column c at (P + r, P + c). Frequencies are
    10000 ** -(2i / (dim_head / 2)); each angle is used by two neighbouring channels.
    """
    half = dim_head // 2
    freqs = (10000.0 ** -(torch.arange(0, half, 2).float() / half)).repeat_interleave(2)  # (K / 2,)
    text, axis = torch.arange(text_len), torch.arange(grid) + text_len
    rows, columns = torch.cat([text, axis.repeat_interleave(grid)]), torch.cat([text, axis.repeat(grid)])
    return torch.cat([rows.float()[:, None] * freqs, columns.float()[:, None] * freqs], dim=-1)
