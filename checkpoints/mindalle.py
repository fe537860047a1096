"""minDALL-E's stage-2 layout (weight names and config.yaml), read and written: pure functions over dictionaries.

A causal GPT over text and codes: no <bos>, no unique pad ids, learned positions, biases on q, k and v.
"""

from __future__ import annotations

import re
from typing import Any, Mapping, MutableMapping

import torch
from torch import Tensor

from checkpoints.formats import StoredModel
from checkpoints.trust import Weights, model_config, overlap
from models.config import DalleConfig
from utils.errors import UserError
from utils.untrusted import shown

#: The file of stage 2 in a folder of minDALL-E.
STAGE2 = "stage2_last.ckpt"

#: Defaults of absent keys of config.yaml: the published 1.3B model.
DEFAULTS = {
    "vocab_size_txt": 16384,
    "vocab_size_img": 16384,
    "embed_dim": 1536,
    "n_layers": 42,
    "n_heads": 24,
    "ctx_len_img": 256,
    "ctx_len_txt": 64,
    "gelu_use_approx": False,
}
_OUTSIDE_NAMES = {
    "tok_emb_txt": "text_emb",
    "tok_emb_img": "image_emb",
    "pos_emb_txt": "text_pos_emb",
    "pos_emb_img": "image_pos_emb",
    "ln_f": "norm",
    "head_txt": "text_head",
    "head_img": "image_head",
}
_LAYER_NAMES = {
    "ln1": "attention.norm",
    "ln2": "feed_forward.norm",
    "attn.proj": "attention.fn.out",
    "mlp.0": "feed_forward.fn.up",
    "mlp.2": "feed_forward.fn.down",
}
_PROJECTIONS = ("query", "key", "value")


def is_mindalle(weights: Mapping[str, Any]) -> bool:
    """Whether these weights have minDALL-E's names."""
    return "tok_emb_txt.weight" in weights


def from_mindalle(weights: MutableMapping[str, Tensor], options: Mapping[str, Any]) -> StoredModel:
    """Read minDALL-E's stage-2 weights; `options` is its config.yaml as a dictionary (may be empty).

    Query, key and value become one matrix; they are removed from `weights`, so that only one layer's are held twice.
    Dropout stays 0 whatever the file says: it is a training option, and the published model has none.
    Raises UserError for an unknown weight or an option without counterpart.
    """
    renamed: Weights = {}
    projections: dict[str, dict[str, Tensor]] = {}
    if overlap(weights.values()):
        raise UserError("several weights share one storage")
    for name in list(weights):
        tensor = weights[name]
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", stem)
        if stem in _OUTSIDE_NAMES and kind in ("weight", "bias"):
            renamed[f"{_OUTSIDE_NAMES[stem]}.{kind}"] = tensor
        elif layer and layer.group(2) in _LAYER_NAMES:
            renamed[f"transformer.layers.{int(layer.group(1))}.{_LAYER_NAMES[layer.group(2)]}.{kind}"] = tensor
        elif layer and layer.group(2) in tuple("attn." + projection for projection in _PROJECTIONS):
            fused = f"transformer.layers.{int(layer.group(1))}.attention.fn.qkv.{kind}"
            projections.setdefault(fused, {})[layer.group(2)[len("attn.") :]] = weights.pop(name)
        elif not name.endswith("attn.mask"):  # a buffer: the causal mask
            raise UserError(f"weight {shown(name)} belongs to no known layout of minDALL-E")
    for fused, parts in projections.items():
        names = fused.replace("fn.qkv", "*")
        for projection in _PROJECTIONS:
            if projection not in parts:
                raise UserError(f"weight '{names}' has no counterpart for the {projection}")
        if len({part.shape for part in parts.values()}) > 1 or parts["key"].dim() == 0:
            raise UserError(f"weights '{names}' differ in shape")
        renamed[fused] = torch.cat([parts.pop(projection) for projection in _PROJECTIONS])
    return StoredModel(config_from_yaml(options, renamed), renamed, None)


