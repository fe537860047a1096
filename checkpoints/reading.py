"""Reading checkpoints that come from anywhere: nothing in them is run, nothing is built unchecked."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from pathlib import Path
from typing import Any, Mapping, MutableMapping, NamedTuple

import torch
from torch import Tensor

from checkpoints.formats import from_published
from checkpoints.mindalle import from_mindalle, is_mindalle
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
from utils.files import PathLike, open_regular
from utils.untrusted import ZIP_MAGIC, shown, verify_zip

logger = logging.getLogger(__name__)

SAFETENSORS_FORMAT = "mini-dalle"
_CAN_MAP = "mmap" in inspect.signature(torch.load).parameters  # from PyTorch 2.1 on


class DalleCheckpoint(NamedTuple):
    """A DALL-E read from a file, whatever its layout."""

    path: Path
    """The file it was read from."""
    config: dict[str, Any]
    """Options for `DalleConfig.from_dict`, every one of them."""
    weights: Weights
    """Parameters under the names of `models.dalle.DALLE`, on the CPU, in the stored precision."""
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


# ---- checking


def verify(path: PathLike) -> None:
    """Check that a checkpoint file is complete and undamaged. Raises UserError naming it when not.

    For a torch file every entry's CRC is compared, for safetensors the header with the size, and the content with the
    sha256 that our own exports carry.
    """
    path = Path(path)
    (verify_zip if _kind(path) == "torch" else _verify_safetensors)(path)


def _kind(path: Path) -> str:
    """Return "torch" or "safetensors", as a file begins. Raises UserError for what is neither."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if start[:4] == ZIP_MAGIC:
        return "torch"
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    raise UserError(
        f"{path} is no checkpoint: neither written by torch.save (1.6 or newer) nor a safetensors file"
        + ("" if start else "; it is empty")
    )


def _verify_safetensors(path: Path) -> None:
    metadata, tensors = _read_safetensors(path)
    if "sha256" in metadata and metadata["sha256"] != tensors_digest(tensors):
        raise UserError(f"checkpoint {path} is damaged (sha256 of its weights); use another one, or copy it again")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and contents, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode("utf-8") + b"\0")
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- reading


def _load_torch(path: Path, mapped: bool) -> dict[str, Any]:
    # PyTorch maps files by their name, which need not be text.
    is_text = not any("\ud800" <= character <= "\udfff" for character in str(path))
    options = {"mmap": True} if mapped and _CAN_MAP and is_text else {}
    try:
        document = torch.load(str(path), map_location="cpu", weights_only=True, **options)
    except Exception as error:  # whatever a stranger's pickle makes the restricted unpickler raise; none of it ran
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{path} holds more than tensors and plain values and was not opened ({type(error).__name__}: {reason}); "
            "keep only its weights and options, saved with torch.save"
        ) from error
    if not isinstance(document, Mapping):
        raise UserError(f"{path} is no checkpoint of a DALL-E: it holds a {type(document).__name__}")
    for part in ("opt_state", "scheduler_state", "training"):
        check_claims(document.get(part))
    return dict(document)


def _read_safetensors(path: Path) -> tuple[dict[str, str], Weights]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path} is damaged or incomplete ({error}); use another one, or copy it again"
        ) from error


def read_dalle(path: PathLike, to_draw: bool = False, verified: bool = False) -> DalleCheckpoint:
    """Read a DALL-E: our own checkpoints and exports, Mini DALL-E, DALLE-pytorch, minDALL-E (the folder or its file).

    to_draw: nobody will look at the training state, so where there is one the tensors are views of the file, and what
    is not looked at takes no memory. They must not be written to. verified: `verify` has just found the file undamaged.
    Only tensors and plain values are read, never code. Raises UserError naming the file and the key for anything that
    is damaged, unknown, or does not fit its own options, before any memory beyond the file's size is taken.
    """
    path = Path(path)
    if path.is_dir() and (path / "stage2_last.ckpt").is_file():
        path = path / "stage2_last.ckpt"
    if not verified:
        verify(path)
    try:
        checkpoint = _from_safetensors(path) if _kind(path) == "safetensors" else _from_torch(path, to_draw)
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


def _from_torch(path: Path, to_draw: bool) -> DalleCheckpoint:
    document = _load_torch(path, mapped=to_draw)
    if to_draw and document.get("opt_state") is None:  # weights alone, which are better off in memory of their own
        document = _load_torch(path, mapped=False)
    if "weights" not in document:
        return _from_mindalle(path, document.pop("state_dict", document))
    if isinstance(document["weights"], str):  # left by DeepSpeed runs of DALLE-pytorch beside the real weights
        raise UserError("it holds no weights, only a note of a DeepSpeed run; consolidate that run's checkpoint first")
    check_tensors(document["weights"])
    hparams, config = _optional_table(document, "hparams"), _optional_table(document, "config")
    if hparams is None and config is None:
        raise UserError("neither 'hparams' nor 'config' is there to tell the model's options")
    version = document.get("version")
    if not isinstance(version, (str, type(None))):
        raise UserError(f"'version' has the impossible value {shown(version)}")
    model = from_published(document["weights"], hparams or {}, version, config)
    if config is not None:
        kind = "ours"
    else:
        kind = "mini-dalle" if any(name.startswith("model.") for name in document["weights"]) else "dalle-pytorch"
    vae_class = document.get("vae_class_name")
    if isinstance(vae_class, str) and vae_class != "VQGanVAE":
        logger.warning(
            "%s was trained on codes of a %s: this application's VQGAN cannot turn its codes into pictures",
            path,
            shown(vae_class),
        )
    training = _optional_table(document, "training") if kind == "ours" else None
    vqgan = {name: tensor for name, tensor in (model.vqgan or {}).items() if not name.startswith("loss.")}
    return DalleCheckpoint(
        path,
        model.config.to_dict(),
        model.weights,
        kind,
        hparams or {},
        _epoch(document.get("epoch")),
        vqgan or None,
        {name: value for name, value in (training or {}).items() if name in ("tokenizer", "vqgan")},
        _ema(training),
        _optional_table(document, "opt_state") if kind == "ours" else None,
        _optional_table(document, "scheduler_state") if kind == "ours" else None,
        training,
    )


def _from_mindalle(path: Path, weights: Any) -> DalleCheckpoint:
    if not isinstance(weights, MutableMapping) or not is_mindalle(weights):
        raise UserError(
            "it holds neither 'weights' (Mini DALL-E, DALLE-pytorch) nor the weights of a minDALL-E stage 2"
        )
    check_tensors(weights)
    options: Any = {}
    config_path = path.parent / "config.yaml"
    if config_path.is_file():
        from utils.yaml_files import MAX_BYTES, parse_yaml

        try:
            with open_regular(config_path) as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise UserError(f"{config_path} cannot be read: {error.strerror or error}") from error
        options = parse_yaml(content, f"{config_path} cannot be read")
        if not isinstance(options, Mapping):
            raise UserError(f"{config_path} is no minDALL-E configuration")
    model = from_mindalle(weights, options)
    return DalleCheckpoint(path, model.config.to_dict(), model.weights, "mindalle", dict(options))


def _from_safetensors(path: Path) -> DalleCheckpoint:
    metadata, weights = _read_safetensors(path)
    if metadata.get("format") != SAFETENSORS_FORMAT or "config" not in metadata:
        raise UserError(
            "it carries no options of a DALL-E; only files made by 'python -m checkpoints export' can be read"
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
