"""Matmuls of a few rows with weights that are read once, and tokens from logits: csrc/rows.c.

Sampling a few images reads all weights for each code, and the arithmetic hides behind that. So weights are laid out
once in the order in which they are read, by several places in turn (a core gets half as much again from memory that
way). Sums go in the same order for any number of rows and threads. Float32 on a CPU; weights may be bfloat16 or int8:
they become float32 when they are read, and all else stays float32. On a processor with a matrix unit (AMX) they stay
what they are, and inputs are split into parts of 8 bits, which is as exact (csrc/tiles.h).

Letters: R rows, D inputs and N outputs of a linear layer, C tokens of a vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import build, dispatch
from ops.build import library, pointer

_LANES = 16
"""Floats in the widest vectors there are."""
_GRAIN = 1 << 18
"""Bytes of a layer's weights below which a further thread takes longer to wait for than it helps."""
_QUADS = 0
"""The size of a weight, as in rows.c, where four lie in a word."""
_BLOCK = 64
"""Bytes of which the depth of tiles for the matrix unit is a multiple."""
address, whole = ctypes.c_void_p, ctypes.c_int64


class Linear(ctypes.Structure):
    """As in rows.c."""

    _fields_ = [(name, address) for name in ("weight", "bias", "scale")]
    _fields_ += [(name, whole) for name in ("depth", "panels", "size", "tiled")]
    _fields_ += [(name, ctypes.c_float) for name in ("limit", "shrink")]


@functools.lru_cache(maxsize=None)
def functions() -> Any:
    """The compiled functions of rows.c, or None."""
    found = library("rows")
    if found is not None:
        found.panel_width.restype = found.room_of.restype = whole
        found.panel_width.argtypes, found.room_of.argtypes = [], [address]
        for pack in (found.pack, found.pack_halves, found.pack_bytes, found.pack_tiles, found.pack_byte_tiles):
            pack.argtypes, pack.restype = [address, whole, whole, whole, whole, address, whole], None
        found.multiplies.argtypes, found.multiplies.restype = [], whole
        found.room_of_rows.argtypes, found.room_of_rows.restype = [address, whole, whole], whole
        found.multiply_rows.argtypes = [address, address, whole, address, address, whole]
        found.multiply_rows.restype = None
        found.sample_rows.argtypes = [address, whole, whole, whole, *[address] * 7, whole]
        found.sample_rows.restype = None
        found.gumbel.argtypes, found.gumbel.restype = [address, whole, address], None
        found.read_text.argtypes, found.read_text.restype = [address, whole, whole, *[address] * 3], None
        found.step.argtypes, found.step.restype = [address, whole, whole, *[address] * 4], whole
        found.advance.argtypes, found.advance.restype = [address, address, whole, whole, address], whole
        found.guess.argtypes, found.guess.restype = [address, address, whole, address], whole
        found.guesses.argtypes, found.guesses.restype = [], whole
        found.read_all.argtypes, found.read_all.restype = [address, whole, whole], ctypes.c_double
    return found


@functools.lru_cache(maxsize=None)
def multiplies() -> bool:
    """Whether bfloat16 and int8 weights are multiplied by a matrix unit."""
    return functions() is not None and bool(functions().multiplies())


def refusal(*tensors: Tensor | None, halves: bool = False) -> str | None:
    """Why these functions may not compute with these tensors, or None where they may. halves: also with bfloat16."""
    refused = dispatch.refusal(*tensors, dtypes=(torch.float32, torch.bfloat16) if halves else (torch.float32,))
    if refused is None and functions() is None:
        return build.reasons.get("rows", "no compiled kernels")
    return refused


def at(tensor: Tensor | None, row: int = 0) -> int | None:
    """The address of a tensor's memory, or of a row of a matrix."""
    return None if tensor is None else tensor[row:].data_ptr()


def read_all(x: Tensor) -> float | None:
    """Return the sum of x (float32), read as fast as memory allows, or None where there are no kernels.

    One place at a time gives a core two thirds of what several in turn give it: this is the limit of what sampling one
    image can reach, and `torch.sum` is not.
    """
    if not x.is_contiguous() or refusal(x) is not None:
        return None
    return functions().read_all(pointer(x), x.numel(), torch.get_num_threads())


