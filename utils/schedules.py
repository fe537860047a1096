"""Learning-rate schedules as plain functions of training progress, and the one that depends on the loss."""
from __future__ import annotations

import math
from typing import Any

import torch

#: Default fraction of epochs (or steps) for warm-up, as in the original Mini DALL-E.
WARMUP_FRACTION = 0.2


def whole_steps(num_samples: int, global_batch: int, steps_per_call: int = 1) -> int:
    """Return the number of full optimizer steps in `num_samples`, a multiple of `steps_per_call`."""
    return max(0, num_samples) // (global_batch * steps_per_call) * steps_per_call


def epoch_factor(name: str, epoch: int, epochs: int) -> float:
    """Return the factor on the base learning rate in `epoch` (0-based) of `epochs`, for per-epoch schedules.

    constant    linear warm-up (1 + e) / (1 + w) over the first fifth of the epochs (w epochs), then 1
    multi_step  the same, then 0.1 for the second half of the remaining epochs
    """
    warmup = int(epochs * WARMUP_FRACTION)
    if epoch < warmup:
        return (1 + epoch) / (1 + warmup)
    if name == "multi_step" and epoch >= warmup + (epochs - warmup) // 2 and epochs - warmup > 1:
        return 0.1
    return 1.0


def cosine_factor(progress: float, floor: float = 0.01) -> float:
    """Return the factor at `progress` in [0, 1]: half a cosine from 1 down to `floor`."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


class Plateau:
    """ReduceLROnPlateau with the constants of the original Mini DALL-E: PyTorch's scheduler without an optimizer.

    Halves the learning rate after 10 epochs without improvement, then waits 10 epochs; never below 1e-6.
    """

    def __init__(self, learning_rate: float) -> None:
        # PyTorch's scheduler reads and writes an optimizer's learning rate; this dummy only holds it: the real one may
        # be on a device that only takes computed rates (engine.set_learning_rate).
        self._holder = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        self._scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder, factor=0.5, patience=10, cooldown=10, min_lr=1e-6
        )

    @property
    def learning_rate(self) -> float:
        """The current learning rate."""
        return float(self._holder.param_groups[0]["lr"])

    def restart(self, learning_rate: float) -> None:
        """Set the learning rate and reset patience and cooldown; keep the best loss."""
        self._holder.param_groups[0]["lr"] = learning_rate
        self._scheduler.num_bad_epochs = self._scheduler.cooldown_counter = 0

    def step(self, loss: float) -> None:
        """Record an epoch's loss."""
        self._scheduler.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `load_state_dict`."""
        kept = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        return dict({key: getattr(self._scheduler, key) for key in kept}, learning_rate=self.learning_rate)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict."""
        for key, value in state.items():
            if key == "learning_rate":
                self._holder.param_groups[0]["lr"] = value
            else:
                setattr(self._scheduler, key, value)
