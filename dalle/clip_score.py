"""How well images fit their captions, by CLIP: CLIP score (Hessel et al. 2021) and retrieval among captions."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from dalle.pictures import to_pil
from dalle.reranking import ClipRanker

GROUP = 100
"""Captions that retrieval chooses from: an image's own and 99 others (R-precision, Park et al. 2021)."""


class ClipCollector:
    """Collects embeddings of images and their captions as they come, so that images need not be kept."""

    def __init__(self, clip: ClipRanker) -> None:
        self.clip = clip
        self.images: list[Tensor] = []
        self.captions: list[str] = []

    def add(self, images: Tensor, captions: Sequence[str]) -> None:
        """Take images uint8 (n, 3, S, S) and a caption of each into account."""
        self.images.append(self.clip.embed_images([to_pil(image) for image in images]))
        self.captions += captions

    def result(self) -> dict[str, float]:
        """clip: 100 times the mean cosine, negative ones as 0; clip_retrieval: share of images whose own caption is
        the nearest of a group of GROUP (of all captions, where there are fewer)."""
        images, texts = torch.cat(self.images), self.clip.embed_texts(self.captions)
        found = []
        for start in range(0, len(images), GROUP):
            similarity = images[start : start + GROUP] @ texts[start : start + GROUP].T
            own = similarity.diagonal()[:, None]
            found.append((similarity <= own).all(dim=1))  # equal captions count for each other
        score = (images * texts).sum(dim=1).clamp(min=0)
        return {"clip": 100 * float(score.mean()), "clip_retrieval": float(torch.cat(found).double().mean())}
