"""Configuration: dataclass defaults, then a named configuration of configs.yaml, then command-line flags.

Every option is one field of a frozen dataclass below: its annotation is its type, `option(...)` holds its default, its
limits and its help. The flags, the checks of YAML values, the help text and the error messages are all made from that.
Nothing is parsed at import and nothing here knows a device.

    config = parse(["--config", "L16", "--batch-size", "4"])
    config.execution.batch_size, config.global_batch
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

from utils.errors import UsageError, UserError, nearest
from utils.flags import Parser
from utils.resume import APPLIES, CONTENT, FIXED, FREE
from utils.untrusted import shown
from utils.yaml_files import parse_yaml

DEFAULT_CONFIG_FILE = Path(__file__).resolve().parent / "configs.yaml"
BUILT_IN_SET = "demo"  # the one value of --input-folder that is a name, not a folder


def option(default: Any, help: str, *, resume: str, **limits: Any) -> Any:
    """Declare an option.

    resume: what --resume does with a new value, see utils/resume.py: APPLIES, FIXED, CONTENT or FREE.
    limits: ge, gt, le, lt (bounds of numbers); choices (allowed words); bare (the word that the flag alone stands for);
    path (True: the value is a path; "find": it is something that exists, looked for in the working directory and then
    beside the configuration file).
    """
    return field(default=default, metadata=dict(limits, help=help, resume=resume))


class Section:
    """Base of the sections: checks every value, also those given in code or through `dataclasses.replace`."""

    def __post_init__(self) -> None:
        for spec in _options(type(self)):
            value = _checked(spec, getattr(self, spec.name), flag_name(spec.name), is_text=False)
            object.__setattr__(self, spec.name, value)


@dataclass(frozen=True)
class ExecutionConfig(Section):
    """Where, how much and for how long to train."""

    device: str = option("auto", "where to train; auto: ipu if PopTorch finds IPUs, else cuda if there is one, else "
                                 "cpu", choices=("auto", "cpu", "cuda", "ipu"), resume=APPLIES)
    batch_size: int = option(1, "micro-batch: samples in one forward pass of one replica", ge=1, resume=APPLIES)
    gradient_accumulation: int = option(1, "micro-batches added up for one optimizer step", ge=1, resume=APPLIES)
    replication_factor: int = option(1, "replicas of the model; the native engine reaches the same global batch with "
                                        "the processes torchrun gives it", ge=1, resume=APPLIES)
    device_iterations: int = option(1, "optimizer steps for one call of the device", ge=1, resume=APPLIES)
    epochs: int = option(1, "passes over the training data", ge=1, resume=APPLIES)
    max_steps: int = option(0, "stop after so many optimizer steps in all; 0: no limit", ge=0, resume=APPLIES)
    max_minutes: float = option(0.0, "stop after so many minutes of training; 0: no limit", ge=0, resume=APPLIES)
    precision: str = option("auto", "arithmetic of the transformer; auto: as --fp16 says (fp16 on cuda or ipu, fp32 on "
                                    "cpu), any other value wins over --fp16", choices=("auto", "fp32", "bf16", "fp16"),
                            resume=APPLIES)
    matmul_precision: Optional[str] = option(None, "how exactly float32 matrix products take their factors, as "
                                                   "torch.set_float32_matmul_precision says: highest (float32), high "
                                                   "(TF32 on a GPU, 16 bits on a CPU with AMX), medium (bfloat16); "
                                                   "none: high on a GPU, highest on a CPU",
                                             choices=("highest", "high", "medium"), resume=APPLIES)
    fp16: bool = option(False, "train in half precision where the device can", resume=APPLIES)
    compile: bool = option(False, "compile the training step with torch.compile", resume=APPLIES)
    activation_checkpointing: bool = option(False, "compute activations again in the backward pass to save memory",
                                            resume=APPLIES)
    shard: bool = option(False, "share weights, gradients and optimizer state out over the processes of torchrun "
                                "(FSDP2), for models larger than one GPU; PyTorch 2.7 or newer", resume=APPLIES)
    random_seed: int = option(42, "seed of weights, data order, captions and dropout", ge=0, le=2**32 - 1, resume=FIXED)
    threads: int = option(0, "CPU threads; 0: as PyTorch chooses", ge=0, resume=APPLIES)

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step, over all replicas."""
        return self.batch_size * self.gradient_accumulation * self.replication_factor

    def native_precision(self, device_type: str) -> str:
        """The arithmetic of the native engine on "cpu" or "cuda": "fp32", "bf16" or "fp16".

        --fp16 (set in the published configurations for IPUs) means fp16 autocast on cuda. CPUs have no fast fp16
        arithmetic, so there it means fp32, and asking for it by --precision fp16 is an error.
        """
        if self.precision == "fp16" and device_type == "cpu":
            raise UsageError("--precision fp16 is not for the CPU; use bf16 or fp32")
        if self.precision != "auto":
            return self.precision
        return "fp16" if self.fp16 and device_type != "cpu" else "fp32"


