"""Tensors of many numbered things that several processes compute in parts, which an interrupted run leaves in files.

    parts = Parts(processes, folder)
    found = parts.compute("features", 30000, 32, work)      # {"pooled": (30000, 2048)}, in the order of the numbers
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import make_folder, write_json, writing
from utils.locks import Lock, try_lock
from utils.processes import Processes
from utils.resume import changes, refuse

logger = logging.getLogger(__name__)

_AT_LEAST = 128
"""Things of a file, if there are enough for all processes: what a process loses at most when it is killed."""
_SETTINGS = "settings.json"

Found = Dict[str, Tensor]
"""Tensors whose rows are those of the things."""


class Parts:
    """What processes have computed so far, in files; in memory where a process is alone and nothing is resumed."""

    def __init__(
        self,
        processes: Processes | None = None,
        folder: Path | None = None,
        resume: bool = False,
        temporary: bool = False,
    ) -> None:
        """folder: the same for all processes; None: in memory. resume: take what an earlier run has left there.

        temporary: delete the folder also after an error.
        """
        self.processes, self.folder, self.resume = Processes() if processes is None else processes, folder, resume
        self._in_memory: dict[str, dict[int, Found]] = {}
        self._temporary = temporary
        self._lock: Lock | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process makes figures of what all have computed."""
        return self.processes.is_first

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise UsageError if other settings were resumed. settings: by flag, what results depend on, or some of it."""
        if self.folder is None:
            return
        file = self.folder / _SETTINGS
        if self.folder.is_dir() and any(self.folder.iterdir()) and not file.is_file():
            raise UserError(f"--json: results in progress go to {self.folder}, but that is another folder; rename it")
        if self.resume and file.is_file():
            try:
                saved = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"--resume: {file} cannot be read ({error}); delete {self.folder}") from error
            now = json.loads(json.dumps(settings))
            refuse(changes(saved, now), now, str, str(self.folder), "start without --resume")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Check all settings, and make the folder. Raises UserError."""
        self.check(settings)
        self.processes.barrier("settings are read")
        if self.folder is not None and self.is_first:
            make_folder("--json", self.folder)
            self._lock = try_lock(self.folder)
            if self._lock is None:
                raise UserError(f"--json: another process keeps its results in {self.folder}: wait for it, or give "
                                "another file")
            if not self.resume and (self.folder / _SETTINGS).is_file():
                logger.warning("%s of an interrupted run is deleted: --resume would have continued it", self.folder)
                for file in self.folder.iterdir():
                    file.unlink()
            write_json(self.folder / _SETTINGS, settings, indent=2)
        self.processes.barrier("settings are written")

    def remove(self) -> None:
        """Delete the files, when the result is elsewhere."""
        if self.folder is not None and self.is_first:
            shutil.rmtree(str(self.folder), ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder, also after an error."""
        if self._temporary:
            self.remove()
        if self._lock is not None:
            self._lock.close()

    def compute(
        self,
        name: str,
        count: int,
        batch_size: int,
        work: Callable[[Iterator[range]], Iterator[Found]],
        tell: Callable[[int], Any] | None = None,
    ) -> Found:
        """What `work` finds for `count` things, each done by one process, unless an earlier run did; all wait for all.

        work(batches): yields the tensors of each batch, a range of at most batch_size numbers, in order. Batches do not
        depend on the number of processes. tell: called with the number of things done by all, now and then.
        """
        there = {start: end for start, end in self._there(name)}
        pieces = list(_missing(there, count, self._piece(count, batch_size)))
        self.processes.barrier(f"{name} listed")
        total, shared = sum(map(len, pieces)), (pieces[i] for i in self.processes.share(name, len(pieces)))

        def computed(number: int) -> None:
            done = self.processes.add(f"{name} computed", number)
            if tell is not None:
                tell(count - total + done)

        for numbers, found in _by_piece(shared, batch_size, work, computed):
            self._keep(name, numbers, found)
            self.processes.add(f"{name} kept", len(numbers))
        self.processes.wait(f"{name} kept", total, lambda _: computed(0))
        return self._all(name)

    def _piece(self, count: int, batch_size: int) -> int:
        """Things of a file, a multiple of a batch."""
        each = count // (batch_size * self.processes.size * 2)  # so that all have work until the end
        return batch_size * max(1, min(-(-_AT_LEAST // batch_size), each))

    def _there(self, name: str) -> Iterator[tuple[int, int]]:
        for path in sorted(self.folder.glob(f"{name}-*.safetensors")) if self.folder is not None else ():
            start, end = path.stem[len(name) + 1 :].split("-")
            yield int(start), int(end)

    def _keep(self, name: str, numbers: range, found: Found) -> None:
        if self.folder is None:
            self._in_memory.setdefault(name, {})[numbers.start] = found
            return
        file = self.folder / f"{name}-{numbers.start:09}-{numbers.stop:09}.safetensors"
        with writing("--json: cannot write", file):
            save_tensors(found, file)

    def _all(self, name: str) -> Found:
        if self.folder is None:
            parts = [found for _, found in sorted(self._in_memory.pop(name, {}).items())]
        else:
            parts = []
            for file in sorted(self.folder.glob(f"{name}-*.safetensors")):
                try:
                    parts.append(load_file(str(file)))
                except Exception as error:  # a damaged file raises whatever safetensors raises
                    raise UserError(f"{file} is damaged ({error}): delete it, and continue with --resume") from error
        return joined(parts)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file, of which readers never see a part. Raises OSError."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(part))
        part.replace(file)
    except SafetensorError as error:  # its own class for a full disk
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def joined(parts: list[Found]) -> Found:
    """The rows of all, one after the other; some may lack some tensors."""
    keys = dict.fromkeys(key for found in parts for key in found)
    return {key: torch.cat([found[key] for found in parts if key in found]) for key in keys}


def _missing(there: Mapping[int, int], count: int, size: int) -> Iterator[range]:
    """What lies between the ranges that are there, {start: end}, in pieces of at most so many."""
    done = 0
    for start, end in [*sorted(there.items()), (count, count)]:
        yield from _split(range(done, start), size)
        done = max(done, end)


def _by_piece(
    pieces: Iterator[range],
    batch_size: int,
    work: Callable[[Iterator[range]], Iterator[Found]],
    computed: Callable[[int], Any],
) -> Iterator[tuple[range, Found]]:
    """Feed pieces to `work` in batches, and put together what it yields for each piece. It may run ahead.

    computed: called with the size of each batch that it has yielded.
    """
    taken: deque[range] = deque()

    def batches() -> Iterator[range]:
        for numbers in pieces:
            taken.append(numbers)
            yield from _split(numbers, batch_size)

    parts: list[Found] = []
    for found in work(batches()):
        sizes = [len(batch) for batch in _split(taken[0], batch_size)]
        computed(sizes[len(parts)])
        parts.append(found)
        if len(parts) == len(sizes):
            yield taken.popleft(), joined(parts)
            parts = []


def _split(numbers: range, size: int) -> Iterator[range]:
    for start in range(numbers.start, numbers.stop, size):
        yield range(start, min(start + size, numbers.stop))
