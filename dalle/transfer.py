"""Transfer learning as in minDALL-E: its text-to-image model becomes a class-conditional or unconditional image model.

    downstream = read_downstream("configs/transfer-imagenet-clscond-gen.yaml")
    start = image_only(read_dalle("1.3B"), downstream.num_classes, seed=0)     # the start of training

The model stays a DalleModel: its text is one token, the class (see bpe/classes.py), before the codes. Embeddings and
positions of the codes, blocks and last norm are kept; the start vectors and the head are new.
"""
from __future__ import annotations

import math
from typing import Any, Iterable, Mapping, NamedTuple

import torch
from torch import Tensor

from checkpoints import DalleCheckpoint
from models.vqgan_config import NETWORK_KEYS, VqganConfig, stage1_config
from utils.errors import UserError, nearest
from utils.files import PathLike
from utils.yaml_files import read_yaml

_WEIGHT_STD = 0.02  # of new embeddings and heads, as in minDALL-E

#: Every key of minDALL-E's configurations with its default, which also sets its type; `stage1` has its own reader.
_KEYS: dict[str, dict[str, Any]] = {
    "dataset": {
        "dataset": "imagenet",
        "image_resolution": 256,
        "tokenizer_type": "CharBPE",
        "context_length": 64,
        "transforms": "dalle-vqvae",
        "bpe_pdrop": 0.0,
    },
    "stage2": {
        "type": "igpt",
        "use_cls_cond": False,
        "vocab_size_img": 16384,
        "vocab_size_txt": 16384,
    },
    "stage2.hparams": {
        "embed_dim": 1536,
        "n_layers": 42,
        "n_heads": 24,
        "n_dense_layers": 42,
        "ctx_len_img": 256,
        "ctx_len_txt": 64,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "mlp_bias": True,
        "attn_bias": True,
        "gelu_use_approx": False,
        "use_head_txt": True,
        "n_classes": 0,
    },
    "optimizer": {
        "opt_type": "adamW",
        "base_lr": 1e-4,
        "weight_decay": 1e-4,
        "betas": [0.9, 0.99],
        "grad_clip_norm": 1.0,
        "sched_type": "cosine",
        "max_steps": 0,
        "min_lr": 0.0,
    },
    "experiment": {
        "local_batch_size": 4,
        "total_batch_size": 512,
        "valid_batch_size": 32,
        "epochs": 10,
        "save_ckpt_freq": 1,
        "test_freq": 1,
        "use_amp": True,
    },
}

_STAGE1_KEYS = {
    "stage1": ("type", "embed_dim", "n_embed", "hparams"),
    "stage1.hparams": ("double_z", *NETWORK_KEYS, "pdrop", "num_groups", "patch_size"),
}

#: Keys with only one supported value, and why.
_FIXED = {
    "dataset.dataset": ("imagenet", "the data are folders of classes"),
    "dataset.bpe_pdrop": (0.0, "there are no captions"),
    "stage2.type": ("igpt", "only image-only models are supported"),
    "stage2.hparams.embd_pdrop": (0.0, "minDALL-E has no dropout"),
    "stage2.hparams.resid_pdrop": (0.0, "minDALL-E has no dropout"),
    "stage2.hparams.attn_pdrop": (0.0, "minDALL-E has no dropout"),
    "optimizer.opt_type": ("adamW", "no other optimizer is supported"),
    "optimizer.sched_type": ("cosine", "no other schedule is supported"),
    "optimizer.max_steps": (0, "epochs and data set the steps; --max-steps stops earlier"),
    "experiment.save_ckpt_freq": (
        1,
        "a checkpoint is written after every epoch; --keep-checkpoints sets how many are kept",
    ),
    "experiment.test_freq": (1, "the validation loss is measured after every epoch"),
}


class Downstream(NamedTuple):
    """A checked configuration of transfer learning."""

    num_classes: int
    """0: unconditional."""
    stage1: VqganConfig
    image_size: int
    """Height and width in pixels."""
    shape: dict[str, Any]
    """stage2.hparams, and vocab_size_img."""
    learning_rate: float
    min_learning_rate: float
    """End of the cosine schedule."""
    betas: tuple[float, float]
    weight_decay: float
    clip_grad_norm: float
    local_batch_size: int
    """Images per forward pass of one process."""
    total_batch_size: int
    """Images per optimizer step."""
    epochs: int
    mixed_precision: bool


def read_downstream(path: PathLike) -> Downstream:
    """Read a YAML file in minDALL-E's format. Raises UserError naming the file and the key."""
    document = _document(path)
    values: dict[str, Any] = {}
    for section, keys in _KEYS.items():
        values.update(_values(path, section, _table(path, section, document, keys)))
    for section, known in _STAGE1_KEYS.items():
        _table(path, section, document, known)
    for key, (wanted, why) in _FIXED.items():
        if values[key] != wanted:
            raise UserError(f"{path}: {key} can only be {wanted}, not {values[key]}: {why}")
    shape = {key[len("stage2.hparams.") :]: value for key, value in values.items() if key.startswith("stage2.hparams.")}
    shape["vocab_size_img"] = values["stage2.vocab_size_img"]
    if values["stage2.use_cls_cond"] and not shape["n_classes"]:
        raise UserError(f"{path}: stage2.use_cls_cond needs stage2.hparams.n_classes, the number of classes")
    betas = values["optimizer.betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{path}: optimizer.betas must be two numbers of at least 0 and below 1")
    if values["optimizer.base_lr"] <= 0 or values["optimizer.min_lr"] > values["optimizer.base_lr"]:
        raise UserError(f"{path}: optimizer.base_lr must be above 0 and at least optimizer.min_lr")
    return Downstream(
        shape["n_classes"] if values["stage2.use_cls_cond"] else 0,
        stage1_config({"stage1": document.get("stage1")}, str(path)),
        values["dataset.image_resolution"],
        shape,
        values["optimizer.base_lr"],
        values["optimizer.min_lr"],
        (betas[0], betas[1]),
        values["optimizer.weight_decay"],
        values["optimizer.grad_clip_norm"],
        values["experiment.local_batch_size"],
        values["experiment.total_batch_size"],
        values["experiment.epochs"],
        values["experiment.use_amp"],
    )


