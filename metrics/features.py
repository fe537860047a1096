"""Features of a set of images, computed batch by batch and cached where the set can be identified."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import log
from metrics.images import ImageSet
from metrics.inception import Inception
from utils.caches import cache_folder
from utils.errors import UserError
from utils.files import make_folder
from utils.parts import Found, Parts, joined, save_tensors
from utils.processes import Processes

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """What the Inception network says of n images, float32 on the CPU."""

    pooled: Tensor
    """(n, 2048)"""
    logits: Tensor
    """(n, 1008), without bias."""


    @classmethod
    def of(cls, images: Tensor, network: Inception) -> Features:
        """Those of images uint8 (n, 3, H, W). Raises UserError where the network fails."""
        found = cls(*(found.float().cpu() for found in network(images)))
        if not all(part.isfinite().all() for part in found):
            raise UserError("--inception-weights: this network's features are not finite; is the file damaged?")
        return found


class Collector:
    """Collects features of batches as they come, so that images need not be kept."""

    def __init__(self, network: Inception) -> None:
        self.network = network
        self._parts: list[Features] = []

    def add(self, images: Tensor) -> None:
        """Take images uint8 (n, 3, H, W) into account. Raises UserError where the network fails."""
        self._parts.append(Features.of(images, self.network))

    def result(self) -> Features:
        """The features of all images so far."""
        return Features(*(torch.cat(parts) for parts in zip(*self._parts)))


def features_of(
    images: ImageSet, network: Inception, batch_size: int, parts: Parts | None = None, name: str = "images"
) -> Features:
    """Features of a set: those of an earlier run where it can be identified, else these are kept.

    parts: of the processes that share the work, in which these have this name; all get the result.
    """
    parts = Parts() if parts is None else parts
    found = cached_features(images, network, parts.processes, name)
    if found is not None:
        return found

    def work(batches: Iterator[range]) -> Iterator[Found]:
        for numbers in batches:
            yield joined([Features.of(batch, network)._asdict() for batch in images.batches(batch_size, numbers)])

    with log.progress(images.num_images, "measuring", unit="image", is_main=parts.processes.is_first) as bar:
        result = parts.compute(name, images.num_images, batch_size, work, bar.reach)
    found = Features(result["pooled"], result["logits"])
    keep_features(images, network, found, parts.processes)
    return found


def cached_features(images: ImageSet, network: Inception, processes: Processes, name: str) -> Features | None:
    """Features of the set that an earlier run has left, for all processes or for none. name: used once."""
    file = _cache_file(images, network)
    found = None if file is None else _cached(file, images.num_images)
    if not all(processes.gather(f"{name} cached", [found is not None])):
        return None
    logger.info(f"features of {images.name}: those of an earlier run ({file})")
    return found


def keep_features(images: ImageSet, network: Inception, found: Features, processes: Processes) -> None:
    """Keep features for later runs."""
    file = _cache_file(images, network)
    if file is not None and processes.is_first:
        _keep(found, file)


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
    try:
        make_folder("the cache of features", file.parent)
        save_tensors(found._asdict(), file)
    except (OSError, UserError) as error:  # it only saves time
        logger.warning(f"{file} cannot be written ({error}): these features are not cached")
