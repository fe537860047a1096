"""Image codes on disk: every image is encoded once, by the first run that trains on it, and only read from then on.

    cache = CodeCache(folder, made_with={"vqgan": sha256}, image_size=256, num_codes=1024, codes_per_image=256,
                      encode=function)
    train_set, validation_set = cache.encoded(train_set, validation_set)     # items are (text, codes) now

The images of a data set keep their codes as long as nothing changes that codes depend on: VQGAN, image size, how pixels
are made of a file, and name, size and time of the file itself. What is new, changed or damaged (data/code_files.py) is
encoded, nothing else; so an interrupted run goes on where it stopped.
"""
from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy
import torch
from torch import Tensor

from data.code_files import CodeRows, Place, Records, record_type, sign
from data.datasets import CodesDataset, PairDataset
from data.images import BROKEN_IMAGE_ERRORS
from utils.errors import UserError
from utils.files import PathLike
from utils.loading import make_loader, read
from utils.locks import Lock

logger = logging.getLogger(__name__)

PIXEL_RULES = "upright, on white, centre square, bilinear (demo: Lanczos); 1"
"""How data/images.py and data/demo.py make pixels of a file. Change this with them, so that old codes are not used."""

_FORMAT = 1
_BATCH = 16
"""Images read, encoded and written at a time: what a killed process loses at most."""

_SECONDS_TO_APPEAR = 60.0
"""How long a file that another machine wrote may take to be seen: network file systems look again only now and then."""


class Team(NamedTuple):
    """The processes that encode together, of which this is one."""

    rank: int = 0
    size: int = 1
    mean: Callable[[Tensor], float] | None = None
    """Average of a scalar over all processes, which must all call it."""

    def total(self, number: int) -> int:
        """Return the sum of a whole number over all processes."""
        if self.mean is None or self.size == 1:
            return int(number)
        return round(self.mean(torch.tensor(float(number), dtype=torch.float64)) * self.size)


