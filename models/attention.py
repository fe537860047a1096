"""The attention layer: one for every pattern.

Letters: B batch, L positions, D width, H heads, K width of a head.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

import ops
from models.cache import LayerCache
from models.config import DalleConfig


class Attention(nn.Module):
    """Multi-head attention over [text part | image part]: who sees whom is given.

    Scale K ** -0.5; dropout acts on the output, as in the published code (not on the attention weights).
    """

    def __init__(self, config: DalleConfig, implementation: str = "auto") -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.dim_head, self.implementation = config.heads, config.dim_head, implementation
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.dim, bias=config.out_bias)
        self.dropout = nn.Dropout(config.attn_dropout)

    def attend(self, qkv: Tensor, visible: ops.Visible, angles: Optional[Tensor]) -> Tuple[Tensor, ops.Function]:
        """What comes before `out`: qkv (B, L, 3 * H * K) -> a tensor and what makes (B, L, H * K) of it."""
        return ops.attention(qkv, self.heads, visible, angles, self.implementation)

    def extend_text(self, qkv: Tensor, start: int, cache: LayerCache, angles: Optional[Tensor]) -> Tensor:
        """Attend from text positions `start` on, (prompts, n, 3 * H * K) -> (prompts, n, H * K), and cache them."""
        query, key, value = ops.split_heads(qkv, self.heads, angles)
        end = start + qkv.shape[1]
        cache.put_text(start, key, value)
        mask = torch.ones(end, end, dtype=torch.bool, device=qkv.device).tril()[start:]
        attended = ops.sdpa(query, cache.text_key[:, :, :end], cache.text_value[:, :, :end], mask)
        return attended.transpose(1, 2).flatten(2)

    def first_codes(self, qkv: Tensor, cache: LayerCache, mask: Tensor, angles: Optional[Tensor]) -> Tensor:
        """Attend from the first n image positions, (B, n, 3 * H * K) -> (B, n, H * K), and cache them."""
        query, key, value = ops.split_heads(qkv, self.heads, angles)
        cache.put_first_codes(key, value)
        first, total = cache.text_len, cache.text_len + qkv.shape[1]
        keys = torch.cat([cache.text_key.repeat_interleave(cache.images, 0), key], dim=2)
        values = torch.cat([cache.text_value.repeat_interleave(cache.images, 0), value], dim=2)
        return ops.sdpa(query, keys, values, mask[first:total, :total]).transpose(1, 2).flatten(2)
