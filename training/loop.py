"""The training loop of both stages: step, check, report and save, until the end or an interruption."""

from __future__ import annotations

from typing import Any, Iterable

from training.schedule import Position
from utils.bad_steps import BadSteps
from utils.interrupts import Interruption


class Loop:
    """A training loop; subclasses define steps, reports, saving and the end of training.

    Each process has its own; all must return the same answers.
    """

    position: Position
    bad_steps: BadSteps
    interruption: Interruption
    steps_per_call = 1
    """Optimizer steps per call of `take_step`."""

    def take_steps(self, batches: Iterable[Any]) -> bool:
        """Train on batches until they or the training end. False: the run was interrupted, and is saved."""
        for batch in batches:
            due = self.take_step(batch)
            if due or self.bad_steps.due(self.position.step, self.steps_per_call):
                self.watch()
            self.end_step(due)
            ended = self.finished()
            stopping = not ended and self.interrupted()
            self.save(stopping)
            if stopping:
                return False
            self.evaluate(ended)
            if ended:
                return True
        return True

    def interrupted(self) -> bool:
        """Whether the run was asked to stop, in any process."""
        return self.interruption.requested is not None

    def take_step(self, batch: Any) -> bool:
        """Train on a batch. Returns whether to report it: not always, since reading a loss waits for the device."""
        raise NotImplementedError

    def watch(self) -> None:
        """Read the loss and update `bad_steps`."""
        raise NotImplementedError

    def end_step(self, due: bool) -> None:
        """Count the step's time, and report the step if due."""
        raise NotImplementedError

    def finished(self) -> bool:
        """Whether the step limit or the time limit is reached."""
        raise NotImplementedError

    def save(self, stopping: bool) -> None:
        """Save if due or stopping. Training continues after a failed save, since disk space may be freed."""
        raise NotImplementedError

    def evaluate(self, ended: bool) -> None:
        """Evaluate the model if that is due. ended: the training has."""
        raise NotImplementedError
