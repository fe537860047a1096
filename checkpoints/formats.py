"""Checkpoint layouts of a DALL-E, as pure functions over dictionaries: nothing here reads a file or builds a model.

In memory a model has the parameter names of `models.dalle.DalleModel` ("internal names") and the options of
`models.config.DalleConfig` as a plain dictionary. In files ("stored names") there are
  Mini DALL-E       names with the prefix `model.`, options in `hparams` (also the layout of our own checkpoints),
  DALLE-pytorch     nearly the same names, more options, and wrappers (`.fn.`) in the names that depend on them.
(For minDALL-E's layout see mindalle.py.) UserErrors name the weight or the option; the caller prepends the file's name.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Mapping, NamedTuple

import torch
from torch import Tensor

from checkpoints.trust import Weights, model_config, overlap
from models.config import DalleConfig
from utils.errors import UserError
from utils.untrusted import is_number, shown

#: From this version on, DALLE-pytorch's "conv_like" is the window that ends at a code; before, the one centred on it.
CAUSAL_CONV_VERSION = (1, 5)


class StoredModel(NamedTuple):
    """A model in internal terms."""

    config: DalleConfig
    weights: Weights
    """Internal names, in the stored precision; may be views of the stored tensors."""
    vqgan: Weights | None
    """The VQGAN's weights under taming-transformers' names, if the file holds them."""


#: Last part of a stored name -> internal name inside a layer, for the attention (0) and the feed-forward branch (1).
_BRANCH_NAMES = (
    {"scale": "scale", "norm": "norm", "norm_out": "norm_out", "to_qkv": "fn.qkv", "to_out.0": "fn.out",
     "head_scales": "fn.head_scales", "value_mix": "fn.value_mix"},
    {"scale": "scale", "norm": "norm", "norm_out": "norm_out", "net.0": "fn.up", "net.3": "fn.down"},
)
_BRANCHES = ("attention", "feed_forward")
_BARE = ("scale", "fn.head_scales", "fn.value_mix")
"""Parameters that are no weight or bias of a layer."""
_OUTSIDE_NAMES = {
    "text_emb.weight": "text_emb.weight",
    "image_emb.weight": "image_emb.weight",
    "text_pos_emb.weight": "text_pos_emb.weight",
    "image_pos_emb.weight": "image_pos_emb.weight",  # learned positions: ours only
    "to_logits.0.weight": "norm.weight",
    "to_logits.0.bias": "norm.bias",
}
_AXIAL_NAMES = {"weights_0": "rows", "weights_1": "columns", "weights.0": "rows", "weights.1": "columns"}
_LAYER_NAME = re.compile(r"transformer\.layers\.(?:layers\.)?(\d{1,6})\.([01])\.(?:fn\.)*(.+)")

#: Options of `hparams` about placement and speed, not about what the model computes.
_RUNTIME_OPTIONS = frozenset(
    (
        "embedding_ipu_id",
        "embedding_serialization_factor",
        "layers_per_ipu",
        "cls_ipu_id",
        "fp16",
        "byteio",
        "optimize_for_inference",
    )
)
_HPARAMS = (
    "num_text_tokens",
    "text_seq_len",
    "dim",
    "depth",
    "heads",
    "dim_head",
    "loss_img_weight",
    "attn_types",
    "sandwich_norm",
    "ff_dropout",
    "attn_dropout",
)
"""The model options that Mini DALL-E stores."""

_MODEL_OPTIONS = frozenset(
    (
        *_HPARAMS,
        "stable",
        "shift_tokens",
        "rotary_emb",
        "shared_attn_ids",
        "shared_ff_ids",
        "share_input_output_emb",
    )
)


#: Weight prefixes of the other VAEs that DALLE-pytorch supports.
_OTHER_VAES = {"vae.enc.": "OpenAIDiscreteVAE", "vae.codebook.": "DiscreteVAE"}


def is_dalle_pytorch(weights: Iterable[str]) -> bool:
    """Whether these are the names of DALLE-pytorch or Mini DALL-E."""
    return "to_logits.1.weight" in weights or "model.to_logits.1.weight" in weights


def other_vae(weights: Iterable[str]) -> str | None:
    """The class of DALLE-pytorch's VAE among the weights, unless it is a VQGAN (files before 1.2 do not name it)."""
    found = (kind for name in weights for prefix, kind in _OTHER_VAES.items() if name.startswith(prefix))
    return next(found, None)


