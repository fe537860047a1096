"""Write a model in minDALL-E's layout, which minDALL-E's code and this project read.

    python -m dalle.export output/minDALLE_1.3B/ckpt/dalle_7.pt exported      # from a checkpoint
    python train.py --config minDALLE_tiny --export-mindalle exported         # at the end of training

The folder holds config.yaml, stage1_last.ckpt (VQGAN), stage2_last.ckpt (transformer) and tokenizer/. Reading it back
is bit-exact.
"""
from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
import yaml
from torch import Tensor

from bpe import Tokenizer
from bpe.char_bpe import CharBpeTokenizer
from checkpoints.mindalle import mindalle_options, to_mindalle
from dalle.loading import load
from dalle.published import STAGE1, STAGE2, TOKENIZER
from models.config import DalleConfig
from models.vqgan import VQGAN
from models.vqgan_config import VqganConfig, stage1_options
from utils.errors import UserError, run_main
from utils.files import PathLike, atomic_write, make_folder
from utils.flags import PartsOptions
from utils.options import REQUIRED, Command, option

logger = logging.getLogger(__name__)


def export_options(config: DalleConfig, vqgan: VqganConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of config.yaml. Raises UserError for options that the layout cannot express."""
    if not isinstance(tokenizer, CharBpeTokenizer):
        raise UserError(
            "minDALL-E's layout needs a character BPE vocabulary, not one of type {}: train with such a folder as "
            "--bpe-path (python -m bpe.train --kind char learns one)".format(tokenizer.identity["type"])
        )
    stage2 = mindalle_options(config)
    return {
        "dataset": {"context_length": config.text_seq_len},
        "stage1": stage1_options(vqgan),
        "stage2": stage2,
    }


def check_empty(folder: PathLike, flag: str) -> None:
    """Raise UserError unless the folder is empty or can be made: no model is overwritten."""
    if any(make_folder(flag, folder).iterdir()):
        raise UserError(f"{flag} {folder}: the folder is not empty; give a new one")


def export_mindalle(
    folder: PathLike, config: DalleConfig, weights: Mapping[str, Tensor], vqgan: VQGAN, tokenizer: Tokenizer
) -> None:
    """Write a model to a folder. weights: `DalleModel.state_dict()`, in the precision to store.

    Raises UserError for options that the layout cannot express, and when a file cannot be written.
    """
    options = export_options(config, vqgan.config, tokenizer)
    folder = Path(folder)
    if (vqgan.config.num_groups, vqgan.config.patch_size) != (32, 1):
        logger.warning("%s: minDALL-E's code does not support the VQGAN's num_groups and patch_size", folder)
    stage1 = {name: tensor.detach().cpu().contiguous() for name, tensor in vqgan.state_dict().items()}
    stage2 = to_mindalle({name: tensor.detach().cpu() for name, tensor in weights.items()})
    try:
        assert isinstance(tokenizer, CharBpeTokenizer)  # checked by export_options
        tokenizer.save(folder / TOKENIZER)
        with atomic_write(folder / "config.yaml") as file:
            yaml.safe_dump(options, file, sort_keys=False)
        for name, state in ((STAGE1, stage1), (STAGE2, stage2)):
            with atomic_write(folder / name, "wb") as file:
                torch.save({"state_dict": state}, file)
    except (OSError, RuntimeError) as error:  # torch.save wraps an OSError in a RuntimeError
        raise UserError("{} cannot be written: {}".format(folder, str(error).split("\n")[0])) from error


@dataclass(frozen=True)
class ExportOptions(PartsOptions):
    """The options of this command."""

    checkpoint: str = option(REQUIRED, "any checkpoint of minDALL-E's architecture", path=True, positional=True,
                             metavar="CHECKPOINT")
    folder: str = option(REQUIRED, "new folder to write", path=True, positional=True, metavar="FOLDER")


COMMAND = Command("python -m dalle.export", "Write a model in minDALL-E's layout.", ExportOptions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export a checkpoint from the command line."""
    options = COMMAND.parse(arguments)
    check_empty(options.folder, "FOLDER")
    loaded = load(options.checkpoint, options.bpe_path, options.vqgan_model_path, options.vqgan_config_path)
    export_mindalle(options.folder, loaded.config, loaded.dalle.state_dict(), loaded.vqgan, loaded.tokenizer)
    sys.stdout.write(f"wrote {options.folder}\n")


if __name__ == "__main__":
    run_main(main)
