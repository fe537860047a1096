"""Stage 1: train or fine-tune a VQGAN on a folder of images or on the built-in demo set.

    python train_vqgan.py --input-folder demo --config f8_demo --minutes 10 --output output/vqgan
    python train_vqgan.py --input-folder DIR --vqgan_model_path W.ckpt --vqgan_config_path C.yaml \\
        --steps 10000 --output output/vqgan

Writes vqgan.safetensors, vqgan.yaml (both for --vqgan_model_path/--vqgan_config_path), metrics.jsonl and
reconstructions.png (originals above, reconstructions below) into --output.
Letters: B images, S image height and width, N codes per image, D embed_dim, M = B*N feature vectors.
"""

import argparse
import copy
import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vqgan import PUBLISHED, VQGAN, VqganConfig, load_vqgan, load_vqgan_state
from models.vqgan_codebook import CodebookUpkeep
from utils.errors import UsageError, UserError, nearest, run_main
from utils.files import atomic_write

logger = logging.getLogger("train_vqgan")

CONFIGS: Dict[str, VqganConfig] = {name: published.config for name, published in PUBLISHED.items()}
# Small models for 64x64 images on a CPU: patches of 4x4 pixels, so that no layer runs above 16x16.
_DEMO = VqganConfig(
    num_codes=512,
    embed_dim=32,
    resolution=64,
    z_channels=32,
    ch=16,
    ch_mult=(2, 4),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=8,
    patch_size=4,
)
CONFIGS["f8_demo"] = _DEMO
CONFIGS["f16_demo"] = replace(_DEMO, num_codes=2048, ch_mult=(3, 4, 5))
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
Images = Callable[[Tensor], Tensor]
"""Numbers of images (B,) -> uint8 (B, 3, S, S)."""


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError."""
    parser = argparse.ArgumentParser(
        description="Train or fine-tune a VQGAN.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--input-folder", required=True, help="folder of images (searched recursively), or 'demo'")
    data.add_argument("--output", required=True, help="folder for weights, YAML, metrics and pictures")
    data.add_argument("--validation-images", type=int, default=256, help="images of a folder held out from training")
    model = parser.add_argument_group("model")
    model.add_argument("--config", default="f8_demo", help="one of {}, or a YAML file".format(", ".join(CONFIGS)))
    model.add_argument("--vqgan_model_path", help="weights to start from (.ckpt or .safetensors)")
    model.add_argument("--vqgan_config_path", help="YAML of those weights")
    model.add_argument(
        "--save-half",
        action="store_true",
        help="store float16 weights; the final figures are those of the rounded weights",
    )
    run = parser.add_argument_group("optimisation")
    run.add_argument("--steps", type=int, help="optimizer steps; this or --minutes")
    run.add_argument("--minutes", type=float, help="wall-clock training time; the schedule follows the clock")
    run.add_argument("--batch-size", type=int, default=32, help="images per step")
    run.add_argument("--learning-rate", type=float, default=2e-3, help="peak of a warm-up and cosine schedule")
    run.add_argument(
        "--weight-decay", type=float, default=1e-4, help="AdamW decay of weights with two or more dimensions"
    )
    run.add_argument("--clip-grad-norm", type=float, default=1.0, help="largest gradient norm")
    run.add_argument(
        "--ema-decay",
        type=float,
        default=0.995,
        help="moving average of the weights that is evaluated and saved; 0: none",
    )
    run.add_argument(
        "--codebook-update",
        choices=("ema", "gradient"),
        default="ema",
        help="how codebook entries follow the features (vq variant)",
    )
    run.add_argument(
        "--continuous-start",
        type=float,
        default=0.1,
        help="part of the run, from 0 to 1, before features are quantised and the codebook is built",
    )
    run.add_argument("--revive-every", type=int, default=50, help="steps between looks for unused codes; 0: never")
    run.add_argument("--random-seed", type=int, default=42, help="seed of everything random")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    loss = parser.add_argument_group("losses")
    loss.add_argument("--l1-weight", type=float, default=1.0, help="weight of the mean absolute error")
    loss.add_argument("--l2-weight", type=float, default=2.0, help="weight of the mean squared error")
    loss.add_argument("--codebook-weight", type=float, default=1.0, help="weight of codebook and commitment loss")
    loss.add_argument(
        "--perceptual-weights",
        nargs="+",
        metavar="FILE",
        help="VGG-16 weights of torchvision, and optionally the linear weights of LPIPS",
    )
    loss.add_argument(
        "--perceptual-weight", type=float, default=1.0, help="weight of the perceptual term, when given its files"
    )
    loss.add_argument(
        "--discriminator-start", type=int, help="step from which a patch discriminator takes part; none without it"
    )
    loss.add_argument("--discriminator-weight", type=float, default=0.8, help="weight of the adversarial term")
    log = parser.add_argument_group("logging")
    log.add_argument("--log-every", type=int, default=50, help="steps between metric lines")
    log.add_argument("--evaluate-every", type=int, default=500, help="steps between evaluations on held-out images")
    args = parser.parse_args(argv)
    _check_args(args)
    return args


def _check_args(args: argparse.Namespace) -> None:
    if (args.steps is None) == (args.minutes is None):
        raise UsageError("give either --steps or --minutes")
    for name in (
        "steps",
        "minutes",
        "batch_size",
        "learning_rate",
        "clip_grad_norm",
        "log_every",
        "evaluate_every",
        "validation_images",
    ):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError("--{} must be positive, not {}".format(name.replace("_", "-"), value))
    if not 0 <= args.ema_decay < 1:
        raise UsageError("--ema-decay must be in [0, 1), not {}".format(args.ema_decay))
    if not 0 <= args.continuous_start < 1:
        raise UsageError("--continuous-start must be in [0, 1), not {}".format(args.continuous_start))
    if bool(args.vqgan_model_path) != bool(args.vqgan_config_path):
        raise UsageError("--vqgan_model_path and --vqgan_config_path go together")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available; use --device cpu")


def choose_config(name: str) -> VqganConfig:
    """A configuration by name or from a YAML file. Raises UsageError."""
    if name in CONFIGS:
        return CONFIGS[name]
    if name.endswith((".yaml", ".yml")):
        return VqganConfig.from_yaml(name)
    raise UsageError(
        "--config '{}' is neither a YAML file nor one of {}.{}".format(name, ", ".join(CONFIGS), nearest(name, CONFIGS))
    )


# ---- images


class ImageSource(NamedTuple):
    """Numbered images."""

    count: int
    """How many there are."""
    fetch: Images
    """Numbers (B,) -> uint8 (B, 3, S, S)."""


def _from_tensor(images: Tensor) -> ImageSource:
    return ImageSource(images.shape[0], lambda numbers: images[numbers])


def read_image(path: Path, size: int) -> Tensor:
    """Read an image, cut the largest centred square and resize it: uint8 (3, size, size). Raises UserError."""
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError("image {} cannot be read: {}".format(path, error)) from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _from_files(paths: List[Path], size: int) -> ImageSource:
    def fetch(numbers: Tensor) -> Tensor:
        return torch.stack([read_image(paths[i], size) for i in numbers.tolist()])

    return ImageSource(len(paths), fetch)


def open_images(folder: str, size: int, num_validation: int, seed: int) -> Tuple[ImageSource, ImageSource]:
    """Training and held-out images of a folder or of the demo set (whose split is fixed). Raises UserError."""
    if folder == "demo":
        from data.demo import demo_images, demo_records

        splits = [demo_images(demo_records(split), size) for split in ("train", "heldout")]
        return _from_tensor(splits[0]), _from_tensor(splits[1])
    if not Path(folder).is_dir():
        raise UserError("--input-folder {} is not a folder".format(folder))
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise UserError("--input-folder {} holds fewer than two images ({})".format(folder, ", ".join(IMAGE_SUFFIXES)))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    num_validation = min(num_validation, max(1, len(paths) // 10))
    held_out, train = order[:num_validation], order[num_validation:]
    return _from_files([paths[i] for i in train], size), _from_files([paths[i] for i in held_out], size)


def batches(source: ImageSource, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches uint8 (B, 3, S, S); every image once per epoch, in a new order each time."""
    while True:
        order = torch.randperm(source.count, generator=generator)
        usable = source.count - source.count % batch_size if source.count >= batch_size else source.count
        for start in range(0, usable, batch_size):
            yield source.fetch(order[start : start + batch_size])


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, S, S) -> float32 in [0, 1] on the device."""
    return images.to(device).float().div_(255.0).contiguous(memory_format=torch.channels_last)


# ---- evaluation


@torch.no_grad()
def reconstruct(model: VQGAN, source: ImageSource, limit: int, device: torch.device) -> Tuple[Tensor, Tensor, Tensor]:
    """First `limit` images, their reconstructions (both float (n, 3, S, S) on the CPU) and codes (n, N)."""
    model.eval()
    originals, images, codes = [], [], []
    for start in range(0, min(limit, source.count), 64):
        pixels = to_pixels(source.fetch(torch.arange(start, min(start + 64, limit, source.count))), device)
        batch_codes = model.encode(pixels)
        originals.append(pixels.cpu())
        images.append(model.decode(batch_codes).cpu())
        codes.append(batch_codes.cpu())
    return torch.cat(originals), torch.cat(images), torch.cat(codes)


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; pixels (n, 3, S, S) in [0, 1]."""
    error = (a - b).pow(2).flatten(1).mean(dim=1).clamp_min(1e-10)
    return float((-10.0 * error.log10()).mean())