def config_from_yaml(options: Mapping[str, Any], renamed: Mapping[str, Tensor]) -> DalleConfig:
    """Convert minDALL-E's config.yaml (as a dictionary) to a configuration; the weights show which biases exist."""
    stage = options.get("stage2") or {}
    hparams = stage.get("hparams") if isinstance(stage, Mapping) else None
    hparams = hparams or {}
    if not isinstance(stage, Mapping) or not isinstance(hparams, Mapping):
        raise UserError("config.yaml: stage2 and its hparams must be tables of options")
    if stage.get("type", "transformer1d") != "transformer1d":
        raise UserError(f"config.yaml: stage2.type {shown(stage['type'])} is not supported; known: transformer1d")
    value = {name: hparams.get(name, stage.get(name, default)) for name, default in DEFAULTS.items()}
    for name, number in value.items():
        if name != "gelu_use_approx" and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise UserError(
                f"config.yaml: stage2 option {name} must be a whole number of at least 1, not {shown(number)}"
            )
    if hparams.get("n_dense_layers", value["n_layers"]) != value["n_layers"]:
        raise UserError("config.yaml: n_dense_layers other than n_layers is not supported")
    if value["embed_dim"] % value["n_heads"]:
        raise UserError("config.yaml: embed_dim {embed_dim} does not divide into n_heads {n_heads}".format(**value))
    grid = round(value["ctx_len_img"] ** 0.5)
    if grid * grid != value["ctx_len_img"]:
        raise UserError(f"config.yaml: ctx_len_img {value['ctx_len_img']} is not a square grid of codes")
    first = "transformer.layers.0."
    return model_config(
        {
            "num_text_tokens": value["vocab_size_txt"],
            "num_image_tokens": value["vocab_size_img"],
            "text_seq_len": value["ctx_len_txt"],
            "grid": grid,
            "dim": value["embed_dim"],
            "depth": value["n_layers"],
            "heads": value["n_heads"],
            "dim_head": value["embed_dim"] // value["n_heads"],
            "bos": False,
            "unique_pads": False,
            "layer_scale": False,
            "image_positions": "learned",
            "init_std": 0.02,
            "activation": "quick_gelu" if value["gelu_use_approx"] else "gelu",
            "qkv_bias": first + "attention.fn.qkv.bias" in renamed,
            "out_bias": first + "attention.fn.out.bias" in renamed,
            "ff_bias": first + "feed_forward.fn.up.bias" in renamed,
            "head_bias": "text_head.bias" in renamed,
        },
        renamed,
    )


# ---- writing

#: Model options that the layout cannot store, with the values they must have.
_FIXED: dict[str, Any] = {
    "bos": False,
    "unique_pads": False,
    "layer_scale": False,
    "sandwich_norm": False,
    "text_positions": True,
    "image_positions": "learned",
    "ff_mult": 4,
    "norm": "layer",
    "qk_norm": False,
    "rotary": False,
    "rotary_2d": False,
    "shift_tokens": False,
    "value_residual": False,
    "stable": False,
    "tie_embeddings": False,
    "shared_attn_ids": None,
    "shared_ff_ids": None,
}


def mindalle_options(config: DalleConfig) -> dict[str, Any]:
    """Return the table "stage2" of config.yaml for a model's options.

    Raises UserError naming an option that minDALL-E's layout cannot store.
    """
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise UserError(
                f"minDALL-E's layout cannot store the model option {name} = {shown(getattr(config, name))}; "
                "train with --architecture mindalle"
            )
    if set(config.attn_types) != {"full"}:
        raise UserError("minDALL-E's layout has no attention patterns: attn_types must be full")
    if config.heads * config.dim_head != config.dim:
        raise UserError("minDALL-E's layout requires heads x dim_head = dim")
    if config.activation not in ("gelu", "quick_gelu") or config.qkv_bias != config.out_bias:
        raise UserError(
            "minDALL-E's layout has only the activations gelu and quick_gelu, and biases on all attention projections "
            "or on none"
        )
    return {
        "type": "transformer1d",
        "vocab_size_txt": config.num_text_tokens,
        "vocab_size_img": config.num_image_tokens,
        "hparams": {
            "embed_dim": config.dim,
            "n_layers": config.depth,
            "n_heads": config.heads,
            "n_dense_layers": config.depth,
            "ctx_len_img": config.grid**2,
            "ctx_len_txt": config.text_seq_len,
            "embd_pdrop": 0.0,
            "resid_pdrop": float(config.attn_dropout),
            "attn_pdrop": 0.0,
            "mlp_bias": config.ff_bias,
            "attn_bias": config.qkv_bias,
            "gelu_use_approx": config.activation == "quick_gelu",
        },
    }


def to_mindalle(weights: Mapping[str, Tensor]) -> Weights:
    """Rename internal weights to minDALL-E's names, the inverse of `from_mindalle`; tensors do not share storage."""
    outside = {internal: name for name, internal in _OUTSIDE_NAMES.items()}
    inside = {internal: name for name, internal in _LAYER_NAMES.items()}
    renamed: Weights = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", stem)
        if layer and layer.group(2) == "attention.fn.qkv":
            for projection, part in zip(_PROJECTIONS, tensor.chunk(3)):
                renamed[f"blocks.{layer.group(1)}.attn.{projection}.{kind}"] = part.clone()
        elif layer:
            renamed[f"blocks.{layer.group(1)}.{inside[layer.group(2)]}.{kind}"] = tensor.contiguous()
        else:
            renamed[f"{outside[stem]}.{kind}"] = tensor.contiguous()
    return renamed
