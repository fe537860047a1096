"""Pairs in webdataset shards, as img2dataset writes CC3M and CC12M: tar files of images with a .txt or .json each.

    cc3m/{00000..00331}.tar        a pattern (in quotes, for shells expand it too), a glob, one .tar file, or a folder
        000000012.jpg  000000012.json  000000012.txt  000000013.jpg ...        other names: `Members`

The tar files are indexed (data/shard_index.py); from then on they are a data set like a folder. Only the order of an
epoch differs: neighbours in a shard stay together in time, so that slow disks and networks are read in long pieces.
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
"""Pairs that lie one after the other and are visited at about the same time: some 10 MB of images."""

WINDOW = 64
"""Runs of so many neighbours, from all over the data, that are mixed with each other: 16,384 pairs."""

UNPAIRED = ("images without captions", "captions without an image")
"""What is left out without being a bad pair."""

MISSING = "shards that do not exist"
LOST = (MISSING, UNREADABLE, NO_TAR, COMPRESSED)
"""Whole shards, of which nobody knows how many pairs they hold."""

_READERS = 8
_MAX_SHARDS = 1_000_000
_SECONDS_BETWEEN_REPORTS = 30.0
_REMOTE = re.compile(r"(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")


# Which files ----------------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """The shards that a pattern names."""

    pattern: str
    paths: list[str]
    missing: list[str]
    """Those named one by one that are not there."""


def require_folder(folder: str, flag: str = "--input-folder") -> None:
    """Raise UserError unless a folder or shards are there. flag: where the folder comes from."""
    try:
        if find_shards(folder) is None and not os.path.isdir(folder):
            raise UserError(
                f"{flag} {folder}: no such folder; give one with images and captions, or 'demo' for the built-in set"
            )
    except UserError as error:
        raise UserError(str(error).replace("--input-folder", flag)) from error


def find_shards(pattern: str) -> Listing | None:
    """Return the shards that --input-folder names, or None where it names a folder of files.

    A folder counts as shards when .tar files lie in it and no image below it. Raises UserError for remote shards and
    patterns that fit nothing.
    """
    where = f"--input-folder {pattern}: "
    if _REMOTE.match(pattern):
        raise UserError(
            where + "shards are read from disks only, for they are read in any order; fetch them first, then name them "
            "like 'DIR/{00000..00099}.tar'"
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
    # Each range becomes a list in there before the first path comes out.
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?=\.\.|\})", pattern)
    if re.search(r"\d{19}", pattern) or any(abs(int(last) - int(first)) >= _MAX_SHARDS for first, last in ranges):
        raise UserError(f"--input-folder {pattern}: that are more than {_MAX_SHARDS} shards")
    try:
        paths = list(itertools.islice(braceexpand(pattern), _MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"--input-folder {pattern}: a brace has no partner") from error
    if len(paths) > _MAX_SHARDS:
        raise UserError(f"--input-folder {pattern}: that are more than {_MAX_SHARDS} shards")
    return paths


# What is in them ------------------------------------------------------------------------------------------------------


class Shards:
    """Indexed shards. Copies for other processes take the indexes along, but no open file."""

    def __init__(
        self, listing: Listing, index_folder: PathLike | None = None, members: Members | None = None
    ) -> None:
        """index_folder: where indexes are kept; None: ~/.cache/dalle/shards. members: None for the usual ones."""
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
        """Folder that all shards lie in, at some depth."""
        self.names = {path: os.path.relpath(os.path.realpath(path), self.parent) for path in listing.paths}
        """Their names below it."""
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
        """Pairs that are there but cannot be used; a shard that is cut off or damaged counts as one."""
        return sum(skipped.num_files for skipped in self.skipped if skipped.reason not in UNPAIRED + LOST)

    @property
    def num_lost(self) -> int:
        """Shards of which nothing can be used."""
        return sum(skipped.num_files for skipped in self.skipped if skipped.reason in LOST)

    def check_lost(self, report: SkipReport) -> None:
        """Note the shards that are lost. Raises UserError where they are a larger share of all than `report` allows."""
        for skipped in self.skipped:
            if skipped.reason in LOST:
                report.add_count(skipped.reason, skipped.example, skipped.num_files, bad=False)
        report.check(self.num_shards, self.num_lost, "shards")

    @property
    def num_images(self) -> int:
        """Images with or without captions."""
        return self.image_starts[-1]

    def pair(self, number: int) -> tuple[ShardIndex, int]:
        """Return (shard, number of the image in it) of a pair."""
        return self._locate(self.pair_starts, number)

    def image(self, number: int) -> tuple[ShardIndex, int]:
        """Return (shard, number in it) of an image."""
        return self._locate(self.image_starts, number)

    def report(self) -> str:
        """Return one line: how many pairs there are and what was left out."""
        line = f"{self.folder}: {self.num_pairs} pairs of image and captions in {_shards(len(self.indexes))}"
        line += "".join(f"; skipped {skipped}" for skipped in self.skipped)
        return line + self.unread() if self.num_pairs < self.num_images else line

    def unread(self) -> str:
        """Return what else is in the shards: "; not read: 18 *.cap", "; keys of their .json: 'url', 'TEXT'", or ""."""
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
    """Return the index of each shard, in order. Several are read at a time: disks and networks are slow to answer.

    Processes that do this at the same time begin at different shards and find the others' work done when they come to
    it. They do not wait for each other, so none can wait for ever.
    """
    count = len(listing.paths)
    first = os.getpid() * 7919 % count
    order = [*range(first, count), *range(first)]
    indexes: dict[int, ShardIndex] = {}
    told = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(_READERS) as executor:
        for shard, index in zip(order, executor.map(lambda i: open_index(listing.paths[i], folder, members), order)):
            indexes[shard] = index
            if time.monotonic() - told > _SECONDS_BETWEEN_REPORTS:
                told = time.monotonic()
                logger.info("reading the headers of shards, once for all runs: %d of %d", len(indexes), count)
    return [indexes[shard] for shard in range(count)]


def open_shards(
    listing: Listing,
    index_folder: PathLike | None = None,
    report: SkipReport | None = None,
    members: Members | None = None,
) -> Shards:
    """Return shards of which at least one holds a pair. What makes no pair goes to `report`, too.

    Raises UserError where there is no pair, or when `report` allows no more bad ones, or no more shards that are lost.
    """
    shards = Shards(listing, index_folder, members)
    if not shards.num_pairs:
        why = "; ".join(str(skipped) for skipped in shards.skipped)
        raise UserError(
            "--input-folder {}: no pair of image and caption in {}{}{}; expected images ({}) and, with the same "
            "name, captions (of {}, as suffix of a text or key in a .json); name others with --shard-images and "
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
    """Photos and their captions in shards; an unreadable one is replaced by another pair and counted, as in folders."""

    neighbours = NEIGHBOURS

    def __init__(
        self, shards: Shards, settings: TextSettings, image_size: int, skipped: SkipReport | None = None
    ) -> None:
        super().__init__(shards, shards.num_pairs, settings, image_size, skipped)
        self._offsets: tuple[ShardIndex, list[int]] | None = None
        self._asked: dict[tuple[str, int], None] = {}  # runs of neighbours that are being read, the latest last

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
        """Have a pair's neighbours read with it, in one piece, for their turn comes soon (see `order`)."""
        run, place = divmod(pair, NEIGHBOURS)
        if (shard.shard, run) in self._asked:
            return
        self._asked[shard.shard, run] = None
        if len(self._asked) > 2 * WINDOW:
            del self._asked[next(iter(self._asked))]
        last = min(image - place + NEIGHBOURS, shard.num_pairs) - 1
        shard.read_ahead(max(image - place, 0), last, self.pairs.files)

    def origin(self) -> str:
        # Not the pattern: more shards of the same folder leave the codes of those encoded before in use.
        parent: str = self.pairs.parent
        return parent

    def image_identity(self, pair: int) -> str:
        shard, image = self.pairs.pair(pair)
        name = self.pairs.names[shard.shard]
        # Whoever asks for this asks for all images of a shard, one after the other.
        if self._offsets is None or self._offsets[0] is not shard:
            self._offsets = (shard, shard.offsets(self.pairs.files))
        return f"{name} {shard.size} {shard.mtime_ns} {self._offsets[1][image]}"

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        pairs = torch.arange(len(self)) if self._indices is None else self._indices
        return windowed_order(pairs // NEIGHBOURS, WINDOW, seed, epoch)


def _shards(number: int) -> str:
    return "1 shard" if number == 1 else f"{number} shards"
