"""Weights in fewer bits for drawing: bfloat16, or int8 with a scale for each row (see building.py, which puts them in).

Only weights are quantised: activations, norms, positions and embedding tables stay in floating point. minDALL-E's
1.29 G parameters take 5.2 GB in float32, 2.6 GB in bfloat16 and 1.4 GB in int8.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: --dtype: how the weights of a model that draws are stored.
DTYPES = ("float32", "bfloat16", "int8")

_PART = 1 << 18  # weights made floats at a time on the CPU: as many as stay in a core's cache (1 MB)


def quantize_rows(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Round each row to 255 steps of its own. (R, C) floats -> (R, C) int8, (R,) float32 scales."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 (R, C) with a scale (R,): half a step of error at most."""

    def __init__(self, weight: Tensor, bias: Optional[Tensor]) -> None:
        """Quantise a float weight (R, C); the bias (R,) stays as it is."""
        super().__init__()
        quantised, scale = quantize_rows(weight)
        self.register_buffer("weight", quantised)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., R)."""
        if x.device.type == "cpu":
            out = self._product(x) * self.scale.to(x.dtype)
        else:
            # Scaled before the product: sums of up to 127 times as much would overflow in half precision.
            out = F.linear(x, self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype))
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """x times the unscaled weights, part by part: floats stay in the cache, memory is read for the int8 alone."""
        rows = max(1, _PART // self.weight.shape[1])
        # One piece of memory for all parts: a new one for each would be paged in anew, which takes longest of all.
        floats = torch.empty(rows, self.weight.shape[1], dtype=x.dtype)
        out = x.new_empty(x.shape[:-1] + self.weight.shape[:1])
        for start in range(0, len(self.weight), rows):
            part = self.weight[start : start + rows]
            out[..., start : start + len(part)] = F.linear(x, floats[: len(part)].copy_(part))
        return out
