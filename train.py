"""Train a DALL-E on pairs of image and caption.

    python train.py --config demo                                   # the built-in pictures, a quarter of an hour
    python train.py --config L16 --input-folder data/COCO           # the published model on COCO
    torchrun --nproc-per-node 8 train.py --config L16_POD16 --input-folder data/COCO
    python train.py --config L16 --input-folder data/COCO --resume  # go on at the very next sample

The loop never asks which device it has: engines/ does.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

import torch

import args
import data
import engines
import log
from args import Config
from bpe import Tokenizer, find_vocabulary, load_tokenizer
from dalle import published
from dalle.export import check_empty, export_mindalle, export_options
from dalle.loading import recorded_files
from engines import Engine, plan_report
from models.building import build_dalle
from models.config import ARCHITECTURES, DalleConfig
from models.dalle import DALLE, TextToImage
from models.vqgan import PUBLISHED, VQGAN, VqganConfig, default_vqgan, load_vqgan
from utils import checkpoints, resume, schedules
from utils.bad_steps import BadSteps
from utils.caches import cache_folder
from utils.errors import UserError, run_main
from utils.interrupts import Interruption
from utils.locks import only_writer
from utils.skipped import start_report

logger = logging.getLogger(__name__)

#: Fields of DalleConfig and the options that decide on them.
MODEL_OPTIONS = {
    "text_seq_len": "text_seq_len",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "dim_head": "dim_head",
    "attn_types": "attn_types",
    "loss_img_weight": "loss_img_weight",
    "attn_dropout": "attn_dropout",
    "ff_dropout": "ff_dropout",
    "sandwich_norm": "sandwich_norm",
    "layer_scale": "layer_scale",
    "init_std": "init_std",
}

#: Those that say how a model is trained, not what it is.
TRAINING_OPTIONS = ("loss_img_weight", "attn_dropout", "ff_dropout")

#: What was left out of the data, a line for each file, in the log folder.
SKIPPED = "skipped.jsonl"

#: Samples of a --generated-data epoch, unless two global batches need more.
GENERATED_SAMPLES = 1024


@dataclass
class Position:
    """How far a run has come. Saved with every checkpoint; a resumed run starts at the very next sample."""

    epoch: int = 0
    sample_in_epoch: int = 0
    """Samples of this epoch's order that are done with."""
    step: int = 0
    """Optimizer steps in all, of whatever global batch."""
    samples: int = 0
    """Samples trained on in all."""
    seconds: float = 0.0
    """Time spent in training steps so far, for --max-minutes."""
    validation_due: bool = False
    """The run was interrupted before or during the validation that comes after this step, or resumed with a global
    batch that the rest of the epoch does not fill."""

    def advance(self, steps: int, global_batch: int) -> None:
        """Note that `steps` more optimizer steps are done."""
        self.step += steps
        self.sample_in_epoch += steps * global_batch
        self.samples += steps * global_batch


class Parts(NamedTuple):
    """What a run is made of."""

    tokenizer: Tokenizer
    vqgan_paths: Tuple[Path, Path]
    vqgan: VQGAN
    train_set: Any
    validation_set: Optional[Any]


class Start(NamedTuple):
    """A checkpoint to begin from, and its file's name."""

    path: Path
    checkpoint: checkpoints.DalleCheckpoint


def main() -> int:
    """Run training as the command line says. Returns the exit status."""
    config = args.parse()
    if config.ipu.plan:
        show_plan(config)
        return 0
    engine = engines.create(config)
    try:
        with Interruption(tell=engine.is_main) as interruption, folders_locked(config, engine):
            log.setup(config.log_dir, engine.is_main)
            logger.info("%s", config.describe())
            engine.introduce()
            train(engine.config, engine, interruption=interruption)
            return interruption.status
    finally:
        engine.close()