@dataclass(frozen=True)
class IpuConfig(Section):
    """Placement, memory and transfers on IPUs; other devices ignore them."""

    ipus_per_replica: int = option(1, "IPUs that one replica is spread over", ge=1, resume=APPLIES)
    layers_per_ipu: Tuple[int, ...] = option((16,), "transformer layers on each IPU; they add up to "
                                                     "--num-hidden-layers", ge=0, resume=APPLIES)
    cls_ipu_id: Optional[int] = option(None, "IPU of the head; none: the last", ge=0, resume=APPLIES)
    embedding_ipu_id: int = option(0, "IPU of the embeddings; the VQGAN is on IPU 0", ge=0, resume=APPLIES)
    embedding_serialization_factor: int = option(1, "compute embedding and head in so many parts to save memory", ge=1,
                                                 resume=APPLIES)
    matmul_proportion: Tuple[float, ...] = option((0.6,), "share of memory for matrix products: one, or one for each "
                                                          "IPU", gt=0, le=1, resume=APPLIES)
    stochastic_rounding: bool = option(False, "round half-precision results stochastically", resume=APPLIES)
    enable_half_partials: bool = option(False, "half-precision partial sums in matrix products and convolutions",
                                        resume=APPLIES)
    enable_rts: bool = option(False, "shard the optimizer state over the replicas", resume=APPLIES)
    optimizer_state_offchip: bool = option(False, "keep the optimizer state in the host's memory", resume=APPLIES)
    async_dataloader: bool = option(True, "load the next batch while the device works", resume=FREE)
    byteio: bool = option(False, "send images as bytes and scale them on the device", resume=APPLIES)
    compile_only: bool = option(False, "compile for an offline device and stop", resume=FREE)
    executable_cache_dir: Optional[str] = option(None, "folder where compiled programs are kept", path=True,
                                                 resume=FREE)
    profile_dir: Optional[str] = option(None, "folder for profiles of the device", path=True, resume=FREE)
    plan: Optional[str] = option(None, "show what would lie on each IPU and stop, without IPU, SDK or data; auto: "
                                       "propose --layers-per-ipu too", choices=("show", "auto"), bare="show",
                                 resume=FREE)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer, its schedule and what keeps it stable."""

    optimizer: str = option("Adam", "optimizer; Muon: for the blocks' matrices, with AdamW for the rest; Adafactor: "
                                    "keeps next to no state, its steps are relative to the size of the weights",
                           choices=("Adam", "AdamW", "Muon", "Adafactor"), resume=FIXED)
    learning_rate: float = option(3.0e-4, "peak learning rate", gt=0, resume=APPLIES)
    lr_scheduler: str = option("constant", "schedule; constant and multi_step warm up over the first fifth of the "
                                           "epochs, cosine over --warmup-steps",
                               choices=("ReduceLROnPlateau", "multi_step", "constant", "cosine"), resume=APPLIES)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up before the cosine; 0: none", ge=0, resume=APPLIES)
    lr_floor: float = option(0.01, "what the cosine ends at, as a share of --learning-rate", ge=0, le=1, resume=APPLIES)
    weight_decay: float = option(0.0, "weight decay; not applied to one-dimensional parameters", ge=0, resume=APPLIES)
    beta1: float = option(0.9, "decay of Adam's first moment", ge=0, lt=1, resume=APPLIES)
    beta2: float = option(0.999, "decay of Adam's second moment", ge=0, lt=1, resume=APPLIES)
    eps: float = option(1.0e-6, "term that keeps Adam's division finite", gt=0, resume=APPLIES)
    clip_grad_norm: float = option(0.0, "largest norm of the gradient; 0: no clipping", ge=0, resume=APPLIES)
    max_bad_steps: int = option(20, "stop after so many steps in a row whose loss or gradient is not finite; single "
                                    "ones are left out; 0: never", ge=0, resume=APPLIES)
    loss_scaling: float = option(16384.0, "(first) factor on the loss in half precision; a power of two", gt=0,
                                 resume=APPLIES)
    enable_als: bool = option(False, "automatic loss scaling on IPUs (always on for fp16 on cuda)", resume=APPLIES)
    enable_half_first_order_momentum: bool = option(False, "half-precision first moment on IPUs", resume=FIXED)
    ema_decay: float = option(0.0, "decay of the moving average of the weights; 0: none", ge=0, lt=1, resume=APPLIES)


@dataclass(frozen=True)
class ModelConfig(Section):
    """The transformer and the VQGAN it works on."""

    architecture: str = option("mini-dalle", "kind of transformer; mindalle: minDALL-E's (GELU, learned positions, no "
                                             "<bos>, no pads of their own, no LayerScale), by default over the "
                                             "published f16-16384 VQGAN; image-gpt: the same with a class for a text "
                                             "(--text-seq-len 1, --bpe-path: a list of classes)",
                               choices=("mini-dalle", "mindalle", "image-gpt"), resume=FIXED)
    hidden_size: int = option(512, "width of the transformer", ge=1, resume=FIXED)
    num_hidden_layers: int = option(16, "transformer layers", ge=1, resume=FIXED)
    num_attention_heads: int = option(16, "attention heads", ge=1, resume=FIXED)
    dim_head: int = option(64, "width of one head", ge=1, resume=FIXED)
    text_seq_len: int = option(80, "text tokens of a caption", ge=1, resume=FIXED)
    image_size: int = option(256, "height and width of the images in pixels", ge=8, resume=FIXED)
    attn_types: Tuple[str, ...] = option(("full",), "attention pattern of each layer; a shorter list is repeated",
                                         choices=("full", "axial_row", "axial_col", "conv_like", "conv_causal"),
                                         resume=FIXED)
    attention_impl: str = option("auto", "how attention is computed; auto: what is fastest on the device",
                                 choices=("auto", "sdpa", "local", "explicit"), resume=APPLIES)
    ff_dropout: float = option(0.0, "dropout in the feed-forward layers", ge=0, lt=1, resume=APPLIES)
    attn_dropout: float = option(0.0, "dropout of the attention output", ge=0, lt=1, resume=APPLIES)
    sandwich_norm: bool = option(False, "a second LayerNorm after each sub-layer", resume=FIXED)
    layer_scale: bool = option(True, "a learned factor for each channel of each residual branch (mini-dalle only)",
                               resume=FIXED)
    init_std: float = option(0.0, "standard deviation of the first weights; 0: PyTorch's own initialisation", ge=0,
                             resume=FIXED)
    loss_img_weight: float = option(7.0, "weight of the image loss beside the text loss", ge=0, resume=APPLIES)
    code_noise: float = option(0.0, "share of the codes that the model reads as random others while training",
                               ge=0, lt=1, resume=APPLIES)
    null_cond_prob: float = option(0.0, "share of captions left out in training, for guidance when generating",
                                   ge=0, le=1, resume=APPLIES)
    vqgan_model_path: Optional[str] = option(None, "weights of the VQGAN (.ckpt or .safetensors); none: the published "
                                                   "f16-1024 model (see --architecture) is downloaded", path="find",
                                             resume=CONTENT)
    vqgan_config_path: Optional[str] = option(None, "YAML file of the VQGAN", path="find", resume=CONTENT)
    vae_path: Optional[str] = option(None, "refused: discrete VAEs are not read, see --vqgan-model-path", path="find",
                                     resume=FIXED)


@dataclass(frozen=True)
class DataConfig(Section):
    """Images, captions and vocabulary."""

    input_folder: Optional[str] = option(None, "folder of images and captions, webdataset shards such as "
                                               "'DIR/{00000..00099}.tar', or 'demo' for the built-in set", path="find",
                                         resume=APPLIES)
    validation_folder: Optional[str] = option(None, "folder or shards of pairs for the validation loss", path="find",
                                              resume=APPLIES)
    validation_fraction: float = option(0.01, "without --validation-folder: share of the pairs held out for "
                                              "validation; 0: none", ge=0, le=0.5, resume=FIXED)
    bpe_path: Optional[str] = option(None, "YouTokenToMe vocabulary, tokenizer.json of Hugging Face, or list of "
                                           "classes; none: the CLIP vocabulary", path="find", resume=CONTENT)
    truncate_captions: bool = option(False, "cut captions that are longer than --text-seq-len instead of stopping",
                                     resume=APPLIES)
    generated_data: bool = option(False, "train on random data made on the host", resume=APPLIES)
    synthetic_data: bool = option(False, "train on random data made on the device (IPU; elsewhere as --generated-data)",
                                  resume=APPLIES)
    shard_images: Optional[str] = option(None, "suffixes of the images in shards, with commas between (img,jpg); none: "
                                               "those of folders, and img", resume=APPLIES)
    shard_captions: Optional[str] = option(None, "where the captions in shards are, the best first, with commas "
                                                 "between: keys of .json members, or suffixes of text members; none: "
                                                 "caption,txt,text,TEXT,cap", resume=APPLIES)
    max_bad_fraction: float = option(0.01, "share of the pairs that may be left out (damaged images, captions that are "
                                           "no text); what is, skipped.jsonl in the log folder lists", ge=0, le=1,
                                     resume=APPLIES)
    dataloader_workers: int = option(0, "processes that read data", ge=0, resume=FREE)
    cache_codes: str = option("auto", "folder where the codes of images are kept, each encoded once; auto: "
                                      "~/.cache/dalle/codes, except for generated data; off: images are encoded in "
                                      "every step", path=True, resume=FREE)
    augment: str = option("none", "flip: mirror every other training image, other ones in each epoch",
                          choices=("none", "flip"), resume=APPLIES)

    @property
    def keeps_codes(self) -> bool:
        """Whether images are encoded ahead and training reads their codes (--cache-codes).

        auto leaves random images alone: they are there to measure the whole step.
        """
        generated = self.generated_data or self.synthetic_data
        return self.cache_codes != "off" and not (self.cache_codes == "auto" and generated)


@dataclass(frozen=True)
class CheckpointsConfig(Section):
    """What is saved, and what training starts from."""

    checkpoint_output_dir: str = option("./output/ckpt", "folder of the checkpoints; '': none are saved", path=True,
                                        empty=True, resume=FREE)
    checkpoint_save_steps: int = option(1000, "optimizer steps from one checkpoint to the next; 0: only at the end of "
                                              "each epoch", ge=0, resume=FREE)
    keep_checkpoints: int = option(0, "keep the newest so many; 0: all", ge=0, resume=FREE)
    pretrained_checkpoint: Optional[str] = option(None, "checkpoint whose weights training starts from; or a folder in "
                                                        "minDALL-E's layout or minDALL-E/1.3B, which bring vocabulary "
                                                        "and VQGAN along", path="find", resume=FREE)
    resume: bool = option(False, "go on from the newest checkpoint in --checkpoint-output-dir", resume=FREE)
    export_mindalle: Optional[str] = option(None, "new folder for the trained model in minDALL-E's layout", path=True,
                                            resume=FREE)


@dataclass(frozen=True)
class MiscConfig(Section):
    """Logs and metrics."""

    log_dir: Optional[str] = option(None, "folder of log file, metrics and loss.png; none: the one that holds "
                                          "--checkpoint-output-dir", path=True, resume=FREE)
    log_every: int = option(10, "optimizer steps from one logged line to the next", ge=1, resume=APPLIES)
    tensorboard: bool = option(False, "write metrics for TensorBoard", resume=FREE)
    wandb: bool = option(False, "send metrics to Weights & Biases (WANDB_MODE=offline needs no account)", resume=FREE)
    wandb_project_name: str = option("miniDALL-E", "Weights & Biases project", resume=FREE)
    wandb_run_name: Optional[str] = option(None, "Weights & Biases run; none: it chooses one", resume=FREE)


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
        """Build from a flat mapping as `to_dict` makes it; what is absent takes its default."""
        values = dict(values)
        name = values.pop("config", "default")
        sections: Dict[str, Any] = {}
        for attribute, section in SECTIONS.items():
            own = [spec.name for spec in _options(section)]
            sections[attribute] = section(**{key: values.pop(key) for key in own if key in values})
        if values:
            key = sorted(values)[0]
            raise UsageError(f"unknown option '{key}'.{nearest(key, option_names())}")
        return cls(name=name, **sections)

    def to_dict(self) -> Dict[str, Any]:
        """A flat dict of plain values (lists instead of tuples) for logging and checkpoints; `config` is the name."""
        flat: Dict[str, Any] = {"config": self.name}
        for attribute in SECTIONS:
            for key, value in dataclasses.asdict(getattr(self, attribute)).items():
                flat[key] = list(value) if isinstance(value, tuple) else value
        return flat

    def replace(self, **values: Any) -> Config:
        """A copy with some options changed, whatever their section; checked like any other."""
        return Config.from_dict(dict(self.to_dict(), **values))

    def describe(self) -> str:
        """Several lines for the log: the global batch and, by section, every option that is not at its default."""
        run = self.execution
        lines = [
            f"configuration {self.name}: global batch {run.global_batch} = {run.batch_size} (batch_size) x "
            f"{run.gradient_accumulation} (gradient_accumulation) x {run.replication_factor} "
            "(replication_factor)"
        ]
        for attribute, section in SECTIONS.items():
            own = getattr(self, attribute)
            changed = [f"{spec.name}={_shown(getattr(own, spec.name))}" for spec in _options(section)
                       if getattr(own, spec.name) != spec.default]
            if changed:
                lines += textwrap.wrap("  ".join(changed), 118, initial_indent=f"  {attribute:<12}",
                                       subsequent_indent=" " * 14, break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines)


SECTIONS: Dict[str, Type[Section]] = {
    "execution": ExecutionConfig, "ipu": IpuConfig, "optimizer": OptimizerConfig, "model": ModelConfig,
    "data": DataConfig, "checkpoints": CheckpointsConfig, "misc": MiscConfig,
}


def option_names() -> List[str]:
    """Every option's name, as YAML spells it."""
    return [spec.name for section in SECTIONS.values() for spec in _options(section)]


