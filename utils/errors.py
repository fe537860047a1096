"""Errors that users cause, and how a script exits with them: one line on stderr, no traceback."""
from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
import time
from typing import Callable, Iterable, NoReturn


class UserError(ValueError):
    """Invalid input. The message is one line that names the flag, file or key and the way out."""


class UsageError(UserError):
    """The command line or a configuration is wrong (exit status 2; any other `UserError`: 1)."""


# PyTorch's prefix to the message of an error in a loader process: the traceback.
_IN_WORKER = re.compile(r"\ACaught \w+ in DataLoader worker process \d+\.\nOriginal Trace.*\n[\w.]+Error: ", re.DOTALL)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with what it returns (None: 0), 2 after `UsageError`, 1 after another `UserError`.

    An `OSError` that names a file also becomes one line (exit status 1): files vanish and disks fill at any time.

    Any other exception is a bug and keeps its traceback.
    """
    from utils import start  # not at import: programs that import the library keep their own error hook

    start.done()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what a terminal's encoding cannot
    try:
        status = main()
    except UserError as error:
        _end(_IN_WORKER.sub("", str(error)), 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        # A file that vanished, a full disk, a name that is too long. Without a file name it is a bug.
        if error.filename is None:
            raise
        name, reason = str(error.filename), error.strerror or type(error).__name__
        shown = name if len(name) <= 300 else name[:300] + "..."
        _end(f"{shown}: {reason}", 1)
    try:
        sys.stderr.flush()
    except OSError:
        # A log on a full disk is no failure: Python would flush again at exit, and exit with 120.
        sys.stderr = open(os.devnull, "w")
    sys.exit(status or 0)


_SECONDS_TO_BE_ENDED = 10.0
"""torchrun ends all processes within a second when one has failed."""


def _end(message: str, status: int) -> NoReturn:
    """Print the message as one line, whatever it holds (file names, prompts), and exit.

    Processes started by torchrun mostly fail for the same reason: local rank 0 reports for all, also to the file whose
    content torchrun prints at the end of its own report.
    """
    line = "error: " + " ".join(message.split())
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_SECONDS_TO_BE_ENDED)
    sys.stderr.write(line + "\n")
    if file:
        sys.stderr.flush()
        with contextlib.suppress(OSError), open(file, "w", encoding="ascii") as report:
            about = {"py_callstack": line, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": line, "extraInfo": about}}, report)
    sys.exit(status)
