"""The parameters of an attention layer, the same for every pattern.

Letters: D width, H heads, K width of a head.
"""
from __future__ import annotations

import torch
from torch import nn

from models.config import DalleConfig


class Attention(nn.Module):
    """Multi-head attention over [text part | image part]; the block gets the mask (see transformer.py).

    Scale K ** -0.5; dropout acts on the output, as in the original Mini DALL-E (not on the attention weights).
    """

    def __init__(self, config: DalleConfig, layer: int) -> None:
        """layer: the first that has it."""
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.dim_head = config.heads, config.dim_head
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.dim, bias=config.out_bias)
        self.dropout = nn.Dropout(config.attn_dropout)
        self.head_scales = nn.Parameter(torch.ones(2, config.dim_head)) if config.qk_norm else None
        """Scales of normalised queries and keys, (2, K)."""
        self.value_mix = nn.Parameter(torch.full((1,), 0.5)) if config.value_residual and layer else None
        """The share of the first layer's values, (1,)."""