def resume_rules() -> Dict[str, str]:
    """What --resume does with a new value of each option: {name: APPLIES, FIXED, CONTENT or FREE}."""
    return {spec.name: spec.metadata["resume"] for section in SECTIONS.values() for spec in _options(section)}


def flag_name(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def parse(argv: Optional[Sequence[str]] = None, default_config: str = "unit_test") -> Config:
    """Read flags and the configuration they name.

    argv: the words after the program's name (default: those of the process).
    Raises UsageError (one line, naming the flag or the key) for anything unknown, of the wrong type or out of range.
    """
    flags = _parse_flags(make_parser(default_config), argv)
    config_file = Path(flags.pop("config_file", DEFAULT_CONFIG_FILE))
    name = flags.pop("config", default_config)
    specs = {spec.name: spec for section in SECTIONS.values() for spec in _options(section)}
    values = {}
    for key, value in load_configuration(config_file, name).items():
        where = f"{config_file.name}, configuration '{name}': "
        if key not in specs:
            raise UsageError(f"{where}unknown key '{key}'.{nearest(str(key), specs)}")
        values[key] = _checked(specs[key], value, where + key, is_text=False)
    for key, value in flags.items():
        values[key] = _checked(specs[key], value, flag_name(key), is_text=True)
    for key, value in values.items():
        if specs[key].metadata.get("path") == "find" and value is not None:
            values[key] = _find(value, config_file.parent)
    config = Config.from_dict(dict(values, config=name))
    needs_data = not (config.data.generated_data or config.data.synthetic_data or config.ipu.plan)
    if config.data.input_folder is None and needs_data:
        raise UsageError("--input-folder: give a folder of images and captions, 'demo' for the built-in set, "
                         "or --generated-data")
    return config


# Command line --------------------------------------------------------------------------------------------------------


def make_parser(default_config: str = "unit_test") -> Parser:
    """The parser of train.py: --config, --config-file and one group of flags for each section."""
    parser = Parser(usage="%(prog)s [--config NAME] [flags]",
                    description="Train a DALL-E. Options come from a named configuration; a flag overrides it.",
                    epilog="Flags may be spelled with - or _. Booleans stand alone or take true or false. "
                           "'none' empties an option that may be empty.",
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120))
    parser.add_argument("--config", default=argparse.SUPPRESS, metavar="NAME",
                        help=f"configuration to use (default: {default_config})")
    parser.add_argument("--config-file", default=argparse.SUPPRESS, metavar="PATH",
                        help=f"file of named configurations (default: {DEFAULT_CONFIG_FILE.name})")
    for attribute, section in SECTIONS.items():
        group = parser.add_argument_group("IPU" if attribute == "ipu" else attribute)
        for spec in _options(section):
            settings: Dict[str, Any] = {"metavar": _metavar(spec)}
            if spec.type is bool:
                settings.update(nargs="?", const="true")
            elif "bare" in spec.metadata:
                settings.update(nargs="?", const=spec.metadata["bare"])
            elif _is_tuple(spec.type):
                settings.update(nargs="+")
            # Absent flags must not hide the configuration's values, so argparse is given no defaults and no types.
            group.add_argument(flag_name(spec.name), dest=spec.name, default=argparse.SUPPRESS,
                               help=_help(spec).replace("%", "%%"), **settings)
    return parser


