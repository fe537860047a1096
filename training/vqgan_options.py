"""The options of train_vqgan.py, each with the effect of a new value on --resume (utils/resume.py)."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoints.vqgan import PUBLISHED
from models.vqgan_config import DEMO_CONFIGS, VqganConfig
from utils.errors import UsageError, nearest
from utils.flags import DataOptions, DeviceOptions, PartsOptions, ShardOptions
from utils.options import REQUIRED, Command, Options, again, option
from utils.resume import APPLIES, CONTENT, FIXED, FREE

CONFIGS: dict[str, VqganConfig] = {**{name: published.config for name, published in PUBLISHED.items()}, **DEMO_CONFIGS}


@dataclass(frozen=True)
class ImageOptions(Options, title="data"):
    """Which images, and where the results go."""

    input_folder: str = again(DataOptions, "input_folder", resume=APPLIES, help="folder of images at any depth, "
                              "webdataset shards such as 'DIR/{00000..00099}.tar', or 'demo' for the built-in set")
    output: str = option(REQUIRED, "folder for all output", path=True, resume=FREE)
    validation_images: int = option(256, "images held out from training, at most a tenth", ge=1, resume=FIXED)
    max_bad_fraction: float = again(DataOptions, "max_bad_fraction", resume=APPLIES)
    shard_images: str | None = again(ShardOptions, "shard_images", resume=APPLIES)
    dataloader_workers: int = again(DataOptions, "dataloader_workers", resume=FREE)


@dataclass(frozen=True)
class StartOptions(Options, title="model"):
    """What training starts from, and how the result is saved."""

    config: str | None = option(None, f"one of {', '.join(CONFIGS)}, or a YAML file", none="f8_demo", resume=CONTENT)
    vqgan_model_path: str | None = again(PartsOptions, "vqgan_model_path", resume=CONTENT, help="weights to start from",
                                         none="random ones")
    vqgan_config_path: str | None = again(PartsOptions, "vqgan_config_path", resume=CONTENT, none="none")
    perceptual_weights: tuple[str, ...] | None = option(
        None, "VGG-16 weights of torchvision, and optionally the linear weights of LPIPS", path=True, resume=APPLIES)
    save_half: bool = option(False, "save float16 weights; the final figures are computed with them", resume=APPLIES)


@dataclass(frozen=True)
class RunOptions(Options, title="run"):
    """How long, where, and from which seed."""

    steps: int | None = option(None, "optimizer steps; or give --minutes", ge=1, resume=APPLIES)
    minutes: float | None = option(None, "training time, which also drives the learning rate", gt=0, resume=APPLIES)
    max_bad_steps: int = option(20, "stop after so many steps in a row whose loss or gradient is not finite; single "
                                "ones are skipped; 0: never", ge=0, resume=APPLIES)
    continuous_start: float = option(0.1, "part of the run before features are quantised (from scratch)", ge=0, le=0.9,
                                     resume=APPLIES)
    random_seed: int = option(42, "seed of everything random", ge=0, le=2**63 - 1, resume=FIXED)
    device: str = again(DeviceOptions, "device", resume=APPLIES)
    resume: bool = option(False, "continue from the state in --output, if there is one", resume=FREE)


@dataclass(frozen=True)
class OptimisationOptions(Options, title="optimisation"):
    """The optimizer, averaging and the codebook."""

    batch_size: int = option(32, "images per step", ge=1, resume=FIXED)
    learning_rate: float = option(2e-3, "peak learning rate; linear warm-up, then a cosine to zero", gt=0,
                                  resume=APPLIES)
    weight_decay: float = option(1e-4, "AdamW decay of weights with two or more dimensions", ge=0, resume=APPLIES)
    clip_grad_norm: float = option(1.0, "maximum gradient norm", gt=0, resume=APPLIES)
    ema_decay: float = option(0.995, "decay of the moving average of the weights, which is evaluated and saved; 0: no "
                              "average", ge=0, le=0.999999, resume=APPLIES)
    codebook_update: str = option("ema", "how codebook entries follow the features, vq variant: ema (moving averages) "
                                  "or gradient (the codebook loss)", choices=("ema", "gradient"), resume=FIXED)
    revive_every: int = option(50, "steps between revivals of unused codes; 0: never", ge=0, resume=APPLIES)


@dataclass(frozen=True)
class LossOptions(Options, title="losses"):
    """The terms of the loss; errors are on the [-1, 1] scale."""

    l1_weight: float = option(1.0, "weight of the mean absolute error", ge=0, resume=APPLIES)
    l2_weight: float = option(2.0, "weight of the mean squared error", ge=0, resume=APPLIES)
    codebook_weight: float = option(1.0, "weight of codebook and commitment loss", ge=0, resume=APPLIES)
    perceptual_weight: float = option(1.0, "weight of the perceptual term", ge=0, resume=APPLIES,
                                      needs="perceptual_weights")
    discriminator_start: int | None = option(None, "first step with a patch discriminator", ge=0, resume=APPLIES)
    discriminator_weight: float = option(0.8, "weight of the adversarial term", ge=0, resume=APPLIES,
                                         needs="discriminator_start")


@dataclass(frozen=True)
class LogOptions(Options, title="logging"):
    """Intervals of logs, evaluations and states."""

    log_every: int = option(50, "steps between metric lines", ge=1, resume=FREE)
    evaluate_every: int = option(500, "steps between evaluations on held-out images", ge=1, resume=FREE)
    save_every: int = option(1000, "steps between saved states for --resume, also saved at the end; 0: none", ge=0,
                             resume=FREE)


@dataclass(frozen=True)
class TrainingOptions(OptimisationOptions, LossOptions):
    """The options of `training.vqgan_trainer.Trainer`."""


@dataclass(frozen=True)
class VqganOptions(ImageOptions, StartOptions, RunOptions, TrainingOptions, LogOptions):
    """The flags of train_vqgan.py."""

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("--steps and --minutes: give one of them, the length of training")
        if bool(self.vqgan_model_path) != bool(self.vqgan_config_path):
            raise UsageError("--vqgan-model-path and --vqgan-config-path go together")
        if self.vqgan_config_path and self.config:
            raise UsageError("--config is for a new model; --vqgan-model-path takes its --vqgan-config-path")
        if len(self.perceptual_weights or ()) > 2:
            raise UsageError("--perceptual-weights takes one or two files (VGG-16, LPIPS)")
        if self.resume and not self.save_every:
            raise UsageError("--resume needs saved states; omit --save-every 0")


COMMAND = Command("train_vqgan.py", "Train or fine-tune a VQGAN.", VqganOptions)
AT_RESUME: dict[str, str] = {spec.name: spec.settings["resume"] for spec in COMMAND.specs.values()}
"""The effect of each option's new value on --resume."""


def choose_config(name: str) -> VqganConfig:
    """A configuration by name or from a YAML file. Raises UserError."""
    if name in CONFIGS:
        return CONFIGS[name]
    if name.endswith((".yaml", ".yml")):
        return VqganConfig.from_yaml(name)
    known = f"{', '.join(CONFIGS)}.{nearest(name, CONFIGS)}"
    raise UsageError(f"--config '{name}' is neither a YAML file nor one of {known}")
