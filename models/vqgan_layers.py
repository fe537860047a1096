"""Encoder and decoder of a VQGAN (Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis").

Module names are those of taming-transformers' checkpoints, so that their state dicts load unchanged.
Letters: B images, C channels, H and W height and width in pixels or features, P = H*W positions.
"""
from __future__ import annotations

from typing import Iterable, Sequence, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vqgan_config import VqganConfig
from ops.convolution import add, conv3x3, group_norm_swish

_NORM_EPS = 1e-6


class Conv3x3(nn.Conv2d):
    """3x3, zero-padded by one pixel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, residual: Tensor | None = None, doubled: bool = False) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W); see `ops.convolution.conv3x3`."""
        return conv3x3(x, self.weight, self.bias, residual, doubled)


class NormSwish(nn.GroupNorm):
    """GroupNorm, then swish: x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        return group_norm_swish(x, self.num_groups, self.weight, self.bias, self.eps)


def _norm(channels: int, config: VqganConfig) -> NormSwish:
    return NormSwish(config.num_groups, channels, eps=_NORM_EPS)


def fold_patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C * size^2, H/size, W/size): `F.pixel_unshuffle` in operators that all compilers support."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // size, size, width // size, size).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * size * size, height // size, width // size)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and swish, added to the input (through 1x1 when widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, config: VqganConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = _norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))  # (B, out_channels, H, W)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return self.conv2(self.dropout(self.norm2(h)), residual=x)  # (B, out_channels, H, W)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, added to the input."""

    def __init__(self, channels: int, config: VqganConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.num_groups, channels, eps=_NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q = self.q(h).flatten(2).transpose(1, 2)  # (B, P, C)
        k = self.k(h).flatten(2)  # (B, C, P)
        v = self.v(h).flatten(2).transpose(1, 2)  # (B, P, C)
        weights = torch.softmax(torch.bmm(q * channels**-0.5, k), dim=-1)  # (B, P, P)
        h = torch.bmm(weights, v).transpose(1, 2).reshape(batch, channels, height, width)
        return add(x, self.proj_out(h))


class Downsample(nn.Module):
    """Halve height and width: pad one row below and one column right with zeros, then 3x3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: repeat each position (nearest), then 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, doubled=True)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: VqganConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, config)
        self.attn_1 = SpatialAttention(channels, config)
        self.block_2 = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if configured."""

    downsample: Downsample
    upsample: Upsample

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, config: VqganConfig
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, out_channels, config) for width in widths)
        self.attn = nn.ModuleList(SpatialAttention(out_channels, config) for _ in range(num_blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    """Images in [-1, 1] (B, in_channels, H, W) -> features (B, z_channels, H/f, W/f)."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.ch
        for i, multiplier in enumerate(config.ch_mult):
            attention = config.height(i) in config.attn_resolutions
            level = Level(width, config.ch * multiplier, config.num_res_blocks, attention, config)
            width = config.ch * multiplier
            if i != len(config.ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, config)
        self.norm_out = _norm(width, config)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.patch_size > 1:
            x = fold_patches(x, self.patch_size)  # (B, in_channels * patch^2, H/patch, W/patch)
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in cast(Iterable[Level], self.down):
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # (B, C, H/2, W/2)
        h = self.mid(h)  # (B, C, H/f, W/f)
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """Features (B, z_channels, H/f, W/f) -> images of about [-1, 1] (B, out_ch, H, W)."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        width = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(width, config)
        levels = []
        for i in reversed(range(len(config.ch_mult))):
            attention = config.height(i) in config.attn_resolutions
            level = Level(width, config.ch * config.ch_mult[i], config.num_res_blocks + 1, attention, config)
            width = config.ch * config.ch_mult[i]
            if i != 0:
                level.upsample = Upsample(width)
            levels.append(level)
        # Names in checkpoints count levels from full resolution; the forward pass runs in reverse.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(width, config)
        self.patch_size = config.patch_size
        self.conv_out = nn.Conv2d(width, config.out_ch * config.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, C, H/f, W/f)
        levels = cast(Sequence[Level], self.up)
        for i in reversed(range(len(levels))):
            h = levels[i](h)
            if i != 0:
                h = levels[i].upsample(h)  # (B, C, 2H, 2W)
        x = self.conv_out(self.norm_out(h))
        return F.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x
