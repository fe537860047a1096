"""SplitMix64 (Steele, Lea, Flood 2014): random bits that are a function of an integer, and nothing else."""
from __future__ import annotations

import torch

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(value: int) -> int:
    """Return 64 well-mixed bits of a 64-bit value: one step of SplitMix64."""
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & MASK
    return value ^ (value >> 31)


def splitmix64_tensor(values: torch.Tensor) -> torch.Tensor:
    """`splitmix64` of each element, with 64 bits in int64 (whose arithmetic wraps around)."""
    values = mix_(values + signed(GOLDEN))
    return values ^ shift_right(values, 31)


def mix_(values: torch.Tensor) -> torch.Tensor:
    """`splitmix64_tensor` of values - GOLDEN, in place, but for its last step, which keeps the upper 31 bits."""
    values.bitwise_xor_(shift_right(values, 30)).mul_(signed(_MIX_1))
    return values.bitwise_xor_(shift_right(values, 27)).mul_(signed(_MIX_2))


def shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: >> of int64 is arithmetic, so the sign bits are masked off."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """64 bits as the int64 that they are."""
    return value - (1 << 64) if value >> 63 else value
