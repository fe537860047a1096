"""The files of runs: each folder for one run at a time, nothing of an earlier run lost, and errors of one line."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import ContextManager, Iterator, Mapping, Sequence

import torch
from torch import Tensor

import data
from args import Config
from engines import Engine
from utils.errors import UserError
from utils.files import PathLike, writing
from utils.locks import only_writer

logger = logging.getLogger(__name__)


def folders_locked(config: Config, engine: Engine) -> ContextManager[None]:
    """Within the context no other training writes checkpoints, logs or metrics where this one does."""
    folder, own = config.checkpoints.checkpoint_output_dir, [("--log-dir", config.log_dir)]
    if folder:
        own.insert(0, ("--checkpoint-output-dir", Path(folder)))
    return only_writer(*(own if engine.is_main else []))


@contextlib.contextmanager
def reading(state: PathLike, problem: str, way_out: str = "") -> Iterator[None]:
    """Within the context whatever is wrong with the training state of a file is one line.

    The file may be another program's: its weights may be good, its state is none of ours.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"--resume: {state} {problem} ({reason}){way_out}") from error


def check_folders(config: Config) -> None:
    """Raise UserError unless the data that a configuration names is there."""
    options = config.data
    generated = options.generated_data or options.synthetic_data
    for flag, folder in (
        ("--input-folder", None if generated else options.input_folder),
        ("--validation-folder", options.validation_folder),
    ):
        if folder not in (None, data.DEMO):
            data.require_folder(folder, flag)


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first weight that is not finite, None if all are: such weights are never saved."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def move_aside(old: Sequence[Path], name: str, cannot: str, done: str) -> None:
    """Move an earlier run's files, all of one folder, to the first free one in it that `name` makes of 1, 2, ...

    done: what to log, with the new folder at its %s. Raises UserError that begins with `cannot`.
    """
    if not old:
        return
    number = 1
    while old[0].with_name(name.format(number)).exists():
        number += 1
    # Inside the folder, for that is what is known to be writable: it may be a mount point.
    earlier = old[0].with_name(name.format(number))
    with writing(cannot, earlier):
        earlier.mkdir()
        for path in old:
            path.rename(earlier / path.name)
    logger.info(done, earlier)
