"""Checkpoints of a DALL-E: formats, reading, writing, and limits for untrusted files."""
from __future__ import annotations

from checkpoints.files import verify
from checkpoints.reading import DalleCheckpoint, read_dalle
from checkpoints.writing import (
    checkpoint_name,
    dalle_checkpoint,
    export_safetensors,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

__all__ = [
    "DalleCheckpoint",
    "checkpoint_name",
    "dalle_checkpoint",
    "export_safetensors",
    "list_checkpoints",
    "newest_checkpoint",
    "prune_checkpoints",
    "read_dalle",
    "save_checkpoint",
    "verify",
]
