"""Measure a trained model: its loss on pairs of image and caption, and how well its demo pictures can be told apart.

    python evaluate.py --dalle-path demo                         # the shipped model on the held-out demo pictures
    python evaluate.py --dalle-path output/ckpt/dalle_799.pt --input-folder data/COCO/val2017 --json result.json

Validation loss: nats for a token, text and image part, and bits for a code (a random one costs log2(codebook)).
Retrieval@1, on the demo set: the model samples one image from each held-out caption and from 200 training captions; it
counts when the nearest of all pictures of the set by pixel distance is the caption's own. No model can do better than
the VQGAN that decodes its codes, so the same number for reconstructions of the true pictures stands beside it.
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it says what stops the imports below

# isort: split
import json
import sys
from typing import Sequence

import log
from dalle.evaluation import COMMAND, evaluate, finite, report
from dalle.loading import load
from dalle.pictures import make_sheet, save_picture
from engines.native import pick_device
from utils.errors import run_main
from utils.files import atomic_write, check_writable, writing


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says."""
    options = COMMAND.parse(argv)
    log.setup()
    for flag, file in (("--json", options.json), ("--sheet", options.sheet)):
        if file is not None:
            check_writable(flag, file)
    parts = (options.bpe_path, options.vqgan_model_path, options.vqgan_config_path)
    result, samples = evaluate(options, load(options.dalle_path, *parts, pick_device(options.device, 0)))
    sys.stdout.write(report(result) + "\n")
    if options.json is not None:
        with writing("--json", options.json), atomic_write(options.json) as file:
            file.write(json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
    if options.sheet is not None:
        with writing("--sheet", options.sheet):
            save_picture(make_sheet(samples), options.sheet)


if __name__ == "__main__":
    run_main(main)
