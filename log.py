"""Output of a run: console and log file, progress bar, metrics as JSONL (TensorBoard, wandb), loss.png.

The format of lines that benchmarks parse is fixed here: `step_line`, `throughput_line` and `compiled_line`.
"""
from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Iterator

from tqdm import tqdm

from utils.files import PathLike
from utils.metrics import Metrics, plot_losses, read_metrics, smoothed

__all__ = ["DETAIL", "RUNNER_MARK", "Metrics", "Progress", "compiled_line", "duration", "plot_losses", "progress",
           "rate", "read_by_runner", "read_metrics", "setup", "smoothed", "step_line", "throughput_line",
           "validation_line"]

logger = logging.getLogger(__name__)

# Records logged with `extra=DETAIL` go to the log file, and to the console only if no progress bar shows the same.
DETAIL = {"detail": True}

#: Environment variable that examples_utils sets for the commands it runs.
RUNNER_MARK = "EXAMPLES_UTILS_MARK"


# Console and log file ------------------------------------------------------------------------------------------------


class _Console(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = [bar for bar in getattr(tqdm, "_instances", ()) if not bar.disable]
        if bars and getattr(record, "detail", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):
            # The terminal is gone or stderr closed: the run continues without its console.
            pass


class _LogFile(logging.FileHandler):
    """A log file that is disabled, with one warning, if it can no longer be written."""

    failed = False

    def _open(self) -> Any:
        # File names may contain bytes that are not text: escape them.
        return open(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        if self.failed:
            return
        try:
            if not os.path.exists(self.baseFilename):  # deleted, or its folder: start a new one
                self.close()
                os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
                self.stream = self._open()
        except OSError:
            self.handleError(record)
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.failed = True
        error = sys.exc_info()[1]
        with contextlib.suppress(OSError, ValueError):
            self.close()  # now: flushing its buffer at exit would fail again
        logger.warning("cannot write the log file %s (%s): continuing without it", self.baseFilename, error)


class _PlainFormatter(logging.Formatter):
    """Time and message; the level unless it is INFO."""

    def format(self, record: logging.LogRecord) -> str:
        record.mark = "" if record.levelno == logging.INFO else record.levelname + ": "
        return super().format(record)


def setup(log_dir: PathLike | None = None, is_main: bool = True, level: int | str = "info",
          file_name: str = "train.log") -> Path | None:
    """Send log records to stderr and, if a folder is given, append them to `<log_dir>/<file_name>`.

    Only the main process writes; the others show only errors. A second call replaces the first set-up.
    Returns the log file's path, or None.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, (_Console, _LogFile))]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level.upper() if isinstance(level, str) else level)
    for noisy in ("matplotlib", "PIL", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    console = _Console(logging.NOTSET if is_main else logging.ERROR)
    console.setFormatter(_PlainFormatter("%(asctime)s  %(mark)s%(message)s", datefmt="%H:%M:%S"))
    root.addHandler(console)
    if log_dir is None or not is_main:
        return None
    path = Path(log_dir) / file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(str(path), mode="a")
    except OSError as error:
        logger.warning("cannot write the log file %s (%s): continuing without it", path, error.strerror or error)
        return None
    file.setFormatter(_PlainFormatter("%(asctime)s  %(mark)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    root.addHandler(file)
    return path


# Lines ---------------------------------------------------------------------------------------------------------------


def step_line(step: int, total_steps: int, epoch: int, loss: float, text_loss: float, image_loss: float,
              learning_rate: float, samples_per_second: float) -> str:
    """The line of one optimizer step: `... loss: 2.3651 ... throughput: 85.3 samples/sec`."""
    return (f"step {step}/{total_steps or '?'}  epoch {epoch}  loss: {loss:.4f} (text {text_loss:.4f}, image "
            f"{image_loss:.4f})  lr {learning_rate:.3e}  {throughput_line(samples_per_second)}")


def validation_line(step: int, epoch: int, loss: float, text_loss: float, image_loss: float) -> str:
    """The line of one validation; without the words that benchmarks parse as the training loss."""
    return f"validation at step {step}, epoch {epoch}: {loss:.4f} (text {text_loss:.4f}, image {image_loss:.4f})"


def throughput_line(per_second: float, unit: str = "samples") -> str:
    """`throughput: 85.3 samples/sec`"""
    return f"throughput: {_three_digits(per_second)} {unit}/sec"


def compiled_line(seconds: float) -> str:
    """`Compiled model in 12.3 secs`"""
    return f"Compiled model in {seconds:.1f} secs"


def read_by_runner() -> bool:
    """Whether a benchmark runner, ours or that of the Poplar SDK, may parse these lines."""
    return RUNNER_MARK in os.environ or "POPLAR_SDK_ENABLED" in os.environ


def rate(per_second: float, unit: str = "images") -> str:
    """`85.3 images/s`, for all rates that benchmarks do not parse."""
    return f"{_three_digits(per_second)} {unit}/s"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """45 -> "45s", 200 -> "3m20s", 3900 -> "1h05m", 100000 -> "1d03h"."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(max(seconds, 0) + 0.5)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{part_unit}"
    return f"{whole}s"


# Progress ------------------------------------------------------------------------------------------------------------


class Progress:
    """Counts steps: a bar on a terminal, else a log line every `interval` seconds. Created by `progress`."""

    def __init__(self, total: int | None, desc: str, initial: int, unit: str, is_main: bool, max_seconds: float,
                 interval: float, plain: bool) -> None:
        self.total, self.desc, self.unit, self.count = total, desc, unit, initial
        self._initial = initial
        self._deadline = time.monotonic() + max_seconds if max_seconds else math.inf
        # (time, count, samples) after each recent update; the first entry is the start.
        self._recent: collections.deque[tuple[float, int, int]] = collections.deque(
            [(time.monotonic(), initial, 0)], maxlen=50
        )
        self._first: tuple[float, int] | None = None  # (time, samples) after the first update
        self._samples = 0
        self._interval = interval if is_main and plain else math.inf
        self._last_line = time.monotonic()
        self._shown: dict[str, float] = {}
        self._bar: Any | None = None
        if is_main and sys.stderr.isatty():
            self._interval = math.inf
            self._bar = tqdm(total=total, initial=initial, desc=desc, unit=unit, file=sys.stderr, dynamic_ncols=True,
                             bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
                             if total else "{desc} {n_fmt} {unit}s [{elapsed}{postfix}]")

    def update(self, steps: int = 1, samples: int = 0, **shown: float) -> None:
        """Count `steps` more steps with `samples` samples; `shown`: numbers to show, such as loss=2.3, or a rate
        {"images/s": 8.5}."""
        now = time.monotonic()
        self.count += steps
        self._samples += samples
        self._recent.append((now, self.count, self._samples))
        self._first = self._first or (now, self._samples)
        self._shown.update(shown)
        if self._bar is not None:
            self._bar.set_postfix_str(self.postfix(), refresh=False)
            self._bar.update(steps)
        elif now - self._last_line >= self._interval:
            self._log_line()

    def reach(self, count: int) -> None:
        """So many samples are done, a step each; fewer than before: nothing new."""
        if count > self.count:
            self.update(count - self.count, count - self.count)

    @property
    def samples_per_second(self) -> float:
        """Over the last (up to 50) updates; 0.0 before the first."""
        return self._rate(2)

    @property
    def overall_samples_per_second(self) -> float:
        """Since the first update, which is excluded as warm-up; with a single update, its own."""
        now, _, samples = self._recent[-1]
        if self._first is None or now <= self._first[0]:
            return self.samples_per_second
        return (samples - self._first[1]) / (now - self._first[0])

    @property
    def seconds_left(self) -> float:
        """Estimated time to the last step or the time limit, whichever comes first; infinite while unknown."""
        rate = self._rate(1)
        steps = (self.total - self.count) / rate if self.total and rate else math.inf
        return max(0.0, min(steps, self._deadline - time.monotonic()))

    def _rate(self, column: int) -> float:
        first, last = self._recent[0], self._recent[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def postfix(self) -> str:
        """`loss 2.3651, 85.1 images/s, 3m20s left`"""
        parts = [rate(value, name[:-2]) if name.endswith("/s") else f"{name} {value:.4f}"
                 for name, value in self._shown.items()]
        if self._samples:
            parts.append(rate(self.samples_per_second, "images" if self.unit == "step" else self.unit + "s"))
        if math.isfinite(self.seconds_left):
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(parts)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within the context (validation, saving) does not count for samples/s."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            self._recent = collections.deque([(at + spent, count, samples) for at, count, samples in self._recent],
                                             maxlen=self._recent.maxlen)
            if self._first is not None:
                self._first = (self._first[0] + spent, self._first[1])

    def _log_line(self) -> None:
        self._last_line = time.monotonic()
        of = f"/{self.total} ({100 * self.count / self.total:.0f}%)" if self.total else ""
        postfix = self.postfix()
        logger.info("%s %d%s %ss%s", self.desc, self.count, of, self.unit, ", " + postfix if postfix else "")

    def close(self) -> None:
        """Close the bar; without one, log a last line, if lines are enabled."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._interval < math.inf and self.count > self._initial:
            self._log_line()
        self._interval = math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def progress(total: int | None, desc: str = "", initial: int = 0, unit: str = "step", is_main: bool = True,
             max_seconds: float = 0.0, interval: float = 30.0, plain: bool = True) -> Progress:
    """Progress of `total` steps (None: unknown), of which `initial` are done; use it in a `with` statement.

    is_main: only the main process shows anything. max_seconds: time limit, for the estimate of the time left (0: none).
    interval: seconds between log lines if stderr is not a terminal; plain=False: no such lines, the caller logs its
    own.
    """
    return Progress(total, desc, initial, unit, is_main, max_seconds, interval, plain)
