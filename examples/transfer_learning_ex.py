"""Turn minDALL-E into a class-conditional or unconditional image model: its transfer-learning example.

    python examples/transfer_learning_ex.py -d configs/transfer-imagenet-clscond-gen.yaml -u minDALL-E/1.3B \
        -r output/transfer --imagenet-path IMAGENET --n-gpus 8

IMAGENET holds train/<class>/<image> and val/<class>/<image>, or just <class>/<image>. All results go to
<result-path>/<name of the configuration>/: ckpt/dalle_{epoch}.pt, reconstructions_{train,val}.png, metrics.jsonl, ...
The checkpoints are ordinary ones, with the class as the prompt:

    python generate.py --dalle-path output/transfer/transfer-imagenet-clscond-gen/ckpt/dalle_7.pt --text n01440764

Unlike minDALL-E's script this one uses the centre square of every training image instead of a random crop, so that
codes are computed once and not in every epoch.
"""
from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Sequence

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engines
import log
from args import CheckpointsConfig, Config, DataConfig, ExecutionConfig, MiscConfig, ModelConfig
from bpe import load_tokenizer
from bpe.classes import class_file
from checkpoints import newest_checkpoint, read_dalle
from dalle import published
from dalle.pictures import make_grid, save_picture
from dalle.transfer import Downstream, check_shape, image_only, read_downstream
from data.classes import class_names, imagenet_folders
from engines import Engine
from sampling import to_uint8
from training.files import folders_locked
from training.run import train
from training.setup import Parts, Start, build_parts, with_weights
from utils import launch
from utils.errors import UsageError, UserError, run_main
from utils.files import atomic_write, make_folder
from utils.flags import DeviceOptions
from utils.interrupts import Interruption
from utils.options import REQUIRED, Command, Options, again, option

logger = logging.getLogger("transfer_learning_ex")

SHOWN = 16
"""Images in each grid of originals and reconstructions."""


@dataclass(frozen=True)
class TransferOptions(Options):
    """minDALL-E's flags, and more for other machines and longer runs."""

    config_downstream: str = option(REQUIRED, "what to train", path=True, short="-d", metavar="YAML")
    path_upstream: str = option(REQUIRED, "minDALL-E/1.3B, or a folder in its layout", path=True, short="-u",
                                metavar="DIR|NAME")
    result_path: str = option(REQUIRED, "folder for the results", path=True, short="-r", metavar="DIR")
    imagenet_path: str = option(REQUIRED, "images in folders by class", path=True, metavar="DIR")
    n_gpus: int = option(1, "processes to train with", ge=1)
    seed: int = option(0, "seed of weights and data order", ge=0, le=2**31 - 1)
    resume: bool = option(False, "resume from the newest checkpoint of --result-path")
    device: str = again(DeviceOptions, "device")
    precision: str = again(ExecutionConfig, "precision", help="arithmetic; auto: as in experiment.use_amp")
    activation_checkpointing: bool = again(ExecutionConfig, "activation_checkpointing")
    null_cond_prob: float = again(ModelConfig, "null_cond_prob", help="fraction of classes dropped, for guidance")
    max_steps: int = again(ExecutionConfig, "max_steps")
    keep_checkpoints: int = again(CheckpointsConfig, "keep_checkpoints", default=2)
    dataloader_workers: int = again(DataConfig, "dataloader_workers", default=4)
    cache_codes: str = again(DataConfig, "cache_codes")
    tensorboard: bool = again(MiscConfig, "tensorboard")


