"""VQGAN: images to a grid of discrete codes and back, with the parameter names of taming-transformers.

Letters: B images, D embed_dim, K num_codes, g codes along one side, N = g*g codes per image, S image height and width.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vqgan_config import VqganConfig
from models.vqgan_layers import Decoder, Encoder
from ops.convolution import full_precision, images_at_once
from utils.memory import freed_memory_kept

__all__ = ["VQGAN", "VqganConfig", "VqganOutput", "image_codes"]


class VqganOutput(NamedTuple):
    """What a training pass returns."""

    reconstruction: Tensor
    """(B, out_ch, S, S), on the scale of [0, 1] but not clamped."""
    codebook_loss: Tensor
    """Scalar: codebook plus commitment loss (vq) or weighted KL to the uniform distribution (gumbel)."""
    codes: Tensor
    """(B, N) integers."""


class VectorQuantizer(nn.Module):
    """The nearest codebook entry for each feature vector (van den Oord et al. 2017)."""

    def __init__(self, config: VqganConfig, commitment: float = 0.25) -> None:
        super().__init__()
        self.commitment = commitment
        self.embedding = nn.Embedding(config.num_codes, config.embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / config.num_codes, 1.0 / config.num_codes)

    @property
    def codebook(self) -> Tensor:
        """The codebook (K, D)."""
        return self.embedding.weight

    def codes(self, z: Tensor) -> Tensor:
        """Features (B, D, g, g) -> codes (B, N)."""
        flat = z.flatten(2).transpose(1, 2)  # (B, N, D)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every entry: one matmul finds the minimum.
        bias = -0.5 * self.codebook.float().pow(2).sum(dim=1)  # (K,)
        return torch.argmax(F.linear(flat, self.codebook, bias.to(flat.dtype)), dim=-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, D, g, g) -> quantised features (straight-through gradient), loss, codes (B, N)."""
        with torch.no_grad():
            codes = self.codes(z)
        batch, dim, height, width = z.shape
        quantised = F.embedding(codes, self.codebook).transpose(1, 2).reshape(batch, dim, height, width)
        loss = F.mse_loss(quantised, z.detach()) + self.commitment * F.mse_loss(z, quantised.detach())
        return z + (quantised - z).detach(), loss, codes


class GumbelQuantizer(nn.Module):
    """The entry with the largest logit of a 1x1 projection, relaxed by Gumbel noise in training (Jang et al. 2017).

    The codes of an image are the plain argmax; taming-transformers adds noise here too, so its codes are random.
    """

    def __init__(self, config: VqganConfig, kl_weight: float = 1e-8) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.temperature = 1.0
        self.proj = nn.Conv2d(config.z_channels, config.num_codes, 1)
        self.embed = nn.Embedding(config.num_codes, config.embed_dim)

    @property
    def codebook(self) -> Tensor:
        """The codebook (K, D)."""
        return self.embed.weight

    def codes(self, z: Tensor) -> Tensor:
        """Features (B, D, g, g) -> codes (B, N)."""
        return torch.argmax(self.proj(z), dim=1).flatten(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, D, g, g) -> quantised features, loss, codes (B, N); hard samples, soft gradients."""
        logits = self.proj(z)  # (B, K, g, g)
        one_hot = F.gumbel_softmax(logits, tau=self.temperature, hard=True, dim=1)  # (B, K, g, g)
        quantised = torch.einsum("bkhw,kd->bdhw", one_hot, self.codebook)
        probabilities = torch.softmax(logits, dim=1)
        divergence = probabilities * torch.log(probabilities * logits.shape[1] + 1e-10)
        return quantised, self.kl_weight * divergence.sum(dim=1).mean(), torch.argmax(one_hot, dim=1).flatten(1)


class VQGAN(nn.Module):
    """Encoder, quantiser and decoder. `encode` and `decode` use pixels in [0, 1]; internally they are in [-1, 1].

    Do not call `encode` under bf16 or fp16 autocast: rounding changes codes that are nearly tied.
    """

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.identity: str | None = None
        """sha256 of the file that the weights were loaded from, if any."""
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize: VectorQuantizer | GumbelQuantizer
        self.quantize = VectorQuantizer(config) if config.variant == "vq" else GumbelQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def grid(self) -> int:
        """Codes along one side of an image."""
        return self.config.grid

    @property
    def num_codes(self) -> int:
        """Entries in the codebook."""
        return self.config.num_codes

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return self.config.resolution

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> features before quantisation (B, D, g, g)."""
        return self.quant_conv(self.encoder(pixels * 2.0 - 1.0))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> codes (B, N), row by row from the top left."""
        return self.quantize.codes(self.features(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) -> pixels (B, 3, S, S) in [0, 1]."""
        grid = self.grid if codes.shape[1] == self.grid**2 else round(codes.shape[1] ** 0.5)
        if grid * grid != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes per image do not form a square grid")
        z = F.embedding(codes, self.quantize.codebook)  # (B, N, D)
        z = z.transpose(1, 2).reshape(codes.shape[0], self.config.embed_dim, grid, grid)  # (B, D, g, g)
        return self.pixels(z).clamp(0.0, 1.0)

    def decode_by_parts(self, codes: Tensor) -> Tensor:
        """`decode`, a few images at a time: decoding takes some 300 MB for each image of 256x256 pixels."""
        return torch.cat([self.decode(part) for part in codes.split(images_at_once(codes))])

    def forward(self, pixels: Tensor) -> VqganOutput:
        """Training pass over pixels (B, 3, S, S) in [0, 1]."""
        quantised, loss, codes = self.quantize(self.features(pixels))
        return VqganOutput(self.pixels(quantised), loss, codes)

    def pixels(self, z: Tensor) -> Tensor:
        """Quantised features (B, D, g, g) -> pixels (B, out_ch, S, S) on the scale of [0, 1], not clamped."""
        return (self.decoder(self.post_quant_conv(z)) + 1.0) * 0.5


@freed_memory_kept()  # on a CPU, feature maps reuse the memory of the previous image's
@torch.no_grad()
def image_codes(vqgan: Any, images: Tensor) -> Tensor:
    """Images (B, 3, S, S), uint8 or floats in [0, 1] -> codes (B, N), each image encoded by itself.

    The batch size of a convolution decides which kernel runs, and so the last bits of features, which can flip a code
    that is nearly tied. One at a time, an image has the same codes in any batch, so caching codes and encoding in a
    training step are equal. For the same reason the precision of float32 matmuls is fixed here, independent of the
    transformer's.
    """
    # A new tensor for each image: its alignment in memory may also decide which kernel runs.
    pixels = [image.float() / 255 if image.dtype == torch.uint8 else image.clone() for image in images.split(1)]
    with full_precision(images):
        return torch.cat([vqgan.encode(image) for image in pixels])
