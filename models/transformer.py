"""The transformer of Mini DALL-E and minDALL-E: blocks as the config describes them, run whole or chunk by chunk.

Letters: B batch, P positions of the text part, G side of the code grid, N = G * G image tokens, L = P + N - 1
positions, n positions of a chunk, D width, H heads, K width of a head, R rotated channels.
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor, nn

import ops
from models.attention import Attention
from models.config import DalleConfig
from models.patterns import rotary_2d_angles, rotary_angles, visible
from models.positions import Positions


def projection(module: nn.Module) -> ops.Projection:
    """Return a linear layer in the form that ops take: for other types, and the reference, the module itself."""
    if type(module) is nn.Linear and not ops.uses_reference():
        return ops.Matrix(module.weight, module.bias)
    return module


Project = Callable[[nn.Module], ops.Projection]
"""A function that returns a linear layer in the form that ops take."""


class FeedForward(nn.Module):
    """The parameters of a feed-forward layer: (B, L, D) -> (B, L, D) through ff_mult * D hidden channels."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.dim, config.up_width, bias=config.ff_bias)
        self.dropout = nn.Dropout(config.ff_dropout)
        self.down = nn.Linear(config.hidden, config.dim, bias=config.ff_bias)


def layer_scale_init(layer: int) -> float:
    """Initial value of LayerScale in layer 0, 1, ...: 0.1 for the first 18, then 1e-5, from the 25th 1e-6 (CaiT)."""
    if layer < 18:
        return 0.1
    return 1e-5 if layer < 24 else 1e-6


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, then scales."""

    bias = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return ops.normalise(x, ops.Norm(self.weight, None, self.eps))


def make_norm(config: DalleConfig) -> Any:
    """A norm over D channels, of the configured kind."""
    return RMSNorm(config.dim) if config.norm == "rms" else nn.LayerNorm(config.dim)


class Residual(nn.Module):
    """A residual branch: x + scale * norm_out(fn(norm(x))); `scale` and `norm_out` are optional."""

    def __init__(self, config: DalleConfig, layer: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.fn = fn
        self.norm_out = make_norm(config) if config.sandwich_norm else None
        self.scale = (
            nn.Parameter(torch.full((1, 1, config.dim), layer_scale_init(layer))) if config.layer_scale else None
        )

    def before(self) -> ops.Norm:
        """The norm at the beginning of the branch."""
        return ops.Norm(self.norm.weight, self.norm.bias, self.norm.eps)

    def after(self) -> ops.Norm | None:
        """The norm at its end, or None."""
        norm = self.norm_out
        return None if norm is None else ops.Norm(norm.weight, norm.bias, norm.eps)


class Context(Protocol):
    """What a block's positions see of each other and of earlier ones: the whole sequence, or a chunk with a cache."""

    def attend(self, qkv: Tensor, heads: int, angles: Tensor | None) -> tuple[Tensor, ops.Function]:
        """qkv (B, n, 3 * H * K) -> a tensor and the function that makes it the concatenated heads, (B, n, H * K)."""

    def shift(self, x: Tensor, branch: int) -> Tensor:
        """Shift the tokens of branch 0 (attention) or 1 (feed-forward), (B, n, D) -> (B, n, D)."""


class Whole(NamedTuple):
    """The whole sequence of L positions."""

    visible: ops.Visible
    text_len: int
    grid: int

    def attend(self, qkv: Tensor, heads: int, angles: Tensor | None) -> tuple[Tensor, ops.Function]:
        return ops.attention(qkv, heads, self.visible, angles)

    def shift(self, x: Tensor, branch: int) -> Tensor:
        return ops.shift_tokens(x, self.text_len, self.grid)


class Cache(Protocol):
    """Keys and values of the positions before a chunk (see sampling/cache.py)."""

    def at(self, positions: Positions) -> Sequence[Context]:
        """The context of each layer for these positions, which are cached for later chunks."""


class Operands(NamedTuple):
    """A block's weights and options in the form that ops take: looking them up costs more than a small matmul."""

    attention_norm: ops.Norm
    qkv: ops.Projection
    out: ops.Projection
    attention_scale: Tensor | None
    after_attention: ops.Norm | None
    feed_forward_norm: ops.Norm
    up: ops.Projection
    down: ops.Projection
    feed_forward_scale: Tensor | None
    after_feed_forward: ops.Norm | None
    heads: int
    head_scales: Tensor | None
    value_mix: Tensor | None
    activation: str
    attention_dropout: float
    feed_forward_dropout: float

    @property
    def projections(self) -> tuple[ops.Projection, ...]:
        """The linear layers."""
        return self.qkv, self.out, self.up, self.down