def train(
    config: Config,
    engine: Engine,
    parts: Optional[Parts] = None,
    start: Optional[Start] = None,
    interruption: Optional[Interruption] = None,
) -> None:
    """Build everything, then train: one checkpoint, validation and line of metrics after each epoch.

    parts: those of the run, where they are built already. start: weights to begin from that are in no file, instead of
    --pretrained-checkpoint. interruption: what to listen to; a run that is asked to stop saves after its step.
    """
    interruption = interruption or Interruption()
    torch.manual_seed(config.execution.random_seed)
    folder = Path(config.checkpoints.checkpoint_output_dir)
    if engine.is_main and config.checkpoints.checkpoint_output_dir:
        check_writable(folder)
    start = start or find_start(config, folder)
    resuming = config.checkpoints.resume and start is not None
    position, given_anew = Position(), {}
    if resuming:
        position, given_anew = saved_position(start, config), changed_options(start, config)
    if parts is None:
        config = with_parts_of(start, config)
    if engine.is_main and config.checkpoints.export_mindalle and not resuming:
        check_empty(config.checkpoints.export_mindalle, "--export-mindalle")
    parts = encode_images(config, engine, parts or build_parts(config, engine), position)
    wanted = model_config(config, parts, start)
    if config.checkpoints.export_mindalle:
        export_options(wanted, parts.vqgan.config, parts.tokenizer)
    plan = engine.memory_plan(wanted)
    if plan:
        logger.info("%s", plan)
    model = build_model(config, parts, start, wanted)
    schedule = Schedule(config, len(parts.train_set), engine.steps_per_call)
    engine.steps_per_epoch(schedule.num_samples)  # raises UserError where there is none
    engine.prepare(model, parts.train_set)
    if config.ipu.compile_only:
        return  # the compiled program is in --executable-cache-dir
    if resuming:
        restore(start, config, engine, schedule, parts, given_anew)
        go_on(start, schedule, position, given_anew)
    if config.checkpoints.resume and engine.mean(torch.tensor(float(position.step))) != position.step:
        raise UserError("--resume: the processes found different checkpoints; they must all see {}".format(folder))
    if engine.is_main and not resuming and config.checkpoints.checkpoint_output_dir:
        # Before the first step: whoever resumes this run, killed before it saved anything, must not find an older one.
        move_aside(folder)
    metrics = log.Metrics(
        config.log_dir,
        engine.is_main,
        config.misc.tensorboard,
        config.misc.wandb,
        config.misc.wandb_project_name,
        config.misc.wandb_run_name,
        config.to_dict(),
        resume_step=position.step if resuming else None,
    )
    resumed = start.path if resuming else None
    saver = Saver(config, engine, schedule, parts, folder, model.dalle.config, resumed, metrics)
    progress = log.progress(
        schedule.total_steps(position),
        "training",
        position.step,
        is_main=engine.is_main,
        plain=False,
        max_seconds=max(0.0, schedule.max_seconds - position.seconds) if schedule.max_seconds else 0.0,
    )
    with interruption.deferred(), metrics, progress:
        run(config, engine, parts, schedule, position, saver, metrics, progress, interruption)
        finish(config, engine, parts, progress)
        if config.checkpoints.export_mindalle and schedule.finished(position) and not position.validation_due:
            export(config, engine, parts, model.dalle.config)
        saver.require_saved()


def run(
    config: Config,
    engine: Engine,
    parts: Parts,
    schedule: "Schedule",
    position: Position,
    saver: "Saver",
    metrics: log.Metrics,
    progress: log.Progress,
    interruption: Interruption,
) -> None:
    """The loop over epochs and steps, from `position` to the end or an interruption; `position` moves along."""

    def interrupted() -> bool:
        return interruption.requested is not None

    per_call, every, total_steps = engine.steps_per_call, config.misc.log_every, schedule.total_steps(position)
    bad_steps = BadSteps(config.optimizer.max_bad_steps, position.step, saver.way_out)
    if schedule.finished(position) and not position.validation_due:
        logger.info("nothing left to train: the run ended at step %d; raise its limits to go on", position.step)
        return
    while position.epoch < config.execution.epochs:
        left = total_steps - position.step
        loader = engine.loader(parts.train_set, position.epoch, position.sample_in_epoch, left)
        with contextlib.closing(loader) as batches:
            for batch in () if position.validation_due else batches:
                begin = time.perf_counter()
                learning_rate = schedule.learning_rate(position)
                engine.set_learning_rate(learning_rate)
                result = engine.step(batch)
                position.advance(per_call, config.global_batch)
                # Reading the loss waits for the device, so it is only done when it is shown.
                step = position.step
                due = step % every < per_call or step == per_call or step >= total_steps
                if due or bad_steps.due(step, per_call):
                    losses = {"loss": engine.mean(result.loss)}
                    counts = None if result.bad_steps is None else [int(count) for count in result.bad_steps.tolist()]
                    bad_steps.look(step, losses["loss"], counts)
                if due:
                    if result.image_loss is not None:
                        losses["text_loss"] = engine.mean(result.text_loss)
                        losses["image_loss"] = engine.mean(result.image_loss)
                    schedule.note_loss(losses["loss"])
                if schedule.max_seconds:
                    position.seconds += engine.mean(torch.tensor(time.perf_counter() - begin))
                progress.update(per_call, per_call * config.global_batch, **({"loss": losses["loss"]} if due else {}))
                if due:
                    losses["bad_steps"] = bad_steps.total
                    report_step(position, schedule, losses, result.grad_norm, learning_rate, metrics, progress)
                if schedule.finished(position):
                    break
                stopping = engine.any(interrupted())
                # The last step of an epoch is saved by end_epoch.
                if stopping or (saver.due(position) and schedule.steps_in_epoch(position.sample_in_epoch)):
                    with progress.paused():
                        saver.save(position, checkpoints.checkpoint_name(position.epoch, position.step))
                if stopping:
                    return saver.tell_interrupted(position)
        with progress.paused():
            complete = end_epoch(engine, parts, schedule, position, saver, metrics, interrupted)
        if schedule.finished(position) and complete:
            return
        if engine.any(interrupted()):
            return saver.tell_interrupted(position)