def _parse_flags(parser: Parser, argv: Optional[Sequence[str]]) -> Dict[str, Any]:
    """The flags that are really there, as text. Both spellings of a flag (- and _) are taken."""
    known = parser.known_flags()
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        flag, equals, value = word.partition("=")
        spelled = flag.replace("_", "-")
        words.append(spelled + equals + value if flag.startswith("--") and spelled in known else word)
    flags, rest = parser.parse_known_args(words)
    if rest:
        word = rest[0].partition("=")[0]
        if word.endswith(".tar"):
            raise UsageError(f"unexpected argument '{word}': put patterns of shards in quotes, as in --input-folder "
                             "'DIR/{00000..00099}.tar'")
        if not word.startswith("-"):
            raise UsageError(f"unexpected argument '{word}': options are given as flags; --help lists them")
        raise UsageError("unknown flag '{}'.{} --help lists all flags".format(
            word, nearest(word.replace("_", "-"), known)))
    return vars(flags)


def _help(spec: Any) -> str:
    limits = []
    if spec.default is None:
        limits.append("default: none")
    else:
        limits.append("default: " + _shown(spec.default))
    limits += _bounds(spec)
    if _is_tuple(spec.type) and "choices" in spec.metadata:
        limits.append("of: " + ", ".join(spec.metadata["choices"]))
    if spec.metadata["resume"] in (FIXED, CONTENT):
        limits.append("stays as it is with --resume")
    return "{} ({})".format(spec.metadata["help"], "; ".join(limits))


