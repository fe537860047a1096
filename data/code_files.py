"""Files of image codes: a manifest, records with checksums, and a lock.

    cache/COCO-0123456789ab/
        manifest.json    what the codes were made from and with; on a mismatch all records are ignored
        *.codes          records of equal length; every encoding process appends to its own file
        lock             held by the run that encodes

A record holds the identity of an image, its codes and a checksum over both. So a record that a crash, a full disk or a
bad sector truncated or changed counts as absent, and no file needs to record how far another one was written.
"""
from __future__ import annotations

import bisect
import contextlib
import json
import logging
import os
import uuid
import zlib
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy

from utils.files import atomic_write, write_json
from utils.locks import Lock, holder, try_lock

logger = logging.getLogger(__name__)

_RECORDS_PER_BLOCK = 4096


def record_type(num_codes: int, codes_per_image: int) -> numpy.dtype:
    """Return the dtype of a record: 16-bit codes if the codebook allows."""
    kind = "<u2" if num_codes <= 1 << 16 else "<i4"
    return numpy.dtype([("image", "<u8"), ("readable", "u1"), ("codes", kind, (codes_per_image,)), ("check", "<u4")])


def sign(records: numpy.ndarray) -> numpy.ndarray:
    """Fill in the checksums of records, in place, and return them."""
    records["check"] = _checks(records.tobytes(), records.dtype.itemsize)
    return records


class Records:
    """The records in some files, numbered across all of them. Codes are read from memory-mapped files.

    Files are only appended to, so numbers stay valid. Pickling for another process includes the file names, not their
    content.
    """

    def __init__(self, paths: Sequence[Path], dtype: numpy.dtype) -> None:
        """dtype: of `record_type`. Raises OSError."""
        self.dtype = dtype
        self.paths = [str(path) for path in paths]
        self.starts = [0]
        images, readable, whole = [], [], []
        for path in self.paths:
            for block in _blocks(path, dtype.itemsize):
                records = numpy.frombuffer(block, dtype=dtype)
                images.append(records["image"].copy())
                readable.append(records["readable"] == 1)
                whole.append(records["check"] == _checks(block, dtype.itemsize))
            self.starts.append(sum(map(len, images)))
        self.readable = numpy.concatenate(readable or [numpy.zeros(0, dtype=bool)])
        """Whether the image of each record could be read, (n,)."""
        self.whole = numpy.concatenate(whole or [numpy.zeros(0, dtype=bool)])
        """Whether the checksum of each record is right, (n,)."""
        good = numpy.nonzero(self.whole)[0]
        identities = numpy.concatenate(images or [numpy.zeros(0, dtype="<u8")])[good]
        # Of several records of one image, those with codes come first.
        order = numpy.lexsort((~self.readable[good], identities))
        self._numbers, self._identities = good[order], identities[order]
        self._maps: dict[int, numpy.ndarray] = {}
        for file in range(len(self.paths)):
            self._mapped(file)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _maps={})

    def find(self, identities: numpy.ndarray) -> numpy.ndarray:
        """Return the number of the record of each of these images (n,), or -1."""
        if not len(self._identities):
            return numpy.full(len(identities), -1, dtype=numpy.int64)
        at = numpy.searchsorted(self._identities, identities).clip(max=len(self._identities) - 1)
        return numpy.where(self._identities[at] == identities, self._numbers[at], -1)

    def codes(self, number: int) -> numpy.ndarray:
        """Return the codes of a record, (N,)."""
        file = bisect.bisect_right(self.starts, number) - 1
        row: numpy.ndarray = self._mapped(file)["codes"][number - self.starts[file]]
        return row

    def content(self, file: int) -> bytes:
        """Return the undamaged records of a file."""
        start, end = self.starts[file : file + 2]
        return bytes(self._mapped(file)[self.whole[start:end]].tobytes())

    def _mapped(self, file: int) -> numpy.ndarray:
        if file not in self._maps:
            length = self.starts[file + 1] - self.starts[file]
            if length == 0:  # cannot be mapped
                return numpy.zeros(0, dtype=self.dtype)
            self._maps[file] = numpy.memmap(self.paths[file], dtype=self.dtype, mode="r", shape=(length,))
        return self._maps[file]


