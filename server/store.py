"""Pictures that are asked for by URL: in memory, for a limited time and of a limited size in all."""
from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import Callable, NamedTuple


class Stored(NamedTuple):
    """A picture."""

    expires: float
    media_type: str
    content: bytes


class Store:
    """Pictures by names that cannot be guessed. For one thread."""

    def __init__(self, seconds: float, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """seconds: for which pictures are kept. limit: bytes in all; the oldest go first."""
        self.seconds, self.limit, self.clock = seconds, limit, clock
        self.size = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, content: bytes, form: str) -> str:
        """Keep a picture; returns its file name."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._stored[name] = Stored(self.clock() + self.seconds, f"image/{form}", content)
        self.size += len(content)
        while self._stored and (self.size > self.limit or self._oldest().expires <= self.clock()):
            self.size -= len(self._stored.popitem(last=False)[1].content)
        return name

    def get(self, name: str) -> Stored | None:
        """The picture of this name, or None: there is none, or it is no longer kept."""
        found = self._stored.get(name)
        return found if found is not None and found.expires > self.clock() else None

    def _oldest(self) -> Stored:
        return next(iter(self._stored.values()))
