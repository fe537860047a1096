"""Console commands installed by `pip install`; mini-dalle-train is `python train.py`, and so on."""
from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

from utils.errors import run_main


def _run(module: str) -> None:
    run_main(import_module(module).main)


train, generate, evaluate, serve, train_vqgan = (
    partial(_run, name) for name in ("train", "generate", "evaluate", "serve", "train_vqgan")
)


def benchmark() -> None:
    """`python -m examples_utils benchmark`"""
    sys.argv.insert(1, "benchmark")
    _run("examples_utils.runner")
