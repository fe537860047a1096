"""Checkpoints of a run: Mini DALL-E's checkpoint layout, plus what exact resume needs."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import checkpoints
from training.files import not_finite
from training.setup import identities
from utils.errors import UserError

if TYPE_CHECKING:
    from training.run import Run

logger = logging.getLogger(__name__)

#: Options among the hparams of Mini DALL-E's checkpoint layout that do not describe the model.
HPARAMS = ("embedding_ipu_id", "embedding_serialization_factor", "layers_per_ipu", "cls_ipu_id", "fp16", "byteio")


class Saver:
    """Writes the checkpoints of a run.

    If writing one fails, training continues, since disk space may be freed, and saving is retried after a tenth of the
    usual steps. Only a run whose last state could not be saved ends with an error.
    """

    def __init__(self, run: Run, newest: Path | None) -> None:
        """newest: the checkpoint that the run resumes from."""
        self.run, self.engine, self.options = run, run.engine, run.config.checkpoints
        self.folder = Path(self.options.checkpoint_output_dir)
        self.newest = newest  # the newest checkpoint of this run
        self.saved_step = -1  # its step, if this process wrote it
        self.failing = False  # whether the last attempt failed; the same in all processes
        self.problem: UserError | None = None  # why; only the main process knows

    def due(self) -> bool:
        """Whether to save after this step, apart from the end of an epoch."""
        every, per_call = self.options.checkpoint_save_steps, self.engine.steps_per_call
        if self.failing:
            every = max(per_call, (every or self.run.schedule.steps_in_epoch()) // 10)
        return bool(every) and self.run.position.step % every < per_call

    def way_out(self) -> str:
        """What to do about non-finite losses or weights, for error messages."""
        begin = "start again with" if self.newest is None else "continue from it with --resume and"
        remedies = self.engine.remedies()
        flags = ", ".join(remedies[:-1]) + " or " + remedies[-1] if remedies[1:] else remedies[0]
        return f"the last good checkpoint is {self.newest or 'none'}: {begin} {flags}"

    def save(self, epoch: int, complete: bool = False) -> None:
        """Save, unless this step is already saved, within `epoch` or at its end; delete old ones as configured."""
        step = self.run.position.step
        if self.saved_step == step or not self.options.checkpoint_output_dir:
            return
        path = self.folder / checkpoints.checkpoint_name(epoch, None if complete else step)
        weights, state = self.engine.model_state(), self.engine.state_dict()  # every process takes part
        bad = not_finite(weights)
        if self.engine.any(bad is not None):
            where = bad or "in the main process"
            raise UserError(f"step {step}: weights are not finite ({where}) and were not saved; {self.way_out()}")
        self.problem = None
        if self.engine.is_main:
            try:
                self.write(path, weights, state)
            except UserError as error:
                self.problem = error
                logger.error(f"step {step}: {error}; the newest checkpoint is {self.newest or 'none'}")
        self.failing = self.engine.any(self.problem is not None)  # the others wait here for the file
        if not self.failing:
            self.saved_step, self.newest = step, path

    def write(self, path: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write one checkpoint, in the main process. state: of the engine. Raises UserError."""
        run = self.run
        run.metrics.sync()  # metrics must be on disk before the checkpoint
        begin = time.perf_counter()
        optimizer, schedule = state.pop("optimizer"), run.schedule.state_dict()
        options = run.config.to_dict()
        hparams = {name: options[name] for name in HPARAMS}
        training = {
            "position": dict(vars(run.position)),
            "engine": state,
            **identities(run.config, run.parts),
            "num_samples": len(run.parts.train_set),
            "config": options,
        }
        shape, epoch = run.model_config.to_dict(), run.position.epoch
        content = checkpoints.dalle_checkpoint(shape, weights, epoch, optimizer, schedule, hparams, training)
        checkpoints.save_checkpoint(path, content)
        logger.info(f"saved {path} in {time.perf_counter() - begin:.1f} s")
        checkpoints.prune_checkpoints(self.folder, self.options.keep_checkpoints)

    def require_saved(self) -> None:
        """Raise UserError if the last state of the run could not be saved."""
        if self.problem is not None:
            raise UserError(f"{self.problem}; the newest checkpoint is {self.newest or 'none'}")

    def tell_interrupted(self) -> None:
        """Log that the run ends early, and how to continue it."""
        step = self.run.position.step
        if self.saved_step == step:
            logger.info(f"interrupted at step {step}, saved as {self.newest}; continue with --resume")
        else:
            logger.warning(f"interrupted at step {step}, not saved")
