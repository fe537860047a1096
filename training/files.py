"""The files of runs: one run per folder at a time, earlier runs are kept, and errors are one line."""

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
    """Within the context no other training can write checkpoints, logs or metrics to the same folders."""
    folder, own = config.checkpoints.checkpoint_output_dir, [("--log-dir", config.log_dir)]
    if folder:
        own.insert(0, ("--checkpoint-output-dir", Path(folder)))
    return only_writer(*(own if engine.is_main else []))


@contextlib.contextmanager
def reading(state: PathLike, problem: str, way_out: str = "") -> Iterator[None]:
    """Within the context any error in the training state of a file becomes one line.

    The file may be another program's, with usable weights but a state that is not ours.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"--resume: {state} {problem} ({reason}){way_out}") from error


def check_folders(config: Config) -> None:
    """Raise UserError unless the data folders of a configuration exist and its output folders can."""
    options = config.data
    for flag, folder in (("--log-dir", config.misc.log_dir), ("--cache-codes", options.cache_codes)):
        if folder and Path(folder).is_file():
            raise UserError(f"{flag} {folder}: is a file, not a folder")
    for flag, folder in (
        ("--input-folder", None if options.generated else options.input_folder),
        ("--validation-folder", options.validation_folder),
    ):
        if folder not in (None, data.DEMO):
            data.require_folder(folder, flag)


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first non-finite weight, or None: such weights are never saved."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def move_aside(old: Sequence[Path], name: str, cannot: str, done: str) -> None:
    """Move an earlier run's files, all of one folder, to the first free subfolder `name`.format(1), (2), ...

    done: the message to log, with %s for the subfolder. Raises UserError that begins with `cannot`.
    """
    if not old:
        return
    number = 1
    while old[0].with_name(name.format(number)).exists():
        number += 1
    # Inside the folder, which is known to be writable; it may be a mount point.
    earlier = old[0].with_name(name.format(number))
    with writing(cannot, earlier):
        earlier.mkdir()
        for path in old:
            path.rename(earlier / path.name)
    logger.info(done, earlier)
