"""Image codes on disk: every image is encoded once, by the first run that trains on it, and later runs read its codes.

    cache = CodeCache(folder, made_with={"vqgan": sha256}, image_size=256, num_codes=1024, codes_per_image=256,
                      encode=function)
    train_set, validation_set = cache.encoded(train_set, validation_set)     # items are now (text, codes)

Codes stay valid as long as everything that they depend on: VQGAN, image size, preprocessing, and the file's name, size
and modification time. Only new, changed or damaged records (data/code_files.py) are encoded, so an interrupted run
resumes where it stopped.
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
"""Preprocessing of data/images.py and data/demo.py. Change this with them, so that old codes are not used."""

_FORMAT = 1
_BATCH = 16
"""Images read, encoded and written at a time: the most that a killed process loses."""

_VISIBILITY_TIMEOUT = 60.0
"""Seconds until a file written by another machine must be visible: network file systems cache."""


class Team(NamedTuple):
    """The processes that encode together."""

    rank: int = 0
    size: int = 1
    mean: Callable[[Tensor], float] | None = None
    """Average of a scalar over all processes; all must call it."""

    def total(self, number: int) -> int:
        """Return the sum of an integer over all processes."""
        if self.mean is None or self.size == 1:
            return int(number)
        return round(self.mean(torch.tensor(float(number), dtype=torch.float64)) * self.size)


class CodeCache:
    """Replaces the images of data sets by cached codes, encoding missing ones."""

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
        """folder: holds the caches of any number of data sets; if it is unusable, `encoded` returns data sets without.

        made_with: what codes depend on besides image and size, as plain values: the VQGAN's weights and configuration.
        encode: images uint8 (b, 3, S, S) -> codes (b, N), integers on the CPU; an image's codes must not depend on b.
        workers: processes that read images. progress(total, what): a context manager with update(steps, samples);
            None: no progress.
        """
        self.folder = Path(folder)
        self.made_with = dict(made_with, image_size=image_size, pixels=PIXEL_RULES, format=_FORMAT)
        self.dtype = record_type(num_codes, codes_per_image)
        self.encode, self.workers, self.progress = encode, workers, progress
        self.team = Team() if team is None else team

    def encoded(
        self, train_set: PairDataset, validation_set: PairDataset | None, positions: Tensor | None = None
    ) -> tuple[Any, Any]:
        """Return the data sets with codes instead of images; unchanged, with a warning, if the cache is unusable.

        positions: LongTensor of the positions in the training set that will be used; None: all. Reading an item at
        another position is an error. Every process must call this.
        """
        try:
            train = self._encoded(train_set, positions)
            return train, None if validation_set is None else self._encoded(validation_set, None)
        except _CacheError as error:
            logger.warning(
                "cannot keep image codes in %s (%s): training continues without them and encodes each image in every "
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
        # Arrays, not sets and lists: with 12 million images those would take gigabytes.
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
            # The replacement of an unreadable image may be an image that was not used so far.
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
        """Encode images without a record, and return the records.

        Each process takes every size-th run of neighbouring rows.
        """
        run = max(1, min(pairs.neighbours * pairs.num_variants, len(rows) // self.team.size))
        share = numpy.arange(len(rows)) // run % self.team.size == self.team.rank
        pending = self._pending(self._collectively(place.read), pairs, rows[share], identities[share])
        if not self.team.total(len(pending)):
            logger.info("codes of all %d images are in %s", len(rows), place.folder)
            return self._visible(place, identities)
        with self._exclusively(place):
            self._collectively(place.prepare if self.team.rank == 0 else None)
            self._wait_for(lambda: self._collectively(place.trusted))
            # Check again: another run may have encoded them while this one waited.
            pending = self._pending(self._collectively(place.read), pairs, rows[share], identities[share])
            total = self.team.total(len(pending))
            logger.info("encoding %d of %d images, once for all runs: %s", total, len(rows), place.folder)
            self._encode(place, pairs, rows[share][pending], identities[share][pending], total)
            return self._visible(place, identities)

    def _pending(
        self, records: Records, pairs: PairDataset, rows: numpy.ndarray, identities: numpy.ndarray
    ) -> numpy.ndarray:
        """Return which of these rows to encode: those without a record, and those that have become readable."""
        found = records.find(identities)
        wanted = found < 0
        known = numpy.nonzero(~wanted)[0]
        for index in known[~records.readable[found[known]]].tolist():
            wanted[index] = _read_image(pairs, int(rows[index])) is not None
        return numpy.nonzero(wanted)[0]

    def _encode(
        self, place: Place, pairs: PairDataset, rows: numpy.ndarray, identities: numpy.ndarray, total: int
    ) -> None:
        """Encode this process's rows (`total`: of all) in rounds, so that no process waits long for another."""
        source = read(_batches(_Images(pairs, rows, identities), self.workers))
        left, writer = len(rows), place.writer()
        shown = self.progress(total, "encoding") if self.progress else contextlib.nullcontext()
        with contextlib.closing(source), contextlib.closing(writer), shown as progress:
            while total:
                batch: list[tuple[int, Tensor | None]] = next(source, [])
                self._collectively(lambda: writer.write(self._records(batch)))  # noqa: B023 (called immediately)
                left -= len(batch)
                before, total = total, self.team.total(left)
                if progress is not None:
                    progress.update(before - total, before - total)
            self._collectively(writer.sync)

    def _records(self, batch: Sequence[tuple[int, Tensor | None]]) -> numpy.ndarray:
        """Return the records of (identity, image or None if unreadable)."""
        records = numpy.zeros(len(batch), dtype=self.dtype)
        images = [image for _, image in batch if image is not None]
        if batch:
            records["image"] = [identity for identity, _ in batch]
            records["readable"] = [image is not None for _, image in batch]
        if images:
            records["codes"][records["readable"] == 1] = self.encode(torch.stack(images)).numpy()
        return sign(records)

    # Several processes, several runs

    def _collectively(self, work: Callable[[], Any] | None) -> Any:
        """Call `work`, which may fail for lack of space or permissions; if it fails in one process, raise in all."""
        result, problem = None, 0
        try:
            result = work() if work is not None else None
        except OSError as error:
            problem = error.errno or errno.EIO
        failed = self.team.total(bool(problem))
        if failed:
            # Processes exchange numbers only; if several failed, they most likely failed for the same reason.
            raise _CacheError(os.strerror(self.team.total(problem) // failed))
        return result

    def _visible(self, place: Place, identities: numpy.ndarray) -> Records:
        """Wait until every process sees all records, and return them."""
        records: list[Records] = []

        def complete() -> bool:
            records[:] = [self._collectively(place.read)]
            return not (records[0].find(identities) < 0).any()

        self._wait_for(complete)
        return records[0]

    def _wait_for(self, seen: Callable[[], bool]) -> None:
        """Wait until `seen` is true in every process."""
        deadline = time.monotonic() + _VISIBILITY_TIMEOUT
        while self.team.total(not seen()):
            if self.team.total(time.monotonic() > deadline):
                raise _CacheError("the processes do not see each other's files; all machines must share this folder")
            time.sleep(0.2)

    @contextlib.contextmanager
    def _exclusively(self, place: Place) -> Iterator[None]:
        """Hold the lock of a place, in the first process for all. They wait together, in short steps."""
        lock: Lock | None = None
        last_report = -60.0
        try:
            while True:
                lock = self._collectively(place.lock if self.team.rank == 0 else None)
                if self.team.total(lock is not None):
                    break
                if time.monotonic() - last_report >= 60:
                    last_report = time.monotonic()
                    logger.info("waiting for %s, which encodes images into %s", place.lock_holder(), place.folder)
                time.sleep(0.5)
            yield
        finally:
            if lock is not None:
                lock.close()


class _CacheError(Exception):
    """Why codes cannot be kept; raised in every process of a team."""


# Images ---------------------------------------------------------------------------------------------------------------


def image_identity(pairs: PairDataset, row: int) -> int:
    """Return a 64-bit hash that identifies the image of a row (see CodesDataset) in its current state."""
    pair, form = divmod(row, pairs.num_variants)
    text = f"{form} {pairs.image_identity(pair)}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _read_image(pairs: PairDataset, row: int) -> Tensor | None:
    """Return the image of a row, uint8 (3, S, S), or None if unreadable."""
    try:
        return pairs.image_variant(*divmod(row, pairs.num_variants))
    except UserError:
        raise
    except BROKEN_IMAGE_ERRORS:
        return None


def _why_unreadable(pairs: PairDataset, pair: int) -> Any:
    """Return why the image of a pair cannot be read: the error, or a message if another process found it."""
    try:
        pairs.image(pair)
    except UserError:
        raise
    except BROKEN_IMAGE_ERRORS as error:
        return error
    return "unreadable when it was encoded"


class _Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """(identity, image or None if unreadable) of some rows, for loader processes."""

    def __init__(self, pairs: PairDataset, rows: numpy.ndarray, identities: numpy.ndarray) -> None:
        self.pairs, self.rows, self.identities = pairs, rows, identities

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        return int(self.identities[index]), _read_image(self.pairs, int(self.rows[index]))


def _batches(images: _Images, workers: int) -> Any:
    """Return lists of images, read by `workers` processes (0: by this one)."""
    if not len(images):
        return ()
    return make_loader(images, min(workers, -(-len(images) // _BATCH)), batch_size=_BATCH, collate_fn=list)
