"""3x3 convolutions by Winograd's algorithm, and GroupNorm with swish in one go, on a CPU without gradients.

A VQGAN with f=16 decodes an image of 256x256 pixels in half of the time that PyTorch's direct convolutions take, which
run at the speed of a matrix product already: this is a quarter of their arithmetic. Results differ by rounding (5e-6 of
the largest), and do not depend on what else is in the batch or on the number of threads.

Letters: B images, C channels, H and W height and width of the result.
"""

import ctypes
import functools
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.build import library, pointer, usable

#: Products of an input and an output channel up to which weights are transformed: they take four times the memory.
_MAX_PAIRS = 512 * 256
#: Height times width from which on transforming pays.
_MIN_POSITIONS = 24 * 24
_LANES = 16
"""Floats in the widest vectors there are: a kernel takes whole ones."""

# B^T is in convolution.c; this is G of Lavin and Gray.
_G = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)


@functools.lru_cache(maxsize=None)
def _library() -> Optional[ctypes.CDLL]:
    found = library("convolution")
    if found is not None:
        long, whole, address = ctypes.c_long, ctypes.c_int32, ctypes.c_void_p
        found.convolve.argtypes = [address] * 5 + [long] * 5 + [whole] * 2
        found.scratch.argtypes, found.scratch.restype = [long] * 3, long
        found.norm_swish.argtypes = [address] * 5 + [long] * 4 + [ctypes.c_double] + [whole] * 2
        found.norm_swish.restype = None
    return found


def _transformed(weight: Tensor, columns: int) -> Tensor:
    """(out, in, 3, 3) -> (out/columns, 36, in, columns)"""
    matrix = torch.tensor(_G, dtype=torch.float64)
    points = torch.einsum("pk,oikl,ql->pqio", matrix, weight.double(), matrix).flatten(0, 1)  # (36, in, out)
    return points.unflatten(2, (-1, columns)).permute(2, 0, 1, 3).contiguous().float()


class Conv3x3(nn.Conv2d):
    """3x3 with zeros around, one pixel wide: `nn.Conv2d(in_channels, out_channels, 3, padding=1)`, faster."""

    kernels = True
    """Whether kernels of ours may be taken at all; not on an IPU."""
    _packed: Optional[Tuple[Tuple[int, int], Tensor]] = None
    """Transformed weights, and what they were made from."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def __getstate__(self) -> Any:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def forward(self, x: Tensor, residual: Optional[Tensor] = None, doubled: bool = False) -> Tensor:
        """Convolve x (B, in, H, W), or x (B, in, H/2, W/2) with each pixel `doubled` in both directions; add `residual`
        (B, out, H, W), whose memory may be used for the result. -> (B, out, H, W)."""
        result = self._convolve(x, residual, doubled) if self.takes(x, doubled) and usable(residual) else None
        if result is not None:
            return result
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
        result = super().forward(x)
        return result if residual is None else add(residual, result)

    def takes(self, x: Tensor, doubled: bool = False) -> bool:
        """Whether a kernel of ours convolves x."""
        return (
            usable(x, self.weight)
            and self.kernels
            and not torch.is_grad_enabled()
            and x.shape[2] * x.shape[3] * (4 if doubled else 1) >= _MIN_POSITIONS
            and self.in_channels * self.out_channels <= _MAX_PAIRS
            and self.in_channels % _LANES == 0
            and self.out_channels % (2 * _LANES) == 0
            and _library() is not None
        )

    def _convolve(self, x: Tensor, residual: Optional[Tensor], doubled: bool) -> Optional[Tensor]:
        """None where a result is not finite: a kernel's numbers overflow earlier than those of a plain sum."""
        kernels = _library()
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        if doubled:
            height, width = 2 * height, 2 * width
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        result = torch.empty(batch, height, width, self.out_channels).permute(0, 3, 1, 2)
        failed = kernels.convolve(
            pointer(x), pointer(self._weights(kernels)), pointer(self.bias), pointer(residual), pointer(result),
            batch, height, width, self.in_channels, self.out_channels, doubled, torch.get_num_threads(),
        )  # fmt: skip
        if failed == 1:
            raise MemoryError("no memory for a convolution's tiles")
        return None if failed else result

    def _weights(self, kernels: ctypes.CDLL) -> Tensor:
        made_from = (self.weight.data_ptr(), self.weight._version)
        if self._packed is None or self._packed[0] != made_from:
            self._packed = made_from, _transformed(self.weight.detach(), kernels.columns())
        return self._packed[1]


class NormSwish(nn.GroupNorm):
    """GroupNorm, then swish: x * sigmoid(x)."""

    kernels = True
    """Whether kernels of ours may be taken at all; not on an IPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        kernels = _library() if self._takes(x) else None
        if kernels is None:
            x = super().forward(x)
            return F.silu(x, inplace=not torch.is_grad_enabled())  # maps of whole images are slow to page in
        batch, channels, height, width = x.shape
        result = torch.empty_like(x)
        memory = torch.empty(kernels.scratch(batch, height * width, channels))
        kernels.norm_swish(
            pointer(x), pointer(result), pointer(self.weight), pointer(self.bias), pointer(memory),
            batch, height * width, channels, self.num_groups, self.eps, True, torch.get_num_threads(),
        )  # fmt: skip
        return result

    def _takes(self, x: Tensor) -> bool:
        return (
            usable(x, self.weight)
            and self.kernels
            and not torch.is_grad_enabled()
            and x.shape[1] % _LANES == 0
            and x.is_contiguous(memory_format=torch.channels_last)
        )


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, in the place of `branch` where no gradient needs that."""
    return x + branch if torch.is_grad_enabled() else branch.add_(x)
