"""Checkpoints of a run: written atomically, listed, pruned, exported.

A run writes `dalle_{epoch}.pt` at the end of each epoch, counted from 0 like the original Mini DALL-E (800 epochs end
with dalle_799.pt), and `dalle_{epoch}_{step}.pt` within an epoch, after `step` optimizer steps since the start of
training. In both, the file's "epoch" counts complete epochs.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints.files import EXPORT_FORMAT, export_digest, verify
from checkpoints.formats import hparams_from_config, to_mini_dalle
from checkpoints.reading import DalleCheckpoint
from checkpoints.trust import aliases, check_state, empty_weights, model_config
from models.config import DalleConfig
from utils.errors import UserError
from utils.files import PathLike, atomic_write

logger = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"dalle_(\d{1,9})(?:_(\d{1,12}))?\.pt")
_LEFTOVER = re.compile(r"\.dalle_\d+(?:_\d+)?\.pt\..*\.tmp")  # left by a killed atomic_write


# ---- writing


def _require_plain(value: Any, where: str) -> None:
    """Raise TypeError for values that `torch.load(weights_only=True)` would refuse: on writing, not on resuming."""
    if type(value) is dict:
        for key, item in value.items():
            _require_plain(key, where + " key")
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool, Tensor, torch.nn.Parameter):
        raise TypeError(f"{where} is a {type(value).__name__}: only tensors and plain values can be read back")


def _write_reason(error: BaseException) -> str:
    """The operating system's message, which torch.save hides in a RuntimeError if a write fails."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0]


def save_checkpoint(path: PathLike, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically, for `torch.load(path, weights_only=True)`.

    Raises TypeError for values that could not be read back, UserError if the file cannot be written (an older file of
    that name is then kept).
    """
    _require_plain(checkpoint, "checkpoint")
    try:
        with atomic_write(path, "wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write the checkpoint {path}: {_write_reason(error)}") from error


def dalle_checkpoint(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    epoch: int,
    opt_state: dict[str, Any] | None = None,
    scheduler_state: dict[str, Any] | None = None,
    hparams_extra: Mapping[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a checkpoint in Mini DALL-E's checkpoint layout, with `config` and `training` added.

    config: `DalleConfig.to_dict()`; state: `DalleModel.state_dict()`; epoch: complete epochs; hparams_extra: options
    about IPUs and precision that Mini DALL-E's `hparams` also hold; training: what a bit-exact resume needs.
    `training` has "tokenizer" and "vqgan" (their identities) and, in "engine", "ema" (averaged weights or None).
    The VQGAN is frozen and not stored, only its identity.
    """
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    model = model_config(config, state)
    check_state(empty_weights(model), state, "the model to be saved")
    return {
        "hparams": hparams_from_config(model, hparams_extra or {}),
        "vae_params": None,
        "epoch": epoch,
        "weights": to_mini_dalle(state),
        "opt_state": opt_state,
        "scheduler_state": scheduler_state,
        "config": model.to_dict(),
        "training": dict(training or {}),
    }


# ---- export


def export_safetensors(
    checkpoint: DalleCheckpoint, path: PathLike, dtype: torch.dtype | None = None, ema: bool = True
) -> None:
    """Write a model's weights and options, without training state, as safetensors.

    dtype: None keeps the stored precision. ema: take the averaged weights if there are any.
    Raises UserError if a weight overflows `dtype` or the file cannot be written.
    """
    from safetensors.torch import save

    weights = checkpoint.ema if ema and checkpoint.ema is not None else checkpoint.weights
    same = aliases(empty_weights(DalleConfig.from_dict(checkpoint.config)))
    tensors = {}
    for name, tensor in weights.items():
        if name in same:
            continue
        # A copy: safetensors refuses tensors that share memory, like the two heads of a Mini DALL-E checkpoint.
        tensors[name] = tensor.detach().cpu().to(dtype or tensor.dtype, copy=True).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise UserError(
                f"weight '{name}' does not fit {tensors[name].dtype} (or is not finite); export without --half"
            )
    metadata = {
        "format": EXPORT_FORMAT,
        "config": json.dumps(checkpoint.config),
        "hparams": json.dumps(checkpoint.hparams),
        "identity": json.dumps(checkpoint.identity),
        "epoch": json.dumps(checkpoint.epoch),
    }
    metadata["sha256"] = export_digest(metadata, tensors)
    try:
        with atomic_write(path, "wb") as file:
            file.write(save(tensors, metadata=metadata))
    except OSError as error:
        raise UserError(f"cannot write {path}: {_write_reason(error)}") from error


# ---- the checkpoints of a run


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """Return the file name for the end of `epoch` (from 0), or for optimizer step `step` within it."""
    return f"dalle_{epoch}.pt" if step is None else f"dalle_{epoch}_{step}.pt"


def list_checkpoints(folder: PathLike) -> list[Path]:
    """Return a run's checkpoints, intact or not, in the order of training, the newest last."""
    found: list[tuple[int, float, Path]] = []
    for path in Path(folder).glob("dalle_*.pt"):
        match = _FILE_NAME.fullmatch(path.name)
        if match and path.is_file():
            found.append((int(match.group(1)), float(match.group(2) or "inf"), path))  # the end of an epoch comes last
    return [path for _, _, path in sorted(found)]


def newest_checkpoint(folder: PathLike, together: bool = False) -> Path | None:
    """Return the newest undamaged checkpoint of a run, or None. Damaged ones are skipped with a warning.

    together: all processes of the process group, if there is one, call this together, and the first verifies for all.
    A process that does not see the file gets None.
    """
    together = together and dist.is_available() and dist.is_initialized()
    paths = [] if together and dist.get_rank() else list_checkpoints(folder)
    found = [next(filter(_is_whole, reversed(paths)), None)]
    if together:
        dist.broadcast_object_list(found)
    return found[0] if found[0] and found[0].is_file() else None


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
        return True
    except UserError as error:
        logger.warning("skipping a checkpoint: %s", error)
        return False


def prune_checkpoints(folder: PathLike, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints of a run (0: keep all) and partial files of a killed process.

    Returns the deleted files. Only the process that writes may call this, after its write. A file that cannot be
    deleted is named in a warning.
    """
    if keep < 0:
        raise ValueError(f"keep must be at least 0, not {keep}")
    old: Iterable[Path] = list_checkpoints(folder)[:-keep] if keep else []
    leftovers = [path for path in Path(folder).glob(".dalle_*.tmp") if _LEFTOVER.fullmatch(path.name)]
    deleted = []
    for path in [*old, *leftovers]:
        try:
            path.unlink()
            deleted.append(path)
        except OSError as error:
            logger.warning("Cannot delete the old checkpoint %s: %s", path, error.strerror)
    return deleted