class Block(nn.Module):
    """One layer: an attention branch, then a feed-forward branch."""

    def __init__(self, config: DalleConfig, layer: int, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.shifts, self.rotary_2d, self.value_residual = config.shift_tokens, config.rotary_2d, config.value_residual
        self.attention = Residual(config, layer, attention)
        self.feed_forward = Residual(config, layer, feed_forward)

    def operands(self, project: Project = projection, drops: bool = False) -> Operands:
        """Look up the weights. project: see `Project`; drops: whether to apply dropout."""
        first, second = self.attention, self.feed_forward
        attention: Any = first.fn
        feed_forward: Any = second.fn
        return Operands(
            first.before(), project(attention.qkv), project(attention.out), first.scale, first.after(),
            second.before(), project(feed_forward.up), project(feed_forward.down), second.scale, second.after(),
            attention.heads, attention.head_scales, attention.value_mix,
            feed_forward.activation, attention.dropout.p * drops, feed_forward.dropout.p * drops,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        context: Context,
        angles: Tensor | None = None,
        operands: Operands | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, n, D), angles (n, R), (B, 1, n, R) or None -> (B, n, D), and the first layer's values.

        operands: None looks them up. values: those of the first layer, (B, n, H * K), None in itself and where no layer
        mixes them.
        """
        own = operands or self.operands(drops=self.training)
        shift_first = (lambda x: context.shift(x, 0)) if self.shifts else None
        shift_second = (lambda x: context.shift(x, 1)) if self.shifts else None
        qkv = ops.norm_linear(x, own.attention_norm, own.qkv, shift_first)  # (B, n, 3 * H * K)
        if self.value_residual:
            query, key, value = qkv.chunk(3, dim=-1)
            if values is None:
                values = value
            elif own.value_mix is not None:
                mixed = value + own.value_mix.to(value.dtype) * (values - value)
                qkv = torch.cat([query, key, mixed], dim=-1)
        if self.rotary_2d or own.head_scales is not None:
            qkv = ops.prepare_heads(qkv, own.heads, own.head_scales, angles if self.rotary_2d else None)
            angles = None if self.rotary_2d else angles
        heads, before = context.attend(qkv, own.heads, angles)
        x = ops.add_linear(
            x, heads, own.out, own.attention_scale, before,
            outer_dropout=own.attention_dropout, after=own.after_attention,
        )  # fmt: skip
        x = ops.add_feed_forward(
            x, own.feed_forward_norm, own.up, own.activation, own.down, own.feed_forward_scale,
            own.feed_forward_dropout, own.after_feed_forward, shift_second,
        )  # fmt: skip
        return x, values


class Transformer(nn.Module):
    """A stack of blocks over [text part | image part], with one mask for each attention pattern in use."""

    angles: Tensor | None

    def __init__(self, config: DalleConfig, tables: bool = True) -> None:
        """tables: whether there are masks and angles, without which nothing can be computed."""
        super().__init__()
        self.config = config
        attentions: dict[int, Attention] = {}
        feed_forwards: dict[int, FeedForward] = {}
        self.layers = nn.ModuleList()
        for layer in range(config.depth):
            attention_id = (
                config.shared_attn_ids[layer % len(config.shared_attn_ids)] if config.shared_attn_ids else layer
            )
            ff_id = config.shared_ff_ids[layer % len(config.shared_ff_ids)] if config.shared_ff_ids else layer
            if attention_id not in attentions:
                attentions[attention_id] = Attention(config, layer)
            if ff_id not in feed_forwards:
                feed_forwards[ff_id] = FeedForward(config)
            self.layers.append(Block(config, layer, attentions[attention_id], feed_forwards[ff_id]))
        names = set(config.layer_patterns) if tables else ()
        self._visible = {name: visible(name, config.text_len, config.grid) for name in names}
        for name in sorted(self._visible):
            self.register_buffer("mask_" + name, self._visible[name].mask, persistent=False)
            self.register_buffer("window_" + name, self._visible[name].window, persistent=False)
        table = rotary_2d_angles if config.rotary_2d else rotary_angles
        rotates = tables and (config.rotary or config.rotary_2d)
        angles = table(config.text_len, config.grid, config.dim_head) if rotates else None
        self.register_buffer("angles", angles, persistent=False)

    def context(self, layer: int) -> Whole:
        """The context of a layer for the whole sequence."""
        name, config = self.config.layer_patterns[layer], self.config
        mask, window = getattr(self, "mask_" + name), getattr(self, "window_" + name)
        return Whole(self._visible[name]._replace(mask=mask, window=window), config.text_len, config.grid)

    def _angles(self, positions: Positions | None, count: int) -> Tensor | None:
        if self.angles is None or positions is None:
            return None if self.angles is None else self.angles[:count]
        text_len = self.config.text_len
        angles = positions.rows(self.angles[:text_len] if positions.text else self.angles[text_len:])
        return angles if positions.shared else angles[:, None]

    def forward(
        self,
        x: Tensor,
        positions: Positions | None = None,
        cache: Cache | None = None,
        operands: Sequence[Operands] | None = None,
    ) -> Tensor:
        """Run all L positions, or a chunk of n that follows the cached ones. x (B, n, D) -> (B, n, D).

        operands: one for each block; None looks them up.
        """
        angles = self._angles(positions, x.shape[1])
        contexts: Sequence[Any] = () if cache is None or positions is None else cache.at(positions)
        values: Tensor | None = None
        for index, layer in enumerate(self.layers):
            context = contexts[index] if contexts else self.context(index)
            x, values = layer(x, context, angles, None if operands is None else operands[index], values)
        return x
