"""What a stored configuration must look like and which weights it asks for, without building the model.

A checkpoint comes from anywhere: its options are checked for type and range, and its weights against them, before any
memory is taken on their word. Names and options are those of `models.dalle.DALLE` and `models.config.DalleConfig`.
"""

from __future__ import annotations

import re
from typing import Any, Mapping, Tuple

from utils.errors import UserError, nearest
from utils.untrusted import is_number, shown

Shape = Tuple[int, ...]

#: Options without which no model can be built; all are whole numbers of at least 1.
REQUIRED = ("num_text_tokens", "num_image_tokens", "text_seq_len", "grid", "dim", "depth", "heads", "dim_head")
#: The other options of models.config.DalleConfig with its defaults (a test holds the two together).
DEFAULTS: dict[str, Any] = {
    "attn_types": ["full"],
    "loss_img_weight": 7.0,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
    "sandwich_norm": False,
    "layer_scale": True,
    "activation": "geglu",
    "ff_mult": 4,
    "qkv_bias": False,
    "out_bias": True,
    "ff_bias": True,
    "head_bias": True,
    "bos": True,
    "unique_pads": True,
    "text_positions": True,
    "image_positions": "axial",
    "rotary": False,
    "shift_tokens": False,
    "stable": False,
    "tie_embeddings": False,
    "shared_attn_ids": None,
    "shared_ff_ids": None,
    "init_std": 0.0,
}
#: Longest sequence a checkpoint may ask for: its attention masks take the square of it in bytes (here 1 GiB).
MAX_SEQ_LEN = 32768


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if isinstance(default, float):
        return is_number(value)
    if isinstance(default, str):
        return isinstance(value, str)
    items = int if default is None else str  # shared_*_ids or attn_types
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(type(item) is items for item in value)


def complete_config(values: Any) -> dict[str, Any]:
    """Return a stored configuration with every option present. Raises UserError on unknown, missing or wrong ones."""
    if not isinstance(values, Mapping):
        raise UserError("'config' is no table of model options")
    known = set(REQUIRED) | set(DEFAULTS)
    for name in values:
        if name not in known:
            raise UserError(
                "unknown model option {}.{}".format(shown(name), nearest(name, known) if isinstance(name, str) else "")
            )
    config = {}
    for name in REQUIRED:
        if name not in values:
            raise UserError(f"model option '{name}' is missing")
        config[name] = values[name]
    config.update((name, values.get(name, default)) for name, default in DEFAULTS.items())
    for name, value in config.items():
        default = 1 if name in REQUIRED else DEFAULTS[name]
        if not (value is None and default is None) and not _fits(value, default):
            raise UserError(f"model option '{name}' has the impossible value {shown(value)}")
        if name.endswith("_dropout") and value > 1:
            raise UserError(f"model option '{name}' is a probability, not {shown(value)}")
        config[name] = list(value) if isinstance(value, (list, tuple)) else value
    length = config["text_seq_len"] + config["grid"] ** 2
    if length > MAX_SEQ_LEN:
        raise UserError(
            "text_seq_len {} and grid {} ask for {} positions; at most {} are supported".format(
                config["text_seq_len"], config["grid"], length, MAX_SEQ_LEN
            )
        )
    return config


def text_table_size(config: Mapping[str, Any]) -> int:
    return config["num_text_tokens"] + (config["text_seq_len"] if config["unique_pads"] else 0)


def _branch_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of one layer's weights."""
    dim, inner, hidden = config["dim"], config["heads"] * config["dim_head"], config["ff_mult"] * config["dim"]
    up = 2 * hidden if config["activation"] == "geglu" else hidden
    linear = {
        "attention.fn.qkv": (3 * inner, dim, config["qkv_bias"]),
        "attention.fn.out": (dim, inner, config["out_bias"]),
        "feed_forward.fn.up": (up, dim, config["ff_bias"]),
        "feed_forward.fn.down": (dim, hidden, config["ff_bias"]),
    }
    shapes: dict[str, Shape] = {}
    for name, (rows, columns, bias) in linear.items():
        shapes[name + ".weight"] = (rows, columns)
        if bias:
            shapes[name + ".bias"] = (rows,)
    for branch in ("attention", "feed_forward"):
        for norm in ("norm", "norm_out") if config["sandwich_norm"] else ("norm",):
            shapes[f"{branch}.{norm}.weight"] = shapes[f"{branch}.{norm}.bias"] = (dim,)
        if config["layer_scale"]:
            shapes[branch + ".scale"] = (1, 1, dim)
    return shapes


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape of every weight of a model with these (complete) options, under its internal name."""
    dim, grid, table, codes = config["dim"], config["grid"], text_table_size(config), config["num_image_tokens"]
    shapes: dict[str, Shape] = {"text_emb.weight": (table, dim), "image_emb.weight": (codes, dim)}
    if config["text_positions"]:
        shapes["text_pos_emb.weight"] = (config["text_seq_len"] + int(config["bos"]), dim)
    if config["image_positions"] == "axial":
        shapes.update({"image_pos_emb.rows": (grid, 1, dim), "image_pos_emb.columns": (1, grid, dim)})
    elif config["image_positions"] == "learned":
        shapes["image_pos_emb.weight"] = (grid * grid, dim)
    layer_shapes = _branch_shapes(config)
    for layer in range(config["depth"]):
        shapes.update((f"transformer.layers.{layer}.{name}", shape) for name, shape in layer_shapes.items())
    shapes.update({"norm.weight": (dim,), "norm.bias": (dim,)})
    for head, rows in (("text_head", table), ("image_head", codes)):
        shapes[head + ".weight"] = (rows, dim)
        if config["head_bias"]:
            shapes[head + ".bias"] = (rows,)
    return shapes


def aliases(config: Mapping[str, Any]) -> dict[str, str]:
    """Return which weights are the same tensor as another one: {name: the name that stands for both}."""
    same = {}
    if config["tie_embeddings"]:
        same.update({"text_emb.weight": "text_head.weight", "image_emb.weight": "image_head.weight"})
    shapes = _branch_shapes(config)
    for branch, ids in (("attention", config["shared_attn_ids"]), ("feed_forward", config["shared_ff_ids"])):
        first: dict[int, int] = {}
        for layer in range(config["depth"]) if ids else ():
            source = first.setdefault(ids[layer % len(ids)], layer)
            for name in shapes if source != layer else ():
                if name.startswith(branch + ".fn."):
                    same[f"transformer.layers.{layer}.{name}"] = f"transformer.layers.{source}.{name}"
    return same


def num_layers(weights: Mapping[str, Any]) -> int:
    """Count the layers that weights with internal names belong to."""
    return len({name.split(".")[2] for name in weights if re.match(r"transformer\.layers\.\d+\.", name)})