COMMAND = Command("transfer_learning_ex.py", "Train an image-only model (class-conditional or not) from a minDALL-E.",
                  TransferOptions)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare data and initial weights, then train like train.py. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = COMMAND.parse(words)
    if options.path_upstream not in published.PUBLISHED_MODELS:
        find_upstream(options.path_upstream)
    if options.n_gpus > 1 and "WORLD_SIZE" not in os.environ:
        start_processes(options.n_gpus, words)
    downstream = read_downstream(options.config_downstream)
    folder = Path(options.result_path) / Path(options.config_downstream).stem
    resuming = options.resume and newest_checkpoint(folder / "ckpt") is not None
    config = make_config(options, downstream, folder, resuming)
    engine = engines.create(config)
    try:
        with Interruption(tell=engine.is_main) as interruption, folders_locked(config, engine):
            log.setup(config.log_dir, engine.is_main)
            engine.introduce()
            if engine.is_main:
                write_descriptions(downstream, config)
            engine.barrier()
            parts = build_parts(config, engine)
            check_data(parts, downstream)
            upstream = find_upstream(options.path_upstream)  # may download 5 GB, so after all checks
            start = None if resuming else make_start(upstream, downstream, options.seed)
            parts = with_weights(config, parts)
            if engine.is_main and not resuming:
                show_reconstructions(engine, parts, folder)
            train(config, engine, parts, start, interruption)
            if engine.is_main and interruption.requested is None:
                log_sampling_command(folder, config)
            return interruption.status
    finally:
        engine.close()


def find_upstream(path_or_name: str) -> Path:
    """The folder of the model to start from; a published one is downloaded. Raises UserError."""
    upstream = published.resolve(path_or_name)
    if not (upstream / published.STAGE1).is_file():
        raise UserError(
            f"--path-upstream {upstream}: not a folder with {published.STAGE1} and {published.STAGE2}"
        )
    return upstream


def start_processes(num: int, words: list[str]) -> NoReturn:
    """Run this script in `num` processes, and exit with their status."""
    sys.exit(launch.main(["--nproc-per-node", str(num), str(Path(__file__).resolve()), *words]))


def make_config(options: Any, downstream: Downstream, folder: Path, resuming: bool) -> Config:
    """The configuration for training: the YAML file's values, this script's flags, and paths."""
    per_micro_step = downstream.local_batch_size * options.n_gpus
    if downstream.total_batch_size % per_micro_step:
        raise UserError(
            f"{options.config_downstream}: experiment.total_batch_size {downstream.total_batch_size} is not a multiple "
            f"of local_batch_size {downstream.local_batch_size} x --n-gpus {options.n_gpus}"
        )
    if not Path(options.imagenet_path).is_dir():
        raise UsageError(f"--imagenet-path {options.imagenet_path}: no such folder")
    train_folder, validation_folder = imagenet_folders(options.imagenet_path)
    upstream = published.resolve(options.path_upstream, fetch=False)
    shape = downstream.shape
    return Config.from_dict(
        {
            "config": Path(options.config_downstream).stem,
            "device": options.device,
            "batch_size": downstream.local_batch_size,
            "gradient_accumulation": downstream.total_batch_size // per_micro_step,
            "replication_factor": options.n_gpus,
            "epochs": downstream.epochs,
            "max_steps": options.max_steps,
            "precision": options.precision,
            "fp16": downstream.mixed_precision,
            "activation_checkpointing": options.activation_checkpointing,
            "random_seed": options.seed,
            "optimizer": "AdamW",
            "learning_rate": downstream.learning_rate,
            "lr_scheduler": "cosine",
            "lr_floor": downstream.min_learning_rate / downstream.learning_rate,
            "weight_decay": downstream.weight_decay,
            "beta1": downstream.betas[0],
            "beta2": downstream.betas[1],
            "eps": 1e-8,
            "clip_grad_norm": downstream.clip_grad_norm,
            "architecture": "image-gpt",
            "hidden_size": shape["embed_dim"],
            "num_hidden_layers": shape["n_layers"],
            "num_attention_heads": shape["n_heads"],
            "dim_head": shape["embed_dim"] // shape["n_heads"],
            "layers_per_ipu": [shape["n_layers"]],
            "text_seq_len": 1,
            "image_size": downstream.image_size,
            "init_std": 0.02,
            "null_cond_prob": options.null_cond_prob,
            "vqgan_model_path": str(upstream / published.STAGE1),
            "vqgan_config_path": str(folder / "vqgan.yaml"),
            "input_folder": train_folder,
            "validation_folder": validation_folder or None,
            "bpe_path": str(folder / "ckpt" / "classes.txt"),
            "dataloader_workers": options.dataloader_workers,
            "cache_codes": options.cache_codes,
            "checkpoint_output_dir": str(folder / "ckpt"),
            "checkpoint_save_steps": 0,
            "keep_checkpoints": options.keep_checkpoints,
            "resume": resuming,
            "tensorboard": options.tensorboard,
        }
    )


