"""What a run tells: the console and the log file, a progress bar, metrics as JSONL (TensorBoard, wandb), loss.png.

A writer that fails while training runs (a full disk, a lost connection) says so once and is left out from then on.

Lines that benchmarks read are made here, so that their form is fixed in one place: `step_line`, `throughput_line` and
`compiled_line`.
"""
from __future__ import annotations

import collections
import contextlib
import importlib
import json
import logging
import math
import os
import sys
import time
import uuid
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping, Sequence

from tqdm import tqdm

from utils.errors import UserError
from utils.files import PathLike, atomic_write

logger = logging.getLogger(__name__)

# Records logged with `extra=DETAIL` go to the log file, and to the console only where no bar shows the same.
DETAIL = {"detail": True}


# Console and log file ------------------------------------------------------------------------------------------------


class _Console(logging.Handler):
    """Writes to stderr, above a progress bar that may be there instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = [bar for bar in getattr(tqdm, "_instances", ()) if not bar.disable]
        if bars and getattr(record, "detail", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):
            # The terminal went away or stderr was closed: a run goes on without its console.
            pass


class _LogFile(logging.FileHandler):
    """A log file that is given up, with one warning, when it can no longer be written."""

    failed = False

    def _open(self) -> Any:
        # File names may hold bytes that are no text: show them escaped rather than fail.
        return open(self.baseFilename, self.mode, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        if self.failed:
            return
        try:
            if not os.path.exists(self.baseFilename):  # deleted, or its folder: begin a new one
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
            self.close()  # now, for what it still holds would fail again when Python ends
        logger.warning("cannot write the log file %s (%s): going on without it", self.baseFilename, error)


class _PlainFormatter(logging.Formatter):
    """Time and message; the level only where it matters."""

    def format(self, record: logging.LogRecord) -> str:
        record.mark = "" if record.levelno == logging.INFO else record.levelname + ": "
        return super().format(record)


def setup(log_dir: PathLike | None = None, is_main: bool = True, level: int | str = "info",
          file_name: str = "train.log") -> Path | None:
    """Send log records to stderr and, when a folder is given, to the end of `<log_dir>/<file_name>`.

    Only the main process writes; the others show errors alone. May be called again: it replaces what it set up before.
    Returns the log file's path, or None when there is none.
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
        logger.warning("cannot write the log file %s (%s): going on without it", path, error.strerror or error)
        return None
    file.setFormatter(_PlainFormatter("%(asctime)s  %(mark)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    root.addHandler(file)
    return path


# Lines ---------------------------------------------------------------------------------------------------------------


def step_line(step: int, total_steps: int, epoch: int, loss: float, text_loss: float, image_loss: float,
              learning_rate: float, samples_per_second: float) -> str:
    """The line of one optimizer step: `... loss: 2.3651 ... throughput: 85.30 samples/sec`."""
    return ("step {}/{}  epoch {}  loss: {:.4f} (text {:.4f}, image {:.4f})  lr {:.3e}  throughput: {:.2f} samples/sec"
            .format(step, total_steps or "?", epoch, loss, text_loss, image_loss, learning_rate, samples_per_second))


def validation_line(step: int, epoch: int, loss: float, text_loss: float, image_loss: float) -> str:
    """The line of one validation; without the words that benchmarks take for the training loss."""
    return f"validation at step {step}, epoch {epoch}: {loss:.4f} (text {text_loss:.4f}, image {image_loss:.4f})"


def throughput_line(samples_per_second: float) -> str:
    """`throughput: 85.30 samples/sec`"""
    return f"throughput: {samples_per_second:.2f} samples/sec"


def compiled_line(seconds: float) -> str:
    """`Compiled model in 12.3 secs`"""
    return f"Compiled model in {seconds:.1f} secs"


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
    """Counts steps: a bar on a terminal, elsewhere a plain log line every `interval` seconds. Made by `progress`."""

    def __init__(self, total: int | None, desc: str, initial: int, unit: str, is_main: bool, max_seconds: float,
                 interval: float, plain: bool) -> None:
        self.total, self.desc, self.unit, self.count = total, desc, unit, initial
        self._initial = initial
        self._deadline = time.monotonic() + max_seconds if max_seconds else math.inf
        # (time, count, samples) after each of the last updates; the first entry is the start.
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
        """Note that `steps` more are done, with `samples` samples in them; `shown` are numbers to show: loss=2.3."""
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

    @property
    def samples_per_second(self) -> float:
        """Over the last (up to 50) updates; 0.0 before the first."""
        return self._rate(2)

    @property
    def overall_samples_per_second(self) -> float:
        """Since the first update, which is left out because it warms up; of a single update: its own."""
        now, _, samples = self._recent[-1]
        if self._first is None or now <= self._first[0]:
            return self.samples_per_second
        return (samples - self._first[1]) / (now - self._first[0])

    @property
    def seconds_left(self) -> float:
        """Estimate to the last step or the time limit, whichever is first; infinite while unknown."""
        rate = self._rate(1)
        steps = (self.total - self.count) / rate if self.total and rate else math.inf
        return max(0.0, min(steps, self._deadline - time.monotonic()))

    def _rate(self, column: int) -> float:
        first, last = self._recent[0], self._recent[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def postfix(self) -> str:
        """`loss 2.3651, 85.1 samples/s, 3m20s left`"""
        parts = [f"{name} {value:.4f}" for name, value in self._shown.items()]
        if self._samples:
            rate, name = self.samples_per_second, "samples" if self.unit == "step" else self.unit + "s"
            parts.append("{:.{}f} {}/s".format(rate, 1 if rate < 100 else 0, name))
        if math.isfinite(self.seconds_left):
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(parts)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (validation, saving) does not count for samples/s."""
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
        """End the bar; without one, say in a last line how far it went, if any line was due."""
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

    is_main: only the main process shows anything. max_seconds: a time limit that the time left takes into account (0:
    none). interval: seconds between plain lines where stderr is no terminal; plain=False: no such lines, because the
    caller logs its own.
    """
    return Progress(total, desc, initial, unit, is_main, max_seconds, interval, plain)


# Metrics -------------------------------------------------------------------------------------------------------------


class Metrics:
    """Numbers of a run as `<log_dir>/metrics.jsonl`, and to TensorBoard and Weights & Biases when asked.

    One JSON object a line: {"event": "train", "step": 12, "time": 1700000000.0, "loss": 2.3, ...}. Events are "train"
    and "validation" with loss, text_loss and image_loss (what `plot_losses` draws), or any other word. A number that
    is not finite is written as null.

    resume_step: None starts a new file and moves an older one aside (metrics.1.jsonl, ...). A number goes on with the
    file: lines of later steps, which an interrupted run had written after its last checkpoint, are dropped.
    metrics.jsonl is begun by `with` or the first event: a run that fails before leaves an earlier one's where it is.
    Raises UserError when a writer that was asked for is not installed.
    """

    def __init__(self, log_dir: PathLike, is_main: bool = True, tensorboard: bool = False, wandb: bool = False,
                 wandb_project_name: str = "miniDALL-E", wandb_run_name: str | None = None,
                 config: Mapping[str, Any] | None = None, resume_step: int | None = None) -> None:
        self._log_dir = Path(log_dir)
        self.path = self._log_dir / "metrics.jsonl"
        self._writers: dict[str, Any] = {}
        self._begin: Callable[[], _JsonLines] | None = None
        self._known: set[tuple[Any, Any]] = set()  # events at the very step a resumed run starts from
        if not is_main:
            return
        if tensorboard:
            self._add("TensorBoard", lambda: _TensorBoard(self._log_dir / "tensorboard", resume_step))
        if wandb:
            self._add("wandb", lambda: _Wandb(self._log_dir, wandb_project_name, wandb_run_name, config, resume_step))
        self._begin = lambda: self._open_file(resume_step)

    def _add(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self._writers[name] = make()
        except OSError as error:
            logger.warning("%s in %s cannot be written (%s): going on without it", name, self._log_dir,
                           error.strerror or error)

    def _open_file(self, resume_step: int | None) -> _JsonLines:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._prepare_file(resume_step)
        return _JsonLines(self.path)

    def _prepare_file(self, resume_step: int | None) -> None:
        if not self.path.exists():
            return
        if resume_step is None:
            number = 1
            while self.path.with_name(f"metrics.{number}.jsonl").exists():
                number += 1
            os.replace(str(self.path), str(self.path.with_name(f"metrics.{number}.jsonl")))
            return
        kept = [event for event in read_metrics(self.path) if event["step"] <= resume_step]
        self._known = {(event["event"], event["step"]) for event in kept if event["step"] == resume_step}
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(event) + "\n" for event in kept)

    def log(self, event: str, step: int, **values: Any) -> None:
        """Write one event. Values are numbers (also 0-d tensors), text or None."""
        self.__enter__()
        if (event, step) in self._known:
            return
        plain = {key: _plain(value) for key, value in values.items()}
        for name, writer in list(self._writers.items()):
            try:
                writer.write(event, step, plain)
            # Writers are other people's packages, disks and networks: whatever fails there must not end a long run.
            except Exception as error:
                del self._writers[name]
                logger.warning("%s cannot be written any more (%s: %s): training goes on without it",
                               name, type(error).__name__, error)

    def sync(self) -> None:
        """Wait until the lines of metrics.jsonl are on the disk."""
        writer = self._writers.get("metrics.jsonl")
        if writer is not None:
            with contextlib.suppress(OSError):  # the next line that is written will say so
                writer.sync()

    def close(self) -> None:
        """Flush and close every writer."""
        for name, writer in self._writers.items():
            try:
                writer.close()
            except Exception as error:  # as in `log`
                logger.warning("%s could not be closed (%s: %s)", name, type(error).__name__, error)
        self._writers = {}

    def __enter__(self) -> Metrics:
        if self._begin is not None:
            self._add("metrics.jsonl", self._begin)
            self._begin = None
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _plain(value: Any) -> bool | int | float | str | None:
    """A JSON value: None for numbers that JSON does not know."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--{package} needs a package that cannot be imported ({error}): pip install {package}"
        ) from None


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        # Unbuffered: what could not be written must not be tried again when the file is closed.
        self._file: IO[bytes] = open(str(self._path), "ab", buffering=0)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        line = dict({"event": event, "step": step, "time": round(time.time(), 3)}, **values)
        if not self._path.exists():
            logger.warning("%s is gone: a new one begins at step %d", self._path, step)
            self._file.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        rest = (json.dumps(line, allow_nan=False) + "\n").encode("ascii")
        while rest:
            rest = rest[self._file.write(rest):]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        for key, value in _numbers(values):
            self._writer.add_scalar(f"{event}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, project: str, name: str | None, config: Mapping[str, Any] | None,
                 resume_step: int | None) -> None:
        wandb = _import("wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_run_id.txt"
        resumed = resume_step is not None and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if resumed else uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(project=project, name=name, config=dict(config or {}), dir=str(folder), id=run_id,
                                   resume="allow" if resumed else None, settings=wandb.Settings(console="off"))
        except Exception as error:
            # No account, no network, a refused project: all are wandb's own errors.
            raise UserError(f"--wandb: {error} Without an account, set WANDB_MODE=offline") from None
        with atomic_write(id_file) as file:
            file.write(run_id + "\n")

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({f"{event}/{key}": value for key, value in _numbers(values)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in values.items() if isinstance(value, (int, float))]


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; lines that are cut off or no events (a crash, a full disk) are left out."""
    events = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("step"), int) and isinstance(event.get("event"), str):
                events.append(event)
    return events


# Curve ---------------------------------------------------------------------------------------------------------------


def smoothed(values: Sequence[float], half_window: int) -> list[float]:
    """Centred moving average over 2 * half_window + 1 values, fewer at the ends.

    Unlike an exponential average it does not lag, so that a falling training loss is not drawn above the validation
    loss that it really is below.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for index in range(len(values)):
        start, end = max(0, index - half_window), min(len(values), index + half_window + 1)
        result.append((sums[end] - sums[start]) / (end - start))
    return result


def plot_losses(jsonl_path: PathLike, png_path: PathLike) -> bool:
    """Draw the losses of a metrics.jsonl over the optimizer steps: training (raw and smoothed, and its text and image
    parts) and validation. Returns False, and draws nothing, when there is no training loss yet.

    Raises UserError when the file cannot be read.
    """
    # A figure of its own instead of pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    try:
        events = read_metrics(jsonl_path)
    except OSError as error:
        raise UserError(f"cannot read the metrics {jsonl_path}: {error.strerror or error}") from None
    train = _curve(events, "train", "loss")
    if not train[0]:
        return False
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    half = len(train[0]) // 60  # a window of about a thirtieth of the run
    marker = "." if len(train[0]) < 30 else ""  # a short run's curve is hardly a line
    important: list[float] = []
    axes.plot(*train, color="tab:blue", alpha=0.25, linewidth=0.8)
    for key, label, colour, width in (("loss", "train", "tab:blue", 2.0),
                                      ("image_loss", "train: image", "tab:orange", 1.2),
                                      ("text_loss", "train: text", "tab:green", 1.2)):
        steps, values = _curve(events, "train", key)
        if steps:
            values = smoothed(values, half)
            important += values
            axes.plot(steps, values, color=colour, linewidth=width, marker=marker,
                      label=f"{label} {values[-1]:.3f}")
    steps, values = _curve(events, "validation", "loss")
    if steps:
        important += values
        axes.plot(steps, values, color="tab:red", linewidth=1.6, marker="o", markersize=4,
                  label=f"validation {values[-1]:.3f}")
    # Single spikes must not flatten the curves.
    low, high = min(important), max(important)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss after {train[0][-1]:,} steps (smoothed; pale: each step)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    with atomic_write(png_path, "wb") as file:
        figure.savefig(file, format="png")
    return True


def _curve(events: Sequence[Mapping[str, Any]], event: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one number."""
    points = [(item["step"], item[key]) for item in events
              if item["event"] == event and isinstance(item.get(key), (int, float)) and math.isfinite(item[key])]
    return [step for step, _ in points], [value for _, value in points]
