"""Image-caption pairs in webdataset shards, as written by img2dataset: tar files of images with a .txt or .json each.

    cc3m/{00000..00331}.tar        a pattern (in quotes: shells expand it too), a glob, one .tar file, or a folder
        000000012.jpg  000000012.json  000000012.txt  000000013.jpg ...        other names: `Members`

With their index (data/shard_index.py), tar files are a data set like a folder. Only the order of an epoch differs:
neighbours in a shard are read at about the same time, so that slow disks and networks are read sequentially.
"""
from __future__ import annotations

import bisect
import collections
import concurrent.futures
import glob
import io
import itertools
import logging
import os
import re
import time
from pathlib import Path
from typing import Counter, NamedTuple

import torch

from data.datasets import PhotoPairs, TextSettings
from data.folder import Skipped, list_files, listed_suffixes, starred
from data.images import load_image
from data.order import windowed_order
from data.shard_index import UNREADABLE, Members, OpenFiles, ShardIndex, Skips, open_index
from data.tar_members import COMPRESSED, NO_TAR
from utils.caches import cache_folder
from utils.errors import UserError
from utils.files import PathLike
from utils.skipped import SkipReport

logger = logging.getLogger(__name__)

NEIGHBOURS = 256
"""Consecutive pairs that are visited at about the same time: some 10 MB of images."""

WINDOW = 64
"""Number of such runs, from all over the data, that are shuffled together: 16,384 pairs."""

UNPAIRED = ("images without captions", "captions without an image")
"""Skipped without counting as bad pairs."""

MISSING = "shards that do not exist"
LOST = (MISSING, UNREADABLE, NO_TAR, COMPRESSED)
"""Unreadable shards: their number of pairs is unknown."""

