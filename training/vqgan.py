"""Stage 1: training of a VQGAN on images, in one process, with the loop of stage 2.

Letters: B images, S image height and width, N codes per image.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

import log
from checkpoints import save_checkpoint, verify
from checkpoints.vqgan import check_size, load_perceptual, load_vqgan
from dalle.pictures import Cell, labelled_grid, save_picture
from data import DEMO, require_folder
from data.uncaptioned import Batches, ImageSource, open_images
from engines.native import pick_device
from models.vqgan import VQGAN
from models.vqgan_metrics import Reconstructions, code_use, psnr, reconstruct, retrieval
from training.files import move_aside, not_finite, reading
from training.loop import Loop
from training.schedule import Position
from training.vqgan_options import AT_RESUME, VqganOptions, choose_config
from training.vqgan_trainer import Trainer
from utils import resume
from utils.bad_steps import BadSteps
from utils.errors import UsageError, UserError
from utils.files import atomic_write, make_folder, writing
from utils.interrupts import Interruption
from utils.options import flag_name
from utils.resume import APPLIES, FIXED
from utils.skipped import start_report

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, STATE = "vqgan.safetensors", "vqgan.yaml", "training.pt"
PICTURES, TRAIN_PICTURES = "reconstructions.png", "reconstructions_train.png"
SKIPPED = "skipped.jsonl"
SHOWN = 36
"""Maximum number of pairs (image and reconstruction) in a contact sheet."""
EVALUATED = 256
"""Maximum number of held-out images in evaluations; on the demo set the last evaluation takes all."""
NO_STATE, NO_FILE = "is no state of train_vqgan.py", "--output: cannot write"


def train(args: VqganOptions, interruption: Interruption | None = None) -> dict[str, float]:
    """Train as `args` say; returns the final figures, {} if interrupted. Raises UserError."""
    run = Run(args, interruption or Interruption())
    try:
        return run.train()
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("not enough GPU memory: lower --batch-size") from error


class Run(Loop):
    """A training run: the trainer, its images, its position, and its state on disk."""

    def __init__(self, args: VqganOptions, interruption: Interruption) -> None:
        """Build all parts; with --resume the run continues at the next step. Raises UserError."""
        torch.manual_seed(args.random_seed)
        self.args, self.interruption, self.folder = args, interruption, Path(args.output)
        make_folder("--output", self.folder)
        if args.input_folder != DEMO:
            require_folder(args.input_folder)
        self.trainer = trainer = make_trainer(args, pick_device(args.device, 0))
        config, skipped = trainer.model.config, self.folder / SKIPPED
        state = read_state(args, trainer.model)
        split = (args.validation_images, args.random_seed)
        bad = (args.max_bad_fraction, skipped)
        images = open_images(args.input_folder, config.resolution, *split, *bad, args.shard_images)
        self.images, self.held_out = images
        start_report(skipped)
        size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        logger.info(
            f"VQGAN f{config.downsampling}, {config.num_codes} codes, {size:.2f} M parameters; {len(self.images)} "
            f"images, {len(self.held_out)} held out; {trainer.device}"
        )
        if state is None:
            names = (STATE, WEIGHTS, CONFIG, PICTURES, TRAIN_PICTURES, "metrics.jsonl")
            old = [self.folder / name for name in names if (self.folder / name).is_file()]
            done = "the files of an earlier run are now in %s (--resume would have continued it)"
            move_aside(old, "earlier-{}", NO_FILE, done)
        with contextlib.nullcontext() if state is None else reading(self.folder / STATE, NO_STATE):
            self.begin(state)
        step = self.position.step
        self.metrics = log.Metrics(self.folder, resume_step=None if state is None else step)
        self.bad_steps = BadSteps(args.max_bad_steps, step, self.way_out)
        self.logged = replace(self.position)

    def begin(self, state: dict[str, Any] | None) -> None:
        """Start from the beginning, or resume a state. `position.seconds` excludes evaluation and saving."""
        args, taken = self.args, int(state["drawn"]) if state else 0
        self.position = Position(seconds=float(state["seconds"]) if state else 0.0)
        if len(self.images) < args.batch_size:
            logger.warning(f"--batch-size {args.batch_size}: there are only {len(self.images)} training images; they "
                           "are one batch")
        self.batches = Batches(self.images, args.batch_size, args.random_seed, taken, args.dataloader_workers)
        if state:
            self.trainer.load_state_dict(state["trainer"])
            self.position.step = self.trainer.step_number
            logger.info(f"resumed at step {self.position.step}, {100 * self.progress:.0f} % of the run")
            was, now = state["num_images"], len(self.images)
            if was != now:
                logger.warning(f"there were {was} training images, now {now}: the held-out images differ")

    @property
    def progress(self) -> float:
        """Progress of the run: 0 at its start, 1 at its end."""
        steps, minutes = self.args.steps, self.args.minutes
        if steps is not None:
            return self.position.step / steps
        assert minutes is not None  # ensured by `VqganOptions.check`
        return self.position.seconds / (60.0 * minutes)

    def train(self) -> dict[str, float]:
        """Train to the end and save the result; returns its figures, {} if interrupted."""
        trainer, folder = self.trainer, self.folder
        with self.metrics:
            with self.interruption.deferred(), contextlib.closing(self.batches):
                if not self.take_steps(self.next_batches()):
                    how = "saved; continue with --resume" if self.args.save_every else "not saved"
                    logger.info(f"interrupted at step {self.position.step}, {how}")
                    return {}
                if not trainer.codebook_ready:  # the run was too short
                    trainer.initialise_codebook(self.batches)
            save_weights(folder, trainer.result, self.args.save_half)
            saved = load_vqgan(folder / WEIGHTS, folder / CONFIG, trainer.device)
            demo = self.args.input_folder == DEMO
            report = final_report(saved, self.images, self.held_out, folder, trainer.device, demo)
            self.metrics.log("final", self.position.step, **report)
        unreadable = self.images.unreadable | self.held_out.unreadable
        if unreadable:
            text = f"{len(unreadable)} images could not be read, such as {min(unreadable)}"
            logger.warning(f"{text}; {folder / SKIPPED} lists them all")
        logger.info(f"step {self.position.step}, the end: {listed(report)}")
        logger.info(f"weights, YAML, metrics and reconstructions are in {folder}")
        return report

    def next_batches(self) -> Iterator[Tensor]:
        """Yield uint8 (B, 3, S, S) to the end of the run. Features are quantised from --continuous-start on."""
        while not self.finished():
            self.mark = time.monotonic()
            if not self.trainer.codebook_ready and self.progress >= self.args.continuous_start:
                self.trainer.initialise_codebook(self.batches)
            yield next(self.batches)

    def finished(self) -> bool:
        return self.progress >= 1.0

    def take_step(self, batch: Tensor) -> bool:
        self.losses = self.trainer.step(batch, self.progress)
        self.position.advance(1, len(batch))
        self.position.seconds += time.monotonic() - self.mark
        return self.position.step % self.args.log_every == 0 or self.finished()

    def watch(self) -> None:
        self.bad_steps.look(self.position.step, float(self.losses["reconstruction"]), self.trainer.bad_steps)

    def end_step(self, due: bool) -> None:
        position, logged = self.position, self.logged
        if due:
            row = {name: float(value) for name, value in self.losses.items()}
            row["bad_steps"] = self.trainer.bad_steps[0]
            seconds = max(position.seconds - logged.seconds, 1e-9)
            row["images_per_second"] = (position.samples - logged.samples) / seconds
            self.logged = replace(position)
            self.report("train", f" ({self.progress:.0%})", row)

    def evaluate(self, ended: bool) -> None:
        trainer = self.trainer
        if self.position.step % self.args.evaluate_every == 0 and trainer.codebook_ready:
            part = self.held_out.chunks(range(min(EVALUATED, len(self.held_out))))
            figures = reconstruct(trainer.result, part, trainer.device).figures(trainer.model.num_codes)
            self.report("heldout", ", held out", figures)

    def report(self, event: str, what: str, row: dict[str, float]) -> None:
        """Log figures to console and metrics."""
        step = self.position.step
        self.metrics.log(event, step, seconds=round(self.position.seconds, 1), **row)
        logger.info(f"step {step}{what}: {listed(row)}")

    def save(self, stopping: bool) -> None:
        step, every, ended = self.position.step, self.args.save_every, self.finished()
        if not every or not (step % every == 0 or ended or stopping):
            return
        self.watch()  # after too many bad steps, do not save
        try:
            self.write()
        except UserError as error:
            if ended or stopping:
                raise
            logger.error(f"step {step}: {error}. Training continues; the next state will be tried")

    def write(self) -> None:
        """Write the state for `read_state`, over an older one. Raises UserError."""
        model = self.trainer.model
        require_finite(model, f"step {self.position.step}")
        state = {
            "options": vars(self.args),
            "config": model.config.to_dict(),
            "start": model.identity,
            "num_images": len(self.images),
            "drawn": self.batches.taken,
            "seconds": self.position.seconds,
            "trainer": self.trainer.state_dict(),
        }
        save_checkpoint(self.folder / STATE, state)

    def way_out(self) -> str:
        """What to do about non-finite losses, for error messages."""
        file = self.folder / STATE
        newest = f"the last good state is {file}: continue from it with --resume and" if file.is_file() else "take"
        return newest + " a lower --learning-rate or --clip-grad-norm"


def make_trainer(args: VqganOptions, device: torch.device) -> Trainer:
    """The model of `args` and its trainer. Raises UserError."""
    if args.vqgan_model_path and args.vqgan_config_path:  # both or none
        model = load_vqgan(args.vqgan_model_path, args.vqgan_config_path, device).requires_grad_(True)
    else:
        config = choose_config(args.config or "f8_demo")
        check_size(config)
        model = VQGAN(config).to(device)
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    perceptual: nn.Module | None = None
    if args.perceptual_weights:
        perceptual = load_perceptual(args.perceptual_weights).to(device)
    return Trainer(model, args, device, bool(args.vqgan_model_path), perceptual)


#: Figures whose names lack the unit, as the console shows them.
_SHOWN: dict[str, Callable[[float], str]] = {
    "psnr": "PSNR {:.2f} dB".format,
    "psnr_train": "training images: PSNR {:.2f} dB".format,
    "codes_used": "{:.1%} of the codes used".format,
    "perplexity": "perplexity {:.1f} codes".format,
    "ceiling_heldout": "{:.1%} of held-out reconstructions nearest to their own image".format,
    "ceiling_train": "{:.1%} of training ones".format,
    "images_per_second": log.rate,
}


def listed(figures: dict[str, float]) -> str:
    """Figures for the console."""
    shown = {name: value for name, value in figures.items() if value or name != "bad_steps"}
    return ", ".join(
        _SHOWN.get(name, (name.replace("_", " ") + " {:.4g}").format)(value) for name, value in shown.items()
    )


def read_state(args: VqganOptions, model: VQGAN) -> dict[str, Any] | None:
    """Read what `Run.write` wrote, only tensors and plain values; None without --resume or without a file.

    model: as `args` describe it. Raises UserError if the file is damaged, or the options do not fit its run.
    """
    file = Path(args.output) / STATE
    if not args.resume:
        return None
    if not file.is_file():
        logger.info(f"--resume: there is no {file}, starting from the beginning")
        return None
    verify(file)
    try:
        state: dict[str, Any] = torch.load(str(file), map_location="cpu", weights_only=True)
        found = resume.changes(dict(state["options"]), vars(args))
        same_config = state["config"] == model.config.to_dict()
        same_start = not args.vqgan_model_path or state.get("start", model.identity) == model.identity
        fixed = [name for name, rule in AT_RESUME.items() if rule == FIXED]
        # Once there is a codebook, the part of the run without one is over.
        fixed += ["continuous_start"] if state["trainer"]["codebook_ready"] else []
    except Exception as error:  # the restricted unpickler may raise anything on foreign files
        raise UserError(f"--resume: {file} {NO_STATE} ({type(error).__name__})") from error
    resume.refuse(found, fixed, flag_name, file, "start a new run in another --output")
    if not same_config:
        raise UsageError(f"--resume: {file} was written with another --config")
    if not same_start:
        raise UsageError(f"--resume: {file} started from other weights than --vqgan-model-path now names")
    found = {name: found[name] for name, rule in AT_RESUME.items() if rule == APPLIES and name in found}
    if found:
        logger.info(f"changed options: {resume.listed(found, flag_name)}")
    return state


# ---- the result


def final_report(
    model: VQGAN, train_images: ImageSource, held_out: ImageSource, folder: Path, device: torch.device, demo: bool
) -> dict[str, float]:
    """Figures of the saved weights; on the demo set also how often a reconstruction is nearest to its own image."""
    shown = reconstruct(model, held_out.chunks(range(len(held_out) if demo else min(EVALUATED, len(held_out)))), device)
    save_grid(folder / PICTURES, shown, "held-out")
    report = shown.figures(model.num_codes)
    if demo:
        count = len(train_images)
        every = reconstruct(model, train_images.chunks(range(count)), device)
        gallery = torch.cat([every.originals, shown.originals])
        report["ceiling_heldout"] = retrieval(shown.images, torch.arange(count, len(gallery)), gallery, device)
        pick = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:200]
        some = Reconstructions(*(part[pick] for part in every))
        save_grid(folder / TRAIN_PICTURES, some, "training")
        report["ceiling_train"] = retrieval(some.images, pick, gallery, device)
        report["psnr_train"] = psnr(some.originals, some.images)
        report["codes_used"] = code_use(every.codes, model.num_codes)["codes_used"]
    return report


def save_grid(file: Path, shown: Reconstructions, which: str) -> None:
    """Write the first SHOWN pairs as a PNG file, each with its PSNR; which: their name in the heading."""
    pairs = list(zip(shown.originals.split(1), shown.images.split(1)))
    cells = [Cell([pair[0][0], pair[1][0]], f"{psnr(*pair):.1f} dB") for pair in pairs[:SHOWN]]
    heading = f"{len(cells)} of {len(pairs)} {which} images, PSNR of all: {psnr(shown.originals, shown.images):.1f} dB"
    with writing(NO_FILE, file):
        save_picture(labelled_grid([(heading, cells)], "On the left an image, on the right its reconstruction"), file)


def save_weights(folder: Path, model: VQGAN, half: bool) -> None:
    """Write weights and YAML, each atomically. Raises UserError."""
    from safetensors.torch import save as to_bytes

    require_finite(model, "--output")
    dtype = torch.float16 if half else torch.float32
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    with writing(NO_FILE, folder / WEIGHTS), atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(to_bytes(state))
    with writing(NO_FILE, folder / CONFIG):
        model.config.to_yaml(folder / CONFIG)


def require_finite(model: nn.Module, when: str) -> None:
    """Raise UserError for non-finite weights, which are never saved."""
    bad = not_finite(model.state_dict())
    if bad is not None:
        raise UserError(f"{when}: weights are not finite ({bad}) and were not saved; lower --learning-rate")