def _metavar(spec: Any) -> str:
    kind = _item_type(spec.type)
    if "choices" in spec.metadata and not _is_tuple(spec.type):
        return "{" + ",".join(spec.metadata["choices"]) + "}"
    if spec.metadata.get("path"):
        return "PATH"
    return str({bool: "BOOL", int: "N", float: "F", str: "NAME"}[kind])


# Types, ranges, conversion -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Option:
    """One field of a section, with its annotation resolved."""

    name: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]


def _options(section: Type[Section]) -> List[_Option]:
    hints = typing.get_type_hints(section)
    return [_Option(spec.name, hints[spec.name], spec.default, spec.metadata)
            for spec in dataclasses.fields(section)]  # type: ignore[arg-type]


def _is_optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _item_type(kind: Any) -> Any:
    """int, float, bool or str: the type itself, or what Optional or Tuple holds."""
    return typing.get_args(kind)[0] if typing.get_args(kind) else kind


def _bounds(spec: Any) -> List[str]:
    words = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
    return [f"{word} {_shown(spec.metadata[key])}" for key, word in words if key in spec.metadata]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(_shown(item) for item in value)
    return str(value)


def _quoted(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else shown(value)  # aliases in YAML can make a long print of little
    return text if len(text) <= 80 else text[:77] + "..."


def _checked(spec: Any, value: Any, where: str, is_text: bool) -> Any:
    """Convert `value` to the option's type and check its range; UsageError starting with `where`.

    is_text: the value was typed on the command line, where everything is text; in YAML a number must be a number
    (only floats may be text, because YAML 1.1 reads 3e-4 as text).
    """
    if _is_optional(spec.type) and (value is None or (is_text and value.lower() in ("none", ""))):
        return None
    if not _is_tuple(spec.type):
        return _checked_item(spec, value, where, is_text)
    if isinstance(value, str):
        value = [value]
    items: List[Any] = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, str):
            items += [(part.strip(), True) for part in item.split(",")]
        else:
            items.append((item, is_text))
    if not items:
        raise UsageError(f"{where}: needs at least one value")
    return tuple(_checked_item(spec, item, where, text) for item, text in items)


