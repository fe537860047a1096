"""Reading checkpoints that come from anywhere: nothing in them is run, nothing is built unchecked."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Mapping, MutableMapping, NamedTuple

from checkpoints.deepspeed import NOTE, consolidated_weights, note_beside, refuse_parts
from checkpoints.files import kind, read_safetensors, read_torch, verify
from checkpoints.formats import from_published, is_published, other_vae
from checkpoints.mindalle import STAGE2, from_mindalle, is_mindalle
from checkpoints.names import averaged, part, unwrapped
from checkpoints.trust import (
    Weights,
    aliases,
    check_claims,
    check_model,
    check_state,
    check_tensors,
    empty_weights,
    model_config,
)
from models.config import DalleConfig
from utils.errors import UserError
from utils.files import PathLike
from utils.untrusted import shown
from utils.yaml_files import read_yaml

logger = logging.getLogger(__name__)

SAFETENSORS_FORMAT = "mini-dalle"


class DalleCheckpoint(NamedTuple):
    """A DALL-E read from a file, whatever its layout."""

    path: Path
    """The file it was read from."""
    config: dict[str, Any]
    """Options for `DalleConfig.from_dict`, every one of them."""
    weights: Weights
    """Parameters under the names of `models.dalle.DalleModel`, on the CPU, in the stored precision."""
    format: str
    """"ours", "mini-dalle", "dalle-pytorch", "mindalle" or "safetensors"."""
    hparams: dict[str, Any]
    """The file's own options, as they are."""
    epoch: int = 0
    """Complete epochs of training (0 where the file does not say)."""
    vqgan_weights: Weights | None = None
    """The VQGAN inside the file under taming-transformers' names, if there is one."""
    identity: dict[str, Any] = {}  # noqa: RUF012 - of a NamedTuple, and nobody changes it
    """What the model was trained with, {"tokenizer": {...}, "vqgan": {...}}; empty where the file does not say."""
    ema: Weights | None = None
    """Averaged weights under the names of `weights`, where the training kept some."""
    opt_state: dict[str, Any] | None = None
    """The optimizer's state; only in our own checkpoints."""
    scheduler_state: dict[str, Any] | None = None
    """The learning-rate schedule's state; only in our own checkpoints."""
    training: dict[str, Any] | None = None
    """What the engine needs to go on at the next step; only in our own checkpoints."""


def read_dalle(path: PathLike, to_draw: bool = False, verified: bool = False) -> DalleCheckpoint:
    """Read a DALL-E: our own checkpoints and exports, Mini DALL-E, DALLE-pytorch (also the folder of a DeepSpeed run),
    minDALL-E (the folder or its file, or a checkpoint of Lightning).

    to_draw: nobody will look at the training state, so where there is one the tensors are views of the file, and what
    is not looked at takes no memory. They must not be written to. verified: `verify` has just found the file undamaged.
    Only tensors and plain values are read, never code. Raises UserError naming the file and the key for anything that
    is damaged, unknown, or does not fit its own options, before any memory beyond the file's size is taken.
    """
    path = weights_file(Path(path))
    if not verified:
        verify(path)
    try:
        checkpoint = _from_safetensors(path) if kind(path) == "safetensors" else _from_torch(path, to_draw)
        own = empty_weights(DalleConfig.from_dict(checkpoint.config))
        if checkpoint.format == "safetensors":  # holds a weight once that has several names
            for name, source in aliases(own).items():
                if source in checkpoint.weights:
                    checkpoint.weights.setdefault(name, checkpoint.weights[source])
        check_model(own, checkpoint.weights, path)
        if checkpoint.ema is not None:
            check_state(own, checkpoint.ema, path)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    return checkpoint


def weights_file(path: Path) -> Path:
    """Return the file of weights in a folder that is a model of minDALL-E or a DeepSpeed run; other paths as they are.

    Raises UserError for a run whose weights were not consolidated.
    """
    if (path / STAGE2).is_file():
        return path / STAGE2
    return consolidated_weights(path) if (path / NOTE).is_file() else path


def _optional_table(document: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = document.get(name)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"'{name}' is no table")
    return value


def _epoch(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"'epoch' must be a whole number, not {shown(value)}")
    return value


def _ema(training: Mapping[str, Any] | None) -> Weights | None:
    """The averaged weights that the native engine keeps in its state."""
    engine = _optional_table(training or {}, "engine") or {}
    weights = _optional_table(engine, "ema")
    if weights is not None:
        check_tensors(weights)
    return weights


def _load_torch(path: Path, mapped: bool) -> dict[Any, Any]:
    document = read_torch(path, mapped)
    if not isinstance(document, Mapping):
        raise UserError(f"it is no checkpoint of a DALL-E: it holds a {type(document).__name__}")
    for name in ("opt_state", "scheduler_state", "training"):
        check_claims(document.get(name))
    return dict(document)