def report_step(
    position: Position,
    schedule: "Schedule",
    losses: Dict[str, float],
    grad_norm: Optional[torch.Tensor],
    learning_rate: float,
    metrics: log.Metrics,
    progress: log.Progress,
) -> None:
    """Log a step's losses to console, file and metrics."""
    norm = None if grad_norm is None else float(grad_norm)
    logger.info(
        "%s",
        log.step_line(
            position.step,
            schedule.total_steps(position),
            position.epoch,
            losses["loss"],
            losses.get("text_loss", float("nan")),
            losses.get("image_loss", float("nan")),
            learning_rate,
            progress.samples_per_second,
        ),
        extra=log.DETAIL,
    )
    metrics.log(
        "train",
        position.step,
        epoch=position.epoch,
        learning_rate=learning_rate,
        grad_norm=norm,
        samples_per_second=progress.samples_per_second,
        **losses,
    )


def end_epoch(
    engine: Engine,
    parts: Parts,
    schedule: "Schedule",
    position: Position,
    saver: "Saver",
    metrics: log.Metrics,
    interrupted: Callable[[], bool],
) -> bool:
    """Validate, tell the schedule, move to the next epoch and save. False: interrupted while validating, and saved."""
    epoch, complete = position.epoch, not schedule.steps_in_epoch(position.sample_in_epoch)
    losses: Optional[Dict[str, float]] = None
    position.validation_due = False
    if parts.validation_set is not None:
        losses = engine.evaluate(parts.validation_set, interrupted)
        if losses is None:
            position.validation_due = True
            saver.save(position, checkpoints.checkpoint_name(epoch, position.step))
            return False
        logger.info("%s", log.validation_line(position.step, epoch, **losses))
        metrics.log("validation", position.step, epoch=epoch, **losses)
    if complete:
        schedule.end_epoch(None if losses is None else losses["loss"])
        position.epoch, position.sample_in_epoch = epoch + 1, 0
    saver.save(position, checkpoints.checkpoint_name(epoch, None if complete else position.step))
    return True


def finish(config: Config, engine: Engine, parts: Parts, progress: log.Progress) -> None:
    """Draw loss.png, report what was unreadable, and say where everything is."""
    if not engine.is_main:
        return
    if getattr(parts.train_set, "num_unreadable", 0):
        logger.warning("%s", parts.train_set.report())
    logger.info("%s", log.throughput_line(progress.overall_samples_per_second))
    peak = engine.peak_memory()
    if peak is not None:
        logger.info("peak memory: %.2f GB", peak / 1e9)
    curve = config.log_dir / "loss.png"
    try:
        if log.plot_losses(config.log_dir / "metrics.jsonl", curve):
            logger.info("losses: %s and %s", config.log_dir / "metrics.jsonl", curve)
    except (UserError, OSError) as error:
        logger.warning("cannot draw %s (%s)", curve, error)


def export(config: Config, engine: Engine, parts: Parts, model_config: DalleConfig) -> None:
    """--export-mindalle: write the trained model, with averaged weights where there are some."""
    weights = engine.model_state()  # every process takes part
    if config.optimizer.ema_decay:
        weights = engine.state_dict()["ema"] or weights
    if engine.is_main:
        vqgan = load_vqgan(*parts.vqgan_paths, channels_last=False)  # the one in `parts` may have let its weights go
        export_mindalle(config.checkpoints.export_mindalle, model_config, weights, vqgan, parts.tokenizer)
        logger.info("exported %s", config.checkpoints.export_mindalle)


def show_plan(config: Config) -> None:
    """--plan: what would lie on each IPU, as text and as plan.png. Reads the vocabulary and a VQGAN's YAML, no data."""
    options = config.model
    vqgan = PUBLISHED[published_vqgan(config)].config
    if options.vqgan_config_path:
        vqgan = VqganConfig.from_yaml(options.vqgan_config_path)
    with torch.device("meta"):
        model = dalle_config(config, load_tokenizer(config.data.bpe_path), VQGAN(vqgan))
    found = plan_report.divisions(config, model, vqgan)
    sys.stdout.write(plan_report.describe(config, model, found) + "\n")
    if found:
        picture = config.log_dir / "plan.png"
        plan_report.draw(found, picture)
        sys.stdout.write("picture: {}\n".format(picture))


