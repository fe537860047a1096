"""Stage 1: train or fine-tune a VQGAN on a folder of images or on the built-in demo set.

    python train_vqgan.py --input-folder demo --minutes 10 --output output/vqgan
    python train_vqgan.py --input-folder demo --minutes 10 --output output/vqgan --resume    # go on after a stop
    python train_vqgan.py --input-folder DIR --vqgan_model_path W.ckpt --vqgan_config_path C.yaml \\
        --learning-rate 1e-4 --steps 10000 --output output/vqgan

Writes into --output: vqgan.safetensors and vqgan.yaml (for --vqgan_model_path and --vqgan_config_path),
metrics.jsonl, reconstructions.png (rows of originals, each above its reconstructions) and training.pt (for --resume).
Letters: B images, S image height and width, N codes per image.
"""

import argparse
import contextlib
import logging
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import torch
from torch import nn

import log
from args import Parser, flag_name
from dalle.pictures import save_picture, to_pil
from data import DEMO
from data.uncaptioned import Batches, ImageSource, open_images
from engines.native import pick_device
from models.vqgan import PUBLISHED, VQGAN, VqganConfig, check_size, load_vqgan
from models.vqgan_config import DEMO_CONFIGS
from models.vqgan_metrics import Reconstructions, code_use, psnr, reconstruct, retrieval
from models.vqgan_training import Trainer, TrainingOptions
from utils import resume
from utils.bad_steps import BadSteps
from utils.checkpoints import save_checkpoint, verify
from utils.errors import UsageError, UserError, nearest, run_main
from utils.files import atomic_write
from utils.flags import number, parse_flags, path, whole
from utils.interrupts import Interruption
from utils.locks import only_writer
from utils.resume import APPLIES, CONTENT, FIXED, FREE
from utils.skipped import start_report

logger = logging.getLogger(__name__)

CONFIGS: Dict[str, VqganConfig] = {**{name: published.config for name, published in PUBLISHED.items()}, **DEMO_CONFIGS}
WEIGHTS, CONFIG, STATE = "vqgan.safetensors", "vqgan.yaml", "training.pt"
PICTURES, TRAIN_PICTURES = "reconstructions.png", "reconstructions_train.png"
SKIPPED = "skipped.jsonl"
EVALUATED = 256
"""Held-out images at most that evaluations look at; on the demo set the last one looks at all."""
AT_RESUME = {
    FIXED: ("batch_size", "random_seed", "codebook_update", "validation_images"),
    CONTENT: ("config", "vqgan_model_path", "vqgan_config_path"),
    APPLIES: (
        *("input_folder", "max_bad_fraction", "save_half", "steps", "minutes", "learning_rate", "weight_decay"),
        *("clip_grad_norm", "max_bad_steps", "ema_decay", "continuous_start", "revive_every", "device", "l1_weight"),
        *("l2_weight", "codebook_weight", "perceptual_weights", "perceptual_weight", "discriminator_start"),
        *("discriminator_weight",),
    ),
    FREE: ("output", "dataloader_workers", "resume", "log_every", "evaluate_every", "save_every"),
}
"""What --resume does with a new value of each option, see utils/resume.py."""


# ---- command line


