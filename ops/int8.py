"""Linear layers whose weight is int8 with a scale for each row.

Letters: C inputs, R outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PART = 1 << 18
"""Weights converted to float at a time on the CPU: they fit in a core's cache (1 MB)."""


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C) times weight (R, C) int8, scaled by row (R,) float32, plus bias (R,) -> (..., R)."""
    if x.is_cpu:
        out = _unscaled(x, weight) * scale.to(x.dtype)
    else:
        # Scaled before the matmul: sums up to 127 times as large would overflow in half precision.
        out = F.linear(x, weight.to(x.dtype) * scale[:, None].to(x.dtype))
    return out if bias is None else out + bias.to(out.dtype)


def _unscaled(x: Tensor, weight: Tensor) -> Tensor:
    """x times the unscaled weights, part by part: the floats stay in the cache, only int8 is read from memory."""
    rows = max(1, _PART // weight.shape[1])
    # One buffer for all parts: paging in a new one for each would take longer than the rest.
    floats = torch.empty(rows, weight.shape[1], dtype=x.dtype)
    out = x.new_empty(x.shape[:-1] + weight.shape[:1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        out[..., start : start + len(part)] = F.linear(x, floats[: len(part)].copy_(part))
    return out
