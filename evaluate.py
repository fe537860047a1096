"""Evaluate a trained model: its loss on image-caption pairs, and retrieval@1 of the images generated on the demo set.

    python evaluate.py --dalle-path demo                         # the shipped model on the held-out demo images
    python evaluate.py --dalle-path output/ckpt/dalle_799.pt --input-folder data/COCO/val2017 --json result.json

Validation loss: nats per token, for text and image, and bits per code (a uniform guess costs log2(codebook size)).
Retrieval@1, on the demo set: the model samples one image for each held-out caption and for 200 training captions; it is
a hit if the nearest image of the set by pixel distance is the caption's own. No model can exceed the VQGAN that decodes
its codes, so the same figure is reported for reconstructions of the real images.
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it reports errors of the imports below

# isort: split
import json
import os
import sys
from typing import Sequence

import log
from dalle.evaluation import COMMAND, evaluate, finite, report
from dalle.loading import load
from dalle.measuring import plot_sweep
from dalle.pictures import make_sheet, save_picture
from dalle.scoring import Scores
from engines.native import pick_device
from utils.errors import UsageError, run_main
from utils.files import atomic_write, check_writable, writing
from utils.prompt_lists import read_prompts


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    options = COMMAND.parse(argv)
    log.setup()
    for flag, file in (("--json", options.json), ("--sheet", options.sheet), ("--plot", options.plot)):
        if file is not None:
            check_writable(flag, file)
    if options.json and options.sheet and os.path.realpath(options.json) == os.path.realpath(options.sheet):
        raise UsageError(f"--json and --sheet name the same file, {options.sheet}: give each its own")
    Scores(options.scorer)  # shows what is wrong with them before a model is loaded
    if options.prompts_file is not None:
        read_prompts(options.prompts_file, options.caption_column)
    parts = (options.bpe_path, options.vqgan_model_path, options.vqgan_config_path)
    device = pick_device(options.device, 0)
    loaded = load(options.dalle_path, *parts, device) if options.dalle_path else None
    result, samples = evaluate(options, loaded, device)
    sys.stdout.write(report(result) + "\n")
    if options.json is not None:
        with writing("--json", options.json), atomic_write(options.json) as file:
            file.write(json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
    if options.sheet is not None:
        with writing("--sheet", options.sheet):
            save_picture(make_sheet(samples), options.sheet)
    if options.plot is not None:
        with writing("--plot", options.plot):
            plot_sweep(result, options.plot)


if __name__ == "__main__":
    run_main(main)
