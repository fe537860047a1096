"""The transformer of both seeds: its block is described by the config, and it can be run whole or step by step.

Letters: B batch, P positions of the text part, N image tokens, L = P + N - 1 positions, D width.
"""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from models.attention import Attention
from models.cache import LayerCache, make_cache
from models.config import DalleConfig
from models.patterns import rotary_angles, visible


def projection(module: nn.Module) -> ops.Projection:
    """Return a linear layer as ops take it; one of another kind, and the reference's, as the module itself."""
    plain = type(module) is nn.Linear and not ops.uses_reference()
    return ops.Matrix(module.weight, module.bias) if plain else module


class FeedForward(nn.Module):
    """(B, L, D) -> (B, L, D) through ff_mult * D hidden channels; geglu computes twice as many, half gates half."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        hidden = config.ff_mult * config.dim
        self.activation = config.activation
        self.up = nn.Linear(config.dim, 2 * hidden if config.activation == "geglu" else hidden, bias=config.ff_bias)
        self.dropout = nn.Dropout(config.ff_dropout)
        self.down = nn.Linear(hidden, config.dim, bias=config.ff_bias)


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

    def before(self) -> ops.Norm:
        """The norm at the beginning of the branch."""
        return ops.Norm(self.norm.weight, self.norm.bias, self.norm.eps)

    def after(self) -> Optional[ops.Norm]:
        """The norm at its end, if there is one."""
        norm = self.norm_out
        return None if norm is None else ops.Norm(norm.weight, norm.bias, norm.eps)

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

    def _run(
        self,
        x: Tensor,
        attend: Callable[[Tensor], Tuple[Tensor, ops.Function]],
        shifts: Tuple[Optional[ops.Between], Optional[ops.Between]],
    ) -> Tensor:
        """The block. attend: what comes between `qkv` and `out`; shifts: those of tokens in both branches, or None."""
        attention, feed_forward = self.attention.fn, self.feed_forward.fn
        drops = self.training
        branch = self.attention
        qkv = ops.norm_linear(x, branch.before(), projection(attention.qkv), shifts[0])  # (B, L, 3 * H * K)
        heads, before = attend(qkv)
        x = ops.add_linear(
            x, heads, projection(attention.out), branch.scale, before,
            outer_dropout=attention.dropout.p * drops, after=branch.after(),
        )  # fmt: skip
        branch = self.feed_forward
        return ops.add_feed_forward(
            x, branch.before(), projection(feed_forward.up), feed_forward.activation, projection(feed_forward.down),
            branch.scale, feed_forward.dropout.p * drops, branch.after(), shifts[1],
        )  # fmt: skip

    def _shift(self, x: Tensor) -> Tensor:
        return torch.cat([shift_text(x[:, : self.text_len]), shift_image(x[:, self.text_len :], self.grid)], dim=1)

    def forward(self, x: Tensor, visible: ops.Visible, angles: Optional[Tensor] = None) -> Tensor:
        """Run the whole sequence. x (B, L, D), angles (L, R) or None -> (B, L, D)."""
        shift = self._shift if self.shifts else None
        return self._run(x, lambda qkv: self.attention.fn.attend(qkv, visible, angles), (shift, shift))

    def extend_text(self, x: Tensor, start: int, cache: LayerCache, angles: Optional[Tensor]) -> Tensor:
        """Run text positions from `start` on, x (prompts, n, D); with shift_tokens the whole text part at once."""
        shift = shift_text if self.shifts else None
        attention = self.attention.fn
        return self._run(
            x, lambda qkv: (attention.extend_text(qkv, start, cache, angles), ops.IDENTITY), (shift, shift)
        )

    def first_codes(self, x: Tensor, cache: LayerCache, mask: Tensor, angles: Optional[Tensor]) -> Tensor:
        """Run the first n image positions, x (B, n, D). One position after the other is stepping.py's."""
        shifts = [(lambda x, own=own: self.shift_cached(x, 0, own)) if self.shifts else None for own in cache.history]
        attention = self.attention.fn
        return self._run(x, lambda qkv: (attention.first_codes(qkv, cache, mask, angles), ops.IDENTITY), tuple(shifts))

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
        for layer in range(config.depth):
            attention_id = (
                config.shared_attn_ids[layer % len(config.shared_attn_ids)] if config.shared_attn_ids else layer
            )
            ff_id = config.shared_ff_ids[layer % len(config.shared_ff_ids)] if config.shared_ff_ids else layer
            if attention_id not in attentions:
                attentions[attention_id] = Attention(config, implementation)
            if ff_id not in feed_forwards:
                feed_forwards[ff_id] = FeedForward(config)
            self.layers.append(Block(config, layer, attentions[attention_id], feed_forwards[ff_id]))
        self._visible = {name: visible(name, config.text_len, config.grid) for name in set(config.layer_patterns)}
        for name in sorted(self._visible):
            self.register_buffer("mask_" + name, self._visible[name].mask, persistent=False)
            self.register_buffer("window_" + name, self._visible[name].window, persistent=False)
        angles = rotary_angles(config.text_len, config.grid, config.dim_head) if config.rotary else None
        self.register_buffer("angles", angles, persistent=False)

    def visible(self, layer: int) -> ops.Visible:
        """Who sees whom in a layer."""
        name = self.config.layer_patterns[layer]
        return self._visible[name]._replace(mask=getattr(self, "mask_" + name), window=getattr(self, "window_" + name))

    def _angles(self, start: int, end: int) -> Optional[Tensor]:
        return None if self.angles is None else self.angles[start:end]

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        angles = self._angles(0, x.shape[1])
        for index, layer in enumerate(self.layers):
            x = layer(x, self.visible(index), angles)
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
            x = layer.first_codes(x, cache, self.visible(index).mask, angles)
        return x
