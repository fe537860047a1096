"""Which positions of the text part or of the image a forward pass covers, and how to index tables and buffers by them.

A chunk of consecutive positions that are the same in every image and known to the host is a view. Positions that only
the device knows are indices: the same for all images (as a CUDA graph replays), or each image's own.

Letters: B images, n positions of the chunk, N image positions.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Positions(NamedTuple):
    """n positions of the text part or of the image."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    """n"""
    start: Any = None
    """The first (int) of n consecutive positions, the same in every image; None: see `index`."""
    index: Any = None
    """A tensor (1, n) for all images, or (B, n)."""
    text: bool = False
    """Positions of the text part instead of the image."""
    reach: int = 0
    """Image positions of `index` are smaller than this."""

    @classmethod
    def of(cls, index: Tensor, reach: int) -> Positions:
        """Image positions (1, n) or (B, n) that only the device knows, all below `reach`."""
        return cls(index.shape[1], index=index, reach=reach)

    @property
    def end(self) -> int:
        """The chunk's positions are smaller than this."""
        return self.reach if self.start is None else self.start + self.count

    @property
    def shared(self) -> bool:
        """Whether all images have the same positions."""
        return self.index is None or len(self.index) == 1

    def rows(self, table: Tensor) -> Tensor:
        """Rows of a table (N, ...) that all images share: (n, ...), or (B, n, ...) where each has its own."""
        if self.index is None:
            return table[self.start : self.end]
        return table.index_select(0, self.index[0]) if self.shared else table[self.index]

    def take(self, buffer: Tensor, dim: int, offset: int = 0) -> Tensor:
        """Return the entries of a buffer (B, ...) at these positions plus `offset` along `dim`."""
        if self.index is None:
            return buffer.narrow(dim, self.start + offset, self.count)
        if self.shared:
            return buffer.index_select(dim, self.index[0] + offset)
        return buffer.gather(dim, self._expanded(buffer, dim, offset, batch=0))

    def put(self, buffer: Tensor, dim: int, values: Tensor, offset: int = 0, batch: int = 0) -> None:
        """Write entries, indexed as in `take`. batch: the buffer's dimension of images."""
        if self.index is None:
            buffer.narrow(dim, self.start + offset, self.count).copy_(values)
        elif self.shared:
            buffer.index_copy_(dim, self.index[0] + offset, values.to(buffer.dtype))
        else:
            buffer.scatter_(dim, self._expanded(buffer, dim, offset, batch), values.to(buffer.dtype))

    def _expanded(self, buffer: Tensor, dim: int, offset: int, batch: int) -> Tensor:
        shape = [1] * buffer.dim()
        shape[batch], shape[dim] = self.index.shape
        full = list(buffer.shape)
        full[dim] = self.count
        return (self.index + offset).view(shape).expand(full)


def text_positions(start: int, count: int) -> Positions:
    """Consecutive positions of the text part."""
    return Positions(count, start, text=True)


def next_code(start: int) -> Positions:
    """One image position, the same in every image."""
    return Positions(1, start)
