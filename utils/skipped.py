"""What a run leaves out of its data: counted once, listed in a file, and never silently more than a given share.

    skipped = SkipReport("output/skipped.jsonl", max_bad_fraction=0.01, source="--input-folder data/COCO")
    skipped.add("train2017/000000000009.jpg", "damaged pictures", "image file is truncated")
    skipped.check(total=118287)                     # UserError above 1 % of the samples

The file is the one channel between processes: loader processes and the ranks of a run append to it, one JSON object a
line, and read there what the others found. So each file counts once, whichever process meets it and however often.
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
    """One thing that was left out."""

    path: str
    """A file, or whatever else finds the sample again ("shard-3.tar: 000012.jpg")."""
    reason: str
    """What is wrong with it, as the plural of a kind: "damaged pictures"."""
    detail: str = ""
    """What is wrong with this one."""


def start_report(file: PathLike) -> None:
    """Forget what an earlier run wrote. To be called once, by one process, before any report into `file` is made."""
    with contextlib.suppress(OSError):
        os.unlink(str(file))


class SkipReport:
    """What one source of data left out; several may share a file. Can be pickled for loader processes."""

    def __init__(
        self,
        file: PathLike | None = None,
        max_bad_fraction: float = 0.01,
        source: str = "data",
        flag: str = "--max-bad-fraction",
        is_main: bool = True,
    ) -> None:
        """file: where to list; None: nowhere, and each process counts what it found itself.

        max_bad_fraction: largest share of bad samples that `check` lets pass, 0 to 1; `flag` is where it comes from.
        source: what messages call the data. is_main: whether this process lists what every process finds alike.
        """
        self.file = None if file is None else str(file)
        self.max_bad_fraction, self.source, self.flag, self.is_main = max_bad_fraction, source, flag, is_main
        self._seen: dict[str, str] = {}  # path -> reason of bad samples
        self._kinds: dict[str, list[Any]] = {}  # reason -> [number, example], also of what is no sample
        self._counted = 0  # bad samples that `add_count` was told of
        self._offset = 0
        self._told = False

    # Adding

    def add(self, path: str, reason: str, detail: str = "") -> bool:
        """Note a bad sample, from any process. Returns whether it is new."""
        return self.add_all([Entry(path, reason, detail)]) > 0

    def add_all(self, entries: Iterable[Entry], everywhere: bool = False) -> int:
        """Note bad samples; returns how many are new. everywhere: all processes find these, so one of them lists."""
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
        """Note files that make no sample, such as pictures without a caption: listed and counted, but not as bad.

        To be called where all processes find the same ones.
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
        """Note a kind of which only the number and an example are known, as of an index. To be called by all alike."""
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
        """Bad samples that any process found so far."""
        if self.file is not None and self._size() > self._offset:
            with self._locked(write=False) as file:
                self._read_others(file)
        return len(self._seen) + self._counted

    def kinds(self) -> list[tuple[int, str, str]]:
        """Return (number, reason, example) of each kind of file left out, bad or unused."""
        self.num_bad  # noqa: B018 (reads what other processes found)
        return [(number, reason, example) for reason, (number, example) in sorted(self._kinds.items())]

    def summary(self) -> str:
        """Return "3 damaged pictures (such as x.jpg), 1 ...; all are listed in FILE"; "" when nothing was left out."""
        kinds = ", ".join("{} {} (such as {})".format(*kind) for kind in self.kinds())
        return kinds + (self.where() if kinds else "")

    def where(self) -> str:
        """Return "; all are listed in FILE", or "" where nothing is."""
        return f"; all are listed in {self.file}" if self.file is not None and self._size() else ""

    def check(self, total: int, bad: int | None = None, unit: str = "samples") -> None:
        """Raise UserError when more than `max_bad_fraction` of `total` samples, or other units, are bad.

        bad: how many are; None: all that this report counted as bad samples.
        """
        bad = self.num_bad if bad is None else bad
        if bad <= self.max_bad_fraction * total:
            return
        raise UserError(
            f"{self.source}: {bad} of {total} {unit} cannot be used, more than {self.flag} {self.max_bad_fraction:g} "
            f"allows: {self.summary()}; mend or remove them, or raise {self.flag} to go on without them"
        )

    # The file

    def _size(self) -> int:
        try:
            return os.stat(str(self.file)).st_size
        except OSError:
            return 0

    @contextlib.contextmanager
    def _locked(self, write: bool) -> Iterator[IO[bytes] | None]:
        """Open the file for this process alone; None where that is impossible, which ends no run: it is a report."""
        file: IO[bytes] | None = None
        if self.file is not None and (write or self._size()):
            try:
                if write:
                    os.makedirs(os.path.dirname(os.path.abspath(self.file)), exist_ok=True)
                # Without a buffer: what a full disk does not take must not come back when the file is closed.
                file = open(self.file, "a+b" if write else "rb", buffering=0)
                wait_for_lock(file)
            except OSError as error:
                self._complain(error)
        try:
            yield file
        finally:
            if file is not None:
                file.close()

    def _read_others(self, file: IO[bytes] | None) -> None:
        """Take over what other processes appended since the last look."""
        size = self._size()
        if file is None or size <= self._offset:
            return
        try:
            file.seek(self._offset)
            content = file.read(size - self._offset)
        except OSError as error:
            return self._complain(error)
        end = content.rfind(b"\n") + 1  # a line that a full disk cut is not taken
        self._offset += end
        for line in content[:end].splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line.decode("ascii"))
                # What stands for several was counted by every process itself (add_count).
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
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            logger.warning("cannot list what is left out in %s: %s", self.file, error.strerror or error)