def _checked_item(spec: Any, value: Any, where: str, is_text: bool) -> Any:
    kind = _item_type(spec.type)
    try:
        value = _convert(value, kind, is_text)
    except ValueError:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise UsageError("{}: expected {}, got {}{}".format(
            where, expected, _quoted(value), " (put it in quotes)" if kind is str else "")) from None
    limits = spec.metadata
    if "choices" in limits and value not in limits["choices"]:
        raise UsageError("{}: expected one of {}, got {}.{}".format(
            where, ", ".join(limits["choices"]), _quoted(value), nearest(value, limits["choices"])))
    if (("ge" in limits and value < limits["ge"]) or ("gt" in limits and value <= limits["gt"])
            or ("le" in limits and value > limits["le"]) or ("lt" in limits and value >= limits["lt"])):
        raise UsageError("{}: must be {}, got {}".format(where, " and ".join(_bounds(spec)), _quoted(value)))
    if limits.get("path"):
        if not value and limits.get("empty"):
            return value
        if not value or "\0" in value:
            raise UsageError(f"{where}: {_quoted(value)} is not a path")
        return os.path.expanduser(value)
    return value


def _convert(value: Any, kind: Any, is_text: bool) -> Any:
    """`value` as bool, int, float or str; ValueError where that would be a guess."""
    if kind is bool:
        if is_text and isinstance(value, str):
            word = value.lower()
            if word in ("true", "yes", "on", "1"):
                return True
            if word in ("false", "no", "off", "0"):
                return False
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if is_text and isinstance(value, str):
            return int(value)
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                raise ValueError from None
            if math.isfinite(number):
                return number
    elif isinstance(value, str):
        return value
    raise ValueError


