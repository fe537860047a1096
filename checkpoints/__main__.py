"""Export or verify a checkpoint from the command line.

python -m checkpoints export dalle_20.pt model.safetensors --half
python -m checkpoints verify dalle_20.pt
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import torch

from checkpoints.files import verify
from checkpoints.reading import read_dalle
from checkpoints.writing import export_safetensors
from utils.errors import UsageError, run_main
from utils.files import check_writable
from utils.options import REQUIRED, Command, Options, again, choose, option


@dataclass(frozen=True)
class VerifyOptions(Options):
    """The options of `verify`."""

    checkpoint: str = option(REQUIRED, "file to check", path=True, positional=True, metavar="CHECKPOINT")


@dataclass(frozen=True)
class ExportOptions(Options):
    """The options of `export`."""

    checkpoint: str = again(VerifyOptions, "checkpoint", help="any supported checkpoint (.pt, .ckpt, .safetensors)")
    out: str = option(REQUIRED, "file to write (.safetensors)", path=True, positional=True, metavar="OUT")
    half: bool = option(False, "store in half precision")
    no_ema: bool = option(False, "take the plain weights even if averaged ones are stored")


NAME = "python -m checkpoints"
EXPORT = Command(f"{NAME} export", "Write weights and options, without training state, as safetensors.", ExportOptions)
VERIFY = Command(f"{NAME} verify", "Check that a file is complete and undamaged.", VerifyOptions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export or verify a checkpoint from the command line."""
    command, words = choose(NAME, {"export": EXPORT, "verify": VERIFY}, arguments)
    if command == "verify":
        checked = VERIFY.parse(words)
        verify(checked.checkpoint)
        sys.stdout.write(f"{checked.checkpoint} is complete\n")
        return
    options = EXPORT.parse(words)
    if os.path.realpath(options.out) == os.path.realpath(options.checkpoint):
        raise UsageError(f"OUT {options.out}: would replace the checkpoint and its training state; give another file")
    check_writable("OUT", options.out)
    checkpoint = read_dalle(options.checkpoint)
    export_safetensors(checkpoint, options.out, torch.float16 if options.half else None, ema=not options.no_ema)
    sys.stdout.write(f"wrote {options.out} ({Path(options.out).stat().st_size / 1e6:.1f} MB)\n")


if __name__ == "__main__":
    run_main(main)