def code_use(codes: Tensor, num_codes: int) -> Dict[str, float]:
    """Fraction of the codebook that appears in `codes`, and the perplexity of its use."""
    share = torch.bincount(codes.flatten(), minlength=num_codes).double() / codes.numel()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"codes_used": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}


def retrieval(queries: Tensor, own: Tensor, candidates: Tensor) -> float:
    """Share of queries (n, 3, S, S) whose nearest candidate (m, 3, S, S), by pixel distance, is their own (n,).

    A candidate equal to the own image counts as the own one: some pictures occur twice.
    """
    flat = candidates.flatten(1)
    distance = flat.pow(2).sum(dim=1)[None] - 2.0 * queries.flatten(1) @ flat.t()  # (n, m), up to |query|^2
    nearest_one = distance.argmin(dim=1)
    same = (flat[nearest_one] - flat[own]).abs().amax(dim=1) < 1e-6
    return float(same.double().mean())


def save_grid(path: Path, originals: Tensor, images: Tensor, columns: int = 16) -> None:
    """Draw pairs of rows, originals above reconstructions (n, 3, S, S), as a PNG file."""
    from PIL import Image

    rows = []
    for start in range(0, originals.shape[0], columns):
        for part in (originals[start : start + columns], images[start : start + columns]):
            padded = F.pad(part, (0, 0, 0, 0, 0, 0, 0, columns - part.shape[0]), value=1.0)
            rows.append(torch.cat(list(padded), dim=2))
    picture = torch.cat(rows, dim=1).mul(255.0).round().byte().permute(1, 2, 0).contiguous().numpy()
    with atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format="PNG")