def write_descriptions(downstream: Downstream, config: Config) -> None:
    """Write what training and sampling read besides weights: the list of classes and the VQGAN's YAML file."""
    names = class_names(str(config.data.input_folder)) if downstream.num_classes else []
    if len(names) != downstream.num_classes:
        raise UserError(
            f"{config.data.input_folder} has {len(names)} classes: set stage2.hparams.n_classes (now "
            f"{downstream.num_classes}) to that number"
        )
    make_folder("--result-path", Path(config.checkpoints.checkpoint_output_dir))
    with atomic_write(str(config.data.bpe_path), "wb") as file:
        file.write(class_file(names))
    downstream.stage1.to_yaml(str(config.model.vqgan_config_path))


def check_data(parts: Parts, downstream: Downstream) -> None:
    """Raise UserError, naming keys of the YAML file, for what would stop training."""
    if len(parts.train_set) < downstream.total_batch_size:
        raise UserError(
            f"{len(parts.train_set)} training images do not fill one batch: lower experiment.total_batch_size, now "
            f"{downstream.total_batch_size}"
        )
    codes = (downstream.image_size // parts.vqgan.config.downsampling) ** 2
    if codes != downstream.shape["ctx_len_img"]:
        raise UserError(
            "dataset.image_resolution {} gives {} codes with this VQGAN, but stage2.hparams.ctx_len_img is {}".format(
                downstream.image_size, codes, downstream.shape["ctx_len_img"]
            )
        )


def make_start(upstream: Path, downstream: Downstream, seed: int) -> Start:
    """The upstream model with its head and start vectors replaced."""
    checkpoint = read_dalle(upstream)
    check_shape(downstream, checkpoint)
    return Start(checkpoint.path, image_only(checkpoint, downstream.num_classes, seed))


@torch.no_grad()
def show_reconstructions(engine: Engine, parts: Parts, folder: Path) -> None:
    """Save grids of originals and reconstructions. Once is enough: the VQGAN is frozen."""
    for split, dataset in (("train", parts.train_set), ("val", parts.validation_set)):
        if dataset is None:
            continue
        images = torch.stack([dataset[index][1] for index in range(min(SHOWN, len(dataset)))])
        codes = engine.encode(parts.vqgan, images)
        device = next(parts.vqgan.parameters()).device
        reconstructed = to_uint8(torch.cat([parts.vqgan.decode(row.to(device)) for row in codes.split(4)])).cpu()
        for name, shown in (("originals", images), ("reconstructions", reconstructed)):
            save_picture(make_grid(list(shown), f"{name}: {split}"), folder / f"{name}_{split}.png")
    logger.info("%s: originals and reconstructions of %d images", folder, len(images))


def log_sampling_command(folder: Path, config: Config) -> None:
    """Log a command that generates images."""
    newest = newest_checkpoint(folder / "ckpt")
    classes = getattr(load_tokenizer(config.data.bpe_path), "classes", None)
    if newest is not None:
        prompt = f'"{classes[0]}"' if classes else "any"
        logger.info("to generate images: python generate.py --dalle-path %s --text %s --num-images 16", newest, prompt)


if __name__ == "__main__":
    run_main(main)
