"""The parts of a run: vocabulary, VQGAN, data sets, and the model to train."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import args
import checkpoints
import data
import log
from args import Config
from bpe import Tokenizer, load_tokenizer
from checkpoints.trust import check_size
from checkpoints.vqgan import PUBLISHED, default_vqgan, load_vqgan
from engines import Engine
from models.building import build_dalle, shapes_only
from models.config import ARCHITECTURES, DalleConfig
from models.dalle import DalleModel, TextToImage
from models.soft_codes import SoftCodes
from models.vqgan import VQGAN, VqganConfig
from training.schedule import Position
from utils import resume
from utils.caches import cache_folder
from utils.errors import UsageError, UserError
from utils.skipped import start_report

logger = logging.getLogger(__name__)

#: Options of a model's training, not of its architecture.
TRAINING_OPTIONS = ("loss_img_weight", "z_loss", "label_smoothing", "attn_dropout", "ff_dropout")

_SAME_NAME = ("text_seq_len", "dim_head", "attn_types", "sandwich_norm", "layer_scale", "init_std", "norm",
              "qk_norm", "rotary_2d", "shift_tokens", "value_residual", "activation", "ff_mult", "base_width",
              *TRAINING_OPTIONS)
#: Fields of DalleConfig and the options that set them.
MODEL_OPTIONS = {
    **{name: name for name in _SAME_NAME},
    **{"dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"},
}

#: The list of files that were skipped, one line each, in the log folder.
SKIPPED = "skipped.jsonl"

#: Samples of a --generated-data epoch, or two global batches if that is more.
GENERATED_SAMPLES = 1024


class Parts(NamedTuple):
    """The parts of a run."""

    tokenizer: Tokenizer
    vqgan_paths: tuple[Path, Path] | None
    """Weights and YAML, once they are loaded."""
    vqgan: VQGAN
    """On the meta device until `with_weights` loads it, and again once all images are encoded."""
    train_set: Any
    validation_set: Any | None


class Start(NamedTuple):
    """A checkpoint to start from, and its path."""

    path: Path
    checkpoint: checkpoints.DalleCheckpoint

    @property
    def training(self) -> dict[str, Any]:
        """Its training state."""
        return self.checkpoint.training or {}


def build_parts(config: Config, engine: Engine | None = None) -> Parts:
    """Open tokenizer and data sets, with a VQGAN on the meta device: no image is read and nothing is downloaded.

    engine: needed if several processes build their parts. Raises UserError for parts that do not fit together.
    """
    is_main = engine is None or engine.is_main
    if is_main:
        start_report(config.log_dir / SKIPPED)
    if engine is not None:
        engine.barrier()
    tokenizer = load_tokenizer(config.data.bpe_path)
    options, model = config.data, config.model
    with shapes_only():
        vqgan = VQGAN(vqgan_config(config))
    dalle_config(config, tokenizer, vqgan)
    settings = data.DataSettings(
        text_seq_len=model.text_seq_len,
        image_size=model.image_size,
        truncate_captions=options.truncate_captions,
        seed=config.execution.random_seed,
        null_cond_prob=model.null_cond_prob,
        num_generated=max(GENERATED_SAMPLES, 2 * config.global_batch) if options.generated else 0,
        augment=options.augment,
        augment_share=options.augment_share,
        index_folder=None if options.cache_codes in ("auto", "off") else Path(options.cache_codes) / "shards",
        shard_images=options.shard_images,
        shard_captions=options.shard_captions,
        max_bad_fraction=options.max_bad_fraction,
        skipped_file=config.log_dir / SKIPPED,
        is_main=is_main,
    )
    train_set, validation_set = data.create_datasets(
        options.input_folder,
        tokenizer,
        settings,
        validation_folder=options.validation_folder,
        validation_holdout=0.0 if options.generated else options.validation_fraction,
    )
    return Parts(tokenizer, None, vqgan, train_set, validation_set)


def with_weights(config: Config, parts: Parts) -> Parts:
    """Load the VQGAN, unless it is loaded; a published one is downloaded if it is not cached."""
    if parts.vqgan_paths is not None:
        return parts
    weights, yaml = config.model.vqgan_model_path, config.model.vqgan_config_path  # both or none
    if weights and yaml:
        paths = (Path(weights), Path(yaml))
    elif config.data.generated:
        # Random images need no trained VQGAN: one of the same shape does the same work, without a download.
        logger.info(f"generated data: a VQGAN with the shape of {published_vqgan(config)} and random weights")
        vqgan = VQGAN(parts.vqgan.config)
        vqgan.identity = "random"
        return parts._replace(vqgan=vqgan, vqgan_paths=(Path("random"), Path("random")))
    else:
        paths = default_vqgan(name=published_vqgan(config))
    return parts._replace(vqgan=load_vqgan(*paths), vqgan_paths=paths)


def encode_images(config: Config, engine: Engine, parts: Parts, position: Position) -> Parts:
    """Encode images to codes, once for all epochs and runs (--cache-codes), and free the VQGAN's weights.

    position: where the run starts.
    """
    options, vqgan = config.data, parts.vqgan
    if not options.keeps_codes:
        return parts
    identity = vqgan.identity
    if identity == "random":
        identity = f"random, seed {config.execution.random_seed}, PyTorch {torch.__version__}"
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
    # A run that ends within its first epoch does not use all images: the others need not be encoded, unless similar
    # ones are looked for among all.
    short = config.execution.max_steps > 0 and position.epoch == 0 and not config.model.code_noise_similar
    calls = -(-max(0, config.execution.max_steps - position.step) // engine.steps_per_call)
    samples, order = position.sample_in_epoch + calls * engine.steps_per_call * config.global_batch, None
    if config.ipu.compile_only:  # one image gives the shapes
        short, samples, parts = True, 1, parts._replace(validation_set=None)
    if short and samples < len(parts.train_set):
        order = parts.train_set.order(config.execution.random_seed, 0)[:samples]
    train_set, validation_set = cache.encoded(parts.train_set, parts.validation_set, order)
    if train_set is parts.train_set:
        if config.model.code_noise_similar:
            raise UserError("--code-noise-similar needs the codes of all images: with --cache-codes DIR name a folder "
                            "that can be written to, or give --code-noise-similar 0")
        return parts
    if config.model.code_noise_similar:
        logger.info("looking for similar images")
        train_set.find_similar()
    return parts._replace(train_set=train_set, validation_set=validation_set, vqgan=vqgan.to("meta"))


def published_vqgan(config: Config) -> str:
    """The default VQGAN of a configuration: the published one that the architecture's authors used."""
    return "f16-1024" if config.model.architecture == "mini-dalle" else "f16-16384"


