"""Random choices that depend only on seed, epoch and index: the order of an epoch, captions, held-out pairs.

There is no generator state: every choice is a hash (SplitMix64) of its purpose and indices, so it is the same in any
process, in any order of access, after any interruption and under any version of PyTorch.
"""
from __future__ import annotations

import zlib

import torch

from utils.errors import UserError
from utils.splitmix import MASK, signed, splitmix64, splitmix64_tensor


def random_bits(purpose: str, *numbers: int) -> int:
    """Return 64 random bits for a purpose ("caption", say) and integers such as seed, epoch and index."""
    state = zlib.crc32(purpose.encode("utf-8"))
    for number in numbers:
        state = splitmix64(state ^ (number & MASK))
    return state


def random_below(limit: int, purpose: str, *numbers: int) -> int:
    """Return a random integer in [0, limit)."""
    return (random_bits(purpose, *numbers) * limit) >> 64


def random_unit(purpose: str, *numbers: int) -> float:
    """Return a random number in [0, 1)."""
    return (random_bits(purpose, *numbers) >> 11) * 2.0**-53


def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order in which an epoch visits the samples: a permutation of range(num_samples) as LongTensor (n,)."""
    return _permutation(num_samples, random_bits("order", seed, epoch))


def windowed_order(runs: torch.Tensor, window: int, seed: int, epoch: int) -> torch.Tensor:
    """Return an order like `epoch_order` that visits positions of one run at about the same time.

    runs: LongTensor (n,), the run of each position. Runs are shuffled; then the positions of `window` runs at a time
    are shuffled together. With at most `window` runs this equals `epoch_order`.
    """
    order = epoch_order(len(runs), seed, epoch)
    present, runs = torch.unique(runs, return_inverse=True)
    places = torch.argsort(_permutation(len(present), random_bits("runs", seed, epoch)))  # of each run
    return order[torch.argsort(torch.div(places[runs[order]], window, rounding_mode="floor"), stable=True)]


def split_holdout(num_samples: int, holdout: int | float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split range(num_samples) at random, by seed, into (training, held out): ascending LongTensors.

    holdout: a count, or as a float in [0, 1) a fraction of the samples (rounded, at least one unless it is 0).
    Raises UserError when nothing would be left to train on.
    """
    count = holdout
    if isinstance(holdout, float):
        if not 0 <= holdout < 1:
            raise UserError(f"the fraction of pairs to hold out must be at least 0 and below 1, not {holdout}")
        count = max(round(holdout * num_samples), 1) if holdout else 0
    if count < 0 or count >= max(num_samples, 1):
        raise UserError(
            f"cannot hold out {count} of {num_samples} pairs for validation: none would be left to train on; "
            "give --validation-fraction 0 or more pairs"
        )
    order = _permutation(num_samples, random_bits("holdout", seed))
    return order[count:].sort().values, order[:count].sort().values


def _permutation(num_samples: int, key: int) -> torch.Tensor:
    """Sort range(num_samples) by a hash of (key, index)."""
    hashes = splitmix64_tensor(torch.arange(num_samples, dtype=torch.int64) ^ signed(key))
    return torch.argsort(hashes, stable=True)
