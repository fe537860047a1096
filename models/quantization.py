"""Weights in fewer bits for sampling: bfloat16, or int8 with a scale for each row (applied by building.py).

Only weights are quantised: activations, norms, positions and embedding tables stay in floating point. minDALL-E's
1.29 G parameters take 5.2 GB in float32, 2.6 GB in bfloat16 and 1.4 GB in int8.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.int8 import int8_linear

#: --dtype: the types in which sampling can hold a model's weights.
DTYPES = ("float32", "bfloat16", "int8")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row to 255 levels with its own scale. (R, C) floats -> (R, C) int8, (R,) float32 scales."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored as int8 (R, C) with a scale (R,); the error is at most half a level."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise a float weight (R, C); the bias (R,) stays float32."""
        super().__init__()
        quantised, scale = quantize_rows(weight)
        self.register_buffer("weight", quantised)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., R)."""
        return int8_linear(x, self.weight, self.scale, self.bias)
