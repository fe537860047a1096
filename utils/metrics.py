"""Metrics of a run: metrics.jsonl, TensorBoard and Weights & Biases, and the plot loss.png. See `log`.

A writer that fails during training (a full disk, a lost connection) logs one warning and is disabled.
"""
from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import time
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, Mapping, Sequence

from utils.errors import UserError
from utils.files import PathLike, atomic_write

if TYPE_CHECKING:  # programs that log without PyTorch start faster
    from torch import Tensor

logger = logging.getLogger(__name__)


class Metrics:
    """Writes metrics to `<log_dir>/metrics.jsonl`, and optionally to TensorBoard and Weights & Biases.

    One JSON object per line: {"event": "train", "step": 12, "time": 1700000000.0, "loss": 2.3, ...}. Events are "train"
    and "validation" with loss, text_loss and image_loss (what `plot_losses` draws), or any other word. Non-finite
    numbers are written as null.

    resume_step: None starts a new file and renames an older one (metrics.1.jsonl, ...). A number appends to the file:
    lines of later steps, which an interrupted run wrote after its last checkpoint, are dropped.
    metrics.jsonl is created by `with` or the first event: a run that fails earlier keeps the file of an earlier run.
    Raises UserError when a requested writer is not installed.
    """

    def __init__(self, log_dir: PathLike, is_main: bool = True, tensorboard: bool = False, wandb: bool = False,
                 wandb_project_name: str = "miniDALL-E", wandb_run_name: str | None = None,
                 config: Mapping[str, Any] | None = None, resume_step: int | None = None) -> None:
        self._log_dir = Path(log_dir)
        self.path = self._log_dir / "metrics.jsonl"
        self._writers: dict[str, Any] = {}
        self._begin: Callable[[], _JsonLines] | None = None
        self._known: set[tuple[Any, Any]] = set()  # events already logged at the step where a run resumes
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
            logger.warning("%s in %s cannot be written (%s): continuing without it", name, self._log_dir,
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
        self._each(lambda writer: writer.write(event, step, plain))

    def images(self, event: str, step: int, captions: Sequence[str], images: Tensor) -> None:
        """Write images uint8 (n, 3, H, W) with their captions, to TensorBoard and Weights & Biases alone."""
        self._each(lambda writer: writer.images(event, step, captions, images))

    def _each(self, write: Callable[[Any], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                write(writer)
            # Third-party packages, disks and networks: no failure there may end a long run.
            except Exception as error:
                del self._writers[name]
                logger.warning("%s can no longer be written (%s: %s): training continues without it",
                               name, type(error).__name__, error)

    def sync(self) -> None:
        """Flush metrics.jsonl to disk."""
        writer = self._writers.get("metrics.jsonl")
        if writer is not None:
            with contextlib.suppress(OSError):  # the next write will report it
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
    """A JSON value: None for non-finite numbers."""
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
        # Unbuffered: a failed write must not be retried when the file is closed.
        self._file: IO[bytes] = open(str(self._path), "ab", buffering=0)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        line = dict({"event": event, "step": step, "time": round(time.time(), 3)}, **values)
        if not self._path.exists():
            logger.warning("%s was deleted: starting a new one at step %d", self._path, step)
            self._file.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        rest = (json.dumps(line, allow_nan=False) + "\n").encode("ascii")
        while rest:
            rest = rest[self._file.write(rest):]

    def images(self, event: str, step: int, captions: Sequence[str], images: Tensor) -> None:
        """Nothing: these are files of their own."""

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


_TAG = 80
"""Characters of a caption in the name of an image."""


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        for key, value in _numbers(values):
            self._writer.add_scalar(f"{event}/{key}", value, step)

    def images(self, event: str, step: int, captions: Sequence[str], images: Tensor) -> None:
        for number, (caption, image) in enumerate(zip(captions, images)):
            self._writer.add_image(f"{event}/{number}: {caption[:_TAG]}", image, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, project: str, name: str | None, config: Mapping[str, Any] | None,
                 resume_step: int | None) -> None:
        wandb = _import("wandb", "wandb")
        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_run_id.txt"
        resumed = resume_step is not None and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if resumed else uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(project=project, name=name, config=dict(config or {}), dir=str(folder), id=run_id,
                                   resume="allow" if resumed else None, settings=wandb.Settings(console="off"))
        except Exception as error:
            # No account, no network, a refused project: each has its own error class in wandb.
            raise UserError(f"--wandb: {error} Without an account, set WANDB_MODE=offline") from None
        with atomic_write(id_file) as file:
            file.write(run_id + "\n")

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({f"{event}/{key}": value for key, value in _numbers(values)}, step=step)

    def images(self, event: str, step: int, captions: Sequence[str], images: Tensor) -> None:
        pairs = zip(images.permute(0, 2, 3, 1).numpy(), captions)
        self._run.log({event: [self._wandb.Image(image, caption=caption) for image, caption in pairs]}, step=step)

    def close(self) -> None:
        self._run.finish()


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in values.items() if isinstance(value, (int, float))]


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; truncated and invalid lines (a crash, a full disk) are skipped."""
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

    Unlike an exponential average it does not lag, which would plot a falling training loss above the validation loss.
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
    """Plot the losses of a metrics.jsonl over the optimizer steps: training (raw and smoothed, and its text and image
    parts) and validation. Returns False, and plots nothing, when there is no training loss yet.

    Raises UserError when the file cannot be read.
    """
    # Figure instead of pyplot: no global state, no display.
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
    marker = "." if len(train[0]) < 30 else ""  # a short run has few points
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
    # Scale to the smoothed curves: single spikes must not flatten them.
    low, high = min(important), max(important)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss after {train[0][-1]:,} steps (smoothed; pale: each step)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    with atomic_write(png_path, "wb") as file:
        figure.savefig(file, format="png")
    return True


def _curve(events: Sequence[Mapping[str, Any]], event: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric."""
    points = [(item["step"], item[key]) for item in events
              if item["event"] == event and isinstance(item.get(key), (int, float)) and math.isfinite(item[key])]
    return [step for step, _ in points], [value for _, value in points]
