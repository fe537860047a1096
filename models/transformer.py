"""The transformer of both seeds: its block is described by the config, and it can be run whole or step by step.

Letters: B batch, P positions of the text part, N image tokens, L = P + N - 1 positions, D width.
"""

from typing import Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, build_mask, rotary_angles
from models.cache import LayerCache, make_cache
from models.config import DalleConfig
from models.fused import Dropout, add_feed_forward, add_linear, linear, norm_linear


class FeedForward(nn.Module):
    """(B, L, D) -> (B, L, D) through ff_mult * D hidden channels; geglu computes twice as many, half gates half."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        hidden = config.ff_mult * config.dim
        self.activation = config.activation
        self.up = nn.Linear(config.dim, 2 * hidden if config.activation == "geglu" else hidden, bias=config.ff_bias)
        self.dropout = nn.Dropout(config.ff_dropout)
        self.down = nn.Linear(hidden, config.dim, bias=config.ff_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = linear(x, self.up)
        if self.activation == "geglu":
            x, gate = x.chunk(2, dim=-1)
            x = x * F.gelu(gate)
        elif self.activation == "gelu":
            x = F.gelu(x)
        else:
            x = x * torch.sigmoid(1.702 * x)
        return linear(self.dropout(x), self.down)


def layer_scale_init(layer: int) -> float:
    """Start value of LayerScale in layer 0, 1, ...: 0.1 for the first 18, then 1e-5, from the 25th 1e-6 (CaiT)."""
    if layer < 18:
        return 0.1
    return 1e-5 if layer < 24 else 1e-6


class Residual(nn.Module):
    """A residual branch: x + scale * norm_out(fn(norm(x))); `scale` and `norm_out` where the config asks for them."""

    def __init__(self, config: DalleConfig, layer: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.fn = fn
        self.norm_out = nn.LayerNorm(config.dim) if config.sandwich_norm else None
        self.scale = (
            nn.Parameter(torch.full((1, 1, config.dim), layer_scale_init(layer))) if config.layer_scale else None
        )

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return x plus the branch's output, normalised and scaled as configured. All (B, L, D)."""
        if self.norm_out is not None:
            branch = self.norm_out(branch)
        if self.scale is not None:
            return torch.addcmul(x, branch, self.scale)
        return x + branch


def shift_text(x: Tensor) -> Tensor:
    """Take the first half of the channels from the position before (zeros at the first). (B, P, D) -> (B, P, D)."""
    shifted, kept = x.chunk(2, dim=-1)
    return torch.cat([F.pad(shifted, (0, 0, 1, 0))[:, :-1], kept], dim=-1)