def _from_torch(path: Path, to_draw: bool) -> DalleCheckpoint:
    document = _load_torch(path, mapped=to_draw)
    if isinstance(document.get("weights"), str):  # DALLE-pytorch's note beside the parts of a DeepSpeed run
        path = consolidated_weights(path.parent)
        verify(path)
        weights = read_safetensors(path)[1] if kind(path) == "safetensors" else _load_torch(path, mapped=False)
        return _from_published(path, document, weights)
    if to_draw and document.get("opt_state") is None:  # weights alone, which are better off in memory of their own
        document = _load_torch(path, mapped=False)
    if "weights" in document:
        return _from_published(path, document, document["weights"])
    refuse_parts(document)
    return _from_weights(path, document.pop("state_dict", document))


def _from_published(path: Path, document: Mapping[str, Any], weights: Any) -> DalleCheckpoint:
    """weights: those of `document`, or the consolidated ones of the run whose note it is."""
    check_tensors(weights)
    weights = unwrapped(weights)
    hparams, config = _optional_table(document, "hparams"), _optional_table(document, "config")
    if hparams is None and config is None:
        raise UserError("neither 'hparams' nor 'config' is there to tell the model's options")
    version = document.get("version")
    if not isinstance(version, (str, type(None))):
        raise UserError(f"'version' has the impossible value {shown(version)}")
    model = from_published(weights, hparams or {}, version, config)
    if config is not None:
        form = "ours"
    else:
        form = "mini-dalle" if any(name.startswith("model.") for name in weights) else "dalle-pytorch"
    vae_class = document.get("vae_class_name") or other_vae(weights)
    if isinstance(vae_class, str) and vae_class != "VQGanVAE":
        logger.warning(
            "%s was trained on codes of a %s: this application's VQGAN cannot turn its codes into pictures",
            path,
            shown(vae_class),
        )
    training = _optional_table(document, "training") if form == "ours" else None
    vqgan = {name: tensor for name, tensor in (model.vqgan or {}).items() if not name.startswith("loss.")}
    return DalleCheckpoint(
        path,
        model.config.to_dict(),
        model.weights,
        form,
        hparams or {},
        _epoch(document.get("epoch")),
        vqgan or None,
        {name: value for name, value in (training or {}).items() if name in ("tokenizer", "vqgan")},
        _ema(training),
        _optional_table(document, "opt_state") if form == "ours" else None,
        _optional_table(document, "scheduler_state") if form == "ours" else None,
        training,
    )


def _from_weights(path: Path, document: Any) -> DalleCheckpoint:
    """Read weights without options in the same file: minDALL-E's, or DALLE-pytorch's consolidated ones."""
    nothing = "it holds neither 'weights' (Mini DALL-E, DALLE-pytorch) nor the weights of a minDALL-E stage 2"
    if not isinstance(document, MutableMapping) or not all(isinstance(name, str) for name in document):
        raise UserError(nothing)
    every = unwrapped(document)
    document.clear()  # whoever called holds it, and no tensor is to be held longer than it is needed
    stage1, stage2 = part(every, "stage1."), part(every, "stage2.")  # of minDALL-E's Lightning module
    weights = stage2 or every
    if is_mindalle(weights):
        check_tensors(every)
        config_path = path.parent / "config.yaml"
        options = read_yaml(config_path) if config_path.is_file() else {}
        weights, vqgan = averaged(weights, path), averaged(stage1, path)
        every.clear()
        stage2.clear()
        model = from_mindalle(weights, options)
        config = model.config.to_dict()
        return DalleCheckpoint(path, config, model.weights, "mindalle", options, vqgan_weights=vqgan or None)
    if "sos" in weights or "sos.weight" in weights:
        raise UserError(
            "it is minDALL-E's model of images alone (ImageGPT), which no text reaches: transfer it anew with "
            "examples/transfer_learning_ex.py, from the text-to-image model"
        )
    if not is_published(weights):
        raise UserError(nothing)
    note = note_beside(path)
    verify(note)
    logger.info("%s: its options are those of %s", path, note)
    return _from_published(path, _load_torch(note, mapped=False), weights)


def _from_safetensors(path: Path) -> DalleCheckpoint:
    metadata, weights = read_safetensors(path)
    if metadata.get("format") != SAFETENSORS_FORMAT and is_published(unwrapped(weights)):
        return _from_weights(path, weights)
    if metadata.get("format") != SAFETENSORS_FORMAT or "config" not in metadata:
        raise UserError(
            "it carries no options of a DALL-E; of safetensors, files made by 'python -m checkpoints export' can be "
            "read, and consolidated weights of DALLE-pytorch"
        )
    values: dict[str, Any] = {}
    for name, default in (("config", {}), ("hparams", {}), ("identity", {}), ("epoch", 0)):
        try:
            values[name] = json.loads(metadata.get(name, json.dumps(default)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"its header's '{name}' is no JSON") from error
    return DalleCheckpoint(
        path,
        model_config(values["config"], weights).to_dict(),
        weights,
        "safetensors",
        _optional_table(values, "hparams") or {},
        _epoch(values["epoch"]),
        identity=_optional_table(values, "identity") or {},
    )
