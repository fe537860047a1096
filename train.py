"""Train a DALL-E on pairs of image and caption.

    python train.py --config demo                                   # the built-in images, a quarter of an hour
    python train.py --config L16 --input-folder data/COCO           # Mini DALL-E's model on COCO
    torchrun --nproc-per-node 8 train.py --config L16_POD16 --input-folder data/COCO
    python train.py --config L16 --input-folder data/COCO --resume  # continue at the next sample

The loop is independent of the device: engines/ handles that.
"""
from __future__ import annotations

import utils.start

# isort: split
import args
from utils.errors import run_main


def main() -> int:
    """Run training from the command line. Returns the exit status."""
    config = args.parse()
    with utils.start.imports():  # after the flags: --help and mistakes in flags need no PyTorch
        from training.command import run

    return run(config)


if __name__ == "__main__":
    run_main(main)
