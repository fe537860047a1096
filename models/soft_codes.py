"""Codes that a VQGAN decodes alike, in place of an image's own: a model that learns from them overfits less."""
from __future__ import annotations

import torch
from torch import Tensor, nn

NEIGHBOURS = 16
"""Codes that may take the place of a code, itself among them."""


class SoftCodes(nn.Module):
    """Soft targets and sampled input codes, after RQ-Transformer (arXiv 2203.01941).

    There an image's features say how likely each code is. Here its code stands for them: code k takes the place of code
    j with a probability proportional to exp(-|e_j - e_k|^2 / temperature), if it is one of the K nearest.
    """

    nearest: Tensor
    """(C, K) codes."""
    shares: Tensor
    """(C, K) their probabilities."""
    exact: Tensor
    """Scalar: weight of the exact codes in the loss, see `fade`."""
    sums: Tensor
    """(C, K - 1) sums of the probabilities of a code and those before it."""

    def __init__(self, codebook: Tensor, temperature: float) -> None:
        """codebook: the VQGAN's, (C, E). temperature: 1 is the mean squared distance of a code to the nearest other."""
        super().__init__()
        codebook, count = codebook.detach().float(), min(NEIGHBOURS, len(codebook))
        parts = codebook.split(1024)  # at once, the distances between 16,384 codes take 1 GB
        found = [torch.cdist(part, codebook).topk(count, largest=False) for part in parts]
        distances, nearest = (torch.cat(tensors) for tensors in zip(*found))
        squares = distances.square()
        unit = temperature * squares[:, 1:2].mean()
        exponents = (squares[:, :1] - squares) / unit.clamp_min(torch.finfo(torch.float32).tiny)  # codes may be equal
        self.register_buffer("exact", torch.zeros(()), persistent=False)  # a number would be compiled in
        self.register_buffer("nearest", nearest, persistent=False)
        shares = exponents.softmax(dim=-1)
        self.register_buffer("shares", shares, persistent=False)
        self.register_buffer("sums", shares.cumsum(dim=-1)[:, :-1].contiguous(), persistent=False)

    def sample(self, codes: Tensor) -> Tensor:
        """Codes of any shape -> as many, each drawn from the nearest ones."""
        chosen = (self.sums[codes] < torch.rand(*codes.shape, 1, device=codes.device)).sum(dim=-1)
        return self.nearest.flatten()[codes * self.nearest.shape[1] + chosen]

    def fade(self, progress: float, share: float) -> None:
        """Set the weight of the exact codes: it rises from 0 to 1 over this share, the last, of the training."""
        self.exact.fill_(max(0.0, 1 - (1 - progress) / share) if share else 0.0)

    def cross_entropy(self, log_probabilities: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy in nats with the probabilities of the codes as targets. (B, N, C), codes (B, N)."""
        return -(self.shares[codes] * log_probabilities.gather(-1, self.nearest[codes])).sum(dim=-1).mean()