def to_mini_dalle(weights: Mapping[str, Tensor]) -> Weights:
    """Rename internal weights to Mini DALL-E's names, with the prefix `model.`. The two heads become one (a copy)."""
    stored = {}
    for name, tensor in weights.items():
        match = re.match(r"transformer\.layers\.(\d+)\.(attention|feed_forward)\.(.+)", name)
        if match:
            layer, branch, rest = match.groups()
            stored[f"transformer.layers.{layer}.{_BRANCHES.index(branch)}.{_stored_rest(branch, rest)}"] = tensor
        elif name == "image_pos_emb.rows":
            stored["image_pos_emb.weights_0"] = tensor[None]
        elif name == "image_pos_emb.columns":
            stored["image_pos_emb.weights_1"] = tensor[None]
        elif not name.startswith(("text_head.", "image_head.")):
            stored[{"norm.weight": "to_logits.0.weight", "norm.bias": "to_logits.0.bias"}.get(name, name)] = tensor
    for kind in ("weight", "bias"):
        if "text_head." + kind in weights:
            stored["to_logits.1." + kind] = torch.cat([weights["text_head." + kind], weights["image_head." + kind]])
    return {"model." + name: tensor for name, tensor in stored.items()}


def _stored_rest(branch: str, rest: str) -> str:
    if rest in _BARE:
        return "fn." + rest if rest.startswith("fn.") else rest
    stem, kind = rest.rsplit(".", 1)
    for stored, internal in _BRANCH_NAMES[_BRANCHES.index(branch)].items():
        if internal == stem:
            return f"{'fn.fn.' if stem.startswith('fn.') else 'fn.'}{stored}.{kind}"
    raise ValueError(f"weight '{branch}.{rest}' has no name in Mini DALL-E's checkpoint layout")


