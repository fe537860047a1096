"""Gumbel noise of (seed, position, token): a function of integers, bit-equal in C and in PyTorch on any device.

A fixed sequence of IEEE float32 operations, as in csrc/noise.h: no function of a library, whose last bits differ.

Letters: R rows (n positions of B images), C tokens of the vocabulary.
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from utils.splitmix import GOLDEN, MASK, mix_, shift_right, signed, splitmix64

_MOST, _LONGEST = 1 << 15, 64
"""Numbers, and positions of an image, in a block (see `Blocks`): more would leave the cache."""
_LOG_2 = 0.6931471824645996
_POLYNOMIAL = (-0.14292079210281372, 0.22055938839912415, -0.254032701253891, 0.33258023858070374, -0.4999021887779236,
               1.000004529953003)  # fmt: skip
"""log(1 + t) / t between the roots of 1/2 and 2, to 1e-5."""


def keys(seeds: Sequence[int]) -> Tensor:
    """Return (len(seeds),) int64: where the stream of SplitMix64 begins that belongs to each seed."""
    return torch.tensor([signed(splitmix64(seed & MASK)) for seed in seeds], dtype=torch.int64)


def _minus_log(x: Tensor, t: Tensor | None = None) -> Tensor:
    """-log of positive x; `t` is x - 1 where x may have lost bits of it, which is used where the exponent is 0."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3).bitwise_right_shift_(23)
    own = torch.sub(bits, exponent, alpha=1 << 23).view(torch.float32).sub_(1.0)
    exponents = exponent.float()
    if t is not None:  # exactly one or the other; `where` takes ten times as long
        own = torch.lerp(t, own, exponents.abs().clamp_(max=1.0))
    p = (own * _POLYNOMIAL[0]).add_(_POLYNOMIAL[1])
    for coefficient in _POLYNOMIAL[2:]:
        p.mul_(own).add_(coefficient)
    return exponents.mul_(-_LOG_2).sub_(p.mul_(own))


def gumbel_of(numbers: Tensor) -> Tensor:
    """-log(-log(1 - v)) for v = (number + 1/2) / 2**31, below 1. Integers in [0, 2**31) -> float32."""
    # Products with powers of two are exact, so that they may be fused with what follows.
    v = numbers.float().add_(0.5).clamp_(max=2.0**31 - 2.0**7)  # times 2**31
    return _minus_log(_minus_log(torch.rsub(v, 1.0, alpha=2.0**-31), v * -(2.0**-31)))


def stream(key: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Where the streams of `key` (R,) stand at the first token of a position (R,): int64 (R,)."""
    return key + position * signed(GOLDEN * vocabulary & MASK)


def gumbel(state: Tensor, tokens: Tensor) -> Tensor:
    """The noise of tokens, (K,) or (R, K), from where a `stream` stands: (R,) -> (R, K) float32."""
    steps = (tokens + 1) * signed(GOLDEN)
    return gumbel_of(shift_right(mix_(state[:, None] + steps), 33))


class Blocks:
    """The noise of some images, made for many positions at a time: each time takes some sixty operations.

    The host looks at keys and positions, so they are on a CPU.
    """

    def __init__(self, images: int) -> None:
        self._images = images
        self._keys, self._first, self._starts, self._length = torch.zeros(0), torch.zeros(0), torch.zeros(0), 0
        self._block = torch.zeros(0, 0)
        """(B * length, C)"""

    def at(self, key: Tensor, position: Tensor, vocabulary: int) -> Tensor | None:
        """`gumbel` of the streams of (R,) keys at (R,) positions, those of an image next to each other: (R, C).

        None where a block would hold too few positions to pay.
        """
        own, positions = key.view(self._images, -1)[:, :1], position.view(self._images, -1)  # (B, 1), (B, n)
        length = min(_LONGEST, _MOST // (self._images * vocabulary))
        if length < 4 * positions.shape[1]:
            return None
        if torch.equal(own, self._keys) and self._block.shape[1] == vocabulary:
            places = positions - self._first
            low, high = map(int, places.aminmax())
            if low >= 0 and high < self._length:
                return self._block.index_select(0, places.add_(self._starts).flatten())
        self._keys, self._first = own.clone(), positions.amin(dim=1, keepdim=True)
        places = positions - self._first
        self._length = max(length, int(places.max()) + 1)
        self._starts = torch.arange(self._images)[:, None] * self._length
        ahead = self._first + torch.arange(self._length)
        self._block = gumbel(stream(own, ahead, vocabulary).flatten(), torch.arange(vocabulary))
        return self._block.index_select(0, places.add_(self._starts).flatten())