def make_parser() -> Parser:
    """The flags of train_vqgan.py."""
    usual = TrainingOptions()
    parser = Parser(
        prog="train_vqgan.py",
        usage="%(prog)s --input-folder DIR --output DIR (--steps N | --minutes T) [flags]",
        description="Train or fine-tune a VQGAN.",
        epilog="Flags may be spelled with - or _.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120),
    )

    def add(group: Any, flag: str, kind: Any, default: Any, text: str) -> None:
        shown = "" if default is None else " (default: {})".format(default)
        metavar = "X" if isinstance(default, float) else "N"
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text + shown)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--input-folder",
        type=path,
        required=True,
        metavar="DIR",
        help="images at any depth, or in webdataset shards such as 'DIR/{00000..00099}.tar'; or demo",
    )
    data.add_argument("--output", type=path, required=True, metavar="DIR", help="for all that the run writes")
    add(data, "--validation-images", whole(1), 256, "images held out from training, a tenth at most")
    share = "share of the images that may be unreadable; those that are, skipped.jsonl in --output lists"
    add(data, "--max-bad-fraction", number(0, 1), 0.01, share)
    add(data, "--dataloader-workers", whole(0, 1024), 0, "processes that read images")
    model = parser.add_argument_group("model")
    configs = "one of {} (default: f8_demo), or a YAML file".format(", ".join(CONFIGS))
    model.add_argument("--config", metavar="NAME", help=configs)
    model.add_argument("--vqgan_model_path", type=path, metavar="FILE", help="weights to start from")
    model.add_argument("--vqgan_config_path", type=path, metavar="FILE", help="YAML file of those weights")
    model.add_argument("--save-half", action="store_true", help="save float16 weights; final figures are theirs")
    run = parser.add_argument_group("optimisation")
    length = run.add_mutually_exclusive_group(required=True)
    add(length, "--steps", whole(1), None, "optimizer steps")
    add(length, "--minutes", number(0, above=True), None, "training time; the learning rate follows the clock")
    add(run, "--batch-size", whole(1), usual.batch_size, "images per step")
    add(run, "--learning-rate", number(0, above=True), usual.learning_rate, "peak of a warm-up and cosine schedule")
    add(run, "--weight-decay", number(0), usual.weight_decay, "AdamW decay of weights with two or more dimensions")
    add(run, "--clip-grad-norm", number(0, above=True), usual.clip_grad_norm, "largest gradient norm")
    text = "stop after so many steps in a row whose loss or gradient is not finite; single ones are left out; 0: never"
    add(run, "--max-bad-steps", whole(0), 20, text)
    add(run, "--ema-decay", number(0, 0.999999), usual.ema_decay, "average of the weights that is saved; 0: none")
    run.add_argument(
        "--codebook-update",
        choices=("ema", "gradient"),
        default=usual.codebook_update,
        help="how codebook entries follow the features, vq variant (default: {})".format(usual.codebook_update),
    )
    add(run, "--continuous-start", number(0, 0.9), 0.1, "part of the run before features are quantised (from scratch)")
    add(run, "--revive-every", whole(0), usual.revive_every, "steps between looks for unused codes; 0: never")
    add(run, "--random-seed", whole(0, 2**63 - 1), 42, "seed of everything random")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train (default: auto)")
    run.add_argument("--resume", action="store_true", help="go on from the state in --output, if there is one")
    loss = parser.add_argument_group("losses")
    add(loss, "--l1-weight", number(0), usual.l1_weight, "weight of the mean absolute error")
    add(loss, "--l2-weight", number(0), usual.l2_weight, "weight of the mean squared error")
    add(loss, "--codebook-weight", number(0), usual.codebook_weight, "weight of codebook and commitment loss")
    loss.add_argument(
        "--perceptual-weights",
        type=path,
        nargs="+",
        metavar="FILE",
        help="VGG-16 weights of torchvision, and optionally the linear weights of LPIPS",
    )
    add(loss, "--perceptual-weight", number(0), usual.perceptual_weight, "weight of the perceptual term")
    add(loss, "--discriminator-start", whole(0), None, "first step with a patch discriminator (default: none)")
    add(loss, "--discriminator-weight", number(0), usual.discriminator_weight, "weight of the adversarial term")
    output = parser.add_argument_group("logging")
    add(output, "--log-every", whole(1), 50, "steps between metric lines")
    add(output, "--evaluate-every", whole(1), 500, "steps between evaluations on held-out images")
    add(output, "--save-every", whole(0), 1000, "steps between states for --resume, and one at the end; 0: none")
    return parser


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError."""
    args = parse_flags(make_parser(), argv)
    if bool(args.vqgan_model_path) != bool(args.vqgan_config_path):
        raise UsageError("--vqgan_model_path and --vqgan_config_path go together")
    if args.vqgan_config_path and args.config:
        raise UsageError("--config is for a new model; the one of --vqgan_model_path has --vqgan_config_path")
    if args.perceptual_weights and len(args.perceptual_weights) > 2:
        raise UsageError("--perceptual-weights takes one or two files (VGG-16, LPIPS)")
    if args.resume and not args.save_every:
        raise UsageError("--resume needs saved states; leave --save-every 0 out")
    return args


def choose_config(name: str) -> VqganConfig:
    """A configuration by name or from a YAML file. Raises UserError."""
    if name in CONFIGS:
        return CONFIGS[name]
    if name.endswith((".yaml", ".yml")):
        return VqganConfig.from_yaml(name)
    raise UsageError(
        "--config '{}' is neither a YAML file nor one of {}.{}".format(name, ", ".join(CONFIGS), nearest(name, CONFIGS))
    )


# ---- evaluation


def save_grid(file: Path, shown: Reconstructions, columns: int = 16) -> None:
    """Draw the first 64 pairs as a PNG file: rows of originals, each above its reconstructions."""
    rows = []
    for start in range(0, min(64, len(shown.originals)), columns):
        for part in (shown.originals[start : start + columns], shown.images[start : start + columns]):
            row = part.new_full((3, part.shape[2], columns * part.shape[3]), 255)
            row[:, :, : len(part) * part.shape[3]] = torch.cat(list(part), dim=2)
            rows.append(row)
    with writing(file):
        save_picture(to_pil(torch.cat(rows, dim=1)), file)


def final_report(
    model: VQGAN, train_images: ImageSource, held_out: ImageSource, folder: Path, device: torch.device, demo: bool
) -> Dict[str, float]:
    """Figures of the saved weights; on the demo set also how often a reconstruction is nearest to its own picture."""
    shown = reconstruct(model, held_out.chunks(range(len(held_out) if demo else min(EVALUATED, len(held_out)))), device)
    save_grid(folder / PICTURES, shown)
    report = shown.figures(model.num_codes)
    if demo:
        count = len(train_images)
        every = reconstruct(model, train_images.chunks(range(count)), device)
        gallery = torch.cat([every.originals, shown.originals])
        report["ceiling_heldout"] = retrieval(shown.images, torch.arange(count, len(gallery)), gallery, device)
        pick = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:200]
        some = Reconstructions(*(part[pick] for part in every))
        save_grid(folder / TRAIN_PICTURES, some)
        report["ceiling_train"] = retrieval(some.images, pick, gallery, device)
        report["psnr_train"] = psnr(some.originals, some.images)
        report["codes_used"] = code_use(every.codes, model.num_codes)["codes_used"]
    return report


# ---- files


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn an error of writing into one line."""
    try:
        yield
    except OSError as error:
        raise UserError("--output: cannot write {}: {}".format(file, error.strerror or error)) from error


