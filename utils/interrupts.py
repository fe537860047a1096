"""SIGTERM and Ctrl-C: a run ends at its next step, with all that it has reached saved."""
from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any, Iterator

_AT_ONCE_AFTER = 1.0
"""Seconds between one Ctrl-C and another that means it: launchers pass it on to processes that had it already."""


class Interruption:
    """While entered, SIGTERM ends the program with status 0 and Ctrl-C raises KeyboardInterrupt, as ever; but within
    `deferred()` both are only noted, for the caller to end when it is ready. A second Ctrl-C does not wait.

    Of a process that never enters it, nothing is asked.
    """

    def __init__(self, tell: bool = True) -> None:
        """tell: say on stderr that a signal was heard."""
        self.requested: int | None = None
        """The first signal that was noted."""
        self._tell, self._deferring, self._heard_at = tell, False, 0.0
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """Exit status of a program that ended in good order because it was asked to."""
        return 130 if self.requested == signal.SIGINT else 0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the context signals are noted in `requested` and nothing else."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = number == signal.SIGINT == self.requested and now - self._heard_at > _AT_ONCE_AFTER
        if again or not self._deferring:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(0)
        if self.requested is None:
            self.requested, self._heard_at = number, now
            if self._tell:
                # Not through logging: whatever this interrupts may be writing there.
                again = b"; Ctrl-C again: at once" if number == signal.SIGINT else b""
                with contextlib.suppress(OSError):
                    os.write(2, b"stopping after this step" + again + b"\n")


def leave_to_parent(worker: int = 0) -> None:
    """For processes that read data: signals that go to all processes of a run are the main one's to answer."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