class CodeCache:
    """Gives data sets whose images are codes, and makes the codes that are not there yet."""

    def __init__(  # noqa: PLR0913 - by name
        self,
        folder: PathLike,
        *,
        made_with: dict[str, Any],
        image_size: int,
        num_codes: int,
        codes_per_image: int,
        encode: Callable[[Tensor], Tensor],
        team: Team | None = None,
        workers: int = 0,
        progress: Callable[[int, str], Any] | None = None,
    ) -> None:
        """folder: where the caches of any number of data sets lie; where it cannot be used, `encoded` goes on without.

        made_with: what codes depend on besides image and size, as plain values: the VQGAN's weights and configuration.
        encode: images uint8 (b, 3, S, S) -> codes (b, N), integers on the CPU; an image's codes must not depend on b.
        workers: processes that read images. progress(total, what): a context manager with update(steps, samples);
            None: nothing is shown.
        """
        self.folder = Path(folder)
        self.made_with = dict(made_with, image_size=image_size, pixels=PIXEL_RULES, format=_FORMAT)
        self.dtype = record_type(num_codes, codes_per_image)
        self.encode, self.workers, self.progress = encode, workers, progress
        self.team = Team() if team is None else team

    def encoded(
        self, train_set: PairDataset, validation_set: PairDataset | None, positions: Tensor | None = None
    ) -> tuple[Any, Any]:
        """Return the same data sets with codes for images; or as they are, with a warning, where that cannot be.

        positions: LongTensor of those positions in the training set that will be used; None: all. Items elsewhere have
        no codes: asking for one is an error. Every process must call this.
        """
        try:
            train = self._encoded(train_set, positions)
            return train, None if validation_set is None else self._encoded(validation_set, None)
        except _CacheError as error:
            logger.warning(
                "cannot keep image codes in %s (%s): training goes on without them and encodes each image in every "
                "step; name another folder with --cache-codes DIR",
                self.folder,
                error,
            )
            return train_set, validation_set

    def place(self, pairs: PairDataset) -> Place:
        """Return the folder for the codes of a data set's images."""
        manifest = json.loads(json.dumps(dict(self.made_with, images=pairs.origin(), record=str(self.dtype))))
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("ascii")).hexdigest()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(pairs.origin()))[:60]
        return Place(self.folder / f"{name}-{digest[:12]}", manifest, self.dtype)

    def _encoded(self, pairs: PairDataset, positions: Tensor | None) -> CodesDataset:
        place, forms = self.place(pairs), pairs.num_variants
        chosen = range(len(pairs)) if positions is None else positions.tolist()
        # Arrays, not sets and lists: of the 12 million images of a large collection those would take gigabytes.
        used = numpy.unique(numpy.fromiter((pairs.pair_at(index) for index in chosen), numpy.int64, len(chosen)))
        while True:
            rows = (used[:, None] * forms + numpy.arange(forms)).ravel()
            identities = numpy.fromiter((image_identity(pairs, int(row)) for row in rows), "<u8", len(rows))
            records = self._complete(place, pairs, rows, identities)
            found = records.find(identities)
            unreadable = sorted({row // forms for row in rows[~records.readable[found]].tolist()})
            for pair in unreadable:
                pairs.mark_unreadable(pair, _why_unreadable(pairs, pair))
            pairs.check_unreadable()
            # What stands in for an unreadable image need not be among the images that are used for themselves.
            stand_ins = numpy.array([pairs.source(pair) for pair in unreadable], dtype=numpy.int64)
            if numpy.isin(stand_ins, used).all():
                break
            used = numpy.union1d(used, stand_ins)
        if unreadable:
            logger.info("%s", pairs.report())
        where = numpy.full(pairs.num_pairs * forms, -1, dtype=numpy.int64)
        where[rows] = found
        return CodesDataset(pairs, CodeRows(records, where))

    # Encoding

    def _complete(self, place: Place, pairs: PairDataset, rows: numpy.ndarray, identities: numpy.ndarray) -> Records:
        """Encode what has no record, and return the records.

        Of all rows, each process takes every size-th run of such as are best read together.
        """
        run = max(1, min(pairs.neighbours * pairs.num_variants, len(rows) // self.team.size))
        share = numpy.arange(len(rows)) // run % self.team.size == self.team.rank
        pending = self._pending(self._together(place.read), pairs, rows[share], identities[share])
        if not self.team.total(len(pending)):
            logger.info("codes of all %d images are in %s", len(rows), place.folder)
            return self._visible(place, identities)
        with self._alone(place):
            self._together(place.prepare if self.team.rank == 0 else None)
            self._wait_for(lambda: self._together(place.trusted))
            # Once more: another run may have encoded them while this one waited.
            pending = self._pending(self._together(place.read), pairs, rows[share], identities[share])
            total = self.team.total(len(pending))
            logger.info("encoding %d of %d images, once for all runs: %s", total, len(rows), place.folder)
            self._encode(place, pairs, rows[share][pending], identities[share][pending], total)
            return self._visible(place, identities)

    def _pending(
        self, records: Records, pairs: PairDataset, rows: numpy.ndarray, identities: numpy.ndarray
    ) -> numpy.ndarray:
        """Return which of these rows are to be encoded: no record, or unreadable once and readable now."""
        found = records.find(identities)
        wanted = found < 0
        known = numpy.nonzero(~wanted)[0]
        for index in known[~records.readable[found[known]]].tolist():
            wanted[index] = _read_image(pairs, int(rows[index])) is not None
        return numpy.nonzero(wanted)[0]

    def _encode(
        self, place: Place, pairs: PairDataset, rows: numpy.ndarray, identities: numpy.ndarray, total: int
    ) -> None:
        """Encode rows, this process's share of `total`: in rounds, so that no process waits long for another."""
        source = read(_batches(_Pictures(pairs, rows, identities), self.workers))
        left, writer = len(rows), place.writer()
        shown = self.progress(total, "encoding") if self.progress else contextlib.nullcontext()
        with contextlib.closing(source), contextlib.closing(writer), shown as progress:
            while total:
                batch: list[tuple[int, Tensor | None]] = next(source, [])
                self._together(lambda: writer.write(self._records(batch)))  # noqa: B023 (called at once)
                left -= len(batch)
                before, total = total, self.team.total(left)
                if progress is not None:
                    progress.update(before - total, before - total)
            self._together(writer.sync)

    def _records(self, batch: Sequence[tuple[int, Tensor | None]]) -> numpy.ndarray:
        """Return the records of (identity, image or None where it is unreadable)."""
        records = numpy.zeros(len(batch), dtype=self.dtype)
        images = [image for _, image in batch if image is not None]
        if batch:
            records["image"] = [identity for identity, _ in batch]
            records["readable"] = [image is not None for _, image in batch]
        if images:
            records["codes"][records["readable"] == 1] = self.encode(torch.stack(images)).numpy()
        return sign(records)

    # Several processes, several runs

    def _together(self, work: Callable[[], Any] | None) -> Any:
        """Do something that may fail for want of space or rights; if it fails in one process, raise in all."""
        result, problem = None, 0
        try:
            result = work() if work is not None else None
        except OSError as error:
            problem = error.errno or errno.EIO
        failed = self.team.total(bool(problem))
        if failed:
            # Numbers are all that processes exchange; where several failed, they most likely failed alike.
            raise _CacheError(os.strerror(self.team.total(problem) // failed))
        return result

    def _visible(self, place: Place, identities: numpy.ndarray) -> Records:
        """Return the records as soon as every process sees all of them."""
        records: list[Records] = []

        def all_there() -> bool:
            records[:] = [self._together(place.read)]
            return not (records[0].find(identities) < 0).any()

        self._wait_for(all_there)
        return records[0]

    def _wait_for(self, seen: Callable[[], bool]) -> None:
        """Return as soon as every process sees what another one wrote."""
        deadline = time.monotonic() + _SECONDS_TO_APPEAR
        while self.team.total(not seen()):
            if self.team.total(time.monotonic() > deadline):
                raise _CacheError("the processes do not see each other's files; all machines must share this folder")
            time.sleep(0.2)

    @contextlib.contextmanager
    def _alone(self, place: Place) -> Iterator[None]:
        """Hold the lock of a place: the first process for all. They wait together, in short steps."""
        lock: Lock | None = None
        told = -60.0
        try:
            while True:
                lock = self._together(place.lock if self.team.rank == 0 else None)
                if self.team.total(lock is not None):
                    break
                if time.monotonic() - told >= 60:
                    told = time.monotonic()
                    logger.info("waiting for %s, which encodes images into %s", place.lock_holder(), place.folder)
                time.sleep(0.5)
            yield
        finally:
            if lock is not None:
                lock.close()


class _CacheError(Exception):
    """Why codes cannot be kept; raised in every process of a team at once."""


# Images ---------------------------------------------------------------------------------------------------------------


def image_identity(pairs: PairDataset, row: int) -> int:
    """Return 64 bits that name the image of a row (see CodesDataset) as it is now."""
    pair, form = divmod(row, pairs.num_variants)
    text = f"{form} {pairs.image_identity(pair)}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _read_image(pairs: PairDataset, row: int) -> Tensor | None:
    """Return the image of a row, uint8 (3, S, S), or None where it is unreadable."""
    try:
        return pairs.image_variant(*divmod(row, pairs.num_variants))
    except UserError:
        raise
    except BROKEN_IMAGE_ERRORS:
        return None


def _why_unreadable(pairs: PairDataset, pair: int) -> Any:
    """Return why the image of a pair cannot be read: the error, or a text where another process found it."""
    try:
        pairs.image(pair)
    except UserError:
        raise
    except BROKEN_IMAGE_ERRORS as error:
        return error
    return "it was to be encoded"


class _Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """(identity, image or None where it is unreadable) of some rows, for loader processes."""

    def __init__(self, pairs: PairDataset, rows: numpy.ndarray, identities: numpy.ndarray) -> None:
        self.pairs, self.rows, self.identities = pairs, rows, identities

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        return int(self.identities[index]), _read_image(self.pairs, int(self.rows[index]))


def _batches(pictures: _Pictures, workers: int) -> Any:
    """Return lists of pictures, read by so many processes (0: by this one)."""
    if not len(pictures):
        return ()
    return make_loader(pictures, min(workers, -(-len(pictures) // _BATCH)), batch_size=_BATCH, collate_fn=list)
