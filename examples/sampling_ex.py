"""Draw candidates for a prompt, order them by CLIP, save the best: minDALL-E's sampling example.

    python examples/sampling_ex.py --prompt "a painting of a tree on the ocean" -n 96 --clip-path CLIP_FOLDER
    python examples/sampling_ex.py --model demo --prompt "red apple" -n 8

Images go to <result-path>/<prompt>_0.png (the best), <prompt>_1.png, ... Without --clip-path, OpenAI's package `clip`
orders them where it is installed, else the model's own likelihood.
"""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import log
from dalle.models import Candidates, Dalle
from dalle.outputs import folder_name
from dalle.pictures import save_picture, to_pil
from dalle.reranking import ClipRanker
from dalle.utils.utils import clip_score, set_seed
from engines.native import pick_device
from sampling import TEMPERATURES, to_uint8
from utils.errors import UserError, run_main
from utils.flags import Parser, number, parse_flags, path, whole

logger = logging.getLogger("sampling_ex")


def make_parser() -> Parser:
    """The flags: the published ones, and those that a machine without CUDA or network needs."""
    parser = Parser(
        prog="sampling_ex.py",
        description="Draw candidates for a prompt and save the best.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    parser.add_argument("-n", "--num_candidates", type=whole(1), default=96, help="images to draw (default: 96)")
    parser.add_argument("--prompt", default="A painting of a tree on the ocean")
    parser.add_argument("--softmax-temperature", type=number(*TEMPERATURES), default=1.0, metavar="T")
    parser.add_argument("--top-k", type=whole(1), default=256, metavar="K", help="256 or less is recommended")
    parser.add_argument("--top-p", type=number(0, 1, above=True), metavar="P", help="0.0 < top-p <= 1.0")
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=0)
    parser.add_argument(
        "--model", default="minDALL-E/1.3B", help="name, folder or checkpoint (default: minDALL-E/1.3B, 5 GB)"
    )
    parser.add_argument("--clip-path", type=path, metavar="DIR|NAME", help="CLIP model of transformers")
    parser.add_argument("--keep", type=whole(1), default=16, metavar="N", help="images to save (default: 16)")
    parser.add_argument("--batch-size", type=whole(1), metavar="N", help="images at a time (default: what fits)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--result-path", type=path, default="./figures", metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, order, save."""
    options = parse_flags(make_parser(), argv)
    log.setup()
    folder = Path(options.result_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--result-path {folder}: {error.strerror or error}") from error
    set_seed(options.seed)
    device = pick_device(options.device, 0)
    ranker = None if options.clip_path is None else ClipRanker(options.clip_path, device)
    model = Dalle.from_pretrained(options.model).to(device=device)
    drawn = model.draw(
        options.prompt,
        top_k=options.top_k,
        top_p=options.top_p,
        softmax_temperature=options.softmax_temperature,
        num_candidates=options.num_candidates,
        batch_size=options.batch_size,
    )
    order = rank(options.prompt, drawn, ranker, device)[: options.keep]
    pictures = to_uint8(drawn.images).cpu()
    for place, index in enumerate(order.tolist()):
        save_picture(to_pil(pictures[index]), folder / f"{folder_name(options.prompt)}_{place}.png")
    logger.info("%s: %d of %d images, the best first: %s", folder, len(order), len(pictures), order.tolist())


def rank(prompt: str, drawn: Candidates, ranker: ClipRanker | None, device: Any) -> np.ndarray:
    """Indices of the images, the best first: by the ranker, OpenAI's CLIP, or likelihood."""
    images = drawn.images.cpu().numpy().transpose(0, 2, 3, 1)
    if ranker is not None:
        return clip_score(prompt, images, ranker)
    try:
        import clip
    except ImportError:
        logger.info("no --clip-path and no package clip: the images are ordered by their likelihood")
        return drawn.log_likelihood.argsort(descending=True).cpu().numpy()
    model_clip, preprocess_clip = clip.load("ViT-B/32", device=device)
    return clip_score(prompt, images, model_clip, preprocess_clip, device)


if __name__ == "__main__":
    run_main(main)
