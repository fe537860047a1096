"""Sets of images to measure: folders, webdataset shards or tensors, read in batches of one size."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

from data import DEMO
from data.demo import demo_images, demo_records
from data.folder import list_files
from data.images import BROKEN_IMAGE_ERRORS, load_image
from utils.errors import UserError


class ImageSet(NamedTuple):
    """Images to measure."""

    name: str
    num_images: int
    identity: str | None
    """What they are, for the cache of their features; None: not cached."""
    batches: Callable[[int], Iterator[Tensor]]
    """Yields uint8 (n, 3, H, W), at most so many at a time; consecutive images of one size are in one batch."""


def folder_images(flag: str, folder: str, image_size: int | None = None, ignored: str = "") -> ImageSet:
    """All images below a folder, or the demo set. Raises UserError that names the flag.

    image_size: the centre square at this side is measured; None: images as they are. ignored: name of files
    that are not counted. The identity is that of names, sizes and times of the files.
    """
    if folder == DEMO:
        return demo_set(image_size or 64)
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder; give one with images, or 'demo'")
    paths = sorted(path for path in list_files(folder)[0] if os.path.basename(path) != ignored)
    if not paths:
        raise UserError(f"{flag} {folder}: there is no image in it")
    states = [(path, found.st_size, found.st_mtime_ns) for path, found in ((path, os.stat(path)) for path in paths)]
    identity = hashlib.sha256(json.dumps([states, image_size]).encode("utf-8", "surrogatepass")).hexdigest()

    def read(path: str) -> Tensor:
        try:
            return load_image(path, image_size)
        except BROKEN_IMAGE_ERRORS as error:
            raise UserError(f"{flag} {folder}: {path} cannot be read: {error}") from None

    return ImageSet(folder, len(paths), identity, lambda size: same_sized(map(read, paths), size))


def demo_set(image_size: int) -> ImageSet:
    """The built-in images, training and held out."""
    records = demo_records("all")
    return ImageSet(DEMO, len(records), None, lambda size: iter(demo_images(records, image_size).split(size)))


def same_sized(images: Iterator[Tensor], most: int) -> Iterator[Tensor]:
    """Batches (n, 3, H, W) of images (3, H, W): consecutive ones of one size, at most so many."""
    batch: list[Tensor] = []
    for image in images:
        if batch and (len(batch) == most or batch[0].shape != image.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)
