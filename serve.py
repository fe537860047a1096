"""Serve a model: the OpenAI images API, and a page in the browser.

    python serve.py --dalle-path demo --port 8000
    python serve.py --dalle-path output/ckpt/dalle_799.pt --slots 64 --clip-path CLIP_FOLDER

Needs the packages of requirements-serve.txt. docs/server.md describes the API.
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it reports errors of the imports below

# isort: split
import logging
from typing import Sequence

import torch

import log
from dalle.loading import load, warn_of_guidance
from dalle.reranking import ClipRanker
from engines.native import pick_device
from server.options import COMMAND
from utils.errors import UserError, run_main

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as the command line says, until a signal comes."""
    options = COMMAND.parse(argv)
    log.setup()
    try:
        from server.app import make_app, model_name
        from server.running import listen, serve
    except ImportError as error:
        raise UserError(
            f"serving needs the package {error.name}: python -m pip install -r requirements-serve.txt"
        ) from error
    options.prompts()  # before anything is loaded
    taken = listen(options.host, options.port)
    if options.threads:
        torch.set_num_threads(options.threads)
    parts = (options.bpe_path, options.vqgan_model_path, options.vqgan_config_path)
    loaded = load(options.dalle_path, *parts, pick_device(options.device, 0), options.dtype)
    warn_of_guidance(loaded, options.cond_scale)
    ranker = None if options.clip_path is None else ClipRanker(options.clip_path, loaded.device)
    app = make_app(loaded, options, ranker)
    host, port = taken.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("%s is served at http://%s:%d", model_name(options), shown, port)
    return serve(app, taken, options.stop_timeout)


if __name__ == "__main__":
    run_main(main)
