"""torchrun on one machine, without its own traceback and report when a failed process has printed its error.

python -m utils.launch --nproc-per-node 4 train.py --config L16 --input-folder data/COCO
"""
from __future__ import annotations

import logging
import os
import sys
from typing import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with these arguments; return the exit status of the first process that failed, else 0."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, without its four-line warning
    logging.disable(logging.ERROR)
    try:
        run.main(["--standalone", *(sys.argv[1:] if argv is None else argv)])
    except SignalException as error:  # forwarded to the processes, which have ended
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed: it could not print an error
            sys.stderr.write(f"error: process {rank} was killed by {failure.signal_name()}\n")
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
