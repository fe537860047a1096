"""Reading a data set with processes that leave signals to the main one and never outlive their use.

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

# The number is the user's or that of a published configuration; too many for a small machine wait, and do no harm.
warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")


def make_loader(dataset: Any, workers: int, **options: Any) -> DataLoader:  # type: ignore[type-arg]
    """PyTorch's loader with so many processes (0: this one reads), for `read`. options: as of `DataLoader`."""
    # With a generator of its own: opening a loader must not move the random state that weights and dropout draw from.
    return DataLoader(
        dataset, num_workers=workers, worker_init_fn=leave_to_parent, generator=torch.Generator(), **options
    )


def read(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield what `loader` does. Its processes end with the generator: at its end, on an error, when it is closed.

    A traceback, or a variable of a program that ends, may keep the generator from that: then they end at the exit of
    the program, which would wait for them forever otherwise, because they are deaf to SIGTERM.
    """
    source = iter(loader)
    # Called at the exit of this process, and no other, before multiprocessing waits for its children.
    at_exit = Finalize(None, _kill_workers, args=(source,), exitpriority=100)
    try:
        yield from source
    finally:
        if hasattr(source, "_shutdown_workers"):  # whoever else holds the iterator, as a traceback does
            source._shutdown_workers()
        at_exit.cancel()


def _kill_workers(source: Any) -> None:
    alive = [worker for worker in getattr(source, "_workers", ()) if worker.is_alive()]
    if alive:
        with contextlib.suppress(ValueError):  # not in the main thread, where no handler could run either
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes the end of a worker for an error
    for worker in alive:
        worker.kill()
    for worker in alive:
        worker.join()
