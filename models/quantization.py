"""Weights in fewer bits for sampling: bfloat16, or int8 with a scale for each row (building.py puts them in).

Only weights are quantised: activations, norms, positions and embedding tables stay in floating point. minDALL-E's
1.29 G parameters take 5.2 GB in float32, 2.6 GB in bfloat16 and 1.4 GB in int8.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.int8 import int8_linear

#: --dtype: how the weights of a model that draws are stored.
DTYPES = ("float32", "bfloat16", "int8")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 steps of its own. (R, C) floats -> (R, C) int8, (R,) float32 scales."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 (R, C) with a scale (R,): half a step of error at most."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise a float weight (R, C); the bias (R,) stays as it is."""
        super().__init__()
        quantised, scale = quantize_rows(weight)
        self.register_buffer("weight", quantised)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., R)."""
        return int8_linear(x, self.weight, self.scale, self.bias)
