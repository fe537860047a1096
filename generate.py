"""Generate images from captions with a trained model.

    python generate.py --dalle-path demo --text "woman astronaut: medium-dark skin tone" --num-images 16
    python generate.py --dalle-path output/ckpt/dalle_799.pt --text "a plate of food|a cat on a sofa" --batch-size 16

    python generate.py --dalle-path demo --text "woman astronaut" --num-images 64 --clip-path CLIP_FOLDER --keep 8
    python generate.py --dalle-path demo --text "a red ball" --image ball.png --mask 0,0.5,1,1 --num-images 8

Images go to <outputs-dir>/<prompt with _ for spaces>/: 0.jpg, 1.jpg, ..., caption.txt, grid.png and generation.json.
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it reports errors of the imports below

# isort: split
from typing import Sequence

import log
from dalle.generation import COMMAND, generate, read_prompts
from dalle.loading import load
from dalle.outputs import check_folders
from engines.native import pick_device
from utils.errors import run_main
from utils.files import make_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    options = COMMAND.parse(argv)
    log.setup()
    prompts = read_prompts(options)
    check_folders(make_folder("--outputs-dir", options.outputs_dir), prompts)
    parts = (options.bpe_path, options.vqgan_model_path, options.vqgan_config_path)
    loaded = load(options.dalle_path, *parts, pick_device(options.device, 0), options.dtype)
    generate(options, prompts, loaded)


if __name__ == "__main__":
    run_main(main)
