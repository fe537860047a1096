"""Images without captions, for training a VQGAN: from a folder, shards, or the demo set; and endless batches of them.

Letters: B images, S image height and width.
"""
from __future__ import annotations

import io
import logging
import os
from typing import IO, Any, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.create import DEMO
from data.demo import demo_images, demo_records
from data.folder import PackedStrings, list_files
from data.images import BROKEN_IMAGE_ERRORS, load_image, why_unreadable
from data.order import epoch_order, split_holdout, windowed_order
from data.shard_index import Members
from data.shards import NEIGHBOURS, WINDOW, Shards, find_shards
from utils.errors import UsageError, UserError
from utils.files import IMAGE_SUFFIXES, PathLike
from utils.loading import make_loader, read
from utils.skipped import Entry, SkipReport

logger = logging.getLogger(__name__)


class Fetched(NamedTuple):
    """Images read from a source."""

    images: Tensor
    """uint8 (n, 3, S, S): in the requested order, without unreadable ones."""
    unreadable: list[Entry]
    """The unreadable images."""


class ImageSource(Dataset):
    """Numbered images. `source[numbers]` reads several, from any process."""

    def __init__(self, skipped: SkipReport | None = None) -> None:
        """skipped: lists and limits unreadable images (default: not listed, no limit)."""
        self.unreadable: set[str] = set()
        """Paths of the unreadable images passed to `take`."""
        self.skipped = SkipReport(max_bad_fraction=1.0) if skipped is None else skipped

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, numbers: Sequence[int]) -> Fetched:
        raise NotImplementedError

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """Return the order in which an epoch visits the images, LongTensor (n,)."""
        return epoch_order(len(self), seed, epoch)

    def take(self, fetched: Fetched) -> Tensor:
        """Return the images and record unreadable ones. Warns of the first one.

        Raises UserError when no image is readable, or when too many are unreadable.
        """
        for entry in fetched.unreadable:
            if not self.unreadable:
                logger.warning(
                    "%s cannot be read (%s): skipped, like all further unreadable images", entry.path, entry.detail
                )
            self.unreadable.add(entry.path)
        if fetched.unreadable:
            self.skipped.add_all(fetched.unreadable)
        if len(self.unreadable) == len(self):
            raise UserError(f"none of {len(self)} images can be read, such as {next(iter(self.unreadable))}")
        if fetched.unreadable:
            self.skipped.check(len(self))
        return fetched.images

    def chunks(self, numbers: Sequence[int], size: int = 64) -> Iterator[Tensor]:
        """Yield the readable images with these numbers, at most `size` at a time: uint8 (n, 3, S, S)."""
        for start in range(0, len(numbers), size):
            images = self.take(self[numbers[start : start + size]])
            if len(images):
                yield images