# The configuration file ----------------------------------------------------------------------------------------------


def load_configuration(config_file: Path, name: str) -> Dict[str, Any]:
    """The keys and values, as YAML gives them, of the configuration `name`.

    Names that start with a dot and `defaults` only hold what others inherit (`<<: *anchor`) and cannot be chosen.
    """
    try:
        content = Path(config_file).read_bytes()
    except OSError as error:
        raise UsageError(f"--config-file: cannot read {config_file}: {error.strerror or error}") from None
    try:
        configurations = parse_yaml(content, str(config_file), unique_keys=True)
    except UserError as error:
        raise UsageError(str(error)) from None
    if not isinstance(configurations, dict):
        raise UsageError(f"{config_file}: expected a mapping of configuration names")
    names = [key for key in configurations if isinstance(key, str) and not key.startswith(".") and key != "defaults"]
    if name not in names:
        raise UsageError("--config: {} has no configuration '{}'.{} It has: {}".format(
            config_file.name, name, nearest(name, names), ", ".join(names)))
    if not isinstance(configurations[name], dict):
        raise UsageError(f"{config_file.name}: configuration '{name}' must be a mapping of options")
    return configurations[name]


def _check_mindalle(model: ModelConfig) -> None:
    """minDALL-E's layout has no place for what its architecture does not know."""
    if model.sandwich_norm:
        raise UsageError("--sandwich-norm: --architecture mindalle has one LayerNorm for each branch; leave it out")
    if set(model.attn_types) != {"full"}:
        raise UsageError("--attn-types: every layer of --architecture mindalle attends to all before it; give full")
    if model.num_attention_heads * model.dim_head != model.hidden_size:
        raise UsageError(f"--dim-head {model.dim_head}: the heads of --architecture mindalle share its width, so "
                         f"--num-attention-heads x --dim-head must be --hidden-size {model.hidden_size}")


