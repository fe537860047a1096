"""Codebook maintenance in VQGAN training: moving averages, and revival of unused codes.

Letters: B images, D embed_dim, K num_codes, M feature vectors of a batch.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.vqgan import VQGAN, VectorQuantizer


class CodebookUpkeep:
    """Tracks how often each code is used and updates the codebook of a "vq" model outside the loss.

    With `decay` the entries are moving averages of the features assigned to them (van den Oord et al. 2017, appendix
    A.1) and get no gradient; with None the codebook loss trains them. Either way `revive` moves hardly used entries to
    features of the current batch, so that no entries are wasted.
    """

    def __init__(self, model: VQGAN, decay: float | None = 0.99, usage_decay: float = 0.99) -> None:
        if not isinstance(model.quantize, VectorQuantizer):
            raise ValueError("codebook maintenance needs a VQGAN of the variant vq")
        self.codebook = model.quantize.embedding.weight
        self.decay = decay
        self.usage_decay = usage_decay
        num_codes = self.codebook.shape[0]
        self.usage = torch.ones(num_codes, device=self.codebook.device)  # moving average, 1: average use
        self.count = torch.ones(num_codes, device=self.codebook.device)
        self.total = self.codebook.detach().clone()
        if decay is not None:
            self.codebook.requires_grad_(False)

    @torch.no_grad()
    def initialise(self, features: Tensor, iterations: int = 10) -> None:
        """Initialise the codebook from features (M, D) by k-means; with M < K features repeat, with some jitter."""
        num_codes = self.codebook.shape[0]
        pick = torch.randperm(features.shape[0], device=features.device)[:num_codes]
        if len(pick) < num_codes:
            extra = torch.randint(features.shape[0], (num_codes - len(pick),), device=features.device)
            pick = torch.cat([pick, extra])
        chosen = features[pick]
        self.codebook.copy_(chosen + 0.01 * features.std() * torch.randn_like(chosen))
        for _ in range(iterations):
            bias = -0.5 * self.codebook.pow(2).sum(dim=1)  # (K,)
            codes = torch.argmax(torch.nn.functional.linear(features, self.codebook, bias), dim=1)  # (M,)
            hits = torch.bincount(codes, minlength=num_codes)
            sums = torch.zeros_like(self.codebook).index_add_(0, codes, features)  # (K, D)
            self.codebook[hits > 0] = sums[hits > 0] / hits[hits > 0, None]
        self.total.copy_(self.codebook * self.count[:, None])

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor) -> None:
        """Count the use of a batch's codes (M,) and, with `decay`, move their entries towards features (M, D)."""
        hits = torch.bincount(codes, minlength=self.codebook.shape[0]).to(features.dtype)  # (K,)
        share = hits * (self.codebook.shape[0] / codes.numel())
        self.usage.lerp_(share, 1.0 - self.usage_decay)
        if self.decay is None:
            return
        sums = torch.zeros_like(self.total).index_add_(0, codes, features)  # (K, D)
        self.count.lerp_(hits, 1.0 - self.decay)
        self.total.lerp_(sums, 1.0 - self.decay)
        used = self.count > 1e-3
        self.codebook[used] = self.total[used] / self.count[used, None]

    @torch.no_grad()
    def revive(self, features: Tensor, threshold: float = 0.05) -> Tensor:
        """Move codes used less than `threshold` times as often as the average one to random features (M, D).

        Returns the indices of the moved codes (R,).
        """
        dead = torch.nonzero(self.usage < threshold).flatten()[: features.shape[0]]
        if len(dead) > 0:
            chosen = features[torch.randperm(features.shape[0], device=features.device)[: len(dead)]]
            self.codebook[dead] = chosen
            self.usage[dead] = 1.0
            self.count[dead] = 1.0
            self.total[dead] = chosen
        return dead

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to resume; the codebook itself is part of the model."""
        return {"usage": self.usage, "count": self.count, "total": self.total}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        for name in ("usage", "count", "total"):
            getattr(self, name).copy_(state[name])
