"""One attention for every pattern: a boolean mask says who sees whom, and two implementations compute the same product.

Letters: B batch, P positions of the text part, G side of the code grid, L positions, D width, H heads, K head width.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import LayerCache
from models.config import DalleConfig
from models.fused import IDENTITY, Function, linear
from models.fused_attention import KernelAttention, LocalAttention
from models.kernels.build import usable
from models.local_attention import allowed_codes, local_attention, window_bias, window_rows


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


_SHORT = 512
"""Queries up to which PyTorch's fused kernel on a CPU multiplies blocks so small that rounding them to bfloat16, which
float32 products of medium precision do, takes most of the time: up to six times that of the explicit product."""


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v under `mask` by PyTorch's fused kernel. (B, H, L, K) each -> (B, H, L, K).

    Where that is slow (see _SHORT) by the explicit product. `causal` says that `mask` is the plain lower triangle, for
    which kernels exist that read no mask.
    """
    if usable(query) and query.shape[2] <= _SHORT and torch.get_float32_matmul_precision() == "medium":
        return explicit(query, key, value, mask, causal)
    if causal:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """The same product from matmul and softmax alone, for devices without a fused kernel (IPU)."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))  # (B, H, L, L)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1), value)


IMPLEMENTATIONS = {"sdpa": sdpa, "explicit": explicit}
"""By name. Besides, "local" computes sparse patterns by window (see local_attention.py) and the dense one by sdpa, and
"auto" takes it where it pays."""

#: Positions up to which a GPU takes one fused kernel under a mask. An estimate: no GPU was measured.
_DENSE_ON_GPU = 512


def rotary_angles(text_len: int, grid: int, dim_head: int) -> Tensor:
    """Return DALLE-pytorch's rotary angles (P + N, R) for a head's first R = 3 * 2 * ((dim_head // 3) // 2) channels.

    A third turns with the text position (image: a far-away position 8192), a third each with image row and column in
    [-1, 1] (text: -10). Frequencies as in rotary-embedding-torch: 10000 ** -(2i / n) for text, linear from pi to 5 pi
    for pixels; each angle serves two neighbouring channels.
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


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the leading channel pairs of x (..., L, K) by angles (L, R)."""
    width = angles.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    pairs = turned.unflatten(-1, (-1, 2))
    quarter = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.cat([turned * angles.cos() + quarter * angles.sin(), rest], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over [text part | image part] under a fixed mask.

    Scale K ** -0.5; dropout acts on the output, as in the published code (not on the attention weights).
    """

    def __init__(self, config: DalleConfig, pattern: str, implementation: str = "auto") -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.dim_head, self.pattern, self.grid = config.heads, config.dim_head, pattern, config.grid
        self.implementation = implementation
        bias = None
        if window_rows(pattern):
            bias = window_bias(pattern, allowed_codes(pattern, config.grid), config.grid)
        self.register_buffer("window_bias", bias, persistent=False)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.dim, bias=config.out_bias)
        self.dropout = nn.Dropout(config.attn_dropout)

    def project(self, x: Tensor, angles: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> query, key, value, each (B, H, L, K)."""
        return self.split(self.qkv(x), angles)

    def split(self, qkv: Tensor, angles: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        """(B, L, 3 * H * K) -> query, key, value, each (B, H, L, K)."""
        query, key, value = qkv.unflatten(2, (3, self.heads, self.dim_head)).permute(2, 0, 3, 1, 4).unbind(0)
        if angles is not None:  # DALLE-pytorch turns the values too
            query, key, value = (rotate(tensor, angles) for tensor in (query, key, value))
        return query, key, value

    def merge(self, heads: Tensor) -> Tensor:
        """(B, H, L, K) -> (B, L, D)."""
        return self.dropout(linear(heads.transpose(1, 2).flatten(2), self.out))

    def forward(self, x: Tensor, mask: Tensor, angles: Optional[Tensor] = None) -> Tensor:
        """Attend within x (B, L, D) under mask (L, L); angles (L, R) with rotary embedding. Returns (B, L, D)."""
        return self.merge(self.attend(linear(x, self.qkv), mask, angles))

    def attend(self, qkv: Tensor, mask: Tensor, angles: Optional[Tensor]) -> Tensor:
        """What comes before the last product: qkv (B, L, 3 * H * K) -> (B, H, L, K)."""
        query, key, value = self.split(qkv, angles)
        if self._windowed(qkv):
            return local_attention(query, key, value, self.window_bias, self.pattern)
        attend = IMPLEMENTATIONS.get(self.implementation, sdpa)
        return attend(query, key, value, mask, self.pattern == "full")

    def before_out(self, qkv: Tensor, mask: Tensor, angles: Optional[Tensor]) -> Tuple[Tensor, Function]:
        """`attend` as the products of fused.py take it: a tensor and what to do with it, which gives (B, L, H * K)."""
        if angles is None and self.implementation == "auto" and KernelAttention.suits(qkv, self.pattern):
            return qkv, KernelAttention(self.pattern, self.heads, self.grid)
        if angles is None and self._windowed(qkv):
            return qkv, LocalAttention(self.window_bias, self.pattern, self.heads)
        return self.attend(qkv, mask, angles).transpose(1, 2).flatten(2), IDENTITY

    def _windowed(self, x: Tensor) -> bool:
        """Whether to compute only what the pattern shows: always on a CPU, on a GPU when that is much less."""
        if self.implementation == "local":
            return self.window_bias is not None
        return (
            self.implementation == "auto"
            and self.window_bias is not None
            and (x.device.type == "cpu" or x.shape[1] > _DENSE_ON_GPU)
        )

    def extend_text(self, x: Tensor, start: int, cache: LayerCache, angles: Optional[Tensor] = None) -> Tensor:
        """Attend from text positions `start` on, x (prompts, n, D), and add them to the cache. (prompts, n, D)."""
        query, key, value = self.project(x, angles)
        end = start + x.shape[1]
        cache.put_text(start, key, value)
        mask = torch.ones(end, end, dtype=torch.bool, device=x.device).tril()[start:]
        attended = sdpa(query, cache.text_key[:, :, :end], cache.text_value[:, :, :end], mask, causal=False)
        return self.merge(attended)

    def first_codes(self, x: Tensor, cache: LayerCache, mask: Tensor, angles: Optional[Tensor] = None) -> Tensor:
        """Attend from the first n image positions, x (B, n, D), and add them to the cache. (B, n, D)."""
        query, key, value = self.project(x, angles)
        cache.put_first_codes(key, value)
        first, total = cache.text_len, cache.text_len + x.shape[1]
        keys = torch.cat([cache.text_key.repeat_interleave(cache.images, 0), key], dim=2)
        values = torch.cat([cache.text_value.repeat_interleave(cache.images, 0), value], dim=2)
        return self.merge(sdpa(query, keys, values, mask[first:total, :total], causal=False))
