"""Map-style data sets of (text, image): image folders, the built-in demo set, random data, and cached image codes.

Items:

    text   LongTensor (T,)          token ids, right-padded with 0; all 0 for a dropped caption
    image  uint8 (3, S, S)          or, from CodesDataset, the image's codes as LongTensor (N,); after `find_similar`
                                    (2, N), with those of a similar image

Which of an image's captions is used, whether it is dropped, and in which view the image is taken, depends only on
(seed, epoch, index). `set_epoch` also works while loader processes run: the epoch is in shared memory.
"""
from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple, Sequence, Tuple, TypeVar

import torch

from data.demo import DemoRecord, demo_images
from data.folder import FolderPairs
from data.images import BROKEN_IMAGE_ERRORS, load_image, why_unreadable
from data.order import epoch_order, random_below, random_unit, split_holdout
from data.similar import similar_rows
from data.views import AUGMENTATIONS
from utils.errors import UserError
from utils.skipped import SkipReport

if TYPE_CHECKING:
    from bpe import Tokenizer

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 16
"""An unreadable image is replaced by another one; this many unreadable ones in a row are an error."""

_TOKENIZE_BATCH = 1024
_SOME = 1000
_CHARACTERS_PER_TOKEN = 1000
"""Far above any token's length: a caption to truncate to T tokens is first cut to this times T characters."""

Item = Tuple[torch.Tensor, torch.Tensor]
Self = TypeVar("Self", bound="PairDataset")


class TextSettings(NamedTuple):
    """How captions become the `text` of an item."""

    tokenizer: Tokenizer
    text_seq_len: int
    """Text length T, in tokens."""
    truncate_captions: bool = False
    """Truncate captions of more than T tokens instead of raising UserError."""
    seed: int = 0
    null_cond_prob: float = 0.0
    """Fraction of captions dropped (all pads), chosen per (seed, epoch, index)."""


class PairDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Pairs numbered 0 .. num_pairs - 1; subclasses provide captions and images.

    Can be pickled for loader processes of any start method, which also see later calls of `set_epoch`.
    """

    augment = "none"
    """A key of `AUGMENTATIONS`: some of the images are taken in another view; which ones depends on the epoch."""

    augment_share = 0.5
    """How many."""

    held_out = False
    """Whether this is the part held out for validation."""

    neighbours = 1
    """Number of consecutive pairs that are best read by one process."""

    def __init__(self, num_pairs: int, settings: TextSettings) -> None:
        self.num_pairs = num_pairs
        self.settings = settings
        self._indices: torch.Tensor | None = None  # of the pairs in a subset; None: all
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.num_pairs if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> Item:
        return self._pair(self.pair_at(index))

    def text_at(self, index: int) -> torch.Tensor:
        """Return the text of `self[index]` without reading its image."""
        return self._text(self.source(self.pair_at(index)))

    def set_epoch(self, epoch: int) -> None:
        """Choose captions for this epoch from now on."""
        self._epoch.fill_(epoch)

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """Return the order in which an epoch visits the positions of this (sub)set, LongTensor (n,)."""
        return epoch_order(len(self), seed, epoch)

    def subset(self: Self, indices: torch.Tensor) -> Self:
        """Return the data set of these pairs only. Captions do not change: they are chosen by pair number.

        indices: LongTensor (n,) of positions in this data set. Both data sets have their own epoch.
        """
        part = copy.copy(self)
        part._indices = indices.clone() if self._indices is None else self._indices[indices]
        part._epoch = self._epoch.clone().share_memory_()
        return part

    def split(self: Self, holdout: int | float) -> tuple[Self, Self | None]:
        """Return (training set, validation set), by seed; the validation set is None when `holdout` is 0.

        holdout: number or (as float) fraction of the pairs to hold out. The validation set drops no captions.
        """
        train, held_out = split_holdout(len(self), holdout, self.settings.seed)
        if not len(held_out):
            return self, None
        clean = self.subset(held_out).without_null_captions()
        clean.held_out = True
        return self.subset(train), clean

    def without_null_captions(self: Self) -> Self:
        """Return the same pairs without dropped captions and augmentation, for validation."""
        clean = copy.copy(self)
        clean.settings = self.settings._replace(null_cond_prob=0.0)
        clean.augment = "none"
        return clean

    def check_captions(self) -> None:
        """Raise UserError if a caption is too long and must not be truncated: now, not hours into training."""
        if self.settings.truncate_captions:
            return
        batch: list[str] = []
        for caption in self._all_captions():
            batch.append(caption)
            if len(batch) == _TOKENIZE_BATCH:
                self.settings.tokenizer.tokenize(batch, self.settings.text_seq_len)
                batch = []
        if batch:
            self.settings.tokenizer.tokenize(batch, self.settings.text_seq_len)

    def some_captions(self) -> Iterator[str]:
        """Yield captions of pairs spread over the data set, of all pairs if they are few."""
        for index in range(0, len(self), -(-len(self) // _SOME)):
            yield from self.captions(self.pair_at(index))

    def report(self) -> str:
        """Return one line on the data found and skipped so far."""
        return f"{len(self)} pairs of image and captions"

    def captions(self, pair: int) -> Sequence[str]:
        """Return the captions of a pair."""
        raise NotImplementedError

    def image(self, pair: int) -> torch.Tensor:
        """Return the image of a pair, uint8 (3, S, S)."""
        raise NotImplementedError

    def origin(self) -> str:
        """Return the source of the images: a folder's absolute path, or a name."""
        raise NotImplementedError

    def image_identity(self, pair: int) -> str:
        """Return a text that changes if the image of a pair changes, without reading the image."""
        raise NotImplementedError

    def source(self, pair: int) -> int:
        """Return the pair used in place of `pair`: itself, unless its image is unreadable."""
        return pair

    def check_unreadable(self) -> None:
        """Raise UserError when too many images are unreadable."""

    def mark_unreadable(self, pair: int, reason: Any) -> None:
        """Record that the image of a pair cannot be read, and why, so that `source` returns another one."""
        raise UserError(f"the image of pair {pair} of {self.origin()} cannot be read: {reason}")

    @property
    def num_variants(self) -> int:
        """Variants of each image: itself and its views."""
        return 1 + len(AUGMENTATIONS[self.augment])

    def variant(self, pair: int) -> int:
        """Return the variant of a pair's image in this epoch: 0 unchanged, from 1 on a view."""
        views, key = AUGMENTATIONS[self.augment], (self.settings.seed, int(self._epoch), pair)
        if not views or random_unit("flip", *key) < 1 - self.augment_share:
            return 0
        view = random_below(len(views), "view", *key)
        return 1 + view if self._fits(pair, views[view].words) else 0

    def _fits(self, pair: int, words: str) -> bool:
        """Whether a caption with the words of a view has no more than T tokens: truncated, it would be wrong."""
        tokenizer, length = self.settings.tokenizer, self.settings.text_seq_len
        return not words or not tokenizer.tokenize(self._caption(pair, words), length + 1, truncate=True)[0, length]

    def image_variant(self, pair: int, variant: int) -> torch.Tensor:
        """Return one variant of the image of a pair, uint8 (3, S, S)."""
        image = self.image(pair)
        return AUGMENTATIONS[self.augment][variant - 1].change(image) if variant else image

    def pair_at(self, index: int) -> int:
        """Return the number of the pair at a position in this (sub)set."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} pairs")
        return index if self._indices is None else int(self._indices[index])

    def _pair(self, pair: int) -> Item:
        return self._text(pair), self.image_variant(pair, self.variant(pair))

    def _text(self, pair: int) -> torch.Tensor:
        """Return the token ids of a pair's caption in this epoch, LongTensor (T,)."""
        settings = self.settings
        epoch = int(self._epoch)
        if settings.null_cond_prob and random_unit("null", settings.seed, epoch, pair) < settings.null_cond_prob:
            return torch.zeros(settings.text_seq_len, dtype=torch.int64)
        variant = self.variant(pair)
        caption = self._caption(pair, AUGMENTATIONS[self.augment][variant - 1].words if variant else "")
        return settings.tokenizer.tokenize(caption, settings.text_seq_len, settings.truncate_captions)[0]

    def _caption(self, pair: int, words: str) -> str:
        """Return a pair's caption in this epoch, with the words of a view."""
        settings, captions = self.settings, self.captions(pair)
        caption = captions[random_below(len(captions), "caption", settings.seed, int(self._epoch), pair)]
        if settings.truncate_captions:
            caption = caption[: _CHARACTERS_PER_TOKEN * settings.text_seq_len]
        return f"{caption}, {words}" if words else caption

    def _all_captions(self) -> Iterator[str]:
        pairs = range(self.num_pairs) if self._indices is None else self._indices.tolist()
        for pair in pairs:
            yield from self.captions(pair)


