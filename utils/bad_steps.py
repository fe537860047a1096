"""Steps with a non-finite loss or gradient: they are logged, and too many in a row end the run."""
from __future__ import annotations

import logging
import math
from typing import Callable, Sequence

from utils.errors import UserError

logger = logging.getLogger(__name__)


class BadSteps:
    """Watches for non-finite losses and gradients, and ends a run that does not recover from them."""

    def __init__(self, limit: int, step: int, way_out: Callable[[], str]) -> None:
        """limit: bad steps allowed in a row; 0: any number. step: first step. way_out: advice for the error message."""
        self.limit, self.way_out = limit, way_out
        self.total = self.row = 0  # steps, in all and in a row
        self.last_step, self.reported = step, 0

    def due(self, step: int, per_call: int = 1) -> bool:
        """Whether to check after this step: often enough to notice `limit` bad steps in a row."""
        return bool(self.limit) and step % self.limit < per_call

    def look(self, step: int, loss: float, counts: Sequence[int] | None) -> None:
        """Record how many bad steps there were, up to this one. Raises UserError when there were too many in a row.

        counts: skipped steps, in total and in a row; None where only the loss is known.
        """
        if counts is not None:
            self.total, self.row = counts
        else:
            # The device cannot skip steps: a bad loss counts for all steps since the last check.
            bad = 0 if math.isfinite(loss) else step - self.last_step
            self.total, self.row = self.total + bad, self.row + bad if bad else 0
        self.last_step = step
        if self.row and self.total > self.reported:
            logger.warning(
                "step %d: loss or gradient not finite for %d step(s), %d in total since training began%s",
                step,
                self.row,
                self.total,
                "" if counts is None else "; such steps are skipped",
            )
            self.reported = self.total
        if self.limit and self.row >= self.limit:
            raise UserError(
                f"step {step}: loss or gradient not finite {self.row} times in a row (--max-bad-steps {self.limit}); "
                f"{self.way_out()}"
            )