def evaluate(model: VQGAN, source: ImageSource, device: torch.device, limit: int = 256) -> Dict[str, float]:
    """PSNR and codebook use on held-out images."""
    originals, images, codes = reconstruct(model, source, limit, device)
    return {"psnr": psnr(originals, images), **code_use(codes, model.num_codes)}


# ---- training


def learning_rate(peak: float, progress: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then a cosine to zero; `progress` runs from 0 to 1."""
    if progress < warmup:
        return peak * max(progress, 0.001) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


class Trainer:
    """One VQGAN with its optimizer, moving average, codebook upkeep and optional perceptual and adversarial terms."""

    def __init__(self, model: VQGAN, args: argparse.Namespace, device: torch.device) -> None:
        self.model, self.args, self.device = model, args, device
        self.upkeep: Optional[CodebookUpkeep] = None
        if model.config.variant == "vq":
            self.upkeep = CodebookUpkeep(model, 0.99 if args.codebook_update == "ema" else None)
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.perceptual: Optional[nn.Module] = None
        if args.perceptual_weights:
            from models.perceptual import load_perceptual

            self.perceptual = load_perceptual(args.perceptual_weights).to(device)
        self.adversary: Optional[Any] = None
        if args.discriminator_start is not None:
            from models.discriminator import Adversary

            self.adversary = Adversary(model.config.out_ch, args.learning_rate, args.discriminator_weight, device)
        self.step_number = 0
        self.codebook_ready = bool(args.vqgan_model_path)

    def reconstruction_loss(self, images: Tensor, pixels: Tensor) -> Tensor:
        """Weighted absolute and squared error on the [-1, 1] scale, plus the perceptual term."""
        difference = (images - pixels) * 2.0
        loss = self.args.l1_weight * difference.abs().mean() + self.args.l2_weight * difference.pow(2).mean()
        if self.perceptual is not None:
            loss = loss + self.args.perceptual_weight * self.perceptual(images, pixels)
        return loss

    def step(self, images: Tensor, progress: float) -> Dict[str, Tensor]:
        """One optimizer step on uint8 images (B, 3, S, S); returns losses as tensors."""
        args, model = self.args, self.model.train()
        pixels = to_pixels(images, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args.learning_rate, progress)
        features = model.features(pixels)  # (B, D, g, g)
        codes: Optional[Tensor] = None
        if self.codebook_ready:
            quantised, codebook_loss, codes = model.quantize(features)
        else:
            quantised, codebook_loss = features, features.new_zeros(())
        output = model.pixels(quantised)  # (B, 3, S, S)
        loss = reconstruction = self.reconstruction_loss(output, pixels)
        losses = {"reconstruction": reconstruction.detach(), "codebook": codebook_loss.detach()}
        adversarial = self.adversary is not None and self.step_number >= args.discriminator_start
        if adversarial:
            generator_loss = self.adversary.generator_loss(output, reconstruction, model.decoder.conv_out.weight)
            losses["generator"] = generator_loss.detach()
            loss = loss + generator_loss
        self.optimizer.zero_grad(set_to_none=True)
        (loss + args.codebook_weight * codebook_loss).backward()
        losses["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        self.optimizer.step()
        if adversarial:
            losses["discriminator"] = self.adversary.step(pixels, output.detach(), self.optimizer.param_groups[0]["lr"])
        revived = self._keep_codebook(features.detach(), codes, progress) if codes is not None else None
        self._update_average(revived)
        self.step_number += 1
        return losses

    @torch.no_grad()
    def initialise_codebook(self, stream: Iterator[Tensor]) -> None:
        """Start the codebook from the features of images to come: about eight feature vectors for each code."""
        self.codebook_ready = True
        if self.upkeep is None:
            return
        config = self.model.config
        needed = max(1, 8 * config.num_codes // (self.args.batch_size * config.grid**2))
        features = [self.model.features(to_pixels(next(stream), self.device)) for _ in range(needed)]
        self.upkeep.initialise(torch.cat(features).flatten(2).transpose(1, 2).flatten(0, 1))
        self.average.quantize.codebook.copy_(self.model.quantize.codebook)

    def _keep_codebook(self, features: Tensor, codes: Tensor, progress: float) -> Optional[Tensor]:
        if self.upkeep is None:
            return None
        flat = features.flatten(2).transpose(1, 2).flatten(0, 1)  # (M, D)
        self.upkeep.update(flat, codes.flatten())
        every = self.args.revive_every
        # The last part of a run settles: a code moved there would have no time to become useful.
        if every and self.step_number % every == every - 1 and progress < 0.8:
            return self.upkeep.revive(flat)
        return None

    @torch.no_grad()
    def _update_average(self, revived: Optional[Tensor]) -> None:
        decay = min(self.args.ema_decay, (1.0 + self.step_number) / (10.0 + self.step_number))
        theirs = list(self.model.parameters())
        torch._foreach_lerp_(list(self.average.parameters()), theirs, 1.0 - decay)
        if revived is not None:
            # A moved code is a new code: an average with the old place would be neither.
            self.average.quantize.codebook[revived] = self.model.quantize.codebook[revived]


def save(folder: Path, model: VQGAN, half: bool) -> None:
    """Write vqgan.safetensors and vqgan.yaml, each complete or not at all."""
    from safetensors.torch import save as to_bytes

    dtype = torch.float16 if half else torch.float32
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    with atomic_write(folder / "vqgan.safetensors", "wb") as file:
        file.write(to_bytes(state))
    model.config.to_yaml(folder / "vqgan.yaml")


def final_report(
    model: VQGAN, train: ImageSource, held_out: ImageSource, folder: Path, demo: bool, device: torch.device
) -> Dict[str, float]:
    """Figures of the saved weights; on the demo set also how often a reconstruction is nearest to its own image."""
    originals, images, codes = reconstruct(model, held_out, 100000 if demo else 256, device)
    save_grid(folder / "reconstructions.png", originals[:64], images[:64])
    report = {"psnr": psnr(originals, images), **code_use(codes, model.num_codes)}
    if demo:
        every = (
            torch.cat([train.fetch(torch.arange(train.count)), held_out.fetch(torch.arange(held_out.count))])
            .float()
            .div_(255.0)
        )
        report["ceiling_heldout"] = retrieval(images, torch.arange(train.count, len(every)), every)
        pick = torch.randperm(train.count, generator=torch.Generator().manual_seed(0))[:200]
        some = ImageSource(200, lambda numbers: train.fetch(pick[numbers]))
        originals, images, codes = reconstruct(model, some, 200, device)
        report["ceiling_train"] = retrieval(images, pick, every)
        report["psnr_train"] = psnr(originals, images)
        save_grid(folder / "reconstructions_train.png", originals[:64], images[:64])
        report["codes_used"] = code_use(reconstruct(model, train, train.count, device)[2], model.num_codes)[
            "codes_used"
        ]
    return report


def train(args: argparse.Namespace) -> Dict[str, float]:
    """Run the whole job described by `args`; returns the final figures."""
    torch.manual_seed(args.random_seed)
    device = torch.device(
        "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    )
    config = VqganConfig.from_yaml(args.vqgan_config_path) if args.vqgan_config_path else choose_config(args.config)
    model = VQGAN(config)
    if args.vqgan_model_path:
        load_vqgan(args.vqgan_model_path, args.vqgan_config_path)  # refuses what does not fit
        model.load_state_dict(load_vqgan_state(args.vqgan_model_path))
    model = model.to(device, memory_format=torch.channels_last)
    train_images, held_out = open_images(args.input_folder, config.resolution, args.validation_images, args.random_seed)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    logger.info(
        "VQGAN f%d, %d codes, %.2f M parameters; %d images, %d held out; %s",
        config.downsampling,
        config.num_codes,
        sum(p.numel() for p in model.parameters()) / 1e6,
        train_images.count,
        held_out.count,
        device,
    )
    trainer = Trainer(model, args, device)
    stream = batches(train_images, args.batch_size, torch.Generator().manual_seed(args.random_seed))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        loop(trainer, stream, held_out, metrics.write)
    average = trainer.average if args.ema_decay else trainer.model
    save(folder, average, args.save_half)
    saved = load_vqgan(folder / "vqgan.safetensors", folder / "vqgan.yaml", device)
    report = final_report(saved, train_images, held_out, folder, args.input_folder == "demo", device)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        metrics.write(json.dumps({"step": trainer.step_number, "final": report}) + "\n")
    logger.info("%d steps; %s", trainer.step_number, ", ".join("{} {:.4g}".format(k, v) for k, v in report.items()))
    logger.info("weights, YAML, metrics and pictures are in %s", folder)
    return report


def loop(trainer: Trainer, stream: Iterator[Tensor], held_out: ImageSource, write: Callable[[str], Any]) -> None:
    """Train until --steps or --minutes are reached, logging losses, images/s and held-out figures."""
    args, start, mark, evaluating = trainer.args, time.monotonic(), time.monotonic(), 0.0
    while True:
        elapsed = time.monotonic() - start - evaluating
        progress = trainer.step_number / args.steps if args.steps else elapsed / (60.0 * args.minutes)
        if progress >= 1.0:
            return
        if not trainer.codebook_ready and progress >= args.continuous_start:
            trainer.initialise_codebook(stream)
        losses = trainer.step(next(stream), progress)
        step = trainer.step_number
        if step % args.log_every == 0 or step == args.steps:
            row = {name: float(value) for name, value in losses.items()}
            if not math.isfinite(row["reconstruction"]):
                raise UserError("the loss is not finite at step {}; lower --learning-rate".format(step))
            row["images_per_second"] = args.log_every * args.batch_size / (time.monotonic() - mark)
            mark = time.monotonic()
            write(json.dumps({"step": step, "seconds": round(elapsed, 1), **row}) + "\n")
            logger.info(
                "step %d (%.0f %%) %s", step, 100 * progress, " ".join("{} {:.4g}".format(k, v) for k, v in row.items())
            )
        if step % args.evaluate_every == 0 and trainer.codebook_ready:
            before = time.monotonic()
            figures = evaluate(trainer.average, held_out, trainer.device)
            write(json.dumps({"step": step, "seconds": round(elapsed, 1), "heldout": figures}) + "\n")
            logger.info("step %d held out: %s", step, " ".join("{} {:.4g}".format(k, v) for k, v in figures.items()))
            evaluating += time.monotonic() - before
            mark = time.monotonic()


def main() -> None:
    """Command-line entry."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(parse_args())


if __name__ == "__main__":
    run_main(main)
