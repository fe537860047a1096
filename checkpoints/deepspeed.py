"""DeepSpeed runs of DALLE-pytorch: an auxiliary file holds the options, and the weights must be consolidated.

dalle-ds-cp/auxiliary.pt               {"hparams": {...}, "version": ..., "weights": a sentence}
dalle-ds-cp/global_step*/*.pt          shards of weights and optimizer, one for each process
dalle-ds-cp/zero_to_fp32.py            written by DeepSpeed; consolidates the shards to:
dalle-ds-cp/pytorch_model.bin          plain tensors, read together with the auxiliary file
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from utils.errors import UserError

AUXILIARY = "auxiliary.pt"
_CONSOLIDATED = ("pytorch_model.bin", "model.safetensors")
_WAY_OUT = "`python zero_to_fp32.py . pytorch_model.bin` in the folder that holds zero_to_fp32.py writes them"


def consolidated_weights(folder: Path) -> Path:
    """Return the file of consolidated weights in a run's folder. Raises UserError that says how to make it."""
    for name in _CONSOLIDATED:
        path = folder / name
        path = path / name if path.is_dir() else path  # newer versions of zero_to_fp32.py write a folder
        if path.is_file():
            return path
        if path.with_name(path.name + ".index.json").is_file():
            raise UserError(f"{path.parent} holds several files; zero_to_fp32.py --max_shard_size 1TB writes one")
    raise UserError(f"{folder} lacks the run's weights, consolidated by DeepSpeed ({_CONSOLIDATED[0]}): {_WAY_OUT}")


def find_auxiliary(weights: Path) -> Path:
    """Return the auxiliary file of consolidated weights. Raises UserError if there is none, or several."""
    folders = [weights.with_name(f"{weights.stem}-ds-cp"), weights.parent, weights.parent.parent]
    places = [folder / AUXILIARY for folder in folders]
    found = [place for place in places if place.is_file()] or sorted(weights.parent.glob(f"*-ds-cp/{AUXILIARY}"))
    if not found or (len(found) > 1 and found[0] not in places):
        raise UserError(
            f"it holds weights under DALLE-pytorch's names without their options: put the {AUXILIARY} of the run's "
            "folder (...-ds-cp) beside it" + (f"; there are several, such as {found[0]}" if found else "")
        )
    return found[0]


def refuse_shards(document: Mapping[Any, Any]) -> None:
    """Raise UserError for a shard of a DeepSpeed run."""
    if "ds_version" in document or ("module" in document and "state_dict" not in document):
        raise UserError(f"it is one process's shard of a DeepSpeed run; its weights must be consolidated: {_WAY_OUT}")
