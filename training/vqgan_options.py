"""The flags of train_vqgan.py, each with what --resume does with a new value of it (utils/resume.py)."""

from __future__ import annotations

import argparse
from typing import Any, Sequence

from args import Parser
from checkpoints.vqgan import PUBLISHED
from models.vqgan_config import DEMO_CONFIGS, VqganConfig
from training.vqgan_trainer import TrainingOptions
from utils.errors import UsageError, nearest
from utils.flags import number, parse_flags, path, whole
from utils.resume import APPLIES, CONTENT, FIXED, FREE

CONFIGS: dict[str, VqganConfig] = {**{name: published.config for name, published in PUBLISHED.items()}, **DEMO_CONFIGS}


def option(flag: str, resume: str, text: str, **settings: Any) -> tuple[str, str, dict[str, Any]]:
    """Declare a flag. settings: those of argparse, of which the default may stand in TrainingOptions instead."""
    name = flag[2:].replace("-", "_")
    default = settings.get("default", getattr(TrainingOptions, name, None))
    if "action" not in settings:
        settings["default"] = default
    if "type" in settings:
        settings.setdefault("metavar", "X" if isinstance(default, float) else "N")
    return flag, resume, dict(settings, dest=name, help=text if default is None else f"{text} (default: {default})")


FOLDER = "images at any depth, or in webdataset shards such as 'DIR/{00000..00099}.tar'; or demo"
SUFFIXES = "of images in shards, with commas between (img,jpg); none: those of folders, and img"
BAD = "share of the images that may be unreadable; those that are, skipped.jsonl in --output lists"
STOP = "stop after so many steps in a row whose loss or gradient is not finite; single ones are left out; 0: never"
CONTINUOUS = "part of the run before features are quantised (from scratch)"
CODEBOOK = "how codebook entries follow the features, vq variant"
VGG = "VGG-16 weights of torchvision, and optionally the linear weights of LPIPS"
SAVE = "steps between states for --resume, and one at the end; 0: none"
HELD_OUT = "images held out from training, a tenth at most"
ADVERSARY = "first step with a patch discriminator (default: none)"
FLAGS = {
    "data": (
        option("--input-folder", APPLIES, FOLDER, type=path, required=True, metavar="DIR"),
        option("--output", FREE, "for all that the run writes", type=path, required=True, metavar="DIR"),
        option("--validation-images", FIXED, HELD_OUT, type=whole(1), default=256),
        option("--max-bad-fraction", APPLIES, BAD, type=number(0, 1), default=0.01),
        option("--shard-images", APPLIES, SUFFIXES, metavar="SUFFIXES"),
        option("--dataloader-workers", FREE, "processes that read images", type=whole(0, 1024), default=0),
    ),
    "model": (
        option("--config", CONTENT, f"one of {', '.join(CONFIGS)} (default: f8_demo), or a YAML file", metavar="NAME"),
        option("--vqgan_model_path", CONTENT, "weights to start from", type=path, metavar="FILE"),
        option("--vqgan_config_path", CONTENT, "YAML file of those weights", type=path, metavar="FILE"),
        option("--save-half", APPLIES, "save float16 weights; final figures are theirs", action="store_true"),
    ),
    "optimisation": (
        option("--steps", APPLIES, "optimizer steps", type=whole(1)),
        option("--minutes", APPLIES, "training time; the learning rate follows the clock", type=number(0, above=True)),
        option("--batch-size", FIXED, "images per step", type=whole(1)),
        option("--learning-rate", APPLIES, "peak of a warm-up and cosine schedule", type=number(0, above=True)),
        option("--weight-decay", APPLIES, "AdamW decay of weights with two or more dimensions", type=number(0)),
        option("--clip-grad-norm", APPLIES, "largest gradient norm", type=number(0, above=True)),
        option("--max-bad-steps", APPLIES, STOP, type=whole(0), default=20),
        option("--ema-decay", APPLIES, "average of the weights that is saved; 0: none", type=number(0, 0.999999)),
        option("--codebook-update", FIXED, CODEBOOK, choices=("ema", "gradient")),
        option("--continuous-start", APPLIES, CONTINUOUS, type=number(0, 0.9), default=0.1),
        option("--revive-every", APPLIES, "steps between looks for unused codes; 0: never", type=whole(0)),
        option("--random-seed", FIXED, "seed of everything random", type=whole(0, 2**63 - 1), default=42),
        option("--device", APPLIES, "where to train", choices=("auto", "cpu", "cuda"), default="auto"),
        option("--resume", FREE, "go on from the state in --output, if there is one", action="store_true"),
    ),
    "losses": (
        option("--l1-weight", APPLIES, "weight of the mean absolute error", type=number(0)),
        option("--l2-weight", APPLIES, "weight of the mean squared error", type=number(0)),
        option("--codebook-weight", APPLIES, "weight of codebook and commitment loss", type=number(0)),
        option("--perceptual-weights", APPLIES, VGG, type=path, nargs="+", metavar="FILE"),
        option("--perceptual-weight", APPLIES, "weight of the perceptual term", type=number(0)),
        option("--discriminator-start", APPLIES, ADVERSARY, type=whole(0)),
        option("--discriminator-weight", APPLIES, "weight of the adversarial term", type=number(0)),
    ),
    "logging": (
        option("--log-every", FREE, "steps between metric lines", type=whole(1), default=50),
        option("--evaluate-every", FREE, "steps between evaluations on held-out images", type=whole(1), default=500),
        option("--save-every", FREE, SAVE, type=whole(0), default=1000),
    ),
}

#: What --resume does with a new value of each option.
AT_RESUME = {settings["dest"]: resume for flags in FLAGS.values() for _, resume, settings in flags}


def make_parser() -> Parser:
    """The flags of train_vqgan.py."""
    parser = Parser(
        prog="train_vqgan.py",
        usage="%(prog)s --input-folder DIR --output DIR (--steps N | --minutes T) [flags]",
        description="Train or fine-tune a VQGAN.",
        epilog="Flags may be spelled with - or _.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120),
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        length = group.add_mutually_exclusive_group(required=True) if title == "optimisation" else None
        for flag, _, settings in flags:
            (length if length and flag in ("--steps", "--minutes") else group).add_argument(flag, **settings)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
    known = f"{', '.join(CONFIGS)}.{nearest(name, CONFIGS)}"
    raise UsageError(f"--config '{name}' is neither a YAML file nor one of {known}")
