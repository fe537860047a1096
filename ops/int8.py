"""Linear layers whose weight is int8 with a scale for each row.

Letters: C inputs, R outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PART = 1 << 18
"""Weights made floats at a time on the CPU: as many as stay in a core's cache (1 MB)."""


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) times weight (R, C) int8, scaled by row (R,) float32, plus bias (R,) -> (..., R)."""
    if x.is_cpu:
        out = _unscaled(x, weight) * scale.to(x.dtype)
    else:
        # Scaled before the matmul: sums of up to 127 times as much would overflow in half precision.
        out = F.linear(x, weight.to(x.dtype) * scale[:, None].to(x.dtype))
    return out if bias is None else out + bias.to(out.dtype)


def _unscaled(x: Tensor, weight: Tensor) -> Tensor:
    """x times the unscaled weights, part by part: floats stay in the cache, memory is read for the int8 alone."""
    rows = max(1, _PART // weight.shape[1])
    # One piece of memory for all parts: a new one for each would be paged in anew, which takes longest of all.
    floats = torch.empty(rows, weight.shape[1], dtype=x.dtype)
    out = x.new_empty(x.shape[:-1] + weight.shape[:1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        out[..., start : start + len(part)] = F.linear(x, floats[: len(part)].copy_(part))
    return out