def vqgan_config(config: Config) -> VqganConfig:
    """The configuration of the VQGAN, without reading its weights."""
    path = config.model.vqgan_config_path
    return VqganConfig.from_yaml(path) if path else PUBLISHED[published_vqgan(config)].config


def identities(config: Config, parts: Parts) -> dict[str, dict[str, Any]]:
    """Hashes and paths of vocabulary and VQGAN; a run can only be resumed with the same ones."""
    weights, yaml = parts.vqgan_paths or ("", "")
    return {
        "tokenizer": dict(parts.tokenizer.identity, path=config.data.bpe_path or ""),
        "vqgan": {
            "sha256": parts.vqgan.identity,
            "options": json.dumps(parts.vqgan.config.to_dict(), sort_keys=True),
            "weights": str(weights),
            "config": str(yaml),
        },
    }


def dalle_config(config: Config, tokenizer: Tokenizer, vqgan: VQGAN) -> DalleConfig:
    """The model of a configuration, a vocabulary and a VQGAN. Raises UsageError for an unsupported --image-size."""
    options, factor = config.model, vqgan.config.downsampling
    size = options.image_size
    if size % factor:
        near = " or ".join(str(n) for n in (size // factor * factor, (size // factor + 1) * factor) if n)
        raise UsageError(
            f"--image-size {size}: the VQGAN encodes {factor} x {factor} pixels to a code, so it must be a multiple of "
            f"{factor}, such as {near}"
        )
    values: dict[str, Any] = dict(
        num_text_tokens=tokenizer.vocab_size,
        num_image_tokens=vqgan.num_codes,
        grid=size // factor,
    )
    given = ((field, getattr(options, name)) for field, name in MODEL_OPTIONS.items())
    values.update((field, value) for field, value in given if value is not None)  # (--activation: the architecture's)
    wanted = DalleConfig(**dict(values, **ARCHITECTURES[options.architecture]))
    flags = {field: args.flag_name(name) for field, name in MODEL_OPTIONS.items()}
    check_size(wanted.to_dict(), dict(flags, grid="a code grid (--image-size) of"))
    return wanted


def model_config(config: Config, parts: Parts, start: Start | None) -> DalleConfig:
    """The model to train: a new one as configured, or a checkpoint's with the configured training options."""
    wanted = dalle_config(config, parts.tokenizer, parts.vqgan)
    if start is None:
        return wanted
    own = DalleConfig.from_dict(start.checkpoint.config)
    if not own.unique_pads:  # minDALL-E's embedding may have more rows than its vocabulary
        wanted = dataclasses.replace(wanted, num_text_tokens=max(wanted.num_text_tokens, own.num_text_tokens))
    for name, option in (
        ("num_text_tokens", "bpe_path"),
        ("num_image_tokens", "vqgan_model_path"),
        ("text_seq_len", "text_seq_len"),
        ("grid", "image_size"),
    ):
        has, needs = getattr(own, name), getattr(wanted, name)
        if has != needs:
            raise UserError(f"{start.path} has {name} = {has}, but {args.flag_name(option)} makes it {needs}")
    differing = resume.changes(wanted.to_dict(), own.to_dict())
    for name in TRAINING_OPTIONS:
        differing.pop(name, None)
    if differing:
        flags = {field: args.flag_name(option) for field, option in MODEL_OPTIONS.items()}
        decided = resume.listed(differing, lambda field: flags.get(field, field))
        logger.warning(f"the shape is that of {start.path}, not of the configuration: {decided}")
    return dataclasses.replace(own, **{name: getattr(wanted, name) for name in TRAINING_OPTIONS})


def build_model(
    config: Config, parts: Parts, start: Start | None, wanted: DalleConfig, codebook: Tensor
) -> TextToImage:
    """A new model, or one with the weights of a checkpoint (which are moved, not copied).

    codebook: the VQGAN's, (C, E), for --init-codes and --soft-codes.
    """
    if start is None:
        dalle = DalleModel(wanted)
        if config.model.init_codes == "codebook":
            dalle.start_from(codebook.detach().float())
    else:
        averaged = None if config.checkpoints.resume else start.checkpoint.ema  # averaged weights are the better start
        weights = start.checkpoint.weights if averaged is None else averaged
        dalle = build_dalle(wanted, weights)
    size = sum(p.numel() for p in dalle.parameters()) / 1e6
    tokens = f"{wanted.text_seq_len} text + {wanted.image_seq_len} image tokens"
    logger.info(f"DALL-E: {size:.2f} M parameters, {tokens}")
    encoded = isinstance(parts.train_set, data.CodesDataset)
    options = config.model
    soft = SoftCodes(codebook, options.soft_codes) if options.soft_codes else None
    return TextToImage(dalle, None if encoded else parts.vqgan, options.code_noise, options.code_noise_per_image,
                       options.code_noise_similar, soft)
