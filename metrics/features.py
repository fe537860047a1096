"""Features of a set of images, computed batch by batch and cached where the set can be identified."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import log
from metrics.images import ImageSet
from metrics.inception import Inception
from utils.caches import cache_folder
from utils.errors import UserError
from utils.files import make_folder

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """What the Inception network says of n images, float32 on the CPU."""

    pooled: Tensor
    """(n, 2048)"""
    logits: Tensor
    """(n, 1008), without bias."""


class Collector:
    """Collects features of batches as they come, so that images need not be kept."""

    def __init__(self, network: Inception) -> None:
        self.network, self._parts = network, list[Features]()

    def add(self, images: Tensor) -> None:
        """Take images uint8 (n, 3, H, W) into account. Raises UserError where the network fails."""
        found = Features(*(found.float().cpu() for found in self.network(images)))
        if not all(part.isfinite().all() for part in found):
            raise UserError("--inception-weights: this network's features are not finite; is the file damaged?")
        self._parts.append(found)

    def result(self) -> Features:
        """The features of all images so far."""
        return Features(*(torch.cat(parts) for parts in zip(*self._parts)))


def features_of(images: ImageSet, network: Inception, batch_size: int, cache: bool = True) -> Features:
    """Features of a set; with `cache` those of an earlier run are taken, and these are kept."""
    file = _cache_file(images, network) if cache else None
    found = None if file is None else _cached(file, images.num_images)
    if found is not None:
        logger.info(f"features of {images.name}: those of an earlier run ({file})")
        return found
    collector = Collector(network)
    with log.progress(images.num_images, "measuring", unit="image") as bar:
        for batch in images.batches(batch_size):
            collector.add(batch)
            bar.update(len(batch), len(batch))
    found = collector.result()
    if file is not None:
        _keep(found, file)
    return found


def _cache_file(images: ImageSet, network: Inception) -> Path | None:
    if images.identity is None or network.identity == "random":
        return None
    return cache_folder("dalle", "features") / f"{images.identity[:24]}-{network.identity[:12]}.safetensors"


def _cached(file: Path, count: int) -> Features | None:
    if not file.is_file():
        return None
    try:
        tensors = load_file(str(file))
        found = Features(tensors["pooled"], tensors["logits"])
    except Exception as error:  # a damaged file raises whatever safetensors raises
        logger.warning(f"{file} cannot be read ({error}): measuring again")
        return None
    return found if len(found.pooled) == len(found.logits) == count else None


def _keep(found: Features, file: Path) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        make_folder("the cache of features", file.parent)
        save_file(found._asdict(), str(part))
        part.replace(file)
    except (OSError, UserError) as error:  # it only saves time
        logger.warning(f"{file} cannot be written ({error}): these features are not cached")
