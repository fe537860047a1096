"""How well images fit their captions, by CLIP: CLIP score (Hessel et al. 2021) and retrieval among captions."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from dalle.pictures import to_pil
from dalle.reranking import ClipRanker

GROUP = 100
"""Captions that retrieval chooses from: an image's own and 99 others (R-precision, Park et al. 2021)."""


class Embedded(NamedTuple):
    """What CLIP says of n images and the caption of each, on the CPU."""

    images: Tensor
    """(n, P) unit vectors."""
    texts: Tensor
    """(n, P) unit vectors."""

    @classmethod
    def of(cls, clip: ClipRanker, images: Tensor, captions: Sequence[str]) -> Embedded:
        """Embed images uint8 (n, 3, S, S) and their captions."""
        return cls(clip.embed_images([to_pil(image) for image in images]), clip.embed_texts(captions))

    def figures(self) -> dict[str, float]:
        """clip: 100 times the mean cosine, negative ones as 0; clip_retrieval: share of images whose own caption is
        the nearest of a group of GROUP (of all captions, where there are fewer)."""
        found = []
        for images, texts in zip(self.images.split(GROUP), self.texts.split(GROUP)):
            similarity = images @ texts.T
            own = similarity.diagonal()[:, None]
            found.append((similarity <= own).all(dim=1))  # equal captions count for each other
        score = (self.images * self.texts).sum(dim=1).clamp(min=0)
        return {"clip": 100 * float(score.mean()), "clip_retrieval": float(torch.cat(found).double().mean())}


class ClipCollector:
    """Collects embeddings of images and their captions as they come, so that images need not be kept."""

    def __init__(self, clip: ClipRanker) -> None:
        self.clip = clip
        self._parts: list[Embedded] = []

    def add(self, images: Tensor, captions: Sequence[str]) -> None:
        """Take images uint8 (n, 3, S, S) and a caption of each into account."""
        self._parts.append(Embedded.of(self.clip, images, captions))

    def result(self) -> dict[str, float]:
        """See `Embedded.figures`."""
        return Embedded(*(torch.cat(parts) for parts in zip(*self._parts))).figures()
