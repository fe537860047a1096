"""Keys and values of the positions before a chunk, and what the chunk sees of them.

Text keys are stored once for each prompt and shared by all images of it; keys of codes lie on the code grid, so that
what a pattern shows of it is a view where it can be.

Letters: B images, n positions of a chunk, P positions of the text part, G side of the code grid, N = G * G codes, H
heads, K width of a head, D width, W codes that a sparse pattern shows at most, m codes that are looked at.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from models.config import DalleConfig
from models.patterns import allowed_codes
from models.positions import Positions


class Sight(NamedTuple):
    """What a chunk sees of the codes under one pattern."""

    codes: slice | Tensor
    """Which codes are looked at: a slice, (m,) for all images, or (B, m)."""
    joint: slice | Tensor
    """The same where codes lie behind the text: the text part, then these codes."""
    bias: Tensor | None
    """Added to the scores of text and codes, 0 or -inf: (n, P + m) or (B, 1, n, P + m). None: all are seen."""


class _Pattern:
    """Tables of a pattern on one device."""

    def __init__(self, pattern: str, config: DalleConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.text_len = config.text_len
        allowed = allowed_codes(pattern, config.grid)
        seen = [row.nonzero()[:, 0] for row in allowed]
        text = torch.arange(config.text_len)
        self.from_one = [
            Sight(_evenly(codes, device), _evenly(torch.cat([text, config.text_len + codes]), device), None)
            for codes in seen
        ]
        """What each position sees that is known to the host."""
        self.allowed = self._bias(allowed).to(device, dtype)
        """(N, P + N)"""
        most = max(len(codes) for codes in seen)
        self.table: Tensor | None = None
        """(N, W), where a pattern shows few codes: which; and what is added to their scores, (N, P + W)."""
        if most < config.image_seq_len:
            self.table = torch.stack([F.pad(codes, (0, most - len(codes))) for codes in seen]).to(device)
            shown = torch.stack([torch.arange(most) < len(codes) for codes in seen])
            self.shown = self._bias(shown).to(device, dtype)

    def _bias(self, allowed: Tensor) -> Tensor:
        """(N, m), True where a code is seen -> (N, P + m), 0 or -inf."""
        return F.pad(torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf")), (self.text_len, 0))

    def sight(self, at: Positions) -> Sight:
        """What is seen from these image positions."""
        if at.count == 1 and at.start is not None:
            return self.from_one[at.start]
        if at.count == 1 and self.table is not None:
            codes = at.rows(self.table)
            codes = codes[0] if at.shared else codes[:, 0]  # (W,) or (B, W)
            text = torch.arange(self.text_len, device=codes.device).expand(*codes.shape[:-1], -1)
            joint, bias = torch.cat([text, codes + self.text_len], dim=-1), at.rows(self.shown)
        else:
            codes, joint = slice(0, at.end), slice(0, self.text_len + at.end)
            bias = at.rows(self.allowed)[..., : self.text_len + at.end]
        return Sight(codes, joint, bias if at.shared else bias[:, None])


def _evenly(places: Tensor, device: torch.device) -> slice | Tensor:
    """Places (m,) as a slice where they lie at equal distances: a view then, instead of a copy."""
    steps = places.diff().unique().tolist()
    if len(steps) > 1:
        return places.to(device)
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1, steps[0] if steps and steps[0] > 1 else None)


@functools.lru_cache(maxsize=16)
def _pattern(name: str, config: DalleConfig, device: torch.device, dtype: torch.dtype) -> _Pattern:
    return _Pattern(name, config, device, dtype)


def _select(keys: Tensor, which: slice | Tensor) -> Tensor:
    """(2, B, H, positions, K) -> (2, B, H, m, K)."""
    if isinstance(which, slice):
        if which.step is None:  # a third faster than by index
            return keys.narrow(3, which.start, which.stop - which.start)
        return keys[:, :, :, which]
    if which.dim() == 1:
        return keys.index_select(3, which)
    index = which[None, :, None, :, None]  # (1, B, 1, m, 1)
    return keys.gather(3, index.expand(2, -1, keys.shape[2], -1, keys.shape[4]))


class LayerCache:
    """Keys and values of one layer.

      text   (2, prompts, H, P, K), shared by the images of a prompt
      codes  (2, B, H, N, K)
      shown  (B, G + N, D) for each branch, only with shift_tokens: inputs, behind a row of zeros

    With one image of each prompt the codes lie behind the text (`joint`), so that one fused kernel attends to both.
    """

    def __init__(
        self, config: DalleConfig, pattern: str, prompts: int, images: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.pattern, self.grid, rows = pattern, config.grid, prompts * images
        text_len, num_codes = config.text_len, config.image_seq_len

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.joint: Tensor | None = None
        if images == 1:
            self.joint = zeros(2, prompts, config.heads, text_len + num_codes, config.dim_head)
            self.text, self.codes = self.joint.split([text_len, num_codes], dim=3)
        else:
            self.text = zeros(2, prompts, config.heads, text_len, config.dim_head)
            self.codes = zeros(2, rows, config.heads, num_codes, config.dim_head)
        self.shown: list[Tensor] = []
        if config.shift_tokens:
            self.shown = [zeros(rows, config.grid + num_codes, config.dim) for _ in range(2)]
            self.columns = torch.arange(num_codes, device=device) % config.grid
        self.at: Any = None
        """The positions of the chunk."""
        self.sight: Any = None
        """What they see, a `Sight`; None for the text part."""

    def part(self, first: int, end: int) -> LayerCache:
        """The same memory for some prompts with one image each."""
        part = copy.copy(self)
        part.text, part.codes = self.text[:, first:end], self.codes[:, first:end]
        part.joint = None if self.joint is None else self.joint[:, first:end]
        part.shown = [shown[first:end] for shown in self.shown]
        return part

    def attend(self, qkv: Tensor, heads: int, angles: Tensor | None) -> tuple[Tensor, ops.Function]:
        """Keep keys and values of the chunk and attend from there. (B, n, 3 * H * K) -> (B, n, H * K)."""
        at, parts = self.at, ops.split_heads(qkv, heads, angles)  # (3, B, H, n, K)
        if at.text:
            at.put(self.text, 3, parts[1:])
            keys, values = self.text[:, :, :, : at.end]
            mask = torch.ones(at.end, at.end, dtype=torch.bool, device=qkv.device).tril()[at.start :]
            attended = ops.sdpa(parts[0].to(keys.dtype), keys, values, mask, causal=at.start == 0)
        else:
            at.put(self.codes, 3, parts[1:], batch=1)
            query, sight = parts[0], self.sight
            if query.dtype != self.codes.dtype:
                query = query.to(self.codes.dtype)
            if self.joint is not None:
                keys, values = _select(self.joint, sight.joint)
                attended = ops.sdpa(query, keys, values, sight.bias)
            else:
                attended = ops.prompt_attention(query, self.text, _select(self.codes, sight.codes), sight.bias)
        if at.count > 1:
            attended = attended.transpose(1, 2)
        return attended.reshape(len(qkv), at.count, -1), ops.IDENTITY

    def shift(self, x: Tensor, branch: int) -> Tensor:
        """Shift the tokens of the chunk, (B, n, D) -> (B, n, D)."""
        at = self.at
        if at.text:
            if at.start:
                raise ValueError("with shift_tokens the text part is read at once")
            return ops.shift_text(x)
        shown = self.shown[branch]
        at.put(shown, 1, x, self.grid)
        above, left = at.take(shown, 1), at.take(shown, 1, self.grid - 1)
        return ops.shift_codes(x, above.to(x.dtype), left.to(x.dtype), at.rows(self.columns))


class Cache:
    """Keys and values of all layers, for `images` images of each of `prompts` prompts."""

    def __init__(
        self, config: DalleConfig, prompts: int, images: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.prompts, self.images = config, prompts, images
        self.layers = [LayerCache(config, pattern, prompts, images, device, dtype) for pattern in config.layer_patterns]
        self._patterns = {name: _pattern(name, config, device, dtype) for name in set(config.layer_patterns)}

    def part(self, first: int, end: int) -> Cache:
        """The same memory for some prompts with one image each."""
        part = copy.copy(self)
        part.prompts, part.layers = end - first, [layer.part(first, end) for layer in self.layers]
        return part

    def at(self, positions: Positions) -> list[LayerCache]:
        """The layers, set to the next chunk."""
        sights: dict[str, Sight | None] = {
            name: None if positions.text else pattern.sight(positions) for name, pattern in self._patterns.items()
        }
        for layer in self.layers:
            layer.at, layer.sight = positions, sights[layer.pattern]
        return self.layers

    def clear(self) -> None:
        """Zero everything: what an earlier image left is hidden, but not a number times no weight is not a number."""
        for layer in self.layers:
            for tensor in (layer.text, layer.codes, *layer.shown):
                tensor.zero_()