def _find(path: str, folder: Path) -> str:
    """A relative path that is not in the working directory but beside the configuration file becomes that one."""
    if path != BUILT_IN_SET and not os.path.exists(path) and os.path.exists(str(folder / path)):
        return str(folder / path)
    return path


def _check_together(config: Config) -> None:
    """Checks over several options that hold for every engine."""
    model, data, run = config.model, config.data, config.execution
    if (model.vqgan_model_path is None) != (model.vqgan_config_path is None):
        raise UsageError("--vqgan-model-path and --vqgan-config-path go together: give both, or none for the published "
                         "model")
    if model.vae_path is not None:
        raise UsageError("--vae-path: discrete VAEs are not read; give a VQGAN with --vqgan-model-path and "
                         "--vqgan-config-path")
    if model.architecture == "mindalle":
        _check_mindalle(model)
    if model.architecture == "image-gpt" and model.text_seq_len != 1:
        raise UsageError("--architecture image-gpt reads one class, no text: it needs --text-seq-len 1")
    if model.architecture == "image-gpt" and run.device == "ipu":
        raise UsageError("--architecture image-gpt is not for IPUs, which would have to leave the text loss out; use "
                         "--device cuda or cpu")
    if data.generated_data and data.synthetic_data:
        raise UsageError("--generated-data and --synthetic-data exclude each other: give one of them")
    if config.checkpoints.export_mindalle is not None:
        if model.architecture != "mindalle":
            raise UsageError("--export-mindalle: only models of --architecture mindalle fit into its layout")
        if data.generated_data or data.synthetic_data:
            raise UsageError("--export-mindalle: a model of generated data has no VQGAN to be exported with")
    if config.checkpoints.resume and config.checkpoints.pretrained_checkpoint is not None:
        raise UsageError("--resume and --pretrained-checkpoint exclude each other: the one goes on with a run, "
                         "the other starts a new one")
    if run.precision == "fp16" and run.device == "cpu":
        run.native_precision("cpu")
    if run.precision == "bf16" and run.device == "ipu":
        raise UsageError("--precision bf16 is not for IPUs; use fp16 or fp32")
