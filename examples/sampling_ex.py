"""Sample candidates for a prompt, rank them by CLIP, save the best: minDALL-E's sampling example.

    python examples/sampling_ex.py --prompt "a painting of a tree on the ocean" -n 96 --clip-path CLIP_FOLDER
    python examples/sampling_ex.py --model demo --prompt "red apple" -n 8

Images go to <result-path>/<prompt>_0.png (the best), <prompt>_1.png, ... Without --clip-path, OpenAI's package `clip`
ranks them if installed, else the model's likelihood.
"""
from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import log
from dalle.generation import GenerateOptions
from dalle.models import Candidates, Dalle
from dalle.pictures import save_picture, to_pil
from dalle.prompt_folders import folder_name
from dalle.reranking import ClipRanker
from dalle.utils.utils import clip_score, set_seed
from engines.native import pick_device
from sampling import SamplingFlags, to_uint8
from utils.errors import run_main
from utils.files import make_folder
from utils.flags import DeviceOptions
from utils.options import Command, Options, again, option

logger = logging.getLogger("sampling_ex")


@dataclass(frozen=True)
class ExampleOptions(Options):
    """minDALL-E's flags, and more for machines without CUDA or network."""

    num_candidates: int = option(96, "images to sample", ge=1, short="-n")
    prompt: str = option("A painting of a tree on the ocean", "caption of the images", metavar="PROMPT")
    softmax_temperature: float = again(SamplingFlags, "temperature")
    top_k: int = option(256, "likeliest codes to sample from; 256 or less is recommended", ge=1, metavar="K")
    top_p: float | None = again(SamplingFlags, "top_p", default=None, none="all")
    seed: int = option(0, "seed of the images", ge=0, le=2**31 - 1)
    model: str = option("minDALL-E/1.3B", "name (5 GB are downloaded), folder or checkpoint")
    clip_path: str | None = again(GenerateOptions, "clip_path", none="OpenAI's package clip, or the likelihood")
    keep: int = option(16, "images to save", ge=1)
    batch_size: int | None = again(SamplingFlags, "batch_size", default=None, none="as many as fit")
    device: str = again(DeviceOptions, "device")
    result_path: str = option("./figures", "folder of the images", path=True)


COMMAND = Command("sampling_ex.py", "Sample candidates for a prompt and save the best.", ExampleOptions)


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, rank, save."""
    options = COMMAND.parse(argv)
    log.setup()
    folder = make_folder("--result-path", options.result_path)
    set_seed(options.seed)
    device = pick_device(options.device, 0)
    ranker = None if options.clip_path is None else ClipRanker(options.clip_path, device)
    model = Dalle.from_pretrained(options.model).to(device=device)
    generated = model.generate(
        options.prompt,
        top_k=options.top_k,
        top_p=options.top_p,
        softmax_temperature=options.softmax_temperature,
        num_candidates=options.num_candidates,
        batch_size=options.batch_size,
    )
    order = rank(options.prompt, generated, ranker, device)[: options.keep]
    images = to_uint8(generated.images).cpu()
    for place, index in enumerate(order.tolist()):
        save_picture(to_pil(images[index]), folder / f"{folder_name(options.prompt)}_{place}.png")
    logger.info("%s: %d of %d images, the best first: %s", folder, len(order), len(images), order.tolist())


def rank(prompt: str, generated: Candidates, ranker: ClipRanker | None, device: Any) -> np.ndarray:
    """Indices of the images, the best first: by the ranker, OpenAI's CLIP, or likelihood."""
    images = generated.images.cpu().numpy().transpose(0, 2, 3, 1)
    if ranker is not None:
        return clip_score(prompt, images, ranker)
    try:
        import clip
    except ImportError:
        logger.info("no --clip-path and no package clip: images are ranked by likelihood")
        return generated.log_likelihood.argsort(descending=True).cpu().numpy()
    model_clip, preprocess_clip = clip.load("ViT-B/32", device=device)
    return clip_score(prompt, images, model_clip, preprocess_clip, device)


if __name__ == "__main__":
    run_main(main)
