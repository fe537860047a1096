"""What --resume does with options that are given anew: other values than the run was saved with."""
from __future__ import annotations

from typing import Any, Callable, Collection, Dict, Mapping, Tuple

from utils.errors import UsageError
from utils.files import PathLike

# Every option of a training command has one of these verdicts on a new value.
APPLIES = "applies"
"""It holds from the next step on."""
FIXED = "fixed"
"""It is refused: weights, optimizer state or data would not fit any more."""
CONTENT = "content"
"""It names a file that may lie elsewhere by now, and is refused where the content is another one."""
FREE = "free"
"""It is taken, and changes no result: logs, paths, workers."""

Changes = Dict[str, Tuple[Any, Any]]
"""{option: (value that the run was saved with, value now)}."""


def changes(saved: Any, now: Mapping[str, Any]) -> Changes:
    """Return what differs. Options that `saved` does not know (an older version wrote it) count as unchanged."""
    known = saved if isinstance(saved, Mapping) else {}
    return {name: (known[name], value) for name, value in now.items() if name in known and known[name] != value}


def refuse(found: Changes, fixed: Collection[str], flag: Callable[[str], str], path: PathLike, way_out: str) -> None:
    """Raise UsageError that names the flags of all changes to `fixed` options; `path` is what was to be resumed."""
    differing = [
        f"{flag(name)} {_typed(was)}, not {_typed(now)}"
        for name, (was, now) in found.items()
        if name in fixed
    ]
    if differing:
        text = "--resume: {} was written with {}; go on with that, or {}"
        raise UsageError(text.format(path, ", ".join(differing), way_out))


def listed(found: Changes, flag: Callable[[str], str]) -> str:
    """Changes for the log."""
    return ", ".join(
        f"{flag(name)} {_typed(now)} instead of {_typed(was)}" for name, (was, now) in found.items()
    )


def load_moments(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer of PyTorch its saved moments; its options (weight decay, betas, ...) stay those of this run."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def _typed(value: Any) -> str:
    """A value as it is typed on the command line, cut short."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
