"""Configuration of training: dataclass defaults, then a named configuration of configs.yaml, then command-line flags.

Every option is one field of a frozen dataclass below (utils/options.py). Nothing is parsed at import, and nothing here
depends on a device.

    config = parse(["--config", "L16", "--batch-size", "4"])
    config.execution.batch_size, config.global_batch
"""
from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence

from models.options import LossOptions, check_architecture
from utils.errors import UsageError, nearest
from utils.flags import DataOptions, DeviceOptions, EvaluationConfig, PartsOptions, ShardOptions
from utils.options import Command, Options, again, display, flag_name, option, options_of
from utils.resume import APPLIES, CONTENT, FIXED, FREE
from utils.yaml_files import load_configuration

DEFAULT_CONFIG_FILE = Path(__file__).resolve().parent / "configs.yaml"
DEFAULT_CONFIG = "unit_test"
BUILT_IN_SET = "demo"  # the one value of --input-folder that is a name, not a folder


def _power_of_two(value: float) -> str:
    return "" if math.frexp(value)[0] == 0.5 else "a power of two"


@dataclass(frozen=True)
class Selection(Options):
    """Where the configuration comes from."""

    config: str = option(DEFAULT_CONFIG, "configuration to use; other flags override its options")
    config_file: str | None = option(None, "file of named configurations", none="configs.yaml", path=True)


