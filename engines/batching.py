"""How the global batch of an optimizer step is split into processes and micro-batches."""
from __future__ import annotations

from typing import Iterator, NamedTuple

from torch import Tensor

from utils.errors import UsageError


class Batching(NamedTuple):
    """Each process's part of the global batch: `accumulation` micro-batches of `micro` samples."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def per_rank(self) -> int:
        """Samples of one process in one optimizer step."""
        return self.micro * self.accumulation

    @property
    def global_batch(self) -> int:
        """Samples of all processes in one optimizer step."""
        return self.per_rank * self.world_size

    def describe(self) -> str:
        """`global batch 8 = 2 processes x 1 micro-batch x 4 samples`"""
        processes = f"{self.world_size} process{'es' * (self.world_size > 1)}"
        micro_batches = f"{self.accumulation} micro-batch{'es' * (self.accumulation > 1)}"
        samples = f"{self.micro} sample{'s' * (self.micro > 1)}"
        return f"global batch {self.global_batch} = {processes} x {micro_batches} x {samples}"


def split_batch(global_batch: int, batch_size: int, world_size: int) -> Batching:
    """Split a global batch over processes, in micro-batches of at most `batch_size` samples, all of one size.

    Equal sizes keep the mean of means equal to the mean over all samples, so the result does not depend on the split.
    """
    if global_batch % world_size:
        raise UsageError(
            f"the global batch of {global_batch} (--batch-size x --gradient-accumulation x --replication-factor) "
            f"cannot be split equally over {world_size} processes; change --gradient-accumulation or torchrun's "
            "--nproc-per-node"
        )
    per_rank = global_batch // world_size
    micro = next(size for size in range(min(batch_size, per_rank), 0, -1) if per_rank % size == 0)
    return Batching(micro, per_rank // micro, world_size)


class Rows:
    """The rows of a LongTensor (n, m) as lists, made lazily: those of a long epoch would take gigabytes."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows[index].tolist() for index in range(len(self.rows)))