_READERS = 8
_MAX_SHARDS = 1_000_000
_SECONDS_BETWEEN_REPORTS = 30.0
_REMOTE = re.compile(r"(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


# Which files ----------------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """The shards that match a pattern."""

    pattern: str
    paths: list[str]
    missing: list[str]
    """Explicitly named shards that do not exist."""


def require_folder(folder: str, flag: str = "--input-folder") -> None:
    """Raise UserError unless the folder or the shards exist. flag: the flag that sets it."""
    try:
        if find_shards(folder) is None and not os.path.isdir(folder):
            raise UserError(
                f"{flag} {folder}: no such folder; give one with images and captions, or 'demo' for the built-in set"
            )
    except UserError as error:
        raise UserError(str(error).replace("--input-folder", flag)) from error


def find_shards(pattern: str) -> Listing | None:
    """Return the shards of --input-folder, or None if it is a folder of files.

    A folder counts as shards if it has .tar files in it and no images below it. Raises UserError for remote shards and
    patterns without a match.
    """
    where = f"--input-folder {pattern}: "
    if _REMOTE.match(pattern):
        raise UserError(
            where + "shards are read in random order, so only from disks; download them first, then name them "
            "as 'DIR/{00000..00099}.tar'"
        )
    if os.path.isdir(pattern):
        shards = sorted(entry.path for entry in os.scandir(pattern) if _is_shard_name(entry.name) and entry.is_file())
        if not shards or list_files(pattern)[0]:
            return None
        return Listing(pattern, shards, [])
    if os.path.exists(pattern):
        if not _is_shard_name(pattern):
            raise UserError(where + "neither a folder nor a .tar file (compressed shards must be decompressed first)")
        return Listing(pattern, [pattern], [])
    paths: dict[str, bool] = {}
    for path in _expand_braces(pattern):
        if glob.has_magic(path):
            paths.update((found, True) for found in sorted(glob.glob(path)) if _is_shard_name(found))
        elif path != pattern or _is_shard_name(path):
            paths[path] = os.path.isfile(path)
    if not paths and not glob.has_magic(pattern):
        return None  # a folder that does not exist
    if not any(paths.values()):
        raise UserError(where + f"no such .tar file{_example(list(paths))}")
    return Listing(pattern, [path for path in paths if paths[path]], [path for path in paths if not paths[path]])


def _is_shard_name(path: str) -> bool:
    return path.lower().endswith(".tar") and not os.path.basename(path).startswith(".")


def _example(paths: list[str]) -> str:
    return f" (such as {paths[0]})" if len(paths) > 1 else ""


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise UserError(
            f"--input-folder {pattern}: patterns with braces need the package braceexpand: pip install braceexpand"
        ) from error
    # braceexpand builds a list of each range before it yields the first path.
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?=\.\.|\})", pattern)
    if re.search(r"\d{19}", pattern) or any(abs(int(last) - int(first)) >= _MAX_SHARDS for first, last in ranges):
        raise UserError(f"--input-folder {pattern}: more than {_MAX_SHARDS} shards")
    try:
        paths = list(itertools.islice(braceexpand(pattern), _MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"--input-folder {pattern}: unbalanced braces") from error
    if len(paths) > _MAX_SHARDS:
        raise UserError(f"--input-folder {pattern}: more than {_MAX_SHARDS} shards")
    return paths


# What is in them ------------------------------------------------------------------------------------------------------


class Shards:
    """Indexed shards. Pickled copies include the indexes, but no open files."""

    def __init__(
        self, listing: Listing, index_folder: PathLike | None = None, members: Members | None = None
    ) -> None:
        """index_folder: where indexes are kept; None: ~/.cache/dalle/shards. members: None for the defaults."""
        self.folder, self.members = listing.pattern, Members() if members is None else members
        folder = cache_folder("dalle", "shards") if index_folder is None else Path(index_folder)
        self.indexes = _open_indexes(listing, folder, self.members)
        self.num_shards = len(listing.paths) + len(listing.missing)
        problems = [index.problem for index in self.indexes if index.problem]
        if problems:
            message = "cannot keep the index of %d of %d shards in %s (%s): it stays in memory"
            logger.warning(message, len(problems), len(self.indexes), folder, problems[0])
        self.pair_starts = [0, *itertools.accumulate(index.num_pairs for index in self.indexes)]
        self.image_starts = [0, *itertools.accumulate(index.num_images for index in self.indexes)]
        self.files = OpenFiles()
        parents = {os.path.dirname(os.path.realpath(path)) for path in listing.paths}
        self.parent = os.path.commonpath(sorted(parents))
        """Common parent folder of all shards."""
        self.names = {path: os.path.relpath(os.path.realpath(path), self.parent) for path in listing.paths}
        """Shard paths relative to it."""
        skips = Skips()
        if listing.missing:
            skips.add(MISSING, listing.missing[0], len(listing.missing))
        for index in self.indexes:
            for reason, (number, example) in index.skips.counts.items():
                skips.add(reason, example, number)
        self.skipped = [Skipped(number, reason, example) for reason, (number, example) in sorted(skips.counts.items())]

    @property
    def num_pairs(self) -> int:
        """Images with captions."""
        return self.pair_starts[-1]

    @property
    def num_bad(self) -> int:
        """Unusable pairs; a truncated or damaged shard counts as one."""
        return sum(skipped.num_files for skipped in self.skipped if skipped.reason not in UNPAIRED + LOST)

    @property
    def num_lost(self) -> int:
        """Shards that cannot be read at all."""
        return sum(skipped.num_files for skipped in self.skipped if skipped.reason in LOST)

    def check_lost(self, report: SkipReport) -> None:
        """Report lost shards. Raises UserError if they are a larger fraction of all than `report` allows."""
        for skipped in self.skipped:
            if skipped.reason in LOST:
                report.add_count(skipped.reason, skipped.example, skipped.num_files, bad=False)
        report.check(self.num_shards, self.num_lost, "shards")

    @property
    def num_images(self) -> int:
        """Images with or without captions."""
        return self.image_starts[-1]

    def pair(self, number: int) -> tuple[ShardIndex, int]:
        """Return (shard, number of the image in it) for a pair."""
        return self._locate(self.pair_starts, number)

    def image(self, number: int) -> tuple[ShardIndex, int]:
        """Return (shard, number in it) for an image."""
        return self._locate(self.image_starts, number)

    def report(self) -> str:
        """Return one line: how many pairs there are and what was skipped."""
        line = f"{self.folder}: {self.num_pairs} pairs of image and captions in {_shards(len(self.indexes))}"
        line += "".join(f"; skipped {skipped}" for skipped in self.skipped)
        return line + self.unread() if self.num_pairs < self.num_images else line

    def unread(self) -> str:
        """Return other members of the shards: "; not read: 18 *.cap", "; keys of their .json: 'url', 'TEXT'", or ""."""
        counts: Counter[str] = collections.Counter()
        for index in self.indexes:
            counts.update(index.unread)
        keys = [name[len("key ") :] for name, _ in counts.most_common() if name.startswith("key ")]
        suffixes = listed_suffixes(
            collections.Counter({name: count for name, count in counts.items() if not name.startswith("key ")})
        )
        return (f"; not read: {suffixes}" if suffixes else "") + (
            f"; keys of json files without a caption: {', '.join(keys)}" if keys else ""
        )

    def _locate(self, starts: list[int], number: int) -> tuple[ShardIndex, int]:
        shard = bisect.bisect_right(starts, number) - 1
        return self.indexes[shard], number - starts[shard]


def _open_indexes(listing: Listing, folder: Path, members: Members) -> list[ShardIndex]:
    """Return the index of each shard, in order. Several are read at a time to hide latency of disks and networks.

    Concurrent processes start at different shards and later find the indexes of the others. They never wait for each
    other, so there is no deadlock.
    """
    count = len(listing.paths)
    first = os.getpid() * 7919 % count
    order = [*range(first, count), *range(first)]
    indexes: dict[int, ShardIndex] = {}
    last_report = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(_READERS) as executor:
        for shard, index in zip(order, executor.map(lambda i: open_index(listing.paths[i], folder, members), order)):
            indexes[shard] = index
            if time.monotonic() - last_report > _SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                logger.info("reading the headers of shards, once for all runs: %d of %d", len(indexes), count)
    return [indexes[shard] for shard in range(count)]


def open_shards(
    listing: Listing,
    index_folder: PathLike | None = None,
    report: SkipReport | None = None,
    members: Members | None = None,
) -> Shards:
    """Return shards with at least one pair. Everything else is added to `report`.

    Raises UserError if there are no pairs, or if `report` has too many bad pairs or lost shards.
    """
    shards = Shards(listing, index_folder, members)
    if not shards.num_pairs:
        why = "; ".join(str(skipped) for skipped in shards.skipped)
        raise UserError(
            "--input-folder {}: no pair of image and caption in {}{}{}; expected images ({}) and, with the same "
            "name, captions ({}, as text suffix or key in a .json); name others with --shard-images and "
            "--shard-captions".format(
                listing.pattern,
                _shards(len(listing.paths)),
                ": " + why if why else "",
                shards.unread(),
                starred(shards.members.images),
                ", ".join(shards.members.captions),
            )
        )
    if report is not None:
        for skipped in shards.skipped:
            if skipped.reason not in LOST:
                report.add_count(skipped.reason, skipped.example, skipped.num_files, skipped.reason not in UNPAIRED)
        shards.check_lost(report)
        report.check(shards.num_pairs + shards.num_bad)
    return shards


class ImageTextShards(PhotoPairs):
    """Images and captions in shards; unreadable images are replaced and counted, as in folders."""

    neighbours = NEIGHBOURS

    def __init__(
        self, shards: Shards, settings: TextSettings, image_size: int, skipped: SkipReport | None = None
    ) -> None:
        super().__init__(shards, shards.num_pairs, settings, image_size, skipped)
        self._offsets: tuple[ShardIndex, list[int]] | None = None
        self._requested: dict[tuple[str, int], None] = {}  # runs of neighbours read ahead, the latest last

    def captions(self, pair: int) -> list[str]:
        shard, image = self.pairs.pair(pair)
        captions: str = shard.captions(image, self.pairs.files)
        return captions.split("\n")

    def image(self, pair: int) -> torch.Tensor:
        shard, image = self.pairs.pair(pair)
        self._read_ahead(shard, image, pair)
        return load_image(io.BytesIO(shard.content(image, self.pairs.files)), self.image_size)

    def image_name(self, pair: int) -> str:
        shard, image = self.pairs.pair(pair)
        name: str = shard.name(image, self.pairs.files)
        return name

    def _read_ahead(self, shard: ShardIndex, image: int, pair: int) -> None:
        """Read a pair's neighbours ahead, in one piece: they are needed soon (see `order`)."""
        run, place = divmod(pair, NEIGHBOURS)
        if (shard.shard, run) in self._requested:
            return
        self._requested[shard.shard, run] = None
        if len(self._requested) > 2 * WINDOW:
            del self._requested[next(iter(self._requested))]
        last = min(image - place + NEIGHBOURS, shard.num_pairs) - 1
        shard.read_ahead(max(image - place, 0), last, self.pairs.files)

    def origin(self) -> str:
        # Not the pattern: adding shards of the same folder keeps the codes of those encoded before.
        parent: str = self.pairs.parent
        return parent

    def image_identity(self, pair: int) -> str:
        shard, image = self.pairs.pair(pair)
        name = self.pairs.names[shard.shard]
        # Callers go through all images of a shard in order.
        if self._offsets is None or self._offsets[0] is not shard:
            self._offsets = (shard, shard.offsets(self.pairs.files))
        return f"{name} {shard.size} {shard.mtime_ns} {self._offsets[1][image]}"

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        pairs = torch.arange(len(self)) if self._indices is None else self._indices
        return windowed_order(pairs // NEIGHBOURS, WINDOW, seed, epoch)


def _shards(number: int) -> str:
    return "1 shard" if number == 1 else f"{number} shards"
