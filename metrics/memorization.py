"""Whether generated images are copies of training images: the nearest training image of each, by pixels or by CLIP."""

from __future__ import annotations

from typing import Callable, Iterable, NamedTuple

import torch
from torch import Tensor

SIDE = 32
"""Side that images are reduced to for the distance in pixels: copies stay near, noise and shifts count less."""


class Nearest(NamedTuple):
    """The nearest of all training images to each of n generated ones."""

    distance: Tensor
    """(n,)"""
    images: Tensor
    """(n, 3, S, S) uint8"""
    numbers: Tensor
    """(n,) place in the training set."""


def pixels(images: Tensor) -> Tensor:
    """Images uint8 (n, 3, S, S) -> (n, 3 * SIDE * SIDE): root mean square distances between 0 and 1."""
    small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, SIDE)
    return small.flatten(1) / small[0].numel() ** 0.5


def nearest(generated: Tensor, training: Iterable[Tensor], embed: Callable[[Tensor], Tensor] = pixels) -> Nearest:
    """Compare generated images (n, 3, S, S) with batches of training images, of which no more than one is in memory.

    embed: images -> vectors whose Euclidean distance counts.
    """
    own = embed(generated)
    best = torch.full((len(generated),), float("inf"))
    images, numbers = torch.zeros_like(generated), torch.zeros(len(generated), dtype=torch.long)
    done = 0
    for batch in training:
        distance, place = torch.cdist(own, embed(batch)).min(dim=1)
        better = distance < best
        best[better], images[better] = distance[better], batch[place[better]]
        numbers[better] = place[better] + done
        done += len(batch)
    return Nearest(best, images, numbers)
