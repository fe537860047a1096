"""Reading of weight files: only tensors and plain values; code in them never runs, and is named in the error."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor

from checkpoints.trust import Weights
from utils.errors import UserError
from utils.files import PathLike
from utils.untrusted import ZIP_MAGIC, verify_zip

#: "format" in the metadata of our exports. Those of the first format have no digest, or one of their tensors alone.
EXPORT_FORMAT = "mini-dalle/2"
FIRST_EXPORT_FORMAT = "mini-dalle"

_CAN_MAP = "mmap" in inspect.signature(torch.load).parameters  # from PyTorch 2.1 on

#: Classes that old Lightning checkpoints name as keys of their "callbacks".
_LIGHTNING_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)
_REFUSED = re.compile(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]*\w)")
_TERMINAL = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x1f\x7f]")


def kind(path: Path) -> str:
    """Return "torch", "legacy" (torch before 1.6, without checksums) or "safetensors", from the first bytes of a file.

    Raises UserError for other files.
    """
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
    if start[:1] == b"\x80":
        return "legacy"
    raise UserError(
        f"{path} is no checkpoint: neither written by torch.save nor a safetensors file"
        + ("" if start else "; it is empty")
    )


def verify(path: PathLike) -> None:
    """Check that a checkpoint file is complete and undamaged. Raises UserError naming it otherwise.

    Checks the CRC of every entry of a torch file; for safetensors, header and size, and the sha256 of our own exports.
    """
    path = Path(path)
    form = kind(path)
    if form == "torch":
        verify_zip(path)
    elif form == "legacy":
        raise UserError(
            f"{path} is no checkpoint that can be verified: it has the format of torch.save before 1.6; load it and "
            "save it again with torch.save"
        )
    else:
        metadata, tensors = read_safetensors(path)
        # One flipped bit cannot hide both the format and the digest.
        is_claimed = "sha256" in metadata or metadata.get("format") == EXPORT_FORMAT
        if is_claimed and metadata.get("sha256") != export_digest(metadata, tensors):
            raise UserError(f"checkpoint {path} is damaged (sha256 of its content); use another one, or copy it again")


def export_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over all metadata but the digest itself, and over names, types, shapes and contents of the tensors.

    In the first format over names and contents of the tensors alone.
    """
    digest = hashlib.sha256()
    if metadata.get("format") != FIRST_EXPORT_FORMAT:
        options = {key: value for key, value in metadata.items() if key != "sha256"}
        layout = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        digest.update(json.dumps([options, layout], sort_keys=True).encode("ascii"))
    for name in sorted(tensors):
        digest.update(name.encode("utf-8") + b"\0")
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_torch(path: Path, mapped: bool = False) -> Any:
    """Return what torch.save wrote, on the CPU. mapped: tensors are memory-mapped, and must not be written to.

    Raises UserError naming the class or function that the file needs besides tensors and plain values.
    """
    # PyTorch maps files by name, and can only do so if the name is valid text.
    is_text = not any("\ud800" <= character <= "\udfff" for character in str(path))
    options = {"mmap": True} if mapped and _CAN_MAP and is_text else {}
    try:
        with _placeholders_allowed():
            return torch.load(str(path), map_location="cpu", weights_only=True, **options)
    except Exception as error:  # the restricted unpickler may raise anything on an untrusted pickle, but runs no code
        # PyTorch's message is long, coloured, and advises to trust the file.
        text = _TERMINAL.sub(" ", str(error))
        refused = _REFUSED.search(text)
        if refused:
            raise UserError(
                f"{path} holds more than tensors and plain values ({refused.group(1)[:120]}) and was not opened; save "
                "its weights and options without that where the file was made"
            ) from error
        reason = " ".join(text.split("WeightsUnpickler error:")[-1].split())[:200]
        raise UserError(f"{path} cannot be read as weights ({type(error).__name__}: {reason})") from error


@contextlib.contextmanager
def _placeholders_allowed() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` accept Lightning's class names, as empty classes without its code."""
    placeholders: list[Any] = []
    for name in _LIGHTNING_CLASSES:
        module, _, qualname = name.rpartition(".")
        placeholders.append(type(qualname, (), {"__module__": module, "__qualname__": qualname}))
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(placeholders):
            yield
        return
    # Before PyTorch 2.5 the allow-list is a cached dictionary.
    from torch import _weights_only_unpickler

    allowed = _weights_only_unpickler._get_allowed_globals()
    try:
        allowed.update(zip(_LIGHTNING_CLASSES, placeholders))
        yield
    finally:
        for name in _LIGHTNING_CLASSES:
            allowed.pop(name, None)


def read_safetensors(path: Path) -> tuple[dict[str, str], Weights]:
    """Return (metadata, tensors). Raises UserError naming a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {path} is damaged or incomplete ({error}); use another one, or copy it again"
        ) from error
