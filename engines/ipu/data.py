"""Samples in the order in which the replicas take them, and PopTorch's data loader over them."""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from args import Config

#: Largest number of samples that a worker passes on at a time (--async-dataloader).
WORKER_BATCH = 128


def own_epoch(dataset: Any) -> Any:
    """Return a copy of the data set with its own epoch: copies in several processes would otherwise share it."""
    if hasattr(dataset, "subset"):
        return dataset.subset(torch.arange(len(dataset)))
    if hasattr(dataset, "pairs"):  # codes with the captions of another data set
        dataset = copy.copy(dataset)
        dataset.pairs = own_epoch(dataset.pairs)
    return dataset


class Stream(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The samples of one process from a sample of an epoch to the end of the last epoch, in training order.

    It crosses epochs, so that the loader's workers persist and prefetch. Steps of the native engine take the same
    samples: step k from sample s on has order[s + k * global : s + (k + 1) * global], process j the j-th part.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        position: tuple[int, int],
        epochs: int,
        steps: tuple[int, int],
        shares: tuple[int, int, int],
        dtype: Any,
        left: int | None = None,
    ) -> None:
        """position: (epoch, sample) to start from. epochs: where to end. steps: in the rest of that epoch, and in each
        later one. shares: (samples of this process in a step, its index, number of processes). dtype: of images that
        are scaled here; None: bytes stay bytes. left: remaining steps of the run; None: no limit. Loaders must not
        prefetch past them: in a run shorter than an epoch, later images need not have cached codes.
        """
        self.dataset, self.seed, self.dtype = dataset, seed, dtype
        self.first_epoch, self.start = position
        self.first_steps, self.steps_per_epoch = steps
        self.share, self.process, self.processes = shares
        self.steps = self.first_steps + max(epochs - 1 - self.first_epoch, 0) * self.steps_per_epoch
        self.steps = self.steps if left is None else min(self.steps, left)
        self._epoch = -1
        self._own: Any = None
        self._order: list[int] = []

    def __getstate__(self) -> Any:
        return dict(vars(self), _epoch=-1, _own=None, _order=[])  # every worker has its own epoch

    def __len__(self) -> int:
        return self.steps * self.share

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        step, within = divmod(index, self.share)
        epoch, start = self.first_epoch, self.start
        if step >= self.first_steps:
            later, step = divmod(step - self.first_steps, self.steps_per_epoch)
            epoch, start = epoch + 1 + later, 0
        if epoch != self._epoch:
            self._own = own_epoch(self.dataset) if self._own is None else self._own
            self._own.set_epoch(epoch)
            self._order = self.dataset.order(self.seed, epoch).tolist()
            self._epoch = epoch
        place = start + (step * self.processes + self.process) * self.share + within
        text, image = self._own[self._order[place]]
        return text, prepare_image(image, self.dtype)


class Padded(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """One process's part of a data set for evaluation, padded to whole calls of the device, equally many per process.

    Items are (text, image, counts): counts is 1.0, or 0.0 for padding.
    """

    def __init__(self, dataset: Any, process: int, processes: int, multiple: int, dtype: Any) -> None:
        self.dataset, self.dtype = dataset, dtype
        self.process, self.processes = process, processes
        each = -(-len(dataset) // processes)
        self.filled = -(-each // multiple) * multiple

    def __len__(self) -> int:
        return self.filled

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        source = self.process + index * self.processes
        counts = source < len(self.dataset)
        text, image = self.dataset[source if counts else 0]
        return text, prepare_image(image, self.dtype), torch.tensor(float(counts))


def prepare_image(image: Tensor, dtype: Any) -> Tensor:
    """Return codes unchanged, and pixels scaled to [0, 1]; or bytes, which the device scales, if dtype is None."""
    if image.dtype != torch.uint8 or dtype is None:
        return image
    return (image.float() / 255).to(dtype)


def make_loader(poptorch: Any, options: Any, config: Config, samples: Any, ahead: bool) -> Any:
    """Return PopTorch's loader for one pass over samples that are already in their final order.

    ahead: prefetch batches in a separate process.
    """
    workers = config.data.dataloader_workers
    settings: dict[str, Any] = {}
    if ahead:
        run = config.execution
        combined = run.batch_size * options.device_iterations * options.replication_factor
        combined *= options.Training.gradient_accumulation
        settings = {
            "mode": poptorch.DataLoaderMode.AsyncRebatched,
            "rebatched_worker_size": min(combined, WORKER_BATCH),
            "async_options": {"early_preload": True, "load_indefinitely": False},
        }
    return poptorch.DataLoader(
        options,
        samples,
        batch_size=config.execution.batch_size,
        shuffle=False,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        auto_distributed_partitioning=False,
        **settings,
    )
