"""Stage 1: train or fine-tune a VQGAN on a folder of images or on the built-in demo set.

    python train_vqgan.py --input-folder demo --minutes 10 --output output/vqgan
    python train_vqgan.py --input-folder demo --minutes 10 --output output/vqgan --resume    # continue
    python train_vqgan.py --input-folder DIR --vqgan-model-path W.ckpt --vqgan-config-path C.yaml \\
        --learning-rate 1e-4 --steps 10000 --output output/vqgan

Writes into --output: vqgan.safetensors and vqgan.yaml (for --vqgan-model-path and --vqgan-config-path),
metrics.jsonl, reconstructions.png (held-out images, each beside its reconstruction) and training.pt (for --resume).
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it says what stops the imports below

# isort: split
from pathlib import Path

import log
from training.vqgan import train
from training.vqgan_options import COMMAND
from utils.errors import run_main
from utils.interrupts import Interruption
from utils.locks import only_writer


def main() -> int:
    """Run training from the command line. Returns the exit status."""
    args = COMMAND.parse()
    log.setup()
    with Interruption() as interruption, only_writer(("--output", Path(args.output))):
        train(args, interruption)
        return interruption.status


if __name__ == "__main__":
    run_main(main)
