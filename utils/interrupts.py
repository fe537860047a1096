"""SIGTERM and Ctrl-C: a run stops after the current step and saves its state."""
from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any, Iterator

_FORCE_AFTER = 1.0
"""Seconds before another Ctrl-C forces the exit: launchers forward the first one to processes that already got it."""


class Interruption:
    """Within the context, SIGTERM exits with status 0 and Ctrl-C raises KeyboardInterrupt; within `deferred()` both
    are only recorded, for the caller to stop when it is ready. A second Ctrl-C exits immediately.
    """

    def __init__(self, tell: bool = True) -> None:
        """tell: report a signal on stderr."""
        self.requested: int | None = None
        """The first signal recorded."""
        self._tell, self._deferring, self._received_at = tell, False, 0.0
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """Exit status of a program that a signal stopped cleanly."""
        return 130 if self.requested == signal.SIGINT else 0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the context, signals are only recorded in `requested`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = number == signal.SIGINT == self.requested and now - self._received_at > _FORCE_AFTER
        if again or not self._deferring:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(0)
        if self.requested is None:
            self.requested, self._received_at = number, now
            if self._tell:
                # Not through logging: the interrupted code may be writing there.
                again = b"; Ctrl-C again: immediately" if number == signal.SIGINT else b""
                with contextlib.suppress(OSError):
                    os.write(2, b"stopping after this step" + again + b"\n")


def leave_to_parent(worker: int = 0) -> None:
    """For loader processes: ignore signals sent to the whole process group; the main process handles them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
