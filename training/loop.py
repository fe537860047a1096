"""The loop of both stages: step after step, watched, reported and saved, until the end or until it is asked to stop."""

from __future__ import annotations

from typing import Any, Iterable

from training.schedule import Position
from utils.bad_steps import BadSteps
from utils.interrupts import Interruption


class Loop:
    """Training, of which a subclass says what a step is, how it is reported and saved, and when all is done.

    Of several processes each has its own, and all of them answer alike.
    """

    position: Position
    bad_steps: BadSteps
    interruption: Interruption
    steps_per_call = 1
    """Optimizer steps of one call of `take_step`."""

    def take_steps(self, batches: Iterable[Any]) -> bool:
        """Train on batches until there are no more or all is done. False: the run was asked to stop, and is saved."""
        for batch in batches:
            due = self.take_step(batch)
            if due or self.bad_steps.due(self.position.step, self.steps_per_call):
                self.watch()
            self.end_step(due)
            ended = self.finished()
            stopping = not ended and self.interrupted()
            self.save(stopping)
            if stopping or ended:
                return not stopping
        return True

    def interrupted(self) -> bool:
        """Whether the run, in any of its processes, was asked to stop."""
        return self.interruption.requested is not None

    def take_step(self, batch: Any) -> bool:
        """Train on a batch. Returns whether to report it: reading a loss waits for the device, so only some are."""
        raise NotImplementedError

    def watch(self) -> None:
        """Read the loss, and tell `bad_steps`."""
        raise NotImplementedError

    def end_step(self, due: bool) -> None:
        """Count the step's time, and report it where that is due."""
        raise NotImplementedError

    def finished(self) -> bool:
        """Whether all steps are done, or the time is over."""
        raise NotImplementedError

    def save(self, stopping: bool) -> None:
        """Save where that is due, or the run stops here. If it fails training goes on: somebody may make room."""
        raise NotImplementedError
