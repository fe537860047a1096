"""Export or verify a checkpoint from the command line.

python -m checkpoints export dalle_20.pt model.safetensors --half
python -m checkpoints verify dalle_20.pt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Sequence

import torch

from checkpoints.files import verify
from checkpoints.reading import read_dalle
from checkpoints.writing import export_safetensors
from utils import flags
from utils.errors import run_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Export or verify a checkpoint from the command line."""
    parser = flags.Parser(prog="python -m checkpoints", description="Export or verify a DALL-E checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write weights and options, without the training state, as safetensors")
    export.add_argument(
        "checkpoint", type=flags.path, help="any checkpoint that can be read (.pt, .ckpt, .safetensors)"
    )
    export.add_argument("out", type=flags.path, help="file to write (.safetensors)")
    export.add_argument("--half", action="store_true", help="store in half precision")
    export.add_argument(
        "--no-ema", action="store_true", help="take the plain weights even where averaged ones are stored"
    )
    check = commands.add_parser("verify", help="check that a file is complete and undamaged")
    check.add_argument("checkpoint", type=flags.path)
    options = parser.parse_args(arguments)
    if options.command == "verify":
        verify(options.checkpoint)
        sys.stdout.write(f"{options.checkpoint} is complete\n")
        return
    checkpoint = read_dalle(options.checkpoint)
    export_safetensors(checkpoint, options.out, torch.float16 if options.half else None, ema=not options.no_ema)
    sys.stdout.write(f"wrote {options.out} ({Path(options.out).stat().st_size / 1e6:.1f} MB)\n")


if __name__ == "__main__":
    run_main(main)