def shift_image(x: Tensor, grid: int, start: int = 0) -> Tensor:
    """Take a quarter of the channels from the code above, a quarter from the code to the left (zeros at the borders).

    x (B, n, D) holds image positions 0 .. n-1; returns those from `start` on, (B, n - start, D).
    """
    above, left, kept = x.split([x.shape[-1] // 4, x.shape[-1] // 4, x.shape[-1] // 2], dim=-1)
    above = F.pad(above, (0, 0, grid, 0))[:, start : x.shape[1]]
    left = F.pad(left, (0, 0, 1, 0))[:, start : x.shape[1]]
    inside = (torch.arange(start, x.shape[1], device=x.device) % grid != 0)[:, None]
    return torch.cat([above, left * inside, kept[:, start:]], dim=-1)


class Block(nn.Module):
    """One layer: an attention branch, then a feed-forward branch."""

    def __init__(self, config: DalleConfig, layer: int, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.text_len, self.grid, self.shifts = config.text_len, config.grid, config.shift_tokens
        self.attention = Residual(config, layer, attention)
        self.feed_forward = Residual(config, layer, feed_forward)
        self.fused = not config.shift_tokens and not config.sandwich_norm
        """Whether training takes the products of fused.py. They know neither shifts nor a norm behind a branch."""

    def _shift(self, x: Tensor) -> Tensor:
        if not self.shifts:
            return x
        return torch.cat([shift_text(x[:, : self.text_len]), shift_image(x[:, self.text_len :], self.grid)], dim=1)

    def forward(self, x: Tensor, mask: Tensor, angles: Optional[Tensor] = None) -> Tensor:
        """Run the whole sequence. x (B, L, D), mask (L, L), angles (L, R) or None -> (B, L, D)."""
        if self.fused and torch.is_grad_enabled() and (not self._drops() or Dropout.suits(x)):
            return self._train(x, mask, angles)
        branch = self.attention
        x = branch.add(x, branch.fn(self._shift(branch.norm(x)), mask, angles))
        branch = self.feed_forward
        return branch.add(x, branch.fn(self._shift(branch.norm(x))))

    def _drops(self) -> bool:
        return self.training and bool(self.attention.fn.dropout.p or self.feed_forward.fn.dropout.p)

    def _train(self, x: Tensor, mask: Tensor, angles: Optional[Tensor]) -> Tensor:
        """`forward`, keeping less for the backward pass."""
        branch = self.attention
        qkv = norm_linear(x, branch.norm, branch.fn.qkv)
        heads, before = branch.fn.before_out(qkv, mask, angles)
        x = add_linear(x, heads, branch.fn.out, branch.scale, before, Dropout.of(branch.fn.dropout))
        branch = self.feed_forward
        up, activation, down = branch.fn.up, branch.fn.activation, branch.fn.down
        inner = Dropout.of(branch.fn.dropout)
        return add_feed_forward(x, branch.norm, up, activation, down, branch.scale, inner)

    def extend_text(self, x: Tensor, start: int, cache: LayerCache, angles: Optional[Tensor]) -> Tensor:
        """Run text positions from `start` on, x (prompts, n, D); with shift_tokens the whole text part at once."""
        branch = self.attention
        normed = branch.norm(x)
        x = branch.add(x, branch.fn.extend_text(shift_text(normed) if self.shifts else normed, start, cache, angles))
        branch = self.feed_forward
        normed = branch.norm(x)
        return branch.add(x, branch.fn(shift_text(normed) if self.shifts else normed))

    def first_codes(self, x: Tensor, cache: LayerCache, mask: Tensor, angles: Optional[Tensor]) -> Tensor:
        """Run the first n image positions, x (B, n, D). One position after the other is stepping.py's."""
        branch = self.attention
        normed = branch.norm(x)
        normed = self.shift_cached(normed, 0, cache.history[0]) if self.shifts else normed
        x = branch.add(x, branch.fn.first_codes(normed, cache, mask, angles))
        branch = self.feed_forward
        normed = branch.norm(x)
        return branch.add(x, branch.fn(self.shift_cached(normed, 0, cache.history[1]) if self.shifts else normed))

    def shift_cached(self, x: Tensor, start: int, history: Tensor) -> Tensor:
        """Keep x (B, n, D) of the image positions from `start` on in history (B, N, D) and return them shifted."""
        end = start + x.shape[1]
        history[:, start:end] = x
        # Only the last row of codes can matter: positions before start - grid are never looked at.
        first = max(0, start - self.grid) // self.grid * self.grid
        return shift_image(history[:, first:end], self.grid, start - first)


class Transformer(nn.Module):
    """A stack of blocks over [text part | image part], with one mask for each attention pattern in use."""

    def __init__(self, config: DalleConfig, implementation: str = "auto") -> None:
        super().__init__()
        self.config = config
        attentions: Dict[int, Attention] = {}
        feed_forwards: Dict[int, FeedForward] = {}
        self.layers = nn.ModuleList()
        for layer, pattern in enumerate(config.layer_patterns):
            attention_id = (
                config.shared_attn_ids[layer % len(config.shared_attn_ids)] if config.shared_attn_ids else layer
            )
            ff_id = config.shared_ff_ids[layer % len(config.shared_ff_ids)] if config.shared_ff_ids else layer
            if attention_id not in attentions:
                attentions[attention_id] = Attention(config, pattern, implementation)
            if ff_id not in feed_forwards:
                feed_forwards[ff_id] = FeedForward(config)
            self.layers.append(Block(config, layer, attentions[attention_id], feed_forwards[ff_id]))
        for pattern in sorted(set(config.layer_patterns)):
            mask = build_mask(pattern, config.text_len, config.grid)
            self.register_buffer("mask_" + pattern, mask, persistent=False)
        angles = rotary_angles(config.text_len, config.grid, config.dim_head) if config.rotary else None
        self.register_buffer("angles", angles, persistent=False)

    def mask(self, layer: int) -> Tensor:
        """The (L, L) mask of a layer."""
        return getattr(self, "mask_" + self.config.layer_patterns[layer])

    def _angles(self, start: int, end: int) -> Optional[Tensor]:
        return None if self.angles is None else self.angles[start:end]

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        angles = self._angles(0, x.shape[1])
        for index, layer in enumerate(self.layers):
            x = layer(x, self.mask(index), angles)
        return x

    def make_cache(self, prompts: int, images: int, device: torch.device, dtype: torch.dtype) -> List[LayerCache]:
        """Return empty caches, one for each layer, for `images` images of each of `prompts` prompts."""
        return [
            make_cache(self.config, pattern, prompts, images, device, dtype) for pattern in self.config.layer_patterns
        ]

    def extend_text(self, x: Tensor, start: int, caches: Sequence[LayerCache]) -> Tensor:
        """Run text positions from `start` on. x (prompts, n, D) -> (prompts, n, D)."""
        angles = self._angles(start, start + x.shape[1])
        for layer, cache in zip(self.layers, caches):
            x = layer.extend_text(x, start, cache, angles)
        return x

    def first_codes(self, x: Tensor, caches: Sequence[LayerCache]) -> Tensor:
        """Run the first n image positions. x (B, n, D) -> (B, n, D)."""
        first = self.config.text_len
        angles = self._angles(first, first + x.shape[1])
        for index, (layer, cache) in enumerate(zip(self.layers, caches)):
            x = layer.first_codes(x, cache, self.mask(index), angles)
        return x
