"""What is known of the images of a run while it goes on: a line of JSON each, appended by several processes.

Each process has a file of its own in the same folder, so that lines never mix; whoever reads takes all files together.
A process may end at any moment: a line that it did not finish is ignored, and no other process appends to its file.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import uuid
from pathlib import Path
from typing import Any, Dict, Iterator

from dalle.reranking import ranked

Record = Dict[str, Any]
"""Of an image: number, file, seed, codes, log_likelihood, and clip_score where images are ranked by it."""


_KEYS = {"number", "file", "seed", "codes", "log_likelihood"}


class Journal:
    """The lines of one group of images. Hidden files: those that read folders of images pass them by."""

    def __init__(self, folder: Path, numbers: range, group: str = "") -> None:
        """numbers: of the images of the group. Files count from the first: it may have another in a later run."""
        self.folder, self.numbers, self._start = folder, numbers, f".part{group}-"
        self._own = folder / f"{self._start}{uuid.uuid4().hex[:12]}.jsonl"

    def append(self, record: Record) -> None:
        """Add a line, when the file of its image is written. It survives the process, after `sync` also the system."""
        line = json.dumps(dict(record, number=record["number"] - self.numbers.start))
        with open(self._own, "ab") as file:
            file.write(line.encode("ascii") + b"\n")

    def sync(self) -> None:
        """Make sure that the lines survive a power failure."""
        with open(self._own, "ab") as file:
            os.fsync(file.fileno())

    def read(self) -> dict[int, Record]:
        """The records of all processes by their number, in order."""
        found = {}
        for record in itertools.chain.from_iterable(map(records_in, self.files())):
            number = record["number"] + self.numbers.start
            if number in self.numbers:
                found[number] = dict(record, number=number)
        return dict(sorted(found.items()))

    def files(self) -> Iterator[Path]:
        """The files of all processes."""
        return iter(sorted(self.folder.glob(f"{self._start}*.jsonl")))

    def remove(self) -> None:
        """Delete them all, when their content is elsewhere."""
        for file in self.files():
            file.unlink()


def records_in(file: Path) -> Iterator[Record]:
    """The records of a journal's file. The last line may not be one: its process was killed."""
    for line in file.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and record.keys() >= _KEYS and isinstance(record["number"], int):
                yield record


def rank(record: Record) -> tuple[float, int]:
    """Orders candidates of a prompt: by CLIP score or likelihood, the best first; those without any come last."""
    return ranked(record.get("clip_score", record["log_likelihood"]), record["number"])