class CodeRows:
    """The rows that a CodesDataset reads: `where[row]` is a record number, or -1 for codes that are all -1."""

    def __init__(self, records: Records, where: numpy.ndarray) -> None:
        self.records, self.where = records, where

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, row: int) -> numpy.ndarray:
        if self.where[row] < 0:
            return numpy.full(self.records.dtype["codes"].shape, -1, dtype=numpy.int64)
        return self.records.codes(int(self.where[row]))


class Place:
    """A folder of records, their manifest and lock. It need not exist yet."""

    def __init__(self, folder: Path, manifest: dict[str, Any], dtype: numpy.dtype) -> None:
        """manifest: what the records must have been made from and with, as parsed from JSON."""
        self.folder, self.manifest, self.dtype = folder, manifest, dtype

    def trusted(self) -> bool:
        """Whether the manifest on disk matches. Raises OSError if it cannot be read."""
        try:
            return bool(json.loads((self.folder / "manifest.json").read_text(encoding="utf-8")) == self.manifest)
        except (FileNotFoundError, ValueError):
            return False

    def read(self) -> Records:
        """Return the records. Raises OSError."""
        return Records(self._paths() if self.trusted() else [], self.dtype)

    def prepare(self) -> None:
        """Prepare the place for writing, under its lock: drop damaged records and those of another manifest."""
        if not self.trusted():
            for path in self._paths():
                logger.warning("%s was made from or with something else: rebuilding it", path)
                path.unlink()
            write_json(self.folder / "manifest.json", self.manifest, indent=1, sort_keys=True)
        records = self.read()
        for number, name in enumerate(records.paths):
            if not records.whole[slice(*records.starts[number : number + 2])].all():
                logger.warning("%s holds damaged records: their images are encoded again", name)
                with atomic_write(self._new_path(), "wb") as file:
                    file.write(records.content(number))
                os.unlink(name)  # a run that has it open keeps it

    def writer(self) -> Writer:
        """Return a writer that appends records to a new file."""
        return Writer(self._new_path())

    def lock(self) -> Lock | None:
        """Return the lock, or None if another process holds it. Raises OSError.

        It lasts until it is closed or this process ends: no lock is ever stale.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Without file locks, two concurrent runs only do the same work twice: each writes its own files.
        return try_lock(self.folder / "lock")

    def lock_holder(self) -> str:
        """Return a description of the lock's holder."""
        return holder(self.folder / "lock")

    def _paths(self) -> list[Path]:
        try:
            names = os.listdir(str(self.folder))  # glob silently finds nothing in an unreadable folder
        except FileNotFoundError:
            return []
        return sorted(self.folder / name for name in names if name.endswith(".codes"))

    def _new_path(self) -> Path:
        return self.folder / f"{uuid.uuid4().hex[:16]}.codes"


class Writer:
    """Appends records to a file, which is created with the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any | None = None

    def write(self, records: numpy.ndarray) -> None:
        """Append records. Raises OSError; those written before stay valid."""
        rest = memoryview(records.tobytes())
        while rest:
            if self._file is None:
                self._file = open(str(self.path), "xb", buffering=0)
            rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Flush to disk. Raises OSError."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _blocks(path: str, size: int) -> Iterator[bytes]:
    """Yield the records of a file in blocks. Not memory-mapped: a disk error would kill the process."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:  # another run may just have replaced it
        while True:
            block = file.read(_RECORDS_PER_BLOCK * size)
            if len(block) < size:
                return
            yield block[: len(block) // size * size]


def _checks(block: bytes, size: int) -> list[int]:
    """Return the checksum that the last 4 bytes of each record in a block should hold."""
    view = memoryview(block)
    return [zlib.crc32(view[start : start + size - 4]) for start in range(0, len(block), size)]
