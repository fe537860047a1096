"""Training of a DALL-E: set-up, epochs of steps, validation, checkpoints, and the final report."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

import checkpoints
import log
from args import Config
from checkpoints.vqgan import load_vqgan
from dalle import published
from dalle.export import check_empty, export_mindalle, export_options
from engines import Engine
from models.config import DalleConfig
from training import resume
from training.evaluation import Evaluation
from training.files import check_folders, move_aside
from training.loop import Loop
from training.saver import Saver
from training.schedule import Position, Schedule
from training.setup import Parts, Start, build_model, build_parts, encode_images, model_config, with_weights
from utils.bad_steps import BadSteps
from utils.errors import UserError
from utils.files import make_folder
from utils.interrupts import Interruption
from utils.resume import Changes

logger = logging.getLogger(__name__)


def train(
    config: Config,
    engine: Engine,
    parts: Parts | None = None,
    start: Start | None = None,
    interruption: Interruption | None = None,
) -> None:
    """Build everything, then train, with a validation and a checkpoint after each epoch.

    parts: if already built. start: a checkpoint in memory, instead of --pretrained-checkpoint. interruption: polled; a
    run that is asked to stop saves after the current step.
    """
    run = Run(config, engine, parts, start, interruption or Interruption())
    if not config.ipu.compile_only:  # else the compiled program is in --executable-cache-dir
        run.begin()
        run.train()


class Run(Loop):
    """A run: its parts, and its training from `position` to the end or an interruption."""

    def __init__(
        self, config: Config, engine: Engine, parts: Parts | None, start: Start | None, interruption: Interruption
    ) -> None:
        """Build and check all parts, and prepare the engine; arguments as for `train`. Raises UserError."""
        torch.manual_seed(config.execution.random_seed)
        options = config.checkpoints
        self.engine, self.interruption, self.steps_per_call = engine, interruption, engine.steps_per_call
        self.folder, self.config = Path(options.checkpoint_output_dir), config
        self.position = Position()
        self.changes: Changes = {}
        self.resumed: Start | None = None
        self.evaluation: Evaluation | None = None
        if engine.is_main and options.checkpoint_output_dir:
            make_folder("--checkpoint-output-dir", self.folder)
        check_folders(config)
        resuming = options.resume and checkpoints.list_checkpoints(self.folder)  # the export may be its own
        if engine.is_main and options.export_mindalle and not resuming:
            check_empty(options.export_mindalle, "--export-mindalle")
        metrics = None
        with contextlib.ExitStack() as undo:
            if start is None and published.is_missing(options.pretrained_checkpoint):  # large: check first
                self.make_schedule(build_parts(config.replace(truncate_captions=True), engine))  # any vocabulary
                metrics = undo.enter_context(contextlib.closing(self.open_metrics()))
            start = start or resume.find_start(config, self.folder)
            wanted = self.plan(start, parts)
            self.metrics = metrics or undo.enter_context(contextlib.closing(self.open_metrics()))
            self.prepare(start, wanted)
            undo.pop_all()

    def plan(self, start: Start | None, parts: Parts | None) -> DalleConfig:
        """Build the run's parts and schedule, and return its model's configuration. Raises UserError."""
        config, engine = self.config, self.engine
        if start is not None and config.checkpoints.resume:
            self.resumed = start
            self.position = resume.saved_position(start, config)
            self.changes = resume.changed_options(start, config)
        self.config = config if parts else resume.with_parts_of(start, config)
        self.parts = parts or build_parts(self.config, engine)
        wanted = model_config(self.config, self.parts, start)
        if config.checkpoints.export_mindalle:
            export_options(wanted, self.parts.vqgan.config, self.parts.tokenizer)
        memory = engine.memory_plan(wanted)
        if memory:
            logger.info(memory)
        self.make_schedule(self.parts)
        if self.config.evaluation.evaluate_every and not self.config.data.generated:
            self.evaluation = Evaluation(self.config, engine, self.parts, super().interrupted)
        return wanted

    def make_schedule(self, parts: Parts) -> None:
        """Build the schedule. Raises UserError if an epoch has no step."""
        self.schedule = Schedule(self.config, len(parts.train_set), self.engine.steps_per_call)
        self.engine.steps_per_epoch(self.schedule.num_samples)

    def open_metrics(self) -> log.Metrics:
        """Open the metric writers. Raises UserError if TensorBoard or wandb is unavailable."""
        writers = ("tensorboard", "wandb", "wandb_project_name", "wandb_run_name")
        own: dict[str, Any] = {name: getattr(self.config.misc, name) for name in writers}
        own.update(config=self.config.to_dict(), resume_step=None if self.resumed is None else self.position.step)
        shown = self.engine.is_main and not self.config.ipu.compile_only
        return log.Metrics(self.config.log_dir, shown, **own)

    def prepare(self, start: Start | None, wanted: DalleConfig) -> None:
        """Load the VQGAN, encode images, and build and place the model. All checks that need none of it come before."""
        self.parts = with_weights(self.config, self.parts)
        if self.resumed is not None:
            resume.require_same_files(self.resumed, self.config, self.parts)
        if self.config.checkpoints.resume:
            same = self.engine.mean(torch.tensor(float(self.position.step))) == self.position.step
            if not same:
                text = f"the processes found different checkpoints; they must all see {self.folder}"
                raise UserError(f"--resume: {text}")
        codebook = self.parts.vqgan.quantize.codebook  # once images are encoded, the VQGAN is freed
        if self.evaluation is not None:
            self.evaluation.begin(self.parts, self.resumed is not None)
        self.parts = encode_images(self.config, self.engine, self.parts, self.position)
        model = build_model(self.config, self.parts, start, wanted, codebook)
        self.model_config = model.dalle.config
        self.engine.prepare(model, self.parts.train_set)

    def begin(self) -> None:
        """Restore a resumed run, or move an earlier run's checkpoints aside; start progress."""
        config, engine, position, resumed = self.config, self.engine, self.position, self.resumed
        if resumed is not None:
            resume.restore(self, resumed)
        if engine.is_main and resumed is None and config.checkpoints.checkpoint_output_dir:
            # Before the first step: if this run is killed before it saves, --resume must not find an older run.
            old = checkpoints.list_checkpoints(self.folder)
            done = "the checkpoints of an earlier run are now in %s (--resume would have continued it)"
            move_aside(old, "earlier.{}", "--checkpoint-output-dir: cannot make", done)
        self.saver = Saver(self, None if resumed is None else resumed.path)
        self.resumed = None  # free it: the engine has its weights and optimizer state
        self.bad_steps = BadSteps(config.optimizer.max_bad_steps, position.step, self.saver.way_out)
        self.total_steps, limit = self.schedule.total_steps(position), self.schedule.max_seconds
        left = max(0.0, limit - position.seconds) if limit else 0.0
        shown: dict[str, Any] = {"is_main": engine.is_main, "plain": False, "max_seconds": left}
        self.progress = log.progress(self.total_steps, "training", position.step, **shown)

    def train(self) -> None:
        """Train, and write checkpoints, metrics and loss.png. Raises UserError."""
        with self.interruption.deferred(), self.metrics, self.progress:
            self.take_epochs()
            self.finish()
            if self.config.checkpoints.export_mindalle and self.finished() and not self.position.validation_due:
                self.export()
            self.saver.require_saved()

    def take_epochs(self) -> None:
        """Train, validate and save from one epoch to the next."""
        position = self.position
        if self.finished() and not position.validation_due:
            logger.info(f"nothing left to train: the run ended at step {position.step}; raise its limits to continue")
            return
        while position.epoch < self.config.execution.epochs:
            left = self.total_steps - position.step
            loader = self.engine.loader(self.parts.train_set, position.epoch, position.sample_in_epoch, left)
            with contextlib.closing(loader) as batches:
                complete = self.take_steps(() if position.validation_due else batches)
            if complete:
                with self.progress.paused():
                    complete = self.end_epoch()
                if complete and self.finished():
                    return
            if not complete or self.interrupted():
                return self.saver.tell_interrupted()

    def end_epoch(self) -> bool:
        """Validate, update the schedule, move to the next epoch and save. False: interrupted during validation."""
        position, losses = self.position, None
        epoch, complete = position.epoch, not self.schedule.steps_in_epoch(position.sample_in_epoch)
        position.validation_due = False
        if self.parts.validation_set is not None:
            losses = self.validate()
            if losses is None:
                position.validation_due = True
                self.saver.save(epoch)
                return False
        if complete:
            self.schedule.end_epoch(None if losses is None else losses["loss"])
            position.epoch, position.sample_in_epoch = epoch + 1, 0
        self.saver.save(epoch, complete)
        if self.evaluation is not None and self.evaluation.due(position.step, self.finished()):
            self.evaluation.run(position.step, self.metrics)
        return True

    def validate(self) -> dict[str, float] | None:
        """Log the mean losses over the held-out pairs; None if there are none, or the run is interrupted."""
        position, pairs = self.position, self.parts.validation_set
        losses = None if pairs is None else self.engine.evaluate(pairs, super().interrupted)
        if losses is not None:
            logger.info(log.validation_line(position.step, position.epoch, **losses))
            self.metrics.log("validation", position.step, epoch=position.epoch, **losses)
        return losses

    def evaluate(self, ended: bool) -> None:
        # After the last step of an epoch, or of all, `end_epoch` does it.
        if self.evaluation is not None and self.continues and self.evaluation.due(self.position.step):
            with self.progress.paused():
                self.validate()
                self.evaluation.run(self.position.step, self.metrics)

    def interrupted(self) -> bool:
        return self.engine.any(super().interrupted())

    def finished(self) -> bool:
        return self.schedule.finished(self.position)

    @property
    def continues(self) -> bool:
        """Whether more steps of this epoch follow."""
        return not self.finished() and bool(self.schedule.steps_in_epoch(self.position.sample_in_epoch))

    def take_step(self, batch: Any) -> bool:
        self.mark, self.learning_rate = time.perf_counter(), self.schedule.learning_rate(self.position)
        self.engine.set_learning_rate(self.learning_rate)
        if self.config.model.soft_codes_fade and self.engine.model.soft is not None:
            self.engine.model.soft.fade(self.schedule.progress(self.position), self.config.model.soft_codes_fade)
        self.result = self.engine.step(batch)
        self.position.advance(self.steps_per_call, self.config.global_batch)
        step, per_call = self.position.step, self.steps_per_call
        return step % self.config.misc.log_every < per_call or step == per_call or step >= self.total_steps

    def watch(self) -> None:
        self.loss, counts = self.engine.mean(self.result.loss), self.result.bad_steps
        self.bad_steps.look(self.position.step, self.loss, None if counts is None else list(map(int, counts.tolist())))

    def end_step(self, due: bool) -> None:
        position, losses = self.position, {"loss": self.loss} if due else {}
        shown = dict(losses)
        if due:
            self.schedule.note_loss(self.loss)
            parts = {"text_loss": self.result.text_loss, "image_loss": self.result.image_loss}
            losses.update((name, self.engine.mean(part)) for name, part in parts.items() if part is not None)
        if self.schedule.max_seconds:
            position.seconds += self.engine.mean(torch.tensor(time.perf_counter() - self.mark))
        self.progress.update(self.steps_per_call, self.steps_per_call * self.config.global_batch, **shown)
        if due:
            self.report(losses)

    def report(self, losses: dict[str, float]) -> None:
        """Log a step's losses to console, file and metrics."""
        position, rate, speed = self.position, self.learning_rate, self.progress.samples_per_second
        loss, text, image = (losses.get(name, math.nan) for name in ("loss", "text_loss", "image_loss"))
        line = log.step_line(position.step, self.total_steps, position.epoch, loss, text, image, rate, speed)
        logger.info(line, extra=log.DETAIL)
        norm = None if self.result.grad_norm is None else float(self.result.grad_norm)
        about = {"epoch": position.epoch, "learning_rate": rate, "grad_norm": norm, "samples_per_second": speed}
        self.metrics.log("train", position.step, **about, **losses, bad_steps=self.bad_steps.total)

    def save(self, stopping: bool) -> None:
        # The last step of an epoch, or of all, is saved by `end_epoch`.
        if stopping or (self.continues and self.saver.due()):
            with self.progress.paused():
                self.saver.save(self.position.epoch)

    def finish(self) -> None:
        """Plot loss.png, and log unreadable files, throughput, peak memory and where everything is."""
        if not self.engine.is_main:
            return
        if getattr(self.parts.train_set, "num_unreadable", 0):
            logger.warning(self.parts.train_set.report())
        logger.info(log.throughput_line(self.progress.overall_samples_per_second))
        peak = self.engine.peak_memory()
        if peak is not None:
            logger.info(f"peak memory: {peak / 1e9:.2f} GB")
        metrics, curve = self.config.log_dir / "metrics.jsonl", self.config.log_dir / "loss.png"
        try:
            if log.plot_losses(metrics, curve):
                logger.info(f"losses: {metrics} and {curve}")
        except (UserError, OSError) as error:
            logger.warning(f"cannot plot {curve} ({error})")
        if self.saver.newest is not None:
            logger.info(f"checkpoint: {self.saver.newest}")

    def export(self) -> None:
        """--export-mindalle: write the trained model, with averaged weights if there are any."""
        weights, folder = self.engine.model_state(averaged=True), self.config.checkpoints.export_mindalle
        if self.engine.is_main and folder and self.parts.vqgan_paths:
            vqgan = load_vqgan(*self.parts.vqgan_paths, channels_last=False)  # the run's may be on the meta device
            export_mindalle(folder, self.model_config, weights, vqgan, self.parts.tokenizer)
            logger.info(f"exported {folder}")
