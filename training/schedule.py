"""The position of a run, its end, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from args import Config
from utils import schedules


@dataclass
class Position:
    """The position of a run. Saved with every checkpoint; a resumed run starts at the next sample."""

    epoch: int = 0
    sample_in_epoch: int = 0
    """Samples of this epoch's order that are done."""
    step: int = 0
    """Optimizer steps in total, of any global batch."""
    samples: int = 0
    """Samples trained on in total."""
    seconds: float = 0.0
    """Time spent in training steps so far, for --max-minutes and, in stage 1, --minutes."""
    validation_due: bool = False
    """The run was interrupted before or during the validation after this step, or resumed with a global batch that the
    rest of the epoch does not fill."""

    def advance(self, steps: int, global_batch: int) -> None:
        """Advance by `steps` optimizer steps."""
        self.step += steps
        self.sample_in_epoch += steps * global_batch
        self.samples += steps * global_batch


class Schedule:
    """The end of training and the learning rate of each step.

    Both depend only on the samples seen and the current options: a run resumed with another global batch ends and takes
    rates as if it had always had this batch.
    """

    def __init__(self, config: Config, num_samples: int, steps_per_call: int = 1) -> None:
        """num_samples: of the training set. steps_per_call: of the engine."""
        execution = config.execution
        self.options, self.epochs, self.max_steps = config.optimizer, execution.epochs, execution.max_steps
        self.num_samples, self.global_batch, self.steps_per_call = num_samples, config.global_batch, steps_per_call
        self.max_seconds = 60.0 * execution.max_minutes
        self.plateau = schedules.Plateau(self.options.learning_rate)
        self.losses = [0.0, 0]  # sum and count of this epoch's training losses

    @property
    def samples_per_call(self) -> int:
        """Samples in one call of the device; epochs are truncated to whole calls."""
        return self.global_batch * self.steps_per_call

    def steps_in_epoch(self, start: int = 0) -> int:
        """Optimizer steps in an epoch, from sample `start` on."""
        return schedules.whole_steps(self.num_samples - start, self.global_batch, self.steps_per_call)

    def steps_left(self, position: Position) -> int:
        """Optimizer steps to the end set by --epochs and --max-steps."""
        if position.epoch >= self.epochs:
            return 0
        whole_epochs = self.epochs - position.epoch - 1
        left = self.steps_in_epoch(position.sample_in_epoch) + whole_epochs * self.steps_in_epoch()
        return max(0, min(left, self.max_steps - position.step) if self.max_steps else left)

    def total_steps(self, position: Position) -> int:
        """The number of the last step; the same at every position of a run."""
        return position.step + self.steps_left(position)

    def finished(self, position: Position) -> bool:
        """Whether the step or time limit is reached."""
        return not self.steps_left(position) or bool(self.max_seconds and position.seconds >= self.max_seconds)

    def progress(self, position: Position) -> float:
        """Share of the training that is done; 1 at whichever limit comes first."""
        total = position.samples + self.steps_left(position) * self.global_batch
        progress = position.samples / max(1, total)
        return max(progress, position.seconds / self.max_seconds) if self.max_seconds else progress

    def learning_rate(self, position: Position) -> float:
        """The rate of the next step."""
        name, base = self.options.lr_scheduler, self.options.learning_rate
        if name == "ReduceLROnPlateau":
            return self.plateau.learning_rate
        if name == "cosine":
            warmup = (self.options.warmup_steps + 1) * self.global_batch
            ramp = min(1.0, (position.samples + self.global_batch) / warmup)
            return base * ramp * schedules.cosine_factor(self.progress(position), self.options.lr_floor)
        return base * schedules.epoch_factor(name, position.epoch, self.epochs)

    def note_loss(self, loss: float) -> None:
        """Record a training loss for the plateau; non-finite ones are ignored."""
        if math.isfinite(loss):
            self.losses = [self.losses[0] + loss, self.losses[1] + 1]

    def end_epoch(self, validation_loss: float | None) -> None:
        """Give the plateau the epoch's loss: that of validation, or the mean training loss if there is none."""
        mean = self.losses[0] / self.losses[1] if self.losses[1] else float("inf")
        self.plateau.step(mean if validation_loss is None else validation_loss)
        self.losses = [0.0, 0]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `load_state_dict`."""
        return {"plateau": self.plateau.state_dict(), "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict."""
        self.plateau.load_state_dict(state["plateau"])
        self.losses = list(state["losses"])