# Building -------------------------------------------------------------------------------------------------------------


def build_parts(config: Config, engine: Optional[Engine] = None) -> Parts:
    """Open tokenizer, VQGAN and data sets. engine: of the run, where several processes build their parts."""
    is_main = engine is None or engine.is_main
    if is_main:
        start_report(config.log_dir / SKIPPED)
    if engine is not None:
        engine.barrier()
    tokenizer = load_tokenizer(config.data.bpe_path)
    options, generated = config.data, config.data.generated_data or config.data.synthetic_data
    if generated and config.model.vqgan_model_path is None:
        # Random pictures need no trained VQGAN: one of the published shape does the same work, without a download.
        name = published_vqgan(config)
        logger.info("generated data: a VQGAN of the published %s shape with random weights", name)
        vqgan, paths = VQGAN(PUBLISHED[name].config), (Path("random"), Path("random"))
        vqgan.identity = "random"
    else:
        paths = vqgan_paths(config)
        vqgan = load_vqgan(*paths)
    train_set, validation_set = data.create_datasets(
        input_folder=options.input_folder,
        tokenizer=tokenizer,
        text_seq_len=config.model.text_seq_len,
        image_size=config.model.image_size,
        truncate_captions=options.truncate_captions,
        seed=config.execution.random_seed,
        null_cond_prob=config.model.null_cond_prob,
        validation_folder=options.validation_folder,
        validation_holdout=0.0 if generated else options.validation_fraction,
        num_generated=max(GENERATED_SAMPLES, 2 * config.global_batch) if generated else 0,
        flip=options.augment == "flip",
        index_folder=None if options.cache_codes in ("auto", "off") else Path(options.cache_codes) / "shards",
        max_bad_fraction=options.max_bad_fraction,
        skipped_file=config.log_dir / SKIPPED,
        is_main=is_main,
    )
    return Parts(tokenizer, paths, vqgan, train_set, validation_set)


