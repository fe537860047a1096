"""Data that a run skips: counted once, listed in a file, and an error above a given fraction.

    skipped = SkipReport("output/skipped.jsonl", max_bad_fraction=0.01, source="--input-folder data/COCO")
    skipped.add("train2017/000000000009.jpg", "damaged images", "image file is truncated")
    skipped.check(total=118287)                     # UserError above 1 % of the samples

Processes communicate through this file only: loader processes and the ranks of a run append one JSON object per line,
and read what the others found. So each file counts once, whichever processes find it and however often.
"""
from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from typing import IO, Any, Iterable, Iterator, NamedTuple

from utils.errors import UserError
from utils.files import PathLike
from utils.locks import wait_for_lock

logger = logging.getLogger(__name__)

_MAX_DETAIL = 300


class Entry(NamedTuple):
    """One skipped sample or file."""

    path: str
    """A file, or another identification of the sample ("shard-3.tar: 000012.jpg")."""
    reason: str
    """Its kind, as a plural: "damaged images"."""
    detail: str = ""
    """The problem of this one."""


def start_report(file: PathLike) -> None:
    """Delete the report of an earlier run. Call once, in one process, before any report uses `file`."""
    with contextlib.suppress(OSError):
        os.unlink(str(file))


class SkipReport:
    """What was skipped of one data source; several may share a file. Can be pickled for loader processes."""

    def __init__(
        self,
        file: PathLike | None = None,
        max_bad_fraction: float = 0.01,
        source: str = "data",
        flag: str = "--max-bad-fraction",
        is_main: bool = True,
    ) -> None:
        """file: where to list; None: nowhere, and each process counts only what it finds.

        max_bad_fraction: largest fraction of bad samples that `check` accepts, 0 to 1; `flag` sets it.
        source: name of the data in messages. is_main: whether this process lists what all processes find.
        """
        self.file = None if file is None else str(file)
        self.max_bad_fraction, self.source, self.flag, self.is_main = max_bad_fraction, source, flag, is_main
        self._seen: dict[str, str] = {}  # path -> reason of bad samples
        self._kinds: dict[str, list[Any]] = {}  # reason -> [number, example], also of unused files
        self._counted = 0  # bad samples added by `add_count`
        self._offset = 0
        self._warned = False

    # Adding

    def add(self, path: str, reason: str, detail: str = "") -> bool:
        """Record a bad sample, from any process. Returns whether it is new."""
        return self.add_all([Entry(path, reason, detail)]) > 0

    def add_all(self, entries: Iterable[Entry], everywhere: bool = False) -> int:
        """Record bad samples; returns how many are new. everywhere: all processes find these, so the main one lists."""
        entries = [entry for entry in dict.fromkeys(entries) if entry.path not in self._seen]
        if not entries:
            return 0
        listing = self.is_main or not everywhere
        with self._locked(listing) as file:
            self._read_others(file)
            new = [entry for entry in entries if self._note(entry.path, entry.reason)]
            if file is not None and listing and new:
                self._write(file, new, bad=True)
        return len(new)

    def add_unused(self, entries: Iterable[Entry]) -> None:
        """Record unused files, such as images without a caption: listed and counted, but not as bad.

        For files that all processes find.
        """
        entries = list(entries)
        for entry in entries:
            self._count(entry.reason, entry.path)
        if self.is_main and entries:
            with self._locked(write=True) as file:
                if file is not None:
                    self._read_others(file)
                    self._write(file, entries, bad=False)

    def add_count(self, reason: str, example: str, number: int, bad: bool = True) -> None:
        """Record a kind by number and one example, as from an index. To be called in all processes."""
        self._kinds.setdefault(reason, [0, example])[0] += number
        if bad and number == 1:
            self._seen[example] = reason
        elif bad:
            self._counted += number
        if self.is_main:
            with self._locked(write=True) as file:
                if file is not None:
                    self._read_others(file)
                    self._write(file, [Entry(example, reason)], bad, number)

    def _note(self, path: str, reason: str) -> bool:
        if path in self._seen:
            return False
        self._seen[path] = reason
        self._count(reason, path)
        return True

    def _count(self, reason: str, path: str) -> None:
        kind = self._kinds.setdefault(reason, [0, path])
        kind[0] += 1

    # Counting

    @property
    def num_bad(self) -> int:
        """Number of bad samples found so far by any process."""
        if self.file is not None and self._size() > self._offset:
            with self._locked(write=False) as file:
                self._read_others(file)
        return len(self._seen) + self._counted

    def kinds(self) -> list[tuple[int, str, str]]:
        """Return (number, reason, example) of each kind of skipped file, bad or unused."""
        self.num_bad  # noqa: B018 (reads what other processes found)
        return [(number, reason, example) for reason, (number, example) in sorted(self._kinds.items())]

    def summary(self) -> str:
        """Return "3 damaged images (such as x.jpg), 1 ...; all are listed in FILE"; "" when nothing was skipped."""
        kinds = ", ".join("{} {} (such as {})".format(*kind) for kind in self.kinds())
        return kinds + (self.where() if kinds else "")

    def where(self) -> str:
        """Return "; all are listed in FILE", or "" if nothing is listed."""
        return f"; all are listed in {self.file}" if self.file is not None and self._size() else ""

    def check(self, total: int, bad: int | None = None, unit: str = "samples") -> None:
        """Raise UserError when more than `max_bad_fraction` of `total` samples, or other units, are bad.

        bad: number of bad ones; None: all bad samples of this report.
        """
        bad = self.num_bad if bad is None else bad
        if bad <= self.max_bad_fraction * total:
            return
        raise UserError(
            f"{self.source}: {bad} of {total} {unit} cannot be used, more than {self.flag} {self.max_bad_fraction:g} "
            f"allows: {self.summary()}; fix or remove them, or raise {self.flag} to skip them"
        )

    # The file

    def _size(self) -> int:
        try:
            return os.stat(str(self.file)).st_size
        except OSError:
            return 0

    @contextlib.contextmanager
    def _locked(self, write: bool) -> Iterator[IO[bytes] | None]:
        """Open the file under a lock; None if that fails: a report must not end a run."""
        file: IO[bytes] | None = None
        if self.file is not None and (write or self._size()):
            try:
                if write:
                    os.makedirs(os.path.dirname(os.path.abspath(self.file)), exist_ok=True)
                # Unbuffered: a write that failed on a full disk must not be retried when the file is closed.
                file = open(self.file, "a+b" if write else "rb", buffering=0)
                wait_for_lock(file)
            except OSError as error:
                self._warn(error)
        try:
            yield file
        finally:
            if file is not None:
                file.close()

    def _read_others(self, file: IO[bytes] | None) -> None:
        """Read what other processes appended since the last call."""
        size = self._size()
        if file is None or size <= self._offset:
            return
        try:
            file.seek(self._offset)
            content = file.read(size - self._offset)
        except OSError as error:
            return self._warn(error)
        end = content.rfind(b"\n") + 1  # without a last line that a full disk truncated
        self._offset += end
        for line in content[:end].splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line.decode("ascii"))
                # Entries for several samples were counted by every process (add_count).
                if entry["bad"] and entry["number"] == 1 and entry["source"] == self.source:
                    self._note(entry["path"], entry["reason"])

    def _write(self, file: IO[bytes], entries: Iterable[Entry], bad: bool, number: int = 1) -> None:
        lines = [
            json.dumps(
                {
                    "path": entry.path,
                    "reason": entry.reason,
                    "detail": " ".join(entry.detail.split())[:_MAX_DETAIL],
                    "bad": bad,
                    "number": number,  # of this kind, of which this is an example
                    "source": self.source,
                }
            )
            + "\n"
            for entry in entries
        ]
        content = "".join(lines).encode("ascii")
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._offset = file.tell()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("cannot list what is skipped in %s: %s", self.file, error.strerror or error)