def require_finite(model: nn.Module, when: str) -> None:
    """Raise UserError where a weight is not finite: such weights are never saved."""
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            found = "{}: weights are not finite ({}) and were not saved".format(when, name)
            raise UserError(found + "; lower --learning-rate")


def save_weights(folder: Path, model: VQGAN, half: bool) -> None:
    """Write weights and YAML, each complete or not at all. Raises UserError."""
    from safetensors.torch import save as to_bytes

    require_finite(model, "--output")
    dtype = torch.float16 if half else torch.float32
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    with writing(folder / WEIGHTS), atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(to_bytes(state))
    with writing(folder / CONFIG):
        model.config.to_yaml(folder / CONFIG)


def move_aside(folder: Path) -> None:
    """Move the files of an earlier run in `folder` to the first free of earlier-1, earlier-2, ... in it."""
    names = (STATE, WEIGHTS, CONFIG, PICTURES, TRAIN_PICTURES, "metrics.jsonl")
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        return
    number = 1
    while (folder / "earlier-{}".format(number)).exists():
        number += 1
    earlier = folder / "earlier-{}".format(number)
    with writing(earlier):
        earlier.mkdir()
        for file in found:
            os.replace(str(file), str(earlier / file.name))
    logger.info("the files of an earlier run are now in %s (--resume would have gone on with it)", earlier)


def read_state(args: argparse.Namespace, model: VQGAN) -> Optional[Dict[str, Any]]:
    """Read what `Run.save` wrote, tensors and plain values alone; None without --resume or where there is nothing yet.

    model: as `args` describe it. Raises UserError when the file is damaged, or of a run that these options do not fit.
    """
    file = Path(args.output) / STATE
    if not args.resume:
        return None
    if not file.is_file():
        logger.info("--resume: there is no %s, starting from the beginning", file)
        return None
    verify(file)
    try:
        state: Dict[str, Any] = torch.load(str(file), map_location="cpu", weights_only=True)
        found = resume.changes(dict(state["options"]), vars(args))
        same_config = state["config"] == model.config.to_dict()
        same_start = not args.vqgan_model_path or state.get("start", model.identity) == model.identity
        # Once there is a codebook, nothing is left of the part of the run without one.
        fixed = [*AT_RESUME[FIXED], *(["continuous_start"] if state["trainer"]["codebook_ready"] else [])]
    except Exception as error:  # whatever a file that is no state of ours makes the restricted unpickler raise
        raise UserError("--resume: {} is no state of train_vqgan.py ({})".format(file, type(error).__name__)) from error
    resume.refuse(found, fixed, flag_name, file, "start a new run in another --output")
    if not same_config:
        raise UsageError("--resume: {} was written with another --config".format(file))
    if not same_start:
        raise UsageError("--resume: {} began with other weights than --vqgan_model_path names now".format(file))
    found = {name: values for name, values in found.items() if name in AT_RESUME[APPLIES]}
    if found:
        logger.info("given anew: %s", resume.listed(found, flag_name))
    return state


