"""Data loading with worker processes that leave signals to the main process and end with their loader.

    for batch in read(make_loader(dataset, workers=4, batch_size=32)): ...
"""
from __future__ import annotations

import contextlib
import signal
import warnings
from multiprocessing.util import Finalize
from typing import Any, Generator, Iterable

import torch
from torch.utils.data import DataLoader

from utils.interrupts import leave_to_parent

# The number comes from the user or a shipped configuration; too many for a small machine do no harm.
warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")


def make_loader(dataset: Any, workers: int, **options: Any) -> DataLoader:  # type: ignore[type-arg]
    """PyTorch's loader with this many processes (0: load in this one), for `read`. options: of `DataLoader`."""
    # With its own generator: making an iterator must not advance the random state that weights and dropout use.
    return DataLoader(
        dataset, num_workers=workers, worker_init_fn=leave_to_parent, generator=torch.Generator(), **options
    )


def read(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield the batches of `loader`. Its processes end with the generator: at its end, on an error, when it is closed.

    A traceback or a global variable may keep the generator alive: then they end at the exit of the program, which would
    otherwise wait for them forever, because they ignore SIGTERM.
    """
    source = iter(loader)
    # Called at the exit of this process only, before multiprocessing waits for its children.
    at_exit = Finalize(None, _kill_workers, args=(source,), exitpriority=100)
    try:
        yield from source
    finally:
        if hasattr(source, "_shutdown_workers"):  # a traceback may still hold the iterator
            source._shutdown_workers()
        at_exit.cancel()


def _kill_workers(source: Any) -> None:
    alive = [worker for worker in getattr(source, "_workers", ()) if worker.is_alive()]
    if alive:
        with contextlib.suppress(ValueError):  # not in the main thread: handlers do not run here either
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler treats the end of a worker as an error
    for worker in alive:
        worker.kill()
    for worker in alive:
        worker.join()