def encode_images(config: Config, engine: Engine, parts: Parts, position: Position) -> Parts:
    """Turn images into their codes, each once for all epochs and runs (--cache-codes), and let the VQGAN's weights go.

    position: where the run starts.
    """
    options, vqgan = config.data, parts.vqgan
    if not options.keeps_codes:
        return parts
    identity = vqgan.identity
    if identity == "random":
        identity = "random, seed {}, PyTorch {}".format(config.execution.random_seed, torch.__version__)
    cache = data.CodeCache(
        cache_folder("dalle", "codes") if options.cache_codes == "auto" else options.cache_codes,
        made_with={"vqgan": identity, "vqgan_config": dataclasses.asdict(vqgan.config)},
        image_size=config.model.image_size,
        num_codes=vqgan.num_codes,
        codes_per_image=(config.model.image_size // vqgan.config.downsampling) ** 2,
        encode=functools.partial(engine.encode, vqgan),
        team=data.Team(engine.rank, engine.world_size, engine.mean),
        workers=options.dataloader_workers,
        progress=functools.partial(log.progress, unit="image", is_main=engine.is_main),
    )
    # A run that ends within its first epoch does not come to all images: those that it leaves out need not be encoded.
    short = config.execution.max_steps > 0 and position.epoch == 0
    calls = -(-max(0, config.execution.max_steps - position.step) // engine.steps_per_call)
    samples, order = position.sample_in_epoch + calls * engine.steps_per_call * config.global_batch, None
    if config.ipu.compile_only:  # the first one tells the shapes
        short, samples, parts = True, 1, parts._replace(validation_set=None)
    if short and samples < len(parts.train_set):
        order = parts.train_set.order(config.execution.random_seed, 0)[:samples]
    train_set, validation_set = cache.encoded(parts.train_set, parts.validation_set, order)
    if train_set is parts.train_set:
        return parts
    return parts._replace(train_set=train_set, validation_set=validation_set, vqgan=vqgan.to("meta"))


def published_vqgan(config: Config) -> str:
    """The published VQGAN that a configuration takes where none is given: that of its architecture's authors."""
    return "f16-1024" if config.model.architecture == "mini-dalle" else "f16-16384"


def vqgan_paths(config: Config) -> Tuple[Path, Path]:
    """Weights and YAML of the VQGAN: those given, or the published model (downloaded once)."""
    model = config.model
    if model.vqgan_model_path is None:
        return default_vqgan(name=published_vqgan(config))
    return Path(model.vqgan_model_path), Path(model.vqgan_config_path)


def dalle_config(config: Config, tokenizer: Tokenizer, vqgan: VQGAN) -> DalleConfig:
    """The model that a configuration, a vocabulary and a VQGAN describe."""
    options = config.model
    values: Dict[str, Any] = dict(
        num_text_tokens=tokenizer.vocab_size,
        num_image_tokens=vqgan.num_codes,
        grid=options.image_size // vqgan.config.downsampling,
    )
    values.update((field, getattr(options, name)) for field, name in MODEL_OPTIONS.items())
    return DalleConfig(**dict(values, **ARCHITECTURES[options.architecture]))


def model_config(config: Config, parts: Parts, start: Optional[Start]) -> DalleConfig:
    """The model to train: a new one as configured, or that of a checkpoint, trained as configured."""
    wanted = dalle_config(config, parts.tokenizer, parts.vqgan)
    if start is None:
        return wanted
    own = DalleConfig.from_dict(start.checkpoint.config)
    if not own.unique_pads:  # minDALL-E's table may have more rows than its vocabulary
        wanted = dataclasses.replace(wanted, num_text_tokens=max(wanted.num_text_tokens, own.num_text_tokens))
    for name, option in (
        ("num_text_tokens", "bpe_path"),
        ("num_image_tokens", "vqgan_model_path"),
        ("text_seq_len", "text_seq_len"),
        ("grid", "image_size"),
    ):
        if getattr(own, name) != getattr(wanted, name):
            raise UserError(
                "{} has {} = {}, but {} makes it {}".format(
                    start.path, name, getattr(own, name), args.flag_name(option), getattr(wanted, name)
                )
            )
    differing = resume.changes(wanted.to_dict(), own.to_dict())
    for name in TRAINING_OPTIONS:
        differing.pop(name, None)
    if differing:
        flags = {field: args.flag_name(option) for field, option in MODEL_OPTIONS.items()}
        decided = resume.listed(differing, lambda field: flags.get(field, field))
        logger.warning("%s decides on its shape, not the configuration: %s", start.path, decided)
    return dataclasses.replace(own, **{name: getattr(wanted, name) for name in TRAINING_OPTIONS})


def build_model(config: Config, parts: Parts, start: Optional[Start], wanted: DalleConfig) -> TextToImage:
    """A new model, or the one of a checkpoint, whose weights it takes over."""
    if start is None:
        dalle = DALLE(wanted)
    else:
        averaged = None if config.checkpoints.resume else start.checkpoint.ema  # the better ones to start anew from
        weights = start.checkpoint.weights if averaged is None else averaged
        dalle = build_dalle(wanted, weights)
    logger.info(
        "DALL-E: %.2f M parameters, %d text + %d image tokens",
        sum(p.numel() for p in dalle.parameters()) / 1e6,
        wanted.text_seq_len,
        wanted.image_seq_len,
    )
    encoded = isinstance(parts.train_set, data.CodesDataset)
    return TextToImage(dalle, None if encoded else parts.vqgan, config.model.code_noise)


class Schedule:
    """When training ends and which learning rate each step takes.

    Both follow from the samples seen and the options now: a run that is resumed with another global batch ends where a
    run with this batch ends, and takes its rates.
    """

    def __init__(self, config: Config, num_samples: int, steps_per_call: int = 1) -> None:
        """num_samples: of the training set. steps_per_call: those of the engine."""
        execution = config.execution
        self.options, self.epochs, self.max_steps = config.optimizer, execution.epochs, execution.max_steps
        self.num_samples, self.global_batch, self.steps_per_call = num_samples, config.global_batch, steps_per_call
        self.max_seconds = 60.0 * execution.max_minutes
        self.plateau = schedules.Plateau(self.options.learning_rate)
        self.losses = [0.0, 0]  # sum and number of the training losses seen in this epoch

    @property
    def samples_per_call(self) -> int:
        """Samples that one call of the device takes: the unit in which an epoch is rounded."""
        return self.global_batch * self.steps_per_call

    def steps_in_epoch(self, start: int = 0) -> int:
        """Optimizer steps in an epoch, from sample `start` on."""
        return schedules.whole_steps(self.num_samples - start, self.global_batch, self.steps_per_call)

    def steps_left(self, position: Position) -> int:
        """Optimizer steps to the end that --epochs and --max-steps set."""
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

    def learning_rate(self, position: Position) -> float:
        """The rate of the next step."""
        name, base = self.options.lr_scheduler, self.options.learning_rate
        if name == "ReduceLROnPlateau":
            return self.plateau.learning_rate
        if name == "cosine":
            total = position.samples + self.steps_left(position) * self.global_batch
            progress = position.samples / max(1, total)
            if self.max_seconds:  # whichever limit comes first ends the cosine
                progress = max(progress, position.seconds / self.max_seconds)
            warmup = (self.options.warmup_steps + 1) * self.global_batch
            ramp = min(1.0, (position.samples + self.global_batch) / warmup)
            return base * ramp * schedules.cosine_factor(progress, self.options.lr_floor)
        return base * schedules.epoch_factor(name, position.epoch, self.epochs)

    def note_loss(self, loss: float) -> None:
        """Remember a training loss for the plateau; one that is not finite says nothing."""
        if math.isfinite(loss):
            self.losses = [self.losses[0] + loss, self.losses[1] + 1]

    def end_epoch(self, validation_loss: Optional[float]) -> None:
        """Tell the plateau the epoch's loss: of validation, or the mean training loss where there is none."""
        mean = self.losses[0] / self.losses[1] if self.losses[1] else float("inf")
        self.plateau.step(mean if validation_loss is None else validation_loss)
        self.losses = [0.0, 0]

    def state_dict(self) -> Dict[str, Any]:
        """Plain values that `load_state_dict` takes."""
        return {"plateau": self.plateau.state_dict(), "losses": list(self.losses)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a state_dict."""
        self.plateau.load_state_dict(state["plateau"])
        self.losses = list(state["losses"])


# Checkpoints ----------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints: the published layout, plus what exact resume needs.

    When one cannot be written, training goes on, for somebody may make room, and a tenth of the usual way later it is
    tried again. Only a run whose end could not be saved ends with an error.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        schedule: Schedule,
        parts: Parts,
        folder: Path,
        model_config: DalleConfig,
        resumed: Optional[Path],
        metrics: log.Metrics,
    ) -> None:
        self.config, self.engine, self.schedule, self.parts, self.folder = config, engine, schedule, parts, folder
        self.model_config, self.metrics = model_config, metrics
        self.newest = resumed  # the newest checkpoint of this run
        self.saved_step = -1  # its step, if this process wrote it
        self.failing = False  # whether the last attempt failed; the same in all processes
        self.problem: Optional[UserError] = None  # why; only the main process knows

    def due(self, position: Position) -> bool:
        """Whether to save after this step, the last one of an epoch aside."""
        every, per_call = self.config.checkpoints.checkpoint_save_steps, self.engine.steps_per_call
        if self.failing:
            every = max(per_call, (every or self.schedule.steps_in_epoch()) // 10)
        return bool(every) and position.step % every < per_call

    def way_out(self) -> str:
        """What to do where losses or weights are not finite, for an error's line."""
        begin = "start again with" if self.newest is None else "go on from it with --resume and"
        remedies = self.engine.remedies()
        flags = ", ".join(remedies[:-1]) + " or " + remedies[-1] if remedies[1:] else remedies[0]
        return "the last good checkpoint is {}: {} {}".format(self.newest or "none", begin, flags)

    def save(self, position: Position, name: str) -> None:
        """Save to `name` in the checkpoint folder, unless this step is saved already; drop old ones as configured."""
        if self.saved_step == position.step or not self.config.checkpoints.checkpoint_output_dir:
            return
        weights, state = self.engine.model_state(), self.engine.state_dict()  # every process takes part
        bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
        if self.engine.any(bool(bad)):
            raise UserError(
                "step {}: weights are not finite ({}) and were not saved; {}".format(
                    position.step, bad[0] if bad else "in the main process", self.way_out()
                )
            )
        self.problem = None
        if self.engine.is_main:
            try:
                self.write(self.folder / name, position, weights, state)
            except UserError as error:
                self.problem = error
                logger.error("step %d: %s; the newest checkpoint is %s", position.step, error, self.newest or "none")
        self.failing = self.engine.any(self.problem is not None)  # the others wait here for the file
        if not self.failing:
            self.saved_step, self.newest = position.step, self.folder / name

    def write(self, path: Path, position: Position, weights: Dict[str, torch.Tensor], state: Dict[str, Any]) -> None:
        """Write one checkpoint, in the main process. Raises UserError."""
        self.metrics.sync()  # what the file says has happened is on the disk before it
        begin = time.perf_counter()
        checkpoints.save_checkpoint(
            path,
            checkpoints.dalle_checkpoint(
                self.model_config.to_dict(),
                weights,
                position.epoch,
                state.pop("optimizer"),
                self.schedule.state_dict(),
                published_hparams(self.config),
                self.training_state(position, state),
            ),
        )
        logger.info("saved %s in %.1f s", path, time.perf_counter() - begin, extra=log.DETAIL)
        checkpoints.prune_checkpoints(self.folder, self.config.checkpoints.keep_checkpoints)

    def require_saved(self) -> None:
        """Raise UserError when what the run ended with could not be saved."""
        if self.problem is not None:
            raise UserError("{}; the newest checkpoint is {}".format(self.problem, self.newest or "none"))

    def tell_interrupted(self, position: Position) -> None:
        """Say that the run ends early, and how it goes on."""
        if self.saved_step == position.step:
            logger.info("interrupted at step %d, saved as %s; --resume goes on", position.step, self.newest)
        else:
            logger.warning("interrupted at step %d, not saved", position.step)

    def training_state(self, position: Position, engine_state: Dict[str, Any]) -> Dict[str, Any]:
        """What exact resume needs besides weights, optimizer and schedule."""
        return {
            "position": dict(vars(position)),
            "engine": engine_state,
            **identities(self.config, self.parts),
            "num_samples": len(self.parts.train_set),
            "config": self.config.to_dict(),
        }


def identities(config: Config, parts: Parts) -> Dict[str, Dict[str, Any]]:
    """What vocabulary and VQGAN are, and where they lay: those that a run is resumed with must be the same."""
    weights, yaml = parts.vqgan_paths
    return {
        "tokenizer": dict(parts.tokenizer.identity, path=config.data.bpe_path or ""),
        "vqgan": {
            "sha256": parts.vqgan.identity,
            "options": json.dumps(parts.vqgan.config.to_dict(), sort_keys=True),
            "weights": str(weights),
            "config": str(yaml),
        },
    }


@contextlib.contextmanager
def folders_locked(config: Config, engine: Engine) -> Iterator[None]:
    """Within the context no other training writes checkpoints, logs or metrics where this one does."""
    own = []
    if config.checkpoints.checkpoint_output_dir:
        own.append(("--checkpoint-output-dir", Path(config.checkpoints.checkpoint_output_dir)))
    own.append(("--log-dir", config.log_dir))
    with only_writer(*(own if engine.is_main else [])):
        yield


def check_writable(folder: Path) -> None:
    """Raise UserError when checkpoints cannot be written: before training, not after hours of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--checkpoint-output-dir {}: {}".format(folder, error.strerror or error)) from None
    if not os.access(str(folder), os.W_OK | os.X_OK):
        raise UserError("--checkpoint-output-dir {}: no permission to write there".format(folder))


def move_aside(folder: Path) -> None:
    """Move an earlier run's checkpoints to the first free of folder/earlier.1, folder/earlier.2, ..."""
    old = checkpoints.list_checkpoints(folder)
    if not old:
        return
    number = 1
    while (folder / "earlier.{}".format(number)).exists():
        number += 1
    earlier = folder / "earlier.{}".format(number)
    # Inside the folder, for that is what is known to be writable: it may be a mount point.
    try:
        earlier.mkdir()
        for path in old:
            path.rename(earlier / path.name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError("--checkpoint-output-dir: cannot make {}: {}".format(earlier, reason)) from None
    logger.info("the checkpoints of an earlier run are now in %s (--resume would have gone on from them)", earlier)


def published_hparams(config: Config) -> Dict[str, Any]:
    """The hparams of the published layout that say nothing about the model but where its parts lay."""
    ipu = config.ipu
    return {
        "embedding_ipu_id": ipu.embedding_ipu_id,
        "embedding_serialization_factor": ipu.embedding_serialization_factor,
        "layers_per_ipu": list(ipu.layers_per_ipu),
        "cls_ipu_id": ipu.cls_ipu_id,
        "fp16": config.execution.fp16,
        "byteio": ipu.byteio,
    }


def find_start(config: Config, folder: Path) -> Optional[Start]:
    """The checkpoint to begin from: the newest complete one with --resume, or --pretrained-checkpoint; else None."""
    if config.checkpoints.pretrained_checkpoint:
        path = published.resolve(config.checkpoints.pretrained_checkpoint)
        return Start(path, checkpoints.read_dalle(path))
    if not config.checkpoints.resume:
        return None
    newest = checkpoints.newest_checkpoint(folder)
    if newest is None:
        logger.info("--resume: no complete checkpoint in %s, starting from the beginning", folder)
        return None
    checkpoint = checkpoints.read_dalle(newest)
    if checkpoint.training is None:
        raise UserError(
            "--resume: {} holds no training state; start from it with --pretrained-checkpoint".format(newest)
        )
    return Start(newest, checkpoint)


def with_parts_of(start: Optional[Start], config: Config) -> Config:
    """Where neither flags nor configuration name a vocabulary or a VQGAN, take those of the checkpoint to begin from.

    They lie beside a model in minDALL-E's layout; other checkpoints note where they were.
    """
    if start is None:
        return config
    if start.checkpoint.format == "mindalle":
        folder = start.checkpoint.path.parent
        vocabulary, vqgan = folder / published.TOKENIZER, (folder / published.STAGE1, folder / "config.yaml")
    else:
        noted = recorded_files(start.checkpoint, "vqgan")
        vqgan = (Path(noted.get("weights", "")), Path(noted.get("config", "")))
        vocabulary = Path(find_vocabulary(recorded_files(start.checkpoint, "tokenizer").get("path", "")))
    found: Dict[str, Any] = {}
    if config.data.bpe_path is None and vocabulary != Path() and vocabulary.exists():
        found["bpe_path"] = str(vocabulary)
    if config.model.vqgan_model_path is None and all(path.is_file() for path in vqgan):
        found.update(vqgan_model_path=str(vqgan[0]), vqgan_config_path=str(vqgan[1]))
    for name, path in found.items():
        logger.info("%s %s, of %s", args.flag_name(name), path, start.path)
    return config.replace(**found)


@contextlib.contextmanager
def reading_state(start: Start) -> Iterator[None]:
    """Within the context whatever is wrong with a training state is one line."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        # A file that another program wrote: its weights may be good, its state is none of ours.
        raise UserError(
            "--resume: {} holds no training state of this application ({}: {}); start from it with "
            "--pretrained-checkpoint".format(start.path, type(error).__name__, str(error)[:200])
        ) from error


def changed_options(start: Start, config: Config) -> resume.Changes:
    """Return the options that a resumed run is given anew. Raises UsageError for those that cannot change."""
    rules, model = args.resume_rules(), DalleConfig.from_dict(start.checkpoint.config).to_dict()
    now = {name: value for name, value in config.to_dict().items() if rules.get(name) in (args.APPLIES, args.FIXED)}
    for field, name in MODEL_OPTIONS.items():
        # Of a run that began with --pretrained-checkpoint the model decided, whatever its configuration said.
        if rules[name] == args.FIXED and model[field] == now[name]:
            del now[name]
    with reading_state(start):
        found = resume.changes(start.checkpoint.training.get("config"), now)
    fixed = [name for name, rule in rules.items() if rule == args.FIXED]
    resume.refuse(found, fixed, args.flag_name, start.path, "start a new run in another --checkpoint-output-dir")
    return found


def saved_position(start: Start, config: Config) -> Position:
    """Return the position that a checkpoint was saved at. Raises UserError where it says none."""
    with reading_state(start):
        training = start.checkpoint.training
        values = dict(training["position"])
        if "step_in_epoch" in values:  # an older version's, which counted steps of one global batch
            saved = dict(config.to_dict(), **training.get("config", {}))
            batch = saved["batch_size"] * saved["gradient_accumulation"] * saved["replication_factor"]
            values.update(sample_in_epoch=values.pop("step_in_epoch") * batch, samples=values["step"] * batch)
        position = Position(**values)
        if not all(isinstance(value, (int, float)) and value >= 0 for value in vars(position).values()):
            raise ValueError("position {}".format(values))
        return position


def restore(
    start: Start, config: Config, engine: Engine, schedule: Schedule, parts: Parts, given_anew: resume.Changes
) -> None:
    """Give engine and schedule their states back. Raises UserError."""
    training, own = start.checkpoint.training, identities(config, parts)
    with reading_state(start):
        for what, key, option, noted in (
            ("tokenizer", "sha256", "bpe_path", "path"),
            ("vqgan", "sha256", "vqgan_model_path", "weights"),
            ("vqgan", "options", "vqgan_config_path", "config"),
        ):
            saved = start.checkpoint.identity[what]
            # Older versions noted no options of the VQGAN.
            if (saved.get(key, own[what][key]) if key == "options" else saved[key]) != own[what][key]:
                raise UserError(
                    "--resume: {} was trained with another file ({}) than {} names now".format(
                        start.path, saved.get(noted) or "CLIP vocabulary", args.flag_name(option)
                    )
                )
        if training["num_samples"] != len(parts.train_set):
            logger.warning(
                "the training set has %d samples, it had %d when %s was written: their order is a new one",
                len(parts.train_set),
                training["num_samples"],
                start.path,
            )
        engine.load_state_dict(dict(training["engine"], optimizer=start.checkpoint.opt_state))
        schedule.load_state_dict(start.checkpoint.scheduler_state)
    if not given_anew.keys().isdisjoint(("learning_rate", "lr_scheduler")):
        schedule.plateau.restart(config.optimizer.learning_rate)


def go_on(start: Start, schedule: Schedule, position: Position, given_anew: resume.Changes) -> None:
    """Log where a run is resumed, and with what. An epoch whose rest fills no global batch is at its end."""
    done, call = position.sample_in_epoch, schedule.samples_per_call
    skipped = max(0, schedule.num_samples - done) % call
    logger.info(
        "resumed %s: epoch %d, step %d, sample %d of %d",
        start.path,
        position.epoch,
        position.step,
        done,
        schedule.num_samples,
    )
    if given_anew:
        logger.info("given anew: %s", resume.listed(given_anew, args.flag_name))
    if done % call and skipped:
        text = "epoch %d: its last %d sample(s) do not fill a batch of %d and are skipped"
        logger.info(text, position.epoch, skipped, call)
    position.validation_due |= bool(done) and not schedule.steps_in_epoch(done)


if __name__ == "__main__":
    run_main(main)