def _rename(weights: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
    """Stored names without `model.` -> (internal names, except `to_logits.1.*`; weights that are not the DALL-E's)."""
    renamed: Weights = {}
    other: Weights = {}
    parts: list[tuple[int, Tensor]] = []
    for name, tensor in weights.items():
        layer = _LAYER_NAME.fullmatch(name)
        part = re.fullmatch(r"text_emb\.split_embeddings\.(\d{1,6})\.weight", name)
        if layer:
            renamed[_internal_name(name, int(layer.group(1)), int(layer.group(2)), layer.group(3))] = tensor
        elif part:
            parts.append((int(part.group(1)), tensor))
        elif name in _OUTSIDE_NAMES:
            renamed[_OUTSIDE_NAMES[name]] = tensor
        elif name.startswith("image_pos_emb.") and name[len("image_pos_emb.") :] in _AXIAL_NAMES:
            if tensor.dim() != 4 or tensor.shape[0] != 1:
                raise UserError(
                    f"weight '{name}' has shape {tuple(tensor.shape)} instead of (1, g, 1, d) or (1, 1, g, d)"
                )
            renamed["image_pos_emb." + _AXIAL_NAMES[name[len("image_pos_emb.") :]]] = tensor[0]
        elif name in ("to_logits.1.weight", "to_logits.1.bias"):
            renamed[name] = tensor
        elif (
            name.startswith("vae.")
            or name in ("transformer.pos_emb", "logits_mask")  # the mask: before 0.10.8
            or re.fullmatch(r"(text|image)_emb\.linear\.(weight|bias)", name)
        ):
            other[name] = tensor
        elif name.startswith("transformer.layers.blocks."):
            raise UserError(f"option 'reversible' (weight {shown(name)}) is not supported: train the model without it")
        else:
            raise UserError(f"weight {shown(name)} belongs to no known layout (Mini DALL-E, DALLE-pytorch, minDALL-E)")
    if parts:
        pieces = [tensor for _, tensor in sorted(parts, key=lambda item: item[0])]
        if any(piece.dim() != 2 or piece.shape[1] != pieces[0].shape[1] for piece in pieces):
            raise UserError("weights 'text_emb.split_embeddings.*' do not have the same width")
        if overlap(pieces):
            raise UserError("weights 'text_emb.split_embeddings.*' share one storage")
        renamed["text_emb.weight"] = torch.cat(pieces)
    return renamed, other


def _internal_name(name: str, layer: int, branch: int, rest: str) -> str:
    stem, _, kind = rest.rpartition(".")
    internal = _BRANCH_NAMES[branch].get(stem or rest)
    if internal is None or (kind not in ("weight", "bias")) != (internal in _BARE):
        raise UserError(f"weight {shown(name)} belongs to no known layout of a layer")
    return f"transformer.layers.{layer}.{_BRANCHES[branch]}.{internal}" + ("." + kind if stem else "")


def from_dalle_pytorch(
    weights: Mapping[str, Tensor],
    hparams: Mapping[str, Any],
    version: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> StoredModel:
    """Read the weights of Mini DALL-E (names start with `model.`) or DALLE-pytorch (they do not).

    `hparams` and `version` are those of the file; `config`, which only our own files have, replaces them.
    Raises UserError for unknown names and for options without counterpart.
    """
    mini = any(name.startswith("model.") for name in weights)
    # The wrapped model of an IPU run may hold weights outside `model.`: these are reported as unknown.
    stripped = {
        name[len("model.") :] if mini and name.startswith("model.") else name: tensor
        for name, tensor in weights.items()
    }
    renamed, other = _rename(stripped)
    if config is not None:
        model = model_config(config, renamed)
    else:
        shift = any(re.match(r"transformer\.layers\.layers\.\d+\.1\.(fn\.){3,}net", name) for name in stripped)
        model = config_from_hparams(hparams, renamed, other, None if mini else version or "0", shift)
    _split_head(renamed, model.text_table_size)
    if model.tie_embeddings:
        for part in ("text", "image"):
            if part + "_head.weight" in renamed:
                renamed.setdefault(part + "_emb.weight", renamed[part + "_head.weight"])
    prefix = "vae.model."
    vqgan = {name[len(prefix) :]: tensor for name, tensor in other.items() if name.startswith(prefix)}
    return StoredModel(model, renamed, vqgan or None)


def _split_head(weights: Weights, text_rows: int) -> None:
    for kind in ("weight", "bias"):
        head = weights.pop("to_logits.1." + kind, None)
        if head is None:
            continue
        if head.dim() == 0 or head.shape[0] <= text_rows:
            raise UserError(
                f"weight 'to_logits.1.{kind}' has shape {tuple(head.shape)}, too few rows for {text_rows} text tokens"
            )
        weights["text_head." + kind], weights["image_head." + kind] = head[:text_rows], head[text_rows:]


def _whole(hparams: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = hparams.get(name, default)
    if value is None or isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"'hparams' needs a whole number of at least 1 as '{name}', not {shown(value)}")
    return value


def _number(hparams: Mapping[str, Any], name: str, default: float) -> float:
    value = hparams.get(name, default)
    if not is_number(value):
        raise UserError(f"'hparams' needs a number of at least 0 as '{name}', not {shown(value)}")
    return float(value)


def _patterns(hparams: Mapping[str, Any], causal_conv: bool) -> list[str]:
    value = hparams.get("attn_types") or ("full",)
    value = value.split(",") if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise UserError(f"option 'attn_types' has the impossible value {shown(value)}")
    patterns = [pattern.strip() for pattern in value]
    for pattern in patterns:
        if pattern not in ("full", "axial_row", "axial_col", "conv_like"):
            hint = {"sparse": ": it needs DeepSpeed's sparse attention", "mlp": ": a gMLP is not attention"}
            why = hint.get(pattern, "")
            raise UserError(f"option 'attn_types' names {shown(pattern)}, which is not supported{why}")
    return ["conv_causal" if pattern == "conv_like" and causal_conv else pattern for pattern in patterns]


def _shared_ids(value: Any, name: str) -> list[int] | None:
    """Number shared layers by first appearance: DALLE-pytorch's trainer stores the ids as strings."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, (int, str)) for item in value):
        raise UserError(f"option '{name}' has the impossible value {shown(value)}")
    seen: dict[Any, int] = {}
    return [seen.setdefault(item, len(seen)) for item in value]


def _is_newer(version: str) -> bool:
    numbers = [int(number) for number in re.findall(r"\d{1,6}", version)[:2]]
    return tuple([*numbers, 0, 0])[:2] >= CAUSAL_CONV_VERSION


def _rows_and_grid(
    renamed: Mapping[str, Tensor], other: Mapping[str, Tensor], text_rows: int, text_len: int
) -> tuple[int, int]:
    """Return (codebook size, side of the code grid) from the weights' shapes; no option holds them."""
    if "to_logits.1.weight" not in renamed or renamed["to_logits.1.weight"].dim() != 2:
        raise UserError("weight 'to_logits.1.weight' is missing or not a matrix")
    codes = renamed["to_logits.1.weight"].shape[0] - text_rows
    if "text_emb.weight" in renamed and 0 < renamed["text_emb.weight"].shape[0] == text_rows - text_len + 1:
        raise UserError(
            "'text_emb.weight' has no rows for pads: DALLE-pytorch before 0.9 masked them, which is not supported; "
            "retrain the model"
        )
    if codes < 1:
        raise UserError(
            f"'to_logits.1.weight' has {codes + text_rows} rows, too few for num_text_tokens + text_seq_len = "
            f"{text_rows}"
        )
    if "image_pos_emb.rows" in renamed:
        return codes, renamed["image_pos_emb.rows"].shape[0]
    if "transformer.pos_emb" in other and other["transformer.pos_emb"].dim() >= 2:
        table = other["transformer.pos_emb"]
        # DALLE-pytorch before 1.1.2 stored (1, 1, n, d), without the last position, which predicts no code.
        positions = table.shape[-2] - text_len + (table.dim() == 4)
        grid = round(max(positions, 0) ** 0.5)
        if grid and grid * grid == positions:
            return codes, grid
    raise UserError(
        "the size of the code grid is unknown: neither 'image_pos_emb.weights_0' nor 'transformer.pos_emb' is stored"
    )


def config_from_hparams(
    hparams: Mapping[str, Any],
    renamed: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    version: str | None,
    shift: bool,
) -> DalleConfig:
    """Convert stored options to a configuration.

    `renamed` and `other` are the weights, whose shapes and names imply some options; `version` is that of DALLE-pytorch
    or None for Mini DALL-E; `shift` is the default of shift_tokens.
    Raises UserError naming an option without counterpart.
    """
    if not isinstance(hparams, Mapping):
        raise UserError("'hparams' is not a table of options")
    for name, value in hparams.items():
        if not isinstance(name, str) or not isinstance(value, (str, int, float, list, tuple, type(None))):
            raise UserError(f"option {shown(name)} has the impossible value {shown(value)}")
        if name in ("reversible", "sparse_attn", "noncausal_attn_len") and value not in (None, False, 0):
            raise UserError(f"option '{name}' is not supported: train the model without it")
        if name not in _MODEL_OPTIONS | _RUNTIME_OPTIONS and value not in (None, False, 0):
            raise UserError(
                f"unknown option {shown(name)} (value {shown(value)}): its effect on the model is unknown"
            )
    text_tokens, text_seq_len = _whole(hparams, "num_text_tokens"), _whole(hparams, "text_seq_len")
    codes, grid = _rows_and_grid(renamed, other, text_tokens + text_seq_len, text_seq_len + 1)
    rotary = bool(hparams.get("rotary_emb", "transformer.pos_emb" in other))
    tied = bool(hparams.get("share_input_output_emb", "text_emb.linear.weight" in other))
    sandwich = "transformer.layers.0.attention.norm_out.weight" in renamed
    return model_config(
        {
            "num_text_tokens": text_tokens,
            "num_image_tokens": codes,
            "text_seq_len": text_seq_len,
            "grid": grid,
            "dim": _whole(hparams, "dim"),
            "depth": _whole(hparams, "depth"),
            "heads": _whole(hparams, "heads", 8),
            "dim_head": _whole(hparams, "dim_head", 64),
            "attn_types": _patterns(hparams, version is not None and _is_newer(version)),
            "loss_img_weight": _number(hparams, "loss_img_weight", 7),
            "attn_dropout": _number(hparams, "attn_dropout", 0),
            "ff_dropout": _number(hparams, "ff_dropout", 0),
            "sandwich_norm": bool(hparams.get("sandwich_norm", sandwich)),
            "layer_scale": "transformer.layers.0.attention.scale" in renamed,
            "rotary": rotary,
            "text_positions": not rotary,
            "image_positions": "none" if rotary else "axial",
            "shift_tokens": bool(hparams.get("shift_tokens", shift)),
            "stable": bool(hparams.get("stable", False)),
            "tie_embeddings": tied,
            "shared_attn_ids": _shared_ids(hparams.get("shared_attn_ids"), "shared_attn_ids"),
            "shared_ff_ids": _shared_ids(hparams.get("shared_ff_ids"), "shared_ff_ids"),
        },
        renamed,
    )


def hparams_from_config(config: DalleConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return Mini DALL-E's `hparams` for a configuration; `extra`: the options about IPUs and precision."""
    hparams = {name: getattr(config, name) for name in _HPARAMS}
    hparams.update(extra)
    return hparams