# ---- training


class Run:
    """A training run: the trainer, its images, the time it took so far, and its state on disk.

    state: what `read_state` returned; with it the run goes on at the very next step.
    """

    def __init__(
        self, args: argparse.Namespace, trainer: Trainer, images: ImageSource, state: Optional[Dict[str, Any]]
    ) -> None:
        self.args, self.trainer = args, trainer
        try:
            self._start(images, state)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if state is None or isinstance(error, UserError):
                raise
            # A file that another program wrote in the form of ours.
            file, reason = Path(args.output) / STATE, "{}: {}".format(type(error).__name__, str(error)[:200])
            raise UserError("--resume: {} is no state of train_vqgan.py ({})".format(file, reason)) from error

    def _start(self, images: ImageSource, state: Optional[Dict[str, Any]]) -> None:
        args, trainer = self.args, self.trainer
        self.seconds: float = float(state["seconds"]) if state else 0.0
        """Training time so far, without evaluations and saving."""
        drawn = int(state["drawn"]) if state else 0
        self.batches = Batches(images, args.batch_size, args.random_seed, drawn, args.dataloader_workers)
        if state:
            trainer.load_state_dict(state["trainer"])
            logger.info("resumed at step %d, %.0f %% of the run", trainer.step_number, 100 * self.progress)
            if state["num_images"] != len(images):
                logger.warning(
                    "there were %d training images, now %d: others are held out", state["num_images"], len(images)
                )

    @property
    def progress(self) -> float:
        """How far the run has come: 0 at its start, 1 at its end."""
        steps, minutes = self.args.steps, self.args.minutes
        return self.trainer.step_number / steps if steps else self.seconds / (60.0 * minutes)

    def save(self) -> None:
        """Write the state that `read_state` reads, in place of an older one. Raises UserError."""
        require_finite(self.trainer.model, "step {}".format(self.trainer.step_number))
        state = {
            "options": vars(self.args),
            "config": self.trainer.model.config.to_dict(),
            "start": self.trainer.model.identity,
            "num_images": len(self.batches.source),
            "drawn": self.batches.drawn,
            "seconds": self.seconds,
            "trainer": self.trainer.state_dict(),
        }
        save_checkpoint(Path(self.args.output) / STATE, state)

    def _way_out(self) -> str:
        file = Path(self.args.output) / STATE
        newest = "the last good state is {}: go on from it with --resume and".format(file) if file.is_file() else "take"
        return newest + " a lower --learning-rate or --clip-grad-norm"

    def train(self, held_out: ImageSource, metrics: log.Metrics, interruption: Interruption) -> bool:
        """Train until --steps or --minutes are reached, logging losses, images/s and held-out figures.

        Returns False where it was interrupted, after saving the state.
        """
        args, trainer = self.args, self.trainer
        watch = BadSteps(args.max_bad_steps, trainer.step_number, self._way_out)
        mark, logged, images = time.monotonic(), self.seconds, 0
        while self.progress < 1.0:
            progress = self.progress
            if not trainer.codebook_ready and progress >= args.continuous_start:
                trainer.initialise_codebook(self.batches)
            batch = next(self.batches)
            losses = trainer.step(batch, progress)
            images += len(batch)
            self.seconds += time.monotonic() - mark
            step, at_end = trainer.step_number, self.progress >= 1.0
            stopping = interruption.requested is not None and not at_end
            saving = bool(args.save_every) and (step % args.save_every == 0 or at_end or stopping)
            # Reading a loss waits for the device: only now and then, and always before a state is written.
            if step % args.log_every == 0 or at_end or saving or watch.due(step):
                watch.look(step, float(losses["reconstruction"]), trainer.bad_steps)
            if step % args.log_every == 0 or at_end:
                row = {name: float(value) for name, value in losses.items()}
                row["bad_steps"] = trainer.bad_steps[0]
                row["images_per_second"] = images / max(self.seconds - logged, 1e-9)
                logged, images = self.seconds, 0
                metrics.log("train", step, seconds=round(self.seconds, 1), **row)
                logger.info("step %d (%.0f %%): %s", step, 100 * self.progress, listed(row))
            if step % args.evaluate_every == 0 and trainer.codebook_ready:
                part = held_out.chunks(range(min(EVALUATED, len(held_out))))
                row = reconstruct(trainer.result, part, trainer.device).figures(trainer.model.num_codes)
                metrics.log("heldout", step, seconds=round(self.seconds, 1), **row)
                logger.info("step %d, held out: %s", step, listed(row))
            if saving:
                try:
                    self.save()
                except UserError as error:
                    if at_end or stopping:
                        raise
                    logger.error("step %d: %s. Training goes on, and tries again with the next state", step, error)
            if stopping:
                logger.info("interrupted at step %d, %s", step, "saved; --resume goes on" if saving else "not saved")
                return False
            mark = time.monotonic()
        if not trainer.codebook_ready:  # a run too short for it
            trainer.initialise_codebook(self.batches)
        return True


