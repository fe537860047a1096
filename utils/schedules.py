"""Learning-rate schedules as plain functions of how far training has come, and the one that looks at the loss."""
from __future__ import annotations

import math
from typing import Any

import torch

#: Share of the epochs (or steps) that warm up where nothing else is said (the published application's constant).
WARMUP_FRACTION = 0.2


def whole_steps(num_samples: int, global_batch: int, steps_per_call: int = 1) -> int:
    """Return the optimizer steps that so many samples fill, in whole calls of the device; the rest fills none."""
    return max(0, num_samples) // (global_batch * steps_per_call) * steps_per_call


def epoch_factor(name: str, epoch: int, epochs: int) -> float:
    """Return the factor on the base learning rate in `epoch` (0-based) of `epochs`, for schedules that step by epochs.

    constant    linear warm-up (1 + e) / (1 + w) over the first fifth of the epochs, w of them, then 1
    multi_step  the same, then 0.1 for the last half of what remains
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
    """ReduceLROnPlateau with the published constants, over PyTorch's own scheduler and detached from any optimizer.

    Halves the learning rate after 10 epochs without improvement, then waits 10 epochs; never below 1e-6.
    """

    def __init__(self, learning_rate: float) -> None:
        # PyTorch's scheduler reads and writes an optimizer's learning rate; this one has nothing else to it: the
        # real optimizer may live on a device that only takes finished rates (engine.set_learning_rate).
        self._holder = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        self._scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder, factor=0.5, patience=10, cooldown=10, min_lr=1e-6
        )

    @property
    def learning_rate(self) -> float:
        """The rate to use now."""
        return float(self._holder.param_groups[0]["lr"])

    def restart(self, learning_rate: float) -> None:
        """Use this rate from now on, with all patience ahead of it; the best loss so far stays the one to beat."""
        self._holder.param_groups[0]["lr"] = learning_rate
        self._scheduler.num_bad_epochs = self._scheduler.cooldown_counter = 0

    def step(self, loss: float) -> None:
        """Take note of an epoch's loss."""
        self._scheduler.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain values that `load_state_dict` takes."""
        kept = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        return dict({key: getattr(self._scheduler, key) for key in kept}, learning_rate=self.learning_rate)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        for key, value in state.items():
            if key == "learning_rate":
                self._holder.param_groups[0]["lr"] = value
            else:
                setattr(self._scheduler, key, value)
