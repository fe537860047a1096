"""What --resume does with options whose values differ from those the run was saved with."""
from __future__ import annotations

from typing import Any, Callable, Collection, Dict, Mapping, Tuple

from utils.errors import UsageError
from utils.files import PathLike

# Every option of a training command handles a new value in one of these ways.
APPLIES = "applies"
"""Applies from the next step on."""
FIXED = "fixed"
"""Refused: weights, optimizer state or data would no longer fit."""
CONTENT = "content"
"""A file that may have moved; refused if its content differs."""
FREE = "free"
"""Accepted, does not affect results: logs, paths, workers."""

Changes = Dict[str, Tuple[Any, Any]]
"""{option: (saved value, value now)}."""


def changes(saved: Any, now: Mapping[str, Any]) -> Changes:
    """Return what differs. Options missing in `saved` (written by an older version) count as unchanged."""
    known = saved if isinstance(saved, Mapping) else {}
    return {name: (known[name], value) for name, value in now.items() if name in known and known[name] != value}


def refuse(found: Changes, fixed: Collection[str], flag: Callable[[str], str], path: PathLike, way_out: str) -> None:
    """Raise UsageError that names the flags of all changes to `fixed` options; `path` is the checkpoint to resume."""
    differing = [
        f"{flag(name)} {_typed(was)}, not {_typed(now)}"
        for name, (was, now) in found.items()
        if name in fixed
    ]
    if differing:
        text = "--resume: {} was written with {}; resume with that, or {}"
        raise UsageError(text.format(path, ", ".join(differing), way_out))


def listed(found: Changes, flag: Callable[[str], str]) -> str:
    """Format changes for the log."""
    return ", ".join(
        f"{flag(name)} {_typed(now)} instead of {_typed(was)}" for name, (was, now) in found.items()
    )


def load_moments(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a PyTorch optimizer's moments; its options (weight decay, betas, ...) stay those of this run."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def _typed(value: Any) -> str:
    """A value as typed on the command line, truncated."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
