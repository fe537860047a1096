"""Reading of untrusted checkpoints: no code in them runs, and nothing is built from unchecked options."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Mapping, MutableMapping, NamedTuple

from checkpoints.deepspeed import AUXILIARY, consolidated_weights, find_auxiliary, refuse_shards
from checkpoints.files import EXPORT_FORMAT, FIRST_EXPORT_FORMAT, kind, read_safetensors, read_torch, verify
from checkpoints.formats import from_dalle_pytorch, is_dalle_pytorch, other_vae
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


class DalleCheckpoint(NamedTuple):
    """A DALL-E read from a file of any layout."""

    path: Path
    """The file it was read from."""
    config: dict[str, Any]
    """All options for `DalleConfig.from_dict`."""
    weights: Weights
    """Parameters under the names of `models.dalle.DalleModel`, on the CPU, in the stored precision."""
    format: str
    """"ours", "mini-dalle", "dalle-pytorch", "mindalle" or "safetensors"."""
    hparams: dict[str, Any]
    """The file's own options, unchanged."""
    epoch: int = 0
    """Complete epochs of training (0 if unknown)."""
    vqgan_weights: Weights | None = None
    """The VQGAN inside the file under taming-transformers' names, if there is one."""
    identity: dict[str, Any] = {}  # noqa: RUF012 - of a NamedTuple, and never changed
    """What the model was trained with, {"tokenizer": {...}, "vqgan": {...}}; empty if unknown."""
    ema: Weights | None = None
    """Averaged weights under the names of `weights`, if the training kept some."""
    opt_state: dict[str, Any] | None = None
    """The optimizer's state; only in our own checkpoints."""
    scheduler_state: dict[str, Any] | None = None
    """The learning-rate schedule's state; only in our own checkpoints."""
    training: dict[str, Any] | None = None
    """What resuming at the next step needs; only in our own checkpoints."""


def read_dalle(path: PathLike, for_sampling: bool = False, verified: bool = False) -> DalleCheckpoint:
    """Read a DALL-E: our own checkpoints and exports, Mini DALL-E, DALLE-pytorch (also the folder of a DeepSpeed run),
    minDALL-E (the folder or its file, or a checkpoint of Lightning).

    for_sampling: the training state is not needed; if there is one, tensors are memory-mapped, so that unused ones take
    no memory, and must not be written to. verified: `verify` has just found the file undamaged.
    Only tensors and plain values are read, never code. Raises UserError naming the file and the key for anything that
    is damaged, unknown, or does not fit its own options, before any memory beyond the file's size is taken.
    """
    path = weights_file(Path(path))
    if not verified:
        verify(path)
    try:
        checkpoint = _from_safetensors(path) if kind(path) == "safetensors" else _from_torch(path, for_sampling)
        own = empty_weights(DalleConfig.from_dict(checkpoint.config))
        if checkpoint.format == "safetensors":  # holds a weight with several names only once
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
    """Return the file of weights in a folder of minDALL-E or of a DeepSpeed run; other paths unchanged.

    Raises UserError for a run without consolidated weights.
    """
    if (path / STAGE2).is_file():
        return path / STAGE2
    return consolidated_weights(path) if (path / AUXILIARY).is_file() else path


def _optional_table(document: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = document.get(name)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"'{name}' is not a table")
    return value


def _epoch(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"'epoch' must be a whole number, not {shown(value)}")
    return value


def _ema(training: Mapping[str, Any] | None) -> Weights | None:
    """The averaged weights in the state of the native engine."""
    engine = _optional_table(training or {}, "engine") or {}
    weights = _optional_table(engine, "ema")
    if weights is not None:
        check_tensors(weights)
    return weights


def _load_torch(path: Path, mapped: bool) -> dict[Any, Any]:
    document = read_torch(path, mapped)
    if not isinstance(document, Mapping):
        raise UserError(f"it is not a checkpoint of a DALL-E: it holds a {type(document).__name__}")
    for name in ("opt_state", "scheduler_state", "training"):
        check_claims(document.get(name))
    return dict(document)


def _from_torch(path: Path, for_sampling: bool) -> DalleCheckpoint:
    document = _load_torch(path, mapped=for_sampling)
    if isinstance(document.get("weights"), str):  # the auxiliary file of a DeepSpeed run
        path = consolidated_weights(path.parent)
        verify(path)
        weights = read_safetensors(path)[1] if kind(path) == "safetensors" else _load_torch(path, mapped=False)
        return _from_document(path, document, weights)
    if for_sampling and document.get("opt_state") is None:  # only weights: read them into memory
        document = _load_torch(path, mapped=False)
    if "weights" in document:
        return _from_document(path, document, document["weights"])
    refuse_shards(document)
    return _from_weights(path, document.pop("state_dict", document))


def _from_document(path: Path, document: Mapping[str, Any], weights: Any) -> DalleCheckpoint:
    """weights: those of `document`, or the consolidated ones of the run if it is an auxiliary file."""
    check_tensors(weights)
    weights = unwrapped(weights)
    hparams, config = _optional_table(document, "hparams"), _optional_table(document, "config")
    if hparams is None and config is None:
        raise UserError("it holds no options of the model: neither 'hparams' nor 'config'")
    version = document.get("version")
    if not isinstance(version, (str, type(None))):
        raise UserError(f"'version' has the impossible value {shown(version)}")
    model = from_dalle_pytorch(weights, hparams or {}, version, config)
    if config is not None:
        form = "ours"
    else:
        form = "mini-dalle" if any(name.startswith("model.") for name in weights) else "dalle-pytorch"
    vae_class = document.get("vae_class_name") or other_vae(weights)
    if isinstance(vae_class, str) and vae_class != "VQGanVAE":
        logger.warning(
            "%s was trained on codes of a %s: a VQGAN cannot decode them to images",
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
    document.clear()  # the caller still holds it: free tensors as soon as they are no longer needed
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
            "it is minDALL-E's class-conditional or unconditional ImageGPT, which reads no text: repeat its transfer "
            "learning from the text-to-image model with examples/transfer_learning_ex.py"
        )
    if not is_dalle_pytorch(weights):
        raise UserError(nothing)
    auxiliary = find_auxiliary(path)
    verify(auxiliary)
    logger.info("%s: using the options of %s", path, auxiliary)
    return _from_document(path, _load_torch(auxiliary, mapped=False), weights)


def _from_safetensors(path: Path) -> DalleCheckpoint:
    metadata, weights = read_safetensors(path)
    is_export = metadata.get("format") in (EXPORT_FORMAT, FIRST_EXPORT_FORMAT)
    if not is_export and is_dalle_pytorch(unwrapped(weights)):
        return _from_weights(path, weights)
    if not is_export or "config" not in metadata:
        raise UserError(
            "it holds no options of a DALL-E; supported safetensors files are those of 'python -m checkpoints export' "
            "and consolidated weights of DALLE-pytorch"
        )
    values: dict[str, Any] = {}
    for name, default in (("config", {}), ("hparams", {}), ("identity", {}), ("epoch", 0)):
        try:
            values[name] = json.loads(metadata.get(name, json.dumps(default)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"its header's '{name}' is not JSON") from error
    return DalleCheckpoint(
        path,
        model_config(values["config"], weights).to_dict(),
        weights,
        "safetensors",
        _optional_table(values, "hparams") or {},
        _epoch(values["epoch"]),
        identity=_optional_table(values, "identity") or {},
    )