class PhotoPairs(PairDataset):
    """Pairs with images from files: a pair with an unreadable image is replaced by another pair and counted.

    The replacement is always the same pair.
    """

    def __init__(
        self, pairs: Any, num_pairs: int, settings: TextSettings, image_size: int, skipped: SkipReport | None = None
    ) -> None:
        """pairs: the listing: its name in `folder`, a line from `report()`, the number of bad pairs in `num_bad`.

        skipped: lists and limits unreadable images (default: not listed, no limit).
        """
        super().__init__(num_pairs, settings)
        self.pairs = pairs
        self.image_size = image_size
        self.skipped = SkipReport(max_bad_fraction=1.0) if skipped is None else skipped
        # One flag per pair instead of a counter: loader processes share it, and setting a flag needs no lock.
        self._unreadable = torch.zeros(self.num_pairs, dtype=torch.bool).share_memory_()

    @property
    def num_unreadable(self) -> int:
        """Unreadable images so far, in all loader processes."""
        return int(self._unreadable.sum())

    def image_name(self, pair: int) -> str:
        """Return the location of a pair's image, for messages."""
        raise NotImplementedError

    def report(self) -> str:
        line: str = self.pairs.report()
        if len(self) != self.num_pairs:
            line += f"; {len(self)} of them used here"
        num_unreadable = self.num_unreadable
        if num_unreadable:
            example = self.image_name(int(self._unreadable.nonzero()[0]))
            line += f"; replaced {num_unreadable} unreadable images (such as {example})"
        return line + self.skipped.where()

    def source(self, pair: int) -> int:
        for attempt in range(MAX_REPLACEMENTS):
            source = pair if attempt == 0 else self._replacement(pair, attempt)
            if not self._unreadable[source]:
                return source
        # A small subset, such as a few held-out pairs, may have no readable image though most images are readable.
        own = self._unreadable if self._indices is None else self._unreadable[self._indices]
        raise UserError(
            "{}: {} of the {} images{} cannot be read, such as {}{}; fix or remove them{}".format(
                self.skipped.source if self.skipped.source.startswith("--") else self.pairs.folder,
                int(own.sum()),
                len(self),
                " held out for validation" if self.held_out else "",
                self.image_name(pair),
                self.skipped.where(),
                ", or hold out more by --validation-fraction" if self.held_out else "",
            )
        )

    def mark_unreadable(self, pair: int, reason: Any) -> None:
        # Warn of the first one; the others are in report().
        level = logging.DEBUG if self._unreadable.any() else logging.WARNING
        self._unreadable[pair] = True
        name = self.image_name(pair)
        logger.log(level, "cannot read %s (%s); using another pair", name, reason)
        kind = why_unreadable(reason) if isinstance(reason, BaseException) else "unreadable images"
        self.skipped.add(name, kind, str(reason))

    def check_unreadable(self) -> None:
        self.skipped.check(self.num_pairs + self.pairs.num_bad)

    def _pair(self, pair: int) -> Item:
        while True:
            source = self.source(pair)
            try:
                return super()._pair(source)
            except UserError:
                raise  # a caption that is too long: UserError is a ValueError, but not an image error
            except BROKEN_IMAGE_ERRORS as error:
                self.mark_unreadable(source, error)
                self.check_unreadable()

    def _replacement(self, pair: int, attempt: int) -> int:
        """Return another pair of this (sub)set: a validation set never uses training pairs."""
        return self.pair_at(random_below(len(self), "replacement", self.settings.seed, pair, attempt))


class ImageTextFolder(PhotoPairs):
    """Images and captions below a folder: data/folder.py has the layout, data/images.py the preprocessing."""

    def __init__(
        self, pairs: FolderPairs, settings: TextSettings, image_size: int, skipped: SkipReport | None = None
    ) -> None:
        super().__init__(pairs, len(pairs.images), settings, image_size, skipped)

    def captions(self, pair: int) -> list[str]:
        captions: str = self.pairs.captions[pair]
        return captions.split("\n")

    def image(self, pair: int) -> torch.Tensor:
        return load_image(self.pairs.images[pair], self.image_size)

    def image_name(self, pair: int) -> str:
        path: str = self.pairs.images[pair]
        return path

    def origin(self) -> str:
        return os.path.realpath(self.pairs.folder)

    def image_identity(self, pair: int) -> str:
        path = self.pairs.images[pair]
        return _file_identity(path[len(self.pairs.folder) :].lstrip(os.sep), path)


