"""Processes of one program, started by torchrun, that share its work through a few numbers that all of them see.

    with Processes.started() as processes:
        for number in processes.share("batches", 100):      # each number in one process, whoever is free
            ...
        processes.barrier("sampled")

Nothing is sent but counts and small values, through the store that torchrun's processes meet at: no process group.
"""
from __future__ import annotations

import json
import os
import time
from types import TracebackType
from typing import Any, Callable, Iterator, Sequence

from utils.errors import UserError

_SECONDS = 0.05
"""Between two looks at what others have done."""


class Processes:
    """One of `size` processes. Alone by default: then nothing waits for anybody."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        """store: a torch.distributed store, if there is more than one process."""
        self.rank, self.size, self._store = rank, size, store
        self._counts: dict[str, int] = {}

    @classmethod
    def started(cls) -> Processes:
        """Those that torchrun has started, by its environment variables; else this one alone. Raises UserError."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        from torch.distributed import PrefixStore, rendezvous

        try:
            store, rank, size = next(iter(rendezvous("env://")))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"WORLD_SIZE={size}, but the processes cannot meet ({reason}): use torchrun") from error
        return cls(rank, size, PrefixStore("work-" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store))

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all, and merges what all have made."""
        return self.rank == 0

    def add(self, name: str, number: int = 1) -> int:
        """Add to a count that all processes share; returns the new one. 0: only look."""
        if self._store is not None:
            return int(self._ask("add", name, number))
        self._counts[name] = self._counts.get(name, 0) + number
        return self._counts[name]

    def wait(self, name: str, number: int, meanwhile: Callable[[int], Any] | None = None) -> None:
        """Wait until a count has reached this number. meanwhile: called with it now and then."""
        while True:
            found = self.add(name, 0)
            if meanwhile is not None:
                meanwhile(found)
            if found >= number:
                return
            time.sleep(_SECONDS)

    def barrier(self, name: str) -> None:
        """Wait until all processes are here. Each name is used once."""
        self.add(f"barrier {name}")
        self.wait(f"barrier {name}", self.size)

    def once(self, name: str, work: Callable[[], Any]) -> None:
        """Work that the first process to get here does; others wait until it is done."""
        if self.add(f"once {name}") == 1:
            work()
            self.add(f"done {name}")
        else:
            self.wait(f"done {name}", 1)

    def share(self, name: str, count: int) -> Iterator[int]:
        """Numbers below `count`, each yielded in one of the processes, in order, whenever one asks for the next."""
        while (number := self.add(f"next {name}") - 1) < count:
            yield number

    def gather(self, name: str, values: Sequence[Any]) -> list[Any]:
        """All processes' values, as JSON knows them, those of the first process first. Each name is used once."""
        if self._store is None:
            return list(values)
        self._ask("set", f"{name} {self.rank}", json.dumps(values))
        self.barrier(name)
        return [value for rank in range(self.size) for value in json.loads(self._ask("get", f"{name} {rank}"))]

    def _ask(self, what: str, *given: Any) -> Any:
        try:
            return getattr(self._store, what)(*given)
        except RuntimeError as error:
            raise UserError(f"the process that the others meet at has ended ({str(error).splitlines()[0]})") from error

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        """The store may live in the first process: after good work, it waits for the others."""
        if kind is None and self._store is not None:
            self.add("left")
            if self.is_first:
                self.wait("left", self.size)