class ImagesInMemory(ImageSource):
    """The images of a tensor uint8 (n, 3, S, S)."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, numbers: Sequence[int]) -> Fetched:
        return Fetched(self.images[torch.as_tensor(numbers)], [])


class PhotoSource(ImageSource):
    """Image files, preprocessed as for training on captions: centre square, resized to S."""

    def __init__(self, image_size: int, skipped: SkipReport | None = None) -> None:
        super().__init__(skipped)
        self.image_size = image_size

    def name(self, number: int) -> str:
        """Return the location of an image, for messages."""
        raise NotImplementedError

    def file(self, number: int) -> str | IO[bytes]:
        """Return the file of an image, as a path or an open file. Raises OSError."""
        raise NotImplementedError

    def __getitem__(self, numbers: Sequence[int]) -> Fetched:
        images = [torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)]
        unreadable: list[Entry] = []
        for number in numbers:
            try:
                images.append(load_image(self.file(number), self.image_size)[None])
            except UserError:
                raise
            except BROKEN_IMAGE_ERRORS as error:
                unreadable.append(Entry(self.name(number), why_unreadable(error), str(error)))
        return Fetched(torch.cat(images), unreadable)


class ImageFiles(PhotoSource):
    """Image files of a folder."""

    def __init__(self, paths: PackedStrings, image_size: int, skipped: SkipReport | None = None) -> None:
        super().__init__(image_size, skipped)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return self.paths[number]

    def file(self, number: int) -> str:
        return self.paths[number]


class ShardImages(PhotoSource):
    """Some of the images in webdataset shards, with or without captions."""

    def __init__(
        self, shards: Shards, numbers: torch.Tensor, image_size: int, skipped: SkipReport | None = None
    ) -> None:
        super().__init__(image_size, skipped)
        self.shards = shards
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        shard, image = self.shards.image(int(self.numbers[number]))
        return shard.name(image, self.shards.files)

    def file(self, number: int) -> IO[bytes]:
        shard, image = self.shards.image(int(self.numbers[number]))
        return io.BytesIO(shard.content(image, self.shards.files))

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        return windowed_order(self.numbers // NEIGHBOURS, WINDOW, seed, epoch)


def open_images(
    folder: str,
    image_size: int,
    num_heldout: int,
    seed: int,
    max_bad_fraction: float = 1.0,
    skipped_file: PathLike | None = None,
    shard_images: str | None = None,
) -> tuple[ImageSource, ImageSource]:
    """Return training and held-out images of a folder, of webdataset shards, or of the demo set (whose split is fixed).

    max_bad_fraction, skipped_file: how many images may be skipped, and where they are listed: utils/skipped.py.
    shard_images: suffixes of images in shards, see `data.shard_index.Members.named`.

    At most a tenth of the images, but at least one, is held out, chosen by the seed. Raises UserError.
    """
    listing = None if folder == DEMO else find_shards(folder)
    if shard_images and listing is None:
        raise UsageError("--shard-images needs webdataset shards as --input-folder")
    if folder == DEMO:
        train, heldout = (
            ImagesInMemory(demo_images(demo_records(split), image_size)) for split in ("train", "heldout")
        )
        return train, heldout
    if listing is not None:
        skips = _skip_reports(folder, max_bad_fraction, skipped_file)
        members = Members.named(shard_images, None)
        return _shard_images(Shards(listing, members=members), image_size, num_heldout, seed, skips)
    if not os.path.isdir(folder):
        raise UserError(f"--input-folder {folder}: no such folder; give one with images, or 'demo'")
    paths = sorted(list_files(folder)[0])
    if len(paths) < 2:
        raise UserError(
            "--input-folder {} holds fewer than two images ({})".format(
                folder, " ".join("*" + s for s in IMAGE_SUFFIXES)
            )
        )
    numbers = split_holdout(len(paths), min(num_heldout, max(1, len(paths) // 10)), seed)
    skips = _skip_reports(folder, max_bad_fraction, skipped_file)
    train, heldout = (
        ImageFiles(PackedStrings(paths[i] for i in part.tolist()), image_size, skipped)
        for part, skipped in zip(numbers, skips)
    )
    return train, heldout


def _skip_reports(folder: str, max_bad_fraction: float, file: PathLike | None) -> list[SkipReport]:
    """Separate reports for training and held-out images."""
    source = f"--input-folder {folder}"
    return [SkipReport(file, max_bad_fraction, name) for name in (source, source + " (held-out images)")]


def _shard_images(
    shards: Shards, image_size: int, num_heldout: int, seed: int, skips: Sequence[SkipReport]
) -> tuple[ImageSource, ImageSource]:
    logger.info("%s: %d images in %d shards", shards.folder, shards.num_images, len(shards.indexes))
    if shards.num_images < 2:
        message = "--input-folder {}: fewer than two images in the shards{}"
        raise UserError(message.format(shards.folder, shards.unread()) + "; --shard-images names other suffixes")
    shards.check_lost(skips[0])
    numbers = split_holdout(shards.num_images, min(num_heldout, max(1, shards.num_images // 10)), seed)
    train, heldout = (ShardImages(shards, part, image_size, skipped) for part, skipped in zip(numbers, skips))
    return train, heldout


class Batches:
    """Endless batches uint8 (B, 3, S, S): every image once per epoch, in an order determined by seed and epoch.

    `taken` counts the batches so far; `taken=n` resumes after the n-th batch. An incomplete batch at the end of an
    epoch is dropped. Unreadable images make a batch smaller. `workers` processes read ahead; 0: this process reads.
    Raises UserError when no image is readable.
    """

    def __init__(self, source: ImageSource, batch_size: int, seed: int, taken: int = 0, workers: int = 0) -> None:
        self.source = source
        self.batch_size = min(batch_size, len(source))
        self.seed = seed
        self.taken = taken
        self._fetched = read(
            make_loader(source, workers, batch_size=None, sampler=self._numbers(), collate_fn=_as_is)
        )

    def _numbers(self) -> Iterator[list[int]]:
        per_epoch = len(self.source) // self.batch_size
        epoch, batch = divmod(self.taken, per_epoch)
        while True:
            order = self.source.order(self.seed, epoch)
            for start in range(batch, per_epoch):
                yield order[start * self.batch_size : (start + 1) * self.batch_size].tolist()
            epoch, batch = epoch + 1, 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        while True:
            images = self.source.take(next(self._fetched))
            self.taken += 1
            if len(images):
                return images

    def close(self) -> None:
        """End the worker processes; no more batches follow."""
        self._fetched.close()


def _as_is(fetched: Any) -> Any:
    """Identity: the source already makes batches. A named function, so that spawned processes can import it."""
    return fetched