def _document(path: PathLike) -> Mapping[str, Any]:
    document = read_yaml(path, "--config-downstream")
    known = ["dataset", "stage1", "stage2", "optimizer", "experiment"]
    for key in document:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}.{nearest(str(key), known)}")
    return document


def _table(path: PathLike, section: str, document: Mapping[str, Any], keys: Iterable[str]) -> Mapping[str, Any]:
    """One section of the document ("stage2.hparams" is in stage2). Raises UserError for unknown keys."""
    table: Any = document
    for part in section.split("."):
        table = table.get(part) or {}
        if not isinstance(table, dict):
            raise UserError(f"{path}: {section} must be a table of options")
    known = list(keys) + (["hparams"] if section == "stage2" else [])
    for key in table:
        if key not in known:
            raise UserError(f"{path}: unknown key '{section}.{key}'.{nearest(str(key), known)}")
    return table


def _values(path: PathLike, section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values of one section: {"section.key": value}, with defaults."""
    values = {}
    for key, default in _KEYS[section].items():
        value = table.get(key)
        where = f"{path}: {section}.{key}"
        values[f"{section}.{key}"] = default if value is None else _checked(where, value, default)
    return values


def _checked(where: str, value: Any, default: Any) -> Any:
    """Check that a value has the default's type; numbers are at least 0, integers 1 unless the default is 0."""
    if isinstance(default, list):
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list of numbers, not {value!r}")
        return [_checked(where, item, default[0]) for item in value]
    if isinstance(default, float):
        try:  # YAML 1.1 reads 1e-4 as text
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else -1.0
        except ValueError:
            number = -1.0
        if not (math.isfinite(number) and number >= 0):
            raise UserError(f"{where} must be a number of at least 0, not {value!r}")
        return number
    if type(value) is not type(default):
        words = {bool: "true or false", int: "a whole number", str: "text"}
        raise UserError(f"{where} must be {words[type(default)]}, not {value!r}")
    if type(default) is int and value < (1 if default else 0):
        raise UserError(f"{where} must be at least {1 if default else 0}, not {value}")
    return value


def check_shape(downstream: Downstream, checkpoint: DalleCheckpoint) -> None:
    """Raise UserError naming the key where the configuration does not match the checkpoint."""
    config, shape = checkpoint.config, downstream.shape
    own: list[tuple[str, Any]] = [
        ("hparams.embed_dim", config["dim"]),
        ("hparams.n_layers", config["depth"]),
        ("hparams.n_dense_layers", config["depth"]),
        ("hparams.n_heads", config["heads"]),
        ("hparams.ctx_len_img", config["grid"] ** 2),
        ("hparams.attn_bias", config["qkv_bias"]),
        ("hparams.mlp_bias", config["ff_bias"]),
        ("hparams.gelu_use_approx", config["activation"] == "quick_gelu"),
        ("vocab_size_img", config["num_image_tokens"]),
    ]
    for key, value in own:
        if shape[key.rpartition(".")[2]] != value:
            raise UserError(
                "--config-downstream: stage2.{} is {}, but {} has {}".format(
                    key, shape[key.rpartition(".")[2]], checkpoint.path, value
                )
            )


def image_only(checkpoint: DalleCheckpoint, num_classes: int, seed: int = 0) -> DalleCheckpoint:
    """Return the checkpoint of an image-only model to start training from.

    Kept: everything for codes except the head. New, initialised with `seed`: the head, and start vectors for no class
    and for each of num_classes. The model keeps an unused text head.
    """
    config = dict(
        checkpoint.config,
        num_text_tokens=num_classes + 1,
        text_seq_len=1,
        bos=False,
        unique_pads=False,
        text_positions=False,
        tie_embeddings=False,
    )
    weights = dict(checkpoint.weights if checkpoint.ema is None else checkpoint.ema)
    dim, codes = config["dim"], config["num_image_tokens"]
    generator = torch.Generator().manual_seed(seed)
    for name in ("text_emb.weight", "text_pos_emb.weight", "text_head.weight", "text_head.bias"):
        weights.pop(name, None)
    # minDALL-E's code initialises a single start vector with standard deviation 1, tables with 0.02.
    weights["text_emb.weight"] = _normal((num_classes + 1, dim), _WEIGHT_STD if num_classes else 1.0, generator)
    weights["text_head.weight"] = torch.zeros(num_classes + 1, dim)
    weights["image_head.weight"] = _normal((codes, dim), _WEIGHT_STD, generator)
    if config["head_bias"]:
        weights["text_head.bias"], weights["image_head.bias"] = torch.zeros(num_classes + 1), torch.zeros(codes)
    return checkpoint._replace(
        config=config,
        weights=weights,
        epoch=0,
        vqgan_weights=None,
        identity={},
        ema=None,
        opt_state=None,
        scheduler_state=None,
        training=None,
    )


def _normal(shape: tuple[int, int], std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * std