def _file_identity(name: str, path: str) -> str:
    """Return name, size and modification time of a file; only the name if it has vanished."""
    try:
        found = os.stat(path)
    except OSError:
        return name
    return f"{name} {found.st_size} {found.st_mtime_ns}"


class DemoDataset(PairDataset):
    """The built-in demo set."""

    def __init__(self, records: Sequence[DemoRecord], settings: TextSettings, image_size: int = 64) -> None:
        super().__init__(len(records), settings)
        self.records = list(records)
        self.image_size = image_size

    def captions(self, pair: int) -> list[str]:
        return [self.records[pair].caption]

    def image(self, pair: int) -> torch.Tensor:
        return demo_images([self.records[pair]], self.image_size)[0]

    def origin(self) -> str:
        return "demo"

    def image_identity(self, pair: int) -> str:
        path = self.records[pair].path
        return _file_identity(path.name, str(path))

    def report(self) -> str:
        return f"demo set: {len(self)} images with captions" + (", held out for validation" if self.held_out else "")


class CodesDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The pairs of another data set with encoded images: items are (text, codes LongTensor (N,), or (2, N)).

    codes: integers (n, N), a tensor, a NumPy array (also memory-mapped) or another sequence of rows: for each pair of
    the full set, in order, one row per variant of its image (see `PairDataset.variant`). Rows of images that were never
    encoded hold -1; reading one is an error.
    """

    def __init__(self, pairs: PairDataset, codes: Any) -> None:
        if len(codes) != pairs.num_pairs * pairs.num_variants:
            message = "{} rows of image codes for {} pairs: the data changed, encode the images again"
            raise UserError(message.format(len(codes), pairs.num_pairs))
        self.pairs = pairs
        self.codes = codes
        self._similar: torch.Tensor | None = None  # (pairs, K) pairs of similar images

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        pair = self.pairs.source(self.pairs.pair_at(index))
        variant = self.pairs.variant(pair)
        codes = self._row(pair, variant)
        if int(codes.min()) < 0:
            # Some devices would silently train on whatever such a code indexes.
            raise RuntimeError(f"the image of pair {pair} was not encoded")
        if self._similar is not None:
            codes = torch.stack([codes, codes if variant else self._row(self._similar_to(pair), 0)])
        return self.pairs.text_at(index), codes

    def _row(self, pair: int, variant: int) -> torch.Tensor:
        row = self.codes[pair * self.pairs.num_variants + variant]
        if not isinstance(row, torch.Tensor):
            row = torch.from_numpy(row.astype("int64"))  # PyTorch cannot convert uint16 arrays
        return row.to(torch.int64)

    def _similar_to(self, pair: int) -> int:
        """A pair with a similar image, another one in each epoch; itself if there is none."""
        assert self._similar is not None
        known = self._similar[pair][self._similar[pair] >= 0]
        chosen = random_below(max(1, len(known)), "similar", self.pairs.settings.seed, int(self.pairs._epoch), pair)
        return int(known[chosen]) if len(known) else pair

    def find_similar(self) -> None:
        """From now on give each image's codes together with those of a similar image."""
        pairs = [self.pairs.source(self.pairs.pair_at(index)) for index in range(len(self))]
        codes = torch.stack([self._row(pair, 0) for pair in pairs])
        own = torch.tensor(pairs)
        nearest = similar_rows(codes, self.pairs.settings.seed)
        self._similar = torch.full((self.pairs.num_pairs, nearest.shape[1]), -1)
        self._similar[own] = torch.where(nearest < 0, -1, own[nearest])

    def set_epoch(self, epoch: int) -> None:
        """Choose captions for this epoch from now on."""
        self.pairs.set_epoch(epoch)

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """Return the order in which an epoch visits the positions: that of the images, LongTensor (n,)."""
        return self.pairs.order(seed, epoch)

    @property
    def num_unreadable(self) -> int:
        """Images that were unreadable when they were encoded."""
        return int(getattr(self.pairs, "num_unreadable", 0))

    def report(self) -> str:
        """Return one line on the data found."""
        return self.pairs.report()