@dataclass(frozen=True)
class ExecutionConfig(Options, title="execution"):
    """Device, batch sizes, length and precision of training."""

    device: str = again(DeviceOptions, "device", resume=APPLIES, choices=("auto", "cpu", "cuda", "ipu"),
                        help="where to train; auto: ipu if PopTorch finds IPUs, else cuda if there is one, else cpu")
    batch_size: int = option(1, "micro-batch: samples in one forward pass of one replica", ge=1, resume=APPLIES)
    gradient_accumulation: int = option(1, "micro-batches accumulated for one optimizer step", ge=1, resume=APPLIES)
    replication_factor: int = option(1, "replicas of the model; the native engine reaches the same global batch with "
                                        "any number of torchrun processes", ge=1, resume=APPLIES)
    device_iterations: int = option(1, "optimizer steps per call of the device", ge=1, resume=APPLIES)
    epochs: int = option(1, "passes over the training data", ge=1, resume=APPLIES)
    max_steps: int = option(0, "stop after so many optimizer steps in total; 0: no limit", ge=0, resume=APPLIES)
    max_minutes: float = option(0.0, "stop after so many minutes of training; 0: no limit", ge=0, resume=APPLIES)
    precision: str = option("auto", "precision of the transformer; auto: set by --fp16 (fp16 on cuda or ipu, fp32 on "
                                    "cpu), any other value overrides it", choices=("auto", "fp32", "bf16", "fp16"),
                            resume=APPLIES)
    matmul_precision: str | None = again(DeviceOptions, "matmul_precision", resume=APPLIES)
    fp16: bool = option(False, "train in half precision if the device supports it", resume=APPLIES)
    compile: bool = option(False, "compile the training step with torch.compile", resume=APPLIES)
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory",
                                            resume=APPLIES)
    shard: bool = option(False, "shard weights, gradients and optimizer state over the processes of torchrun (FSDP2), "
                                "for models larger than one GPU; PyTorch 2.7 or newer", resume=APPLIES)
    random_seed: int = option(42, "seed of weights, data order, captions and dropout", ge=0, le=2**32 - 1, resume=FIXED)
    threads: int = again(DeviceOptions, "threads", resume=APPLIES)

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step, over all replicas."""
        return self.batch_size * self.gradient_accumulation * self.replication_factor

    def native_precision(self, device_type: str) -> str:
        """The precision of the native engine on "cpu" or "cuda": "fp32", "bf16" or "fp16".

        --fp16 (set in Mini DALL-E's configurations for IPUs) means fp16 autocast on cuda. CPUs have no fast fp16
        arithmetic: there it means fp32, and --precision fp16 is an error.
        """
        if self.precision == "fp16" and device_type == "cpu":
            raise UsageError("--precision fp16 is not for the CPU; use bf16 or fp32")
        if self.precision != "auto":
            return self.precision
        return "fp16" if self.fp16 and device_type != "cpu" else "fp32"


@dataclass(frozen=True)
class IpuConfig(Options, title="IPU"):
    """Placement, memory and transfers on IPUs; other devices ignore them."""

    ipus_per_replica: int = option(1, "IPUs that one replica is spread over", ge=1, resume=APPLIES)
    layers_per_ipu: tuple[int, ...] = option((16,), "transformer layers on each IPU; they add up to "
                                                     "--num-hidden-layers", ge=0, resume=APPLIES)
    cls_ipu_id: int | None = option(None, "IPU of the head; none: the last", ge=0, resume=APPLIES)
    embedding_ipu_id: int = option(0, "IPU of the embeddings; the VQGAN is on IPU 0", ge=0, resume=APPLIES)
    embedding_serialization_factor: int = option(1, "compute embedding and head in so many parts to save memory", ge=1,
                                                 resume=APPLIES)
    matmul_proportion: tuple[float, ...] = option((0.6,), "share of memory for matmuls: one, or one for each IPU",
                                                  gt=0, le=1, resume=APPLIES)
    stochastic_rounding: bool = option(False, "round half-precision results stochastically", resume=APPLIES)
    enable_half_partials: bool = option(False, "half-precision partial sums in matmuls and convolutions",
                                        resume=APPLIES)
    enable_rts: bool = option(False, "shard the optimizer state over the replicas", resume=APPLIES)
    optimizer_state_offchip: bool = option(False, "keep the optimizer state in the host's memory", resume=APPLIES)
    async_dataloader: bool = option(True, "load the next batch while the device works", resume=FREE)
    byteio: bool = option(False, "send images as bytes and scale them on the device", resume=APPLIES)
    compile_only: bool = option(False, "compile for an offline device and stop", resume=FREE)
    executable_cache_dir: str | None = option(None, "folder where compiled programs are cached", path=True,
                                                 resume=FREE)
    profile_dir: str | None = option(None, "folder for profiles of the device", path=True, resume=FREE)
    plan: str | None = option(None, "show what each IPU would hold and stop, without IPU, SDK or data; auto: also "
                                       "propose --layers-per-ipu", choices=("show", "auto"), bare="show",
                                 resume=FREE)


@dataclass(frozen=True)
class OptimizerConfig(Options, title="optimizer"):
    """The optimizer, its schedule and its stability."""

    optimizer: str = option("Adam", "optimizer; Muon: for the blocks' matrices, with AdamW for the rest; Adafactor: "
                                    "keeps almost no state, its steps are relative to the size of the weights",
                           choices=("Adam", "AdamW", "Muon", "Adafactor"), resume=FIXED)
    learning_rate: float = option(3.0e-4, "peak learning rate", gt=0, resume=APPLIES)
    lr_scheduler: str = option("constant", "schedule; constant and multi_step warm up over the first fifth of the "
                                           "epochs, cosine over --warmup-steps",
                               choices=("ReduceLROnPlateau", "multi_step", "constant", "cosine"), resume=APPLIES)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up before the cosine; 0: none", ge=0, resume=APPLIES)
    lr_floor: float = option(0.01, "end of the cosine, as a share of --learning-rate", ge=0, le=1, resume=APPLIES)
    weight_decay: float = option(0.0, "weight decay; not applied to one-dimensional parameters", ge=0, resume=APPLIES)
    beta1: float = option(0.9, "decay of Adam's first moment", ge=0, lt=1, resume=APPLIES)
    beta2: float = option(0.999, "decay of Adam's second moment", ge=0, lt=1, resume=APPLIES)
    eps: float = option(1.0e-6, "epsilon in the denominator of Adam", gt=0, resume=APPLIES)
    clip_grad_norm: float = option(0.0, "maximum gradient norm; 0: no clipping", ge=0, resume=APPLIES)
    max_bad_steps: int = option(20, "stop after so many steps in a row whose loss or gradient is not finite; single "
                                    "ones are skipped; 0: never", ge=0, resume=APPLIES)
    loss_scaling: float = option(16384.0, "(initial) loss scale in half precision; a power of two", gt=0,
                                 check=_power_of_two, resume=APPLIES)
    enable_als: bool = option(False, "automatic loss scaling on IPUs (always on for fp16 on cuda)", resume=APPLIES)
    enable_half_first_order_momentum: bool = option(False, "half-precision first moment on IPUs", resume=FIXED)
    ema_decay: float = option(0.0, "decay of the moving average of the weights; 0: none", ge=0, lt=1, resume=APPLIES)


@dataclass(frozen=True)
class ModelConfig(LossOptions, title="model"):
    """The transformer and its VQGAN."""

    architecture: str = option("mini-dalle", "kind of transformer; mindalle: minDALL-E's (GELU, learned positions, no "
                                             "<bos>, no unique pad ids, no LayerScale), by default with the published "
                                             "f16-16384 VQGAN; image-gpt: the same, conditioned on a class instead of "
                                             "text (--text-seq-len 1, --bpe-path: a list of classes)",
                               choices=("mini-dalle", "mindalle", "image-gpt"), resume=FIXED)
    hidden_size: int = option(512, "width of the transformer", ge=1, resume=FIXED)
    num_hidden_layers: int = option(16, "transformer layers", ge=1, resume=FIXED)
    num_attention_heads: int = option(16, "attention heads", ge=1, resume=FIXED)
    dim_head: int = option(64, "width of one head", ge=1, resume=FIXED)
    text_seq_len: int = option(80, "text tokens of a caption", ge=1, resume=FIXED)
    image_size: int = option(256, "height and width of the images in pixels", ge=8, resume=FIXED)
    attn_types: tuple[str, ...] = option(("full",), "attention pattern of each layer; a shorter list is cycled",
                                         choices=("full", "axial_row", "axial_col", "conv_like", "conv_causal"),
                                         resume=FIXED)
    attention_impl: str = option("auto", "implementation of attention; auto: the fastest on the device",
                                 choices=("auto", "sdpa", "local", "explicit"), resume=APPLIES)
    ff_dropout: float = option(0.0, "dropout in the feed-forward layers", ge=0, lt=1, resume=APPLIES)
    attn_dropout: float = option(0.0, "dropout of the attention output", ge=0, lt=1, resume=APPLIES)
    init_std: float = option(0.0, "standard deviation of the initial weights; 0: PyTorch's default initialisation",
                             ge=0, le=1e6, resume=FIXED)
    vqgan_model_path: str | None = again(PartsOptions, "vqgan_model_path", path="find", resume=CONTENT,
                                         none="the published f16-1024 model (see --architecture), downloaded")
    vqgan_config_path: str | None = again(PartsOptions, "vqgan_config_path", path="find", resume=CONTENT)
    vae_path: str | None = option(None, "refused: discrete VAEs are not supported, see --vqgan-model-path", path="find",
                                     resume=FIXED)


@dataclass(frozen=True)
class DataConfig(Options, title="data"):
    """Images, captions and vocabulary."""

    input_folder: str | None = again(DataOptions, "input_folder", default=None, path="find", resume=APPLIES)
    validation_folder: str | None = option(None, "folder or shards of pairs for the validation loss", path="find",
                                              resume=APPLIES)
    validation_fraction: float = option(0.01, "without --validation-folder: share of the pairs held out for "
                                              "validation; 0: none", ge=0, le=0.5, resume=FIXED)
    bpe_path: str | None = again(PartsOptions, "bpe_path", none="the CLIP vocabulary", path="find", resume=CONTENT)
    truncate_captions: bool = option(False, "truncate captions longer than --text-seq-len instead of stopping",
                                     resume=APPLIES)
    generated_data: bool = option(False, "train on random data generated on the host", resume=APPLIES)
    synthetic_data: bool = option(False, "train on random data generated on the device (IPU; elsewhere like "
                                         "--generated-data)", resume=APPLIES)
    shard_images: str | None = again(ShardOptions, "shard_images", resume=APPLIES)
    shard_captions: str | None = option(None, "where the captions in shards are, best first, comma-separated: keys of "
                                                 ".json members, or suffixes of text members; none: "
                                                 "caption,txt,text,TEXT,cap", resume=APPLIES)
    max_bad_fraction: float = again(DataOptions, "max_bad_fraction", resume=APPLIES)
    dataloader_workers: int = again(DataOptions, "dataloader_workers", resume=FREE)
    cache_codes: str = option("auto", "folder that caches the codes of images, each encoded once; auto: "
                                      "~/.cache/dalle/codes, except for generated data; off: images are encoded in "
                                      "every step", path=True, resume=FREE)
    augment: str = option("none", "how some of the training images change, others in each epoch; flip: mirrored; "
                                  "views: mirrored, moved, larger or smaller, as their captions then say",
                          choices=("none", "flip", "views"), resume=APPLIES)
    augment_share: float = option(0.5, "share of the training images that --augment changes", gt=0, le=1,
                                  resume=APPLIES)

    @property
    def generated(self) -> bool:
        """Whether pairs are random."""
        return self.generated_data or self.synthetic_data

    @property
    def keeps_codes(self) -> bool:
        """Whether images are encoded in advance and training reads their codes (--cache-codes).

        auto does not cache random images: they serve to measure the whole step.
        """
        return self.cache_codes != "off" and not (self.cache_codes == "auto" and self.generated)


@dataclass(frozen=True)
class CheckpointsConfig(Options, title="checkpoints"):
    """What is saved, and what training starts from."""

    checkpoint_output_dir: str = option("./output/ckpt", "folder of the checkpoints; '': none are saved", path=True,
                                        empty=True, resume=FREE)
    checkpoint_save_steps: int = option(1000, "optimizer steps between checkpoints; 0: only at the end of each epoch",
                                        ge=0, resume=FREE)
    keep_checkpoints: int = option(0, "number of newest checkpoints to keep; 0: all", ge=0, resume=FREE)
    pretrained_checkpoint: str | None = option(None, "checkpoint whose weights training starts from; or a folder in "
                                                        "minDALL-E's layout or minDALL-E/1.3B, which include "
                                                        "vocabulary and VQGAN", path="find", resume=FREE)
    resume: bool = option(False, "continue from the newest checkpoint in --checkpoint-output-dir", resume=FREE)
    export_mindalle: str | None = option(None, "new folder for the trained model in minDALL-E's layout", path=True,
                                            resume=FREE)


@dataclass(frozen=True)
class MiscConfig(Options, title="misc"):
    """Logs and metrics."""

    log_dir: str | None = option(None, "folder of log file, metrics and loss.png; none: the parent of "
                                          "--checkpoint-output-dir", path=True, resume=FREE)
    log_every: int = option(10, "optimizer steps between logged lines", ge=1, resume=APPLIES)
    tensorboard: bool = option(False, "write metrics for TensorBoard", resume=FREE)
    wandb: bool = option(False, "send metrics to Weights & Biases (WANDB_MODE=offline needs no account)", resume=FREE)
    wandb_project_name: str = option("miniDALL-E", "Weights & Biases project", resume=FREE)
    wandb_run_name: str | None = option(None, "Weights & Biases run; none: it chooses one", resume=FREE)


@dataclass(frozen=True)
class Config:
    """A whole configuration: its name and one frozen section for each group of flags."""

    name: str = "default"
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    ipu: IpuConfig = field(default_factory=IpuConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    misc: MiscConfig = field(default_factory=MiscConfig)

    def __post_init__(self) -> None:
        _check_together(self)

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step: batch_size x gradient_accumulation x replication_factor."""
        return self.execution.global_batch

    @property
    def log_dir(self) -> Path:
        """Folder of log file, metrics and loss.png."""
        folder = self.checkpoints.checkpoint_output_dir or "./output/ckpt"
        return Path(self.misc.log_dir) if self.misc.log_dir else Path(folder).parent

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from a flat mapping as from `to_dict`; absent keys take their defaults."""
        values = dict(values)
        name = values.pop("config", "default")
        sections: dict[str, Any] = {}
        for attribute, section in SECTIONS.items():
            own = [spec.name for spec in options_of(section)]
            sections[attribute] = section(**{key: values.pop(key) for key in own if key in values})
        if values:
            key = sorted(values)[0]
            raise UsageError(f"unknown option '{key}'.{nearest(key, option_names())}")
        return cls(name=name, **sections)

    def to_dict(self) -> dict[str, Any]:
        """A flat dict of plain values (lists instead of tuples) for logging and checkpoints; `config` is the name."""
        flat: dict[str, Any] = {"config": self.name}
        for attribute in SECTIONS:
            for key, value in dataclasses.asdict(getattr(self, attribute)).items():
                flat[key] = list(value) if isinstance(value, tuple) else value
        return flat

    def replace(self, **values: Any) -> Config:
        """A copy with some options of any section changed; checked like any other."""
        return Config.from_dict(dict(self.to_dict(), **values))

    def describe(self) -> str:
        """Several lines for the log: the global batch and, by section, every option that is not at its default."""
        run = self.execution
        lines = [
            f"configuration {self.name}: global batch {run.global_batch} = {run.batch_size} (batch_size) x "
            f"{run.gradient_accumulation} (gradient_accumulation) x {run.replication_factor} (replication_factor)"
        ]
        for attribute, section in SECTIONS.items():
            own = getattr(self, attribute)
            changed = [f"{spec.name}={display(getattr(own, spec.name))}" for spec in options_of(section)
                       if getattr(own, spec.name) != spec.default]
            if changed:
                lines += textwrap.wrap("  ".join(changed), 118, initial_indent=f"  {attribute:<12}",
                                       subsequent_indent=" " * 14, break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines)


SECTIONS: dict[str, type[Options]] = {
    "execution": ExecutionConfig, "ipu": IpuConfig, "optimizer": OptimizerConfig, "model": ModelConfig,
    "data": DataConfig, "checkpoints": CheckpointsConfig, "evaluation": EvaluationConfig, "misc": MiscConfig,
}


COMMAND = Command("train.py", "Train a DALL-E. Options come from a named configuration; a flag overrides it.",
                  Selection, *SECTIONS.values())
_SPECS = {spec.name: spec for section in SECTIONS.values() for spec in options_of(section)}


def option_names() -> list[str]:
    """Every option's name, as spelled in YAML."""
    return list(_SPECS)


def resume_rules() -> dict[str, str]:
    """The effect of each option's new value on --resume: {name: APPLIES, FIXED, CONTENT or FREE}."""
    return {name: spec.settings["resume"] for name, spec in _SPECS.items()}


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read flags and the configuration they name.

    argv: the arguments after the program's name (default: those of the process).
    Raises UsageError (one line, naming the flag or the key) for unknown options and values of wrong type or range.
    """
    flags = COMMAND.read(argv)
    config_file = Path(flags.pop("config_file", None) or DEFAULT_CONFIG_FILE)
    name = flags.pop("config", DEFAULT_CONFIG)
    values = {}
    for key, value in load_configuration(config_file, name).items():
        where = f"{config_file.name}, configuration '{name}': "
        if key not in _SPECS:
            raise UsageError(f"{where}unknown key '{key}'.{nearest(str(key), _SPECS)}")
        values[key] = _SPECS[key].checked(value, where + key)
    values.update(flags)
    _refuse_ignored(flags, values)
    for key, value in values.items():
        if _SPECS[key].settings.get("path") == "find" and value is not None:
            values[key] = _find(value, config_file.parent)
    config = Config.from_dict(dict(values, config=name))
    needs_data = not (config.data.generated or config.ipu.plan)
    if config.data.input_folder is None and needs_data:
        raise UsageError("--input-folder: give a folder of images and captions, 'demo' for the built-in set, "
                         "or --generated-data")
    return config


def _refuse_ignored(flags: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse flags that another option leaves without effect; a configuration may hold them, for other runs."""
    without_data = next((flag_name(name) for name in ("generated_data", "synthetic_data") if values.get(name)), "")
    scheduler = values.get("lr_scheduler", OptimizerConfig.lr_scheduler)
    architecture = values.get("architecture", ModelConfig.architecture)
    measures = values.get("inception_weights") or values.get("clip_path") or values.get("input_folder") == BUILT_IN_SET
    for names, ignored, reason in (
        (("input_folder", "validation_fraction", "evaluate_every"), without_data, f"with {without_data}"),
        (("validation_fraction",), values.get("validation_folder"), "with --validation-folder"),
        (("warmup_steps",), scheduler != "cosine", f"with --lr-scheduler {scheduler}; it is for cosine"),
        (("layer_scale",), architecture != "mini-dalle", f"with --architecture {architecture}"),
        (("init_codes",), values.get("pretrained_checkpoint"), "with --pretrained-checkpoint, whose codes it keeps"),
        (("code_noise_per_image",), not values.get("code_noise"), "without --code-noise"),
        (("soft_codes_fade",), not values.get("soft_codes"), "without --soft-codes"),
        (("code_noise_similar",), without_data, f"with {without_data}"),
        (("code_noise_similar",), values.get("cache_codes") == "off", "with --cache-codes off: it compares codes"),
        (("evaluate_images",), not measures, "without --inception-weights or --clip-path, but on the demo set"),
        (("augment_share",), values.get("augment", "none") == "none", "without --augment"),
        (("wandb_project_name", "wandb_run_name"), not values.get("wandb") and "wandb" not in flags, "without --wandb"),
    ):
        given = [name for name in names if name in flags and flags[name] not in (None, 0)]
        if given and ignored:
            raise UsageError(f"{flag_name(given[0])} has no effect {reason}")


def _find(path: str, folder: Path) -> str:
    """Resolve a path that is missing in the working directory but exists beside the configuration file."""
    if path != BUILT_IN_SET and not os.path.exists(path) and os.path.exists(str(folder / path)):
        return str(folder / path)
    return path


def _check_together(config: Config) -> None:
    """Checks across options, for every engine."""
    model, data, run = config.model, config.data, config.execution
    if (model.vqgan_model_path is None) != (model.vqgan_config_path is None):
        raise UsageError("--vqgan-model-path and --vqgan-config-path go together: give both, or none for the published "
                         "model")
    if model.vae_path is not None:
        raise UsageError("--vae-path: discrete VAEs are not supported; give --vqgan-model-path and --vqgan-config-path")
    check_architecture(model)
    if model.rotary_2d and model.dim_head % 4:
        raise UsageError(f"--rotary-2d: needs a --dim-head divisible by 4, not {model.dim_head}")
    if model.shift_tokens and model.hidden_size % 4:
        raise UsageError(f"--shift-tokens: needs a --hidden-size divisible by 4, not {model.hidden_size}")
    if model.architecture == "image-gpt" and model.text_seq_len != 1:
        raise UsageError("--architecture image-gpt reads one class, no text: it needs --text-seq-len 1")
    if model.architecture == "image-gpt" and run.device == "ipu":
        raise UsageError("--architecture image-gpt: IPUs always compute the text loss; use --device cuda or cpu")
    if data.generated_data and data.synthetic_data:
        raise UsageError("--generated-data and --synthetic-data exclude each other: give one of them")
    if config.checkpoints.export_mindalle is not None:
        if model.architecture != "mindalle":
            raise UsageError("--export-mindalle: only models of --architecture mindalle fit into its layout")
        if data.generated:
            raise UsageError("--export-mindalle: a model trained on generated data has no VQGAN to export")
    if config.checkpoints.resume and config.checkpoints.pretrained_checkpoint is not None:
        raise UsageError("--resume and --pretrained-checkpoint exclude each other: the one continues a run, the other "
                         "starts a new one")
    if run.device == "cpu":
        run.native_precision("cpu")
    if run.precision == "bf16" and run.device == "ipu":
        raise UsageError("--precision bf16 is not for IPUs; use fp16 or fp32")
    if model.code_noise_per_image and model.code_noise > 0.5:
        raise UsageError(f"--code-noise {model.code_noise}: with --code-noise-per-image at most 0.5")
    if model.base_width and not model.init_std:
        raise UsageError("--base-width: scales --init-std, which is 0, PyTorch's default initialisation; give one, "
                         "such as --init-std 0.02")
    if model.base_width and config.optimizer.optimizer == "Adafactor":
        raise UsageError("--base-width: steps of --optimizer Adafactor are relative to the weights; omit it")