def threads_for(layer: int) -> int:
    """How many threads share the work of a layer of so many bytes."""
    return max(1, min(torch.get_num_threads(), layer // _GRAIN))


class Packed:
    """A linear layer whose weight (N, D) lies in panels. gated: its second half of outputs gates the first.

    int8 weights are scaled after the sum, not before: that is finite for inputs up to 1e34.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, gated: bool = False
    ) -> None:
        """weight (N, D) float32, bfloat16, or int8 with scales (N,); bias (N,) float32 or bfloat16."""
        size, weight = weight.element_size(), weight.detach()
        self.library, self.threads = functions(), threads_for(weight.numel() * size * 4)  # one matmul of some four
        self.outputs, depth = weight.shape
        tiled = size < 4 and multiplies()
        weight, limit, shrink = _for_unit(weight) if tiled else (weight, 0.0, 1.0)
        panel = self.library.panel_width()
        width = panel // 2 if gated else panel  # outputs of each half, or of all, in a panel
        panels = -(-(self.outputs // 2 if gated else self.outputs) // width)

        own = self.library
        packs = {1: own.pack_byte_tiles, 2: own.pack_tiles} if tiled else {1: own.pack_bytes, 2: own.pack_halves}

        def packed(values: Tensor, depth: int, padded: int, pack: Any = own.pack) -> Tensor:
            values, result = values.detach().contiguous(), values.new_empty(panels * panel * padded)
            pack(pointer(values), self.outputs, depth, padded, gated, pointer(result), self.threads)
            return result

        bias = weight.new_zeros(self.outputs) if bias is None else bias
        padded = depth + -depth % (_BLOCK // size) if tiled else depth
        self.weight, self.bias = packed(weight, depth, padded, packs.get(size, own.pack)), packed(bias.float(), 1, 1)
        self.scale = None if scale is None else packed(scale, 1, 1)
        self.bytes = self.weight.numel() * size
        addresses = map(at, (self.weight, self.bias, self.scale))
        self.struct = Linear(*addresses, depth, panels, size, tiled, limit, shrink)

    @classmethod
    def rough(cls, weight: Tensor, bias: Tensor | None, scale: Tensor, gated: bool = False) -> Packed:
        """For guesses: of int8 weights (N, D), by matmuls whose inputs are rounded to a byte too."""
        depth = weight.shape[1]
        words = F.pad(weight, (0, -depth % 4)).view(torch.int32)
        words = torch.cat([-128 * weight.sum(dim=1, keepdim=True, dtype=torch.int32), words], dim=1)
        packed = cls(words.view(torch.float32), bias, scale, gated)
        packed.struct.depth, packed.struct.size = depth, _QUADS
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        """(R, D) -> (R, N), not for gated ones."""
        x, rows = x.contiguous(), len(x)
        own = ctypes.byref(self.struct)
        out = x.new_empty(rows, len(self.bias))
        room = x.new_empty(self.library.room_of_rows(own, rows, self.threads))
        self.library.multiply_rows(own, pointer(x), rows, pointer(out), pointer(room), self.threads)
        return out[:, : self.outputs]


def _for_unit(weight: Tensor) -> tuple[Tensor, float, float]:
    """Weights for tiles.h, the largest input with which their sums are finite, and what undoes their scale."""
    depth = weight.shape[1]
    if weight.dtype == torch.int8:
        return weight, 2.0**127 if depth < 2**16 else -1.0, 1.0
    largest = float(weight.abs().max())
    if not largest < 2.0**120:  # rare, so by vectors
        return weight, -1.0, 1.0
    return weight * 128, min(2.0**86, 2.0**95 / depth / max(largest, 2.0**-126)), 1 / 128


def sample(logits: Tensor, state: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.sampling_ops.sample`: logits (R, C), the others (R,) -> tokens (R,), log-likelihoods (R,).

    state: where the stream of SplitMix64 stands that gives a row's noise (`ops.noise.stream`).
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    count, vocabulary = logits.shape
    given = [tensor.contiguous() for tensor in (state, temperature, top_k, top_p)]
    room = torch.empty(2 * count * -(-vocabulary // _LANES) * _LANES)
    tokens, scores = torch.empty(count, dtype=torch.long), torch.empty(count)
    functions().sample_rows(
        pointer(logits), count, logits.stride(0), vocabulary, *map(pointer, given),
        pointer(tokens), pointer(scores), pointer(room), torch.get_num_threads(),
    )  # fmt: skip
    return tokens, scores
