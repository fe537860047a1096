"""Generate images from captions with a trained model.

    python generate.py --dalle-path demo --text "woman astronaut: medium-dark skin tone" --num-images 16
    python generate.py --dalle-path output/ckpt/dalle_799.pt --text "a plate of food|a cat on a sofa" --batch-size 16

    python generate.py --dalle-path demo --text "woman astronaut" --num-images 64 --clip-path CLIP_FOLDER --keep 8
    python generate.py --dalle-path demo --text "a red ball" --image ball.png --mask 0,0.5,1,1 --num-images 8

    torchrun --nproc-per-node 8 generate.py --dalle-path output/ckpt/dalle_799.pt --prompts-file prompts.txt \\
        --num-images 1 --layout tar --outputs-dir samples --resume

Images go to <outputs-dir>/<prompt with _ for spaces>/: 0.jpg, 1.jpg, ..., caption.txt, grid.png and generation.json;
with --layout flat or tar into one folder (dalle/outputs.py).
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it reports errors of the imports below

# isort: split
import contextlib
import os
from typing import Sequence

import log
from dalle.generation import COMMAND, generate, read_prompts, settings_of
from dalle.layouts import open_outputs
from dalle.loading import load
from engines.native import pick_device
from utils.errors import run_main
from utils.files import make_folder
from utils.processes import Processes


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    options = COMMAND.parse(argv)
    with Processes.started() as processes:
        log.setup(is_main=processes.is_first)
        prompts = read_prompts(options)
        make_folder("--outputs-dir", options.outputs_dir)
        outputs = open_outputs(prompts, options, processes)
        outputs.check({"settings": settings_of(options)})  # now, not when the model is loaded
        with contextlib.closing(outputs):
            parts = (options.bpe_path, options.vqgan_model_path, options.vqgan_config_path)
            device = pick_device(options.device, int(os.environ.get("LOCAL_RANK", "0")))
            loaded = load(options.dalle_path, *parts, device, options.dtype)
            generate(options, prompts, loaded, outputs, processes)


if __name__ == "__main__":
    run_main(main)
