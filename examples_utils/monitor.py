"""What is watched while a benchmark runs: a progress line, and the IPUs with --gc-monitor."""

import contextlib
import json
import logging
import shutil
import subprocess
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Iterator, Optional

logger = logging.getLogger(__name__)

GC_MONITOR = "gc-monitor"  # a program of the Poplar SDK
GC_MONITOR_PERIOD = 5.0  # seconds
TERMINAL_PERIOD, LOG_PERIOD = 1.0, 60.0


class Progress:
    """Shows time and the newest line of output: on a terminal in one line that is overwritten, else in the log."""

    def __init__(self, name: str, period: Optional[float] = None) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        self.period = period or (TERMINAL_PERIOD if self._terminal else LOG_PERIOD)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._overwrite("")

    def __call__(self, seconds: float, last_line: str) -> None:
        """Show the progress after so many seconds."""
        elapsed = str(timedelta(seconds=int(seconds)))
        if self._terminal:
            self._overwrite("    {} {}  {}".format(self._name, elapsed, last_line))
        else:
            logger.info("    %s running for %s: %s", self._name, elapsed, last_line)

    def _overwrite(self, text: str) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            shown = "".join(letter if letter.isprintable() else " " for letter in text)[:width]
            sys.stderr.write("\r\033[K" + shown.encode(sys.stderr.encoding or "ascii", "replace").decode(
                sys.stderr.encoding or "ascii"))
            sys.stderr.flush()


@contextlib.contextmanager
def ipu_monitor(path: Path, period: float = GC_MONITOR_PERIOD) -> Iterator[None]:
    """While the context lasts, append what `gc-monitor --json` says every `period` seconds to `path`, one line each."""
    end = threading.Event()

    def watch() -> None:
        with open(str(path), "w", encoding="utf-8") as file:
            while True:
                try:
                    said = subprocess.run([GC_MONITOR, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                          stdin=subprocess.DEVNULL, timeout=60, check=True).stdout
                    stamp = datetime.now().strftime("%Y-%m-%d-%H.%M.%S.%f")
                    file.write(json.dumps(dict({"timestamp": stamp}, **json.loads(said.decode()))) + "\n")
                    file.flush()
                except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
                    logger.warning("--gc-monitor stops: %s", error)
                    return
                if end.wait(period):
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(timeout=10)
