"""Sets of images to measure: folders, webdataset shards or tensors, read in batches of one size."""

from __future__ import annotations

import hashlib
import io
import json
import os
from typing import IO, Any, Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

from data import DEMO
from data.demo import demo_images, demo_records
from data.folder import list_files
from data.images import BROKEN_IMAGE_ERRORS, load_image
from data.shards import LOST, Listing, Shards, find_shards
from data.tar_members import DAMAGED, TRUNCATED
from utils.errors import UserError


class ImageSet(NamedTuple):
    """Images to measure."""

    name: str
    num_images: int
    identity: str | None
    """What they are, for the cache of their features; None: not cached."""
    image: Callable[[int], Tensor]
    """One of them, uint8 (3, H, W)."""

    def batches(self, size: int, numbers: range | None = None) -> Iterator[Tensor]:
        """Yields uint8 (n, 3, H, W), at most so many at a time; consecutive images of one size are in one batch."""
        return same_sized(map(self.image, range(self.num_images) if numbers is None else numbers), size)


def identity_of(facts: Sequence[Any], image_size: int | None) -> str:
    """An identity made of what would differ for other images."""
    return hashlib.sha256(json.dumps([facts, image_size]).encode("utf-8", "surrogatepass")).hexdigest()


def folder_images(flag: str, folder: str, image_size: int | None = None, ignored: str = "") -> ImageSet:
    """All images below a folder, in webdataset shards, or of the demo set. Raises UserError that names the flag.

    image_size: the centre square at this side is measured; None: images as they are. ignored: name of files
    that are not counted. The identity is that of names, sizes and times of the files.
    """
    if folder == DEMO:
        return demo_set(image_size or 64)
    try:
        listing = find_shards(folder)
    except UserError as error:
        raise UserError(str(error).replace("--input-folder", flag)) from None
    if listing is not None:
        return _shard_images(flag, listing, image_size)
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder; give one with images or webdataset shards, or 'demo'")
    paths = sorted(path for path in list_files(folder)[0] if os.path.basename(path) != ignored)
    if not paths:
        raise UserError(f"{flag} {folder}: there is no image in it")

    def read(number: int) -> Tensor:
        return _readable(f"{flag} {folder}: {paths[number]}", paths[number], image_size)

    return ImageSet(folder, len(paths), identity_of(_states(paths), image_size), read)


def _shard_images(flag: str, listing: Listing, image_size: int | None) -> ImageSet:
    """The images of webdataset shards, with captions or without."""
    shards = Shards(listing)
    bad = [skipped for skipped in shards.skipped if skipped.reason in (*LOST, TRUNCATED, DAMAGED)]
    if bad or not shards.num_images:
        raise UserError(f"{flag} {listing.pattern}: {'; '.join(map(str, bad)) or 'there is no image in these shards'}")

    def read(number: int) -> Tensor:
        shard, image = shards.image(number)
        content = io.BytesIO(shard.content(image, shards.files))
        return _readable(f"{flag} {shard.name(image, shards.files)}", content, image_size)

    return ImageSet(listing.pattern, shards.num_images, identity_of(_states(listing.paths), image_size), read)


def _states(paths: Sequence[str]) -> list[Any]:
    return [(path, found.st_size, found.st_mtime_ns) for path, found in ((path, os.stat(path)) for path in paths)]


def _readable(name: str, file: str | IO[bytes], image_size: int | None) -> Tensor:
    try:
        return load_image(file, image_size)
    except BROKEN_IMAGE_ERRORS as error:
        raise UserError(f"{name} cannot be read: {error}") from None


def demo_set(image_size: int) -> ImageSet:
    """The built-in images, training and held out."""
    records = demo_records("all")
    return ImageSet(DEMO, len(records), None, lambda number: demo_images([records[number]], image_size)[0])


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
