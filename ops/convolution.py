"""3x3 convolutions by Winograd's algorithm, and fused GroupNorm and swish, on a CPU without gradients.

A VQGAN with f=16 decodes an image of 256x256 pixels in half the time of PyTorch's direct convolutions. Those already
run at the speed of a matmul; this does a quarter of their arithmetic. Results differ by rounding (5e-6 of the largest),
and depend neither on the rest of the batch nor on the number of threads.

Letters: B images, C channels, H and W height and width of the result.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ops import dispatch
from ops.build import library, pointer

#: Pairs of an input and an output channel up to which weights are transformed: that takes four times the memory.
_MAX_PAIRS = 512 * 256
#: Height times width from which on transforming pays.
_MIN_POSITIONS = 24 * 24
_LANES = 16
"""Floats in the widest vector: kernels take whole vectors."""

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
def _library() -> Any:
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


def images_at_once(like: Tensor) -> int:
    """The best batch size of a convolutional network on the device of this tensor.

    One on a CPU: the batch size decides which of PyTorch's kernels runs, and so the last bits of pixels. This is an
    eighth slower than two, but an image is the same in any batch.
    """
    return 1 if like.is_cpu else 16


@contextlib.contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Compute float32 matmuls in full precision (on GPUs: TF32), whatever is set for the rest of the program."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if like.is_cpu else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def available() -> bool:
    """Whether these kernels run on this machine."""
    return _library() is not None


#: Weight -> what its transform was made from (address and version), and the transform.
_transforms: WeakIdKeyDictionary = WeakIdKeyDictionary()


def conv3x3_refusal(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, doubled: bool = False
) -> str | None:
    """Return why no native kernel runs for these arguments of `conv3x3`, or None if one does."""
    problem = dispatch.refusal(x, weight, residual)
    if problem is not None:
        return problem
    outputs, inputs = weight.shape[:2]
    if torch.is_grad_enabled():
        return "gradients are required"
    if x.shape[2] * x.shape[3] * (4 if doubled else 1) < _MIN_POSITIONS:
        return "too few positions"
    if inputs * outputs > _MAX_PAIRS:
        return "too many channels"
    if inputs % _LANES or outputs % (2 * _LANES):
        return "channels do not fill vectors"
    return None if _library() is not None else "no compiled kernels"


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, doubled: bool = False
) -> Tensor:
    """Convolve x (B, in, H, W), zero-padded by one pixel; or x (B, in, H/2, W/2), upsampled by 2 first (`doubled`).

    weight (out, in, 3, 3). Adds `residual` (B, out, H, W), whose memory may be reused. Returns (B, out, H, W).
    """
    if conv3x3_refusal(x, weight, residual, doubled) is None:
        result = _winograd(x, weight, bias, residual, doubled)
        if result is not None:
            return result
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
    result = F.conv2d(x, weight, bias, padding=1)
    return result if residual is None else add(residual, result)


def _winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, doubled: bool
) -> Tensor | None:
    """`conv3x3` by a kernel. None if a result is not finite: its intermediates overflow earlier than plain sums."""
    kernels = _library()
    x = x.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = x.shape
    if doubled:
        height, width = 2 * height, 2 * width
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    outputs, inputs = weight.shape[:2]
    result = torch.empty(batch, height, width, outputs).permute(0, 3, 1, 2)
    failed = kernels.convolve(
        pointer(x), pointer(_transform_of(weight, kernels)), pointer(bias), pointer(residual), pointer(result),
        batch, height, width, inputs, outputs, doubled, torch.get_num_threads(),
    )  # fmt: skip
    if failed == 1:
        raise MemoryError("not enough memory for the tiles of a convolution")
    return None if failed else result


def _transform_of(weight: Tensor, kernels: Any) -> Tensor:
    made_from = (weight.data_ptr(), weight._version)
    kept: tuple[tuple[int, int], Tensor] | None = _transforms.get(weight)
    if kept is None or kept[0] != made_from:
        kept = _transforms[weight] = made_from, _transformed(weight.detach(), kernels.columns())
    return kept[1]


def group_norm_swish(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm, then swish: x * sigmoid(x). (B, C, H, W) -> (B, C, H, W)."""
    kernels = _library() if _norm_suits(x, weight) else None
    if kernels is None:
        x = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(x, inplace=not torch.is_grad_enabled())  # large maps are slow to page in
    batch, channels, height, width = x.shape
    result = torch.empty_like(x)
    memory = torch.empty(kernels.scratch(batch, height * width, channels))
    kernels.norm_swish(
        pointer(x), pointer(result), pointer(weight), pointer(bias), pointer(memory),
        batch, height * width, channels, groups, eps, True, torch.get_num_threads(),
    )  # fmt: skip
    return result


def _norm_suits(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.shape[1] % _LANES == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and dispatch.suits(x, weight)
    )


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, in place of `branch` if no gradients are recorded."""
    return x + branch if torch.is_grad_enabled() else branch.add_(x)