def listed(figures: Dict[str, float]) -> str:
    """Figures for the console."""
    return ", ".join("{} {:.4g}".format(name.replace("_", " "), value) for name, value in figures.items())


def make_trainer(args: argparse.Namespace, device: torch.device) -> Trainer:
    """The model that `args` describe, with all that trains it. Raises UserError."""
    if args.vqgan_model_path:
        model = load_vqgan(args.vqgan_model_path, args.vqgan_config_path, device).requires_grad_(True)
    else:
        config = choose_config(args.config or "f8_demo")
        check_size(config)
        model = VQGAN(config).to(device)
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    perceptual: Optional[nn.Module] = None
    if args.perceptual_weights:
        from models.perceptual import load_perceptual

        perceptual = load_perceptual(args.perceptual_weights).to(device)
    options = TrainingOptions(**{field.name: getattr(args, field.name) for field in fields(TrainingOptions)})
    return Trainer(model, options, device, bool(args.vqgan_model_path), perceptual)


def train(args: argparse.Namespace, interruption: Optional[Interruption] = None) -> Dict[str, float]:
    """Run the whole job described by `args`; returns the final figures, none where it was interrupted.

    Raises UserError.
    """
    interruption = interruption or Interruption()
    torch.manual_seed(args.random_seed)
    device = pick_device(args.device, 0)
    trainer = make_trainer(args, device)
    config = trainer.model.config
    folder = Path(args.output)
    train_images, held_out = open_images(
        args.input_folder,
        config.resolution,
        args.validation_images,
        args.random_seed,
        args.max_bad_fraction,
        folder / SKIPPED,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    start_report(folder / SKIPPED)
    logger.info(
        "VQGAN f%d, %d codes, %.2f M parameters; %d images, %d held out; %s",
        config.downsampling,
        config.num_codes,
        sum(p.numel() for p in trainer.model.parameters()) / 1e6,
        len(train_images),
        len(held_out),
        device,
    )
    state = read_state(args, trainer.model)
    if state is None:
        move_aside(folder)
    run = Run(args, trainer, train_images, state)
    try:
        with log.Metrics(folder, resume_step=None if state is None else trainer.step_number) as metrics:
            with interruption.deferred(), contextlib.closing(run.batches):
                if not run.train(held_out, metrics, interruption):
                    return {}
            save_weights(folder, trainer.result, args.save_half)
            saved = load_vqgan(folder / WEIGHTS, folder / CONFIG, device)
            report = final_report(saved, train_images, held_out, folder, device, args.input_folder == DEMO)
            metrics.log("final", trainer.step_number, **report)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("not enough GPU memory: lower --batch-size") from error
    unreadable = train_images.unreadable | held_out.unreadable
    if unreadable:
        logger.warning(
            "%d images could not be read, such as %s; all are listed in %s",
            len(unreadable),
            min(unreadable),
            folder / SKIPPED,
        )
    logger.info("%d steps; %s", trainer.step_number, listed(report))
    logger.info("weights, YAML, metrics and pictures are in %s", folder)
    return report


def main() -> int:
    """Command-line entry. Returns the exit status."""
    args = parse_args()
    log.setup()
    with Interruption() as interruption, only_writer(("--output", Path(args.output))):
        train(args, interruption)
        return interruption.status


if __name__ == "__main__":
    run_main(main)
