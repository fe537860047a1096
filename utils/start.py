"""Imported first by the commands: errors during their imports become one line, without a traceback.

These are missing packages, and Ctrl-C during imports. `run_main` removes the hook.
"""
from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import TracebackType
from typing import Iterator

ROOT = Path(__file__).resolve().parent.parent


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    missing = (getattr(error, "name", None) or "").partition(".")[0] if kind is ModuleNotFoundError else ""
    if kind is KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
    elif missing and not (ROOT / missing).exists() and not (ROOT / f"{missing}.py").exists():
        made = ROOT / ".venv" / "bin" / "activate"
        way_out = f"enter the environment that run_train.sh made, with `. {made}`"
        if not made.exists():
            way_out = "`bash run_train.sh` makes an environment with all packages, or: pip install -r requirements.txt"
        sys.stderr.write(f"error: {sys.executable} has no package '{missing}': {way_out}\n")
    else:
        _before(kind, error, traceback)


_before, sys.excepthook = sys.excepthook, _tell


def done() -> None:
    """Restore the previous error hook, after all imports."""
    if sys.excepthook is _tell:
        sys.excepthook = _before


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """The hook for imports that come later."""
    sys.excepthook = _tell
    yield  # an error leaves the hook in place
    done()
